"""What a solver becomes: one pure step, a table of numbers, and the noise that it reads.

The step is the solver's own, `AbstractOneStep.step` or `AbstractTabulated.advance`; no solver is written a second time.
What it reads besides the state comes from a `StepContext`, and each executor supplies its own: rows of numbers combined
in torch, by one kernel each, or traced with the user's functions into one kernel for all steps.
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable
from typing import final

import torch
from torch import Tensor

from sdesolve.brownian import AbstractNoise, AbstractStreams, BrownianPath, Increment, Part
from sdesolve.integrate.problem import Problem
from sdesolve.sde import AbstractSDE, AbstractSemilinear, Noise
from sdesolve.solvers.base import AbstractOneStep, Span
from sdesolve.solvers.predictor_corrector import PredictorCorrector, reversed_diffusion
from sdesolve.solvers.tabulated import AbstractTabulated, Row, Table

States = tuple[Tensor, ...]


class StepContext(abc.ABC):
    """What one step reads besides the state.

    Attributes:
        span: the step in time.
    """

    span: Span

    @abc.abstractmethod
    def number(self, column: int) -> Tensor:
        """A number of the step's row of the table, ``()`` or ``(batch,)``."""

    @abc.abstractmethod
    def skips(self, part: int) -> bool:
        """Whether a part of the step (`Lowered.skipped`) is left out."""

    @abc.abstractmethod
    def row(self, columns: slice, draw: int | None) -> Row:
        """``a x + sum_i b_i terms_i + c z`` with the numbers ``(a, b_1, ..., b_K, c)`` in these columns of the table.

        ``z`` is this draw of the step's noise; there is none for ``None``, and ``c`` is 0.
        """

    @abc.abstractmethod
    def increment(self) -> Increment | None:
        """The Brownian motion over the step; ``None`` for an ODE."""

    @abc.abstractmethod
    def corrections(self) -> tuple[AbstractNoise, int]:
        """The noise of correctors, and the index of this step's first draw of it."""

    def one_step(self, solver: AbstractOneStep, sde: AbstractSDE, x: Tensor) -> Tensor:
        """The step of a one-step solver."""
        return solver.step(sde, x, self.span, self.increment())


@final
@dataclasses.dataclass(frozen=True)
class NoiseSource:
    """Random numbers that a step reads.

    Attributes:
        noise: where they come from.
        draws: how many steps of ``noise`` one step of the solver takes.
        shape: gives the shape of a step's numbers for one path; may evaluate the diffusion.
        of: which part of an `Increment` they are; ``None`` for unit normals.
    """

    noise: AbstractNoise
    draws: int
    shape: Callable[[], tuple[int, ...]]
    of: Part | None = None


@final
@dataclasses.dataclass(frozen=True)
class Lowered:
    """A solver on one equation and grid.

    Attributes:
        step: states after a step from those before it: the state itself, then ``memory`` more.
        memory: tensors of the state's shape that are carried beside it; zero at the start.
        driving: the noise that drives; empty for an ODE.
        correcting: the noise of correctors.
        table: numbers of each step, ``(steps, columns[, batch])``, float64 on the host; ``None`` if there are none.
        skipped: parts of a step, evaluations and then corrections, that are left out because all of their coefficients
            are 0; ``(steps, parts)``, bool. Whoever does not leave them out gets the same state.
        one_step: the solver whose whole step it is, where that is no row of numbers.
    """

    step: Callable[[StepContext, States], States]
    memory: int = 0
    driving: tuple[NoiseSource, ...] = ()
    correcting: NoiseSource | None = None
    table: Tensor | None = None
    skipped: Tensor | None = None
    one_step: AbstractOneStep | None = None

    @property
    def sources(self) -> tuple[NoiseSource, ...]:
        """All noise that a step reads."""
        return self.driving if self.correcting is None else (*self.driving, self.correcting)

    @property
    def columns(self) -> int:
        return 0 if self.table is None else self.table.shape[1]

    @property
    def parts(self) -> int:
        return 0 if self.skipped is None else self.skipped.shape[1]

    def start(self, x0: Tensor) -> States:
        """What is carried before the first step."""
        return (x0, *(torch.zeros_like(x0, requires_grad=False),) * self.memory)


def lower(problem: Problem) -> Lowered:
    """The step of a solver, whatever kind it is.

    Raises:
        ValueError: the scheme is not one for this equation, grid or noise.
        TypeError: likewise.
    """
    lowered = _lowered(problem)
    return dataclasses.replace(lowered, step=_held(lowered.step)) if problem.padded else lowered


def _held(step: Callable[[StepContext, States], States]) -> Callable[[StepContext, States], States]:
    """The step, with rows for which it has no length left as they are, whatever the functions are at their end."""

    def held(context: StepContext, states: States) -> States:
        still = context.span.dt == 0
        return tuple(torch.where(still, x, x_next) for x, x_next in zip(states, step(context, states), strict=True))

    return held


