"""The compiler's operations on scalars, one row each.

A row says what an operation computes (on Python numbers and on tensors), how Numba and Triton spell it, and how it is
differentiated. Everything else in this package reads the rows: constant folding, evaluation, code generation,
rerolling, reassociation, derivatives, the reference back end. To add an operation, add a row to `OPERATIONS`; the tests
of ``tests/trajectory/test_operation_table.py`` run over all rows.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, final

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from sdesolve_kernels.trajectory.expressions import Expression, Graph

__all__ = ["BOOL", "F32", "F64", "FLOATS", "I64", "OPERATIONS", "OpSpec", "Term"]

F32, F64, I64, BOOL = "float32", "float64", "int64", "bool"
FLOATS = (F32, F64)


@final
@dataclasses.dataclass(frozen=True, slots=True)
class Term:
    """An expression with Python's operators, so that rules read as formulas; numbers take the type of what they meet.

    Attributes:
        graph: makes the expressions.
        e: the expression.
    """

    graph: Graph
    e: Expression

    def _op(self, name: str, *others: Term | float, first: bool = True) -> Term:
        made = [o.e if isinstance(o, Term) else self.graph.const(o, self.e.dtype) for o in others]
        return Term(self.graph, self.graph.op(name, *([self.e, *made] if first else [*made, self.e])))

    def __add__(self, other: Term | float) -> Term:
        return self._op("add", other)

    def __sub__(self, other: Term | float) -> Term:
        return self._op("sub", other)

    def __rsub__(self, other: float) -> Term:
        return self._op("sub", other, first=False)

    def __mul__(self, other: Term | float) -> Term:
        return self._op("mul", other)

    def __truediv__(self, other: Term | float) -> Term:
        return self._op("div", other)

    def __rtruediv__(self, other: float) -> Term:
        return self._op("div", other, first=False)

    def __neg__(self) -> Term:
        return self._op("neg")

    def __and__(self, other: Term) -> Term:
        return self._op("and", other)

    def __or__(self, other: Term) -> Term:
        return self._op("or", other)

    __radd__, __rmul__ = __add__, __mul__

    def __getattr__(self, name: str) -> Callable[..., Term]:
        if name not in OPERATIONS:
            raise AttributeError(name)
        return lambda *others: self._op(name, *others)

    def like(self, value: float) -> Term:
        """A constant of this type."""
        return Term(self.graph, self.graph.const(value, self.e.dtype))

    def where(self, a: Term | float, b: Term | float) -> Term:
        """``a`` where this condition holds, else ``b``; one of them is a term."""
        like = a if isinstance(a, Term) else b
        assert isinstance(like, Term)
        choices = [x.e if isinstance(x, Term) else self.graph.const(x, like.e.dtype) for x in (a, b)]
        return Term(self.graph, self.graph.op("where", self.e, *choices))


# What a change ``v`` of one argument does to the result, and a change of the result to the argument (for scalars these
# are the same linear function): ``rule(v, result, *arguments)``.
Rule = Callable[..., Term]


@final
@dataclasses.dataclass(frozen=True)
class OpSpec:
    """An operation on scalars of one type (``where``: a truth value and two of one type).

    Attributes:
        name: as in `Expression.op`.
        fold: its value for Python numbers.
        torch: its value for tensors.
        numba: its text in a Numba kernel, with ``{0}``, ``{1}`` for arguments and ``{dtype}`` for their type.
        triton: likewise.
        derivatives: a rule for each argument; ``None`` where the derivative is 0 wherever there is one.
        truth: the result is a truth value, whatever the arguments are.
        operator: the text is an operator, whose arguments need brackets.
        commutative: arguments can be exchanged.
        unordered: they can be exchanged in the text alone: the value is the same, the derivative is not.
        jump: a last digit of an argument can change the result by more than a last digit.
        rounds: the result is a whole number, or what is left of one.
        exact: it is exact on whole numbers, and folded.
        expansion: for an operation that kernels have no text for, the same in terms of others.
    """

    name: str
    fold: Callable[..., Any]
    torch: Callable[..., Tensor]
    numba: str
    triton: str
    derivatives: tuple[Rule | None, ...]
    truth: bool = False
    operator: bool = False
    commutative: bool = False
    unordered: bool = False
    jump: bool = False
    rounds: bool = False
    exact: bool = False
    expansion: Callable[..., Expression] | None = None

    @property
    def arity(self) -> int:
        """How many arguments it takes."""
        return len(self.derivatives)


def _operator(
    name: str, symbol: str, fold: Callable[..., Any], torch: Callable[..., Tensor], *rules: Rule | None, **flags: Any
) -> OpSpec:
    """A row of an operator that both targets spell alike."""
    text = f"({symbol}{{0}})" if len(rules) == 1 else f"({{0}} {symbol} {{1}})"
    return OpSpec(name, fold, torch, text, text, rules, operator=True, **flags)


def _function(
    name: str,
    fold: Callable[..., Any],
    torch: Callable[..., Tensor],
    *rules: Rule | None,
    numba: str = "",
    triton: str = "",
    **flags: Any,
) -> OpSpec:
    """A row of a function; the targets' names for it, where they are others."""
    places = ", ".join(f"{{{i}}}" for i in range(len(rules)))
    numba, triton = numba or f"{name}_{{dtype}}", triton or name
    return OpSpec(name, fold, torch, f"{numba}({places})", f"{triton}({places})", rules, **flags)


