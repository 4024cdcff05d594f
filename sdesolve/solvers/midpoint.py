"""The explicit midpoint method."""

from __future__ import annotations

from typing import final

from torch import Tensor

from sdesolve.brownian import Increment
from sdesolve.sde import AbstractSDE, Noise
from sdesolve.solvers.base import AbstractOneStep, Span, drift_and_noise, supports


@final
class Midpoint(AbstractOneStep):
    """``x' = x + f(y, t + h/2) h + g(y, t + h/2) W`` with ``y = x + (f(x, t) h + g(x, t) W) / 2``.

    Strong order 1/2 on a Stratonovich SDE, 1 when the noise commutes, and weak order 1; second order on an ODE. An Ito
    SDE is accepted only with additive noise, where the two calculi agree. Kloeden and Platen 1992, section 10.4.
    """

    supported = supports(ito=(Noise.NONE, Noise.ADDITIVE), stratonovich=tuple(Noise))
    strong_order = 0.5
    strong_orders = (1.0, 1.0, 0.5)
    weak_order = 1.0
    ode_order = 2
    evaluations = 2
    diffusion_evaluations = 2
    by_products = True

    def step(self, sde: AbstractSDE, x: Tensor, span: Span, noise: Increment | None) -> Tensor:
        t, dt, middle = span.t0, span.dt, span.at(0.5)
        f, g_dW = drift_and_noise(sde, x, t, noise)
        f, g_dW = drift_and_noise(sde, x + 0.5 * (f * dt + g_dW), middle, noise)
        return x + f * dt + g_dW
