"""When each expression of a program is computed: once for all, once a step, once a path, or every step of every path.

What depends on nothing but time and shared parameters is taken out of the loop over paths, whole, and evaluated by
`evaluate` in float64 before the launch: it becomes a column of a table with a row per step, or one number. What
depends on a path's own parameters alone is computed once for each path.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import final

from sdesolve_kernels.trajectory.compositions import fmod_by_steps
from sdesolve_kernels.trajectory.expressions import PATH, STATE, TIME, Expression, Graph, topological
from sdesolve_kernels.trajectory.matrices import Matrix
from sdesolve_kernels.trajectory.program import Program
from sdesolve_kernels.trajectory.rearranging import rearranged
from sdesolve_kernels.trajectory.rolling import Forms

__all__ = ["Plan", "plan"]


@final
@dataclasses.dataclass(frozen=True)
class Plan:
    """A program in the order in which a kernel computes it.

    Attributes:
        program: what is planned.
        columns: expressions of time, evaluated in float64 for every step.
        uniforms: expressions of shared parameters, evaluated once.
        invariants: expressions of a path's parameters (and uniforms), computed once for each path.
        states: the step, over ``state``, ``noise``, ``column``, ``uniform`` and ``invariant`` leaves.
        observed: the observation of a state, likewise.
        matrices: those kept whole, in order of use.
    """

    program: Program
    columns: tuple[Expression, ...]
    uniforms: tuple[Expression, ...]
    invariants: tuple[Expression, ...]
    states: tuple[Expression, ...]
    observed: tuple[Expression, ...]
    matrices: tuple[Matrix, ...]

    @property
    def noises(self) -> int:
        """How many normals of a step are used at most, by the highest number read."""
        order = topological([*self.states, *self.observed])
        return max((e.data[1] + 1 for e in order if e.op == "noise"), default=0)


def plan(program: Program) -> Plan:
    """Splits a program by when its parts are known."""
    graph = program.graph
    roots = rearranged(graph, [*program.states, *program.observed])
    outer = _Hoisted(graph, "column", "uniform")
    roots = outer.replaced(roots)
    inner = _Hoisted(graph, "invariant", "invariant")
    roots = _without_fmod(graph, inner.replaced(roots))
    inner.fixed = _without_fmod(graph, inner.fixed)
    n = len(program.states)
    matrices = dict.fromkeys(e.data for e in topological([*roots, *inner.made]) if e.op == "product")
    return Plan(
        program,
        tuple(outer.varying),
        tuple(outer.fixed),
        tuple(inner.fixed),
        tuple(roots[:n]),
        tuple(roots[n:]),
        tuple(matrices),
    )


def _without_fmod(graph: Graph, roots: Sequence[Expression]) -> list[Expression]:
    """What kernels have no function for, in terms of what they have."""
    new: dict[int, Expression] = {}
    for e in topological(roots):
        args = [new[a.number] for a in e.args]
        new[e.number] = fmod_by_steps(graph, *args) if e.op == "fmod" else graph.with_args(e, args) if args else e
    return [new[e.number] for e in roots]


@final
class _Hoisted:
    """Replaces the largest subexpressions that are known early by leaves."""

    def __init__(self, graph: Graph, varying: str, fixed: str) -> None:
        self._graph, self._names = graph, (varying, fixed)
        self._stops = STATE | (TIME if varying == "invariant" else PATH)
        self.varying: list[Expression] = []
        self.fixed: list[Expression] = []
        self._leaf: dict[int, Expression] = {}

    @property
    def made(self) -> list[Expression]:
        return [*self.varying, *self.fixed]

    def replaced(self, roots: Sequence[Expression]) -> list[Expression]:
        """The roots with everything that is known early replaced."""
        early = {e.number for e in topological(roots) if self._is_early(e)}
        order = self._late_first(roots, early)
        self._number([e for e in order if e.number in early])
        new: dict[int, Expression] = {}
        for e in order:
            if e.number in early:
                new[e.number] = self._leaf[e.number]
            elif e.args:
                new[e.number] = self._graph.with_args(e, [new[a.number] for a in e.args])
            else:
                new[e.number] = e
        return [new[e.number] for e in roots]

    def _number(self, early: Sequence[Expression]) -> None:
        """Gives each a place, expressions that are alike side by side in the order of their leaves.

        So what runs along a vector in the function runs along the table too, and `rolling` finds it.
        """
        forms = Forms()
        order = {e.number: i for i, e in enumerate(early)}
        first: dict[int, int] = {}
        for e in early:
            first.setdefault(forms.of(e), order[e.number])
        for e in sorted(early, key=lambda e: (first[forms.of(e)], forms.leaves(e), order[e.number])):
            kind = self._names[0] if e.depends & TIME else self._names[1]
            place = self.varying if kind == "column" else self.fixed
            self._leaf[e.number] = self._graph.leaf(kind, len(place), e.dtype)
            place.append(e)

    def _is_early(self, e: Expression) -> bool:
        if e.op == "const" or e.depends & self._stops:
            return False
        # A uniform is a number already; only what a path's own parameters take part in is worth a place for each path.
        return self._names[0] != "invariant" or (bool(e.depends & PATH) and e.op not in ("product", "element"))

    def _late_first(self, roots: Iterable[Expression], early: set[int]) -> list[Expression]:
        """Topological order that does not enter what is known early."""
        seen: set[int] = set()
        order: list[Expression] = []
        for root in roots:
            stack = [(root, False)]
            while stack:
                e, ready = stack.pop()
                if ready:
                    order.append(e)
                elif e.number not in seen:
                    seen.add(e.number)
                    stack.append((e, True))
                    if e.number not in early:
                        stack.extend((a, False) for a in reversed(e.args))
        return order
