"""Functions of a few primitive operations each, arranged so that they lose no digits where torch's lose none."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from sdesolve_kernels.trajectory.expressions import I64, Expression, Graph
from sdesolve_kernels.trajectory.operations import Term
from sdesolve_kernels.trajectory.pointwise import handles, pointwise, whole_quotient
from sdesolve_kernels.trajectory.tracing import Traced, Tracer, Unsupported, dtype_name, mapped

_INFINITY = float("inf")


def formula(rule: Callable[..., Term]) -> Callable[..., Expression]:
    """A rule for terms as one for expressions."""
    return lambda g, *args: rule(*(Term(g, a) for a in args)).e


def _sigmoid(a: Term) -> Term:
    one = a.like(1.0)
    return one / (one + (-a).exp())


def _if_nan(a: Term, b: Term, otherwise: Term) -> Term:
    """The one that is a number, if either is none."""
    return a.ne(a).where(b, b.ne(b).where(a, otherwise))


def _signbit(a: Term) -> Term:
    zero = a.like(0)
    if a.e.dtype == I64:
        return a.lt(zero)
    below = (1.0 / a).lt(zero)
    return a.lt(zero) | (a.eq(zero) & below)


pointwise("rsub", formula(lambda a, b: b - a), whole=formula(lambda a, b: b - a))
pointwise("reciprocal", formula(lambda a: 1.0 / a))
pointwise("square", formula(lambda a: a * a), whole=formula(lambda a: a * a))
pointwise("sigmoid", formula(_sigmoid))
pointwise("rsqrt", formula(lambda a: a.like(1.0) / a.sqrt()))
pointwise("relu", formula(lambda a: a.like(0.0).clamp_min(a)))  # so that its derivative at 0 is 0
pointwise("silu", formula(lambda a: a * _sigmoid(a)))
pointwise("exp2", formula(lambda a: a.like(2.0).pow(a)))
pointwise("log2", formula(lambda a: a.log() * 1.4426950408889634))
pointwise("log10", formula(lambda a: a.log() * 0.4342944819032518))
pointwise("isnan", formula(lambda a: a.ne(a)), compare=True)
pointwise("isinf", formula(lambda a: a.abs().eq(_INFINITY)), compare=True)
pointwise("isfinite", formula(lambda a: a.abs().lt(_INFINITY)), compare=True)
pointwise("fmin", formula(lambda a, b: _if_nan(a, b, a.min(b))))
pointwise("fmax", formula(lambda a, b: _if_nan(a, b, a.max(b))))
pointwise("signbit", formula(_signbit), compare=True)


@handles("round")
def rounded(tracer: Tracer, func: Any, a: Traced, *, decimals: int = 0) -> Traced:
    """To the nearest whole number, or to a number of decimals."""
    if not a.dtype.is_floating_point:
        return a
    g = tracer.graph
    scale = g.const(10.0 ** abs(decimals), dtype_name(a.dtype))
    there, back = ("mul", "div") if decimals >= 0 else ("div", "mul")
    return tracer.traced(mapped(lambda x: g.op(back, g.op("round", g.op(there, x, scale)), scale), a.elements), a.dtype)


def _remainder(a: Term, b: Term) -> Term:
    """Of the sign of ``b``."""
    zero, left = a.like(0.0), a.fmod(b)
    other_side = left.lt(zero).ne(b.lt(zero))
    return (left.ne(zero) & other_side).where(left + b, left)


def _whole_remainder(down: bool) -> Callable[..., Expression]:
    return lambda g, a, b: g.op("sub", a, g.op("mul", whole_quotient(g, a, b, down), b))


def _whole_power(g: Graph, a: Expression, b: Expression) -> Expression:
    if b.op != "const" or not 0 <= b.data <= 16:
        raise Unsupported("it raises whole numbers to a power that is not a small constant")
    return functools.reduce(lambda x, _: g.op("mul", x, a), range(b.data), g.const(1, I64))


def _hypot(a: Term, b: Term) -> Term:
    """Scaled by the larger one, so that no square overflows."""
    a, b = a.abs(), b.abs()
    zero, infinity = a.like(0.0), a.like(_INFINITY)
    large = a.max(b)
    ratio = a.min(b) / large
    length = large * (a.like(1.0) + ratio * ratio).sqrt()
    length = large.eq(zero).where(zero, length)
    return (a.eq(infinity) | b.eq(infinity)).where(infinity, length)


_LARGE, _LN2 = 1e9, 0.6931471805599453  # from here on x^2 + 1 is x^2 in either precision


def _asinh(x: Term) -> Term:
    one, size = x.like(1.0), x.abs()
    square = x * x
    root = (square + one).sqrt()
    near = (size + square / (one + root)).log1p()
    far = size.log() + _LN2
    value = size.gt(_LARGE).where(far, near)
    return x.lt(0.0).where(-value, value)


def _acosh(x: Term) -> Term:
    above = x - 1.0
    root = (above * (above + 2.0)).sqrt()
    far = x.log() + _LN2
    return x.abs().gt(_LARGE).where(far, (above + root).log1p())


def _atanh(x: Term) -> Term:
    size, one = x.abs(), x.like(1.0)
    ratio = (size + size) / (one - size)
    value = x.like(0.5) * ratio.log1p()
    return x.lt(0.0).where(-value, value)


# (1 + 2 x) e^(x^2) erfc(x) for x >= 0, Chebyshev series in (x - 3.75) / (x + 3.75); its next term is 1e-17.
_SCALED_ERFC = (
    *(1.17757893456740175, -0.00459005458064647733, -0.0842491333665179156, 0.0592099399981918905),
    *(-0.0266586684353057523, 0.00907499767070526509, -0.00241316354041760819, 0.000490775836525808632),
    *(-0.0000691697330250120637, 4.13902798607301017e-6, 7.74038306619849067e-7, -2.18864010492343957e-7),
    *(1.07649994656709104e-8, 4.5219598112182869e-9, -7.75440020883135111e-10, -6.31808834088668449e-11),
    *(2.8687950109306699e-11, 1.94558685457773472e-13, -9.65469674843343891e-13, 3.25254814814873984e-14),
    *(3.34781194828680539e-14, -1.8645628804193131e-15, -1.25079505306886471e-15),
)


def _scaled_erfc(x: Term) -> Term:
    """``e^(x^2) erfc(x)`` for ``x >= 0``, by Clenshaw's recurrence."""
    pole = x.like(3.75)
    u = (x - pole) / (x + pole)
    u = x.eq(_INFINITY).where(1.0, u)
    twice, after, total = u + u, x.like(0.0), x.like(0.0)
    for c in reversed(_SCALED_ERFC[1:]):
        after, total = total, (twice * total + c) - after
    total = (u * total + _SCALED_ERFC[0]) - after
    return total / (x.like(1.0) + (x + x))