def _comparison(name: str, symbol: str, fold: Callable[..., Any], torch: Callable[..., Tensor], **flags: Any) -> OpSpec:
    return _operator(name, symbol, fold, torch, None, None, truth=True, jump=True, **flags)


def _round_to(name: str, fold: Callable[..., Any], torch: Callable[..., Tensor], triton: str = "") -> OpSpec:
    return _function(name, fold, torch, None, triton=triton, jump=True, rounds=True)


def _of_power(v: Term, out: Term, a: Term, b: Term) -> Term:
    return b.eq(0.0).where(0.0, v * (b * a.pow(b - 1)))


def _of_exponent(v: Term, out: Term, a: Term, b: Term) -> Term:
    return v * (a.eq(0.0) & b.ge(0.0)).where(0.0, out * a.log())


def _inverse_square(a: Term, b: Term) -> Term:
    """``1 / (a^2 + b^2)``, and 0 at the origin."""
    square = a * a + b * b
    return square.eq(0.0).where(0.0, 1 / square)


def _of_extreme(other_side: str) -> Callable[[Term, Term, Term], Term]:
    """Of the larger or smaller of two; both have half if they are equal."""
    return lambda v, a, b: getattr(a, other_side)(b).where(0.0, a.eq(b).where(v / 2, v))


_of_max, _of_min = _of_extreme("lt"), _of_extreme("gt")


def _of_tied(other_side: str, first: bool) -> Rule:
    """Of the larger or smaller of two, the first of which is shared by ``n`` entries; all have the same if they tie."""

    def rule(v: Term, out: Term, a: Term, b: Term, n: Term) -> Term:
        mine, other = (a, b) if first else (b, a)
        share = n / (n + 1) if first else 1 / (n + 1)
        return getattr(mine, other_side)(other).where(0.0, mine.eq(other).where(v * share, v))

    return rule


def _tied(name: str, fold: Callable[..., Any], torch: Callable[..., Tensor]) -> OpSpec:
    """`min` or `max` of several numbers one after another; the third argument counts those that are the extreme."""
    side = {"min": "gt", "max": "lt"}[name]
    return OpSpec(
        f"tied_{name}", lambda a, b, n: fold(a, b), lambda a, b, n: torch(a, b), "", "",
        (_of_tied(side, True), _of_tied(side, False), None), expansion=lambda g, a, b, n: g.op(name, a, b),
    )  # fmt: skip


def _wrap32(a: Any) -> Any:
    """A whole number as 32 bits hold it, in two's complement."""
    return (a + 2**31) % 2**32 - 2**31


_WRAP32 = f"((({{0}} + {2**31}) & {2**32 - 1}) - {2**31})"


def _fmod_by_steps(g: Graph, first: Expression, second: Expression) -> Expression:
    """``a - b trunc(a / b)``, of the sign of ``a``; one step mends a quotient that was rounded up to a whole number.

    Exact where ``a - q b`` is one fused multiply-add.
    """
    a, b = first, second
    zero = g.const(0.0, a.dtype)
    size, step = g.op("abs", a), g.op("abs", b)
    left = g.op("sub", size, g.op("mul", g.op("trunc", g.op("div", size, step)), step))
    left = g.op("where", g.op("lt", left, zero), g.op("add", left, step), left)
    # A finite number is smaller than infinity, and is what remains of it.
    small = g.op("and", g.op("lt", size, step), g.op("eq", step, g.const(float("inf"), a.dtype)))
    left = g.op("where", small, size, left)
    return g.op("where", g.op("lt", a, zero), g.op("neg", left), left)


