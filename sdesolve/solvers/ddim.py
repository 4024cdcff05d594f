"""Denoising diffusion implicit models."""

from __future__ import annotations

from typing import final

from torch import Tensor

from sdesolve._internal.arguments import number, short
from sdesolve.sde import AbstractSemilinear, Noise
from sdesolve.solvers.base import Supported, supports
from sdesolve.solvers.schedule import Schedule, deviation
from sdesolve.solvers.single_row import AbstractSingleRow, single_row
from sdesolve.solvers.tabulated import Table


@final
class DDIM(AbstractSingleRow):
    """``x' = alpha' D + sqrt(sigma'^2 - c^2) e + c z``, where ``D`` and ``e = -sigma s`` are data and noise predicted.

    ``c = eta sigma' sqrt(1 - r^2)`` with ``r`` as in `Ancestral`: ``eta`` scales the standard deviation, not the
    variance. 0 is the flow, solved exactly for constant ``e``: order 1; 1 is `Ancestral`; between, and for small steps,
    the reverse SDE of stochasticity ``eta``, of weak order 1. Song, Meng and Ermon 2021, eq. 12 and 16.

    Args:
        eta: in [0, 1].
    """

    strong_order = None
    evaluations = 1

    def __init__(self, eta: float = 0.0) -> None:
        if not 0.0 <= number(eta, "eta") <= 1.0:
            raise ValueError(f"eta scales the standard deviation of the noise and lies in [0, 1], got {short(eta)}")
        self.eta = float(eta)

    @property
    def supported(self) -> Supported:
        return supports(ito=(Noise.ADDITIVE if self.eta else Noise.NONE,))

    @property
    def weak_order(self) -> float | None:
        return 1.0 if self.eta else None

    @property
    def ode_order(self) -> int | None:
        return None if self.eta else 1

    @property
    def stochasticity(self) -> float:
        return self.eta

    def table(self, sde: AbstractSemilinear, times: Tensor) -> Table:
        p = Schedule.of(self, sde, times)
        alpha, sigma = p.alpha[1:], p.sigma[1:]
        noise = self.eta**2 * (1.0 - (p.rho[1:] / p.rho[:-1]).square())
        b = p.sigma[:-1] * (alpha * p.rho[:-1] - sigma * (1.0 - noise).sqrt())
        return single_row(times, alpha / p.alpha[:-1], b, sigma * deviation(noise), noisy=self.eta > 0)

    def denoised_table(self, sde: AbstractSemilinear, times: Tensor) -> Table:
        p = Schedule.of(self, sde, times, from_noise=True)
        noise = self.eta**2 * (1.0 - (p.rho[1:] / p.rho[:-1]).square())
        a = p.sigma[1:] * (1.0 - noise).sqrt() / p.sigma[:-1]
        return single_row(times, a, p.alpha[1:] - a * p.alpha[:-1], p.sigma[1:] * deviation(noise), noisy=self.eta > 0)
