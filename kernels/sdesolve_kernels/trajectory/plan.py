"""When each expression of a program is computed: once for all, once a step, once a path, or every step of every path.

What depends on nothing but time and shared parameters is taken out of the loop over paths, whole, and evaluated by
`evaluate` in float64 before the launch: it becomes a column of a table with a row per step, or one number. What
depends on a path's own parameters alone is computed once for each path.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import final

from sdesolve_kernels.trajectory.expressions import F32, F64, I64, Expression, Graph, topological
from sdesolve_kernels.trajectory.leaves import PATH, STATE, TIME, Column, LoopInvariant, PathInvariant
from sdesolve_kernels.trajectory.matrices import Matrix
from sdesolve_kernels.trajectory.operations import OPERATIONS
from sdesolve_kernels.trajectory.program import Program
from sdesolve_kernels.trajectory.reassociation import reassociated
from sdesolve_kernels.trajectory.rerolling import Forms
from sdesolve_kernels.trajectory.tracing import dtype_name

__all__ = ["Plan", "expanded", "expansions", "graded_plan", "plan"]


@final
@dataclasses.dataclass(frozen=True)
class Plan:
    """A program in the order in which a kernel computes it.

    Attributes:
        program: what is planned.
        columns: expressions of time, evaluated in float64 for every step.
        loop_invariants: expressions of shared parameters, evaluated once.
        path_invariants: expressions of a path's parameters (and loop invariants), computed once for each path.
        states: the step, over ``state``, ``noise``, ``column``, ``loop_invariant`` and ``path_invariant`` leaves.
        observed: the observation of a state, likewise.
        matrices: those kept whole, in order of use.
    """

    program: Program
    columns: tuple[Expression, ...]
    loop_invariants: tuple[Expression, ...]
    path_invariants: tuple[Expression, ...]
    states: tuple[Expression, ...]
    observed: tuple[Expression, ...]
    matrices: tuple[Matrix, ...]

    @property
    def dtype(self) -> str:
        """The name of the state's type."""
        return dtype_name(self.program.signature.dtype)

    @property
    def numbers(self) -> int:
        """Numbers of a state."""
        return math.prod(self.program.signature.states[0])

    @property
    def width(self) -> int:
        """Numbers saved for each path at a saving time."""
        return self.numbers if self.program.observed_shape is None else len(self.observed)

    @property
    def noises(self) -> list[int]:
        """Numbers of a step from each source of noise."""
        return [math.prod(shape) for shape in self.program.signature.noises]

    def row_length(self, parameter: int) -> int:
        """Entries of a parameter for each path."""
        return math.prod(self.program.captured[parameter].shape[1:])


def plan(program: Program) -> Plan:
    """Splits a program by when its parts are known."""
    roots = _undetached(program.graph, [*program.states, *program.observed])
    return expanded(_staged(program, roots))


def graded_plan(program: Program) -> Plan:
    """Likewise for its derivatives: with ``detach``, and with operations that kernels have no function for."""
    return _staged(program, [*program.states, *program.observed])


def expanded(made: Plan) -> Plan:
    """Operations that kernels have no function for, in terms of those that they have."""
    graph, roots = made.program.graph, [*made.states, *made.observed]
    roots = expansions(graph, roots)
    n = len(made.states)
    return dataclasses.replace(
        made,
        states=tuple(roots[:n]),
        observed=tuple(roots[n:]),
        path_invariants=tuple(expansions(graph, made.path_invariants)),
    )


def _staged(program: Program, roots: Sequence[Expression]) -> Plan:
    graph = program.graph
    roots = reassociated(graph, roots)
    columns: list[Expression] = []
    loop_invariants: list[Expression] = []
    path_invariants: list[Expression] = []

    wide = (F64, I64) if dtype_name(program.signature.dtype) == F32 else ()

    def before_the_launch(e: Expression) -> type | None:
        return None if e.depends & (STATE | PATH) else Column if e.depends & TIME else LoopInvariant

    def before_the_first_step(e: Expression) -> type | None:
        # A loop invariant is a number already; only what a path's own parameters take part in is worth a place.
        return PathInvariant if e.depends == PATH and e.op not in ("product", "element") else None

    roots = _hoisted(graph, roots, before_the_launch, {Column: columns, LoopInvariant: loop_invariants}, wide)
    roots = _hoisted(graph, roots, before_the_first_step, {PathInvariant: path_invariants}, wide)
    n = len(program.states)
    matrices = dict.fromkeys(e.data for e in topological([*roots, *path_invariants]) if e.op == "product")
    return Plan(
        program,
        tuple(columns),
        tuple(loop_invariants),
        tuple(path_invariants),
        tuple(roots[:n]),
        tuple(roots[n:]),
        tuple(matrices),
    )


