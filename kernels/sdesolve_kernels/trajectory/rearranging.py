"""Products with several factors that are known early, arranged so that those meet before the launch.

``((x a) dt)`` becomes ``x (a dt)`` and ``(b x) (z s)`` becomes ``x (z (b s))``, where ``a dt`` and ``b s`` are computed
once, in float64: fewer roundings, and half the multiplications of an Euler-Maruyama step. Division by what is known
early becomes multiplication by its reciprocal, which has the same zeros, infinities and nans unless the divisor is
subnormal. Noise is finite, so a zero of a matrix diffusion takes no part in a step. ``(y + x p) + x q`` becomes
``y + x (p + q)``, which rounds once less at the size of ``y``; other sums keep their order.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from sdesolve_kernels.trajectory.expressions import PATH, STATE, TIME, Expression, Graph, topological

__all__ = ["rearranged"]

_FLOATS = ("float32", "float64")
_LATE = STATE | PATH


def rearranged(graph: Graph, roots: Iterable[Expression]) -> list[Expression]:
    """The same values up to rounding."""
    return _sums(graph, _products(graph, _without_zeros(graph, list(roots))))


def _without_zeros(graph: Graph, roots: list[Expression]) -> list[Expression]:
    """Products of a constant 0 with increments of noise, which would be nan if those were not finite."""
    finite: set[int] = set()
    new: dict[int, Expression] = {}
    for e in topological(roots):
        if e.op in ("noise", "time") or (e.op == "mul" and all(a.number in finite for a in e.args)):
            finite.add(e.number)
        zero = e.op == "mul" and any(a.op == "const" and a.data == 0 for a in e.args)
        if zero and any(a.number in finite for a in e.args):
            new[e.number] = graph.const(0, e.dtype)
        else:
            new[e.number] = graph.with_args(e, [new[a.number] for a in e.args]) if e.args else e
    return [new[e.number] for e in roots]


def _products(graph: Graph, roots: list[Expression]) -> list[Expression]:
    order = topological(roots)
    uses = Counter(a.number for e in order for a in e.args)
    uses.update(e.number for e in roots)
    moved: set[int] = set()
    for e in order:
        if e.op == "state" or any(a.number in moved for a in e.args):
            moved.add(e.number)
    rounded: set[int] = set()  # to whole numbers: the last place of what that is done to matters
    for e in reversed(order):
        if e.op in ("floor", "ceil", "trunc", "round", "fmod") or e.number in rounded:
            rounded.update(a.number for a in e.args)
    new: dict[int, Expression] = {}
    for e in order:
        made = graph.with_args(e, [new[a.number] for a in e.args]) if e.args else e
        if e.op in ("mul", "div") and e.dtype in _FLOATS and e.depends & STATE and e.number not in rounded:
            made = _product(graph, e, new, uses, moved) or made
        new[e.number] = made
    return [new[e.number] for e in roots]


def _sums(graph: Graph, roots: list[Expression]) -> list[Expression]:
    order = topological(roots)
    uses = Counter(a.number for e in order for a in e.args)
    uses.update(e.number for e in roots)
    new: dict[int, Expression] = {}
    for e in order:
        made = graph.with_args(e, [new[a.number] for a in e.args]) if e.args else e
        if e.op == "add" and e.dtype in _FLOATS:
            made = _sum(graph, e, new, uses) or made
        new[e.number] = made
    return [new[e.number] for e in roots]


def _sum(graph: Graph, e: Expression, new: dict[int, Expression], uses: Counter[int]) -> Expression | None:
    """``y + f (p + q)`` for ``(y + f p) + f q``; ``None`` if ``e`` is nothing like it."""

    def once(a: Expression, op: str) -> bool:
        return a.op == op and uses[a.number] == 1

    for inner, second in (e.args, e.args[::-1]):
        if not (once(inner, "add") and once(second, "mul")):
            continue
        for rest, first in (inner.args, inner.args[::-1]):
            if not once(first, "mul"):
                continue
            shared = [f for f in first.args if f in second.args and f.depends & STATE]
            if shared and first is not second:
                f = shared[0]
                p, q = (next(a for a in m.args if a is not f or m.args[0] is m.args[1]) for m in (first, second))
                factor = graph.op("add", new[p.number], new[q.number])
                return graph.op("add", new[rest.number], graph.op("mul", new[f.number], factor))
    return None


def _product(
    graph: Graph, e: Expression, new: dict[int, Expression], uses: Counter[int], moved: set[int]
) -> Expression | None:
    """The product of which ``e`` is the last multiplication, rearranged; ``None`` if there is nothing to gain."""
    factors = list(_factors(graph, e, uses, top=True))
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
    late = [f for f in late if f.number not in moved] + [f for f in late if f.number in moved]
    made: Expression | None = None
    for f in [*sorted(early, key=lambda f: f.depends), *path] if steady or not path else [*path, *early]:
        made = f if made is None else graph.op("mul", made, f)
    for f in late:
        f = new[f.number]
        made = f if made is None else graph.op("mul", made, f)
    return made


def _factors(graph: Graph, e: Expression, uses: Counter[int], top: bool = False) -> Iterable[Expression]:
    """Factors of a product, through those products inside it that nothing else uses."""
    if e.depends & STATE and (top or uses[e.number] == 1):
        if e.op == "mul":
            for a in e.args:
                yield from _factors(graph, a, uses)
            return
        if e.op == "div" and not e.args[1].depends & STATE:
            yield from _factors(graph, e.args[0], uses)
            yield graph.op("div", graph.const(1, e.dtype), e.args[1])
            return
    yield e


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
