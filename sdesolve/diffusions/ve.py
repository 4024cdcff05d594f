"""The variance-exploding process with a geometric noise level."""

from __future__ import annotations

import math
from typing import final

import torch
from torch import Tensor

from sdesolve import grids
from sdesolve.diffusions.base import AbstractDiffusion, Prior, as_time, check_positive, check_times


@final
class VE(AbstractDiffusion):
    """Variance exploding: ``dX = g(t) dW`` with ``g^2 = d/dt sigma_min^2 r^(2t)``, ``r = sigma_max / sigma_min``.

    ``alpha = 1`` and ``sigma(t)^2 = sigma_min^2 (r^(2t) - 1)``: what the SDE started from data at ``t = 0`` really has.
    Song et al. 2021 (eq. 30) use ``sigma_min r^t`` for the marginal, whose square exceeds this by ``sigma_min^2`` at
    every time and belongs to no solution that starts at data.

    Args:
        sigma_min: scale of the noise level, positive.
        sigma_max: noise level at ``t = 1`` (up to ``sigma_min``), above ``sigma_min``.
        t_min: where sampling stops.
    """

    t_max = 1.0

    def __init__(self, sigma_min: float = 0.01, sigma_max: float = 50.0, *, t_min: float = 1e-5) -> None:
        check_positive(sigma_min=sigma_min, sigma_max=sigma_max)
        check_times(t_min, self.t_max)
        if sigma_max <= sigma_min:
            raise ValueError(f"sigma_max must be above sigma_min, got sigma_min={sigma_min}, sigma_max={sigma_max}")
        self.sigma_min, self.sigma_max, self.t_min = float(sigma_min), float(sigma_max), float(t_min)
        self._log_ratio = math.log(sigma_max / sigma_min)

    def log_alpha(self, t: Tensor | float) -> Tensor:
        return torch.zeros_like(as_time(t))

    def sigma(self, t: Tensor | float) -> Tensor:
        t = as_time(t)
        return (self.sigma_min * torch.expm1(self._exponent(t)).sqrt()).to(t.dtype)

    def time_at_log_snr(self, log_snr: Tensor | float) -> Tensor:
        # sigma^2 / sigma_min^2 = r^(2t) - 1
        return torch.log1p((-as_time(log_snr)).exp() / self.sigma_min**2) / (2.0 * self._log_ratio)

    def drift_rate(self, t: Tensor | float) -> Tensor:
        return torch.zeros_like(as_time(t))

    def squared_diffusion(self, t: Tensor | float) -> Tensor:
        t = as_time(t)
        return (2.0 * self._log_ratio * self.sigma_min**2 * self._exponent(t).exp()).to(t.dtype)

    @property
    def prior(self) -> Prior:
        """``N(0, sigma(1)^2 I)``."""
        return Prior(float(self.sigma(self.t_max)))

    def time_grid(self, steps: int) -> Tensor:
        """Uniform in time, which is geometric in noise level."""
        return grids.uniform(self.t_max, self.t_min, steps)

    def _exponent(self, t: Tensor) -> Tensor:
        # The exponent reaches 20, and exp turns its rounding error into twenty times that: 1e-6 in float32.
        return 2.0 * self._log_ratio * t.double()
