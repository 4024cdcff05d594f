"""What a solver becomes: one pure step, a table of numbers, and the noise that it reads.

The step is the solver's own, `AbstractOneStep.step` or `AbstractTabulated.advance`; no solver is written a second time.
What it reads besides the state comes from a `StepContext`, and each executor supplies its own: rows of numbers combined
in torch, by one kernel each, or traced with the user's functions into one kernel for all steps.
"""

from __future__ import annotations

import abc
import dataclasses
import functools
import math
from collections.abc import Callable, Hashable, Sequence
from typing import TYPE_CHECKING, final

import torch
from sdesolve_kernels.transforms import is_transformed
from torch import Tensor

from sdesolve._internal.copies import numbers_of
from sdesolve._internal.levy_area import VARIANCES, LevyArea, composed_area, composition, weighted_sum
from sdesolve.brownian import AbstractNoise, AbstractStreams, BrownianPath, Increment, Part, named
from sdesolve.integrate import pure_noise
from sdesolve.integrate.clock import check_clock
from sdesolve.integrate.path_measure import PathMeasure, lengths
from sdesolve.integrate.problem import Problem
from sdesolve.jumps import AbstractJumping
from sdesolve.reverse import ProbabilityFlow, ReverseSDE
from sdesolve.sde import AbstractSDE, AbstractSemilinear, Field, Noise, per_sample
from sdesolve.solvers.base import AbstractOneStep, AbstractRemembering, Span
from sdesolve.solvers.predictor_corrector import PredictorCorrector, reversed_diffusion
from sdesolve.solvers.tabulated import AbstractTabulated, Row, Table

if TYPE_CHECKING:
    from sdesolve_kernels.trajectory import ReactionRule, Rule

States = tuple[Tensor, ...]


