"""The reverse diffusion predictor."""

from __future__ import annotations

from typing import final

from torch import Tensor

from sdesolve.sde import AbstractSemilinear, Noise
from sdesolve.solvers.base import supports
from sdesolve.solvers.schedule import Schedule, deviation
from sdesolve.solvers.single_row import AbstractSingleRow, clean_end, transition_variance
from sdesolve.solvers.tabulated import Table


@final
class ReverseDiffusion(AbstractSingleRow):
    """``x' = (2 - f) x + (1 + q^2)/2 G^2 s + q G z`` where ``f x + G z`` is the forward transition over the same step.

    The predictor of Song et al. 2021 (eq. 46), which mirrors a discretised forward process, here with the process's
    exact transition ``f = alpha / alpha'`` and ``G^2 = sigma^2 - f^2 sigma'^2``. For the reverse SDE of any
    stochasticity ``q``, and with ``q = 0`` the flow. On a process with ``alpha = 1`` it is Euler-Maruyama in
    ``sigma^2``. Weak order 1.
    """

    supported = supports(ito=(Noise.NONE, Noise.ADDITIVE))
    strong_order = None
    weak_order = 1.0
    ode_order = 1
    evaluations = 1

    def table(self, sde: AbstractSemilinear, times: Tensor) -> Table:
        p = Schedule.of(self, sde, times)
        q2 = p.stochasticity**2
        f, G2 = p.alpha[:-1] / p.alpha[1:], transition_variance(p)
        return clean_end(p, 2.0 - f, 0.5 * (1.0 + q2) * G2, deviation(q2 * G2), sde)
