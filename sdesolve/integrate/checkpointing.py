"""Gradients of runs that go step by step, without the tensors that torch saves for them in every step.

Torch's graph is made as ever; of what a step saves in it, places are kept alone. When a gradient gets to the step, the
step is taken again from a state that was kept, with noise made again from its coordinates, and the same node gets the
same tensors. So gradients have the bits of plain ones, whatever they are of, and nothing has to be known of what the
functions hold. Which states are kept, and which are made again from others, is binomial: Griewank and Walther 2000,
"Algorithm 799: revolve".
"""

from __future__ import annotations

import abc
import contextlib
import dataclasses
import math
import operator
import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, final

import numpy as np
import torch
from sdesolve_kernels.trajectory.snapshots import GENERATORS, same
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from sdesolve._internal.modes import within
from sdesolve.integrate.probing import agree

__all__ = ["AbstractRecord", "Checkpoints", "Reconstruction", "distance", "positions"]

States = tuple[Tensor, ...]
Take = Callable[[int, States], States]

_MOST_KEPT = 1 << 28  # bytes of kept states, unless two steps save more, and of the last steps
_SHARE = 16  # of what all steps would save, the part that kept states may take below that
_WHOLE = 16  # likewise, the part that the last steps may save, which are not taken again
_LOOK = 8  # kept states between two looks at generators that nothing draws from at first
_ANCHORS = 8  # states that a reconstruction is compared with
_REMEDY = "run it with gradients='auto', which evaluates nothing again"


def distance(steps: int, slots: int) -> int:
    """How far after the first of some steps the next state to keep lies, in the schedule with the fewest evaluations.

    Args:
        steps: at least two, which are to be differentiated from the last to the first.
        slots: states that may be kept besides the first; at least one.
    """
    kept, repeats = slots + 1, 1
    while math.comb(kept + repeats, kept) < steps:
        repeats += 1
    least = math.comb(kept + repeats - 2, kept) if repeats > 1 else 1
    return max(1, least, steps - math.comb(kept - 1 + repeats, kept - 1))


# What tells a saved tensor from one that the same operation saves after something has changed; the version is last.
_Saved = tuple[torch.Size, torch.dtype, int]


@final
@dataclasses.dataclass(frozen=True)
class _Start:
    """What a step is taken from; `drawn` is `None` where it was not looked at."""

    states: States
    drawn: list[Any] | None
    buffers: list[Tensor]

    @property
    def size(self) -> int:
        return sum(t.numel() * t.element_size() for t in (*self.states, *self.buffers))

    def fresh(self) -> States:
        """The states as a graph of their own begins with them."""
        return tuple(x.detach().requires_grad_(x.requires_grad) for x in self.states)


