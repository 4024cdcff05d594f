"""The W2Ito1 method of weak order 2."""

from __future__ import annotations

from typing import final

from torch import Tensor

from sdesolve.brownian import Increment
from sdesolve.sde import AbstractSDE, Noise
from sdesolve.solvers.base import AbstractOneStep, Span, supports
from sdesolve.solvers.channels import Channels

_B2, _B3 = (6.0 - 6.0**0.5) / 10.0, (3.0 + 2.0 * 6.0**0.5) / 5.0


@final
class W2Ito1(AbstractOneStep):
    """``x' = x + h (f_1 + 4 f_2 + f_3) / 6 + sum_k [g_k (2 chi_k - W_k) + g_k(P_k) W_k + g_k(M_k) (W_k - 2 chi_k)]``.

    With two-point numbers ``S_1, S_2``, ``xi = sqrt|h| S_1`` and ``chi_k = (W_k^2 / xi - xi) / 2``; the drift at ``x``,
    ``x + h f_1 / 2 + (6 - sqrt 6) / 10 g W`` and ``x + h (2 f_2 - f_1) + (3 + 2 sqrt 6) / 5 g W``, at ``t``,
    ``t + h/2`` and ``t + h``; columns ``g_k`` at ``t + h/4`` and

        ``P_k = x + h f_1 / 4 + g_k xi / 2 + sum_{l != k} (1 -+ S_2) W_l g_l / 2`` (minus for ``k < l``),
        ``M_k = x + h f_1 / 4 - g_k xi / 2``.

    Weak order 2 for Ito SDEs with any noise, third order on an ODE: the first choice for expectations, since it takes
    each column but twice more. ``W_k`` are three-point numbers (``increments="three-point"``), a fraction of the cost,
    or normals; no claim is made on paths. Diagonal noise must have each ``g_i`` depend on ``x_i`` alone. Tang and Xiao
    2017, BIT Numerical Mathematics 57.
    """

    supported = supports(ito=tuple(Noise), stratonovich=(Noise.NONE, Noise.ADDITIVE))
    own_component_diffusion = True
    strong_order = None
    strong_orders = (None, None, None)
    weak_order = 2.0
    ode_order = 3
    evaluations, diffusion_evaluations, column_evaluations = 3, 3, 2
    needs = ("W", "S")

    def step(self, sde: AbstractSDE, x: Tensor, span: Span, noise: Increment | None) -> Tensor:
        t, h, middle, quarter = span.t0, span.dt, span.at(0.5), span.at(0.25)
        if noise is None:
            hf1 = h * sde.drift(x, t)
            hf2 = h * sde.drift(x + 0.5 * hf1, middle)
            return x + (hf1 + 4.0 * hf2 + h * sde.drift(x - hf1 + 2.0 * hf2, span.t1)) / 6.0
        channels = Channels(sde, x, t, noise)
        hf1 = h * channels.f
        g, W, n, root_h = channels.g, channels.W, len(channels), h.abs().sqrt()
        sign, side = channels.S[:2]
        gW, xi = channels.product(g), root_h * sign
        hf2 = h * sde.drift(x + 0.5 * hf1 + _B2 * gW, middle)
        after = x + (hf1 + 4.0 * hf2 + h * sde.drift(x - hf1 + 2.0 * hf2 + _B3 * gW, span.t1)) / 6.0
        y = x + 0.25 * hf1
        plus, minus = [y + 0.5 * xi * c for c in g], [y - 0.5 * xi * c for c in g]
        for k in range(n):
            for l in range(n):  # noqa: E741
                if l != k:
                    plus[k] = plus[k] + 0.5 * (1.0 - side if k < l else 1.0 + side) * W[l] * g[l]
        later, before = channels.columns(plus, quarter), channels.columns(minus, quarter)
        for k in range(n):
            chi = 0.5 * sign * (W[k] * W[k] / root_h - root_h)
            after = after + g[k] * (2.0 * chi - W[k]) + later[k] * W[k] + before[k] * (W[k] - 2.0 * chi)
        return after
