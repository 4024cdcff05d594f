"""The splitting-path Runge-Kutta method."""

from __future__ import annotations

from typing import final

from torch import Tensor

from sdesolve.brownian import Increment
from sdesolve.sde import AbstractSDE, Noise
from sdesolve.solvers.base import AbstractEstimating, Estimate, Span, supports

_A, _B = (3.0 - 3.0**0.5) / 6.0, 3.0**0.5 / 3.0


@final
class SPaRK(AbstractEstimating):
    """``x' = x + h (a f_1 + b f_2 + a f_3) + g_1 (a W + H) + b g_2 W + g_3 (a W - H)``.

    ``a = (3 - sqrt 3) / 6`` and ``b = sqrt 3 / 3``; subscripts 1, 2, 3 are of the states ``x``,
    ``x + h f_1 / 2 + g_1 (W / 2 + sqrt 3 H)`` and ``x + h f_2 + g_2 W`` at the times ``t``, ``t + h/2`` and ``t + h``.

    On a Stratonovich SDE strong order 1/2, 1 when the noise commutes (with a third of the error of `Heun`), and 3/2
    when it is additive; weak order 1 (2 for additive noise), second order on an ODE. An Ito SDE is accepted only with
    additive noise. Foster and Jelincic 2023, "On the convergence of adaptive approximations for SDEs", definition 1.6.
    The estimate of the error is the difference from the trapezoidal rule on the same stages.
    """

    supported = supports(ito=(Noise.NONE, Noise.ADDITIVE), stratonovich=tuple(Noise))
    strong_order = 0.5
    strong_orders = (1.5, 1.0, 0.5)
    weak_order = 1.0
    ode_order = 2
    evaluations = 3
    diffusion_evaluations = 3
    by_products = True
    needs = ("W", "H")

    def attempt(self, sde: AbstractSDE, x: Tensor, span: Span, noise: Increment | None) -> tuple[Tensor, Estimate]:
        t, h, middle = span.t0, span.dt, span.at(0.5)
        if noise is None:
            f1 = sde.drift(x, t)
            f2 = sde.drift(x + 0.5 * h * f1, middle)
            f3 = sde.drift(x + h * f2, span.t1)
            return x + h * (_A * f1 + _B * f2 + _A * f3), lambda: _B * h * (f2 - 0.5 * (f1 + f3))
        assert noise.H is not None
        W, H = noise.W, noise.H
        f1, g1 = sde.drift_and_product_at(x, t)
        f2, g2 = sde.drift_and_product_at(x + 0.5 * h * f1 + g1(0.5 * W + 3.0**0.5 * H), middle)
        g2_W = g2(W)
        f3, g3 = sde.drift_and_product_at(x + h * f2 + g2_W, span.t1)
        after = x + h * (_A * f1 + _B * f2 + _A * f3) + _B * g2_W + (g1(_A * W + H) + g3(_A * W - H))

        def less_trapezoid() -> Tensor:
            return _B * (h * (f2 - 0.5 * (f1 + f3)) + g2_W) + (g1(H - 0.5 * _B * W) - g3(H + 0.5 * _B * W))

        return after, less_trapezoid
