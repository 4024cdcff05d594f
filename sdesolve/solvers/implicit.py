"""Euler steps for stiff drifts, implicit in the drift and explicit in the noise."""

from __future__ import annotations

from collections.abc import Callable
from typing import final

import torch
from torch import Tensor

from sdesolve._internal.arguments import number, whole_number
from sdesolve._internal.derivatives import linearised
from sdesolve.brownian import Increment
from sdesolve.sde import AbstractSDE, Noise
from sdesolve.solvers.base import AbstractOneStep, Span, noise_term, supports

_UNROLLED = 4  # components up to which a linear system is eliminated entry by entry, as a kernel can

_ITO = supports(ito=tuple(Noise), stratonovich=(Noise.NONE, Noise.ADDITIVE))


@final
class ImplicitEuler(AbstractOneStep):
    """``x' = x + h ((1 - theta) f(x, t) + theta f(x', t + h)) + g(x, t) W``, by Newton's method from ``x``.

    With one iteration, the default, the step is linearly implicit: ``(I - theta h J) (x' - x) = h ((1 - theta) f(x, t)
    + theta f(x, t + h)) + g(x, t) W`` with ``J`` the Jacobian of ``f(., t + h)`` at ``x``, and nothing has to converge.
    With more, a step whose last correction is above half of the digits is refused with a `DivergenceError`.

    Strong order 1/2 (1 for additive noise) and weak order 1; order 1 on an ODE, or 2 for ``theta = 1/2``. For
    ``theta >= 1/2`` stable in mean square for steps of any length wherever a linear equation is; for ``theta = 1`` fast
    transients decay in one step. A state of ``d`` entries takes ``d`` derivatives of the drift an iteration; up to four
    entries the linear system is eliminated entry by entry, so that it fuses, and beyond that it is one batched solve.
    Kloeden and Platen 1992, section 12.2; Higham 2000, "Mean-square and asymptotic stability of the stochastic theta
    method".

    Args:
        theta: between 0 and 1; 1 is backward Euler, 1/2 the trapezoidal rule.
        iterations: of Newton's method.

    Raises:
        TypeError: an argument is no number.
        ValueError: an argument is out of range.
    """

    supported = _ITO
    strong_order = 0.5
    weak_order = 1.0
    by_products = True

    def __init__(self, theta: float = 1.0, iterations: int = 1) -> None:
        if not 0.0 <= number(theta, "theta") <= 1.0:
            raise ValueError(f"theta must be between 0 and 1, got {theta!r}")
        self.theta, self.iterations = float(theta), whole_number(iterations, "iterations", 1)

    @property
    def ode_order(self) -> int:
        return 2 if self.theta == 0.5 else 1

    @property
    def evaluations(self) -> int:
        return self.iterations + (self.theta < 1.0)

    @property
    def failure(self) -> str | None:
        return None if self.iterations == 1 else not_converged(self.iterations)

    def step(self, sde: AbstractSDE, x: Tensor, span: Span, noise: Increment | None) -> Tensor:
        known = x + noise_term(sde, x, span.t0, noise)
        if self.theta < 1.0:
            known = known + (1.0 - self.theta) * span.dt * sde.drift(x, span.t0)
        return newton(lambda y: sde.drift(y, span.t1), x, known, self.theta * span.dt, self.iterations)


