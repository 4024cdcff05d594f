"""A singly diagonally implicit scheme of strong order 3/2 for additive noise."""

from __future__ import annotations

from typing import final

from torch import Tensor

from sdesolve._internal.arguments import whole_number
from sdesolve.brownian import Increment
from sdesolve.sde import AbstractSDE, Noise
from sdesolve.solvers.base import AbstractOneStep, Span, supports
from sdesolve.solvers.implicit import newton, not_converged

_GAMMA = 0.435866521508459
# Rows of the drift's stages, left of the diagonal, on which the implicit ones have gamma; the weights are the last row.
_A = (
    (_GAMMA,),
    (0.2576482460664272, -0.09351476757488625),
    (0.18764102434672383, -0.595297473576955, 0.9717899277217721),
)
_C = (2.0 * _GAMMA, 0.6, 1.0)
_B = (-12.246764387585056, 0.0, -14.432096958608753)  # of g(t) U


@final
class SKenCarp(AbstractOneStep):
    """Four stages ``X_i = x + h sum_j A_ij f(X_j, t + c_j h) + B_i g(t) U``, of which three are implicit.

    ``x' = x + h sum_i A_4i f(X_i, t + c_i h) + g(t + h) (W - U) + g(t) U`` with ``U = W/2 + H``. Strong order 3/2 and
    weak order 2 for additive noise; third order and L-stable on an ODE: for stiff drifts. Where noise is not small,
    steps must be short: stages lie up to ``14 g U`` away. The coefficients of the drift are Kennedy and Carpenter's,
    2003, ARK3(2)4L[2]SA, and those of the noise Rackauckas and Nie's, 2020, with the conditions of Roessler 2010. Each
    stage is solved by Newton's method; `ImplicitEuler` says what an iteration costs. A step whose last correction is
    above half of the digits is refused with a `DivergenceError`.

    Args:
        iterations: of Newton's method, for each stage.

    Raises:
        TypeError: ``iterations`` is no integer.
        ValueError: it is below 2.
    """

    supported = supports(ito=(Noise.NONE, Noise.ADDITIVE), stratonovich=(Noise.NONE, Noise.ADDITIVE))
    strong_order = None
    strong_orders = (1.5, None, None)
    weak_order = 2.0
    ode_order = 3
    diffusion_evaluations = 2
    by_products = True
    needs = ("W", "H")

    def __init__(self, iterations: int = 6) -> None:
        self.iterations = whole_number(iterations, "iterations", 2)

    @property
    def evaluations(self) -> int:
        return 1 + 3 * self.iterations

    @property
    def failure(self) -> str:
        return not_converged(self.iterations)

    def step(self, sde: AbstractSDE, x: Tensor, span: Span, noise: Increment | None) -> Tensor:
        h, early = span.dt, None
        if noise is not None:
            g1, U = sde.product_at(x, span.t1), noise.mean
            early = sde.diffusion_product(x, span.t0, U)
        hf = [h * sde.drift(x, span.t0)]
        for row, c, b in zip(_A, _C, _B, strict=True):
            moved = x if early is None or b == 0.0 else x + b * early
            known = moved + sum((a * k for a, k in zip(row[1:], hf[1:], strict=True)), row[0] * hf[0])
            time = span.t1 if c == 1.0 else span.at(c)
            X = newton(lambda y, time=time: sde.drift(y, time), moved, known, _GAMMA * h, self.iterations)  # type: ignore[misc]
            hf.append((X - known) / _GAMMA)
        after = x + sum((a * k for a, k in zip(_A[2][1:], hf[1:3], strict=True)), _A[2][0] * hf[0]) + _GAMMA * hf[3]
        if noise is None or early is None:
            return after
        return after + g1(noise.W - U) + early
