"""Functions of a few primitive operations each, arranged so that they lose no digits where torch's lose none."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from sdesolve_kernels.trajectory.alike import mapped
from sdesolve_kernels.trajectory.expressions import I64, Expression, Graph
from sdesolve_kernels.trajectory.pointwise import constant, handles, pointwise, whole_quotient
from sdesolve_kernels.trajectory.tracing import Traced, Tracer, Unsupported, dtype_name


def _sigmoid(g: Graph, a: Expression) -> Expression:
    one = constant(g, 1.0, a)
    return g.op("div", one, g.op("add", one, g.op("exp", g.op("neg", a))))


def _rsqrt(g: Graph, a: Expression) -> Expression:
    return g.op("div", constant(g, 1.0, a), g.op("sqrt", a))


def _isnan(g: Graph, a: Expression) -> Expression:
    return g.op("ne", a, a)


def _isinf(g: Graph, a: Expression) -> Expression:
    return g.op("eq", g.op("abs", a), constant(g, float("inf"), a))


def _product(g: Graph, a: Expression, b: Expression) -> Expression:
    return g.op("mul", a, b)


def _difference(g: Graph, a: Expression, b: Expression) -> Expression:
    return g.op("sub", b, a)


def _ramp(g: Graph, a: Expression) -> Expression:
    return g.op("clamp_min", constant(g, 0.0, a), a)  # whose derivative at 0 is 0


pointwise("rsub", _difference, whole=_difference)
pointwise("reciprocal", lambda g, a: g.op("div", constant(g, 1.0, a), a))
pointwise("square", lambda g, a: _product(g, a, a), whole=lambda g, a: _product(g, a, a))
pointwise("sigmoid", _sigmoid)
pointwise("rsqrt", _rsqrt)
pointwise("relu", _ramp)
pointwise("silu", lambda g, a: g.op("mul", a, _sigmoid(g, a)))
pointwise("exp2", lambda g, a: g.op("pow", constant(g, 2.0, a), a))
pointwise("log2", lambda g, a: g.op("mul", g.op("log", a), constant(g, 1.4426950408889634, a)))
pointwise("log10", lambda g, a: g.op("mul", g.op("log", a), constant(g, 0.4342944819032518, a)))
pointwise("isnan", _isnan, compare=True)
pointwise("isinf", _isinf, compare=True)
pointwise("isfinite", lambda g, a: g.op("lt", g.op("abs", a), constant(g, float("inf"), a)), compare=True)


def _if_nan(g: Graph, a: Expression, b: Expression, otherwise: Expression) -> Expression:
    """The one that is a number, if either is none."""
    return g.op("where", _isnan(g, a), b, g.op("where", _isnan(g, b), a, otherwise))


pointwise("fmin", lambda g, a, b: _if_nan(g, a, b, g.op("min", a, b)))
pointwise("fmax", lambda g, a, b: _if_nan(g, a, b, g.op("max", a, b)))


def _signbit(g: Graph, a: Expression) -> Expression:
    zero = constant(g, 0, a)
    if a.dtype == I64:
        return g.op("lt", a, zero)
    below = g.op("lt", g.op("div", constant(g, 1.0, a), a), zero)
    return g.op("or", g.op("lt", a, zero), g.op("and", g.op("eq", a, zero), below))


pointwise("signbit", _signbit, compare=True)


@handles("round")
def rounded(tracer: Tracer, func: Any, a: Traced, *, decimals: int = 0) -> Traced:
    """To the nearest whole number, or to a number of decimals."""
    if not a.dtype.is_floating_point:
        return a
    g = tracer.graph
    scale = g.const(10.0 ** abs(decimals), dtype_name(a.dtype))
    there, back = ("mul", "div") if decimals >= 0 else ("div", "mul")
    return tracer.traced(mapped(lambda x: g.op(back, g.op("round", g.op(there, x, scale)), scale), a.elements), a.dtype)


def _remainder(g: Graph, a: Expression, b: Expression) -> Expression:
    """Of the sign of ``b``."""
    zero, left = constant(g, 0.0, a), g.op("fmod", a, b)
    other_side = g.op("ne", g.op("lt", left, zero), g.op("lt", b, zero))
    return g.op("where", g.op("and", g.op("ne", left, zero), other_side), g.op("add", left, b), left)


def _whole_remainder(down: bool) -> Callable[..., Expression]:
    return lambda g, a, b: g.op("sub", a, g.op("mul", whole_quotient(g, a, b, down), b))


pointwise("fmod", "fmod", whole=_whole_remainder(False))
pointwise("remainder", _remainder, whole=_whole_remainder(True))


def _whole_power(g: Graph, a: Expression, b: Expression) -> Expression:
    if b.op != "const" or not 0 <= b.data <= 16:
        raise Unsupported("it raises whole numbers to a power that is not a small constant")
    return functools.reduce(lambda x, _: g.op("mul", x, a), range(b.data), g.const(1, I64))


pointwise("pow", "pow", whole=_whole_power)


def _hypot(g: Graph, a: Expression, b: Expression) -> Expression:
    """Scaled by the larger one, so that no square overflows."""
    a, b, zero, infinity = g.op("abs", a), g.op("abs", b), constant(g, 0.0, a), constant(g, float("inf"), a)
    large = g.op("max", a, b)
    ratio = g.op("div", g.op("min", a, b), large)
    length = g.op("mul", large, g.op("sqrt", g.op("add", constant(g, 1.0, a), g.op("mul", ratio, ratio))))
    length = g.op("where", g.op("eq", large, zero), zero, length)
    return g.op("where", g.op("or", g.op("eq", a, infinity), g.op("eq", b, infinity)), infinity, length)


_LARGE, _LN2 = 1e9, 0.6931471805599453  # from here on x^2 + 1 is x^2 in either precision


def _asinh(g: Graph, x: Expression) -> Expression:
    one, size = constant(g, 1.0, x), g.op("abs", x)
    square = g.op("mul", x, x)
    root = g.op("sqrt", g.op("add", square, one))
    near = g.op("log1p", g.op("add", size, g.op("div", square, g.op("add", one, root))))
    far = g.op("add", g.op("log", size), constant(g, _LN2, x))
    value = g.op("where", g.op("gt", size, constant(g, _LARGE, x)), far, near)
    return g.op("where", g.op("lt", x, constant(g, 0.0, x)), g.op("neg", value), value)


def _acosh(g: Graph, x: Expression) -> Expression:
    above = g.op("sub", x, constant(g, 1.0, x))
    root = g.op("sqrt", g.op("mul", above, g.op("add", above, constant(g, 2.0, x))))
    far = g.op("add", g.op("log", x), constant(g, _LN2, x))
    large = g.op("gt", g.op("abs", x), constant(g, _LARGE, x))
    return g.op("where", large, far, g.op("log1p", g.op("add", above, root)))


def _atanh(g: Graph, x: Expression) -> Expression:
    size, one = g.op("abs", x), constant(g, 1.0, x)
    ratio = g.op("div", g.op("add", size, size), g.op("sub", one, size))
    value = g.op("mul", constant(g, 0.5, x), g.op("log1p", ratio))
    return g.op("where", g.op("lt", x, constant(g, 0.0, x)), g.op("neg", value), value)


pointwise("hypot", _hypot)
pointwise("asinh", _asinh)
pointwise("acosh", _acosh)
pointwise("atanh", _atanh)

# (1 + 2 x) e^(x^2) erfc(x) for x >= 0, Chebyshev series in (x - 3.75) / (x + 3.75); its next term is 1e-17.
_SCALED_ERFC = (
    *(1.17757893456740175, -0.00459005458064647733, -0.0842491333665179156, 0.0592099399981918905),
    *(-0.0266586684353057523, 0.00907499767070526509, -0.00241316354041760819, 0.000490775836525808632),
    *(-0.0000691697330250120637, 4.13902798607301017e-6, 7.74038306619849067e-7, -2.18864010492343957e-7),
    *(1.07649994656709104e-8, 4.5219598112182869e-9, -7.75440020883135111e-10, -6.31808834088668449e-11),
    *(2.8687950109306699e-11, 1.94558685457773472e-13, -9.65469674843343891e-13, 3.25254814814873984e-14),
    *(3.34781194828680539e-14, -1.8645628804193131e-15, -1.25079505306886471e-15),
)


def _scaled_erfc(g: Graph, x: Expression) -> Expression:
    """``e^(x^2) erfc(x)`` for ``x >= 0``, by Clenshaw's recurrence."""
    pole = constant(g, 3.75, x)
    u = g.op("div", g.op("sub", x, pole), g.op("add", x, pole))
    u = g.op("where", g.op("eq", x, constant(g, float("inf"), x)), constant(g, 1.0, x), u)
    twice, after, sum_ = g.op("add", u, u), constant(g, 0.0, x), constant(g, 0.0, x)
    for c in reversed(_SCALED_ERFC[1:]):
        after, sum_ = sum_, g.op("sub", g.op("add", g.op("mul", twice, sum_), constant(g, c, x)), after)
    total = g.op("sub", g.op("add", g.op("mul", u, sum_), constant(g, _SCALED_ERFC[0], x)), after)
    return g.op("div", total, g.op("add", constant(g, 1.0, x), g.op("add", x, x)))


