"""What follows each path beside its state: functionals that are carried along, and boundaries that end or bend it.

All of it is a wrapper round the solver's step that carries more tensors, so that every executor, and every gradient,
does it as it does the step.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast, final

import torch
from sdesolve_kernels.transforms import is_transformed, plain
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from sdesolve._internal.arguments import positional, short
from sdesolve._internal.derivatives import gradient
from sdesolve.brownian import BrownianPath, BrownianRows
from sdesolve.carry import AbstractCarry, Passage, Tree, exponential, pushed, summit
from sdesolve.crossing import AbstractBoundary, Crossing, Reflection
from sdesolve.integrate.lowering import Lowered, NoiseSource, StepContext
from sdesolve.integrate.probing import agree, unnoticed
from sdesolve.integrate.problem import Problem
from sdesolve.integrate.solution import DivergenceError
from sdesolve.sde import AbstractSDE, per_sample
from sdesolve.solvers.base import Span

States = tuple[Tensor, ...]
# Whether paths meet a boundary in a step, at which share of it, and where.
Meets = Callable[[Crossing, Passage, Tensor | None], tuple[Tensor, Tensor, Tensor]]


class Stops(NamedTuple):
    """Where paths have stopped, ``(batch,)`` each.

    Attributes:
        which: 0 while a path runs; then 1 + the number of the boundary; nan where a level became nan.
        life: steps from the first of the integration to the one in which it stopped, that one included.
        share: of that step, which lies before the stop.
    """

    which: Tensor
    life: Tensor
    share: Tensor


class Parts(NamedTuple):
    """What a step carries, taken apart: the state, the solver's memory (and weights), what is carried, clock, stops."""

    x: Tensor
    memory: States
    carried: States
    clock: States
    stops: Stops | None


