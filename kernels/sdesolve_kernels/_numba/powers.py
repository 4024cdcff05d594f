r"""pow: $|x|^y = e^{y \ln |x|}$ with a logarithm of more digits than the result's, then signs and special cases.

float32 works in float64 inside; float64 carries the logarithm as a sum of two numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from .compile import inline
from .exponentials import EXP_OF_SUM
from .intrinsics import as_float64, as_int64, fma, polynomial, select, trunc
from .logarithms import SPLIT
from .precision import FLOAT32, FLOAT64, Precision

__all__ = ["POWERS"]

# log2(1 + f) = f A(f), largest relative error 1.6e-11
_LOG2 = polynomial(
    *(1.4426950408687, -0.72134752086582, 0.48089836141429, -0.36067367540447, 0.2885372917705, -0.24045313360963),
    *(0.20617540160019, -0.18030135079209, 0.15876967186669, -0.14314850184701, 0.14474300286046, -0.14287096337144),
    0.077412136305377,
)
# 2^r for |r| <= 1/2, largest relative error 1.9e-9
_EXP2 = polynomial(
    *(1.0000000005692, 0.69314720587284, 0.24022646803779, 0.055503284181736, 0.009618495323911, 0.0013400080490758),
    0.00015344695375045,
)
_split64, _exp_of_sum64 = SPLIT["float64"], EXP_OF_SUM["float64"]
_INF, _MINUS_INF = np.float64("inf"), np.float64("-inf")
_ZERO, _ONE, _TWO = np.float64(0.0), np.float64(1.0), np.float64(2.0)
_HIGHEST, _LOWEST, _ROUND_BIAS = np.float64(200.0), np.float64(-200.0), np.float64(1.5 * 2.0**52)
_52, _ONE_BITS = np.int64(52), np.int64(1023 << 52)


@inline
def _magnitude_float32(x: Any, y: Any) -> Any:
    x, y = np.float64(x), np.float64(y)
    _, e, f = _split64(x)
    log = fma(f, _LOG2(f), e)
    log = select(x < _INF, select(x == _ZERO, _MINUS_INF, log), x)
    t = y * log
    t = select(t > _HIGHEST, _HIGHEST, t)
    t = select(t < _LOWEST, _LOWEST, t)
    k = t + _ROUND_BIAS
    power = as_float64((as_int64(k) << _52) + _ONE_BITS)
    return np.float32(_EXP2(t - (k - _ROUND_BIAS)) * power)


# ln(1 + f) = 2 s + s^3 (2/3 + s^2 B(s^2)) with s = f / (2 + f), largest relative error 1.1e-20
_B = polynomial(
    *(0.40000000000002256804, 0.28571428570099238229, 0.2222222251997861471, 0.1818178436253829893),
    *(0.1538675753202858931, 0.1325681326077053328, 0.1319636894367166944),
)
_TWO_THIRDS, _TWO_THIRDS_REST = np.float64(0.6666666666666666), np.float64(3.700743415417188e-17)
# The first part has 32 bits, so that its product with an exponent is exact.
_LN2 = np.float64(0.6931471803691238)
_LN2_REST = np.float64(1.9082149292705877e-10)
_SMALLEST_NORMAL, _SCALE, _LESS = np.float64(2.0**-1022), np.float64(2.0**54), np.float64(-54.0)
_BOUND = np.float64(1000.0)


@inline
def _magnitude_float64(x: Any, y: Any) -> Any:
    subnormal = x < _SMALLEST_NORMAL
    _, e, f = _split64(select(subnormal, x * _SCALE, x))
    e = e + select(subnormal, _LESS, _ZERO)
    # Twice the digits from here on: each number is a sum a + a1.
    d = _TWO + f
    inverse = _ONE / d
    s = f * inverse
    s1 = fma(-s, f - (d - _TWO), fma(-s, d, f)) * inverse
    z = s * s
    z1 = fma(s, s, -z) + _TWO * s * s1
    w = z * _B(z)
    c = _TWO_THIRDS + w
    c1 = ((_TWO_THIRDS - c) + w) + _TWO_THIRDS_REST
    u = z * s
    u1 = fma(z, s, -u) + fma(z, s1, z1 * s)
    v = u * c
    v1 = fma(u, c, -v) + fma(u, c1, u1 * c)
    h = fma(_TWO, s, v)
    h1 = (fma(_TWO, s, -h) + v) + fma(_TWO, s1, v1)
    base = e * _LN2
    log = base + h
    log1 = ((base - log) + h) + fma(e, _LN2_REST, h1)
    log = select(x < _INF, select(x == _ZERO, _MINUS_INF, log), x)
    t = y * log
    t1 = fma(y, log, -t) + y * log1
    return _exp_of_sum64(t, select(abs(t) < _BOUND, t1, _ZERO))


_MAGNITUDE = {"float32": _magnitude_float32, "float64": _magnitude_float64}


def _power(precision: Precision) -> Callable[..., Any]:
    F, Z, as_integer = precision.real, precision.integer, precision.as_integer
    magnitude = _MAGNITUDE[precision.name]
    zero, half, one, minus_two = F(0.0), F(0.5), F(1.0), F(-2.0)
    infinity, nan, no_bits = F("inf"), F("nan"), Z(0)
    # Such an exponent makes 0 or infinity of everything but 1, as an infinite one does.
    huge, minus_huge = F(2.0**100), F(-(2.0**100))

    @precision.inline
    def pow(x: Any, y: Any) -> Any:
        a = abs(x)
        b = select(y > huge, huge, y)
        p = magnitude(a, select(b < minus_huge, minus_huge, b))
        odd = abs(fma(minus_two, trunc(y * half), y)) == one
        p = select(odd, select(as_integer(x) < no_bits, -p, p), p)
        p = select(x < zero, select(trunc(y) == y, p, select(a < infinity, nan, p)), p)
        return select(y == zero, one, select(x == one, one, p))

    return pow


POWERS: dict[tuple[str, str], Callable[..., Any]] = {("pow", p.name): _power(p) for p in (FLOAT32, FLOAT64)}
