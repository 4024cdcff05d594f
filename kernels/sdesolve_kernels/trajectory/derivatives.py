"""Derivatives of expressions as expressions: forward and reverse accumulation over the rules of `OPERATIONS`.

Rules follow torch where a derivative is not defined: ``abs`` has 0 at 0, the smaller or larger of two equal numbers
passes half to each, rounding and comparisons pass nothing. What is a constant 0 is not propagated: no ``0 * inf`` comes
from inputs that an output does not depend on. Reverse accumulation differs from torch in one place: what a branch of
``where`` passes on where it was not chosen is 0, be its derivative infinite.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from sdesolve_kernels.trajectory.expressions import FLOATS, Expression, Graph, topological
from sdesolve_kernels.trajectory.leaves import Shared
from sdesolve_kernels.trajectory.matrices import Matrix
from sdesolve_kernels.trajectory.operations import OPERATIONS, Term

__all__ = ["Outer", "derivative", "jvp", "vjp"]


class Outer(NamedTuple):
    """The cotangent of a matrix of a product kept whole: that of the result times the vector, an outer product.

    Attributes:
        product: matrix times vector.
        pulled: the transposed matrix times the cotangent of the result.
    """

    product: Expression
    pulled: Expression


def derivative(graph: Graph, e: Expression, i: int) -> Expression:
    """The partial derivative of an operation in its argument ``i``; a constant 0 where it has none.

    Args:
        graph: makes the expression.
        e: a float, an operation on floats (of ``where``, also on a truth value).
        i: which argument.

    Raises:
        ValueError: ``e`` is a leaf, a product kept whole, or no float.
    """
    if not e.args or e.op in ("product", "element") or e.dtype not in FLOATS:
        raise ValueError(f"{e.op} of type {e.dtype} has no partial derivatives; expected an operation on floats")
    made = _applied(graph, e, i, graph.const(1, e.dtype))
    return graph.const(0, e.args[i].dtype) if made is None else made


def vjp(
    graph: Graph,
    roots: Sequence[Expression],
    cotangents: Sequence[Expression],
    wrt: Sequence[Expression],
    outers: list[Outer] | None = None,
) -> list[Expression]:
    """Reverse accumulation: ``sum_i cotangents[i] d roots[i] / d w`` for each ``w`` in ``wrt``.

    Args:
        graph: makes the expressions.
        roots: floats.
        cotangents: one for each root, of its type.
        wrt: leaves, or any expressions that the roots are made of; `Shared` entries may lie in matrices kept whole.
        outers: gets the cotangents of matrices kept whole.

    Raises:
        ValueError: one of ``wrt`` is no float, and has no gradient.
    """
    _check_floats(wrt)
    pulled = _Pulled(graph)
    for root, cotangent in zip(roots, cotangents, strict=True):
        pulled.add(root, cotangent)
    rows: dict[int, dict[int, Expression]] = {}  # of products, the cotangents of their elements
    for e in reversed(topological(roots)):
        if e.op == "product" and e.id in rows:
            made = _pull_product(graph, e, rows[e.id], wrt, pulled)
            if outers is not None:
                outers.append(Outer(e, made))
        elif e.op == "element":
            if e in pulled:
                rows.setdefault(e.args[0].id, {})[e.data] = pulled.total(e)
        elif e in pulled and e.args and e.dtype in FLOATS:
            v, mask = pulled.sum(e)
            for i, a in enumerate(e.args):
                if e.op == "where" and i:
                    chosen = e.args[0] if i == 1 else graph.op("not", e.args[0])
                    pulled.add(a, v, chosen if mask is None else graph.op("and", mask, chosen))
                else:
                    pulled.add(a, _applied(graph, e, i, v), mask)
    return [pulled.total(w) for w in wrt]


class _Pulled:
    """Cotangents found so far, in terms; each counts where its mask holds, if it has one.

    Masks are applied last: a mask on ``v`` alone would leave ``0 / 0`` of ``v / (2 sqrt x)`` where ``x`` is 0.
    """

    def __init__(self, graph: Graph) -> None:
        self._graph = graph
        self._terms: dict[int, list[tuple[Expression, Expression | None]]] = {}

    def __contains__(self, e: Expression) -> bool:
        return e.id in self._terms

    def add(self, e: Expression, v: Expression | None, mask: Expression | None = None) -> None:
        if v is not None and not (v.op == "const" and v.data == 0):
            self._terms.setdefault(e.id, []).append((v, mask))

    def sum(self, e: Expression) -> tuple[Expression, Expression | None]:
        """All terms, and the mask that they share."""
        terms = self._terms.get(e.id, ())
        masks = list(dict.fromkeys(mask for _, mask in terms))
        if len(masks) == 1:
            return self._graph.sum([v for v, _ in terms], e.dtype), masks[0]
        first, second = (*masks, None, None)[:2]
        if len(masks) == 2 and first and second and first is self._graph.op("not", second):  # branches of one choice
            parts = [self._graph.sum([v for v, m in terms if m is mask], e.dtype) for mask in masks]
            return self._graph.op("where", first, *parts), None
        return self._graph.sum([self._masked(v, mask) for v, mask in terms], e.dtype), None

    def total(self, e: Expression) -> Expression:
        """All terms."""
        return self._masked(*self.sum(e))

    def _masked(self, v: Expression, mask: Expression | None) -> Expression:
        return v if mask is None else self._graph.op("where", mask, v, self._graph.const(0, v.dtype))


def jvp(
    graph: Graph,
    roots: Sequence[Expression],
    wrt: Sequence[Expression],
    tangents: Sequence[Expression],
    of_matrix: Callable[[Matrix], Matrix | None] | None = None,
) -> list[Expression]:
    """Forward accumulation: ``sum_w d root / d w tangent(w)`` for each root.

    Args:
        graph, roots, wrt: as for `vjp`.
        tangents: one for each of ``wrt``.
        of_matrix: where those of a matrix kept whole lie, if it has any; else they are looked for in ``wrt``.
    """
    _check_floats(wrt)
    found = {w.id: v for w, v in zip(wrt, tangents, strict=True)}
    rows: dict[int, list[Expression]] = {}
    for e in topological(roots):
        if e.id in found or not e.args or e.dtype not in FLOATS:
            continue
        if e.op == "product":
            rows[e.id] = _push_product(graph, e, wrt, found, of_matrix)
            continue
        if e.op == "element":
            found[e.id] = rows[e.args[0].id][e.data]
            continue
        parts = [_applied(graph, e, i, found[a.id]) for i, a in enumerate(e.args) if a.id in found]
        found[e.id] = graph.sum([p for p in parts if p is not None], e.dtype)
    return [found.get(e.id, graph.const(0, e.dtype)) for e in roots]


def _applied(graph: Graph, e: Expression, i: int, v: Expression) -> Expression | None:
    """What a change ``v`` of argument ``i`` does to ``e``, or of ``e`` to that argument; ``None`` for nothing."""
    a = e.args[i]
    if a.dtype not in FLOATS or e.dtype not in FLOATS or (v.op == "const" and v.data == 0):
        return None
    if e.op == "cast":
        return graph.cast(v, e.dtype if v.dtype == a.dtype else a.dtype)
    if e.op == "sum":
        return v
    rule = OPERATIONS[e.op].derivatives[i]
    return None if rule is None else rule(*(Term(graph, x) for x in (v, e, *e.args))).e


def _entries(e: Expression, wrt: Sequence[Expression]) -> list[tuple[Expression, int, int]]:
    """Those of ``wrt`` that are entries of a product's matrix, with row and column."""
    shared = [w for w in wrt if isinstance(w.data, Shared) and w.data.parameter == e.data.parameter]
    if not shared:
        return []
    places = {e.data.entry(i, j): (i, j) for i in range(e.data.rows) for j in range(e.data.columns)}
    return [(w, *places[w.data.i]) for w in shared if w.data.i in places]