def _square_exponential(g: Graph, x: Expression, sign: str) -> Expression:
    """``e^(-x^2)`` or ``e^(x^2)``, with the square of a part of ``x`` that has few digits apart: it is exact."""
    part = g.op("mul", g.op("round", g.op("mul", x, constant(g, 64.0, x))), constant(g, 1.0 / 64.0, x))
    rest = g.op("mul", g.op("sub", x, part), g.op("add", x, part))
    powers = g.op("mul", part, part), rest
    if sign == "minus":
        powers = g.op("neg", powers[0]), g.op("neg", rest)
    value = g.op("mul", g.op("exp", powers[0]), g.op("exp", powers[1]))
    far = g.op("gt", g.op("abs", x), constant(g, 100.0, x))  # where the rest of an infinite x would be nan
    return g.op("where", far, constant(g, 0.0 if sign == "minus" else float("inf"), x), value)


def _erfc(g: Graph, x: Expression) -> Expression:
    half, one = constant(g, 0.5, x), constant(g, 1.0, x)
    tail = g.op("mul", _square_exponential(g, x, "minus"), _scaled_erfc(g, x))
    return g.op("where", g.op("gt", x, half), tail, g.op("sub", one, g.op("erf", x)))


def _erfcx(g: Graph, x: Expression) -> Expression:
    half = constant(g, 0.5, x)
    near = g.op("mul", _square_exponential(g, x, "plus"), g.op("sub", constant(g, 1.0, x), g.op("erf", x)))
    return g.op("where", g.op("gt", x, half), _scaled_erfc(g, x), near)


