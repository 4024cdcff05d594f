"""The classical Runge-Kutta method."""

from __future__ import annotations

from typing import final

from torch import Tensor

from sdesolve.brownian import Increment
from sdesolve.sde import AbstractSDE, Noise
from sdesolve.solvers.base import AbstractOneStep, Span, supports


@final
class RK4(AbstractOneStep):
    """The classical four-stage Runge-Kutta method, order 4, for ODEs such as the probability flow. Kutta 1901."""

    supported = supports(ito=(Noise.NONE,))
    strong_order = None
    weak_order = None
    ode_order = 4
    evaluations = 4

    def step(self, sde: AbstractSDE, x: Tensor, span: Span, noise: Increment | None) -> Tensor:
        dt, middle = span.dt, span.at(0.5)
        k1 = sde.drift(x, span.t0)
        k2 = sde.drift(x + 0.5 * dt * k1, middle)
        k3 = sde.drift(x + 0.5 * dt * k2, middle)
        k4 = sde.drift(x + dt * k3, span.t1)
        return x + dt * (k1 + 2.0 * (k2 + k3) + k4) / 6.0
