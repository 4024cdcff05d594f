"""The Milstein scheme for diagonal and scalar noise."""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor

from sdesolve._internal.forward_mode import jvp
from sdesolve.brownian import Increment
from sdesolve.sde import AbstractSDE, Calculus, Noise
from sdesolve.solvers.base import AbstractOneStep, Span, supports

_NOISE = (Noise.NONE, Noise.ADDITIVE, Noise.DIAGONAL, Noise.SCALAR)


@final
class Milstein(AbstractOneStep):
    """``x' = x + f dt + g dW + (g . grad) g (dW^2 - |dt|) / 2``, without ``|dt|`` for a Stratonovich SDE.

    Strong and weak order 1. The derivative of the diffusion is taken by forward-mode automatic differentiation. For
    diagonal noise each ``g_i`` must depend on ``x_i`` alone (`solve` tests this, at several states and times); for
    scalar noise ``g`` may be any vector field. ``|dt|`` because a backward integration is driven by a Brownian motion
    of its own, of variance ``|dt|``. Milstein 1974; Kloeden and Platen 1992, section 10.3.
    """

    supported = supports(ito=_NOISE, stratonovich=_NOISE)
    strong_order = 1.0
    weak_order = 1.0
    ode_order = 1
    evaluations = 1
    own_component_diffusion = True

    def step(self, sde: AbstractSDE, x: Tensor, span: Span, noise: Increment | None) -> Tensor:
        t, dt = span.t0, span.dt
        euler = x + sde.drift(x, t) * dt
        if noise is None:
            return euler
        dW = noise.W
        if sde.noise is Noise.ADDITIVE:
            return euler + sde.diffusion_product(x, t, dW)
        g, Lg = diffusion_and_derivative(sde, x, t)
        square = dW * dW if sde.calculus is Calculus.STRATONOVICH else dW * dW - dt.abs()
        return euler + g * dW + 0.5 * Lg * square


def diffusion_and_derivative(sde: AbstractSDE, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """``g`` and ``(g . grad) g``, both of the shape of ``x``."""

    def g_of(y: Tensor) -> Tensor:
        return sde.diffusion(y, t).expand_as(y)

    if sde.noise is Noise.SCALAR:
        g = g_of(x)
        return g, jvp(g_of, x, g.clone())[1]
    # Own-component diffusion: the Jacobian is diagonal, so one derivative along (1, ..., 1) gives all of it.
    g_and_slope = jvp(g_of, x, torch.ones_like(x))
    return g_and_slope[0], g_and_slope[0] * g_and_slope[1]
