r"""log, log1p and asinh.

$x = 2^e (1 + f)$ with $1 + f \in [\sqrt{1/2}, \sqrt 2)$, and $\ln x = e \ln 2 + \ln(1 + f)$.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from .compile import inline
from .intrinsics import copysign, fma, polynomial, select, sqrt
from .precision import FLOAT32, FLOAT64, Precision

__all__ = ["LOGARITHMS", "SPLIT"]

# ln(1 + f) = f + f^2 (-1/2 + f A(f)), largest relative error 5.8e-9
_A = polynomial(
    *(0.333333317, -0.250008210, 0.200012282, -0.166233577, 0.142017347, -0.131601583, 0.127617080, -0.0763470572)
)
# ln(1 + f) = f - s (f - s^2 B(s^2)) with s = f / (2 + f), largest relative error 1.2e-18
_B = polynomial(
    *(0.66666666666667344592, 0.39999999999414324961, 0.2857142874247452091, 0.22222198563489878595),
    *(0.18183564867545800416, 0.15314035793994304955, 0.14796105982169388382),
)
_LN2_32, _MINUS_HALF32 = np.float32(0.6931471805599453), np.float32(-0.5)
_LN2_64, _LN2_REST64, _TWO64 = np.float64(0.6931471805599453), np.float64(2.3190468138462996e-17), np.float64(2.0)


@inline
def _log_float32(e: Any, f: Any) -> Any:
    return fma(e, _LN2_32, fma(f * f, fma(_A(f), f, _MINUS_HALF32), f))


@inline
def _log_float64(e: Any, f: Any) -> Any:
    s = f / (_TWO64 + f)
    ss = s * s
    return fma(e, _LN2_64, fma(-s, fma(-ss, _B(ss), f), f) + e * _LN2_REST64)


_LOG = {"float32": _log_float32, "float64": _log_float64}


def _split(precision: Precision) -> Callable[..., Any]:
    F, Z, U = precision.real, precision.integer, precision.unsigned
    as_integer, as_real, mantissa = precision.as_integer, precision.as_real, U(precision.mantissa)
    one = F(1.0)
    one_bits = int(one.view(Z))
    offset = Z(one_bits - int(F(0.5**0.5).view(Z)))
    whole_bits, whole = Z(int(F(2.0**precision.mantissa).view(Z))), F(2.0**precision.mantissa + precision.bias)

    @precision.inline
    def split(x: Any) -> Any:
        """Stored exponent, e as a float and f of a positive normal number.

        Unsigned shifts and the cast by an exponent's bits have vector instructions in AVX2, for 64 bits too.
        """
        bits = as_integer(x)
        stored = Z(U(Z(bits + offset)) >> mantissa)
        e = as_real(Z(stored + whole_bits)) - whole
        f = as_real(Z(Z(bits + Z(one_bits)) - Z(stored << Z(mantissa)))) - one
        return stored, e, f

    return split


def _logarithms(precision: Precision) -> dict[str, Callable[..., Any]]:
    F, Z = precision.real, precision.integer
    as_real, mantissa = precision.as_real, Z(precision.mantissa)
    core, split = _LOG[precision.name], SPLIT[precision.name]
    zero, one, quarter, minus_one, ln2 = F(0.0), F(1.0), F(0.25), F(-1.0), F(0.6931471805599453)
    infinity, minus_infinity, nan = F("inf"), F("-inf"), F("nan")
    smallest_normal, tiny = F(2.0 ** (1 - precision.bias)), F(2.0 ** -(precision.mantissa + 2))
    shift = precision.mantissa + 1
    scale, less = F(2.0**shift), F(-shift)
    four_bits, large = Z(2 * precision.bias + 2), F(2.0 ** (precision.mantissa + 5))

    @precision.inline
    def log(x: Any) -> Any:
        subnormal = x < smallest_normal
        _, e, f = split(select(subnormal, x * scale, x))
        y = core(e + select(subnormal, less, zero), f)
        y = select(x < infinity, y, x)
        return select(x > zero, y, select(x == zero, minus_infinity, nan))

    @precision.inline
    def log1p(x: Any) -> Any:
        stored, e, _ = split(one + x)
        # What rounding took from 1 + x comes back: f from x, by 4 / 2^e as 1 / 2^e may be subnormal.
        power = as_real(Z(Z(four_bits - stored) << mantissa))
        f = fma(quarter * x, power, fma(quarter, power, minus_one))
        y = core(e, f)
        y = select(x < infinity, y, x)
        y = select(x > minus_one, y, select(x == minus_one, minus_infinity, nan))
        return select(abs(x) < tiny, x, y)

    @precision.inline
    def asinh(x: Any) -> Any:
        a = abs(x)
        inverse = one / a
        huge = a > large
        y = log1p(select(huge, a, a + a / (inverse + sqrt(fma(inverse, inverse, one)))))
        return copysign(y + select(huge, ln2, zero), x)

    return {"log": log, "log1p": log1p, "asinh": asinh}


SPLIT: dict[str, Callable[..., Any]] = {p.name: _split(p) for p in (FLOAT32, FLOAT64)}
LOGARITHMS: dict[tuple[str, str], Callable[..., Any]] = {
    (name, p.name): function for p in (FLOAT32, FLOAT64) for name, function in _logarithms(p).items()
}
