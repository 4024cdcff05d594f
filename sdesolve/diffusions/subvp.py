"""The sub-variance-preserving process."""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor

from sdesolve import grids
from sdesolve._internal.arguments import kind_of
from sdesolve.diffusions.base import AbstractDiffusion, Prior, as_time
from sdesolve.diffusions.vp import BetaSchedule, LinearBeta


@final
class SubVP(AbstractDiffusion):
    """Sub-VP: ``dX = -beta/2 X dt + sqrt(beta (1 - exp(-2B))) dW`` (Song et al. 2021, eq. 27).

    ``alpha = exp(-B/2)`` and ``sigma = 1 - exp(-B)``: no square root, it is the variance of `VP` that is the standard
    deviation here.

    Args:
        schedule: a `BetaSchedule`; `LinearBeta` with rates 0.1 to 20 by default.
    """

    def __init__(self, schedule: BetaSchedule | None = None) -> None:
        self.schedule = LinearBeta() if schedule is None else schedule
        if not isinstance(self.schedule, BetaSchedule):
            raise TypeError(
                f"schedule must be a BetaSchedule, LinearBeta(0.1, 20) or CosineBeta(), got {kind_of(schedule)}"
            )
        self.t_min, self.t_max = self.schedule.t_min, self.schedule.t_max

    def log_alpha(self, t: Tensor | float) -> Tensor:
        return -0.5 * self.schedule.integral(as_time(t))

    def sigma(self, t: Tensor | float) -> Tensor:
        return -torch.expm1(-self.schedule.integral(as_time(t)))

    def time_at_log_snr(self, log_snr: Tensor | float) -> Tensor:
        # sigma / alpha = 2 sinh(B / 2)
        return self.schedule.time_at_integral(2.0 * (0.5 * (-0.5 * as_time(log_snr)).exp()).asinh())

    def drift_rate(self, t: Tensor | float) -> Tensor:
        return -0.5 * self.schedule.beta(as_time(t))

    def squared_diffusion(self, t: Tensor | float) -> Tensor:
        t = as_time(t)
        return -self.schedule.beta(t) * torch.expm1(-2.0 * self.schedule.integral(t))

    @property
    def prior(self) -> Prior:
        """The limit law ``N(0, I)``."""
        return Prior(1.0)

    def time_grid(self, steps: int) -> Tensor:
        """Uniform in time."""
        return grids.uniform(self.t_max, self.t_min, steps)
