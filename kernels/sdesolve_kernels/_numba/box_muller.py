r"""Box-Muller on two words, in float32 and float64, with polynomials instead of calls so that loops vectorise.

Both precisions follow one plan. $r^2 = -2 \ln u$ with $u = (w_0 + \tfrac12) 2^{-32} = 2^e (1 + f)$ and
$1 + f \in [\sqrt{1/2}, \sqrt 2)$. Near $u = 1$ the float32 nearest to $u$ is 1 and the logarithm would be lost, so
above $\sqrt{1/2}$ the integer complement gives $f = -(\bar w_0 + \tfrac12) 2^{-32}$ with full relative accuracy and
$e = 0$.

The angle is reduced exactly, as an integer: $w_1$ is a quadrant plus a signed remainder of at most an eighth of a turn,
and $\sin(\tfrac\pi2 t), \cos(\tfrac\pi2 t)$ are polynomials in $t^2 \le 1/4$.

The polynomials interpolate at Chebyshev nodes, in 60 digits; each constant says the largest relative error of what it
approximates, before rounding.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from .compile import inline
from .intrinsics import as_float32, as_float64, as_int32, as_int64, fma, select

__all__ = ["normals32", "normals64"]

_SPLIT = np.uint32(0xB504F333)  # 2^32 sqrt(1/2): above it, the complement is used
_EIGHTH, _QUADRANT = np.uint32(1 << 29), np.uint32(30)

# float32 ---------------------------------------------------------------------------------------------------------
_F = np.float32
_HALF32, _ONE32, _ULP32, _MINUS_HALF32, _MINUS_TWO32 = _F(0.5), _F(1.0), _F(2.0**-32), _F(-0.5), _F(-2.0)
_LN2_32, _TURN32 = _F(0.6931471805599453), _F(2.0**-30)
_SQRT_HALF_BITS32, _MANTISSA32 = np.int32(0x3F3504F3), np.int32(23)
# ln(1 + f) = f + f^2 (-1/2 + f L(f)): 1.9e-8
_L0, _L1, _L2, _L3 = _F(0.333333307282), _F(-0.250003064226), _F(0.200010450942), _F(-0.166412814631)
_L4, _L5, _L6, _L7 = _F(0.142144959239), _F(-0.129981837637), _F(0.126223198492), _F(-0.0790274377239)
# sin(pi/2 t) = t S(t^2): 3.4e-9;  cos(pi/2 t) = 1 + t^2 C(t^2): 1.9e-10 of 1
_S0, _S1, _S2, _S3 = _F(1.57079632195), _F(-0.645963477665), _F(0.0796802176478), _F(-0.00460214921281)
_C0, _C1, _C2, _C3 = _F(-1.23370054937), _F(0.253669410357), _F(-0.0208615283422), _F(0.000906739898403)


@inline
def normals32(w0: Any, w1: Any) -> Any:
    """Two float32 normals from two uint32 words; within a few ulp of ``reference.box_muller``."""
    complemented = w0 > _SPLIT
    a = _F(select(complemented, np.uint32(~w0), w0)) + _HALF32
    bits = as_int32(a)
    e = np.int32(np.int32(bits - _SQRT_HALF_BITS32) >> _MANTISSA32)
    m = as_float32(np.int32(bits - np.int32(e << _MANTISSA32)))
    f = select(complemented, -a * _ULP32, m - _ONE32)
    e = select(complemented, np.int32(0), np.int32(e - np.int32(32)))
    p = fma(fma(fma(fma(fma(fma(fma(_L7, f, _L6), f, _L5), f, _L4), f, _L3), f, _L2), f, _L1), f, _L0)
    log = fma(f * f, fma(p, f, _MINUS_HALF32), f)
    r = np.sqrt(_MINUS_TWO32 * fma(_F(e), _LN2_32, log))

    quadrant = np.uint32(np.uint32(w1 + _EIGHTH) >> _QUADRANT)
    t = _F(np.int32(w1 - np.uint32(quadrant << _QUADRANT))) * _TURN32
    tt = t * t
    sin = t * fma(fma(fma(_S3, tt, _S2), tt, _S1), tt, _S0)
    cos = fma(fma(fma(fma(_C3, tt, _C2), tt, _C1), tt, _C0), tt, _ONE32)
    odd = (quadrant & np.uint32(1)) != np.uint32(0)
    x, y = select(odd, sin, cos), select(odd, cos, sin)
    x = select((np.uint32(quadrant + np.uint32(1)) & np.uint32(2)) != np.uint32(0), -x, x)
    y = select((quadrant & np.uint32(2)) != np.uint32(0), -y, y)
    return r * x, r * y


# float64 ---------------------------------------------------------------------------------------------------------
_D = np.float64
_HALF64, _ONE64, _TWO64, _ULP64, _MINUS_TWO64 = _D(0.5), _D(1.0), _D(2.0), _D(2.0**-32), _D(-2.0)
_LN2_64, _TURN64 = _D(0.6931471805599453), _D(2.0**-30)
_SQRT_HALF_BITS64, _MANTISSA64 = np.int64(0x3FE6A09E667F3BCD), np.int64(52)
# ln(1 + f) = f - s (f - s^2 R(s^2)) with s = f / (2 + f): 4.3e-18
_R0, _R1, _R2 = _D(0.66666666666666696862), _D(0.3999999999989950449), _D(0.28571428625975484921)
_R3, _R4, _R5 = _D(0.22222211134795079855), _D(0.1818288912526172208), _D(0.15331721600556041269)
_R6 = _D(0.1461644968504340586)
# As above: 3.5e-18 and 1.2e-19
_SD0, _SD1, _SD2 = _D(1.5707963267948966143), _D(-0.64596409750624431573), _D(0.079692626246043003134)
_SD3, _SD4, _SD5 = _D(-0.0046817541323409759917), _D(0.00016044115074219091052), _D(-3.598643352982309702e-6)
_SD6 = _D(5.6339337815378539538e-8)
_CD0, _CD1, _CD2 = _D(-1.2337005501361698269), _D(0.25366950790104782321), _D(-0.020863480763340772521)
_CD3, _CD4, _CD5 = _D(0.00091926027454684461873), _D(-0.000025202039028029176105), _D(4.7106784055052271063e-7)
_CD6 = _D(-6.3293963449674235121e-9)


@inline
def normals64(w0: Any, w1: Any) -> Any:
    """Two float64 normals from two uint32 words; within a few ulp of the largest of 1 and \\|z\\|."""
    complemented = w0 > _SPLIT
    a = _D(select(complemented, np.uint32(~w0), w0)) + _HALF64
    bits = as_int64(a)
    e = (bits - _SQRT_HALF_BITS64) >> _MANTISSA64
    m = as_float64(bits - (e << _MANTISSA64))
    f = select(complemented, -a * _ULP64, m - _ONE64)
    e = select(complemented, np.int64(0), e - np.int64(32))
    s = f / (_TWO64 + f)
    ss = s * s
    p = fma(fma(fma(fma(fma(fma(_R6, ss, _R5), ss, _R4), ss, _R3), ss, _R2), ss, _R1), ss, _R0)
    log = fma(-s, fma(-ss, p, f), f)
    r = np.sqrt(_MINUS_TWO64 * fma(_D(e), _LN2_64, log))

    quadrant = np.uint32(np.uint32(w1 + _EIGHTH) >> _QUADRANT)
    t = _D(np.int32(w1 - np.uint32(quadrant << _QUADRANT))) * _TURN64
    tt = t * t
    sin = t * fma(fma(fma(fma(fma(fma(_SD6, tt, _SD5), tt, _SD4), tt, _SD3), tt, _SD2), tt, _SD1), tt, _SD0)
    cos = fma(fma(fma(fma(fma(fma(_CD6, tt, _CD5), tt, _CD4), tt, _CD3), tt, _CD2), tt, _CD1), tt, _CD0)
    cos = fma(cos, tt, _ONE64)
    odd = (quadrant & np.uint32(1)) != np.uint32(0)
    x, y = select(odd, sin, cos), select(odd, cos, sin)
    x = select((np.uint32(quadrant + np.uint32(1)) & np.uint32(2)) != np.uint32(0), -x, x)
    y = select((quadrant & np.uint32(2)) != np.uint32(0), -y, y)
    return r * x, r * y
