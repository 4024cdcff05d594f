"""What an executor is, and the two that go step by step: by one kernel for each row, and in plain torch."""

from __future__ import annotations

import abc
import functools
import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Protocol, final

import torch
from sdesolve_kernels import euler_maruyama_step, linear_step, matrix_step
from sdesolve_kernels.transforms import is_transformed
from torch import Tensor
from torch.autograd import forward_ad

from sdesolve._internal.ahead import Ahead
from sdesolve._internal.progress import progress_bar
from sdesolve.brownian import AbstractNoise, BrownianPath, Increment, Place, named
from sdesolve.integrate.adaptive import integrate_adaptively
from sdesolve.integrate.checks import all_finite
from sdesolve.integrate.lowering import Lowered, NoiseSource, States, StepContext
from sdesolve.integrate.nested import Nested
from sdesolve.integrate.non_finite import refuse_nonfinite
from sdesolve.integrate.path_measure import between
from sdesolve.integrate.problem import Problem
from sdesolve.integrate.save_at import SavePlan
from sdesolve.integrate.solution import Saved
from sdesolve.integrate.structure import check_noise, check_noise_ahead, has_structure, step_treats_rows_alike
from sdesolve.sde import AbstractSDE, Noise, is_matrix
from sdesolve.solvers.base import AbstractOneStep, Span
from sdesolve.solvers.euler_maruyama import EulerMaruyama
from sdesolve.solvers.reversible_heun import ReversibleHeun
from sdesolve.solvers.tabulated import Row, torch_row

if TYPE_CHECKING:
    from sdesolve.integrate.checkpointing import AbstractRecord

# Increments are drawn for several steps at once: with few channels, a call a step would spend four words on each normal
# it keeps. At least this many normals a path, and no more than this many in all unless one step needs them.
_CHUNK_NORMALS = 64
_CHUNK_ELEMENTS = 1 << 20
_SPANS = 64  # steps whose times are made tensors at once
_MOST_AHEAD = 1 << 13  # steps of a run whose score makes its numbers for all times at once
_LOOK, _FEW, _LEAST = 4, 0.9, 16  # paths that stop: steps between looks; as in `adaptive`


TRANSFORMED = "it takes part in a torch.func transform or in forward-mode differentiation, which kernels are blind to"


class CannotExecute(Exception):
    """An executor cannot carry out an integration; the message says why."""


class Executor(Protocol):
    """A way to carry out an integration."""

    def run(self, problem: Problem, lowered: Lowered) -> Saved:
        """Carries it out.

        Raises:
            CannotExecute: not this one, or not in this way.
        """


