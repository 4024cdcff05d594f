"""How an adaptive solver chooses its steps."""

from __future__ import annotations

import dataclasses
import math
from typing import final

import torch
from torch import Tensor

from sdesolve._internal.arguments import number, whole_number

_SAFETY, _SHRINK, _GROW = 0.9, 0.2, 10.0


@final
@dataclasses.dataclass(frozen=True)
class StepController:
    """Step sizes ``0.9 error^(-1/order)`` times the last one, for each sample by that sample's own error.

    A step is accepted if the root mean square over the state of ``error / (atol + rtol max(|x|, |x'|))`` is below 1.
    Factors stay within 0.2 and 10, and there is no growth right after a rejection. Hairer, Norsett and Wanner 1993,
    section II.4.

    Args:
        rtol: relative tolerance of a step, at least 4 times the rounding error of the state's dtype.
        atol: absolute tolerance of a step.
        max_steps: attempts that a sample may take before `solve` gives up.

    Raises:
        ValueError: a tolerance that is not positive and finite (``atol`` may be 0), or ``max_steps`` below 1.
        TypeError: a tolerance that is not a number, or ``max_steps`` that is not an integer.
    """

    rtol: float
    atol: float
    max_steps: int

    def __post_init__(self) -> None:
        if not (0.0 < number(self.rtol, "rtol") < math.inf and 0.0 <= number(self.atol, "atol") < math.inf):
            raise ValueError(
                f"tolerances must be finite, rtol > 0 and atol >= 0, got rtol={self.rtol}, atol={self.atol}"
            )
        whole_number(self.max_steps, "max_steps", 1)

    def scale(self, size: Tensor) -> Tensor:
        """The error that is tolerated in a state of that ``size``."""
        return self.atol + self.rtol * size.detach()

    def next_step(self, dt: Tensor, error: Tensor, order: int, held: Tensor) -> Tensor:
        """Sizes of the next attempts.

        Args:
            dt: sizes of the last attempts, ``(batch,)``.
            error: of those in units of the tolerance, ``(batch,)``; nan shrinks the step.
            order: of the error estimate.
            held: samples that must not grow: this attempt or the one before was rejected.
        """
        growth = (_SAFETY * error ** (-1.0 / order)).nan_to_num(_SHRINK).clamp(_SHRINK, _GROW)
        return dt.abs() * torch.where(held, growth.clamp(max=1.0), growth)
