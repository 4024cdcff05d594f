"""Gradients of a run: forward with states kept here and there, backward over the steps between them.

What is kept is bounded whatever the number of steps. Where states that many would be too many, every so manieth is,
and the steps from one to the next are taken once more. What kernels sum up for columns and loop invariants is pulled
back to tensors in torch, through the evaluation that made them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Any, final

import numpy as np
import torch
from torch import Tensor

from sdesolve_kernels.threads import single_threaded, survives_forks
from sdesolve_kernels.trajectory.evaluate import evaluate
from sdesolve_kernels.trajectory.expressions import Expression, topological
from sdesolve_kernels.trajectory.launch import (
    AbstractReverse,
    AbstractTrajectory,
    Launch,
    Moments,
    Saved,
    Sweep,
    Tables,
    named,
    on_host,
)
from sdesolve_kernels.trajectory.leaves import LoopInvariant, PathEntry, Shared
from sdesolve_kernels.trajectory.reference import Walk
from sdesolve_kernels.trajectory.reverse import Reverse
from sdesolve_kernels.trajectory.scalars import scalars

__all__ = ["Adjoint", "Cotangents", "Gradients", "Kept"]

_ONE_THREAD = 1 << 14  # numbers that torch does not share out
_AT_ONCE = 1 << 16  # steps that are looked at
_KEPT = 16 << 20  # bytes of states that are kept, unless one alone is larger


@final
@dataclasses.dataclass(frozen=True)
class Kept:
    """What a run leaves for the way back.

    Attributes:
        launch: the run.
        steps: from one stretch to the next.
        states: ``(batch, numbers carried)`` before the first step of some stretches, by number of the stretch.
        moments: of what it saved.
        each_step: whether columns need a cotangent for each step, as steps differ.
        of_mean: gradients of the one mean that the run saved, if it made them.
    """

    launch: Launch
    steps: int
    states: dict[int, Tensor]
    moments: Moments | None
    each_step: bool
    of_mean: Gradients | None = None

    @property
    def stretches(self) -> int:
        return -(-(self.launch.end - self.launch.first_step) // self.steps)

    def stretch(self, i: int) -> tuple[int, int]:
        """First step, and the step to end before."""
        first = self.launch.first_step + i * self.steps
        return first, min(first + self.steps, self.launch.end)


@final
@dataclasses.dataclass(frozen=True)
class Cotangents:
    """Derivatives of a loss in what a run leaves, as `Saved`; ``None`` for 0."""

    x1: Tensor | None
    memory: Tensor | None = None
    states: Tensor | None = None
    mean: Tensor | None = None
    variance: Tensor | None = None


@final
@dataclasses.dataclass(frozen=True)
class Gradients:
    """Derivatives of a loss in what a run starts from.

    Attributes:
        x0: ``(batch, *state)``.
        memory: of what the solver remembered, as `Launch.memory`, or ``None``.
        rows: of the solver's numbers, ``(steps, columns)``, or ``None``.
        captured: of the tensors that the program reads, ``None`` for those whose gradient is not wanted.
    """

    x0: Tensor
    memory: Tensor | None
    rows: Tensor | None
    captured: list[Tensor | None]

    def scaled(self, factor: Tensor) -> Gradients:
        """A number times these."""

        def times(t: Tensor | None) -> Any:
            return None if t is None else (t * factor.to(t.device)).to(t.dtype)

        return Gradients(times(self.x0), times(self.memory), times(self.rows), list(map(times, self.captured)))


@final
class Adjoint:
    """A trajectory and its reverse.

    Args:
        trajectory: runs forward.
        reverse: what a step pulls back.
        wanted: which captured tensors get a gradient.
        rows: whether the solver's numbers do.
        seconds: that compiling the reverse may take.

    Raises:
        Unsupported: there is no reverse of this trajectory.
    """

    def __init__(
        self,
        trajectory: AbstractTrajectory,
        reverse: Reverse,
        wanted: Sequence[int],
        *,
        rows: bool = False,
        seconds: float = math.inf,
    ) -> None:
        self.trajectory, self.reverse = trajectory, reverse
        self._kernel: AbstractReverse = trajectory.reverse(reverse, seconds)
        self.source = self._kernel.source
        self._wanted, self._rows = frozenset(wanted), rows
        plan, other = reverse.plan, trajectory.plan
        alike = plan.columns == other.columns and plan.loop_invariants == other.loop_invariants
        self._tables = trajectory.tables if alike and trajectory.tables is not None else Tables(plan)
        self._scalars = scalars(reverse, self._wanted)
        self._start = Walk([reverse.plan.path_invariants[i] for i in reverse.path_invariants])

    def at_once(self, launch: Launch) -> bool:
        """Whether the run forward makes gradients too, as it does of the mean of one number at one time.

        A path's cotangent is then known before the others are there, so that each block of paths goes forward and back
        over states and noise in a core's cache. All steps have to fit into one stretch for that.
        """
        one = launch.moments and len(launch.saves) * self.reverse.plan.width == 1
        return one and launch.end - launch.first_step <= self._limits(launch, self._each_step(launch))[1]

    def run(self, launch: Launch) -> tuple[Saved, Kept]:
        """A run forward, and what is needed to go back."""
        each_step = self._each_step(launch)
        if self.at_once(launch):
            return self._there_and_back(Kept(launch, launch.end - launch.first_step, {}, None, each_step))
        kept = Kept(launch, self._steps(launch, each_step), {}, None, each_step)
        x0, every = launch.x0, self._kept_every(kept)
        parts: list[Saved] = []
        states: Tensor | None = None
        filled = 0
        for i, part, start in self._forward(kept, 0, kept.stretches, _carried(launch, len(self.reverse.plan.states))):
            if i % every == 0:
                kept.states[i] = start
            if part.states is not None:
                count, batch, width = part.states.shape
                states = x0.new_empty(len(launch.saves), batch, width) if states is None else states
                states[filled : filled + count] = part.states
                filled += count
            parts.append(dataclasses.replace(part, states=None))
        of = [p.moments for p in parts if p.moments is not None]
        moments = Moments(torch.cat([m.mean for m in of]), torch.cat([m.variance for m in of])) if of else None
        saved = Saved(parts[-1].x1, states, moments, parts[-1].memory)
        return saved, dataclasses.replace(kept, moments=moments)

    @survives_forks
    def _there_and_back(self, kept: Kept) -> tuple[Saved, Kept]:
        """A run that makes gradients of the sum over paths on its way."""
        launch, numbers = kept.launch, self.reverse.plan.numbers
        start = kept.states[0] = _carried(launch, len(self.reverse.plan.states))
        ends, one = torch.empty_like(start), torch.ones(1, 1, dtype=torch.float64, device=start.device)
        still = torch.stack([one, 0 * one, 0 * one], 2)
        gradients, moments = self._back(kept, torch.zeros_like(start), None, still, ends)
        x1 = ends[:, :numbers].reshape(launch.x0.shape)
        memory = ends[:, numbers:] if ends.shape[1] > numbers else None
        return Saved(x1, None, moments, memory), dataclasses.replace(kept, moments=moments, of_mean=gradients)

    @survives_forks
    def backward(self, kept: Kept, cotangents: Cotangents) -> Gradients:
        """The way back."""
        launch, numbers = kept.launch, self.reverse.plan.numbers
        batch, mean = len(launch.x0), cotangents.mean
        others = cotangents.x1, cotangents.memory, cotangents.variance
        if kept.of_mean is not None and mean is not None and all(g is None for g in others):
            return kept.of_mean.scaled(mean.reshape(()) / batch)
        after = launch.x0.new_zeros(batch, len(self.reverse.plan.states))
        if cotangents.x1 is not None:
            after[:, :numbers] = cotangents.x1.reshape(batch, numbers)
        if cotangents.memory is not None:
            after[:, numbers:] = cotangents.memory
        saved = None if cotangents.states is None else cotangents.states.to(after).contiguous()
        return self._back(kept, after, saved, _of_moments(kept.moments, cotangents, batch))[0]

    def _back(
        self, kept: Kept, after: Tensor, saved: Tensor | None, moments: Tensor | None, ends: Tensor | None = None
    ) -> tuple[Gradients, Moments | None]:
        """All stretches, from the last to the first: `Sweep` says what they take and give."""
        launch, reverse = kept.launch, self.reverse
        batch, numbers, each_step, columns = len(after), reverse.plan.numbers, kept.each_step, len(reverse.columns)
        sums, path_sums = _zeros(after, reverse.totals), _zeros(after, batch, len(reverse.path_invariants))
        pulled, total, made = _Pulled(self, launch), _zeros(after, 1, columns), None
        for i, start in self._starts_reversed(kept):
            first, last = kept.stretch(i)
            by_step = _zeros(after, last - first, columns) if each_step else total
            part = dataclasses.replace(launch, first_step=first, last_step=last)
            table, uniforms = self._tables(launch, first, last)
            totals = by_step, sums, path_sums, ends
            sweep = Sweep(part, start, saved, moments, table, uniforms, each_step, i == 0, after, *totals)
            made = self._kernel.run(sweep)
            if each_step:
                pulled.columns(by_step.cpu(), first, last)
        sums = sums.cpu()
        loops = sums[: len(reverse.loop_invariants)]
        if reverse.path_invariants:
            loops = loops + pulled.paths(path_sums, self._start).cpu()
        pulled.matrices(sums[len(loops) :])
        pulled.shared(loops, None if each_step else total[0].cpu())
        memory = None if launch.memory is None else after[:, numbers:]
        x0 = after[:, :numbers].reshape(launch.x0.shape)
        return Gradients(x0, memory, pulled.rows, pulled.captured()), made

    def _each_step(self, launch: Launch) -> bool:
        return bool(self.reverse.columns) and not (self.reverse.steady and _are_even(launch))

    def _limits(self, launch: Launch, each_step: bool) -> tuple[int, int]:
        """Steps of a stretch, at least and at most."""
        return self._kernel.steps(len(launch.x0), len(self.reverse.columns) if each_step else 0)

    def _steps(self, launch: Launch, each_step: bool) -> int:
        """Steps of a stretch: few, while states that begin stretches are few enough to be kept."""
        steps = launch.end - launch.first_step
        least, most = self._limits(launch, each_step)
        states = max(1, _KEPT // self._bytes(launch))
        return min(max(least, -(-steps // states)), most)

    def _bytes(self, launch: Launch) -> int:
        return max(1, len(launch.x0) * len(self.reverse.plan.states) * launch.x0.element_size())

    def _kept_every(self, kept: Kept) -> int:
        if kept.stretches * self._bytes(kept.launch) <= _KEPT:
            return 1
        return math.isqrt(kept.stretches - 1) + 1

    def _forward(self, kept: Kept, first: int, last: int, start: Tensor) -> Iterator[tuple[int, Saved, Tensor]]:
        """Stretches one after another: their numbers, what they leave, and the states that they begin with."""
        numbers, shape = self.reverse.plan.numbers, kept.launch.x0.shape
        for i in range(first, last):
            a, b = kept.stretch(i)
            saves = [k for k in kept.launch.saves if (a <= k if i == 0 else a < k) and k <= b]
            memory = start[:, numbers:] if start.shape[1] > numbers else None
            launch = dataclasses.replace(
                kept.launch, x0=start[:, :numbers].reshape(shape), memory=memory, first_step=a, last_step=b, saves=saves
            )
            part = self.trajectory.run(launch)
            yield i, part, start
            flat = part.x1.reshape(len(start), numbers)
            start = flat if part.memory is None else torch.cat([flat, part.memory], 1)

    def _starts_reversed(self, kept: Kept) -> Iterator[tuple[int, Tensor]]:
        """Stretches from the last to the first, with the states that they begin with."""
        end = kept.stretches
        bare = dataclasses.replace(kept, launch=dataclasses.replace(kept.launch, saves=(), progress=None))
        for first in sorted(kept.states, reverse=True):
            starts = {first: kept.states[first]}
            if end - first > 1:
                starts = {i: start for i, _, start in self._forward(bare, first, end, kept.states[first])}
            for i in range(end - 1, first - 1, -1):
                yield i, starts.pop(i)
            end = first


@final
class _Pulled:
    """Cotangents of what a launch evaluates, pulled back to tensors."""

    def __init__(self, adjoint: Adjoint, launch: Launch) -> None:
        self._reverse, self._launch, self._wanted = adjoint.reverse, launch, adjoint._wanted
        self._found: dict[int, Tensor] = {}
        self._tables, self._scalars = adjoint._tables, adjoint._scalars
        self.rows = None if not adjoint._rows or launch.rows is None else torch.zeros_like(launch.rows)

    def columns(self, cotangents: Tensor, first: int, last: int) -> None:
        """Of the columns of some steps, ``(steps, columns)``."""
        plan, times, rows = self._reverse.plan, self._launch.times[first : last + 1], self._launch.rows
        roots = [plan.columns[j] for j in self._reverse.columns]
        rows = None if rows is None else rows[first:last]
        found = self._evaluated(roots, times, rows, list(cotangents.unbind(1)))
        if found is not None and self.rows is not None:
            self.rows[first:last] += found

    def shared(self, loops: Tensor, columns: Tensor | None) -> None:
        """Of loop invariants, and of columns whose steps are all alike."""
        plan, launch = self._reverse.plan, self._launch
        if columns is not None and self._scalars is not None:
            begin, end = launch.times[[launch.first_step, launch.end]].tolist()
            length = (end - begin) / (launch.end - launch.first_step)
            given = [*columns.tolist(), *loops.tolist()]
            for parameter, gradient in self._scalars(launch.captured, length, given).items():
                self._add(parameter, gradient)
            return
        times = launch.times[launch.first_step : launch.end + 1]
        roots = [plan.loop_invariants[j] for j in self._reverse.loop_invariants]
        cotangents = list(loops.unbind(0))
        if columns is not None:
            roots += [plan.columns[j] for j in self._reverse.columns]
            cotangents += [c.reshape(1) for c in columns.unbind(0)]
        dt = (times[-1] - times[0]) / (len(times) - 1)
        self._evaluated(roots, torch.stack([torch.zeros_like(dt), dt]), None, cotangents)

    def paths(self, cotangents: Tensor, start: Walk) -> Tensor:
        """Of path invariants, ``(batch, path invariants)``; gives the part of loop invariants."""
        launch, reverse = self._launch, self._reverse
        captured = [c.detach().requires_grad_(i in self._wanted) for i, c in enumerate(launch.captured)]
        uniforms = self._tables(launch, launch.first_step, launch.first_step + 1)[1].detach()
        uniforms = uniforms.to(launch.x0.device, copy=True)
        with torch.enable_grad(), _in_one_order(len(launch.x0) > _ONE_THREAD):
            uniforms.requires_grad_(bool(reverse.loop_invariants))
            leaves = {LoopInvariant: uniforms, PathEntry: captured, Shared: captured}
            values = start(leaves, launch.x0.detach())
            inputs = [uniforms, *captured] if uniforms.requires_grad else captured
            found = _grad(values, inputs, [c.to(v) for c, v in zip(cotangents.unbind(1), values, strict=True)])
        for i, f in enumerate(found[-len(captured) :]):
            if f is not None:
                self._add(i, f.double())
        if not uniforms.requires_grad or found[0] is None:
            return _zeros(uniforms, len(reverse.loop_invariants))
        return found[0].double()[list(reverse.loop_invariants)]

    def matrices(self, sums: Tensor) -> None:
        """Of matrices kept whole, one after another."""
        at = 0
        for m in self._reverse.matrices:
            count = m.rows * m.columns
            flat = _zeros(sums, self._launch.captured[m.parameter].numel())
            flat[m.entries("cpu").reshape(-1)] = sums[at : at + count]
            self._add(m.parameter, flat)
            at += count

    def captured(self) -> list[Tensor | None]:
        """Gradients of the tensors that are wanted."""
        return [
            self._found[i].reshape(c.shape).to(c)
            if i in self._found
            else torch.zeros_like(c)
            if i in self._wanted
            else None
            for i, c in enumerate(self._launch.captured)
        ]

    def _add(self, parameter: int, gradient: Tensor) -> None:
        flat = gradient.reshape(-1)
        known = self._found.get(parameter)
        self._found[parameter] = flat if known is None else known + flat.to(known.device)

    def _evaluated(
        self,
        roots: Sequence[Expression],
        times: Tensor,
        rows: Tensor | None,
        cotangents: Sequence[Tensor],
    ) -> Tensor | None:
        """Pulls cotangents of values back to tensors, which are added to; gives the part of the solver's rows."""
        by_path = self._reverse.plan.program.by_path
        products = any(e.op == "product" for e in topological(roots))
        with torch.enable_grad(), _in_one_order(products or len(times) > _ONE_THREAD):
            shared = [
                None if each else on_host(c).requires_grad_(i in self._wanted)
                for i, (c, each) in enumerate(zip(self._launch.captured, by_path, strict=True))
            ]
            rows = None if rows is None else rows.detach().requires_grad_(self.rows is not None)
            values = evaluate(roots, named(times), rows, shared)
            inputs = [t for t in (rows, *shared) if t is not None and t.requires_grad]
            found = dict(zip(map(id, inputs), _grad(values, inputs, cotangents), strict=True))
        for i, s in enumerate(shared):
            f = None if s is None else found.get(id(s))
            if f is not None:
                self._add(i, f)
        return None if rows is None else found.get(id(rows))


