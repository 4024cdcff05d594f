"""Ancestral sampling."""

from __future__ import annotations

from typing import Literal, final

from torch import Tensor

from sdesolve._internal.arguments import short
from sdesolve.sde import AbstractSemilinear, Noise
from sdesolve.solvers.base import supports
from sdesolve.solvers.schedule import Schedule
from sdesolve.solvers.single_row import AbstractSingleRow, clean_end, transition_variance
from sdesolve.solvers.tabulated import Table


@final
class Ancestral(AbstractSingleRow):
    """Draws ``x'`` from the posterior given ``x`` and the denoised state ``D``: DDPM and SMLD sampling.

    ``x' = alpha'/alpha (x + sigma^2 (1 - r^2) s) + c z`` with ``r = (sigma'/alpha') / (sigma/alpha)``; the mean is that
    of ``x' | x, x_0 = D``. The posterior's own deviation is ``c = sigma' sqrt(1 - r^2)``: right for data at one point,
    and the choice for which this is the exponential integrator of order 1 (`SDEDPMSolverPP` and SEEDS of order 1). The
    deviation of the forward transition, ``sigma sqrt(1 - r^2)``, is right for data of unit variance under VP.

    For the reverse SDE of stochasticity 1. Weak order 1. Ho et al. 2020, eq. 7 and section 3.2; Song et al. 2021,
    appendix F.

    Args:
        variance: ``"posterior"`` or ``"forward"``.
    """

    supported = supports(ito=(Noise.ADDITIVE,))
    stochasticity = 1.0
    strong_order = None
    weak_order = 1.0
    ode_order = None
    evaluations = 1

    def __init__(self, variance: Literal["posterior", "forward"] = "posterior") -> None:
        if variance not in ("posterior", "forward"):
            raise ValueError(f"variance must be 'posterior' or 'forward', got {short(variance)}")
        self.variance = variance

    def table(self, sde: AbstractSemilinear, times: Tensor) -> Table:
        p = Schedule.of(self, sde, times)
        a, G2 = p.alpha[1:] / p.alpha[:-1], transition_variance(p)
        c = G2.sqrt() if self.variance == "forward" else p.sigma[1:] / p.sigma[:-1] * G2.sqrt()
        return clean_end(p, a, a * G2, c, sde)
