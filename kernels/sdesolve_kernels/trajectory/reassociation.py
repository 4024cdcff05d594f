"""Reassociates products with several factors that are known early, so that those meet before the launch.

``((x a) dt)`` becomes ``x (a dt)`` and ``(b x) (z s)`` becomes ``x (z (b s))``, where ``a dt`` and ``b s`` are computed
once, in float64: fewer roundings, and half the multiplications of an Euler-Maruyama step. Division by what is known
early becomes multiplication by its reciprocal, which has the same zeros, infinities and nans unless the divisor is
subnormal. Noise is finite, so a zero of a matrix diffusion takes no part in a step. ``(y + x p) + x q`` becomes
``y + x (p + q)``, which rounds once less at the size of ``y``; other sums keep their order.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Iterator

from sdesolve_kernels.trajectory.expressions import FLOATS, Expression, Graph, topological
from sdesolve_kernels.trajectory.leaves import PATH, STATE, TIME
from sdesolve_kernels.trajectory.operations import OPERATIONS

__all__ = ["reassociated"]

_LATE = STATE | PATH
_MOST_FACTORS = 64  # of a product that is gone through; for a chain of n products the work would grow as n^2


def reassociated(graph: Graph, roots: Iterable[Expression]) -> list[Expression]:
    """The same values up to rounding."""
    return _sums(graph, _products(graph, _without_zeros(graph, list(roots))))


def _without_zeros(graph: Graph, roots: list[Expression]) -> list[Expression]:
    """Products of a constant 0 with increments of noise, which would be nan if those were not finite."""
    finite: set[int] = set()
    new: dict[int, Expression] = {}
    for e in topological(roots):
        if e.op in ("noise", "time") or (e.op == "mul" and all(a.id in finite for a in e.args)):
            finite.add(e.id)
        zero = e.op == "mul" and any(a.op == "const" and a.data == 0 for a in e.args)
        if zero and any(a.id in finite for a in e.args):
            new[e.id] = graph.const(0, e.dtype)
        else:
            new[e.id] = graph.with_args(e, [new[a.id] for a in e.args]) if e.args else e
    return [new[e.id] for e in roots]


def _products(graph: Graph, roots: list[Expression]) -> list[Expression]:
    order = topological(roots)
    uses = Counter(a.id for e in order for a in e.args)
    uses.update(e.id for e in roots)
    moved: set[int] = set()
    for e in order:
        if e.op == "state" or any(a.id in moved for a in e.args):
            moved.add(e.id)
    rounded: set[int] = set()  # to whole numbers: the last place of what that is done to matters
    for e in reversed(order):
        if e.id in rounded or (e.op in OPERATIONS and OPERATIONS[e.op].rounds):
            rounded.update(a.id for a in e.args)
    new: dict[int, Expression] = {}
    for e in order:
        made = graph.with_args(e, [new[a.id] for a in e.args]) if e.args else e
        if e.op in ("mul", "div") and e.dtype in FLOATS and e.depends & STATE and e.id not in rounded:
            made = _product(graph, e, new, uses, moved) or made
        new[e.id] = made
    return [new[e.id] for e in roots]


def _sums(graph: Graph, roots: list[Expression]) -> list[Expression]:
    order = topological(roots)
    uses = Counter(a.id for e in order for a in e.args)
    uses.update(e.id for e in roots)
    new: dict[int, Expression] = {}
    for e in order:
        made = graph.with_args(e, [new[a.id] for a in e.args]) if e.args else e
        if e.op == "add" and e.dtype in FLOATS:
            made = _sum(graph, e, new, uses) or made
        new[e.id] = made
    return [new[e.id] for e in roots]


def _sum(graph: Graph, e: Expression, new: dict[int, Expression], uses: Counter[int]) -> Expression | None:
    """``y + f (p + q)`` for ``(y + f p) + f q``; ``None`` if ``e`` is nothing like it."""
    for y, f, p, q in _shared_factors(e, uses):
        factor = graph.op("add", new[p.id], new[q.id])
        return graph.op("add", new[y.id], graph.op("mul", new[f.id], factor))
    return None


def _shared_factors(e: Expression, uses: Counter[int]) -> Iterator[tuple[Expression, ...]]:
    """``y, f, p, q`` for each way to read a sum as ``(y + f p) + f q``, with all three parts used by it alone."""
    for inner, second in itertools.permutations(e.args):
        if inner.op != "add" or second.op != "mul" or uses[inner.id] != 1 or uses[second.id] != 1:
            continue
        for y, first in itertools.permutations(inner.args):
            if first.op == "mul" and uses[first.id] == 1 and first is not second:
                for (f, p), (g, q) in itertools.product(*map(itertools.permutations, (first.args, second.args))):
                    if f is g and f.depends & STATE:
                        yield y, f, p, q


def _product(
    graph: Graph, e: Expression, new: dict[int, Expression], uses: Counter[int], moved: set[int]
) -> Expression | None:
    """The product of which ``e`` is the last multiplication, reassociated; ``None`` if there is nothing to gain."""
    factors = list(itertools.islice(_factors(graph, e, uses), _MOST_FACTORS + 1))
    if len(factors) > _MOST_FACTORS:
        return None
    early = [f for f in factors if not f.depends & _LATE]
    path = [f for f in factors if f.depends & _LATE == PATH]
    late = [f for f in factors if f.depends & STATE]
    if not _finite(graph, early):
        return None
    steady = early and not any(f.depends & TIME for f in early)
    divided = e.op == "div" and not e.args[1].depends & STATE
    if len(early) < 2 and len(path) < 2 and not (path and steady) and not divided:
        return None
    # What the state enters goes last: the rest can be computed while the step before is still under way.
    late = [f for f in late if f.id not in moved] + [f for f in late if f.id in moved]
    made: Expression | None = None
    for f in [*sorted(early, key=lambda f: f.depends), *path] if steady or not path else [*path, *early]:
        made = f if made is None else graph.op("mul", made, f)
    for f in late:
        f = new[f.id]
        made = f if made is None else graph.op("mul", made, f)
    return made


def _factors(graph: Graph, e: Expression, uses: Counter[int]) -> Iterator[Expression]:
    """Factors of a product, through those products inside it that nothing else uses."""
    stack = [(e, False)]
    while stack:
        f, divides = stack.pop()
        if divides:
            yield graph.op("div", graph.const(1, e.dtype), f)
        elif f.depends & STATE and (f is e or uses[f.id] == 1) and f.op == "mul":
            stack += [(a, False) for a in reversed(f.args)]
        elif f.depends & STATE and (f is e or uses[f.id] == 1) and f.op == "div" and not f.args[1].depends & STATE:
            stack += [(f.args[1], True), (f.args[0], False)]
        else:
            yield f


def _finite(graph: Graph, factors: Iterable[Expression]) -> bool:
    """Whether constants among some factors multiply to a number: torch might not multiply them with each other."""
    product = graph.const(1, "float64")
    for f in factors:
        if f.op == "const":
            product = graph.op("mul", product, graph.const(f.data, "float64"))
            if not _TINY < abs(product.data) < _HUGE:
                return False
    return True


_TINY, _HUGE = 1e-30, 1e30
