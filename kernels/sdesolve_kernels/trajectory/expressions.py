"""Scalar expressions of one path's step: hash-consed, folded as they are built, each knowing what it depends on.

An expression is made once: two that are built alike are one object, so sharing common subexpressions needs no pass of
its own and equality is identity. Constructors fold constants and drop neutral elements, and nothing else: no rule here
changes a nan, an infinity or the order of a sum, so that generated code does what torch does.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, final

import numpy as np

from sdesolve_kernels.trajectory.leaves import KINDS
from sdesolve_kernels.trajectory.operations import BOOL, F32, F64, FLOATS, I64, OPERATIONS

__all__ = ["BOOL", "F32", "F64", "FLOATS", "I64", "Expression", "Graph", "topological"]


@final
class Expression:
    """One scalar: an operation on others, a constant or a leaf.

    Attributes:
        op: ``const``, the kind of a leaf (`leaves.KINDS`), a row of `operations.OPERATIONS`, ``cast``, or one of what
            `Graph` keeps whole: ``sum``, ``vector``, ``product`` and the ``element`` of those two.
        args: what the operation is applied to.
        data: the value of a constant, the leaf (a class of `leaves`), the matrix of a product, the index of an element.
        dtype: ``float32``, ``float64``, ``int64`` or ``bool``.
        depends: bits `TIME` (the step's times), `PATH` (parameters with a row per path), `STATE` (state or noise).
        id: its place in the order in which the graph made them.
    """

    __slots__ = ("args", "data", "depends", "dtype", "id", "op")

    def __init__(self, op: str, args: tuple[Expression, ...], data: Any, dtype: str, depends: int, id: int) -> None:
        self.op, self.args, self.data, self.dtype, self.depends, self.id = op, args, data, dtype, depends, id

    def __repr__(self) -> str:
        if self.op == "const" or not self.args:
            return repr(self.data)
        return f"{self.op}({', '.join(f'#{a.id}' if a.args else repr(a) for a in self.args)})"


_INT32 = (-(2**31), 2**31 - 1)
_LARGEST_POWER = 16
_LONG_SUM = 8


@final
class Graph:
    """Makes expressions, each once."""

    def __init__(self) -> None:
        self._made: dict[tuple[Any, ...], Expression] = {}
        self._ranges: dict[int, tuple[int, int]] = {}  # of whole numbers that are known to be within one
        self.on_growth: Callable[[], None] = lambda: None  # called now and then while expressions are made

    def __len__(self) -> int:
        return len(self._made)

    def _intern(self, op: str, args: tuple[Expression, ...], data: Any, dtype: str, depends: int) -> Expression:
        # A constant's sign of zero and its being nan are part of what it is; == and hash tell neither.
        name = repr(data) if op == "const" else data
        key = (op, tuple([a.id for a in args]), name, dtype)
        made = self._made.get(key)
        if made is None:
            made = self._made[key] = Expression(op, args, data, dtype, depends, len(self._made))
            if not len(self._made) % 4096:
                self.on_growth()
        return made

    def const(self, value: float | bool, dtype: str) -> Expression:
        """A constant, rounded to ``dtype``."""
        value = bool(value) if dtype == BOOL else int(value) if dtype == I64 else float(value)
        if dtype == F32:
            with np.errstate(over="ignore"):
                value = float(np.float32(value))
        return self._intern("const", (), value, dtype, 0)

    def leaf(self, leaf: Any, dtype: str) -> Expression:
        """An input: an instance of a class of `leaves`."""
        kind, depends = KINDS[type(leaf)]
        return self._intern(kind, (), leaf, dtype, depends)

    def int32_leaf(self, leaf: Any, dtype: str = I64) -> Expression:
        """An input that is within the range of 32 bits."""
        made = self.leaf(leaf, dtype)
        self._ranges[made.id] = _INT32
        return made

    def vector(self, entries: Sequence[Expression], rows: tuple[int, int] | None = None) -> Expression:
        """Expressions of one type that are computed side by side.

        Args:
            entries: the expressions.
            rows: where they go, if that is given: the first row, and how many from one to the next.
        """
        depends = 0
        for e in entries:
            depends |= e.depends
        return self._intern("vector", tuple(entries), rows, entries[0].dtype, depends)

    def element(self, product: Expression, i: int) -> Expression:
        """Entry ``i`` of a matrix-vector product, or of a vector."""
        return self._intern("element", (product,), i, product.dtype, product.depends)

    def product(self, matrix: Any, vector: Sequence[Expression], dtype: str) -> Expression:
        """A matrix-vector product kept whole: ``matrix`` names its entries (`matrices.Matrix`)."""
        depends = 0
        for v in vector:
            depends |= v.depends
        return self._intern("product", tuple(vector), matrix, dtype, depends)

    def sum(self, terms: Sequence[Expression], dtype: str) -> Expression:
        """Terms added up in order; a long sum is one expression."""
        if len(terms) < _LONG_SUM:
            return functools.reduce(lambda a, b: self.op("add", a, b), terms) if terms else self.const(0, dtype)
        depends = 0
        for a in terms:
            depends |= a.depends
        return self._intern("sum", tuple(terms), None, dtype, depends)

    def cast(self, a: Expression, dtype: str) -> Expression:
        """``a`` in another type, as ``Tensor.to``."""
        if a.dtype == dtype:
            return a
        if a.op == "const":
            return self.const(a.data, dtype) if dtype != BOOL else self.const(a.data != 0, BOOL)
        if dtype == BOOL:
            return self.op("ne", a, self.const(0, a.dtype))
        if a.dtype == BOOL:
            return self.op("where", a, self.const(1, dtype), self.const(0, dtype))
        if a.op == "cast" and a.dtype == F64 and a.args[0].dtype == dtype == F32:  # there and back, exactly
            return a.args[0]
        return self._intern("cast", (a,), None, dtype, a.depends)

    def op(self, name: str, *args: Expression) -> Expression:
        """The operation ``name`` on arguments of one type (``where``: a bool and two of one type)."""
        row = OPERATIONS[name]
        dtype = BOOL if row.truth else args[-1].dtype
        if all(a.op == "const" for a in args) and (dtype != I64 or row.exact):
            with np.errstate(all="ignore"):
                return self.const(row.fold(*(a.data for a in args)), dtype)
        simplified = _SIMPLIFIED.get(name)
        if simplified is not None:
            simple = simplified(self, dtype, *args)
            if simple is not None:
                return simple
        if row.commutative and args[0].id > args[1].id:
            args = (args[1], args[0])
        depends = 0
        for a in args:
            depends |= a.depends
        made = self._intern(name, args, None, dtype, depends)
        if dtype == I64:
            self._note_range(made)
        return made

    def rebuilt(self, roots: Iterable[Expression], change: Callable[[Expression], Expression]) -> list[Expression]:
        """The same expressions over changed leaves."""
        new: dict[int, Expression] = {}
        roots = list(roots)
        for e in topological(roots):
            new[e.id] = self.with_args(e, [new[a.id] for a in e.args]) if e.args else change(e)
        return [new[e.id] for e in roots]

    def is_int32(self, a: Expression) -> bool:
        """Whether a whole number is known to be within the range of 32 bits."""
        known = self._range(a)
        return known is not None and _INT32[0] <= known[0] and known[1] <= _INT32[1]

    def _range(self, a: Expression) -> tuple[int, int] | None:
        return (a.data, a.data) if a.op == "const" else self._ranges.get(a.id)

    def _note_range(self, e: Expression) -> None:
        """Intervals of what is made of numbers within intervals."""
        if e.op == "wrap32":
            self._ranges[e.id] = _INT32
        parts = [self._range(a) for a in e.args if a.dtype == I64]
        known = [p for p in parts if p is not None]
        if len(known) < len(parts) or e.op not in ("add", "sub", "neg", "mul", "where"):
            return
        (low, high), (first, last) = known[0], known[-1]
        ends = {
            "add": (low + first, high + last),
            "sub": (low - last, high - first),
            "neg": (-high, -low),
            "mul": (low * first, low * last, high * first, high * last),
            "where": (low, high, first, last),
        }[e.op]
        if max(map(abs, ends)) < 2**63:  # else int64 may have wrapped
            self._ranges[e.id] = min(ends), max(ends)

    def with_args(self, e: Expression, args: Sequence[Expression]) -> Expression:
        """The operation of ``e`` on other arguments."""
        if all(a is b for a, b in zip(args, e.args, strict=True)):
            return e
        if e.op == "element":
            return self.element(args[0], e.data)
        if e.op == "product":
            return self.product(e.data, args, e.dtype)
        if e.op == "sum":
            return self.sum(args, e.dtype)
        if e.op == "vector":
            return self.vector(args, e.data)
        if e.op == "cast":
            return self.cast(args[0], e.dtype)
        return self.op(e.op, *args)


def _is(a: Expression, value: float) -> bool:
    return a.op == "const" and a.data == value and a.dtype != BOOL


def _power_of_two(value: float) -> bool:
    return value != 0 and math.isfinite(value) and math.frexp(abs(value))[0] == 0.5 and abs(value) < 2.0**100


def _add(g: Graph, dtype: str, a: Expression, b: Expression) -> Expression | None:
    if _is(a, 0) or _is(b, 0):
        return b if _is(a, 0) else a
    if b.op == "neg":
        return g.op("sub", a, b.args[0])
    return g.op("sub", b, a.args[0]) if a.op == "neg" else None


def _sub(g: Graph, dtype: str, a: Expression, b: Expression) -> Expression | None:
    if _is(b, 0):
        return a
    if _is(a, 0) and (dtype == I64 or math.copysign(1.0, a.data) < 0):  # 0 - 0 is 0, not -0
        return g.op("neg", b)
    return g.op("add", a, b.args[0]) if b.op == "neg" else None


def _mul(g: Graph, dtype: str, a: Expression, b: Expression) -> Expression | None:
    if _is(a, 1) or _is(b, 1):
        return b if _is(a, 1) else a
    if _is(a, -1) or _is(b, -1):
        return g.op("neg", b if _is(a, -1) else a)
    return g.op("mul", a.args[0], b.args[0]) if a.op == "neg" and b.op == "neg" else None


def _div(g: Graph, dtype: str, a: Expression, b: Expression) -> Expression | None:
    if _is(b, 1):
        return a
    if _is(b, -1):
        return g.op("neg", a)
    return g.op("mul", a, g.const(1.0 / b.data, dtype)) if b.op == "const" and _power_of_two(b.data) else None


def _inverse(name: str) -> Callable[..., Expression | None]:
    return lambda g, dtype, a: a.args[0] if a.op == name else None


def _where(g: Graph, dtype: str, condition: Expression, a: Expression, b: Expression) -> Expression | None:
    if condition.op == "const":
        return a if condition.data else b
    return a if a is b else None


def _truth(absorbing: bool) -> Callable[..., Expression | None]:
    """Of ``and`` (``or``), which one argument that is false (true) decides."""

    def simplified(g: Graph, dtype: str, a: Expression, b: Expression) -> Expression | None:
        for known, other in ((a, b), (b, a)):
            if known.op == "const":
                return known if known.data is absorbing else other
        return a if a is b else None

    return simplified


def _same(g: Graph, dtype: str, a: Expression, b: Expression) -> Expression | None:
    return a if a is b else None


def _pow(g: Graph, dtype: str, a: Expression, b: Expression) -> Expression | None:
    """``a^n`` for small whole and half ``n`` by multiplication and square root."""
    if b.op != "const":
        return None
    exponent = b.data
    if exponent == 0.5:
        return g.op("sqrt", a)
    if exponent == -0.5:
        return g.op("div", g.const(1, dtype), g.op("sqrt", a))
    if not abs(exponent) <= _LARGEST_POWER or exponent != int(exponent):
        return None
    n = abs(int(exponent))
    result, square = g.const(1, dtype), a
    while n:
        if n & 1:
            result = g.op("mul", result, square)
        n >>= 1
        square = g.op("mul", square, square) if n else square
    return g.op("div", g.const(1, dtype), result) if exponent < 0 else result


_SIMPLIFIED: dict[str, Callable[..., Expression | None]] = {
    "add": _add,
    "sub": _sub,
    "mul": _mul,
    "div": _div,
    "neg": _inverse("neg"),
    "not": _inverse("not"),
    "where": _where,
    "and": _truth(False),
    "or": _truth(True),
    "pow": _pow,
    "detach": lambda g, dtype, a: a if dtype not in FLOATS or a.op == "detach" else None,
    "wrap32": lambda g, dtype, a: a if g.is_int32(a) else None,
    **dict.fromkeys(("min", "max", "clamp_min", "clamp_max"), _same),
}


def topological(
    roots: Iterable[Expression], args: Callable[[Expression], Sequence[Expression]] | None = None
) -> list[Expression]:
    """Everything the roots need, arguments before what uses them.

    Args:
        roots: where to start.
        args: what an expression needs, if that is not its arguments.
    """
    seen: set[int] = set()
    order: list[Expression] = []
    for root in roots:
        stack: list[tuple[Expression, bool]] = [(root, False)]
        while stack:
            e, ready = stack.pop()
            if ready:
                order.append(e)
            elif e.id not in seen:
                seen.add(e.id)
                stack.append((e, True))
                for a in reversed(e.args if args is None else args(e)):
                    if a.id not in seen:
                        stack.append((a, False))
    return order
