"""The process of Karras et al., where time is the noise level."""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor

from sdesolve import grids
from sdesolve._internal.arguments import number
from sdesolve.diffusions.base import AbstractDiffusion, Prior, as_time, check_times


@final
class EDM(AbstractDiffusion):
    """``dX = sqrt(2 t) dW``: ``alpha = 1``, ``sigma(t) = t`` (Karras et al. 2022, section 3).

    Args:
        sigma_min: lowest noise level that sampling visits, also ``t_min``.
        sigma_max: highest, also ``t_max``.
        rho: exponent of the default grid (`grids.karras`).
    """

    def __init__(self, sigma_min: float = 0.002, sigma_max: float = 80.0, *, rho: float = 7.0) -> None:
        check_times(sigma_min, sigma_max)
        self.t_min, self.t_max, self.rho = float(sigma_min), float(sigma_max), number(rho, "rho")

    def log_alpha(self, t: Tensor | float) -> Tensor:
        return torch.zeros_like(as_time(t))

    def sigma(self, t: Tensor | float) -> Tensor:
        return as_time(t).clone()

    def time_at_log_snr(self, log_snr: Tensor | float) -> Tensor:
        return (-0.5 * as_time(log_snr)).exp()

    def drift_rate(self, t: Tensor | float) -> Tensor:
        return torch.zeros_like(as_time(t))

    def squared_diffusion(self, t: Tensor | float) -> Tensor:
        return 2.0 * as_time(t)

    @property
    def prior(self) -> Prior:
        """``N(0, sigma_max^2 I)``."""
        return Prior(self.t_max)

    def time_grid(self, steps: int) -> Tensor:
        """The grid of Karras et al. (`grids.karras`)."""
        return grids.karras(self.t_max, self.t_min, steps, self.rho)
