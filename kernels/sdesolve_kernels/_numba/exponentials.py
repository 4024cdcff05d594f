r"""exp, expm1, sinh, cosh and tanh.

$x = n \ln 2 + r$ with $n$ whole and $|r| \le \tfrac12 \ln 2$. The product of $n$ and the leading part of $\ln 2$ is
subtracted without error, as a fused multiply-add whose result has few bits, so $r$ comes as a sum $r_0 + r_1$.
$e^r = 1 + r + r^2 P(r)$, and multiplying by $2^n$ is a shift of $n$ into the place of an exponent.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .intrinsics import copysign, fma, polynomial, select
from .precision import FLOAT32, FLOAT64, Precision

__all__ = ["EXPONENTIALS", "EXP_OF_SUM"]

_LN2 = {
    "float32": (0.6931471824645996, -1.9046542121259336e-09),
    "float64": (0.6931471805599453, 2.3190468138462996e-17),
}
# e^r - 1 - r = r^2 P(r), largest error relative to e^r - 1: 1.3e-8 and 1.8e-17
_P = {
    "float32": polynomial(0.499999981, 0.166665431, 0.0416672039, 0.00836659010, 0.00138825115),
    "float64": polynomial(
        *(0.50000000000000052258, 0.16666666666666588392, 0.04166666666657607751, 0.0083333333333899562998),
        *(0.0013888888931809049501, 0.00019841269718612395915, 2.4801504959572314913e-5, 2.7557407392202876651e-6),
        *(2.7626169719255458874e-7, 2.5053998054849095694e-8),
    ),
}
# Below the first, e^x rounds to 0; above the second, to infinity, and above the third, sinh x does. At minus the
# fourth, e^x - 1 rounds to -1; at the fourth tanh x rounds to 1.
_LIMITS = {"float32": (-104.0, 89.0, 89.5, 18.0), "float64": (-746.0, 710.0, 710.5, 38.0)}


def _exponentials(precision: Precision) -> tuple[dict[str, Callable[..., Any]], Callable[..., Any]]:
    F, Z = precision.real, precision.integer
    as_integer, as_real, P = precision.as_integer, precision.as_real, _P[precision.name]
    round_bias, mantissa = precision.round_bias, Z(precision.mantissa)
    ln2, ln2_rest = (F(-part) for part in _LN2[precision.name])
    log2_e = F(1.4426950408889634)
    lowest, highest, highest_sinh, saturated = (F(limit) for limit in _LIMITS[precision.name])
    minus_saturated = -saturated
    zero, half, one, two, four, quarter = F(0.0), F(0.5), F(1.0), F(2.0), F(4.0), F(0.25)
    no_more, twenty = F(-0.0), F(20.0)
    tiny = F(2.0 ** -(precision.mantissa + 2))
    # 2^n has no number for all n that are needed, so e^x is multiplied by 2^(n -+ half_way) and by 2^(+-half_way).
    half_way = precision.bias // 2
    up, down = F(2.0**half_way), F(2.0**-half_way)
    up_bits = Z(precision.bias - half_way << precision.mantissa)
    down_bits = Z(precision.bias + half_way << precision.mantissa)
    quarter_bits = Z(precision.bias - 2 << precision.mantissa)

    @precision.inline
    def exp_of_sum(x: Any, rest: Any) -> Any:
        r"""$e^{x + \text{rest}}$ for a rest of at most an ulp or two of x."""
        x = select(x > highest, highest, x)
        x = select(x < lowest, lowest, x)
        k = fma(x, log2_e, round_bias)
        n = k - round_bias
        r = fma(n, ln2_rest, fma(n, ln2, x)) + rest
        p = one + fma(r * r, P(r), r)
        large = x > zero
        power = as_real(Z(Z(as_integer(k) << mantissa) + select(large, up_bits, down_bits)))
        return p * power * select(large, up, down)

    @precision.inline
    def quarter_expm1(x: Any) -> Any:
        r"""$(e^x - 1) / 4$, in two parts, for x between minus `saturated` and `highest_sinh`.

        The quarter keeps it from overflowing before results that are computed from it.
        """
        k = fma(x, log2_e, round_bias)
        n = k - round_bias
        r0, r1 = fma(n, ln2, x), n * ln2_rest
        r = r0 + r1
        power = as_real(Z(Z(as_integer(k) << mantissa) + quarter_bits))
        p = fma(r * r, P(r), r1)
        # This sum is exact wherever the two parts of e^x - 1 cancel.
        start = fma(power, r0, power - quarter)
        q = fma(power, p, start)
        return q, fma(power, p, start - q)

    @precision.inline
    def exp(x: Any) -> Any:
        return exp_of_sum(x, no_more)

    @precision.inline
    def expm1(x: Any) -> Any:
        y = select(x > highest, highest, x)
        q, _ = quarter_expm1(select(y < minus_saturated, minus_saturated, y))
        return select(abs(x) < tiny, x, four * q)

    @precision.inline
    def sinh(x: Any) -> Any:
        a = abs(x)
        q, rest = quarter_expm1(select(a > highest_sinh, highest_sinh, a))
        y = two * (q + (q / fma(four, q, one) + rest))
        return copysign(select(a < tiny, a, y), x)

    @precision.inline
    def cosh(x: Any) -> Any:
        a = abs(x)
        q, _ = quarter_expm1(select(a > highest_sinh, highest_sinh, a))
        return fma(two, q + quarter, half / fma(four, q, one))

    if precision is FLOAT32:  # that of networks, where tanh is half of what a layer takes

        @precision.inline
        def tanh(x: Any) -> Any:
            # Of 19 cycles for a vector, 10 are for the division; what rounding took would cost 9 more.
            a = abs(x)
            y = a + a
            y = select(y > twenty, twenty, y)  # where adding 1/2 to q changes nothing
            k = fma(y, log2_e, round_bias)
            r = fma(k - round_bias, ln2, y)
            power = as_real(Z(Z(as_integer(k) << mantissa) + quarter_bits))
            q = fma(power, fma(r * r, P(r), r), power - quarter)
            return copysign(select(a < tiny, a, q / (q + half)), x)

    else:

        @precision.inline
        def tanh(x: Any) -> Any:
            a = abs(x)
            y = a + a
            q, rest = quarter_expm1(select(y > saturated, saturated, y))
            # q / (q + 1/2), and one step of Newton's with what rounding took from both sides.
            d = q + half
            inverse = one / d
            y = q * inverse
            missing = fma(-y, q - (d - half), fma(-y, d, q) + rest)
            return copysign(select(a < tiny, a, fma(missing, inverse, y)), x)

    return {"exp": exp, "expm1": expm1, "sinh": sinh, "cosh": cosh, "tanh": tanh}, exp_of_sum


EXPONENTIALS: dict[tuple[str, str], Callable[..., Any]] = {}
EXP_OF_SUM: dict[str, Callable[..., Any]] = {}
for _precision in (FLOAT32, FLOAT64):
    _functions, EXP_OF_SUM[_precision.name] = _exponentials(_precision)
    EXPONENTIALS |= {(name, _precision.name): function for name, function in _functions.items()}
