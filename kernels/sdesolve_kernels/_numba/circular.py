r"""sin, cos and tan.

$x = n \tfrac\pi2 + r$ with $n$ whole and $|r| \le \tfrac\pi4$, by three parts of $\tfrac\pi2$. The first fused
multiply-add is exact, for $r$ is a multiple of the last digits of $x$ and of the first part; $r$ comes as a sum of two
numbers, as its rounding alone would be an ulp of a sine that lies just below a power of two.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .intrinsics import fma, polynomial, select
from .precision import FLOAT32, FLOAT64, Precision

__all__ = ["CIRCULAR"]

_HALF_PI = {
    "float32": (1.5707963705062866, -4.371138828673793e-08, -1.7151245100058819e-15),
    "float64": (1.5707963267948966, 6.123233995736766e-17, -1.4973849048591815e-33),
}
# sin r = r + r^3 S(r^2), cos r = 1 + r^2 C(r^2); largest relative errors 3.9e-9 and 7.1e-11, 4.0e-18 and 4.6e-20
_S = {
    "float32": polynomial(-0.166666542, 0.00833213145, -0.000195108322),
    "float64": polynomial(
        *(-0.16666666666666627784, 0.0083333333333213053806, -0.00019841269828883362017, 2.7557313359795869248e-6),
        *(-2.5050704522516725353e-8, 1.5893606506391806253e-10),
    ),
}
_C = {
    "float32": polynomial(-0.499999997, 0.0416666174, -0.00138865905, 2.43750612e-5),
    "float64": polynomial(
        *(-0.49999999999999999435, 0.041666666666666444441, -0.0013888888888859142682, 2.4801587282625387293e-5),
        *(-2.7557312737161028861e-7, 2.0875533953102771659e-9, -1.1350903175785849999e-11),
    ),
}


def _circular(precision: Precision) -> dict[str, Callable[..., Any]]:
    F, Z = precision.real, precision.integer
    as_integer, as_real, round_bias = precision.as_integer, precision.as_real, precision.round_bias
    S, C = _S[precision.name], _C[precision.name]
    first, second, third = (F(-part) for part in _HALF_PI[precision.name])
    zero, one, two_over_pi = F(0.0), F(1.0), F(0.6366197723675814)
    # Above, a multiple of 2 pi lies within a few ulp of x, and counts as x: the sine is 0, the cosine 1.
    limit = F(2.0 ** (precision.mantissa - 2))
    no_bit, bit, next_bit = Z(0), Z(1), Z(2)
    to_sign = Z(8 * F(0).itemsize - 2)

    @precision.inline
    def reduced(x: Any) -> Any:
        """Quadrant, and sine and cosine of what is left of x."""
        x = select(abs(x) < limit, x, x - x)
        k = fma(x, two_over_pi, round_bias)
        n = k - round_bias
        r0, r1 = fma(n, first, x), n * second
        r = r0 + r1
        rest = (r1 - (r - r0)) + fma(n, third, fma(n, second, -r1))
        rr = r * r
        return as_integer(k), r + fma(rr * S(rr), r, rest), fma(rr, C(rr), one)

    @precision.inline
    def sin(x: Any) -> Any:
        quadrant, s, c = reduced(x)
        y = select(Z(quadrant & bit) != no_bit, c, s)
        return select(x == zero, x, as_real(Z(as_integer(y) ^ Z(Z(quadrant & next_bit) << to_sign))))

    @precision.inline
    def cos(x: Any) -> Any:
        quadrant, s, c = reduced(x)
        y = select(Z(quadrant & bit) != no_bit, s, c)
        return as_real(Z(as_integer(y) ^ Z(Z(Z(quadrant + bit) & next_bit) << to_sign)))

    @precision.inline
    def tan(x: Any) -> Any:
        quadrant, s, c = reduced(x)
        odd = Z(quadrant & bit) != no_bit
        return select(x == zero, x, select(odd, -c, s) / select(odd, s, c))

    return {"sin": sin, "cos": cos, "tan": tan}


CIRCULAR: dict[tuple[str, str], Callable[..., Any]] = {
    (name, p.name): function for p in (FLOAT32, FLOAT64) for name, function in _circular(p).items()
}