def together(memory: States) -> Tensor | None:
    """What is carried beside the state, ``(batch, numbers)``; ``None`` if it is nothing."""
    return torch.cat([m.reshape(len(m), -1) for m in memory], 1) if memory else None


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
    def within(self) -> Tensor:
        """Standard normals for what is drawn within the step given its ends (`Lowered.within`), ``(batch, draws)``."""

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
        of: which part of an `Increment` they are, with a shape of its channels; ``None`` for unit normals.
    """

    noise: AbstractNoise
    draws: int
    shape: Callable[[], tuple[int, ...]]
    of: Part | None = None

    @property
    def substeps(self) -> int:
        """Fine steps of a path to one of its own."""
        return self.noise.substeps if isinstance(self.noise, BrownianPath) else 1

    @functools.cached_property
    def path(self) -> BrownianPath:
        """The sequence of unit numbers that a kernel makes, one for each number of a fine step.

        Raises:
            TypeError: the noise is no `BrownianPath`.
        """
        if not isinstance(self.noise, BrownianPath):
            raise TypeError(f"noise of class {type(self.noise).__name__} has no sequence of unit numbers")
        path = self.noise if self.of is None else self.noise.units(self.of)
        if path.substeps == 1 and not (path.mirrored or path.swapped):
            return path
        return dataclasses.replace(path, substeps=1, mirrored=False, swapped=False)

    def numbers(self) -> tuple[int, ...]:
        """Shape of the unit numbers of a step, for one path: those of its fine steps one after another.

        ``(draws, [substeps], *state)`` for unit normals, ``([substeps], *channels)`` for parts of increments.
        """
        shape, r = self.shape(), self.substeps
        if isinstance(self.of, LevyArea):
            shape = (self.of.numbers(math.prod(shape)),)
        if r == 1:
            return shape
        return (shape[0], r, *shape[1:]) if self.of is None else (r, *shape)

    def of_piece(self, numbers: Tensor, i: int) -> Tensor:
        """The unit numbers of fine step ``i``, from those of a step, ``(batch, *numbers())``."""
        assert isinstance(self.noise, BrownianPath)
        axis = 2 if self.of is None else 1
        return numbers if self.substeps == 1 else numbers.select(axis, i ^ self.noise.swapped)

    def scaled(self, total: Tensor, scale: Tensor | float = 1.0) -> Tensor:
        """A sum over fine steps, as a number of the step and of its path: ``-scale / sqrt(substeps)`` if mirrored."""
        assert isinstance(self.noise, BrownianPath)
        factor = (-1.0 if self.noise.mirrored else 1.0) / math.sqrt(self.substeps)
        return total * (scale if factor == 1.0 else scale * factor)

    def coarse(self, numbers: Tensor) -> Tensor:
        """Unit normals of a step from those of its fine ones, ``(batch, draws, *state)``."""
        return self.scaled(weighted_sum([1.0] * self.substeps, lambda i: self.of_piece(numbers, i)))


def assembled(sources: Sequence[NoiseSource], numbers: Sequence[Tensor], scale: Tensor) -> Increment:
    """The increment of a step from the unit numbers of its sources, each ``(batch, *numbers())``.

    Args:
        sources: one for each part that the solver needs, and for each part that these are made from.
        numbers: theirs.
        scale: ``sqrt|dt|``.
    """
    r, parts = sources[0].substeps, dict[str, Tensor]()
    of = {named(s.of): (s, z) for s, z in zip(sources, numbers, strict=True) if s.of is not None}

    def piece(part: str, i: int) -> Tensor:
        source, z = of[part]
        unit = source.of_piece(z, i)
        return unit if VARIANCES.get(part, 1.0) == 1.0 else math.sqrt(VARIANCES[part]) * unit

    for part in ("W", "H", "K"):
        if part in of:
            terms = [(p, w) for p, w in composition(part, r).items() if any(w)]
            sums = [weighted_sum(w, functools.partial(piece, p)) for p, w in terms]
            parts[part] = of["W"][0].scaled(functools.reduce(torch.add, sums), scale)
    if "S" in of:
        parts["S"] = piece("S", 0)
    if "A" in of:
        area = of["A"][0].of
        assert isinstance(area, LevyArea)
        W, H, K = ([piece(part, i).flatten(1) for i in range(r)] for part in ("W", "H", "K"))
        fine = [area.draw(W[i], H[i], K[i], piece("A", i)) for i in range(r)]
        A = composed_area(lambda i: fine[i], lambda i: W[i], r)
        parts["A"] = A * (scale * scale / r)
    return Increment(**parts)


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
        denoised: whether rows are of the denoised state in place of the score.
        extra: what is carried behind the solver's memory, as it is before the first step: ``(batch, ...)`` each.
        within: normals for what is drawn within a step given its ends.
        rule: how steps are chosen, where each path chooses its own (`fused_adaptive`).
        rows: numbers of the rows' paths, counted from the first path, where a kernel is to read them from a list.
        eager: why no kernel does the step, for one that none does.
        clocks: how many columns of the table, from the first on, are times that the score is called at.
    """

    step: Callable[[StepContext, States], States]
    memory: int = 0
    driving: tuple[NoiseSource, ...] = ()
    correcting: NoiseSource | None = None
    table: Tensor | None = None
    skipped: Tensor | None = None
    one_step: AbstractOneStep | None = None
    denoised: bool = False
    extra: States = ()
    within: NoiseSource | None = None
    rule: Rule | ReactionRule | None = None
    rows: Tensor | None = None
    eager: str = ""
    clocks: int = 0

    @property
    def sources(self) -> tuple[NoiseSource, ...]:
        """All noise that a step reads: what drives, then what corrects, then what is drawn within."""
        return (*self.driving, *(source for source in (self.correcting, self.within) if source is not None))

    @property
    def columns(self) -> int:
        return 0 if self.table is None else self.table.shape[1]

    @property
    def parts(self) -> int:
        return 0 if self.skipped is None else self.skipped.shape[1]

    def start(self, x0: Tensor, memory: States = ()) -> States:
        """What is carried before the first step; ``memory`` of the solver where that is not the first of all."""
        own = memory[: self.memory] or (torch.zeros_like(x0, requires_grad=False),) * self.memory
        return (x0, *own, *self.extra)

    def shapes(self, x0: Tensor) -> list[tuple[int, ...]]:
        """Of what is carried, for one path: the state, the solver's memory, the rest."""
        return [*(tuple(x0.shape[1:]),) * (1 + self.memory), *(tuple(e.shape[1:]) for e in self.extra)]

    def apart(self, x: Tensor, memory: Tensor | None) -> States:
        """What is carried, of a state and ``(batch, numbers)`` of the rest."""
        return (x, *apart(x, memory, self.shapes(x)[1:]))