@final
class _Surroundings:
    """What functions read that is not given to them, and that may have changed when they are called again.

    Generators of random numbers, modes of networks, buffers that networks in training mode rewrite, and autocast.

    Args:
        held: what is called, or holds it.
        device: of the state.
    """

    def __init__(self, held: Sequence[object], device: torch.device) -> None:
        found = within(held, (nn.Module, torch.Generator, np.random.Generator, random.Random))
        self._modes = [(m, m.training) for m in found if isinstance(m, nn.Module)]
        self._buffers = [b for m, on in self._modes if on for b in m._buffers.values() if b is not None]
        self._rewritten = {b.data_ptr() for b in self._buffers}
        self.parameters = {p.untyped_storage().data_ptr() for m, _ in self._modes for p in m.parameters(False)}
        self._generators = [_Generator(*pair) for pair in GENERATORS]
        if device.type == "cuda":
            get, put = torch.cuda.get_rng_state, torch.cuda.set_rng_state
            self._generators.append(_Generator(lambda: get(device), lambda state: put(state, device)))
        self._generators += [_Generator(*_reader(g)) for g in found if not isinstance(g, nn.Module)]
        kinds = sorted({"cpu", device.type})
        self._autocast = [(k, torch.get_autocast_dtype(k), torch.is_autocast_enabled(k)) for k in kinds]
        self._cached = torch.is_autocast_cache_enabled()
        self._begun = self._drawn = [g.get() for g in self._generators]
        self._notes = 0

    def note(self, t: Tensor) -> _Saved:
        """What tells a tensor that is saved from another."""
        rewritten = self._rewritten and t.data_ptr() in self._rewritten
        return t.shape, t.dtype, 0 if rewritten else t._version

    def noted(self, states: States, *, at_least_states: bool = False) -> _Start:
        """These states, and what functions find now; random states that are equal are kept once.

        Args:
            states: to be kept.
            at_least_states: generators may be left out, whose states take longer to read than a small network does.
        """
        buffers = [b.detach().clone() for b in self._buffers]
        self._notes += 1
        if at_least_states and self._notes % _LOOK != 1 and self._draw_nothing():
            return _Start(_detached(states), None, buffers)
        drawn = [g.get() for g in self._generators]
        self._drawn = [a if same(a, b) else b for a, b in zip(self._drawn, drawn, strict=True)]
        return _Start(_detached(states), list(self._drawn), buffers)

    def _draw_nothing(self) -> bool:
        """Whether no look at generators has found a change."""
        return all(map(operator.is_, self._begun, self._drawn))

    def settle(self, first: _Start) -> bool:
        """Whether functions still find what they found at ``first``: they rewrite and draw nothing."""
        end = self.noted(())
        if not self._draw_nothing():
            return False
        self._generators, self._drawn = [], []
        return all(map(torch.equal, first.buffers, end.buffers))

    @contextlib.contextmanager
    def as_at(self, start: _Start) -> Iterator[None]:
        """Within the block functions find what they found at ``start``."""
        now = [g.get() for g in self._generators]
        modes, buffers = [m.training for m, _ in self._modes], [b.detach().clone() for b in self._buffers]
        with contextlib.ExitStack() as stack:
            stack.callback(self._put, now, modes, buffers)
            self._put(start.drawn, [on for _, on in self._modes], start.buffers)
            for kind, dtype, on in self._autocast:
                if on or torch.is_autocast_enabled(kind):
                    stack.enter_context(torch.autocast(kind, dtype, on, self._cached))
            yield

    def _put(self, drawn: Sequence[Any] | None, modes: Sequence[bool], buffers: Sequence[Tensor]) -> None:
        for generator, state in zip(self._generators, drawn or (), strict=False):  # none, where nothing is drawn
            generator.put(state)
        for (module, _), on in zip(self._modes, modes, strict=True):
            if module.training != on:
                module.training = on
        for buffer, value in zip(self._buffers, buffers, strict=True):
            buffer.data.copy_(value)  # through `data`, so that no graph takes it for modified


class _Generator(NamedTuple):
    get: Callable[[], Any]
    put: Callable[[Any], object]


def _reader(generator: Any) -> tuple[Callable[[], Any], Callable[[Any], object]]:
    if isinstance(generator, torch.Generator):
        return generator.get_state, generator.set_state
    if isinstance(generator, random.Random):
        return generator.getstate, generator.setstate
    bits = generator.bit_generator
    return lambda: bits.state, lambda state: setattr(bits, "state", state)


