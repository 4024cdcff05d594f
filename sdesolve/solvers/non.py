"""The NON method of weak order 2 for Stratonovich SDEs."""

from __future__ import annotations

import functools
from typing import final

from torch import Tensor

from sdesolve.brownian import Increment
from sdesolve.sde import AbstractSDE, Noise
from sdesolve.solvers.base import AbstractOneStep, Span, supports
from sdesolve.solvers.channels import Channels
from sdesolve.solvers.stochastic_table import combined

_A0, _B0 = ((), (0.5,), (0.0, 0.5), (0.0, 0.0, 1.0)), ((), (1.0,), (-9 / 8, 9 / 8), (1.0,))
_A1, _ALPHA, _BETA = ((), (2.0,), (), (-2.0,)), (1 / 6, 1 / 3, 1 / 3, 1 / 6), (1 / 8, 3 / 8, 3 / 8, 1 / 8)
_B1, _B3 = ((), (2 / 3,), (1 / 12, 1 / 4), (-5 / 4, 1 / 4, 2.0)), ((), (), (1 / 4, 3 / 4), (1 / 4, 3 / 4))
# The order conditions of the times are those of A1 e, (0, 2, 0, -2), and these meet them within the step.
_C0, _C1 = (0.0, 0.5, 0.5, 1.0), (0.0, 0.0, 1.0, 1.0)


@final
class NON(AbstractOneStep):
    """Runge and Kutta's drift with four stages of each column of the diffusion::

        X_i   = x + h sum_j A0_ij f(X_j) + sum_j B0_ij sum_l g_l(Y^l_j) W_l
        Y^k_i = x + h A1_i1 f(x) + sum_j B1_ij g_k(Y^k_j) W_k + sum_j B3_ij sum_{l != k} g_l(Y^l_j) W_l
        x'    = x + h sum_i alpha_i f(X_i) + sum_ki beta_i g_k(Y^k_i) W_k
                  + sqrt|h| sum_k (g_k(x - v_k) - g_k(x + v_k)) / 4

    ``v_k = sum_{l != k} g_l J_kl``, where ``J_kl = W_k S_l`` for ``l < k`` and ``J_lk = -J_kl``; the tables are in the
    source. Weak order 2 for Stratonovich SDEs with any noise, fourth order on an ODE. An Ito SDE is accepted only
    with additive noise. ``W_k`` are three-point numbers (``increments="three-point"``), a fraction of the cost, or
    normals; no claim is made on paths. Diagonal noise must have each ``g_i`` depend on ``x_i`` alone. Komori 2007,
    Journal of Computational and Applied Mathematics 203 and 206, with stages of ``g`` at times within the step.
    """

    supported = supports(ito=(Noise.NONE, Noise.ADDITIVE), stratonovich=tuple(Noise))
    own_component_diffusion = True
    strong_order = None
    strong_orders = (None, None, None)
    weak_order = 2.0
    ode_order = 4
    evaluations, diffusion_evaluations, column_evaluations = 4, 4, 5
    needs = ("W", "S")

    def step(self, sde: AbstractSDE, x: Tensor, span: Span, noise: Increment | None) -> Tensor:
        h, root_h = span.dt, span.dt.abs().sqrt()
        channels = None if noise is None else Channels(sde, x, span.t0, noise)

        @functools.cache
        def hf(i: int) -> Tensor:
            if channels is not None and not i:
                return channels.f * h
            X = combined(x, _A0[i], hf)
            if channels is not None:
                X = combined(X, _B0[i], lambda j: functools.reduce(Tensor.add, gW(j)))
            return sde.drift(X, span.at(_C0[i])) * h

        @functools.cache
        def gW(i: int) -> list[Tensor]:
            assert channels is not None
            columns = channels.g
            if i:
                drifted, n = combined(x, _A1[i], hf), len(channels)
                states = [combined(drifted, _B1[i], lambda j, k=k: gW(j)[k]) for k in range(n)]  # type: ignore[misc]
                for k in range(n):
                    for l in range(n):  # noqa: E741
                        if l != k:
                            states[k] = combined(states[k], _B3[i], lambda j, l=l: gW(j)[l])  # type: ignore[misc]  # noqa: E741
                columns = channels.columns(states, span.at(_C1[i]))
            return [g * W for g, W in zip(columns, channels.W, strict=True)]

        after = combined(x, _ALPHA, hf)
        if channels is None:
            return after
        for i, weight in enumerate(_BETA):
            after = after + weight * functools.reduce(Tensor.add, gW(i))
        n, g, W, S = len(channels), channels.g, channels.W, channels.S
        if n == 1 or sde.noise is Noise.ADDITIVE:
            return after
        J = [[W[k] * S[i] if i < k else -W[i] * S[k] for i in range(n)] for k in range(n)]
        v = [functools.reduce(Tensor.add, (g[i] * J[k][i] for i in range(n) if i != k)) for k in range(n)]
        less = channels.columns([x - u for u in v], span.t0)
        more = channels.columns([x + u for u in v], span.t0)
        return after + 0.25 * root_h * functools.reduce(Tensor.add, (a - b for a, b in zip(less, more, strict=True)))