def apart(x: Tensor, memory: Tensor | None, shapes: Sequence[tuple[int, ...]]) -> States:
    """What is carried beside a state, of ``(batch, numbers)``, with these shapes for a path."""
    if memory is None:
        return ()
    parts = memory.split([math.prod(shape) for shape in shapes], 1)
    return tuple(part.reshape(len(x), *shape) for part, shape in zip(parts, shapes, strict=True))


def lower(problem: Problem) -> Lowered:
    """The step of a solver, whatever kind it is.

    Raises:
        ValueError: the scheme is not one for this equation, grid or noise.
        TypeError: likewise.
    """
    lowered = _lowered(problem)
    if problem.prior is not None:
        lowered = _weighted(problem, lowered)
    if problem.following is not None:
        lowered = problem.following.follow(problem, lowered)
    if problem.padded:
        lowered = dataclasses.replace(lowered, step=_held(lowered.step))
    return lowered if problem.changes is None else problem.changes.follow(problem, lowered)


def _weighted(problem: Problem, lowered: Lowered) -> Lowered:
    """A step that also carries the KL divergence and the log-weight of each path (`solve`)."""
    measure, trapezoidal = PathMeasure(problem), (problem.solver.ode_order or 1) > 1
    own, earlier = 1 + lowered.memory, problem.earlier
    problem.save.beside = slice(own, own + 2)

    def step(context: StepContext, states: States) -> States:
        *carried, kl, log_weight = states
        x, span = carried[0], context.span
        with problem.watched.remembering():
            increment, start = context.increment(), measure.rates(x, span.t0)
            after = lowered.step(context, tuple(carried))
            end = measure.rates(after[0], span.t1) if trapezoidal else start
        assert increment is not None
        h = lengths(span).abs()
        return (
            *after,
            kl + 0.5 * h * (start.energy + end.energy),
            log_weight + measure.change(start, span, increment.W),
        )

    nothing = problem.x0.new_zeros(len(problem.x0))
    return dataclasses.replace(lowered, step=step, extra=(earlier and earlier.weights) or (nothing, nothing))


def _held(step: Callable[[StepContext, States], States]) -> Callable[[StepContext, States], States]:
    """The step, with rows for which it has no length left as they are, whatever the functions are at their end."""

    def held(context: StepContext, states: States) -> States:
        still = context.span.dt.reshape(-1) == 0
        pairs = zip(states, step(context, states), strict=True)
        return tuple(torch.where(per_sample(still, x) if len(still) > 1 else still[0], x, y) for x, y in pairs)

    return held


def _lowered(problem: Problem) -> Lowered:
    solver = problem.solver
    if isinstance(solver, PredictorCorrector):
        return _corrected(problem, solver, _lowered(dataclasses.replace(problem, solver=solver.predictor)))
    if isinstance(problem.equation, AbstractJumping):
        from sdesolve.integrate.jumps import jumping  # made of what follows

        return jumping(problem)
    if problem.delays:
        from sdesolve.integrate.delays import delayed  # likewise

        return delayed(problem)
    pure_noise.refuse(problem)
    noise, by_steps = problem.noise, isinstance(solver, AbstractOneStep)
    if isinstance(solver, AbstractTabulated) and isinstance(problem.equation, AbstractSemilinear):
        denoise = pure_noise.denoiser(problem)
        table = _table(solver, problem.equation, problem.times, denoised=denoise is not None)
        if table is not None and (noise.timeless or not (table.draws and by_steps)):
            if table.draws and not noise.timeless:
                raise ValueError(
                    f"{type(solver).__name__} takes standard normals one after another, and {type(noise).__name__} has "
                    "increments over its own times alone; give seed= or a BrownianPath, or take EulerMaruyama"
                )
            return _tabulated(problem, solver, table, denoise)
    if not isinstance(solver, AbstractOneStep):
        raise TypeError(f"{type(solver).__name__} has no step for {type(problem.equation).__name__}")
    return one_step(problem, solver)


_tables: dict[Hashable, Table] = {}
_TABLES_KEPT, _MOST_TIMES = 64, 1 << 10