class AbstractRecord(abc.ABC):
    """Gives torch what it would have saved of the steps of a run, from taking them again.

    Args:
        take: the states after a step from those before it, saving included.
        steps: those of the run.
        held: what the steps call.
        device: of the state.
    """

    def __init__(self, take: Take, steps: range, held: Sequence[object], device: torch.device) -> None:
        self._take, self._steps, self._around = take, steps, _Surroundings(held, device)
        self._kept: dict[int, _Start] = {}
        self._wanted: set[int] = set()
        self._notes: list[tuple[_Saved, ...]] = []
        self._alike: dict[tuple[_Saved, ...], tuple[_Saved, ...]] = {}
        self._made: dict[int, list[Tensor | None]] = {}  # of the step that is being taken, and of one taken again
        self._open = -1
        self._whole = steps.stop  # torch saves what it will of steps from here on

    @final
    @contextlib.contextmanager
    def step(self, k: int, states: States) -> Iterator[None]:
        """Within the block step ``k`` is taken from ``states``.

        Torch saves what it will of the first: what functions prepare when they are first called, they prepare once.
        """
        first = self._steps[0] + 1
        if k == first or k in self._wanted:
            self._kept[k] = self._around.noted(states, at_least_states=k > first)
        if k < first or k >= self._whole:
            yield
            return
        self._open, self._made[k] = k, []
        try:
            with saved_tensors_hooks(self._packed, self._unpacked):
                yield
        finally:
            self._open, saved = -1, self._made.pop(k)
        if k == first:
            sizes = {t.untyped_storage().data_ptr(): t.numel() * t.element_size() for t in saved if t is not None}
            self._plan(k, sum(size for place, size in sizes.items() if place not in self._around.parameters))
        notes = tuple(self._around.note(t) for t in saved if t is not None)
        self._notes.append(self._alike.setdefault(notes, notes))

    def finish(self, states: States) -> None:
        """Says that all steps are taken, to ``states``.

        Raises:
            ValueError: they cannot be taken again.
        """
        if not self._around.settle(self._kept[self._steps[0] + 1]):
            self._kept = {k: start for k, start in self._kept.items() if start.drawn is not None}

    @final
    @property
    def report(self) -> str:
        """For `Stats.reason`."""
        return f"{len(self._kept)} of {len(self._steps)} states are kept, and steps taken again for gradients"

    @abc.abstractmethod
    def _plan(self, k: int, size: int) -> None:
        """Chooses which states to keep after the one before step ``k``, which saved ``size`` bytes."""

    @abc.abstractmethod
    def _before(self, k: int) -> _Start:
        """What step ``k`` was taken from."""

    def _packed(self, t: Tensor) -> tuple[int, int]:
        saved = self._made[self._open]
        saved.append(t)
        return self._open, len(saved) - 1

    def _unpacked(self, place: tuple[int, int]) -> Tensor:
        k, i = place
        made = self._made.get(k)
        if made is None or made[i] is None:
            made = self._again(k)
        t = made[i]
        assert t is not None
        if k != self._open:
            made[i] = None
        return t

    def _again(self, k: int) -> list[Tensor | None]:
        """What step ``k`` saves, from taking it again."""
        saved: list[Tensor | None] = []

        def pack(t: Tensor) -> int:
            saved.append(t)
            return len(saved) - 1

        def unpack(i: int) -> Tensor:
            t = saved[i]
            assert t is not None
            return t

        self._made = {j: made for j, made in self._made.items() if j == self._open}
        start = self._before(k)
        with self._around.as_at(start), torch.enable_grad(), saved_tensors_hooks(pack, unpack):
            after = self._take(k, start.fresh())
        self._check(k, saved, after)
        self._made[k] = saved
        return saved

    def _check(self, k: int, saved: Sequence[Tensor | None], after: States) -> None:
        """Refuses what is not what the step saved, or made, at first.

        Raises:
            RuntimeError: it is not.
        """
        notes = tuple([self._around.note(t) for t in saved if t is not None])
        before = self._notes[k - self._steps[0] - 1]
        if notes != before and [n[:2] for n in notes] != [n[:2] for n in before]:
            raise RuntimeError(
                f"step {k} cannot be taken again for its gradient: its functions save {len(notes)} tensors for it, and "
                f"saved {len(before)}, or others; {_REMEDY}"
            )
        if notes != before:
            raise RuntimeError(
                f"step {k} cannot be taken again for its gradient: a tensor that it needs has been modified by an "
                "inplace operation since; call backward() before that"
            )
        known = self._kept.get(k + 1)
        if known is not None and not _agree(after, known.states):
            raise RuntimeError(
                f"step {k} cannot be taken again for its gradient: its functions give other values than they gave, as "
                f"they do when they count calls or draw numbers from a source of their own; {_REMEDY}"
            )

    def _advanced(self, start: _Start, first: int, last: int) -> _Start:
        """What step ``last`` is taken from, by taking those before it."""
        with self._around.as_at(start), torch.enable_grad():
            states = start.fresh()
            for j in range(first, last):
                states = _detached(self._take(j, states))
            return self._around.noted(states)


