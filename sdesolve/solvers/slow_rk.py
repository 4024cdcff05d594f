"""The Strang log-ODE with Runge-Kutta method."""

from __future__ import annotations

from typing import final

from torch import Tensor

from sdesolve.brownian import Increment
from sdesolve.sde import AbstractSDE, Noise
from sdesolve.solvers.base import AbstractEstimating, Estimate, Span, supports


@final
class SlowRK(AbstractEstimating):
    """A Runge-Kutta method of strong order 3/2 for Stratonovich noise that commutes.

    With ``y = x + h f_1 / 2`` and all of ``g`` at ``t + h/2`` unless another time is given::

        w_2 = g(y) W,  w_3 = g(y + w_2 / 2) W,  y_4 = y + w_3 / 2,  w_4 = g(y_4) W,  w_5 = g(y + w_4) W
        f_2 = f(x + 3/4 (h f_1 + w_4) + 3/2 g(y_4) H, t + 3/4 h),  v = g(x + h f_1 + w_3 / 2, t + h) H
        x'  = x + h (f_1 + 2 f_2) / 3 + (w_2 + 2 w_3 + 2 w_4 + w_5) / 6 + 2 (g(y_4) H - v)

    Strong order 1/2 on a Stratonovich SDE, 3/2 when the noise commutes; weak order 1 (2 when it commutes), second order
    on an ODE. An Ito SDE is accepted only with additive noise. Foster, dos Reis and Strange 2023, equation 6.2.
    """

    supported = supports(ito=(Noise.NONE, Noise.ADDITIVE), stratonovich=tuple(Noise))
    strong_order = 0.5
    strong_orders = (1.5, 1.5, 0.5)
    weak_order = 1.0
    ode_order = 2
    evaluations = 2
    diffusion_evaluations = 5
    by_products = True
    needs = ("W", "H")

    def attempt(self, sde: AbstractSDE, x: Tensor, span: Span, noise: Increment | None) -> tuple[Tensor, Estimate]:
        t, h, middle, later = span.t0, span.dt, span.at(0.5), span.at(0.75)
        hf1 = h * sde.drift(x, t)
        if noise is None:
            hf2 = h * sde.drift(x + 0.75 * hf1, later)
            return x + (hf1 + 2.0 * hf2) / 3.0, lambda: (hf2 - hf1) * (2.0 / 3.0)
        assert noise.H is not None
        W, H, y = noise.W, noise.H, x + 0.5 * hf1
        w2 = sde.diffusion_product(y, middle, W)
        w3 = sde.diffusion_product(y + 0.5 * w2, middle, W)
        g4 = sde.product_at(y + 0.5 * w3, middle)
        w4, v4 = g4(W), g4(H)
        w5 = sde.diffusion_product(y + w4, middle, W)
        hf2 = h * sde.drift(x + 0.75 * (hf1 + w4) + 1.5 * v4, later)
        v = sde.diffusion_product(x + hf1 + 0.5 * w3, span.t1, H)
        noises, areas = (w2 + 2.0 * (w3 + w4) + w5) / 6.0, 2.0 * (v4 - v)
        after = x + (hf1 + 2.0 * hf2) / 3.0 + noises + areas
        return after, lambda: (hf2 - hf1) * (2.0 / 3.0) + (noises - w3) + areas
