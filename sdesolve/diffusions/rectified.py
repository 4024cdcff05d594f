"""The straight line from data to noise that flow matching learns along, as a diffusion."""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor

from sdesolve import grids
from sdesolve.diffusions.base import AbstractInterpolant, Prior, as_time, check_data_at, check_times


@final
class Rectified(AbstractInterpolant):
    """``x_t = (1 - t) x_0 + t z``: ``alpha = 1 - t``, ``sigma = t`` (Liu et al. 2023, eq. 1; Lipman et al. 2023).

    As an SDE, ``dX = -X / (1 - t) dt + sqrt(2 t / (1 - t)) dW``, whose rates have no bound as ``t -> 1``: sampling
    starts just before, or at ``t_max=1`` by samplers in the denoised state (`DDIM`, `DPMSolverPP`, `UniPC`). Its
    probability flow is the ODE ``dx/dt = E[z - x_0 | x_t = x]``: a network trained by flow matching goes into a
    `NetworkScore` with ``predicts="flow"``. Time is 0 for data and 1 for noise. A network ``v(x, s)`` that counts the
    other way, along ``x_s = s x_0 + (1 - s) z``, and predicts ``x_0 - z``, goes in as it is on
    ``Rectified(data_at=1)``.

    Args:
        t_min: where sampling stops; there the noise has standard deviation ``t_min``.
        t_max: where it starts; there the data have weight ``1 - t_max``.
        data_at: 0 or 1, the time of data on the clock of networks alone (`AbstractInterpolant`).

    Raises:
        ValueError: unless ``0 < t_min < t_max <= 1``, or another ``data_at``.
    """

    def __init__(self, t_min: float = 1e-3, t_max: float = 0.999, *, data_at: int = 0) -> None:
        check_times(t_min, t_max)
        self.data_at = check_data_at(data_at)
        if t_max > 1.0:
            raise ValueError(f"t_max must be at most 1, where nothing is left of the data; got {t_max}")
        self.t_min, self.t_max = float(t_min), float(t_max)

    def log_alpha(self, t: Tensor | float) -> Tensor:
        return torch.log1p(-as_time(t))

    def sigma(self, t: Tensor | float) -> Tensor:
        return as_time(t).clone()

    def time_at_log_snr(self, log_snr: Tensor | float) -> Tensor:
        return torch.sigmoid(-0.5 * as_time(log_snr))

    def drift_rate(self, t: Tensor | float) -> Tensor:
        return -1.0 / (1.0 - as_time(t))

    def squared_diffusion(self, t: Tensor | float) -> Tensor:
        t = as_time(t)
        return 2.0 * t / (1.0 - t)

    def velocity_rates(self, t: Tensor | float) -> tuple[Tensor, Tensor]:
        one = torch.ones_like(as_time(t))
        return -one, one

    @property
    def prior(self) -> Prior:
        """``N(0, t_max^2 I)``."""
        return Prior(self.t_max)

    def time_grid(self, steps: int) -> Tensor:
        """Uniform in time."""
        return grids.uniform(self.t_max, self.t_min, steps)
