"""Finds the loop in a list of expressions that are alike but for an index.

The inputs of a network's layer are as many expressions as it has units, each the same function of entry ``j`` of this
and entry ``j`` of that. Written out they cost a second of compile time for every few dozen; as one loop over ``j``
next to nothing.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections import Counter
from collections.abc import Sequence
from typing import final

from sdesolve_kernels.trajectory.expressions import FLOATS, Expression, Graph, topological
from sdesolve_kernels.trajectory.leaves import (
    Accumulated,
    Column,
    Cotangent,
    LoopInvariant,
    NoiseLeaf,
    PathInvariant,
    State,
    Strided,
)
from sdesolve_kernels.trajectory.operations import OPERATIONS

__all__ = ["FEWEST", "Forms", "Rerolled", "StridedInput", "alike", "reroll", "with_vectors"]

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


_STRIDED = (Column, LoopInvariant, PathInvariant, State, NoiseLeaf, Cotangent, Accumulated)


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


_WHOLE = ("element", "product", "sum", "vector")


def alike(expressions: Sequence[Expression]) -> list[list[int]]:
    """Places of expressions that may make a loop: of one form, with an argument in common where many have one."""
    forms = Forms()
    by_form: dict[int, list[int]] = {}
    for i, e in enumerate(expressions):
        by_form.setdefault(forms.of(e), []).append(i)
    found = []
    for places in by_form.values():
        uses = Counter(a.id for i in places for a in _factors(expressions[i]))
        groups: dict[int | None, list[int]] = {}
        for i in places:
            common = [a.id for a in _factors(expressions[i]) if FEWEST <= uses[a.id] < len(places)]
            groups.setdefault(common[0] if common else None, []).append(i)
        found += [g for g in groups.values() if len(g) >= FEWEST]
    return found


def _factors(e: Expression) -> tuple[Expression, ...]:
    """What an increment of a sum is the product of."""
    return next((a.args for a in e.args if a.op == "mul"), ())


def with_vectors(graph: Graph, roots: Sequence[Expression]) -> list[Expression]:
    """The roots, with lists of expressions that several loops compute made one vector each.

    Loops are found where `reroll` finds them: in products, long sums and vectors. Without this, each would compute the
    activations of a network's layer again, in the layer after it and in the derivatives of both.
    """
    users: dict[tuple[int, ...], set[tuple[int, ...]]] = {}
    lists: dict[tuple[int, ...], tuple[Expression, ...]] = {}
    roots = _with_split_sums(graph, roots)
    for e in topological(roots):
        if e.op in ("product", "sum", "vector") and reroll(graph, e.args) is not None:
            _walk(e, users, lists)
    vectors: dict[int, tuple[Expression, ...]] = {}
    for key, of in sorted(users.items(), key=lambda item: item[0]):
        members = lists[key]
        enough = 2 if members[0].op in _CHEAP else 1
        if len(of) > enough and len(set(key)) == len(key) and not any(m.id in vectors for m in members):
            vectors |= dict.fromkeys(key, members)

    def needs(e: Expression) -> Sequence[Expression]:
        return [a for m in vectors[e.id] for a in m.args] if e.id in vectors else e.args

    new: dict[int, Expression] = {}
    try:
        for e in topological(roots, needs):
            if e.id in new:
                continue
            if e.id not in vectors:
                new[e.id] = graph.with_args(e, [new[a.id] for a in e.args]) if e.args else e
                continue
            members = vectors[e.id]
            made = graph.vector([graph.with_args(m, [new[a.id] for a in m.args]) for m in members])
            new |= {m.id: graph.element(made, j) for j, m in enumerate(members)}
    except KeyError:  # members of a vector that depend on one another
        return list(roots)
    return [new[e.id] for e in roots]


def _with_split_sums(graph: Graph, roots: Sequence[Expression]) -> list[Expression]:
    """Long sums whose terms are not alike as sums of those that are, and of the rest."""
    new: dict[int, Expression] = {}
    for e in topological(roots):
        args = [new[a.id] for a in e.args]
        new[e.id] = made = graph.with_args(e, args) if args else e
        if made.op == "sum" and reroll(graph, args) is None:
            groups = [g for g in alike(args) if reroll(graph, [args[i] for i in g]) is not None]
            inside = {i for g in groups for i in g}
            terms = [a for i, a in enumerate(args) if i not in inside]
            new[e.id] = graph.sum(terms + [graph.sum([args[i] for i in g], e.dtype) for g in groups], e.dtype)
    return [new[e.id] for e in roots]


def _walk(
    user: Expression,
    users: dict[tuple[int, ...], set[tuple[int, ...]]],
    lists: dict[tuple[int, ...], tuple[Expression, ...]],
) -> None:
    """Notes lists of operations that are alike, side by side, below the arguments of an expression."""
    search = _Search(Graph())
    stack: list[tuple[tuple[Expression, ...], tuple[int, ...]]] = [(user.args, (user.id,))]
    while stack:
        members, parent = stack.pop()
        key, e = tuple([m.id for m in members]), members[0]
        if not e.args or e.op in _WHOLE or all(m is e for m in members):
            continue
        if any(m.op != e.op or m.dtype != e.dtype for m in members):
            continue
        known = key in lists
        lists[key] = members
        if e.dtype in FLOATS:
            users.setdefault(key, set()).add(parent)
        if not known:
            columns = zip(*map(search._ordered, members), strict=True)
            stack += [(column, key) for column in columns]


_CHEAP = ("add", "sub", "mul", "neg", "fma", "cast", "where")  # done twice sooner than kept


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
