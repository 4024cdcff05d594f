"""The Ornstein-Uhlenbeck process."""

from __future__ import annotations

import math
from typing import final

import torch
from torch import Tensor

from sdesolve import grids
from sdesolve.diffusions.base import AbstractDiffusion, Prior, as_time, check_positive, check_times


@final
class OU(AbstractDiffusion):
    """Ornstein-Uhlenbeck: ``dX = -rate X dt + scale dB``; by default ``dX = -X dt + sqrt(2) dB``.

    ``alpha = exp(-rate t)`` and ``sigma^2 = scale^2 / (2 rate) (1 - exp(-2 rate t))``. The step-size schedules that
    score-based models put on it are `grids.linear_steps` (the schedule of DDPM; the default) and
    `grids.exponential_steps` (steps in proportion to time near the data).

    Args:
        rate: mean reversion, one over time, positive.
        scale: noise amplitude, positive.
        t_min: where sampling stops.
        t_max: where it starts; the data's share in ``x_t`` is ``exp(-rate t_max)``.
    """

    def __init__(
        self, rate: float = 1.0, scale: float = math.sqrt(2.0), *, t_min: float = 1e-3, t_max: float = 5.0
    ) -> None:
        check_positive(rate=rate, scale=scale)
        check_times(t_min, t_max)
        self.rate, self.scale, self.t_min, self.t_max = float(rate), float(scale), float(t_min), float(t_max)

    def log_alpha(self, t: Tensor | float) -> Tensor:
        return -self.rate * as_time(t)

    def sigma(self, t: Tensor | float) -> Tensor:
        return self.scale / math.sqrt(2.0 * self.rate) * (-torch.expm1(-2.0 * self.rate * as_time(t))).sqrt()

    def time_at_log_snr(self, log_snr: Tensor | float) -> Tensor:
        # sigma^2 / alpha^2 = scale^2 / (2 rate) (exp(2 rate t) - 1)
        return torch.log1p((-as_time(log_snr)).exp() * (2.0 * self.rate / self.scale**2)) / (2.0 * self.rate)

    def drift_rate(self, t: Tensor | float) -> Tensor:
        return torch.full_like(as_time(t), -self.rate)

    def squared_diffusion(self, t: Tensor | float) -> Tensor:
        return torch.full_like(as_time(t), self.scale**2)

    @property
    def prior(self) -> Prior:
        """The stationary law, ``N(0, scale^2 / (2 rate) I)``."""
        return Prior(self.scale / math.sqrt(2.0 * self.rate))

    def time_grid(self, steps: int) -> Tensor:
        """Linearly changing step sizes (`grids.linear_steps`)."""
        return grids.linear_steps(self.t_max, self.t_min, steps)
