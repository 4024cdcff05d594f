"""Finds the loop in a list of expressions that are alike but for an index.

The inputs of a network's layer are as many expressions as it has units, each the same function of entry ``j`` of this
and entry ``j`` of that. Written out they cost a second of compile time for every few dozen; as one loop over ``j``
next to nothing.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from typing import final

from sdesolve_kernels.trajectory.expressions import Expression, Graph, topological
from sdesolve_kernels.trajectory.leaves import Column, LoopInvariant, NoiseLeaf, PathInvariant, State, Strided
from sdesolve_kernels.trajectory.operations import OPERATIONS

__all__ = ["FEWEST", "Forms", "Rerolled", "StridedInput", "reroll"]

FEWEST = 8  # entries that are worth a loop


@final
@dataclasses.dataclass(frozen=True)
class StridedInput:
    """An input that changes with ``j``: entry ``start + j stride``.

    Attributes:
        kind: which class of leaves; ``None`` for entries of a matrix-vector product.
        start: the first entry.
        stride: from one to the next.
        product: whose entries they are, if no leaves.
        dtype: of each.
    """

    kind: type | None
    start: int
    stride: int
    product: Expression | None
    dtype: str


@final
@dataclasses.dataclass(frozen=True)
class Rerolled:
    """``count`` expressions as one of ``j``.

    Attributes:
        count: how many.
        template: the expression, over `Strided` leaves and whatever does not change with ``j``.
        strided: what those leaves stand for.
        common: operations inside that do not change with ``j``.
    """

    count: int
    template: Expression
    strided: tuple[StridedInput, ...]
    common: tuple[Expression, ...]


def reroll(graph: Graph, expressions: Sequence[Expression]) -> Rerolled | None:
    """The expressions as one, or ``None`` if they are few or not alike."""
    if len(expressions) < FEWEST:
        return None
    search = _Search(graph)
    template = search.match(tuple(expressions))
    if template is None:
        return None
    return Rerolled(len(expressions), template, tuple(search.strided), tuple(search.common))


_STRIDED = (Column, LoopInvariant, PathInvariant, State, NoiseLeaf)


@final
class _Search:
    def __init__(self, graph: Graph) -> None:
        self._graph = graph
        self.strided: list[StridedInput] = []
        self.common: list[Expression] = []
        self._leaves: dict[StridedInput, Expression] = {}
        self._forms = Forms()

    def match(self, expressions: tuple[Expression, ...]) -> Expression | None:
        """The template of expressions that are alike; walks them side by side, without recursion."""
        found: dict[tuple[int, ...], Expression | None] = {}
        stack = [(expressions, False)]
        while stack:
            side_by_side, ready = stack.pop()
            key = tuple([e.id for e in side_by_side])
            if key in found:
                continue
            first = side_by_side[0]
            if not first.args or first.op in _WHOLE or all(e is first for e in side_by_side):
                found[key] = self._end(side_by_side)
            elif any(e.op != first.op or e.dtype != first.dtype for e in side_by_side):
                return None
            else:
                columns = list(zip(*map(self._ordered, side_by_side), strict=True))
                if ready:
                    parts = [found[tuple([e.id for e in column])] for column in columns]
                    found[key] = self._graph.with_args(first, [p for p in parts if p is not None])
                else:
                    stack.append((side_by_side, True))
                    stack += [(column, False) for column in reversed(columns)]
                    continue
            if found[key] is None:
                return None
        return found[tuple([e.id for e in expressions])]

    def _ordered(self, e: Expression) -> tuple[Expression, ...]:
        """Arguments, those of a commutative operation in an order that does not depend on when they were made."""
        if _is_commutative(e) and self._forms.of(e.args[0]) > self._forms.of(e.args[1]):
            return e.args[::-1]
        return e.args

    def _end(self, expressions: tuple[Expression, ...]) -> Expression | None:
        """What stands for leaves, elements of a product, or an expression that does not change."""
        first = expressions[0]
        if all(e is first for e in expressions):
            if first.args and first.op != "element":
                self.common.append(first)
            return first
        if any(e.op != first.op or e.dtype != first.dtype for e in expressions):
            return None
        if first.op == "element":
            kind, product = None, first.args[0]
            if any(e.args[0] is not product for e in expressions):
                return None
            places = [e.data for e in expressions]
        elif isinstance(first.data, _STRIDED):
            kind, product = type(first.data), None
            places = [e.data.i for e in expressions]
        else:
            return None
        stride = places[1] - places[0]
        if any(p != places[0] + j * stride for j, p in enumerate(places)):
            return None
        made = StridedInput(kind, places[0], stride, product, first.dtype)
        if made not in self._leaves:
            self._leaves[made] = self._graph.leaf(Strided(len(self.strided)), first.dtype)
            self.strided.append(made)
        return self._leaves[made]


_WHOLE = ("element", "product", "sum")


@final
class Forms:
    """Tells expressions that differ in the indices of their leaves alone from others."""

    def __init__(self) -> None:
        self._forms: dict[int, int] = {}
        self._numbers: dict[tuple[object, ...], int] = {}
        self._leaves: dict[int, tuple[tuple[int, ...], ...]] = {}

    def of(self, e: Expression) -> int:
        """A number that such expressions share."""
        if e.id not in self._forms:
            for part in topological([e], self._unknown):
                if part.id not in self._forms:
                    self._add(part)
        return self._forms[e.id]

    def leaves(self, e: Expression) -> tuple[tuple[int, ...], ...]:
        """Indices of the first few leaves, in order of form."""
        self.of(e)
        return self._leaves[e.id]

    def _unknown(self, e: Expression) -> tuple[Expression, ...]:
        return () if e.op == "element" or e.id in self._forms else e.args

    def _add(self, e: Expression) -> None:
        args = () if e.op == "element" else e.args
        if _is_commutative(e):
            args = tuple(sorted(args, key=lambda a: self._forms[a.id]))
        key = (e.op, e.dtype, e.data if e.op == "const" else None, *(self._forms[a.id] for a in args))
        # Numbered as they come: a hash differs from process to process, and with it the order of arguments, the
        # source, and the name under which a kernel is looked for on disk.
        self._forms[e.id] = self._numbers.setdefault(key, len(self._numbers))
        self._leaves[e.id] = (
            tuple(itertools.islice((i for a in args for i in self._leaves[a.id]), _LEAVES))
            if args
            else (_indices(e.data),)
        )


_LEAVES = 4


def _is_commutative(e: Expression) -> bool:
    return e.op in OPERATIONS and OPERATIONS[e.op].commutative


def _indices(data: object) -> tuple[int, ...]:
    if isinstance(data, tuple):
        return tuple(i for i in data if isinstance(i, int))
    return (data,) if isinstance(data, int) and not isinstance(data, bool) else ()
