"""Finds the loop in a list of expressions that are alike but for an index.

The inputs of a network's layer are as many expressions as it has units, each the same function of entry ``j`` of this
and entry ``j`` of that. Written out they cost a second of compile time for every few dozen; as one loop over ``j``
next to nothing.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import final

from sdesolve_kernels.trajectory.expressions import COMMUTATIVE, Expression, Graph

__all__ = ["FEWEST", "Forms", "Mapped", "Rolled", "roll"]

FEWEST = 8  # entries that are worth a loop


@final
@dataclasses.dataclass(frozen=True)
class Mapped:
    """A leaf that changes with ``j``: entry ``start + j stride`` of its kind; ``product`` is whose entries they are."""

    kind: str
    start: int
    stride: int
    product: Expression | None


@final
@dataclasses.dataclass(frozen=True)
class Rolled:
    """``count`` expressions as one of ``j``.

    Attributes:
        count: how many.
        template: the expression, over ``mapped`` leaves and whatever does not change with ``j``.
        mapped: what leaf ``mapped`` number ``i`` stands for.
        common: operations inside that do not change with ``j``.
    """

    count: int
    template: Expression
    mapped: tuple[Mapped, ...]
    common: tuple[Expression, ...]


def roll(graph: Graph, expressions: Sequence[Expression]) -> Rolled | None:
    """The expressions as one, or ``None`` if they are few or not alike."""
    if len(expressions) < FEWEST:
        return None
    search = _Search(graph, len(expressions))
    template = search.match(tuple(expressions))
    if template is None:
        return None
    return Rolled(len(expressions), template, tuple(search.mapped), tuple(search.common))


@final
class _Search:
    def __init__(self, graph: Graph, count: int) -> None:
        self._graph, self._count = graph, count
        self.mapped: list[Mapped] = []
        self.common: list[Expression] = []
        self._leaves: dict[Mapped, Expression] = {}
        self._found: dict[tuple[int, ...], Expression | None] = {}
        self._forms = Forms()

    def match(self, expressions: tuple[Expression, ...]) -> Expression | None:
        key = tuple([e.number for e in expressions])
        if key not in self._found:
            self._found[key] = self._match(expressions)
        return self._found[key]

    def _match(self, expressions: tuple[Expression, ...]) -> Expression | None:
        first = expressions[0]
        if all(e is first for e in expressions):
            if first.args and first.op != "element":
                self.common.append(first)
            return first
        if any(e.op != first.op or e.dtype != first.dtype or len(e.args) != len(first.args) for e in expressions):
            return None
        if first.op == "element" or not first.args:
            return self._leaf(expressions)
        if first.op in ("product", "sum"):
            return None
        parts = [self.match(column) for column in zip(*(self._ordered(e) for e in expressions), strict=True)]
        found = [p for p in parts if p is not None]
        return self._graph.with_args(first, found) if len(found) == len(parts) else None

    def _ordered(self, e: Expression) -> tuple[Expression, ...]:
        """Arguments, those of a commutative operation in an order that does not depend on when they were made."""
        if e.op in COMMUTATIVE and self._forms.of(e.args[0]) > self._forms.of(e.args[1]):
            return e.args[::-1]
        return e.args

    def _leaf(self, expressions: tuple[Expression, ...]) -> Expression | None:
        first = expressions[0]
        if first.op not in ("element", "column", "uniform", "invariant", "state", "noise"):
            return None
        product = first.args[0] if first.op == "element" else None
        if product is not None and any(e.args[0] is not product for e in expressions):
            return None
        places = [e.data[1] if isinstance(e.data, tuple) else e.data for e in expressions]
        stride = places[1] - places[0]
        if any(p != places[0] + j * stride for j, p in enumerate(places)):
            return None
        mapped = Mapped(first.op, places[0], stride, product)
        if mapped not in self._leaves:
            self._leaves[mapped] = self._graph.leaf("mapped", len(self.mapped), first.dtype)
            self.mapped.append(mapped)
        return self._leaves[mapped]


@final
class Forms:
    """Tells expressions that differ in the indices of their leaves alone from others."""

    def __init__(self) -> None:
        self._forms: dict[int, int] = {}
        self._numbers: dict[tuple[object, ...], int] = {}
        self._leaves: dict[int, tuple[tuple[int, ...], ...]] = {}

    def of(self, e: Expression) -> int:
        """A number that such expressions share."""
        form = self._forms.get(e.number)
        if form is None:
            for a in () if e.op == "element" else e.args:
                self.of(a)
            parts = [] if e.op == "element" else [self._forms[a.number] for a in e.args]
            constant = e.data if e.op == "const" else None
            key = (e.op, e.dtype, constant, *(sorted(parts) if e.op in COMMUTATIVE else parts))
            # Numbered as they come: a hash differs from process to process, and with it the order of arguments, the
            # source, and the name under which a kernel is looked for on disk.
            form = self._forms[e.number] = self._numbers.setdefault(key, len(self._numbers))
        return form

    def leaves(self, e: Expression) -> tuple[tuple[int, ...], ...]:
        """Indices of the first few leaves, in order of form."""
        known = self._leaves.get(e.number)
        if known is None:
            if e.op == "element":
                known = ((e.data,),)
            elif not e.args:
                known = (_indices(e.data),)
            else:
                args = sorted(e.args, key=self.of) if e.op in COMMUTATIVE else e.args
                known = tuple(i for a in args for i in self.leaves(a))[:_LEAVES]
            self._leaves[e.number] = known
        return known


_LEAVES = 4


def _indices(data: object) -> tuple[int, ...]:
    if isinstance(data, tuple):
        return tuple(i for i in data if isinstance(i, int))
    return (data,) if isinstance(data, int) and not isinstance(data, bool) else ()
