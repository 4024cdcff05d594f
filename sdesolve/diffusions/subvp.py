"""The sub-variance-preserving process."""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor

from sdesolve.diffusions.base import as_time
from sdesolve.diffusions.vp import AbstractScheduled


@final
class SubVP(AbstractScheduled):
    """Sub-VP: ``dX = -beta/2 X dt + sqrt(beta (1 - exp(-2B))) dW`` (Song et al. 2021, eq. 27).

    ``alpha = exp(-B/2)`` and ``sigma = 1 - exp(-B)``: no square root, it is the variance of `VP` that is the standard
    deviation here.

    Args:
        schedule: an `AbstractBetaSchedule`; `LinearBeta` with rates 0.1 to 20 by default.
    """

    def sigma(self, t: Tensor | float) -> Tensor:
        return -torch.expm1(-self.schedule.integral(as_time(t)))

    def time_at_log_snr(self, log_snr: Tensor | float) -> Tensor:
        # sigma / alpha = 2 sinh(B / 2)
        return self.schedule.time_at_integral(2.0 * (0.5 * (-0.5 * as_time(log_snr)).exp()).asinh())

    def squared_diffusion(self, t: Tensor | float) -> Tensor:
        t = as_time(t)
        return -self.schedule.beta(t) * torch.expm1(-2.0 * self.schedule.integral(t))
