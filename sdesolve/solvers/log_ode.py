"""The log-ODE method."""

from __future__ import annotations

from typing import final

from torch import Tensor

from sdesolve._internal.derivatives import linearised
from sdesolve._internal.levy_area import Areas
from sdesolve.brownian import Increment
from sdesolve.sde import AbstractSDE, Noise, apply_diffusion
from sdesolve.solvers.areas import AbstractWithArea, per_channel, sum_of_columns
from sdesolve.solvers.base import Span, drift_and_noise, supports


@final
class LogODE(AbstractWithArea):
    """``x' = x + f(y, t + h/2) h + g(y, t + h/2) W + sum_lk A_lk (g_l . grad) g_k (y, t + h/2)``.

    ``y = x + (f(x, t) h + g(x, t) W) / 2``. Strong order 1 on a Stratonovich SDE with any noise, with less than half of
    the error of `Milstein`, and weak order 1; second order on an ODE. An Ito SDE is accepted only with additive noise.
    Without ``area``, and for scalar and diagonal noise, it is `Midpoint`. Castell and Gaines 1996, Annales de l'IHP 32.

    Args:
        area: how Levy areas are drawn for general noise (`LevyArea`): ``foster``, ``mrongowius-roessler``, ``None``
            for noise that commutes, which `solve` tests, or ``zero`` as in `Milstein`.
        terms: of the series of ``mrongowius-roessler``.

    Raises:
        ValueError: an unknown ``area``.
    """

    supported = supports(ito=(Noise.NONE, Noise.ADDITIVE), stratonovich=tuple(Noise))
    strong_order = 1.0
    weak_order = 1.0
    ode_order = 2
    evaluations = 2
    diffusion_evaluations = 2

    def __init__(self, area: Areas | None = "foster", terms: int = 10) -> None:
        super().__init__(area, terms)

    def step(self, sde: AbstractSDE, x: Tensor, span: Span, noise: Increment | None) -> Tensor:
        t, dt, middle = span.t0, span.dt, span.at(0.5)
        f, g_W = drift_and_noise(sde, x, t, noise)
        y = x + 0.5 * (f * dt + g_W)
        if noise is None or noise.A is None:
            f, g_W = drift_and_noise(sde, y, middle, noise)
            return x + f * dt + g_W
        euler = x + sde.drift(y, middle) * dt
        g, push = linearised(lambda z: sde.diffusion(z, middle).expand(*z.shape, -1), y)
        return euler + apply_diffusion(g, x, noise.W) + sum_of_columns(push, per_channel(g, noise.A))
