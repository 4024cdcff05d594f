"""The shifted Euler method with additive noise."""

from __future__ import annotations

from typing import final

from torch import Tensor

from sdesolve.brownian import Increment
from sdesolve.sde import AbstractSDE, Noise
from sdesolve.solvers.base import AbstractOneStep, Span, supports


@final
class SEA(AbstractOneStep):
    """``x' = x + f(x + g (W/2 + H), t + h/2) h + g W`` with ``g`` at ``t + h/2``.

    Strong and weak order 1 for additive noise, with 0.6 of the error of `EulerMaruyama`; first order on an ODE. Foster,
    dos Reis and Strange 2023, "High order splitting methods for SDEs satisfying a commutativity condition", equation
    5.8, where the time of an autonomous equation plays no part.
    """

    supported = supports(ito=(Noise.NONE, Noise.ADDITIVE), stratonovich=(Noise.NONE, Noise.ADDITIVE))
    strong_order = None
    weak_order = 1.0
    ode_order = 1
    evaluations = 1
    diffusion_evaluations = 1
    by_products = True
    needs = ("W", "H")

    def step(self, sde: AbstractSDE, x: Tensor, span: Span, noise: Increment | None) -> Tensor:
        middle = span.at(0.5)
        if noise is None:
            return x + sde.drift(x, middle) * span.dt
        g = sde.product_at(x, middle)
        return x + sde.drift(x + g(noise.mean), middle) * span.dt + g(noise.W)
