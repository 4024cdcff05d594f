"""How the steps of an integration are carried out: by the solver's own torch code, or by one kernel that does the same.

The solver's `step` is the definition. A kernel takes its place where it computes the same formula in one pass over
memory, with the noise made where it is used:

- a solver that is a row of coefficients on a semilinear equation (`AbstractTabulated`) runs as ``linear_step``;
- Euler-Maruyama with noise of the state's shape runs as ``euler_maruyama_step``.
"""

from __future__ import annotations

import abc
from collections.abc import Callable
from typing import final

from sdesolve_kernels import euler_maruyama_step, linear_step
from torch import Tensor

from sdesolve.brownian import AbstractNoise, BrownianPath, Place
from sdesolve.sde import AbstractSDE, AbstractSemilinear, Noise
from sdesolve.solvers.base import AbstractSolver, AbstractTabulated, Span
from sdesolve.solvers.euler_maruyama import EulerMaruyama


class AbstractStepper(abc.ABC):
    """Carries out steps in order; `reason` says how, for `Stats`."""

    backend: str
    reason: str

    @abc.abstractmethod
    def begin(self, first: int, times: Tensor) -> None:
        """Gets ready for the steps between consecutive ``times``, of which the first has the index ``first``."""

    @abc.abstractmethod
    def advance(self, k: int, x: Tensor, span: Span) -> Tensor:
        """The state after step ``k``."""


@final
class SolverStepper(AbstractStepper):
    """The solver's own step, in torch, with increments drawn for a run of steps at a time."""

    backend = "eager"

    def __init__(
        self,
        solver: AbstractSolver,
        sde: AbstractSDE,
        noise: AbstractNoise,
        x0: Tensor,
        shape: tuple[int, ...],
        why: str,
    ) -> None:
        self._solver, self._sde, self._noise, self._shape = solver, sde, noise, shape
        self._x0 = x0
        self._first = 0
        self._dW: Tensor | None = None
        self.reason = why

    def begin(self, first: int, times: Tensor) -> None:
        self._first = first
        if self._sde.noise is not Noise.NONE:
            self._dW = self._noise.increments(
                times, self._shape, step=first, dtype=self._x0.dtype, device=self._x0.device
            )

    def advance(self, k: int, x: Tensor, span: Span) -> Tensor:
        return self._solver.step(self._sde, x, span, None if self._dW is None else self._dW[k - self._first])


@final
class TableStepper(AbstractStepper):
    """``x <- a x + b s(x, t) + c z``, one field evaluation and one kernel a step, coefficients from a float64 table."""

    backend = "kernel"
    reason = "each step is one linear_step kernel, with coefficients tabulated in float64"

    def __init__(
        self,
        field: Callable[[Tensor, Tensor], Tensor],
        sde: AbstractSDE,
        table: Tensor,
        noise: AbstractNoise,
        x0: Tensor,
    ) -> None:
        self._field = field
        self._table = table.to(dtype=x0.dtype, device=x0.device)
        self._noise = noise
        self._stochastic = sde.noise is not Noise.NONE

    def begin(self, first: int, times: Tensor) -> None:
        del first, times

    def advance(self, k: int, x: Tensor, span: Span) -> Tensor:
        s = self._field(x, span.t0)
        return linear_step(x, [s], self._table, k, stochastic=self._stochastic, **_place(self._noise, k))


@final
class EulerStepper(AbstractStepper):
    """``x + f dt + g sqrt|dt| z`` for noise of the state's shape: drift, diffusion, and one kernel a step."""

    backend = "kernel"
    reason = "each step is one euler_maruyama_step kernel"

    def __init__(self, sde: AbstractSDE, noise: AbstractNoise) -> None:
        self._sde, self._noise = sde, noise

    def begin(self, first: int, times: Tensor) -> None:
        del first, times

    def advance(self, k: int, x: Tensor, span: Span) -> Tensor:
        f, g = self._sde.drift(x, span.t0), self._sde.diffusion(x, span.t0)
        if g.ndim > 1 and g.shape != x.shape:
            g = g.expand_as(x)
        dt = span.dt.reshape(-1) if span.dt.ndim else span.dt
        return euler_maruyama_step(x, f, g, dt, **_place(self._noise, k))


def choose_stepper(
    solver: AbstractSolver,
    sde: AbstractSDE,
    field: Callable[[Tensor, Tensor], Tensor],
    equation: AbstractSDE,
    noise: AbstractNoise,
    times: Tensor,
    x0: Tensor,
    shape: tuple[int, ...],
    *,
    elementwise: bool,
    eager: bool,
) -> AbstractStepper:
    """The quickest way to carry out these steps.

    Args:
        solver: the scheme.
        sde: what the steps call: ``equation``, watched.
        field: the field of a semilinear ``equation``, watched.
        equation: what the user passed.
        noise: the driving noise.
        times: the whole grid.
        x0: the start.
        shape: of an increment, batch included.
        elementwise: each element of the increment drives the same element of the state alone. Its shape does not tell:
            a square matrix diffusion has increments of the state's shape too.
        eager: the caller wants the solver's own torch code.
    """

    def plain(why: str) -> AbstractStepper:
        return SolverStepper(solver, sde, noise, x0, shape, why)

    if eager:
        return plain("requested")
    if not (isinstance(noise, BrownianPath) and noise.substeps == 1) and sde.noise is not Noise.NONE:
        return plain("the noise is not a plain sequence of normals: coarse increments, or a noise of another class")
    if isinstance(solver, AbstractTabulated) and isinstance(equation, AbstractSemilinear):
        table = solver.table(equation, times)
        if table is not None:
            return TableStepper(field, sde, table, noise, x0)
    if isinstance(solver, EulerMaruyama) and elementwise:
        return EulerStepper(sde, noise)
    return plain(f"no kernel does {type(solver).__name__} on {sde.noise} noise; its step runs in torch")


def _place(noise: AbstractNoise, k: int) -> Place:
    """Where the normals of step ``k`` stand; any place will do for an ODE, which makes none."""
    if isinstance(noise, BrownianPath) and noise.substeps == 1:
        return noise.place(k)
    return {"seed": 0, "stream": 0, "first_path": 0, "step": k}