def _are_even(launch: Launch) -> bool:
    """Whether all steps have one length, but for rounding."""
    times = launch.times[launch.first_step : launch.end + 1].numpy()
    dt = (times[-1] - times[0]) / (len(times) - 1)
    within = abs(dt) * (1e-9 if launch.x0.dtype == torch.float32 else 1e-12)
    starts = range(0, len(times) - 1, _AT_ONCE)
    return all(np.abs(np.diff(times[k : k + _AT_ONCE + 1]) - dt).max() <= within for k in starts)


def _in_one_order(threaded: bool) -> contextlib.AbstractContextManager[None]:
    """Sums that torch may split over threads, in one order; elsewhere its threads, which wake late, are left alone."""
    return single_threaded() if threaded else contextlib.nullcontext()


def _grad(values: Sequence[Tensor], inputs: Sequence[Tensor], cotangents: Sequence[Tensor]) -> list[Tensor | None]:
    pairs = [(v, c.expand_as(v)) for v, c in zip(values, cotangents, strict=True) if v.requires_grad]
    if not pairs or not inputs:
        return [None] * len(inputs)
    wanted = [t for t in inputs if t.requires_grad]
    found = torch.autograd.grad([v for v, _ in pairs], wanted, [c for _, c in pairs], allow_unused=True)
    by_id = dict(zip(map(id, wanted), found, strict=True))
    return [by_id.get(id(t)) for t in inputs]


def _zeros(like: Tensor, *shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.float64, device=like.device)


def _carried(launch: Launch, numbers: int) -> Tensor:
    """All that is carried before the first step, ``(batch, numbers)``."""
    x0 = launch.x0.detach().resolve_neg().contiguous().reshape(len(launch.x0), -1)
    if x0.shape[1] == numbers:
        return x0
    memory = x0.new_zeros(len(x0), numbers - x0.shape[1]) if launch.memory is None else launch.memory.to(x0)
    return torch.cat([x0, memory], 1)


def _of_moments(moments: Moments | None, given: Cotangents, batch: int) -> Tensor | None:
    """For each number saved: the cotangent of a path's at the mean, by how much it grows with the number, the mean."""
    if moments is None or (given.mean is None and given.variance is None):
        return None
    zero = torch.zeros_like(moments.mean)
    level = zero if given.mean is None else given.mean / batch
    slope = zero if given.variance is None else given.variance * (2.0 / (batch - 1 if batch > 1 else math.nan))
    return torch.stack([level, slope, moments.mean], 2).double().contiguous()