def _undetached(graph: Graph, roots: Sequence[Expression]) -> list[Expression]:
    """The same values, with no word of where derivatives stop."""
    new: dict[int, Expression] = {}
    for e in topological(roots):
        args = [new[a.id] for a in e.args]
        new[e.id] = args[0] if e.op == "detach" else graph.with_args(e, args) if args else e
    return [new[e.id] for e in roots]


def expansions(graph: Graph, roots: Sequence[Expression]) -> list[Expression]:
    """Operations that kernels have no function for, in terms of those that they have."""
    new: dict[int, Expression] = {}
    for e in topological(roots):
        args = [new[a.id] for a in e.args]
        expansion = OPERATIONS[e.op].expansion if e.op in OPERATIONS else None
        new[e.id] = expansion(graph, *args) if expansion else graph.with_args(e, args) if args else e
    return [new[e.id] for e in roots]


def _hoisted(
    graph: Graph,
    roots: Sequence[Expression],
    stage: Callable[[Expression], type | None],
    places: dict[type, list[Expression]],
    wide: Sequence[str],
) -> list[Expression]:
    """The roots with the largest subexpressions of an earlier stage replaced by leaves.

    Expressions that are alike get places side by side, in the order of their leaves: so what runs along a vector in the
    function runs along the table too, and `rerolling` finds it.

    Args:
        graph: makes expressions.
        roots: what to replace in.
        stage: the kind of leaf that stands for an expression; ``None`` if it is computed at this stage.
        places: by kind, where the hoisted expressions go; grows.
        wide: types that do not fit into a place, which has the type of the state.
    """
    early = {e.id: kind for e in topological(roots) if e.op != "const" and (kind := stage(e)) is not None}
    order = topological(roots, lambda e: () if e.id in early else e.args)
    hoisted = [e for e in order if e.id in early]
    forms, rank = Forms(), {e.id: i for i, e in enumerate(hoisted)}
    first: dict[int, int] = {}
    for e in hoisted:
        first.setdefault(forms.of(e), rank[e.id])
    new: dict[int, Expression] = {}
    for e in sorted(hoisted, key=lambda e: (first[forms.of(e)], forms.leaves(e), rank[e.id])):
        kind = early[e.id]
        new[e.id] = _in_two(graph, e, kind, places[kind]) if e.dtype in wide else _placed(graph, e, kind, places[kind])
    for e in order:
        if e.id not in early:
            new[e.id] = graph.with_args(e, [new[a.id] for a in e.args]) if e.args else e
    return [new[e.id] for e in roots]


def _placed(graph: Graph, e: Expression, kind: type, places: list[Expression], dtype: str = "") -> Expression:
    """The leaf that stands for an expression in the next place."""
    places.append(e)
    return graph.leaf(kind(len(places) - 1), dtype or e.dtype)


def _in_two(graph: Graph, e: Expression, kind: type, places: list[Expression]) -> Expression:
    """A float64 or whole number in two places of type float32, which hold 48 bits of it."""
    whole = graph.cast(e, F64)
    rounded = graph.cast(whole, F32)
    high = graph.cast(rounded, F64)
    rest = graph.op("where", graph.op("eq", whole, high), graph.const(0, F64), graph.op("sub", whole, high))
    # The host rounds as it stores, and refuses what is too large; kernels store what they are told to.
    first = _placed(graph, rounded if kind is PathInvariant else whole, kind, places, F32)
    second = _placed(graph, graph.cast(rest, F32), kind, places)
    return graph.cast(graph.op("add", graph.cast(first, F64), graph.cast(second, F64)), e.dtype)