pointwise("erfc", _erfc)
pointwise("special_erfcx", _erfcx)


@handles("softplus")
def softplus(tracer: Tracer, func: Any, a: Traced, beta: float = 1, threshold: float = 20) -> Traced:
    """``log(1 + exp(beta x)) / beta``, and ``x`` above the threshold."""
    g = tracer.graph

    def one(x: Expression) -> Expression:
        scaled = g.op("mul", x, constant(g, beta, x))
        smooth = g.op("div", g.op("log1p", g.op("exp", scaled)), constant(g, beta, x))
        return g.op("where", g.op("gt", scaled, constant(g, threshold, x)), x, smooth)

    return tracer.traced(mapped(one, a.elements), a.dtype)


@handles("gelu")
def gelu(tracer: Tracer, func: Any, a: Traced, *, approximate: str = "none") -> Traced:
    """``x Phi(x)``, exact or by tanh."""
    g = tracer.graph

    def one(x: Expression) -> Expression:
        half, unit = constant(g, 0.5, x), constant(g, 1.0, x)
        if approximate == "tanh":
            cube = g.op("mul", g.op("mul", g.op("mul", x, x), x), constant(g, 0.044715, x))
            inner = g.op("tanh", g.op("mul", g.op("add", x, cube), constant(g, 0.7978845608028654, x)))
        else:
            inner = g.op("erf", g.op("mul", x, constant(g, 0.7071067811865476, x)))
        return g.op("mul", g.op("mul", half, x), g.op("add", unit, inner))

    return tracer.traced(mapped(one, a.elements), a.dtype)
