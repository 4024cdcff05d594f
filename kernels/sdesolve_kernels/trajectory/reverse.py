"""The reverse of a step as expressions: from the cotangent of the state after a step to that of everything it read.

What a launch computes beforehand, columns and loop invariants, gets one cotangent for all paths; `backward` pulls it
back to parameters, in torch. So a kernel knows nothing of networks of time, of schedules, or of how many parameters
there are.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Sequence
from typing import Any, final

from sdesolve_kernels.trajectory.derivatives import Outer, vjp
from sdesolve_kernels.trajectory.expressions import FLOATS, Expression, topological
from sdesolve_kernels.trajectory.leaves import (
    Column,
    Cotangent,
    LoopInvariant,
    PathEntry,
    PathInvariant,
    Shared,
    State,
    TableColumn,
    Time,
)
from sdesolve_kernels.trajectory.matrices import Matrix
from sdesolve_kernels.trajectory.plan import Plan, expanded, expansions, graded_plan
from sdesolve_kernels.trajectory.program import Program

__all__ = ["Pulled", "Reverse", "reverse"]


@final
@dataclasses.dataclass(frozen=True)
class Pulled:
    """Cotangents of what an expression of the state reads, over `Cotangent` leaves and the leaves of the plan.

    Attributes:
        states: of the state.
        sums: of `Reverse.columns`, then of `Reverse.loop_invariants`; to be added up over steps and paths.
        path_sums: of `Reverse.path_invariants`; to be added up over steps.
        outers: of matrices kept whole, each with its place in `Reverse.matrices`; likewise.
    """

    states: tuple[Expression, ...]
    sums: tuple[Expression, ...]
    path_sums: tuple[Expression, ...]
    outers: tuple[tuple[int, Outer], ...]


@final
@dataclasses.dataclass(frozen=True)
class Reverse:
    """The reverse of a plan.

    Attributes:
        plan: of the step itself, with ``detach``.
        columns: places in ``plan.columns`` whose cotangents are wanted.
        loop_invariants: likewise.
        path_invariants: likewise.
        matrices: matrices kept whole whose cotangents are wanted.
        step: from `Cotangent` ``i`` of number ``i`` of the state after a step.
        observed: from `Cotangent` ``len(plan.states) + j`` of number ``j`` of an observation; what of `step.sums` are
            columns are 0 here.
        steady: the columns depend on the length of a step and not on when it is: on an even grid their cotangents may
            be added up.
    """

    plan: Plan
    columns: tuple[int, ...]
    loop_invariants: tuple[int, ...]
    path_invariants: tuple[int, ...]
    matrices: tuple[Matrix, ...]
    step: Pulled
    observed: Pulled
    steady: bool

    @property
    def totals(self) -> int:
        """Numbers that sums over all paths have, without columns."""
        return len(self.loop_invariants) + sum(m.rows * m.columns for m in self.matrices)


def reverse(program: Program, wanted: Collection[int], *, rows: bool = False) -> Reverse:
    """The reverse of a program's step.

    Args:
        program: what is differentiated.
        wanted: which of its captured tensors get a gradient.
        rows: whether the solver's numbers do.
    """
    plan = graded_plan(program)
    wanted = frozenset(i for i in wanted if program.captured[i].dtype.is_floating_point)

    def sources(e: Expression) -> bool:
        match e.data:
            case Shared() | PathEntry() | Matrix():
                return e.data.parameter in wanted
            case TableColumn():
                return rows
            case LoopInvariant():
                return e.data.i in loop_invariants
        return False

    loop_invariants: tuple[int, ...] = ()
    columns = _depending(plan.columns, sources)
    loop_invariants = _depending(plan.loop_invariants, sources)
    path_invariants = _depending(plan.path_invariants, sources)
    matrices = tuple(m for m in plan.matrices if m.parameter in wanted)
    times = {e.data.name for j in columns for e in topological([plan.columns[j]]) if isinstance(e.data, Time)}
    tabled = any(isinstance(e.data, TableColumn) for j in columns for e in topological([plan.columns[j]]))
    steady = not tabled and times <= {"dt", "scale"}
    places = columns, loop_invariants, path_invariants, matrices
    n = len(plan.states)
    step = _pulled(plan, plan.states, 0, *places)
    observed = _pulled(plan, plan.observed or plan.states[: plan.numbers], n, *places)
    return Reverse(expanded(plan), *places, step, observed, steady)


def _depending(places: Sequence[Expression], is_source: Any) -> tuple[int, ...]:
    """Those that are made of what is wanted."""
    found: dict[int, bool] = {}
    for e in topological(places):
        found[e.id] = e.op != "detach" and (is_source(e) or any(found[a.id] for a in e.args))
    return tuple(i for i, e in enumerate(places) if found[e.id] and e.dtype in FLOATS)


def _pulled(
    plan: Plan,
    roots: Sequence[Expression],
    first: int,
    columns: Sequence[int],
    loop_invariants: Sequence[int],
    path_invariants: Sequence[int],
    matrices: Sequence[Matrix],
) -> Pulled:
    graph = plan.program.graph
    if first and not plan.observed:  # the state itself is observed
        roots = [graph.leaf(State(0, i), plan.dtype) for i in range(plan.numbers)]
    cotangents = [graph.leaf(Cotangent(first + i), plan.dtype) for i in range(len(roots))]
    leaves = {(type(e.data), e.data.i): e for e in topological(roots) if not e.args and e.op != "const"}

    def wrt(kind: type, i: int) -> Expression:
        e = leaves.get((kind, i))
        if e is not None and e.dtype in FLOATS:
            return e
        return graph.leaf(State(0, i) if kind is State else kind(i), plan.dtype)

    kinds = ((State, range(len(plan.states))), (Column, columns), (LoopInvariant, loop_invariants))
    asked = [wrt(kind, i) for kind, places in (*kinds, (PathInvariant, path_invariants)) for i in places]
    outers: list[Outer] = []
    pulled = vjp(graph, roots, cotangents, asked, outers)
    n, m = len(plan.states), len(columns) + len(loop_invariants)
    kept = [(matrices.index(o.product.data), o) for o in outers if o.product.data in matrices]
    flat = expansions(graph, [*pulled, *(e for _, o in kept for e in o)])
    both = flat[len(pulled) :]
    return Pulled(
        tuple(flat[:n]),
        tuple(flat[n : n + m]),
        tuple(flat[n + m : len(pulled)]),
        tuple((place, Outer(both[2 * i], both[2 * i + 1])) for i, (place, _) in enumerate(kept)),
    )