@final
class SplitStepEuler(AbstractOneStep):
    """``y = x + h f(y, t + h)``, then ``x' = y + g(y, t) W``; the first by Newton's method from ``x``.

    Strong order 1/2 (1 for additive noise) and weak order 1, first order on an ODE. Converges for drifts that grow
    faster than the state, such as ``x - x^3``, as long as ``(f(x) - f(y)) (x - y) <= c |x - y|^2``, and is stable in
    mean square as `ImplicitEuler`, whose docstring says what an iteration costs. A step whose last correction is above
    half of the digits is refused with a `DivergenceError`. Higham, Mao and Stuart 2002, "Strong convergence of
    Euler-type methods for nonlinear stochastic differential equations", equation 3.8.

    Args:
        iterations: of Newton's method.

    Raises:
        TypeError: ``iterations`` is no integer.
        ValueError: it is below 2.
    """

    supported = _ITO
    strong_order = 0.5
    weak_order = 1.0
    by_products = True
    ode_order = 1

    def __init__(self, iterations: int = 8) -> None:
        self.iterations = whole_number(iterations, "iterations", 2)

    @property
    def evaluations(self) -> int:
        return self.iterations

    @property
    def failure(self) -> str:
        return not_converged(self.iterations)

    def step(self, sde: AbstractSDE, x: Tensor, span: Span, noise: Increment | None) -> Tensor:
        y = newton(lambda y: sde.drift(y, span.t1), x, x, span.dt, self.iterations)
        return y + noise_term(sde, y, span.t0, noise)


def not_converged(iterations: int) -> str:
    """Why a step is nan."""
    return (
        f"the implicit equation of the step did not converge in {iterations} iterations of Newton's method; take "
        "shorter steps, or more iterations="
    )


def newton(function: Callable[[Tensor], Tensor], y: Tensor, known: Tensor, c: Tensor, iterations: int) -> Tensor:
    """``y = known + c function(y)`` by Newton's method from ``y: (batch, *state)``.

    Entries that the last of several iterations still moves by more than half of their digits are nan: the step has
    failed. One iteration is a linearly implicit step, and whatever it gives is returned.
    """
    move = y
    for _ in range(iterations):
        value, columns = jacobian(function, y)
        move = factorised([c * column for column in columns], y)(known + c * value - y)
        y = y + move
    if iterations == 1:
        return y
    settled = move.abs() <= torch.finfo(y.dtype).eps ** 0.5 * (1.0 + y.abs())
    return torch.where(settled, y, torch.full_like(y, torch.nan))


def jacobian(function: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Tensor, list[Tensor]]:
    """``function(x)``, and its derivatives along each component of the state, each shaped as ``x``."""
    shape = x.shape[1:]
    units = torch.eye(shape.numel(), dtype=x.dtype, device=x.device).unbind(0)
    value, push = linearised(function, x)
    return value, [push(unit.reshape(shape).expand_as(x).clone()) for unit in units]


def factorised(columns: list[Tensor], x: Tensor) -> Callable[[Tensor], Tensor]:
    """What gives ``z`` of ``z - sum_j columns_j z_j = right`` for each row; all are ``(batch, *state)`` as ``x``."""
    n, batch = len(columns), x.shape[0]
    flat = [column.reshape(batch, n) for column in columns]
    if n <= _UNROLLED:
        return lambda right: _eliminated(flat, right)
    A = torch.eye(n, dtype=x.dtype, device=x.device) - torch.stack(flat, -1)
    LU, pivots, _ = torch.linalg.lu_factor_ex(A)
    return lambda right: torch.linalg.lu_solve(LU, pivots, right.reshape(batch, n, 1)).reshape(right.shape)


def _eliminated(flat: list[Tensor], right: Tensor) -> Tensor:
    n, batch = len(flat), right.shape[0]
    b = list(right.reshape(batch, n).unbind(1))
    rows = [[(1.0 if i == j else 0.0) - flat[j][:, i] for j in range(n)] + [b[i]] for i in range(n)]
    for k in range(n):
        for i in range(k + 1, n):
            swap = rows[i][k].abs() > rows[k][k].abs()
            pairs = [(torch.where(swap, q, p), torch.where(swap, p, q)) for p, q in zip(rows[k], rows[i], strict=True)]
            rows[k], rows[i] = ([pair[side] for pair in pairs] for side in (0, 1))
        for i in range(k + 1, n):
            factor = rows[i][k] / rows[k][k]
            rows[i] = [q - factor * p for p, q in zip(rows[k], rows[i], strict=True)]
    z: list[Tensor] = [right] * n
    for i in reversed(range(n)):
        z[i] = sum((-rows[i][j] * z[j] for j in range(i + 1, n)), rows[i][n]) / rows[i][i]
    return torch.stack(z, 1).reshape(right.shape)
