r"""asin, acos, atan and atan2.

$\arcsin x$ is a polynomial up to $\tfrac12$, and $\tfrac\pi2 - 2 \arcsin \sqrt{(1 - x) / 2}$ above. The angle of a
point is a polynomial of the smaller coordinate over the larger, then reflected into its octant.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .intrinsics import copysign, fma, polynomial, select, sqrt
from .precision import FLOAT32, FLOAT64, Precision

__all__ = ["INVERSE_CIRCULAR"]

_HALF_PI = {
    "float32": (1.5707963705062866, -4.371138828673793e-08),
    "float64": (1.5707963267948966, 6.123233995736766e-17),
}
# asin x = x + x^3 A(x^2) for |x| <= 1/2, largest relative error 5.0e-9 and 1.5e-17
_A = {
    "float32": polynomial(0.166667538, 0.0749524457, 0.0454768640, 0.0241482831, 0.0422180664),
    "float64": polynomial(
        *(0.16666666666665385707, 0.075000000003423811403, 0.044642856824013475174, 0.030381959310110323969),
        *(0.022371754010607655007, 0.017359764071132322803, 0.0138846647806909193, 0.012172865030398239676),
        *(0.0065125548118394150821, 0.019569490558886295656, -0.016287509302155177947, 0.031954705898744074532),
    ),
}
# atan x = x + x^3 B(x^2) for |x| <= 1, largest relative error 2.6e-9 and 4.7e-18
_B = {
    "float32": polynomial(
        *(-0.333332991, 0.199985484, -0.142642429, 0.109521919, -0.0840346729),
        *(0.0579578693, -0.0311781066, 0.0109147390, -0.00179365019),
    ),
    "float64": polynomial(
        *(-0.33333333333333068919, 0.19999999999951603941, -0.14285714282583508805, 0.1111111100727627419),
        *(-0.090909070074640935419, 0.076922798920194983913, -0.066664044922798982942, 0.058805304227914378574),
        *(-0.052535302584514192803, 0.047223622606248643263, -0.042192846534761007544, 0.036644077923989338732),
        *(-0.029907314094109443569, 0.021989121711497677727, -0.013904600406635849709, 0.0071993769387842751442),
        *(-0.0028864038678193094116, 0.00083184834426794865045, -0.00015227526617895554482, 1.3236562896740097959e-5),
    ),
}


def _inverse_circular(precision: Precision) -> dict[str, Callable[..., Any]]:
    F, Z, as_integer = precision.real, precision.integer, precision.as_integer
    A, B = _A[precision.name], _B[precision.name]
    half_pi, half_pi_rest = (F(part) for part in _HALF_PI[precision.name])
    pi, pi_rest = half_pi + half_pi, half_pi_rest + half_pi_rest
    zero, half, one, minus_half, minus_two, two = F(0.0), F(0.5), F(1.0), F(-0.5), F(-2.0), F(2.0)
    no_bits = Z(0)

    @precision.inline
    def halved(x: Any) -> Any:
        r"""Is \|x\| above 1/2, and the arcsine, in two parts, of \|x\| or else of sqrt((1 - \|x\|) / 2)."""
        a = abs(x)
        upper = a > half
        z = select(upper, fma(minus_half, a, half), a * a)
        s = select(upper, sqrt(z), a)
        return upper, s, z * A(z) * s

    @precision.inline
    def asin(x: Any) -> Any:
        upper, y, rest = halved(x)
        above = fma(minus_two, y, half_pi)
        lost = half_pi_rest + fma(minus_two, y, half_pi - above)
        return copysign(select(upper, above - fma(two, rest, -lost), y + rest), x)

    @precision.inline
    def acos(x: Any) -> Any:
        upper, y, rest = halved(x)
        y = y + rest
        near = select(x < zero, pi - fma(two, y, -pi_rest), two * y)
        far = half_pi - (copysign(y, x) - half_pi_rest)
        return select(upper, near, far)

    @precision.inline
    def angle(y: Any, x: Any) -> Any:
        """The angle of a point in the first quadrant."""
        steep = y > x
        small, large = select(steep, x, y), select(steep, y, x)
        t = select(small == large, select(large == zero, zero, one), small / large)
        tt = t * t
        p = tt * B(tt)
        return select(steep, (half_pi - t) - fma(p, t, -half_pi_rest), fma(p, t, t))

    @precision.inline
    def atan(x: Any) -> Any:
        return copysign(angle(abs(x), one), x)

    @precision.inline
    def atan2(y: Any, x: Any) -> Any:
        t = angle(abs(y), abs(x))
        return copysign(select(as_integer(x) < no_bits, pi - (t - pi_rest), t), y)

    return {"asin": asin, "acos": acos, "atan": atan, "atan2": atan2}


INVERSE_CIRCULAR: dict[tuple[str, str], Callable[..., Any]] = {
    (name, p.name): function for p in (FLOAT32, FLOAT64) for name, function in _inverse_circular(p).items()
}