class AbstractSteppedContext(StepContext):
    """What step ``k`` reads, for executors that go from step to step."""

    def __init__(self, lowered: Lowered, numbers: Tensor | None) -> None:
        self._k, self._correcting, self._table = 0, lowered.correcting, numbers
        self._clocks = lowered.clocks
        self._ahead: Ahead | None = None
        if numbers is not None and numbers.ndim == 2 and lowered.clocks and len(numbers) <= _MOST_AHEAD:
            self._ahead = Ahead(numbers[:, : lowered.clocks].T.reshape(-1))
        self._skipped = None if lowered.skipped is None else lowered.skipped.tolist()

    @property
    def k(self) -> int:
        """The number of the step."""
        return self._k

    def begin(self, k: int, span: Span) -> None:
        """Turns to step ``k``."""
        self._k, self.span = k, span

    def narrow(self, rows: Tensor | None) -> None:
        """Goes on with these rows alone; all of them for ``None``."""

    @functools.cached_property
    def _numbers(self) -> tuple[Tensor, ...]:
        """Rows of the table."""
        assert self._table is not None
        return self._table.unbind(0)

    @final
    def number(self, column: int) -> Tensor:
        if self._ahead is not None and column < self._clocks:
            return self._ahead.each[column * len(self._ahead.each) // self._clocks + self._k]
        return self._numbers[self._k][column]

    @final
    def times_ahead(self) -> AbstractContextManager[None]:
        """Within, the score makes numbers of all times of the run at once, unless gradients may be wanted of them."""
        hidden = torch.is_grad_enabled() or is_transformed() or forward_ad._current_level >= 0
        return nullcontext() if self._ahead is None or hidden else self._ahead.known()

    @final
    def skips(self, part: int) -> bool:
        return self._skipped is not None and self._skipped[self._k][part]

    @final
    def corrections(self) -> tuple[AbstractNoise, int]:
        assert self._correcting is not None
        return self._correcting.noise, self._k * self._correcting.draws


@final
class TorchContext(AbstractSteppedContext):
    """Rows in plain torch, with noise drawn for a run of steps at a time."""

    def __init__(self, problem: Problem, lowered: Lowered) -> None:
        super().__init__(lowered, None if lowered.table is None else lowered.table.to(problem.x0))
        self._problem, self._driving, self._within = problem, lowered.driving, lowered.within
        self._sources = [*lowered.driving, *([] if lowered.within is None else [lowered.within])]
        self._first, self._drawn = 0, [problem.x0.new_empty(0)] * len(self._sources)
        self._rows: Tensor | None = None

    def narrow(self, rows: Tensor | None) -> None:
        self._rows, self._drawn = rows, [self._problem.x0.new_empty(0)] * len(self._sources)

    def begin(self, k: int, span: Span) -> None:
        super().begin(k, span)
        if self._sources and not self._first <= k < self._first + len(self._drawn[0]):
            # From a multiple on, so that steps that are taken again in another order find as many drawn.
            first, steps = self._problem.first, min(map(self._drawn_at_once, self._sources))
            self._first = first + _whole(k - first, steps)
            steps = min(steps, self._problem.steps - self._first)
            self._drawn = [self._of_rows(self._draw(s, self._first, steps), s) for s in self._sources]

    def row(self, columns: slice, draw: int | None) -> Row:
        assert self._numbers is not None
        z = None if draw is None else self._drawn[0][self._k - self._first, draw]
        return torch_row(self._numbers[self._k][columns], z)

    def increment(self) -> Increment | None:
        if not self._driving:
            return None
        parts = zip(self._driving, self._drawn[: len(self._driving)], strict=True)
        return Increment(**{named(source.of): drawn[self._k - self._first] for source, drawn in parts if source.of})

    def within(self) -> Tensor:
        return self._drawn[-1][self._k - self._first].T

    def _of_rows(self, drawn: Tensor, source: NoiseSource) -> Tensor:
        axis = 2 if source.of is None else 1
        return drawn if self._rows is None else drawn.index_select(axis, self._rows)

    def _drawn_at_once(self, source: NoiseSource) -> int:
        """For how many steps."""
        a_path = max(1, math.prod(source.shape()))
        return max(1, min(_CHUNK_NORMALS // a_path, _CHUNK_ELEMENTS // max(1, a_path * len(self._problem.x0))))

    def _draw(self, source: NoiseSource, k: int, steps: int) -> Tensor:
        """Numbers of steps ``k ...``: increments of the path, or unit normals ``(steps, draws, batch, *state)``."""
        problem, batch, shape = self._problem, len(self._problem.x0), source.shape()
        make = functools.partial(source.noise.increments, dtype=problem.x0.dtype, device=problem.x0.device)
        if source.of is not None:
            times = problem.times[k : k + steps + 1]
            if source.of == "W":  # which every noise makes
                return make(times, (batch, *shape), step=k)
            return make(times, (batch, *shape), step=k, of=source.of)
        # Steps of unit length, so that increments are standard normals.
        unit = torch.arange(steps * source.draws + 1, dtype=torch.float64, device="cpu")
        z = make(unit, (batch, *shape[1:]), step=k * source.draws)
        return z.reshape(steps, source.draws, batch, *shape[1:])


class KernelContext(AbstractSteppedContext):
    """Each row as one ``linear_step`` kernel, which makes its noise itself."""

    def __init__(self, lowered: Lowered, dtype: torch.dtype, device: torch.device) -> None:
        table = None if lowered.table is None else lowered.table.to(dtype=dtype, device=device)
        super().__init__(lowered, table)
        self._rows = dict[int, Tensor]()
        self._draws = lowered.driving[0].draws if lowered.driving else 0

    @abc.abstractmethod
    def offset(self, draw: int) -> Place:
        """Coordinates of draw ``draw`` of the whole integration."""

    @final
    def row(self, columns: slice, draw: int | None) -> Row:
        assert self._table is not None
        table = self._rows.get(columns.start)
        if table is None:
            table = self._rows[columns.start] = self._table[:, columns].contiguous()
        k = self._k
        if draw is None:
            return lambda x, *terms: linear_step(x, terms, table, k, stochastic=False)
        where = self.offset(k * self._draws + draw)
        return lambda x, *terms: linear_step(x, terms, table, k, **where)

    @final
    def increment(self) -> Increment | None:
        raise AssertionError("a kernel makes its own noise")

    @final
    def within(self) -> Tensor:
        raise AssertionError("a kernel does a step, and nothing within it")

    @final
    def one_step(self, solver: AbstractOneStep, sde: AbstractSDE, x: Tensor) -> Tensor:
        """Euler-Maruyama: the row ``(1, dt, g sqrt|dt|)``, with a matrix for ``g`` where the noise has one."""
        t, dt = self.span.t0, self.span.dt
        f, g = sde.drift_and_diffusion(x, t)
        if is_matrix(g, x):
            g = g.expand(-1, *x.shape[1:], -1)
            return matrix_step(x, f, g, dt.reshape(-1) if dt.ndim else dt, **self.offset(self._k))
        if g.ndim and g.shape != x.shape:
            by_row = g.ndim == x.ndim and g.numel() == len(g) == len(x)
            g = g.reshape(-1) if by_row else g.expand_as(x)
        return euler_maruyama_step(x, f, g, dt.reshape(-1) if dt.ndim else dt, **self.offset(self._k))


@final
class _PathContext(KernelContext):
    """Rows by kernel on the noise of a path."""

    def __init__(self, problem: Problem, lowered: Lowered) -> None:
        super().__init__(lowered, problem.x0.dtype, problem.x0.device)
        # An ODE makes no noise, so any coordinates do; those of its path may be of a kind that no kernel makes.
        noise = lowered.driving[0].noise if lowered.driving else None
        self._first = (noise if isinstance(noise, BrownianPath) else BrownianPath(0)).place(0)

    def offset(self, draw: int) -> Place:
        return {**self._first, "step": self._first["step"] + draw}


@final
class Steps:
    """The steps of an integration, one at a time and in any order, because noise can be made again."""

    def __init__(self, problem: Problem, lowered: Lowered, context: AbstractSteppedContext) -> None:
        self.problem, self._lowered, self._context = problem, lowered, context
        self._spans: list[Span] = []
        self._spans_from = 0
        self._whole: States = ()  # of all rows, where paths that have stopped have left the batch
        self._rows = torch.zeros(0)  # that are left
        self.times_ahead = context.times_ahead

    def narrowed(self, states: States, rows: Tensor) -> States:
        """States of these rows alone, with which steps go on."""
        self._whole, kept = self.widened(states), self._rows[rows] if self._whole else rows
        self._rows = kept
        self._context.narrow(kept)
        return tuple(s.index_select(0, rows) for s in states)

    def widened(self, states: States, *, for_good: bool = False) -> States:
        """States of all rows, with those that have left the batch; steps go on with them all if ``for_good``."""
        whole = states
        if self._whole:
            whole = tuple(a.index_copy(0, self._rows, b) for a, b in zip(self._whole, states, strict=True))
        if for_good:
            self._whole = ()
            self._context.narrow(None)
        return whole

    def span(self, k: int) -> Span:
        """Step ``k`` in time."""
        if not self._spans_from <= k < self._spans_from + len(self._spans):
            self._spans_from = _whole(k - self.problem.first, _SPANS) + self.problem.first
            self._spans = self.problem.spans(self._spans_from, _SPANS)
        return self._spans[k - self._spans_from]

    def after(self, k: int, states: States) -> States:
        """What is carried after step ``k``, from what is before it."""
        self._context.begin(k, self.span(k))
        return self._lowered.step(self._context, states)

    def saving(self, k: int, states: States, save: SavePlan) -> States:
        """The same, and keeps in ``save`` what was asked for within the step and at its end."""
        hook = self.problem.hook
        if hook is not None:
            hook.begin(states[0])
        after = self.after(k, states)
        save.within_step(k, functools.partial(between, self.problem, k, states, after, self.span(k)))
        if hook is not None:
            if self.problem.check_finite:  # a run with a callback cannot be gone through again to find the step
                refuse_nonfinite(self.problem, k, states[0], after[0], self.span(k))
            after = (hook.after(self.problem, k, self.span(k), states[0], after[0]), *after[1:])
        if save.on_grid.get(k + 1):
            save.at_grid_point(k + 1, *self.widened(after))
        return after

    def again(self, k: int, states: States) -> States:
        """`saving`, of a step that was taken before."""
        evaluations, save = self.problem.watched.evaluations, self.problem.save
        after = self.saving(k, states, save.blank()) if save.holds(k) else self.after(k, states)
        self.problem.watched.evaluations = evaluations
        return after

    def before(self, k: int, states: States) -> States:
        """What was carried before step ``k``, from what is after it, with a solver that can be reversed."""
        problem, span = self.problem, self.span(k)
        evaluations, solver = problem.watched.evaluations, problem.solver
        assert isinstance(solver, ReversibleHeun)
        self._context.begin(k, span)
        found = solver.undo(problem.watched, states, span, self._context.increment())
        problem.watched.evaluations = evaluations
        if not problem.padded:
            return found
        return tuple(torch.where(span.dt == 0, x, y) for x, y in zip(states, found, strict=True))


def _whole(k: int, size: int) -> int:
    """The largest multiple of a size up to ``k``."""
    return k // size * size


@final
class Stepwise:
    """An integration carried out step by step.

    Attributes:
        k: steps taken.
        states: the state after them, and what the solver carries beside it.
    """

    def __init__(
        self,
        problem: Problem,
        lowered: Lowered,
        context: Callable[[], AbstractSteppedContext],
        execution: str,
        reason: str,
    ) -> None:
        self.problem, self._lowered, self._steps = problem, lowered, Steps(problem, lowered, context())
        after = "" if lowered.correcting is None else f"{lowered.correcting.draws} corrector step(s) after each"
        self._execution, self._reasons = execution, [reason, after]
        self.k, self.states = problem.first, lowered.start(problem.x0, problem.memory)
        problem.watched.checking = True
        check_noise_ahead(problem)
        self._structured = has_structure(problem)
        self._record = recorded(problem, lambda: Steps(problem, lowered, context()))
        problem.save.at_grid_point(self.k, *self.states)
        self._work = 0
        self._narrows = functools.cache(functools.partial(step_treats_rows_alike, problem, lowered))

    def advance(self) -> None:
        """Takes the next step, and keeps the states that were asked for."""
        k, problem, x = self.k, self.problem, self.states[0]
        if self._structured and k and k & (k - 1) == 0:  # every power of 2: what a function shows later alone
            check_noise(problem, x, self._steps.span(k).t0)
        with nullcontext() if self._record is None else self._record.step(k, self.states):
            self.states = self._steps.saving(k, self.states, problem.save)
        on_host = x.device.type == "cpu"  # elsewhere a look at the values would wait for the device
        if problem.watched.checking and problem.check_finite and on_host:
            refuse_nonfinite(problem, k, x, self.states[0], self._steps.span(k))
        problem.watched.checking = False
        self.k, self._work = k + 1, self._work + len(x)

    def _leave(self) -> bool:
        """Lets paths that have stopped leave the batch, if rows are alike; gives whether all have stopped."""
        following = self.problem.following
        if following is None or not following.stops or is_transformed() or self._record is not None:
            return False
        if self._lowered.eager:
            return not bool((self.states[-3] == 0).any())
        running = self.states[-3] == 0
        count = int(running.sum())
        if count and len(running) >= _LEAST and count <= _FEW * len(running) and self._narrows():
            self.states = self._steps.narrowed(self.states, running.nonzero().squeeze(1))
        return not count

    def _stand_still(self) -> None:
        """Keeps what was asked for of later steps, in which no path moves."""
        whole = self._steps.widened(self.states)
        for k in range(self.k + 1, self.problem.steps + 1):
            self.problem.save.at_grid_point(k, *whole)
        self.k = self.problem.steps

    def finish(self) -> Saved:
        """Takes the steps that are left.

        Raises:
            DivergenceError: the state is not finite at the end.
        """
        problem = self.problem
        left = problem.steps - self.k
        with progress_bar(problem.progress, total=left, unit="step", leave=False) as bar, self._steps.times_ahead():
            for i in range(left):
                if i % _LOOK == 0 and self._leave():
                    self._stand_still()
                    break
                self.advance()
                bar.update()
                if problem.hook is not None and problem.hook.stopped:
                    problem.save.end_at(problem.times[self.k], *self.states)
                    break
        self.states = self._steps.widened(self.states, for_good=True)
        if problem.check_finite and not all_finite(self.states[0]):
            self.report_divergence()
        if self._record is not None:
            self._record.finish(self.states)
            self._reasons.append(self._record.report)
        save = problem.save
        return Saved(
            self.states[0],
            save.states(),
            save.variances() if save.moments else None,
            self.k - problem.first,
            problem.watched.evaluations,
            self._execution,
            "; ".join(filter(None, self._reasons)),
            memory=self.states[1:],
            weights=save.weights(),
            work=self._work,
        )

    def report_divergence(
        self, first: int | None = None, last: int | None = None, states: tuple[Tensor, ...] = ()
    ) -> None:
        """Goes through the integration again, and refuses the first step that gives a state that is not finite.

        Args:
            first: the step to begin with.
            last: the step to end before.
            states: what is carried before the first step, if that is not where the integration begins.
        """
        states = states or self._lowered.start(self.problem.x0, self.problem.memory)
        with torch.no_grad():
            for k in range(self.problem.first if first is None else first, last or self.problem.steps):
                x, states = states[0], self._steps.after(k, states)
                refuse_nonfinite(self.problem, k, x, states[0], self._steps.span(k))


def recorded(problem: Problem, steps: Callable[[], Steps]) -> AbstractRecord | None:
    """What a run keeps for its gradient, unless torch does it; ``steps`` makes those to be taken again.

    Raises:
        ValueError: the solver cannot be reversed, and is asked to.
    """
    if problem.gradients not in ("checkpoint", "reversible") or not torch.is_grad_enabled() or problem.taken < 2:
        return None
    from sdesolve.integrate.checkpointing import Checkpoints, Reconstruction

    again, which = steps(), range(problem.first, problem.steps)
    held = (problem.equation, problem.save.observable, problem.prior, *problem.roots)
    if problem.gradients == "checkpoint":
        return Checkpoints(again.again, which, held, problem.x0.device)
    return Reconstruction(again.before, again.again, which, held, problem.x0.device)


@final
class RowKernels:
    """One kernel for each row of a step: of a table, or the row of Euler-Maruyama on elementwise noise."""

    def run(self, problem: Problem, lowered: Lowered) -> Saved:
        try:
            return self.begin(problem, lowered).finish()
        except NotImplementedError:
            if forward_ad._current_level < 0:
                raise
            raise CannotExecute(TRANSFORMED) from None  # a function holds a tensor that carries a tangent

    def begin(self, problem: Problem, lowered: Lowered) -> Stepwise:
        """Gets ready for the first step; raises what `Executor.run` does."""
        sde, path = problem.watched, problem.noise
        if lowered.eager:
            raise CannotExecute("")
        if problem.solver.controller is not None:
            raise CannotExecute(f"{type(problem.solver).__name__} chooses its own steps and runs eagerly")
        if sde.noise is not Noise.NONE and not (isinstance(path, BrownianPath) and path.plain):
            raise CannotExecute(
                "the noise is not a plain sequence of normals: coarse or weak increments, or a noise of another class"
            )
        solver = lowered.one_step
        if problem.following is not None:
            raise CannotExecute("no kernel does what is carried along paths; steps run in torch")
        if problem.prior is not None:
            raise CannotExecute("no kernel of one step compares its path with a prior")
        if is_transformed():
            raise CannotExecute(TRANSFORMED)
        if solver is None:
            reason = "each row of a step is one linear_step kernel, with coefficients tabulated in float64"
        elif isinstance(solver, EulerMaruyama) and problem.increment.elementwise:
            reason = "each step is one euler_maruyama_step kernel"
        elif isinstance(solver, EulerMaruyama) and sde.noise in _MATRICES and sde.channels(problem.x0) is None:
            reason = "each step is one matrix_step kernel"
        else:
            raise CannotExecute(f"no kernel does {type(solver).__name__} on {sde.noise} noise; its step runs in torch")
        return Stepwise(problem, lowered, lambda: _PathContext(problem, lowered), "kernel", reason)


_MATRICES = (Noise.ADDITIVE, Noise.GENERAL)


@final
class Eager:
    """The solver's own step in plain torch; for an adaptive solver, with steps that each sample chooses for itself."""

    def run(self, problem: Problem, lowered: Lowered) -> Saved:
        if problem.solver.controller is not None:
            if problem.equation.noise is Noise.NONE:
                return integrate_adaptively(problem, lowered)
            return Nested(problem, lowered).run()
        return self.begin(problem, lowered).finish()

    def begin(self, problem: Problem, lowered: Lowered) -> Stepwise:
        """Gets ready for the first step."""
        return Stepwise(problem, lowered, lambda: TorchContext(problem, lowered), "eager", "")
