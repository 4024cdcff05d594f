"""The reference back end: a plan walked in plain torch, all paths side by side, on any device.

Every expression has the dtype that it claims to have. Kernels are compared with this, and machines that compile none
run it.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from typing import Any, final

import torch
from torch import Tensor

from sdesolve_kernels.ops import normal, words
from sdesolve_kernels.trajectory.derivatives import Outer
from sdesolve_kernels.trajectory.expressions import Expression, topological
from sdesolve_kernels.trajectory.launch import (
    AbstractReverse,
    AbstractTrajectory,
    Launch,
    Moments,
    Saved,
    Sweep,
    contiguous,
    listed,
    tables,
)
from sdesolve_kernels.trajectory.leaves import (
    Column,
    Cotangent,
    LoopInvariant,
    NoiseLeaf,
    PathEntry,
    PathInvariant,
    Shared,
    State,
)
from sdesolve_kernels.trajectory.matrices import Matrix
from sdesolve_kernels.trajectory.operations import BOOL, F32, F64, I64, OPERATIONS
from sdesolve_kernels.trajectory.plan import Plan
from sdesolve_kernels.trajectory.reverse import Pulled, Reverse

__all__ = ["ReferenceTrajectory", "Walk"]

# By class of leaf, the values of its entries, one by one or in one tensor; of parameters, the tensors.
Leaves = dict[type, Any]
_DTYPES = {F32: torch.float32, F64: torch.float64, I64: torch.int64, BOOL: torch.bool}
_NUMBERS_AT_ONCE = 1 << 22  # of noise


@final
class ReferenceTrajectory(AbstractTrajectory):
    """A program whose plan is walked in torch."""

    def __init__(self, plan: Plan, increments: Sequence[str]) -> None:
        self.plan, self._increments = plan, tuple(increments)
        self._first, self._step, self._observe = map(Walk, (plan.path_invariants, plan.states, plan.observed))
        self.source = "\n".join(
            ["One step, expression by expression:", *(f"#{e.id} = {e!r}" for e in topological(plan.states) if e.args)]
        )

    def run(self, launch: Launch) -> Saved:
        plan, x0 = self.plan, launch.x0.detach()
        batch, first = len(x0), launch.first_step
        columns, loop_invariants = (part.to(x0.device) for part in tables(plan, launch))
        captured = [contiguous(c, plan.program.captured[i].dtype) for i, c in enumerate(launch.captured)]
        leaves: Leaves = {LoopInvariant: loop_invariants, Shared: captured, PathEntry: captured}
        leaves[PathInvariant] = self._first(leaves, x0)
        start = x0.reshape(batch, -1)
        missing = len(plan.states) - plan.numbers
        memory = x0.new_zeros(batch, missing) if launch.memory is None else launch.memory
        state = torch.cat([start, memory], dim=1).unbind(1)
        saved: list[Tensor] = []
        wanted = set(launch.saves)
        if first in wanted:
            saved.append(self._saved(state, leaves, x0, launch.moments))
        for k, noise in enumerate(self._noise(launch, x0), first):
            column = columns[k - first] if len(columns) else ()
            leaves[State], leaves[NoiseLeaf], leaves[Column] = state, noise, column
            state = self._step(leaves, x0)
            if launch.progress is not None:
                launch.progress(batch)
            if k + 1 in wanted:
                saved.append(self._saved(state, leaves, x0, launch.moments))
        x1 = torch.stack(state[: plan.numbers], 1).reshape(x0.shape)
        states = torch.stack(saved) if saved else None
        remembered = torch.stack(state[plan.numbers :], 1) if missing else None
        if states is not None and launch.moments:
            return Saved(x1, None, Moments(*states.unbind(1)), remembered)
        return Saved(x1, states, None, remembered)

    def reverse(self, reverse: Reverse, seconds: float = math.inf) -> AbstractReverse:
        return ReferenceReverse(self, reverse)

    def _saved(self, state: Sequence[Tensor], leaves: Leaves, x0: Tensor, moments: bool) -> Tensor:
        """What is kept of a state, ``(batch, width)``; or its mean and variance over the batch, ``(2, width)``."""
        values = state[: self.plan.numbers]
        if self.plan.program.observed_shape is not None:
            leaves[State] = state
            values = self._observe(leaves, x0)
        kept = torch.stack(tuple(values), 1) if values else x0.new_empty(len(x0), 0)
        if not moments:
            return kept
        kept = kept.double()
        mean = kept.mean(0)
        return torch.stack([mean, (kept - mean).square().sum(0) / (len(kept) - 1 if len(kept) > 1 else math.nan)])

    def _noise(self, launch: Launch, x0: Tensor) -> Iterable[tuple[Tensor, ...]]:
        """The numbers of each step in turn, ``(batch,)`` each; made for many steps at a time."""
        start, end, rows = launch.first_step, launch.end, None
        if self.plan.program.signature.listed:
            rows = listed(launch)
        chunk = max(1, _NUMBERS_AT_ONCE // max(1, len(x0) * sum(self.plan.noises)))
        of = _swapped if self.plan.program.signature.swapped else _in_order
        for k in range(start, end, chunk):
            n = min(chunk, end - k)
            made = [
                of(kind, (*place[:3], place[3] + k * m), n, m, x0, rows)
                for m, kind, place in zip(self.plan.noises, self._increments, launch.places, strict=True)
            ]
            for j in range(n):
                yield tuple(z for source in made for z in source[:, j].unbind(1))


def _in_order(
    kind: str, place: tuple[int, int, int, int], steps: int, m: int, like: Tensor, rows: Tensor | None
) -> Tensor:
    """The numbers of steps, ``(batch, steps, m)``."""
    return _numbers(kind, place, steps * m, like, rows).reshape(len(like), steps, m)


def _swapped(
    kind: str, place: tuple[int, int, int, int], steps: int, m: int, like: Tensor, rows: Tensor | None
) -> Tensor:
    """Likewise, those of two steps in each other's place: the sequence begins with the first pair."""
    odd = place[3] // m % 2 if m else 0
    pairs = (odd + steps + 1) // 2
    whole = _in_order(kind, (*place[:3], place[3] - odd * m), 2 * pairs, m, like, rows)
    return whole.reshape(len(like), pairs, 2, m).flip(2).flatten(1, 2)[:, odd : odd + steps]


