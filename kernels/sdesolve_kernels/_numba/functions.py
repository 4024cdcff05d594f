"""Elementary functions that LLVM vectorises in a loop over lanes, where a call into the C library keeps it scalar.

Each is a branch-free sequence of arithmetic, explicit fused multiply-adds and selects, so that its bits do not depend
on whether, or how wide, a loop was vectorised. Special values are torch's, and subnormal numbers are kept.

Largest errors in ulp, in float32 and float64: tan 2.5 and 2.4, tanh 2.6 and 1.5, asinh 1.8 and 2.2, sinh 1.9, cosh and
atan2 1.6, pow 0.6 and 1.2, the others 1.5 or less. Arguments of sin, cos and tan are reduced in full up to 2^21 and
2^50; longer ones, whose ulp is a quarter or more, count as a multiple of 2 pi that lies a few ulp away.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .circular import CIRCULAR
from .error_function import ERROR_FUNCTION
from .exponentials import EXPONENTIALS
from .inverse_circular import INVERSE_CIRCULAR
from .logarithms import LOGARITHMS
from .powers import POWERS
from .rounding import ROUNDING

__all__ = ["FUNCTIONS"]

# By name, as torch has it, and precision.
FUNCTIONS: dict[tuple[str, str], Callable[..., Any]] = (
    EXPONENTIALS | LOGARITHMS | POWERS | ERROR_FUNCTION | CIRCULAR | INVERSE_CIRCULAR | ROUNDING
)
