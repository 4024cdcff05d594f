"""The shifted additive-noise Runge-Kutta method."""

from __future__ import annotations

from typing import final

from torch import Tensor

from sdesolve.brownian import Increment
from sdesolve.sde import AbstractSDE, Noise
from sdesolve.solvers.base import AbstractEstimating, Estimate, Span, supports


@final
class ShARK(AbstractEstimating):
    """``x' = x + h (2 f(y, t) + 3 f(z, t + 5/6 h)) / 5 + g(t) (W/2 + H) + g(t + h) (W/2 - H)``.

    ``y = x + g(t) H`` and ``z = y + 5/6 (h f(y, t) + g(t) W)``. Strong order 3/2 and weak order 2 for additive noise,
    second order on an ODE. The first choice for additive noise. Foster, dos Reis and Strange 2023, equation 6.1, with
    the noise of a ``g`` that depends on time exact to the order of the scheme.
    """

    supported = supports(ito=(Noise.NONE, Noise.ADDITIVE), stratonovich=(Noise.NONE, Noise.ADDITIVE))
    strong_order = None
    strong_orders = (1.5, None, None)
    weak_order = 2.0
    ode_order = 2
    evaluations = 2
    diffusion_evaluations = 2
    by_products = True
    needs = ("W", "H")

    def attempt(self, sde: AbstractSDE, x: Tensor, span: Span, noise: Increment | None) -> tuple[Tensor, Estimate]:
        t, h, later = span.t0, span.dt, span.at(5.0 / 6.0)
        if noise is None:
            f = sde.drift(x, t)
            f2 = sde.drift(x + 5.0 / 6.0 * h * f, later)
            return x + h * (0.4 * f + 0.6 * f2), lambda: 0.6 * h * (f2 - f)
        assert noise.H is not None
        W, H, g0, g1 = noise.W, noise.H, sde.product_at(x, t), sde.product_at(x, span.t1)
        y = x + g0(H)
        f = sde.drift(y, t)
        z = y + 5.0 / 6.0 * (h * f + g0(W))
        f2 = sde.drift(z, later)
        after = x + h * (0.4 * f + 0.6 * f2) + g0(0.5 * W + H) + g1(0.5 * W - H)
        return after, lambda: 0.6 * h * (f2 - f) + (g1(0.5 * W - H) - g0(0.5 * W - H))