def _pull_product(
    graph: Graph, e: Expression, rows: dict[int, Expression], wrt: Sequence[Expression], pulled: _Pulled
) -> Expression:
    """From the elements of a product to the vector, by the transposed matrix, and to entries of the matrix."""
    zero = graph.const(0, e.dtype)
    made = graph.product(e.data.transposed, [rows.get(i, zero) for i in range(e.data.rows)], e.dtype)
    for j, a in enumerate(e.args):
        pulled.add(a, graph.element(made, j))
    for w, i, j in _entries(e, wrt):
        if i in rows:
            pulled.add(w, graph.op("mul", rows[i], e.args[j]))
    return made


def _push_product(
    graph: Graph,
    e: Expression,
    wrt: Sequence[Expression],
    found: dict[int, Expression],
    of_matrix: Callable[[Matrix], Matrix | None] | None,
) -> list[Expression]:
    """Tangents of the elements of a product."""
    zero = graph.const(0, e.dtype)
    parts: list[list[Expression]] = [[] for _ in range(e.data.rows)]
    if any(a.id in found for a in e.args):
        pushed = graph.product(e.data, [found.get(a.id, zero) for a in e.args], e.dtype)
        parts = [[graph.element(pushed, i)] for i in range(e.data.rows)]
    matrix = None if of_matrix is None else of_matrix(e.data)
    if matrix is not None:
        moved = graph.product(matrix, e.args, e.dtype)
        for i, part in enumerate(parts):
            part.append(graph.element(moved, i))
    for w, i, j in _entries(e, wrt) if of_matrix is None else ():
        parts[i].append(graph.op("mul", found[w.id], e.args[j]))
    return [graph.sum(p, e.dtype) for p in parts]


def _check_floats(wrt: Sequence[Expression]) -> None:
    for w in wrt:
        if w.dtype not in FLOATS:
            raise ValueError(f"{w!r} is of type {w.dtype} and has no gradient; expected float32 or float64")