@final
class Following:
    """What follows the paths of an integration.

    Args:
        carry: functionals.
        boundaries: that stop paths or reflect them.
        observable: of a state, and of time and what is carried if it takes them.
    """

    def __init__(
        self,
        carry: AbstractCarry | None,
        boundaries: tuple[AbstractBoundary, ...],
        observable: Callable[..., Tensor] | None,
    ) -> None:
        self.carry, self.boundaries = carry, boundaries
        self.takes = 1 if observable is None else positional(observable)
        self._observable = observable
        self.stops = any(isinstance(b, Crossing) for b in boundaries)
        self._wide: dict[int, bool] = {}  # by function, the shape of times that it is right for
        self._spec: Any = None
        self._leaves = 0
        self._padded = False  # whether rows have steps of no length, in which nothing happens

    @property
    def roots(self) -> tuple[object, ...]:
        """What a kernel depends on."""
        return self.carry, *self.boundaries

    @property
    def key(self) -> tuple[object, ...]:
        """What of it goes into a kernel besides `roots`."""
        return self.takes, str(self._spec), tuple(self._wide.values())

    @property
    def normals(self) -> int:
        """A step takes, for each path: those of the functionals, then two for each boundary with a bridge."""
        own = 0 if self.carry is None else self.carry.normals
        return own + 2 * sum(b.bridge for b in self.boundaries)

    def start(self, problem: Problem, memory: int) -> States:
        """What is carried before the first step, beside the solver's memory.

        Args:
            problem: the integration; what it has in its memory beyond the solver's goes on.
            memory: how many tensors the solver has.

        Raises:
            ValueError: a functional or a level of the wrong shape, one that couples paths, or a path that starts on the
                wrong side of a boundary.
        """
        x0, t0 = problem.x0, problem.clock(problem.times[problem.first])
        self._padded = problem.padded
        held, earlier = list(problem.memory[memory:]), problem.earlier
        self._check_observable()
        made: list[Tensor] = []
        if self.carry is not None:
            if len(x0) and not is_transformed() and self._has_rows_of_times(problem):
                self._choose_functions(problem)
            first, self._spec = tree_flatten(self.carry.begin(x0, lambda f: self._at(f, (x0,), (t0,))))
            self._leaves = len(first)
            made += first
        if self.takes > 1:
            clock = problem.times[problem.first].to(device=x0.device, dtype=problem.time_dtype)
            made.append(clock.expand(len(x0)).contiguous())
        stops: list[Tensor] = []
        if self.stops:
            nothing = x0.new_zeros(len(x0))
            stops = [nothing, torch.full_like(nothing, problem.first), nothing + 1.0]
        if earlier is not None:
            if any(isinstance(b, Crossing) for b in earlier.until):
                held, stops = held[:-3], held[-3:]
            made[: len(held)] = held
        if len(x0) and not is_transformed():
            self._probe(problem, made, stops, memory)
        return (*made, *stops)

    def parts(self, states: States) -> Parts:
        """States of a step, taken apart."""
        count = self._leaves + (self.takes > 1) + 3 * self.stops
        at = len(states) - count
        middle = at + self._leaves
        stops = Stops(*states[-3:]) if self.stops else None
        clock = states[middle : middle + (self.takes > 1)]
        return Parts(states[0], states[1:at], states[at:middle], clock, stops)

    def result(self, carried: States) -> Tree:
        """What the user sees of what is carried."""
        return None if self.carry is None else self.carry.result(tree_unflatten(list(carried), self._spec))

    def arguments(self, states: States) -> tuple[Any, ...]:
        """What an observable is called with."""
        parts = self.parts(states)
        if self.takes == 1:
            return (parts.x,)
        t = self._shaped(self._observable, parts.clock[0], parts.x)
        return (parts.x, t) if self.takes == 2 else (parts.x, t, self.result(parts.carried))

    def follow(self, problem: Problem, lowered: Lowered) -> Lowered:
        """The step with all that follows it."""
        extra, source = self.start(problem, lowered.memory), None
        problem.save.arguments = self.arguments
        if self.normals:
            noise, draws = problem.noise, self.normals
            if not isinstance(noise, BrownianPath | BrownianRows):
                raise TypeError(
                    f"what happens within a step is drawn from a BrownianPath, and {type(noise).__name__} has none "
                    "of its numbers; give seed=, or bridge=False"
                )
            source = NoiseSource(noise.within_steps(draws), draws, lambda: (draws,))
        step = functools.partial(self._step, problem.watched, lowered.step)
        return dataclasses.replace(lowered, step=step, extra=(*lowered.extra, *extra), within=source)

    def _step(
        self, sde: AbstractSDE, step: Callable[[StepContext, States], States], context: StepContext, states: States
    ) -> States:
        parts = self.parts(states)
        after = step(context, (parts.x, *parts.memory))
        return self.passed(sde, states, after, context.span, context.within() if self.normals else None)

    def passed(
        self,
        sde: AbstractSDE,
        states: States,
        after: States,
        span: Span,
        z: Tensor | None,
        meets: Meets | None = None,
        curve: Callable[[Tensor], Tensor] | None = None,
    ) -> States:
        """What is carried after a step.

        Args:
            sde: the equation.
            states: what is carried before the step.
            after: the state after it, and the solver's memory, as the solver makes them.
            span: the step in time.
            z: standard normals, ``(batch, normals)``.
            meets: where paths meet a boundary, if not where a Brownian bridge between the ends does.
            curve: the states at fractions of the step, ``(batch,)``, float64, where the solver knows them.
        """
        x, memory, carried, clock, stops = self.parts(states)
        x_next, *after_memory = after
        dt = span.dt.reshape(-1) if span.dt.ndim else span.dt
        used = 0 if self.carry is None else self.carry.normals
        passage = Passage(sde, x, x_next, span.t0, span.t1, dt, z, self._at, curve)
        hit: Tensor | None = None
        if self.boundaries:
            passage, ended = self._bounded(passage, used, meets or self._met)
            if stops is not None:
                assert ended is not None
                if curve is not None:
                    share = ended.share.double()
                    passage = dataclasses.replace(passage, curve=lambda theta: curve(share * theta))
                running = stops.which == 0
                hit = running & (ended.which != 0)
                life = stops.life + (running & (dt != 0) if self._padded else running).to(x.dtype)
                met = Stops(*(torch.where(hit, a, b) for a, b in zip((ended.which, life, ended.share),
                            (stops.which, stops.life, stops.share), strict=True)))  # fmt: skip
                stops = met._replace(life=life)
        new: list[Tensor] = []
        if self.carry is not None:
            own = dataclasses.replace(passage, z=None if not used or z is None else z[:, :used])
            before = tree_unflatten(list(carried), self._spec)
            new = self._checked(self.carry.advance(before, own), carried)
        made = [passage.x_next, *after_memory, *new, *(passage.t_next.expand(len(x)) for _ in clock)]
        old = [x, *memory, *carried, *clock]
        if hit is not None:
            made = [torch.where(_rows(running, b), a, b) for a, b in zip(made, old, strict=True)]
        return (*made, *(stops or ()))

    def taken_across(self, before: Tensor, states: States, t: Tensor) -> States:
        """States in which paths have stopped that a change of the state has taken across a boundary."""
        x, which = states[0], states[-3]
        for i, b in enumerate(self.boundaries):
            if isinstance(b, Crossing):
                old, new = (self._at(b.level, (y,), (t,)) for y in (before, x))
                side = side_of(b, old)
                met = torch.where(new.isnan(), math.nan, i + 1.0)
                which = torch.where((which == 0) & ((side * new <= 0) | new.isnan()), met, which)
        return (*states[:-3], which, *states[-2:])

    def level(self, b: AbstractBoundary, x: Tensor, t: Tensor) -> Tensor:
        """The level of a boundary at states and their times."""
        return cast(Tensor, self._at(b.level, (x,), (t,)))

    def _bounded(self, passage: Passage, used: int, meets: Meets) -> tuple[Passage, Stops | None]:
        """The step as boundaries leave it: reflected, and ended where it meets one; and where that is."""
        x = passage.x
        z = passage.z
        numbers: dict[int, Tensor] = {}
        for i, b in enumerate(self.boundaries):
            if b.bridge and z is not None:
                numbers[i], used = z[:, used : used + 2], used + 2
        for i, b in enumerate(self.boundaries):
            if isinstance(b, Reflection):
                passage = dataclasses.replace(passage, x_next=self._reflected(b, passage, numbers.get(i)))
        if not self.stops:
            return passage, None
        free, zero = passage.x_next, x.new_zeros(len(x))
        which, share, end = zero, zero + 1.0, free
        for i, b in enumerate(self.boundaries):
            if isinstance(b, Crossing):
                hit, theta, there = meets(b, passage, numbers.get(i))
                first = hit & ((which == 0) | (theta < share))
                which, share = torch.where(first, i + 1.0, which), torch.where(first, theta, share)
                end = torch.where(_rows(first, end), there, end)
        for b in self.boundaries:
            if isinstance(b, Crossing):
                which = torch.where(self._at(b.level, (free,), (passage.t_next,)).isnan(), math.nan, which)
        dt = passage.dt * share
        t_next = passage.t + share.to(passage.t.dtype) * (passage.t_next - passage.t)
        t_next = torch.where(share < 1, t_next, passage.t_next)
        return dataclasses.replace(passage, x_next=end, dt=dt, t_next=t_next), Stops(which, zero, share)

    def _reflected(self, b: Reflection, passage: Passage, z: Tensor | None) -> Tensor:
        level = functools.partial(self._at, b.level)
        x, x_next = passage.x, passage.x_next
        below, after = -level((x,), (passage.t,)), -level((x_next,), (passage.t_next,))
        most = after if z is None else summit(below, after, passage.variance(b.level), exponential(z))
        most = torch.maximum(most, after).clamp_min(0.0)
        slope = gradient(lambda y: level((y,), (passage.t_next,)), x_next)
        square = slope.square().reshape(len(x), -1).sum(1)
        push = most / torch.where(square > 0, square, 1.0)
        return x_next + per_sample(push, x) * slope

    def _met(self, b: Crossing, passage: Passage, z: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Whether paths meet a boundary in a step, at which share of it, and where."""
        x, x_next = passage.x, passage.x_next
        level = functools.partial(self._at, b.level)
        before, after = level((x,), (passage.t,)), level((x_next,), (passage.t_next,))
        side = side_of(b, before)
        a, c = side * before, side * after
        if z is None:
            return c <= 0, torch.ones_like(a), x_next
        slope = gradient(lambda y: level((y,), (passage.t,)), x)
        square, along = pushed(passage.sde, slope, x, passage.t)
        hit, theta = first_passage(a.detach(), c.detach(), (square * passage.dt.abs()).detach(), z)
        chord = x + per_sample(theta, x) * (x_next - x)
        off = (1.0 - theta) * before + theta * after
        push = torch.where(square > 0, off / torch.where(square > 0, square, 1.0), 0.0)
        return hit, theta, chord - per_sample(push, x) * along

    def _at(
        self,
        function: Callable[..., Tree],
        rows: tuple[Tree, ...],
        times: tuple[Tensor, ...],
        more: tuple[Any, ...] = (),
    ) -> Tree:
        """A function of tensors with a row per path, at times."""
        x = rows[-1]
        if any(t.ndim for t in times):  # all of them, as functions may put them together
            times = tuple(self._shaped(function, t.expand(len(x)), x) for t in times)
        return function(*rows, *times, *more)

    def _shaped(self, function: object, t: Tensor, x: Tensor) -> Tensor:
        return t.reshape(-1, *(1,) * (x.ndim - 1)) if self._wide.get(id(function)) else t

    def _checked(self, c: Tree, before: Sequence[Tensor]) -> list[Tensor]:
        """The leaves of what an update returned."""
        leaves, spec = tree_flatten(c)
        if spec != self._spec or not all(isinstance(leaf, Tensor) for leaf in leaves):
            raise TypeError(
                f"the update of a carry must return what it is given, {_described(before, self._spec)}; got {short(c)}"
            )
        for old, new in zip(before, leaves, strict=True):
            if new.shape != old.shape or new.dtype != old.dtype:
                raise ValueError(
                    f"the update of a carry must keep shapes and dtypes: it is given {old.dtype} of shape "
                    f"{tuple(old.shape)} and returns {new.dtype} of shape {tuple(new.shape)}. Its start says what is "
                    "carried; where times meet a state of more axes, write (t_next - t).reshape(-1, 1)"
                )
        return leaves

    def _check_observable(self) -> None:
        if self.takes > 3:
            raise TypeError(f"observable takes (x), (x, t) or (x, t, carry), and this one has {self.takes} arguments")
        if self.takes == 3 and self.carry is None:
            raise TypeError("observable takes (x, t, carry), and nothing is carried: give carry=, or take (x, t)")

    def _probe(self, problem: Problem, made: list[Tensor], stops: list[Tensor], memory: int) -> None:
        """Looks at what the functions do before the first step, and refuses those that are not right."""
        x, ends = problem.x0.detach(), _ends(problem)
        with torch.no_grad(), unnoticed(*self.roots, self._observable):
            for i, b in enumerate(self.boundaries):
                self._check_level(problem, i, b, stops[0] if stops else None)
                if self._has_rows_of_times(problem):
                    self._choose(b.level, "level", x, *ends)
            if self.carry is not None:
                self._check_carry(problem, made)
            if self.takes > 1 and self._observable is not None:
                more = (self.result(tuple(m.detach() for m in made[: self._leaves])),) if self.takes == 3 else ()
                self._choose(self._observable, "observable", x, *ends, more)

    def _has_rows_of_times(self, problem: Problem) -> bool:
        return self.stops or problem.times.ndim == 2 or problem.solver.controller is not None

    def _choose_functions(self, problem: Problem) -> None:
        """As `_choose`, for all functions of ``(x, t)`` that the functionals call."""
        assert self.carry is not None
        with torch.no_grad(), unnoticed(*self.roots):
            for function in self.carry.functions:
                if positional(function) <= 2:
                    self._choose(function, "function of a carry", problem.x0.detach(), *_ends(problem))

    def _choose(
        self,
        function: Callable[..., Any],
        what: str,
        x: Tensor,
        low: Tensor,
        high: Tensor,
        more: tuple[Any, ...] = (),
    ) -> None:
        """Finds out which shape of times per row a function is right for: ``(batch,)`` or ``(batch, 1, ..., 1)``."""
        mask = torch.arange(len(x), device=x.device) % 2 == 0
        failure: Exception | None = None
        t, ends = torch.where(mask, low, high), (low, high)
        observes = function is self._observable  # which is given times per row alone
        alone = [] if observes else [function(x, end, *more) for end in ends]
        for wide in (False, True) if len(x) > 1 or x.ndim == 1 else (True, False):
            self._wide[id(function)] = wide
            try:
                rows = [self._shaped(function, end.expand(len(x)), x) for end in ends] if observes else []
                wanted = _mixed(mask, *(alone or (function(x, end, *more) for end in rows)))
                if _alike(function(x, self._shaped(function, t, x), *more), wanted):
                    return
            except Exception as met:  # in any way, on times of a shape that it does not know
                failure = failure or met
        shape = ", ".join(["-1", *"1" * (x.ndim - 1)])
        raise ValueError(
            f"the {what} is not right for a time per path, t of shape ({len(x)},). Where t meets a tensor of more axes "
            f"write t.reshape({shape}), right for one time too"
        ) from failure

    def _check_level(self, problem: Problem, i: int, b: AbstractBoundary, which: Tensor | None) -> None:
        """Refuses a level of the wrong shape, one that is nan, and paths on the wrong side of it."""
        x, t = problem.x0.detach(), problem.clock(problem.times[problem.first])
        y = b.level(x, t)
        name = f"level of boundary {i}" if len(self.boundaries) > 1 else "level"
        if not isinstance(y, Tensor) or y.shape != (len(x),) or not y.is_floating_point():
            got = f"{y.dtype} of shape {tuple(y.shape)}" if isinstance(y, Tensor) else type(y).__name__
            raise ValueError(
                f"the {name} must return a number for each path, ({len(x)},), for a state of shape {tuple(x.shape)}; "
                f"got {got}. x[:, 0] is a component, x.norm(dim=1) - r a sphere"
            )
        running = torch.ones_like(y, dtype=torch.bool) if which is None else which == 0
        direction = b.direction if isinstance(b, Crossing) else -1
        y = plain(y)
        wrong = y.isnan() | (y == 0 if direction == 0 else y < 0 if isinstance(b, Reflection) else -direction * y <= 0)
        wrong = wrong & running
        if not bool(wrong.any()):
            return
        row = int(wrong.nonzero()[0])
        value = float(y[row])
        side = {0: "away from 0", 1: "below 0", -1: "above 0" if isinstance(b, Crossing) else "at 0 or above"}[
            direction
        ]
        hint = "is nan" if math.isnan(value) else f"is {value:.6g}"
        mend = "" if math.isnan(value) else (
            "; leave out those that have stopped before they start, or turn the direction round"
            if isinstance(b, Crossing) else "; a path is kept where the level is not negative"
        )  # fmt: skip
        raise ValueError(
            f"the {name} {hint} for path {row + problem.first_path} at the start, t = {float(t.flatten()[0]):.6g}, and "
            f"paths start {side} ({int(wrong.sum())} of {len(wrong)} do not){mend}"
        )

    def _check_carry(self, problem: Problem, made: list[Tensor]) -> None:
        """Refuses an update that changes shapes or dtypes, or makes a row of other rows."""
        carry, x = cast(AbstractCarry, self.carry), problem.x0.detach()
        before = [m.detach() for m in made[: self._leaves]]
        t, t_next = (problem.clock(problem.times[k].flatten()[0]) for k in (problem.first, problem.first + 1))
        dt = (t_next - t).to(x)
        z = x.new_zeros(len(x), carry.normals) if carry.normals else None

        def after(x: Tensor, t: Tensor, t_next: Tensor) -> list[Tensor]:
            passage = Passage(problem.watched, x, x, t, t_next, dt, z, self._at)
            return self._checked(carry.advance(tree_unflatten(before, self._spec), passage), before)

        checking, evaluations = problem.watched.checking, problem.watched.evaluations
        problem.watched.checking = False
        try:
            plain_after = after(x, t, t_next)
            if self._has_rows_of_times(problem):
                mask = torch.arange(len(x), device=x.device) % 2 == 0
                wanted = _mixed(mask, plain_after, after(x, t_next, t_next))
                mixed = torch.where(mask, t, t_next), t_next.expand(len(x))
                self._choose_update(carry, wanted, functools.partial(after, x, *mixed))
            if len(x) > 1:
                moved = x.clone()
                moved[0] += 0.1 + 0.1 * moved[0].abs()
                for a, b in zip(plain_after, after(moved, t, t_next), strict=True):
                    if not torch.equal(a[1:].nan_to_num(), b[1:].nan_to_num()):
                        raise ValueError(
                            "the update of a carry couples the paths: when the state of row 0 changes, what it returns "
                            "for other rows does. Each row is a function of its own path; take means over sol.carry"
                        )
        finally:
            problem.watched.checking, problem.watched.evaluations = checking, evaluations

    def _choose_update(self, carry: AbstractCarry, wanted: list[Tensor], made: Callable[[], list[Tensor]]) -> None:
        """Likewise, for the update of a functional, whose times come in pairs."""
        functions = [f for f in carry.functions if positional(f) > 2]
        failure: Exception | None = None
        for wide in (False, True):
            self._wide |= {id(f): wide for f in functions}
            try:
                if _alike(made(), wanted):
                    return
            except Exception as met:
                failure = failure or met
        raise failure or ValueError("the update of a carry is not right for a time per path, t of shape (batch,)")

    def refuse_nan(self, problem: Problem, stops: Stops, reached: Tensor | None = None) -> None:
        """Refuses a level that became nan along a path.

        Args:
            problem: the integration.
            stops: where paths have stopped.
            reached: when, in steps that each path chooses; else the grid says it.

        Raises:
            DivergenceError: it did; says in which step, at which time, and for which path.
        """
        bad = plain(stops.which).isnan()
        if not bool(bad.any()):
            return
        row = int(bad.nonzero()[0])
        step = int(stops.life[row]) - 1
        where = f"in step {step} of {problem.steps}, which starts"
        if reached is None:
            time = float(problem.times[step].flatten()[row if problem.times.ndim == 2 else 0])
        else:
            where, time = f"in step {step} of its own, which ends", float(reached[row])
        stopped = int(((stops.which > 0) & ~bad).sum())
        raise DivergenceError(
            f"the level of a boundary became nan for path {row + problem.first_path} {where} at t = {time:.6g}; "
            f"{int(bad.sum())} of {len(bad)} paths are "
            f"affected, {stopped} had stopped before. check_finite=False "
            "keeps them all: such paths are held where they are, and count as running",
            step=step,
            time=time,
            path=row + problem.first_path,
        )

    def stopped(
        self, problem: Problem, stops: Stops, reached: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Which paths have stopped, when, at which boundary (-1 for none), and how many steps each has taken."""
        stopped = stops.which > 0
        times = problem.times.to(stops.which.device)
        life = stops.life.detach().long()
        boundary = torch.where(stopped, stops.which.nan_to_num().long() - 1, -1)
        never = math.inf * (times[-1] - times[0]).sign()
        if reached is not None:
            return stopped, torch.where(stopped, reached, never), boundary, life
        k = (life - 1).clamp(0, problem.steps - 1)
        if times.ndim == 2:
            rows = torch.arange(len(k), device=k.device)
            t0, t1 = times[k, rows], times[k + 1, rows]
        else:
            t0, t1 = times[k], times[k + 1]
        time = t0 + stops.share.detach().double() * (t1 - t0)
        return stopped, torch.where(stopped, time, never), boundary, (life - problem.first).clamp_min(0)


def side_of(b: Crossing, before: Tensor) -> Tensor | float:
    """What makes the level positive where paths run, from what it is before a step."""
    return torch.where(before < 0, -1.0, 1.0) if b.direction == 0 else -float(b.direction)


def first_passage(a: Tensor, b: Tensor, v: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
    """Whether a Brownian bridge from ``a > 0`` to ``b``, of variance ``v`` over a step, meets 0, and at which share.

    With ``E = |z|^2 / 2``, a unit exponential, it does if ``v E > 2 a b``. What is left of ``E`` then is exponential
    again, and independent of the angle of ``z``: the two make two new normals. The share ``u`` has ``u / (1 - u)``
    inverse Gaussian of mean ``a / |b|`` and shape ``a^2 / v``, drawn from these as Michael, Schucany and Haas do; where
    ``v = 0`` it is that of the chord.
    """
    tiny = torch.finfo(a.dtype).tiny
    squares = z.square()
    length = squares.sum(1)
    limit = (2.0 * a * b).clamp_min(0.0)
    hit = (b <= 0) | (0.5 * length * v > limit)
    left = (length - 2.0 * limit / v.clamp_min(tiny)).clamp_min(0.0)
    share = squares[:, 0] / length.clamp_min(tiny)
    P, T = (a * b.abs()).clamp_min(0.0), 0.5 * v * left * share  # a path that has stopped may be beyond
    R = P + T + (T * (T + 2.0 * P)).sqrt()
    other = (left * (1.0 - share)).clamp_min(0.0).sqrt() * torch.where(z[:, 1] < 0, -1.0, 1.0)
    uniform = 0.5 * (1.0 + (other * 0.5**0.5).erf())
    small = uniform * (R + P) <= R
    near, far = a.square(), b.square()
    theta = torch.where(small, near / (near + R).clamp_min(tiny), R / (R + far).clamp_min(tiny))
    return hit, torch.where(hit, theta.clamp(0.0, 1.0), 1.0)


def _ends(problem: Problem) -> tuple[Tensor, Tensor]:
    """A time where the integration begins and one where it ends."""
    return problem.clock(problem.times[problem.first].flatten()[0]), problem.clock(problem.times[-1].flatten()[-1])


def _rows(mask: Tensor, x: Tensor) -> Tensor:
    return mask.reshape(-1, *(1,) * (x.ndim - 1))


def _mixed(mask: Tensor, a: Tree, b: Tree) -> Tree:
    return tree_map(lambda u, v: torch.where(_rows(mask, u), u, v) if u.ndim else u, a, b)


def _alike(got: Tree, wanted: Tree) -> bool:
    (a, one), (b, other) = tree_flatten(got), tree_flatten(wanted)
    return one == other and all(
        u.shape == v.shape and (torch.equal(u, v) or (u.is_floating_point() and agree(u, v)))
        for u, v in zip(a, b, strict=True)
    )


def _described(leaves: Sequence[Tensor], spec: Any) -> str:
    one = tree_unflatten([f"{tuple(leaf.shape)}" for leaf in leaves], spec)
    return short(one)
