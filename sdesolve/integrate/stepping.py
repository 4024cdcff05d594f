"""How the steps of an integration are carried out: by the solver's own torch code, or by one kernel that does the same.

The solver's `step`, or its `table` with `row_step`, is the definition. A kernel takes its place where it computes the
same formula in one pass over memory, with the noise made where it is used:

- each row of a tabulated solver on a semilinear equation runs as ``linear_step``;
- Euler-Maruyama with noise of the state's shape runs as ``euler_maruyama_step``.
"""

from __future__ import annotations

import abc
from collections.abc import Callable
from typing import final

import torch
from sdesolve_kernels import euler_maruyama_step, linear_step
from torch import Tensor

from sdesolve.brownian import AbstractNoise, AbstractPaths, BrownianPath, Place
from sdesolve.diffusions.base import AbstractDiffusion
from sdesolve.sde import AbstractSDE, AbstractSemilinear, Field, Noise
from sdesolve.solvers.base import AbstractOneStep, AbstractSolver, Span
from sdesolve.solvers.euler_maruyama import EulerMaruyama
from sdesolve.solvers.predictor_corrector import PredictorCorrector, reversed_diffusion
from sdesolve.solvers.tabulated import AbstractTabulated, Row, Table, row_step

Memory = tuple[Tensor, ...]


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
    """The step of a one-step solver, in torch, with increments drawn for a run of steps at a time."""

    backend = "eager"

    def __init__(
        self,
        solver: AbstractOneStep,
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
class KernelRows:
    """A table on the device of the state: step ``k`` as one ``linear_step`` kernel for each row."""

    def __init__(self, solver: AbstractTabulated, table: Table, dtype: torch.dtype, device: torch.device) -> None:
        self._solver, self._noisy, self._draws = solver, table.noisy, table.draws
        self._rows = tuple(rows.to(dtype=dtype, device=device) for rows in table.rows)
        self._times = [t.unbind(0) for t in table.times.to(dtype=dtype, device=device).unbind(0)]
        self._skipped = table.skipped.tolist()
        self.steps = table.steps

    def step(
        self, k: int, field: Field, x: Tensor, memory: Memory, place: Callable[[int], Place]
    ) -> tuple[Tensor, Memory]:
        """State and memory after step ``k``; draw ``n`` of the whole integration has its normals at ``place(n)``."""

        def evaluate(y: Tensor, i: int = 0) -> Tensor:
            return y if self._skipped[k][i] else field(y, self._times[k][i])

        return self._solver.advance(evaluate, self._at(k, place), x, memory)

    def _at(self, k: int, place: Callable[[int], Place]) -> list[Row]:
        rows: list[Row] = []
        draw = k * self._draws
        for table, noisy in zip(self._rows, self._noisy, strict=True):
            where = place(draw)

            def row(
                x: Tensor, *terms: Tensor, table: Tensor = table, noisy: bool = noisy, where: Place = where
            ) -> Tensor:
                return linear_step(x, terms, table, k, stochastic=noisy, **where)

            rows.append(row)
            draw += noisy
        return rows


@final
class KernelTableStepper(AbstractStepper):
    """Rows of a tabulated solver by kernel, with noise made in place."""

    backend = "kernel"
    reason = "each row of a step is one linear_step kernel, with coefficients tabulated in float64"

    def __init__(self, solver: AbstractTabulated, field: Field, table: Table, noise: AbstractNoise, x0: Tensor) -> None:
        self._rows = KernelRows(solver, table, x0.dtype, x0.device)
        self._field, self._memory = field, blank_memory(solver, x0)
        self._blank = self._memory
        self._noise = noise

    def begin(self, first: int, times: Tensor) -> None:
        del times
        if first == 0:
            self._memory = self._blank

    def advance(self, k: int, x: Tensor, span: Span) -> Tensor:
        x, self._memory = self._rows.step(k, self._field, x, self._memory, lambda n: _place(self._noise, n))
        return x


@final
class TorchTableStepper(AbstractStepper):
    """Rows of a tabulated solver in torch, with normals drawn for a run of steps at a time."""

    backend = "eager"

    def __init__(
        self, solver: AbstractTabulated, field: Field, table: Table, noise: AbstractNoise, x0: Tensor, why: str
    ) -> None:
        self._solver, self._field, self._table, self._noise = solver, field, table, noise
        self._rows = [rows.to(x0).unbind(0) for rows in table.rows]
        self._times = [t.unbind(0) for t in table.times.to(x0).unbind(0)]
        self._skipped = table.skipped.tolist()
        self._x0, self._memory = x0, blank_memory(solver, x0)
        self._blank = self._memory
        self._first, self._normals = 0, x0.new_zeros(0)
        self.reason = why

    def begin(self, first: int, times: Tensor) -> None:
        if first == 0:
            self._memory = self._blank
        self._first, draws = first, self._table.draws
        if draws:
            # Steps of unit length, so that increments are standard normals.
            unit = torch.arange((len(times) - 1) * draws + 1, dtype=torch.float64, device="cpu")
            self._normals = self._noise.increments(
                unit, tuple(self._x0.shape), step=first * draws, dtype=self._x0.dtype, device=self._x0.device
            )

    def advance(self, k: int, x: Tensor, span: Span) -> Tensor:
        draws = self._table.draws
        ours = iter(self._normals[(k - self._first) * draws : (k - self._first + 1) * draws])
        normals = [next(ours) if noisy else None for noisy in self._table.noisy]
        rows = [numbers[k] for numbers in self._rows]
        x, self._memory = row_step(
            self._solver, self._field, self._times[k], rows, normals, x, self._memory, self._skipped[k]
        )
        return x


def blank_memory(solver: AbstractTabulated, x: Tensor) -> Memory:
    """What a solver carries before the first step."""
    return (torch.zeros_like(x, requires_grad=False),) * solver.memory


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


@final
class CorrectedStepper(AbstractStepper):
    """The steps of a predictor, each followed by those of a corrector at the time it has reached."""

    def __init__(
        self,
        predictor: AbstractStepper,
        solver: PredictorCorrector,
        process: AbstractDiffusion,
        field: Field,
        times: Tensor,
        noise: AbstractPaths,
        x0: Tensor,
    ) -> None:
        self._predictor, self._corrector, self._n, self._field = predictor, solver.corrector, solver.n, field
        self._scales = solver.corrector.scales(process, times[1:]).to(x0).unbind(0)
        self._noise = noise.correctors(solver.n)
        self._corrected = (process.sigma(times[1:]) > 0).reshape(len(times) - 1, -1).all(1).tolist()
        self.backend, self.reason = predictor.backend, f"{predictor.reason}; then {solver.n} corrector step(s)"

    def begin(self, first: int, times: Tensor) -> None:
        self._predictor.begin(first, times)

    def advance(self, k: int, x: Tensor, span: Span) -> Tensor:
        x = self._predictor.advance(k, x, span)
        for i in range(self._n if self._corrected[k] else 0):
            x = self._corrector.correct(self._field, x, span.t1, self._scales[k], self._noise, k * self._n + i)
        return x


def choose_stepper(
    solver: AbstractSolver,
    sde: AbstractSDE,
    field: Field,
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

    if isinstance(solver, PredictorCorrector):
        predictor = choose_stepper(
            solver.predictor, sde, field, equation, noise, times, x0, shape, elementwise=elementwise, eager=eager
        )
        process = reversed_diffusion(equation)
        if not isinstance(noise, AbstractPaths):
            raise TypeError(f"correctors take noise from a BrownianPath, not from {type(noise).__name__}")
        if not (solver.corrector.affine or isinstance(noise, BrownianPath)):
            raise ValueError(
                "a corrector whose step size depends on state and noise is not affine: no exact law is known"
            )
        solver.corrector.check(x0)
        return CorrectedStepper(predictor, solver, process, field, times, noise, x0)
    plain = not isinstance(noise, BrownianPath) or not noise.plain
    if eager:
        why = "requested"
    elif plain and sde.noise is not Noise.NONE:
        why = "the noise is not a plain sequence of normals: coarse or weak increments, or a noise of another class"
    else:
        why = ""
    if isinstance(solver, AbstractTabulated) and isinstance(equation, AbstractSemilinear):
        table = solver.table(equation, times)
        if table is not None and not why:
            return KernelTableStepper(solver, field, table, noise, x0)
        if table is not None and not isinstance(solver, AbstractOneStep):
            return TorchTableStepper(solver, field, table, noise, x0, why)
    if isinstance(solver, EulerMaruyama) and elementwise and not why:
        return EulerStepper(sde, noise)
    if not isinstance(solver, AbstractOneStep):
        raise TypeError(f"{type(solver).__name__} has no step for {type(equation).__name__}")
    why = why or f"no kernel does {type(solver).__name__} on {sde.noise} noise; its step runs in torch"
    return SolverStepper(solver, sde, noise, x0, shape, why)


def _place(noise: AbstractNoise, n: int) -> Place:
    """Where the normals of draw ``n`` stand; any place will do for an ODE, which makes none."""
    if isinstance(noise, BrownianPath) and noise.plain:
        return noise.place(n)
    return {"seed": 0, "stream": 0, "first_path": 0, "step": n}
