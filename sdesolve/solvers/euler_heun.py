"""The Euler-Heun method."""

from __future__ import annotations

from typing import final

from torch import Tensor

from sdesolve.brownian import Increment
from sdesolve.sde import AbstractSDE, Noise
from sdesolve.solvers.base import AbstractOneStep, Span, drift_and_noise, noise_term, supports


@final
class EulerHeun(AbstractOneStep):
    """``x' = x + f(x, t) h + (g(x, t) + g(y, t + h)) W / 2`` with ``y = x + g(x, t) W``.

    Strong order 1/2 on a Stratonovich SDE, 1 when the noise commutes, and weak order 1; Euler's method on an ODE. An
    Ito SDE is accepted only with additive noise. `Heun` averages the drift too. Kloeden and Platen 1992, section 15.5.
    """

    supported = supports(ito=(Noise.NONE, Noise.ADDITIVE), stratonovich=tuple(Noise))
    strong_order = 0.5
    strong_orders = (1.0, 1.0, 0.5)
    weak_order = 1.0
    ode_order = 1
    evaluations = 1
    diffusion_evaluations = 2
    by_products = True

    def step(self, sde: AbstractSDE, x: Tensor, span: Span, noise: Increment | None) -> Tensor:
        f, g_W = drift_and_noise(sde, x, span.t0, noise)
        return x + f * span.dt + 0.5 * (g_W + noise_term(sde, x + g_W, span.t1, noise))
