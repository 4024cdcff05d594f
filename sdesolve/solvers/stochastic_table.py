"""Stochastic Runge-Kutta schemes of strong order 3/2, whose step is a table of numbers."""

from __future__ import annotations

import abc
import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

from torch import Tensor

from sdesolve.brownian import Increment
from sdesolve.sde import AbstractSDE, Noise, Product, apply_diffusion
from sdesolve.solvers.base import AbstractEstimating, Estimate, Span

Row = tuple[float, ...]
Rows = tuple[Row, ...]


class StochasticTable(NamedTuple):
    """Coefficients of an explicit stochastic Runge-Kutta scheme of ``s`` stages (`AbstractStochasticTable`).

    Attributes:
        A0, B0: of the drift's stages; row ``i`` holds entries left of the diagonal, without trailing zeros.
        A1, B1: likewise, of the diffusion's stages.
        alpha: weights of the drift.
        beta1, beta2, beta3, beta4: weights of the diffusion with ``W``, ``I_11``, ``I_10`` and ``I_111``.
        c1: times of the diffusion's stages; the row sums of ``A1`` where left out.
        other: weights of the drift that the estimate of the error compares with; Euler's where left out.
    """

    A0: Rows
    B0: Rows
    alpha: Row
    beta1: Row
    beta3: Row
    beta2: Row = ()
    beta4: Row = ()
    A1: Rows = ()
    B1: Rows = ()
    c1: Row = ()
    other: Row = ()

    @property
    def stages(self) -> int:
        return len(self.alpha)

    @property
    def drift_times(self) -> Row:
        """``c0 = A0 e``: time is one more component of the state, with drift 1."""
        return tuple(sum(row) for row in self.A0)

    @property
    def diffusion_times(self) -> Row:
        return self.c1 or tuple(sum(row) for row in self.A1)

    def same_drift(self, i: int) -> int:
        """The first stage whose drift is that of stage ``i``: rows of zeros all stand for the start of the step."""
        return next(j for j in range(i + 1) if (self.A0[j], self.B0[j]) == (self.A0[i], self.B0[i]))

    def weight_at(self, time: float, weights: Row) -> float:
        """The sum of the weights of stages at one time."""
        return sum(w for w, c in zip(weights, self.diffusion_times, strict=True) if c == time)


def combined(x: Tensor, coefficients: Sequence[float], term: Callable[[int], Tensor]) -> Tensor:
    """``x + sum_j c_j term(j)`` over the coefficients that are not 0."""
    for j, c in enumerate(coefficients):
        if c:
            x = x + (term(j) if c == 1.0 else c * term(j))
    return x


def weighted(coefficients: Sequence[float], terms: Sequence[Tensor]) -> Tensor:
    """``sum_j c_j terms_j`` over the coefficients that are not 0; one of them has to be."""
    parts = [term if c == 1.0 else c * term for c, term in zip(coefficients, terms, strict=True) if c]
    return functools.reduce(Tensor.add, parts)


class AbstractStochasticTable(AbstractEstimating):
    """An explicit stochastic Runge-Kutta scheme given by a table. Roessler 2010, equations 5.1 and 6.1.

    With ``h = dt``, ``U = I_10 / h = W/2 + H``, ``I_11 = (W^2 - |h|) / 2`` and ``I_111 = (W^3 - 3 |h| W) / 6``::

        X_i = x + h sum_j A0_ij f(X_j, t + c0_j h) + sum_j B0_ij g(Y_j, t + c1_j h) U
        Y_i = x + h sum_j A1_ij f(X_j, t + c0_j h) + sqrt|h| sum_j B1_ij g(Y_j, t + c1_j h)
        x'  = x + h sum_i alpha_i f(X_i, t + c0_i h)
                + sum_i (beta1_i W + beta2_i I_11 / sqrt|h| + beta3_i U + beta4_i I_111 / |h|) g(Y_i, t + c1_i h)

    with ``c0 = A0 e`` and ``c1 = A1 e``. All products are elementwise for diagonal noise, which must have each ``g_i``
    depend on ``x_i`` alone. For additive noise, where ``g`` may be a matrix, ``Y_i`` matters through its time alone,
    and the terms of ``beta2`` and ``beta4`` are left out: no order needs them.

    The estimate of the error is ``|h sum_i (alpha_i - other_i) f_i| + |sum_i (beta3_i U + beta4_i I_111 / |h|) g_i|``,
    of additive noise the first term.
    """

    needs = ("W", "H")
    by_products = True

    @property
    @abc.abstractmethod
    def table(self) -> StochasticTable:
        """The coefficients."""

    def attempt(self, sde: AbstractSDE, x: Tensor, span: Span, noise: Increment | None) -> tuple[Tensor, Estimate]:
        table, h, additive = self.table, span.dt, sde.noise is Noise.ADDITIVE
        c0, c1, root_h = table.drift_times, table.diffusion_times, h.abs().sqrt()

        @functools.cache
        def start() -> tuple[Tensor, Tensor]:
            return sde.drift_and_diffusion(x, span.t0)

        @functools.cache
        def hf(i: int) -> Tensor:
            if (first := table.same_drift(i)) < i:
                return hf(first)
            X = combined(x, table.A0[i], hf)
            X = X if noise is None else combined(X, table.B0[i], lambda j: product(j)(noise.mean))
            shared = sde.joint and X is x and c0[i] == 0.0
            return (start()[0] if shared else sde.drift(X, _at(span, c0[i]))) * h

        @functools.cache
        def g(i: int) -> Tensor:
            Y = combined(combined(x, table.A1[i], hf), table.B1[i], lambda j: root_h * g(j))
            return start()[1] if sde.joint and Y is x and c1[i] == 0.0 else sde.diffusion(Y, _at(span, c1[i]))

        @functools.cache
        def g_at(c: float) -> Product:
            if sde.joint and c == 0.0:
                return lambda v: apply_diffusion(start()[1], x, v)
            return sde.product_at(x, _at(span, c))

        def product(i: int) -> Product:
            return g_at(c1[i]) if additive else lambda v: apply_diffusion(g(i), x, v)

        after = combined(x, table.alpha, hf)

        def drifts() -> Tensor:
            other = table.other or (1.0,) + (0.0,) * (table.stages - 1)
            used = [i for i, (a, b) in enumerate(zip(table.alpha, other, strict=True)) if a != b]
            return weighted([table.alpha[i] - other[i] for i in used], [hf(i) for i in used])

        if noise is None:
            return after, drifts
        W, U = noise.W, noise.mean
        if additive:
            for c in dict.fromkeys(c1):
                at_once = [table.weight_at(c, row) for row in (table.beta1, table.beta3)]
                if any(at_once):
                    after = after + g_at(c)(weighted(at_once, [W, U]))
            return after, drifts
        w1, w3 = 0.5 * (W * W / root_h - root_h), W * (W * W / h.abs() - 3.0) / 6.0
        for i, weights in enumerate(zip(table.beta1, table.beta2, table.beta3, table.beta4, strict=True)):
            if any(weights):
                after = after + product(i)(weighted(weights, [W, w1, U, w3]))

        def drifts_and_noises() -> Tensor:
            pairs = enumerate(zip(table.beta3, table.beta4, strict=True))
            noises = [product(i)(weighted(pair, [U, w3])) for i, pair in pairs if any(pair)]
            return drifts().abs() + functools.reduce(Tensor.add, noises).abs()

        return after, drifts_and_noises


def _at(span: Span, fraction: float) -> Tensor:
    return span.t0 if fraction == 0.0 else span.t1 if fraction == 1.0 else span.at(fraction)
