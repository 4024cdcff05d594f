"""The Milstein scheme."""

from __future__ import annotations

from typing import final

from torch import Tensor

from sdesolve._internal.derivatives import linearised, slopes
from sdesolve._internal.levy_area import Areas
from sdesolve.brownian import Increment
from sdesolve.sde import AbstractSDE, Calculus, Noise, apply_diffusion
from sdesolve.solvers.areas import AbstractWithArea, iterated_integrals, per_channel, sum_of_columns
from sdesolve.solvers.base import Span, supports


@final
class Milstein(AbstractWithArea):
    """``x' = x + f dt + g dW + sum_lk (g_l . grad) g_k I_lk`` with the iterated integrals ``I_lk = int W^l dW^k``.

    Strong and weak order 1, Ito or Stratonovich.

    - Diagonal noise, each ``g_i`` a function of ``x_i`` alone (`solve` tests this, in several states and at several
      times): ``I_kk = (dW_k^2 - |dt|) / 2``, without ``|dt|`` for a Stratonovich SDE. ``|dt|`` because a backward
      integration is driven by a Brownian motion of its own, of variance ``|dt|``.
    - Scalar noise: the same, for any vector field ``g``.
    - General noise: without ``area`` it must commute, ``(g_l . grad) g_k = (g_k . grad) g_l`` (`solve` tests this too),
      and then ``I_lk + I_kl = dW_l dW_k - delta_lk |dt|`` is all that matters. With ``area`` any noise will do, and
      ``I_lk = (dW_l dW_k - delta_lk |dt|) / 2 + A_lk``.

    The derivatives of the diffusion are taken by automatic differentiation: one for diagonal and scalar noise, and up
    to one for each channel for general noise. Milstein 1974; Kloeden and Platen 1992, section 10.3.

    Args:
        area: how Levy areas are drawn for general noise (`LevyArea`): ``foster``, ``mrongowius-roessler``, ``None``, or
            ``zero``, which leaves them out: strong order 1/2, for antithetic `multilevel` Monte Carlo.
        terms: of the series of ``mrongowius-roessler``.

    Raises:
        ValueError: an unknown ``area``.
    """

    supported = supports(ito=tuple(Noise), stratonovich=tuple(Noise))
    strong_order = 1.0
    weak_order = 1.0
    ode_order = 1
    evaluations = 1

    def __init__(self, area: Areas | None = None, terms: int = 10) -> None:
        super().__init__(area, terms)

    def step(self, sde: AbstractSDE, x: Tensor, span: Span, noise: Increment | None) -> Tensor:
        t, dt = span.t0, span.dt
        euler = x + sde.drift(x, t) * dt
        if noise is None:
            return euler
        dW = noise.W
        if sde.noise is Noise.ADDITIVE:
            return euler + sde.diffusion_product(x, t, dW)
        if sde.noise is Noise.GENERAL:
            return euler + _general(sde, x, span, noise)
        g, Lg = diffusion_and_derivative(sde, x, t)
        square = dW * dW if sde.calculus is Calculus.STRATONOVICH else dW * dW - dt.abs()
        return euler + g * dW + 0.5 * Lg * square


def _general(sde: AbstractSDE, x: Tensor, span: Span, noise: Increment) -> Tensor:
    """``g W + sum_lk (g_l . grad) g_k I_lk``."""
    g, push = linearised(lambda y: sde.diffusion(y, span.t0).expand(*y.shape, -1), x)
    g_W = apply_diffusion(g, x, noise.W)
    if noise.A is not None:
        v = per_channel(g, iterated_integrals(sde, span, noise))
        return g_W + sum_of_columns(push, v)
    total = g_W + 0.5 * apply_diffusion(push(g_W), x, noise.W)
    return total if sde.calculus is Calculus.STRATONOVICH else total - 0.5 * span.dt.abs() * sum_of_columns(push, g)


def diffusion_and_derivative(sde: AbstractSDE, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """``g`` and ``(g . grad) g`` of diagonal or scalar noise, both of the shape of ``x``."""

    def g_of(y: Tensor) -> Tensor:
        return sde.diffusion(y, t).expand_as(y)

    if sde.noise is Noise.SCALAR:
        g, push = linearised(g_of, x)
        return g, push(g)
    # Own-component diffusion: the Jacobian is diagonal.
    g, slope = slopes(g_of, x)
    return g, g * slope
