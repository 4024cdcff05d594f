"""The two precisions that the elementary functions are written for, so that each is written once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from .compile import inline
from .intrinsics import as_float32, as_float64, as_int32, as_int64

__all__ = ["FLOAT32", "FLOAT64", "Precision"]


class Precision(NamedTuple):
    """A binary floating-point format: types of its numbers and of their bits, and casts between the two.

    Args:
        name: As torch names it.
        real: The numbers.
        integer: Signed integers of the same width.
        unsigned: Unsigned integers of the same width.
        as_integer: The bits of a number, signed.
        as_real: The number that has these bits.
        mantissa: How many bits below the leading one are stored.
        bias: What is added to an exponent before it is stored.
    """

    name: str
    real: Any
    integer: Any
    unsigned: Any
    as_integer: Any
    as_real: Any
    mantissa: int
    bias: int

    @property
    def round_bias(self) -> Any:
        r"""Added to a number of at most $2^{m - 1}$, leaves its nearest whole number in the last bits of the sum."""
        return self.real(1.5 * 2.0**self.mantissa)

    def inline(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Compile a helper of this precision, always inlined, under its name with the precision's behind."""
        function.__name__ = function.__qualname__ = f"{function.__name__}_{self.name}"
        return inline(function)


FLOAT32 = Precision("float32", np.float32, np.int32, np.uint32, as_int32, as_float32, 23, 127)
FLOAT64 = Precision("float64", np.float64, np.int64, np.uint64, as_int64, as_float64, 52, 1023)