@final
class Checkpoints(AbstractRecord):
    """Keeps some states, and takes steps again from those.

    Each step is taken again once if all states may be kept; else as few times as the binomial schedule allows.
    """

    def __init__(self, take: Take, steps: range, held: Sequence[object], device: torch.device) -> None:
        super().__init__(take, steps, held, device)
        self._slots, self._order = 0, list[int]()  # of what is kept

    def _plan(self, k: int, size: int) -> None:
        state, left = max(1, self._kept[k].size), self._steps[-1] + 1 - k
        size = max(size, state)
        self._whole -= min(left // _WHOLE, _MOST_KEPT // size)
        left = self._whole - k
        most = max(2 * size, min(left * size // _SHARE, _MOST_KEPT))
        self._slots = max(1, most // state)
        self._wanted = set(positions(k, left, self._slots))

    def _before(self, k: int) -> _Start:
        if len(self._order) != len(self._kept):
            self._order = sorted(self._kept)
        while self._order[-1] > k + 1:
            del self._kept[self._order.pop()]
        at = self._order[-1] if self._order[-1] <= k else self._order[-2]
        start = self._kept[at]
        while at < k:
            free = self._slots + (self._order[-1] > k) + 1 - len(self._order)
            target = at + distance(k + 1 - at, free) if free > 0 else k
            start = self._advanced(start, at, target)
            at = target
            if free > 0:
                self._kept[at] = start
                self._order = sorted(self._kept)  # few, or each is added once
        return start


@final
class Reconstruction(AbstractRecord):
    """Undoes steps, with a solver that can be reversed.

    A reversed run drifts away where the solution contracts, so some states are kept and it is compared with those.

    Args:
        undo: the states before a step from those after it.
    """

    def __init__(self, undo: Take, take: Take, steps: range, held: Sequence[object], device: torch.device) -> None:
        super().__init__(take, steps, held, device)
        self._undo = undo
        self._at: tuple[int, States] = (-1, ())

    def _plan(self, k: int, size: int) -> None:
        left = self._steps[-1] + 1 - k
        self._wanted = {k + left * i // _ANCHORS for i in range(1, _ANCHORS)}

    def finish(self, states: States) -> None:
        if not self._around.settle(self._kept[self._steps[0] + 1]):
            raise ValueError(
                "gradients='reversible' undoes steps from the last to the first, and the functions draw random numbers "
                "or rewrite buffers; call .eval() on their networks, or take gradients='checkpoint'"
            )
        self._kept[self._steps[-1] + 1] = self._around.noted(states)

    def _before(self, k: int) -> _Start:
        known = self._kept.get(k)
        at, states = self._at
        if at != k + 1:
            at = min(j for j in self._kept if j > k)
            states = self._kept[at].states
        start = self._kept[self._steps[0] + 1]
        with self._around.as_at(start), torch.no_grad():
            for j in range(at - 1, k - 1, -1):
                states = self._undo(j, states)
        if known is not None:
            self._compare(k, states[0], known.states[0])
            states = known.states
        self._at = k, states
        flags = [x.requires_grad for x in start.states]
        fresh = tuple(x.detach().requires_grad_(on) for x, on in zip(states, flags, strict=True))
        return dataclasses.replace(start, states=fresh)

    def _compare(self, k: int, x: Tensor, known: Tensor) -> None:
        """Refuses a state that has drifted away from the one that was kept.

        Raises:
            RuntimeError: it has.
        """
        off, size = (float(v.double().square().mean().sqrt()) for v in (x - known, known))
        most = 4.0 * torch.finfo(x.dtype).eps ** (2 / 3)
        if not off <= most * size:
            raise RuntimeError(
                f"gradients='reversible' has drifted away: undone to step {k}, the states are {off:.2g} off, root mean "
                f"square, of {size:.2g}, and {most:.1g} of that may be; the solution contracts. Take "
                "gradients='checkpoint', or fewer or other steps"
            )


def positions(first: int, steps: int, slots: int) -> Iterator[int]:
    """Steps before which the state is kept besides the first, on the way forward."""
    while steps > 1 and slots > 0:
        ahead = distance(steps, slots)
        first, steps, slots = first + ahead, steps - ahead, slots - 1
        yield first


def _detached(states: States) -> States:
    return tuple(x.detach().requires_grad_(x.requires_grad) for x in states)


def _agree(states: States, others: States) -> bool:
    if states[0].device.type != "cpu":  # a look at the values would wait for the device
        return True
    return all(torch.equal(a, b) or _close(a.detach(), b) for a, b in zip(states, others, strict=True))


def _close(a: Tensor, b: Tensor) -> bool:
    return a.is_floating_point() and agree(a, b)