def _lowered(problem: Problem) -> Lowered:
    solver = problem.solver
    if isinstance(solver, PredictorCorrector):
        return _corrected(problem, solver, _lowered(dataclasses.replace(problem, solver=solver.predictor)))
    noise, one_step = problem.noise, isinstance(solver, AbstractOneStep)
    if isinstance(solver, AbstractTabulated) and isinstance(problem.equation, AbstractSemilinear):
        table = solver.table(problem.equation, problem.times)
        if table is not None and (noise.timeless or not (table.draws and one_step)):
            if table.draws and not noise.timeless:
                raise ValueError(
                    f"{type(solver).__name__} takes standard normals one after another, and {type(noise).__name__} has "
                    "increments over its own times alone; give seed= or a BrownianPath, or take EulerMaruyama"
                )
            return _tabulated(problem, solver, table)
    if not isinstance(solver, AbstractOneStep):
        raise TypeError(f"{type(solver).__name__} has no step for {type(problem.equation).__name__}")
    return _one_step(problem, solver)


def _one_step(problem: Problem, solver: AbstractOneStep) -> Lowered:
    sde, noise = problem.watched, problem.noise

    def step(context: StepContext, states: States) -> States:
        return (context.one_step(solver, sde, *states),)

    driving: tuple[NoiseSource, ...] = ()
    if sde.noise is not Noise.NONE:
        missing = [part for part in solver.needs if part not in noise.provides]
        if missing:
            raise ValueError(
                f"{type(solver).__name__} needs {' and '.join(missing)} of the driving noise, and "
                f"{_named(noise)} makes {' and '.join(sorted(noise.provides))} alone; give seed= or a BrownianPath of "
                "normal increments"
            )
        driving = tuple(NoiseSource(noise, 1, lambda: problem.increment.shape[1:], part) for part in solver.needs)
    return Lowered(step, driving=driving, one_step=solver)


def _named(noise: AbstractNoise) -> str:
    return repr(noise) if isinstance(noise, BrownianPath) else type(noise).__name__


def _tabulated(problem: Problem, solver: AbstractTabulated, table: Table) -> Lowered:
    field, state = problem.watched.field, tuple(problem.x0.shape[1:])
    rows: list[tuple[slice, int | None]] = []
    column, draw = table.times.shape[1], 0
    for row, noisy in zip(table.rows, table.noisy, strict=True):
        rows.append((slice(column, column + row.shape[1]), draw if noisy else None))
        column, draw = column + row.shape[1], draw + noisy

    def step(context: StepContext, states: States) -> States:
        x, *memory = states

        def evaluate(y: Tensor, i: int = 0) -> Tensor:
            return y if context.skips(i) else field(y, context.number(i))

        x, after = solver.advance(evaluate, [context.row(*row) for row in rows], x, tuple(memory))
        return (x, *after)

    source = NoiseSource(problem.noise, table.draws, lambda: (table.draws, *state))
    numbers = torch.cat([table.times, *table.rows], dim=1)
    driving = (source,) if table.draws else ()
    return Lowered(step, solver.memory, driving, table=numbers, skipped=table.skipped)


def _corrected(problem: Problem, solver: PredictorCorrector, predictor: Lowered) -> Lowered:
    """Steps of a predictor, each followed by those of a corrector at the time it has reached.

    Where a grid ends at zero noise no correction follows: its scale there is 0, at the time of the step before.
    """
    process, corrector, n, noise = reversed_diffusion(problem.equation), solver.corrector, solver.n, problem.noise
    if not isinstance(noise, AbstractStreams):
        raise TypeError(f"correctors take noise from a BrownianPath, not from {type(noise).__name__}")
    if not (corrector.affine or isinstance(noise, BrownianPath)):
        raise ValueError("a corrector whose step size depends on state and noise is not affine: no exact law is known")
    corrector.check(problem.x0)
    field, state = problem.watched.field, tuple(problem.x0.shape[1:])
    ends = problem.times[1:]
    noisy = process.sigma(ends) > 0
    times = torch.where(noisy, ends, problem.times[:-1])
    scales = torch.where(noisy, corrector.scales(process, times), 0.0)
    numbers = torch.stack([times, scales], dim=1)
    skipped = ~noisy.reshape(problem.steps, -1).all(1, keepdim=True)
    time, part = predictor.columns, predictor.parts

    def step(context: StepContext, states: States) -> States:
        x, *memory = predictor.step(context, states)
        if context.skips(part):
            return (x, *memory)
        draws, first = context.corrections()
        for i in range(n):
            x = corrector.correct(field, x, context.number(time), context.number(time + 1), draws, first + i)
        return (x, *memory)

    return dataclasses.replace(
        predictor,
        step=step,
        correcting=NoiseSource(noise.correctors(n), n, lambda: (n, *state)),
        table=numbers if predictor.table is None else torch.cat([predictor.table, numbers], dim=1),
        skipped=skipped if predictor.skipped is None else torch.cat([predictor.skipped, skipped], dim=1),
    )
