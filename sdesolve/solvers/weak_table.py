"""Stochastic Runge-Kutta schemes of weak order 2, whose step is a table of numbers."""

from __future__ import annotations

import abc
import functools
from typing import NamedTuple

from torch import Tensor

from sdesolve.brownian import Increment
from sdesolve.sde import AbstractSDE, Noise
from sdesolve.solvers.base import AbstractOneStep, Span, supports
from sdesolve.solvers.channels import Channels
from sdesolve.solvers.stochastic_table import Row, Rows, combined, weighted


class WeakTable(NamedTuple):
    """Coefficients of `AbstractWeakTable`; rows as in `StochasticTable`.

    Attributes:
        A0, B0: of the drift's stages.
        A1, B1: of the diffusion's stages.
        B2: likewise, with entries of any stage.
        alpha: weights of the drift.
        beta1, beta2, beta3, beta4: weights of the diffusion.
    """

    A0: Rows
    B0: Rows
    alpha: Row
    A1: Rows
    B1: Rows
    B2: Rows
    beta1: Row
    beta2: Row
    beta3: Row
    beta4: Row


class AbstractWeakTable(AbstractOneStep):
    """An explicit stochastic Runge-Kutta scheme of weak order 2 given by a table. Roessler 2009, equation 5.1.

    With ``h = dt``, ``I_kk = (W_k^2 - |h|) / 2``, and ``I_kl = (W_k W_l - |h| S_k) / 2`` for ``k < l``,
    ``(W_k W_l + |h| S_l) / 2`` for ``k > l``::

        X_i   = x + h sum_j A0_ij f(X_j) + sum_j B0_ij sum_l g_l(Y^l_j) W_l
        Y^k_i = x + h sum_j A1_ij f(X_j) + sqrt|h| sum_j B1_ij g_k(Y^k_j)
        Z^k_i = x + sum_j B2_ij sum_{l != k} g_l(Y^l_j) I_kl / sqrt|h|
        x'    = x + h sum_i alpha_i f(X_i) + sum_ki (beta1_i W_k + beta2_i I_kk / sqrt|h|) g_k(Y^k_i)
                  + sum_ki (beta3_i W_k + beta4_i sqrt|h|) g_k(Z^k_i)

    ``f`` at the times ``t + h A0 e``, ``g`` at ``t + h A1 e`` and, of ``Z``, at ``t``. ``W_k`` are three-point numbers
    (``increments="three-point"``), a fraction of the cost, or normals; ``S_k`` are two-point numbers. For expectations:
    no claim is made on paths. Diagonal noise must have each ``g_i`` depend on ``x_i`` alone; for it, as for scalar and
    additive noise, ``Z`` plays no part.
    """

    supported = supports(ito=tuple(Noise), stratonovich=(Noise.NONE, Noise.ADDITIVE))
    own_component_diffusion = True
    strong_order = None
    strong_orders = (None, None, None)
    weak_order = 2.0
    needs = ("W", "S")

    @property
    @abc.abstractmethod
    def table(self) -> WeakTable:
        """The coefficients."""

    def step(self, sde: AbstractSDE, x: Tensor, span: Span, noise: Increment | None) -> Tensor:
        table, h, root_h = self.table, span.dt, span.dt.abs().sqrt()
        c0, c1 = ([sum(row) for row in rows] for rows in (table.A0, table.A1))
        channels = None if noise is None else Channels(sde, x, span.t0, noise)

        @functools.cache
        def hf(i: int) -> Tensor:
            if channels is not None and not i:
                return channels.f * h
            X = combined(x, table.A0[i], hf)
            if channels is not None:
                X = combined(X, table.B0[i], lambda j: channels.product(g(j)))
            return sde.drift(X, span.at(c0[i])) * h

        @functools.cache
        def g(i: int) -> list[Tensor]:
            assert channels is not None
            if not i:
                return channels.g
            drifted = combined(x, table.A1[i], hf)
            rows = [combined(drifted, table.B1[i], lambda j, k=k: root_h * g(j)[k]) for k in range(len(channels))]  # type: ignore[misc]
            return channels.columns(rows, span.at(c1[i]))

        after = combined(x, table.alpha, hf)
        if channels is None:
            return after
        W, n, additive = channels.W, len(channels), sde.noise is Noise.ADDITIVE
        for i, (b1, b2) in enumerate(zip(table.beta1, table.beta2, strict=True)):
            for k in range(n):
                weight = b1 * W[k]
                if b2 and not additive:
                    weight = weight + 0.5 * b2 * (W[k] * W[k] / root_h - root_h)
                after = after + weight * g(i)[k]
        if n == 1 or additive:
            return after
        for i, (b3, b4) in enumerate(zip(table.beta3, table.beta4, strict=True)):
            z = channels.g
            if any(table.B2[i]):
                mixed = [weighted(table.B2[i], column) for column in zip(*map(g, range(len(table.alpha))), strict=True)]
                z = channels.columns([x + channels.mixed(k, mixed, root_h) for k in range(n)], span.t0)
            for k in range(n):
                after = after + (b3 * W[k] + b4 * root_h) * z[k]
        return after
