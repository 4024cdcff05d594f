"""Derivatives carried forwards: a step and what it does to tangents of all that it reads, as one program.

With ``x'`` the tangent of ``x`` and ``x_{k+1} = f(x_k, p)``, the program also carries
``x'_{k+1} = f_x(x_k, p) x'_k + f_p(x_k, p) p'``, in several directions at once: noise and values are made once for all.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Sequence
from typing import final

import torch
from torch import Tensor

from sdesolve_kernels.threads import single_threaded
from sdesolve_kernels.trajectory.derivatives import jvp
from sdesolve_kernels.trajectory.expressions import FLOATS, Expression, topological
from sdesolve_kernels.trajectory.launch import AbstractTrajectory, Launch, Moments, Saved, compile_trajectory
from sdesolve_kernels.trajectory.leaves import PathEntry, Shared, State, TableColumn
from sdesolve_kernels.trajectory.matrices import Matrix
from sdesolve_kernels.trajectory.plan import plan
from sdesolve_kernels.trajectory.program import Program
from sdesolve_kernels.trajectory.tracing import Unsupported, dtype_name
from sdesolve_kernels.transforms import directions, outside_transforms

__all__ = ["Pushforward", "pushed"]

_AT_ONCE = 8  # directions of a launch
_LARGEST = 1 << 30  # bytes of states whose moments are taken afterwards


def pushed(program: Program, count: int, wanted: Collection[int], *, rows: bool = False) -> Program:
    """A program with its derivative in ``count`` directions.

    It carries ``count`` tangents of all that the program carries, one after another, as one more tensor. It reads one
    more tensor for each that is wanted: its tangents, ``(count, *shape)``, or ``(batch, count, ...)`` for one with a
    row per path. It observes what the program observes, and then its tangents. The solver's row is followed by its
    tangents.

    Args:
        program: what is differentiated.
        count: directions.
        wanted: which of its captured tensors have tangents.
        rows: whether the solver's numbers have.
    """
    graph, signature, n = program.graph, program.signature, len(program.states)
    name, captured = dtype_name(signature.dtype), list(program.captured)
    places: dict[int, int] = {}
    for i in sorted(wanted):
        c = program.captured[i]
        if c.dtype.is_floating_point:
            places[i] = len(captured)
            shape = (len(c), count, *c.shape[1:]) if program.by_path[i] else (count, *c.shape)
            captured.append(torch.zeros((), dtype=c.dtype, device="cpu").expand(shape))
    state = [graph.leaf(State(0, i), name) for i in range(math.prod(signature.states[0]))]
    observed = state if program.observed_shape is None else program.observed
    roots = [*program.states, *observed]
    leaves = [e for e in topological([*roots, *state]) if not e.args and e.dtype in FLOATS]

    def tangent(e: Expression, j: int) -> Expression | None:
        match e.data:
            case State(_, i):
                return graph.leaf(State(0, n + j * n + i), e.dtype)
            case Shared(p, i) if p in places:
                return graph.leaf(Shared(places[p], j * program.captured[p].numel() + i), e.dtype)
            case PathEntry(_, p, i) if p in places:
                return graph.leaf(PathEntry(0, places[p], j * math.prod(program.captured[p].shape[1:]) + i), e.dtype)
            case TableColumn(c) if rows:
                return graph.leaf(TableColumn((1 + j) * signature.columns + c), e.dtype)
        return None

    states, seen = list(program.states), list(observed)
    for j in range(count):

        def of_matrix(m: Matrix, j: int = j) -> Matrix | None:
            place = places.get(m.parameter)
            if place is None:
                return None
            return dataclasses.replace(m, parameter=place, offset=j * program.captured[m.parameter].numel() + m.offset)

        pairs = [(e, v) for e in leaves if (v := tangent(e, j)) is not None]
        made = jvp(graph, roots, [e for e, _ in pairs], [v for _, v in pairs], of_matrix)
        states += made[:n]
        seen += made[n:]
    columns = signature.columns * (1 + count if rows else 1)
    return dataclasses.replace(
        program,
        signature=dataclasses.replace(signature, states=(*signature.states, (count * n,)), columns=columns),
        states=tuple(states),
        observed=tuple(seen),
        observed_shape=(len(seen),),
        captured=tuple(captured),
        by_path=(*program.by_path, *(program.by_path[i] for i in places)),
    )


@final
class Pushforward(AbstractTrajectory):
    """A trajectory whose runs take and leave tensors with tangents (`directions`).

    Args:
        program: what is differentiated.
        increments: as `compile_trajectory`.
        count: directions that are asked for; more than a few take several launches.
        wanted: which of the captured tensors have tangents.
        rows: whether the solver's numbers have.
        seconds: that compiling may take.

    Raises:
        Unsupported: the back end cannot compile it.
        TooCostly: it would take longer.
    """

    def __init__(
        self,
        program: Program,
        increments: Sequence[str],
        count: int,
        wanted: Collection[int],
        rows: bool,
        seconds: float = math.inf,
    ) -> None:
        self.plan, self._at_once = plan(program), min(count, _AT_ONCE)
        self._wanted = sorted(i for i in wanted if program.captured[i].dtype.is_floating_point)
        self._rows = rows
        both = pushed(program, self._at_once, self._wanted, rows=rows)
        self._trajectory = compile_trajectory(both, increments, seconds)

    @property
    def source(self) -> str:  # type: ignore[override]  # it may depend on the launch
        return self._trajectory.source

    def run(self, launch: Launch) -> Saved:
        here = directions()
        if here is None:  # values alone are looked at
            return self._ran(launch, [], 1)[0]
        given = [None if t is None else here.split(t) for t in (launch.x0, launch.memory, launch.rows)]
        captured = [here.split(c) for c in launch.captured]
        (x0, *rest), of = ([None if g is None else g[i] for g in given] for i in (0, 1))
        assert x0 is not None
        bare = dataclasses.replace(
            launch, x0=x0, memory=rest[0], rows=rest[1], captured=[value for value, _ in captured]
        )
        with outside_transforms():
            saved, tangents = self._ran(bare, [*of, *(captured[i][1] for i in self._wanted)], here.count)

        def joined(t: Tensor | None, v: Tensor | None) -> Tensor | None:
            return None if t is None or v is None else here.join(t, v)

        x1 = joined(saved.x1, tangents.x1)
        assert x1 is not None
        states, memory = joined(saved.states, tangents.states), joined(saved.memory, tangents.memory)
        if states is None or not launch.moments:
            return Saved(x1, states, None, memory)
        with single_threaded():
            wide = states.double()
            mean = wide.mean(1)
            variance = wide.var(1) if wide.shape[1] > 1 else torch.full_like(mean, math.nan)
            return Saved(x1, None, Moments(mean, variance), memory)

    def _ran(self, launch: Launch, tangents: Sequence[Tensor | None], count: int) -> tuple[Saved, Saved]:
        """A run of plain tensors, and its tangents, each behind an axis of directions.

        Args:
            launch: the run.
            tangents: of `Launch.x0`, `Launch.memory`, `Launch.rows` and the captured tensors that have some; likewise.
            count: directions.
        """
        batch, n, width = len(launch.x0), len(self.plan.states), self.plan.width
        if launch.moments and (1 + count) * len(launch.saves) * batch * width * launch.x0.element_size() > _LARGEST:
            raise Unsupported(
                f"tangents of moments are taken of all states that were saved, here {len(launch.saves)} times "
                f"{batch} paths in {count} direction(s)"
            )
        made = []
        for first in range(0, count, self._at_once):
            these = [None if t is None else _some(t, first, self._at_once) for t in tangents]
            made.append(self._trajectory.run(self._with_tangents(launch, *these)))
        numbers, one = self.plan.numbers, made[0]
        carried = torch.cat([m.memory[:, n - numbers :] for m in made if m.memory is not None], 1)
        carried = carried.reshape(batch, -1, n)[:, :count].transpose(0, 1)
        states, of_states = None, None
        if one.states is not None:
            parts = [m.states[:, :, width:] for m in made if m.states is not None]
            states = one.states[:, :, :width]
            of_states = torch.cat(parts, 2).reshape(len(states), batch, -1, width)[:, :, :count].permute(2, 0, 1, 3)
        assert one.memory is not None
        memory = one.memory[:, : n - numbers] if n > numbers else None
        of_memory = None if memory is None else carried[:, :, numbers:]
        of_x1 = carried[:, :, :numbers].reshape(count, *one.x1.shape)
        return Saved(one.x1, states, None, memory), Saved(of_x1, of_states, None, of_memory)

    def _with_tangents(
        self,
        launch: Launch,
        x0: Tensor | None = None,
        memory: Tensor | None = None,
        rows: Tensor | None = None,
        *captured: Tensor | None,
    ) -> Launch:
        """The launch of the program with tangents, in as many directions as it has."""
        k, batch, numbers, n = self._at_once, len(launch.x0), self.plan.numbers, len(self.plan.states)
        carried, plain, table = launch.x0.new_zeros(batch, k, n), launch.memory, launch.rows
        if x0 is not None:
            carried[:, :, :numbers] = x0.reshape(k, batch, numbers).transpose(0, 1)
        if memory is not None:
            carried[:, :, numbers:] = memory.transpose(0, 1)
        plain = launch.x0.new_zeros(batch, n - numbers) if plain is None else plain.to(carried)
        if self._rows and table is not None:
            more = table.new_zeros(k, *table.shape) if rows is None else rows
            table = torch.cat([table, *more], 1)
        program, further = self.plan.program, []
        for i, given in zip(self._wanted, captured or [None] * len(self._wanted), strict=True):
            c = launch.captured[i]
            tangent = c.new_zeros(k, *c.shape) if given is None else given
            further.append(tangent.movedim(0, 1) if program.by_path[i] else tangent)
        together = torch.cat([plain, carried.reshape(batch, -1)], 1)
        return dataclasses.replace(
            launch, rows=table, moments=False, memory=together, captured=[*launch.captured, *further]
        )


def _some(tangents: Tensor, first: int, count: int) -> Tensor:
    """So many directions from the first on, zeros behind the last."""
    some = tangents[first : first + count]
    return some if len(some) == count else torch.cat([some, some.new_zeros(count - len(some), *some.shape[1:])])
