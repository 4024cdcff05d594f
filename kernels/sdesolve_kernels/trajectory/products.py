"""Sums over lanes as matrix products: which sums of products are entries of outer products of two vectors.

The cotangent of a layer's weights is such a product, whether the layer's matrix is kept whole or was written out; that
of its biases is the sum of one of the vectors.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Mapping, Sequence
from typing import final

from sdesolve_kernels.trajectory.expressions import Expression, Graph

__all__ = ["Block", "Entry", "blocks"]


@final
@dataclasses.dataclass(frozen=True)
class Entry:
    """Where a term of a sum is found: an entry of the product, or, where one index is ``None``, the sum of a row.

    Attributes:
        left: which of the left vector's numbers.
        right: which of the right one's.
        target: the number of the sum.
    """

    left: int | None
    right: int | None
    target: int


@final
@dataclasses.dataclass(frozen=True)
class Block:
    """Two vectors with a number for each lane, and what their outer product, summed over lanes, is part of."""

    left: list[Expression]
    right: list[Expression]
    entries: list[Entry]

    @property
    def size(self) -> int:
        """Numbers of the product, and of the sums of both vectors."""
        return len(self.left) * len(self.right) + len(self.left) + len(self.right)

    def place(self, entry: Entry) -> int:
        """Where an entry lies among those."""
        rows, columns = len(self.left), len(self.right)
        if entry.left is None:
            assert entry.right is not None
            return rows * columns + rows + entry.right
        return rows * columns + entry.left if entry.right is None else entry.left * columns + entry.right

    def sums(self, left: bool) -> bool:
        """Whether sums of the left or right vector are asked for."""
        return any((e.right if left else e.left) is None for e in self.entries)


def blocks(
    graph: Graph,
    sums: Mapping[int, Expression],
    outers: Sequence[tuple[int, Sequence[Expression], Sequence[Expression]]],
) -> list[Block]:
    """All sums as few blocks.

    Args:
        graph: makes expressions.
        sums: by number, what is added to them.
        outers: the number of a matrix' first entry, and the vectors whose outer product is added to it.
    """
    pairs = [
        (a, b, first + i * len(right) + k)
        for first, left, right in outers
        for i, a in enumerate(left)
        for k, b in enumerate(right)
    ]
    terms = [(t, j) for j, e in sums.items() for t in _terms(graph, e)]
    factors = {e.id for a, b, _ in pairs for e in (a, b)} | {a.id for t, _ in terms if t.op == "mul" for a in t.args}
    # A number that is multiplied by others is a number, though it be a product.
    single = [(t, j) for t, j in terms if t.op != "mul" or t.id in factors]
    pairs += [(t.args[0], t.args[1], j) for t, j in terms if t.op == "mul" and t.id not in factors]
    sides = _sides([(a, b) for a, b, _ in pairs])
    of = collections.Counter(sides[i][0] for i in sides)
    products = collections.Counter(component for component, _, _ in {(sides[a.id][0], a.id, b.id) for a, b, _ in pairs})
    found: dict[int, Block] = {}
    index: dict[int, tuple[Block, int]] = {}
    for a, b, j in pairs:
        component = sides[a.id][0]
        if sides[a.id] == sides[b.id] or products[component] <= of[component]:
            # No two vectors have them apart, or vectors would be longer than the products are many.
            single.append((graph.op("mul", a, b), j))
            continue
        if sides[a.id][1]:
            a, b = b, a
        block = found.setdefault(component, Block([], [], []))
        for side, e in ((block.left, a), (block.right, b)):
            if e.id not in index:
                index[e.id] = block, len(side)
                side.append(e)
        block.entries.append(Entry(index[a.id][1], index[b.id][1], j))
    rest = Block([], [], [])
    for e, j in single:
        if e.id not in index:
            index[e.id] = rest, len(rest.left)
            rest.left.append(e)
        block, i = index[e.id]
        right = block is not rest and sides[e.id][1]
        block.entries.append(Entry(None, i, j) if right else Entry(i, None, j))
    return [*found.values(), *([rest] if rest.left else [])]


def _terms(graph: Graph, e: Expression) -> list[Expression]:
    """What is added up in an expression."""
    if e.op in ("add", "sum"):
        return [t for a in e.args for t in _terms(graph, a)]
    if e.op == "sub":
        return _terms(graph, e.args[0]) + [graph.op("neg", t) for t in _terms(graph, e.args[1])]
    return [e]


def _sides(pairs: Sequence[tuple[Expression, Expression]]) -> dict[int, tuple[int, bool]]:
    """For each factor the component of its graph, and whether it is on the right; factors of a pair are apart.

    Where that cannot be, both factors of a pair are on one side.
    """
    others: dict[int, list[int]] = {}
    for a, b in pairs:
        others.setdefault(a.id, []).append(b.id)
        others.setdefault(b.id, []).append(a.id)
    found: dict[int, tuple[int, bool]] = {}
    for start in others:
        if start in found:
            continue
        found[start], waiting = (start, False), [start]
        while waiting:
            i = waiting.pop()
            for other in others[i]:
                if other not in found:
                    found[other] = start, not found[i][1]
                    waiting.append(other)
    return found
