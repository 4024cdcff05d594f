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

__all__ = ["BOOL", "F32", "F64", "I64", "PATH", "STATE", "TIME", "Expression", "Graph", "topological"]

F32, F64, I64, BOOL = "float32", "float64", "int64", "bool"
FLOATS = (F32, F64)

# What an expression depends on, besides shared parameters and constants: bits of `Expression.depends`.
TIME, PATH, STATE = 1, 2, 4


@final
class Expression:
    """One scalar: an operation on others, a constant or a leaf.

    Attributes:
        op: ``const``, a kind of leaf (see `Graph`), or the name of an operation.
        args: what the operation is applied to.
        data: the value of a constant; which leaf of its kind.
        dtype: ``float32``, ``float64``, ``int64`` or ``bool``.
        depends: bits `TIME` (the step's times), `PATH` (parameters with a row per path), `STATE` (state or noise).
    """

    __slots__ = ("args", "data", "depends", "dtype", "number", "op")

    def __init__(self, op: str, args: tuple[Expression, ...], data: Any, dtype: str, depends: int, number: int) -> None:
        self.op, self.args, self.data, self.dtype, self.depends, self.number = op, args, data, dtype, depends, number

    def __repr__(self) -> str:
        if self.op == "const":
            return repr(self.data)
        if not self.args:
            return f"{self.op}{self.data}"
        return f"{self.op}({', '.join(map(repr, self.args))})"


_LEAVES = {"state": STATE, "noise": STATE, "time": TIME, "row": TIME, "path": PATH, "shared": 0}
_PLANNED = {"column": TIME, "uniform": 0, "invariant": PATH, "mapped": STATE}
_LEAVES |= _PLANNED

# Operations of one float that are folded by evaluating them in double precision.
_FOLD: dict[str, Callable[..., float]] = {
    "neg": lambda a: -a,
    "abs": abs,
    "sqrt": np.sqrt,
    "exp": np.exp,
    "expm1": np.expm1,
    "log": np.log,
    "log1p": np.log1p,
    "sin": np.sin,
    "cos": np.cos,
    "tan": np.tan,
    "tanh": np.tanh,
    "sinh": np.sinh,
    "cosh": np.cosh,
    "asin": np.arcsin,
    "acos": np.arccos,
    "atan": np.arctan,
    "floor": np.floor,
    "ceil": np.ceil,
    "trunc": np.trunc,
    "round": np.round,
    "sign": np.sign,
    "erf": math.erf,
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul": lambda a, b: a * b,
    "div": np.divide,
    "pow": np.power,
    "atan2": np.arctan2,
    "fmod": np.fmod,
    "min": np.minimum,
    "max": np.maximum,
    "lt": lambda a, b: a < b,
    "le": lambda a, b: a <= b,
    "gt": lambda a, b: a > b,
    "ge": lambda a, b: a >= b,
    "eq": lambda a, b: a == b,
    "ne": lambda a, b: a != b,
    "and": lambda a, b: a and b,
    "or": lambda a, b: a or b,
    "not": lambda a: not a,
}
COMPARISONS = frozenset(("lt", "le", "gt", "ge", "eq", "ne"))
LOGIC = frozenset(("and", "or", "not"))
COMMUTATIVE = frozenset(("add", "mul", "min", "max", "eq", "ne", "and", "or"))
_LARGEST_POWER = 16
_LONG_SUM = 8