def _table(solver: AbstractTabulated, sde: AbstractSemilinear, times: Tensor, *, denoised: bool) -> Table | None:
    """The table of a solver, kept by the values of all that it is made of where these are numbers alone."""
    make = solver.denoised_table if denoised else solver.table
    hidden = is_transformed() or torch.is_inference_mode_enabled()
    if hidden or times.ndim != 1 or len(times) > _MOST_TIMES or not isinstance(sde, ReverseSDE | ProbabilityFlow):
        return make(sde, times)
    held = numbers_of(solver), numbers_of(sde.forward)
    if None in held:
        return make(sde, times)
    stochasticity = sde.stochasticity if isinstance(sde, ReverseSDE) else 0.0
    key = held, type(sde), stochasticity, denoised, times.numpy().tobytes(), torch.get_default_dtype()
    table = _tables.get(key)
    if table is None:
        table = make(sde, times.clone())  # which holds a part of them, and the user may write into his own
        if len(_tables) >= _TABLES_KEPT:
            _tables.clear()
        if table is not None:
            _tables[key] = table
    return table


def one_step(problem: Problem, solver: AbstractOneStep) -> Lowered:
    """The step of a one-step solver."""
    sde, noise = problem.watched, problem.noise

    table = solver.numbers(problem.equation, problem.times)
    columns = 0 if table is None else table.shape[1]

    def step(context: StepContext, states: States) -> States:
        x = states[0]
        if columns:
            numbers = tuple(per_sample(context.number(i), x) for i in range(columns))
            context.span = dataclasses.replace(context.span, numbers=numbers)
        if isinstance(solver, AbstractRemembering):
            return solver.advance(sde, states, context.span, context.increment())
        return (context.one_step(solver, sde, x),)

    driving: tuple[NoiseSource, ...] = ()
    if sde.noise is not Noise.NONE:
        needs = [part for part in solver.needs if sde.noise is Noise.GENERAL or not isinstance(part, LevyArea)]
        missing = [named(part) for part in needs if named(part) not in noise.provides]
        if missing:
            raise ValueError(
                f"{type(solver).__name__} needs {' and '.join(missing)} of the driving noise, and {_named(noise)} "
                f"makes {' and '.join(sorted(noise.provides - {'S'}))} alone; give seed= or a BrownianPath of normal "
                "increments"
            )
        if "S" in needs and isinstance(noise, BrownianPath) and noise.kind == "two-point":
            raise ValueError(
                f"{type(solver).__name__} has weak order {solver.weak_order:g} with three-point or normal increments, "
                "and two-point ones allow 1; give increments='three-point', or leave increments= out"
            )
        parts = _read(needs) if isinstance(noise, BrownianPath) else needs
        driving = tuple(NoiseSource(noise, 1, functools.partial(_shape, problem, part), part) for part in parts)
    memory = solver.memory if isinstance(solver, AbstractRemembering) else 0
    return Lowered(step, memory, driving, table=table, one_step=solver)


def _read(needs: Sequence[Part]) -> Sequence[Part]:
    """Parts that a step needs, and those that they are drawn given or composed of: ``W`` first."""
    names = {named(part) for part in needs}
    within: list[Part] = ["W"]
    within += ["H"] if names & {"H", "K", "A"} else []
    within += ["K"] if names & {"K", "A"} else []
    return [*within, *(part for part in needs if named(part) in ("S", "A"))]


def _shape(problem: Problem, part: Part) -> tuple[int, ...]:
    """The channels of a part for one path."""
    shape, elementwise = problem.increment.shape[1:], problem.increment.elementwise
    if part != "S":
        return shape
    own = elementwise or problem.equation.noise is Noise.SCALAR
    return (2,) if own else (max(2, math.prod(shape)),)


def _named(noise: AbstractNoise) -> str:
    return repr(noise) if isinstance(noise, BrownianPath) else type(noise).__name__


def _tabulated(problem: Problem, solver: AbstractTabulated, table: Table, denoise: Field | None) -> Lowered:
    check_clock(problem.times, problem.x0, by_row=problem.times.ndim == 2)
    field, state = functools.partial(problem.watched.field, of=denoise), tuple(problem.x0.shape[1:])
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

    source = NoiseSource(problem.noise.in_draws(table.draws), table.draws, lambda: (table.draws, *state))
    numbers = torch.cat([table.times, *table.rows], dim=1)
    driving = (source,) if table.draws else ()
    denoised, clocks = denoise is not None, table.times.shape[1]
    return Lowered(
        step, solver.memory, driving, table=numbers, skipped=table.skipped, denoised=denoised, clocks=clocks
    )  # fmt: skip


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
