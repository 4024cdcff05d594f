"""Device functions: Philox4x32-10 words and Box-Muller normals where they are used.

The words are those of `sdesolve_kernels.reference.words` to the bit. Normals come in two versions. The approximate one
(float32 on a GPU) is built on the special function unit: ``lg2``, ``sqrt``, ``sin`` and ``cos`` of one instruction
each, on an angle that stays within half a turn, so that no argument reduction is needed. The other one (float64
everywhere, float32 in the interpreter, which has no inline assembly) calls the mathematical functions.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
# (the compiler types device code at each call)

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import libdevice

_TURN = tl.constexpr(1.4629180792671596e-09)  # 2 pi / 2^32: radians in one step of a word
_HALF_TURN = tl.constexpr(4.656612873077393e-10)  # 2^-31: half turns in one step of a word
_STEP = tl.constexpr(2.3283064365386963e-10)  # 2^-32
_HALF = tl.constexpr(1.1641532182693481e-10)  # 2^-33
_MINUS_2_STEP = tl.constexpr(-4.656612873077393e-10)
_MINUS_2_HALF = tl.constexpr(-2.3283064365386963e-10)
_MINUS_2_LN2 = tl.constexpr(-1.3862943611198906)
# Words from here on have u > 1 - 2^-11.
_NEAR_ONE = tl.constexpr(0xFFE00000)


@triton.jit
def philox(c0, c1, c2, c3, k0, k1):
    """Ten Philox rounds on uint32 counters ``c0 .. c3`` (which broadcast) and keys ``k0, k1``; four uint32 tensors."""
    # Full 64-bit products: two halves taken apart compile to one IMAD.WIDE each, tl.umulhi and a low multiply to two.
    for _ in tl.static_range(10):
        p0 = c0.to(tl.uint64) * 0xD2511F53
        p1 = c2.to(tl.uint64) * 0xCD9E8D57
        c0 = (p1 >> 32).to(tl.uint32) ^ c1 ^ k0
        c1 = p1.to(tl.uint32)
        c2 = (p0 >> 32).to(tl.uint32) ^ c3 ^ k1
        c3 = p0.to(tl.uint32)
        k0 = k0 + 0x9E3779B9
        k1 = k1 + 0xBB67AE85
    return c0, c1, c2, c3


@triton.jit
def words(seed, stream, path, q):
    """The four words of block ``q`` of ``path``, both int64; key and counter as in DESIGN: nothing wraps at 2^31."""
    c0 = q.to(tl.uint32)
    c1 = path.to(tl.uint32)
    c2 = (path >> 32).to(tl.uint32)
    c3 = (stream + 256 * (q >> 32)).to(tl.uint32)
    return philox(c0, c1, c2, c3, seed.to(tl.uint32), (seed >> 32).to(tl.uint32))


@triton.jit
def _lg2(x):
    return tl.inline_asm_elementwise("lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, is_pure=True, pack=1)


@triton.jit
def _sqrt(x):
    return tl.inline_asm_elementwise("sqrt.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, is_pure=True, pack=1)


@triton.jit
def _sin(x):
    return tl.inline_asm_elementwise("sin.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, is_pure=True, pack=1)


@triton.jit
def _cos(x):
    return tl.inline_asm_elementwise("cos.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, is_pure=True, pack=1)


@triton.jit
def box_muller(w0, w1, INTERPRETED: tl.constexpr, DOUBLE: tl.constexpr):
    """``r (cos theta, sin theta)``, ``r = sqrt(-2 ln u)``, ``u = (w0 + 1/2) 2^-32``, ``theta = 2 pi w1 2^-32``."""
    dtype: tl.constexpr = tl.float64 if DOUBLE else tl.float32
    turn = w1.to(tl.int32, bitcast=True).to(dtype)  # signed: theta in [-pi, pi), where the approximations are good
    u = tl.fma(w0.to(dtype), _STEP, _HALF)
    # u next to 1 loses ln u in float32: u itself is rounded to 2^-25 and lg2 is off by 2^-22. The signed word holds
    # u - 1 to full relative accuracy. Where 1 - u < 2^-11, r = sqrt(-2 (u - 1)) is off by 3.8e-6 at most; elsewhere
    # the logarithm's error of 3.9e-7 makes at most 6.2e-6 of it.
    t = tl.fma(w0.to(tl.int32, bitcast=True).to(dtype), _MINUS_2_STEP, _MINUS_2_HALF)
    if DOUBLE:
        r = tl.sqrt(-2.0 * tl.log(u))
        if INTERPRETED:
            cos, sin = tl.cos(turn * _TURN), tl.sin(turn * _TURN)
        else:  # in half turns the reduction is exact; cos and sin of radians carry a slow path with local memory
            cos, sin = libdevice.cospi(turn * _HALF_TURN), libdevice.sinpi(turn * _HALF_TURN)
    elif INTERPRETED:
        r = tl.sqrt(tl.where(w0 >= _NEAR_ONE, t, tl.log2(u) * _MINUS_2_LN2))
        cos, sin = tl.cos(turn * _TURN), tl.sin(turn * _TURN)
    else:
        r = _sqrt(tl.where(w0 >= _NEAR_ONE, t, _lg2(u) * _MINUS_2_LN2))
        cos, sin = _cos(turn * _TURN), _sin(turn * _TURN)
    return r * cos, r * sin


@triton.jit
def normals(seed, stream, path, q, INTERPRETED: tl.constexpr, DOUBLE: tl.constexpr):
    """The four normals of block ``q`` of ``path``."""
    w0, w1, w2, w3 = words(seed, stream, path, q)
    z0, z1 = box_muller(w0, w1, INTERPRETED, DOUBLE)
    z2, z3 = box_muller(w2, w3, INTERPRETED, DOUBLE)
    return z0, z1, z2, z3