@final
class Graph:
    """Makes expressions, each once.

    Leaves, by kind and `Expression.data`:

    - ``state``: ``(row, i)``, component ``i`` of everything carried from step to step;
    - ``noise``: ``(row, i)``, standard normal (or other unit-variance number) ``i`` of the step;
    - ``time``: its name, such as ``"dt"``; ``row``: a column of the solver's own table;
    - ``shared``: ``(parameter, i)``, entry ``i`` of a tensor that all paths share;
    - ``path``: ``(row, parameter, i)``, entry ``i`` of a path's row of a parameter;
    - ``column``, ``uniform``, ``invariant``: what a `plan` has computed beforehand, for each step, for all of them, and
      for each path;
    - ``mapped``: what changes along a loop that `rolling` found.

    ``row`` tells the traced rows of the batch apart; in a finished program it is 0 everywhere.
    """

    def __init__(self) -> None:
        self._made: dict[tuple[Any, ...], Expression] = {}
        self.on_growth: Callable[[], None] = lambda: None  # called now and then while expressions are made

    def __len__(self) -> int:
        return len(self._made)

    def _intern(self, op: str, args: tuple[Expression, ...], data: Any, dtype: str, depends: int) -> Expression:
        # A constant's sign of zero and its being nan are part of what it is; == and hash tell neither.
        name = repr(data) if op == "const" else data
        key = (op, tuple([a.number for a in args]), name, dtype)
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

    def leaf(self, kind: str, data: Any, dtype: str) -> Expression:
        """An input."""
        return self._intern(kind, (), data, dtype, _LEAVES[kind])

    def element(self, product: Expression, i: int) -> Expression:
        """Entry ``i`` of a matrix-vector product."""
        return self._intern("element", (product,), i, product.dtype, product.depends)

    def product(self, matrix: Any, vector: Sequence[Expression], dtype: str) -> Expression:
        """A matrix-vector product kept whole: ``matrix`` names its entries (`matrices.Matrix`)."""
        depends = matrix.depends
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
        dtype = BOOL if name in COMPARISONS or name in LOGIC else args[-1].dtype
        if all(a.op == "const" for a in args) and name != "where" and (dtype != I64 or name in _EXACT):
            with np.errstate(all="ignore"):
                return self.const(_FOLD[name](*(a.data for a in args)), dtype)
        simple = self._simplified(name, args, dtype)
        if simple is not None:
            return simple
        if name in COMMUTATIVE and args[0].number > args[1].number:
            args = (args[1], args[0])
        depends = 0
        for a in args:
            depends |= a.depends
        return self._intern(name, args, None, dtype, depends)

    def _simplified(self, name: str, args: tuple[Expression, ...], dtype: str) -> Expression | None:
        a = args[0]
        b = args[1] if len(args) > 1 else a
        match name:
            case "add" if _is(a, 0) or _is(b, 0):
                return b if _is(a, 0) else a
            case "add" if b.op == "neg":
                return self.op("sub", a, b.args[0])
            case "add" if a.op == "neg":
                return self.op("sub", b, a.args[0])
            case "sub" if _is(b, 0):
                return a
            case "sub" if _is(a, 0) and (dtype == I64 or math.copysign(1.0, a.data) < 0):  # 0 - 0 is 0, not -0
                return self.op("neg", b)
            case "sub" if b.op == "neg":
                return self.op("add", a, b.args[0])
            case "mul" if _is(a, 1) or _is(b, 1):
                return b if _is(a, 1) else a
            case "mul" if _is(a, -1) or _is(b, -1):
                return self.op("neg", b if _is(a, -1) else a)
            case "mul" if a.op == "neg" and b.op == "neg":
                return self.op("mul", a.args[0], b.args[0])
            case "div" if _is(b, 1):
                return a
            case "div" if _is(b, -1):
                return self.op("neg", a)
            case "div" if b.op == "const" and _power_of_two(b.data):
                return self.op("mul", a, self.const(1.0 / b.data, dtype))
            case "neg" if a.op == "neg":
                return a.args[0]
            case "not" if a.op == "not":
                return a.args[0]
            case "where" if a.op == "const":
                return args[1] if a.data else args[2]
            case "where" if args[1] is args[2]:
                return args[1]
            case "pow" if b.op == "const":
                return self._power(a, b.data, dtype)
            case "min" | "max" if a is b:
                return a
        return None

    def _power(self, a: Expression, exponent: float, dtype: str) -> Expression | None:
        """``a^n`` for small whole and half ``n`` by multiplication and square root."""
        if exponent == 0.5:
            return self.op("sqrt", a)
        if exponent == -0.5:
            return self.op("div", self.const(1, dtype), self.op("sqrt", a))
        if exponent != int(exponent) or abs(exponent) > _LARGEST_POWER:
            return None
        n = abs(int(exponent))
        result, square = self.const(1, dtype), a
        while n:
            if n & 1:
                result = self.op("mul", result, square)
            n >>= 1
            square = self.op("mul", square, square) if n else square
        return self.op("div", self.const(1, dtype), result) if exponent < 0 else result

    def rebuilt(self, roots: Iterable[Expression], change: Callable[[Expression], Expression]) -> list[Expression]:
        """The same expressions over changed leaves."""
        new: dict[int, Expression] = {}
        roots = list(roots)
        for e in topological(roots):
            new[e.number] = self.with_args(e, [new[a.number] for a in e.args]) if e.args else change(e)
        return [new[e.number] for e in roots]

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
        if e.op == "cast":
            return self.cast(args[0], e.dtype)
        return self.op(e.op, *args)


_EXACT = frozenset(("add", "sub", "mul", "neg", "abs", "min", "max"))


def _is(a: Expression, value: float) -> bool:
    return a.op == "const" and a.data == value and a.dtype != BOOL


def _power_of_two(value: float) -> bool:
    return value != 0 and math.isfinite(value) and math.frexp(abs(value))[0] == 0.5 and abs(value) < 2.0**100


def topological(roots: Iterable[Expression]) -> list[Expression]:
    """Everything the roots need, arguments before what uses them."""
    seen: set[int] = set()
    order: list[Expression] = []
    for root in roots:
        stack: list[tuple[Expression, bool]] = [(root, False)]
        while stack:
            e, ready = stack.pop()
            if ready:
                order.append(e)
            elif e.number not in seen:
                seen.add(e.number)
                stack.append((e, True))
                stack.extend((a, False) for a in reversed(e.args) if a.number not in seen)
    return order