def _square_exponential(x: Term, sign: str) -> Term:
    """``e^(-x^2)`` or ``e^(x^2)``, with the square of a part of ``x`` that has few digits apart: it is exact."""
    part = (x * 64.0).round() * (1.0 / 64.0)
    rest = (x - part) * (x + part)
    square = part * part
    if sign == "minus":
        square, rest = -square, -rest
    value = square.exp() * rest.exp()
    # Far out, the rest of an infinite x would be nan.
    return x.abs().gt(100.0).where(0.0 if sign == "minus" else _INFINITY, value)


def _erfc(x: Term) -> Term:
    half, one = x.like(0.5), x.like(1.0)
    tail = _square_exponential(x, "minus") * _scaled_erfc(x)
    return x.gt(half).where(tail, one - x.erf())


def _erfcx(x: Term) -> Term:
    half = x.like(0.5)
    near = _square_exponential(x, "plus") * (x.like(1.0) - x.erf())
    return x.gt(half).where(_scaled_erfc(x), near)


pointwise("fmod", "fmod", whole=_whole_remainder(False))
pointwise("remainder", formula(_remainder), whole=_whole_remainder(True))
pointwise("pow", "pow", whole=_whole_power)
pointwise("hypot", formula(_hypot))
pointwise("asinh", formula(_asinh))
pointwise("acosh", formula(_acosh))
pointwise("atanh", formula(_atanh))
pointwise("erfc", formula(_erfc))
pointwise("special_erfcx", formula(_erfcx))


@handles("softplus")
def softplus(tracer: Tracer, func: Any, a: Traced, beta: float = 1, threshold: float = 20) -> Traced:
    """``log(1 + exp(beta x)) / beta``, and ``x`` above the threshold."""

    def rule(x: Term) -> Term:
        scaled = x * beta
        smooth = scaled.exp().log1p() / beta
        return scaled.gt(threshold).where(x, smooth)

    return tracer.traced(mapped(functools.partial(formula(rule), tracer.graph), a.elements), a.dtype)


def _within(x: Term, low: float, high: float) -> Term:
    """Between two numbers; its derivative at both is 0, which that of `clamp` is not."""
    return x.like(high).clamp_max(x.like(low).clamp_min(x))


@handles("hardtanh")
def hardtanh(tracer: Tracer, func: Any, a: Traced, min_val: float = -1.0, max_val: float = 1.0) -> Traced:
    """The nearest number between two."""
    if not a.dtype.is_floating_point:
        raise Unsupported("it calls hardtanh of whole numbers; clamp is the same")
    rule = formula(lambda x: _within(x, min_val, max_val))
    return tracer.traced(mapped(functools.partial(rule, tracer.graph), a.elements), a.dtype)


pointwise("hardswish", formula(lambda x: x * _within(x + 3.0, 0.0, 6.0) / 6.0))


@handles("gelu")
def gelu(tracer: Tracer, func: Any, a: Traced, *, approximate: str = "none") -> Traced:
    """``x Phi(x)``, exact or by tanh."""

    def rule(x: Term) -> Term:
        half, unit = x.like(0.5), x.like(1.0)
        if approximate == "tanh":
            inner = ((x + x * x * x * 0.044715) * 0.7978845608028654).tanh()
        else:
            inner = (x * 0.7071067811865476).erf()
        return (half * x) * (unit + inner)

    return tracer.traced(mapped(functools.partial(formula(rule), tracer.graph), a.elements), a.dtype)