# fmt: off
_ROWS = (
    _operator("add", "+", lambda a, b: a + b, torch.add, lambda v, out, a, b: v, lambda v, out, a, b: v,
              commutative=True, exact=True),
    _operator("sub", "-", lambda a, b: a - b, torch.sub, lambda v, out, a, b: v, lambda v, out, a, b: -v, exact=True),
    _operator("mul", "*", lambda a, b: a * b, torch.mul, lambda v, out, a, b: v * b, lambda v, out, a, b: v * a,
              commutative=True, exact=True),
    _operator("div", "/", np.divide, torch.div, lambda v, out, a, b: v / b, lambda v, out, a, b: -v * (out / b)),
    _operator("neg", "-", lambda a: -a, torch.neg, lambda v, out, a: -v, exact=True),
    _function("fma", lambda a, b, c: a * b + c, lambda a, b, c: a * b + c, lambda v, out, a, b, c: v * b,
              lambda v, out, a, b, c: v * a, lambda v, out, a, b, c: v, numba="fma", triton="tl.fma"),
    _function("abs", abs, torch.abs, lambda v, out, a: v * a.sign(), triton="tl.abs", exact=True),
    _function("sign", lambda a: (a > 0) - (a < 0), torch.sign, None, jump=True),
    _function("sqrt", np.sqrt, torch.sqrt, lambda v, out, a: v / (2 * out), numba="sqrt", triton="tl.sqrt"),
    _function("pow", np.power, torch.pow, _of_power, _of_exponent, triton="power"),
    _function("exp", np.exp, torch.exp, lambda v, out, a: v * out),
    _function("expm1", np.expm1, torch.expm1, lambda v, out, a: v * (out + 1)),
    _function("log", np.log, torch.log, lambda v, out, a: v / a),
    _function("log1p", np.log1p, torch.log1p, lambda v, out, a: v / (a + 1)),
    _function("sin", np.sin, torch.sin, lambda v, out, a: v * a.cos()),
    _function("cos", np.cos, torch.cos, lambda v, out, a: -v * a.sin()),
    _function("tan", np.tan, torch.tan, lambda v, out, a: v * (1 + out * out)),
    _function("tanh", np.tanh, torch.tanh, lambda v, out, a: v * (1 - out * out)),
    _function("sinh", np.sinh, torch.sinh, lambda v, out, a: v * a.cosh()),
    _function("cosh", np.cosh, torch.cosh, lambda v, out, a: v * a.sinh()),
    _function("asin", np.arcsin, torch.asin, lambda v, out, a: v / (1 - a * a).sqrt()),
    _function("acos", np.arccos, torch.acos, lambda v, out, a: -v / (1 - a * a).sqrt()),
    _function("atan", np.arctan, torch.atan, lambda v, out, a: v / (a * a + 1)),
    _function("atan2", np.arctan2, torch.atan2, lambda v, out, a, b: v * b * _inverse_square(a, b),
              lambda v, out, a, b: v * -a * _inverse_square(a, b)),
    _function("erf", math.erf, torch.erf, lambda v, out, a: v * (-(a * a)).exp() * (2 / math.pi**0.5)),
    OpSpec("fmod", np.fmod, torch.fmod, "", "", (lambda v, out, a, b: v, lambda v, out, a, b: -v * (a / b).trunc()),
           jump=True, rounds=True, expansion=_fmod_by_steps),
    _function("min", np.minimum, torch.minimum, lambda v, out, a, b: _of_min(v, a, b),
              lambda v, out, a, b: _of_min(v, b, a), numba="minimum_{dtype}", triton="minimum",
              commutative=True, exact=True),
    _function("max", np.maximum, torch.maximum, lambda v, out, a, b: _of_max(v, a, b),
              lambda v, out, a, b: _of_max(v, b, a), numba="maximum_{dtype}", triton="maximum",
              commutative=True, exact=True),
    # The value of min and max, but a limit has no share in the gradient until it is passed.
    _function("clamp_max", np.minimum, lambda a, limit: a.clamp(max=limit),
              lambda v, out, a, limit: a.le(limit).where(v, 0.0),
              lambda v, out, a, limit: a.gt(limit).where(v, 0.0), numba="minimum_{dtype}", triton="minimum",
              unordered=True, exact=True),
    _function("clamp_min", np.maximum, lambda a, limit: a.clamp(min=limit),
              lambda v, out, a, limit: a.ge(limit).where(v, 0.0),
              lambda v, out, a, limit: a.lt(limit).where(v, 0.0), numba="maximum_{dtype}", triton="maximum",
              unordered=True, exact=True),
    _round_to("floor", np.floor, torch.floor, "tl.floor"),
    _round_to("ceil", np.ceil, torch.ceil, "tl.ceil"),
    _round_to("trunc", np.trunc, torch.trunc),
    _round_to("round", np.round, torch.round, "nearest"),
    _comparison("lt", "<", lambda a, b: a < b, torch.lt),
    _comparison("le", "<=", lambda a, b: a <= b, torch.le),
    _comparison("gt", ">", lambda a, b: a > b, torch.gt),
    _comparison("ge", ">=", lambda a, b: a >= b, torch.ge),
    _comparison("eq", "==", lambda a, b: a == b, torch.eq, commutative=True),
    _comparison("ne", "!=", lambda a, b: a != b, torch.ne, commutative=True),
    _operator("and", "&", lambda a, b: a and b, torch.logical_and, None, None, truth=True, commutative=True),
    _operator("or", "|", lambda a, b: a or b, torch.logical_or, None, None, truth=True, commutative=True),
    OpSpec("not", lambda a: not a, torch.logical_not, "(not {0})", "(~({0}))", (None,), truth=True),
    _function("where", lambda c, a, b: a if c else b, torch.where, None, lambda v, out, c, a, b: c.where(v, 0.0),
              lambda v, out, c, a, b: c.where(0.0, v), numba="select", triton="tl.where"),
    _tied("min", np.minimum, torch.minimum),
    _tied("max", np.maximum, torch.maximum),
    OpSpec("detach", lambda a: a, torch.detach, "{0}", "{0}", (None,), exact=True),
    OpSpec("wrap32", _wrap32, _wrap32, _WRAP32, _WRAP32, (None,), operator=True, exact=True),
)
# fmt: on
OPERATIONS: dict[str, OpSpec] = {row.name: row for row in _ROWS}