def _numbers(
    kind: str, place: tuple[int, int, int, int], count: int, like: Tensor, rows: Tensor | None = None
) -> Tensor:
    """Entries of the paths' sequences from ``place`` on, ``(batch, count)``; ``rows``: numbers of their paths."""
    seed, stream, first_path, first = place
    if rows is not None:
        found, made = torch.unique(rows, return_inverse=True)
        starts = [0, *(found.diff() != 1).nonzero().flatten().add(1).tolist(), len(found)]
        parts = [
            _numbers(kind, (seed, stream, first_path + int(found[a]), first), count, like.new_empty(b - a))
            for a, b in itertools.pairwise(starts)
        ]
        return torch.cat(parts)[made]
    batch, device = len(like), like.device
    if kind == "normal":
        return normal(
            batch, count, seed=seed, stream=stream, first_path=first_path, offset=first, dtype=like.dtype, device=device
        )
    per_word = 32 if kind == "two-point" else 1
    skipped = first // per_word
    w = words(
        batch, (first + count - 1) // per_word + 1 - skipped if count else 0, seed=seed, stream=stream,
        first_path=first_path, offset=skipped, device=device,
    )  # fmt: skip
    if kind == "three-point":
        z = math.sqrt(3.0) * ((w >= 2**32 - 2**32 // 6).double() - (w < 2**32 // 6).double())
    else:
        bits = (w[:, :, None] >> torch.arange(32, device=device)) & 1
        z = 2.0 * bits.reshape(batch, -1)[:, first - 32 * skipped :][:, :count] - 1.0
    return z.to(like.dtype)


@final
class ReferenceReverse(AbstractReverse):
    """The reverse of a plan, walked in torch."""

    def __init__(self, trajectory: ReferenceTrajectory, reverse: Reverse) -> None:
        self._trajectory, self._reverse, plan = trajectory, reverse, reverse.plan
        self._first, self._step, self._observe = map(Walk, (plan.path_invariants, plan.states, plan.observed))
        walks = [Walk([*p.states, *p.sums, *p.path_sums, *(e for _, o in p.outers for e in _vectors(o))])
                 for p in (reverse.step, reverse.observed)]  # fmt: skip
        self._pull, self._pull_observed = walks
        self.source = "\n".join(
            ["Its reverse:", *(f"#{e.id} = {e!r}" for e in topological(reverse.step.states) if e.args)]
        )

    def steps(self, batch: int, columns: int) -> tuple[int, int]:
        return 8, 64

    def run(self, sweep: Sweep) -> Moments | None:
        launch, reverse, plan = sweep.launch, self._reverse, self._reverse.plan
        x0, first, end = launch.x0.detach(), launch.first_step, launch.end
        captured = [contiguous(c, plan.program.captured[i].dtype) for i, c in enumerate(launch.captured)]
        leaves: Leaves = {LoopInvariant: sweep.uniforms.to(x0.device), Shared: captured, PathEntry: captured}
        leaves[PathInvariant] = self._first(leaves, x0)
        columns, n = sweep.table.to(x0.device), len(plan.states)
        tape = [sweep.starts.unbind(1)]
        noises = list(self._trajectory._noise(launch, x0))

        def at(k: int) -> None:
            leaves[State], leaves[NoiseLeaf] = tape[k], noises[k]
            leaves[Column] = columns[k] if len(columns) else ()

        for k in range(end - first):
            at(k)
            tape.append(self._step(leaves, x0))
            if sweep.ends is not None and launch.progress is not None:
                launch.progress(len(x0))
        if sweep.ends is not None:
            sweep.ends.copy_(torch.stack(tape[-1], 1))
        after, parts = list(sweep.cotangents.unbind(1)), list[Tensor]()
        low, slot = sweep.slots
        for k in range(end - first, -1, -1):
            if slot >= low and launch.saves[slot] == first + k:
                if sweep.ends is not None:
                    parts.append(self._trajectory._saved(tape[k], leaves, x0, moments=True))
                leaves[State] = tape[k]
                seen = self._observe(leaves, x0) if plan.observed else tape[k]
                leaves[Cotangent] = (*after, *self._of_save(sweep, slot, seen))
                states = self._added(sweep, reverse.observed, self._pull_observed(leaves, x0), leaves, None)
                after, slot = [a + s for a, s in zip(after, states, strict=True)], slot - 1
            if k > 0:
                at(k - 1)
                leaves[Cotangent] = after
                row = k - 1 if sweep.each_step else 0
                after = list(self._added(sweep, reverse.step, self._pull(leaves, x0), leaves, row))
        sweep.cotangents.copy_(torch.stack(after, 1) if n else sweep.cotangents)
        return Moments(*torch.stack(parts[::-1]).unbind(1)) if parts else None

    def _of_save(self, sweep: Sweep, slot: int, seen: Sequence[Tensor]) -> list[Tensor]:
        """Cotangents of what was saved of a state."""
        width = self._reverse.plan.width
        made = torch.zeros(len(sweep.starts), width, dtype=sweep.starts.dtype, device=sweep.starts.device)
        if sweep.saved is not None:
            made = made + sweep.saved[slot]
        if sweep.moments is not None:
            level, slope, mean = sweep.moments[slot].unbind(1)
            off = torch.stack(tuple(seen[:width]), 1).double() - mean
            made = made + (level + torch.where(slope == 0, 0.0, slope * off)).to(made)
        return list(made.unbind(1))

    def _added(
        self, sweep: Sweep, pulled: Pulled, values: Sequence[Tensor], leaves: Leaves, row: int | None
    ) -> Sequence[Tensor]:
        """Adds what is summed up, and gives the cotangents of the state."""
        n, c = len(pulled.states), len(self._reverse.columns)
        sums = [v.double().sum() for v in values[n : n + len(pulled.sums)]]
        if row is not None and c:
            sweep.columns[row] += torch.stack(sums[:c]).to(sweep.columns)
        at = len(sums) - c
        if at:
            sweep.sums[:at] += torch.stack(sums[c:]).to(sweep.sums)
        rest = values[n + len(sums) :]
        paths = len(pulled.path_sums)
        if paths:
            sweep.path_sums.add_(torch.stack(tuple(rest[:paths]), 1).to(sweep.path_sums))
        places = [m.rows * m.columns for m in self._reverse.matrices]
        rest = rest[paths:]
        for place, outer in pulled.outers:
            m = outer.product.data
            left, right = (torch.stack(tuple(v)).double() for v in (rest[: m.rows], rest[m.rows : m.rows + m.columns]))
            first = at + sum(places[:place])
            sweep.sums[first : first + places[place]] += (left @ right.T).reshape(-1).to(sweep.sums)
            rest = rest[m.rows + m.columns :]
        return values[:n]


def _vectors(outer: Outer) -> tuple[Expression, ...]:
    return (*outer.pulled.args, *outer.product.args)


@final
class Walk:
    """Computes expressions in order, and forgets each value after its last use.

    Args:
        roots: what to compute.
    """

    def __init__(self, roots: Sequence[Expression]) -> None:
        self._roots, self._order = roots, topological(roots)
        last = {a.id: e.id for e in self._order for a in e.args}
        kept = {e.id for e in roots}
        self._done = {
            e.id: [n for n in {a.id for a in e.args} if last[n] == e.id and n not in kept] for e in self._order
        }
        self._constants: dict[torch.device, dict[int, Tensor]] = {}

    def __call__(self, leaves: Leaves, like: Tensor) -> tuple[Tensor, ...]:
        """The values of the roots, ``(batch,)`` each.

        Args:
            leaves: what expressions start from.
            like: has the batch and the device of the run.
        """
        constants = self._constants.setdefault(like.device, {})
        values: dict[int, Tensor] = {}
        matrices: dict[Matrix, Tensor] = {}
        for e in self._order:
            if e.op == "const":
                if e.id not in constants:
                    constants[e.id] = torch.tensor(e.data, dtype=_DTYPES[e.dtype], device=like.device)
                value = constants[e.id]
            elif not e.args:
                value = _leaf(e.data, leaves).to(_DTYPES[e.dtype])
            else:
                value = _value(e, [values[a.id] for a in e.args], leaves, matrices)
            assert value.dtype == _DTYPES[e.dtype], e
            values[e.id] = value
            for n in self._done[e.id]:
                del values[n]
        return tuple(values[e.id].expand(len(like)) for e in self._roots)


def _leaf(leaf: Any, leaves: Leaves) -> Tensor:
    match leaf:
        case PathEntry(_, parameter, i):
            rows = leaves[PathEntry][parameter]
            return rows.reshape(len(rows), -1)[:, i]
        case Shared(parameter, i):
            return leaves[Shared][parameter].reshape(-1)[i]
        case _:
            return leaves[type(leaf)][leaf.i]


def _value(e: Expression, args: Sequence[Tensor], leaves: Leaves, matrices: dict[Matrix, Tensor]) -> Tensor:
    match e.op:
        case "cast":
            return args[0].to(_DTYPES[e.dtype])
        case "sum":
            return sum(args[1:], args[0])
        case "product":
            if e.data not in matrices:
                matrices[e.data] = leaves[Shared][e.data.parameter].reshape(-1)[e.data.entries(args[0].device)]
            return matrices[e.data] @ torch.stack(torch.broadcast_tensors(*args))
        case "element":
            return args[0][e.data]
        case name:
            return OPERATIONS[name].torch(*args)
