"""Heun's method: the Stratonovich predictor-corrector, and second order for ODEs."""

from __future__ import annotations

from typing import final

from torch import Tensor

from sdesolve.brownian import Increment
from sdesolve.sde import AbstractSDE, Noise
from sdesolve.solvers.base import AbstractEstimating, Estimate, Span, drift_and_noise, supports


@final
class Heun(AbstractEstimating):
    """An Euler step as predictor ``y``, then ``x' = x + (f(x, t) + f(y, t')) dt / 2 + (g(x, t) + g(y, t')) dW / 2``.

    Second order on an ODE. On a Stratonovich SDE strong order 1/2, which becomes 1 when the noise commutes (scalar, or
    diagonal with each ``g_i`` a function of ``x_i``), and weak order 1. An Ito SDE is accepted only with additive
    noise, where the two calculi agree. Ruemelin 1982; Kloeden and Platen 1992, section 15.5.
    """

    supported = supports(ito=(Noise.NONE, Noise.ADDITIVE), stratonovich=tuple(Noise))
    strong_order = 0.5
    strong_orders = (1.0, 1.0, 0.5)
    weak_order = 1.0
    ode_order = 2
    evaluations = 2
    diffusion_evaluations = 2
    by_products = True

    def attempt(self, sde: AbstractSDE, x: Tensor, span: Span, noise: Increment | None) -> tuple[Tensor, Estimate]:
        t0, t1, dt = span.t0, span.t1, span.dt
        f, g_dW = drift_and_noise(sde, x, t0, noise)
        f_next, g_next_dW = drift_and_noise(sde, x + f * dt + g_dW, t1, noise)
        after = x + 0.5 * (f + f_next) * dt + 0.5 * (g_dW + g_next_dW)
        return after, lambda: 0.5 * (f_next - f) * dt + 0.5 * (g_next_dW - g_dW)
