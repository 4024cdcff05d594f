"""The shifted Runge-Kutta method for general noise."""

from __future__ import annotations

from typing import final

from torch import Tensor

from sdesolve.brownian import Increment
from sdesolve.sde import AbstractSDE, Noise
from sdesolve.solvers.base import AbstractEstimating, Estimate, Span, supports


@final
class GeneralShARK(AbstractEstimating):
    """``x' = x + h (2 f_1 + 3 f_2) / 5 + g_1 (2/5 W + 6/5 H) + g_2 (3/5 W - 6/5 H)``.

    Subscripts are of the states ``y = x + g(x, t) H`` at ``t`` and ``y + 5/6 (h f_1 + g_1 W)`` at ``t + 5/6 h``.

    On a Stratonovich SDE strong order 1/2, 1 when the noise commutes and 3/2 when it is additive; weak order 1 (2 for
    additive noise), second order on an ODE. An Ito SDE is accepted only with additive noise. Foster, dos Reis and
    Strange 2023, "High order splitting methods for SDEs satisfying a commutativity condition", with `ShARK`.
    """

    supported = supports(ito=(Noise.NONE, Noise.ADDITIVE), stratonovich=tuple(Noise))
    strong_order = 0.5
    strong_orders = (1.5, 1.0, 0.5)
    weak_order = 1.0
    ode_order = 2
    evaluations = 2
    diffusion_evaluations = 3
    by_products = True
    needs = ("W", "H")

    def attempt(self, sde: AbstractSDE, x: Tensor, span: Span, noise: Increment | None) -> tuple[Tensor, Estimate]:
        t, h, later = span.t0, span.dt, span.at(5.0 / 6.0)
        if noise is None:
            f1 = sde.drift(x, t)
            f2 = sde.drift(x + 5.0 / 6.0 * h * f1, later)
            return x + h * (0.4 * f1 + 0.6 * f2), lambda: 0.6 * h * (f2 - f1)
        assert noise.H is not None
        W, H = noise.W, noise.H
        y = x + sde.diffusion_product(x, t, H)
        f1, g1 = sde.drift_and_product_at(y, t)
        f2, g2 = sde.drift_and_product_at(y + 5.0 / 6.0 * (h * f1 + g1(W)), later)
        after = x + h * (0.4 * f1 + 0.6 * f2) + g1(0.4 * W + 1.2 * H) + g2(0.6 * W - 1.2 * H)
        return after, lambda: 0.6 * h * (f2 - f1) + (g2(0.6 * W - 1.2 * H) - g1(0.6 * W - 1.2 * H))
