"""Schemes of strong order 1 that need no derivatives."""

from __future__ import annotations

from typing import final

from torch import Tensor

from sdesolve._internal.levy_area import Areas
from sdesolve.brownian import Increment
from sdesolve.sde import AbstractSDE, Calculus, Noise, apply_diffusion
from sdesolve.solvers.areas import AbstractWithArea, iterated_integrals, per_channel
from sdesolve.solvers.base import Span, supports


@final
class SRI2(AbstractWithArea):
    """``x' = x + h (f(x, t) + f(y + g W, t')) / 2 + g W + sqrt|h| sum_k (g_k(y + v_k, t') - g_k(y - v_k, t')) / 2``.

    ``t' = t + h``, ``y = x + h f(x, t)`` and ``v_k = sum_l g_l(x, t) I_lk / sqrt|h|``, with the iterated integrals of
    `Milstein`: that scheme without derivatives, for functions that have none, and with smaller errors. Ito, or
    Stratonovich (there as SRS2). Strong and weak order 1, second order on an ODE; general noise takes the diffusion
    ``2 m + 1`` times for ``m`` channels. Roessler 2010, SIAM Journal on Numerical Analysis 48, section 4.

    Args:
        area: how Levy areas are drawn for general noise (`LevyArea`): ``foster``, ``mrongowius-roessler``, ``None``
            for noise that commutes, which `solve` tests, or ``zero`` as in `Milstein`.
        terms: of the series of ``mrongowius-roessler``.

    Raises:
        ValueError: an unknown ``area``.
    """

    supported = supports(ito=tuple(Noise), stratonovich=tuple(Noise))
    strong_order = 1.0
    weak_order = 1.0
    ode_order = 2
    evaluations = 2
    diffusion_evaluations = 3
    column_evaluations = 2

    def __init__(self, area: Areas | None = None, terms: int = 10) -> None:
        super().__init__(area, terms)

    def step(self, sde: AbstractSDE, x: Tensor, span: Span, noise: Increment | None) -> Tensor:
        h, later = span.dt, span.t1
        if noise is None:
            hf = sde.drift(x, span.t0) * h
            return x + 0.5 * (hf + sde.drift(x + hf, later) * h)
        f, g = sde.drift_and_diffusion(x, span.t0)
        hf = f * h
        y = x + hf
        g_W = apply_diffusion(g, x, noise.W)
        heun = x + 0.5 * (hf + sde.drift(y + g_W, later) * h) + g_W
        if sde.noise is Noise.ADDITIVE:
            return heun + 0.5 * (sde.diffusion_product(y, later, noise.W) - g_W)
        root_h = h.abs().sqrt()
        if sde.noise is not Noise.GENERAL:
            W = noise.W
            square = W * W if sde.calculus is Calculus.STRATONOVICH else W * W - h.abs()
            v = g * (0.5 * square / root_h)
            return heun + 0.5 * root_h * (sde.diffusion(y + v, later) - sde.diffusion(y - v, later))
        v = per_channel(g, iterated_integrals(sde, span, noise)) / root_h[..., None]
        for k in range(v.shape[-1]):
            heun = heun + 0.5 * root_h * _difference(sde, y, v[..., k], later)[..., k]
        return heun


def _difference(sde: AbstractSDE, y: Tensor, v: Tensor, t: Tensor) -> Tensor:
    return sde.diffusion(y + v, t) - sde.diffusion(y - v, t)
