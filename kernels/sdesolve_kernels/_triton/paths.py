"""What generated trajectory kernels are written with: numbers of a path where they are used, functions, moments.

The compiler forms no multiply-adds in these kernels (`trajectory`); those wanted are written.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
# (the compiler types device code at each call)

from __future__ import annotations

import triton
import triton.language as tl
from triton.runtime.jit import JITFunction

from .functions import *  # noqa: F403
from .noise import box_muller, philox

_SQRT3 = tl.constexpr(1.7320508075688772)
_LOW = tl.constexpr(2**32 // 6)
_HIGH = tl.constexpr(2**32 - 2**32 // 6)
_INTERPRETED = tl.constexpr(not isinstance(philox, JITFunction))


@triton.jit
def words(seed, path, low, high):
    """The four words of a block of ``path``; ``low`` counts blocks, ``high`` is the counter's last word (uint32)."""
    key_low, key_high = seed.to(tl.uint32), (seed >> 32).to(tl.uint32)
    return philox(low, path.to(tl.uint32), (path >> 32).to(tl.uint32), high, key_low, key_high)


@triton.jit
def normals(seed, path, low, high, DOUBLE: tl.constexpr):
    """The four normals of a block."""
    w0, w1, w2, w3 = words(seed, path, low, high)
    z0, z1 = box_muller(w0, w1, _INTERPRETED, DOUBLE)
    z2, z3 = box_muller(w2, w3, _INTERPRETED, DOUBLE)
    return z0, z1, z2, z3


@triton.jit
def three_point(w, DOUBLE: tl.constexpr):
    """``-sqrt 3``, 0 or ``sqrt 3`` with probabilities 1/6, 2/3 and 1/6."""
    dtype: tl.constexpr = tl.float64 if DOUBLE else tl.float32
    end = tl.full(w.shape, _SQRT3, dtype)
    return tl.where(w < _LOW, -end, tl.where(w >= _HIGH, end, 0.0))


@triton.jit
def three_points(seed, path, low, high, DOUBLE: tl.constexpr):
    """The four three-point numbers of a block."""
    w0, w1, w2, w3 = words(seed, path, low, high)
    return three_point(w0, DOUBLE), three_point(w1, DOUBLE), three_point(w2, DOUBLE), three_point(w3, DOUBLE)


@triton.jit
def plus_minus(w, BIT: tl.constexpr, DOUBLE: tl.constexpr):
    """1 where the bit is set, else -1."""
    # The bit, turned over, becomes the sign of 1.0.
    one = (((w << (31 - BIT)) & 0x80000000) ^ 0xBF800000).to(tl.float32, bitcast=True)
    return one.to(tl.float64 if DOUBLE else tl.float32)


@triton.jit
def joined(first, second, shift):
    """32 bits from bit ``shift`` of ``first`` on, which ``second`` goes on from."""
    return (((second.to(tl.uint64) << 32) | first.to(tl.uint64)) >> shift.to(tl.uint64)).to(tl.uint32)


@triton.jit
def pick(i, a0, a1, a2, a3):
    """``a_i``."""
    return tl.where((i & 2) == 0, tl.where((i & 1) == 0, a0, a1), tl.where((i & 1) == 0, a2, a3))


@triton.jit
def halved(w, eta, kappa, z, x, y):
    """Unit numbers of both halves of a cell of a Brownian motion from those of the cell and of its node.

    `_numba.paths` has the same numbers: sqrt 2 times coefficients of W, H and K by the roots of their variances.
    """
    a, b = 0.7071067811865476 * w, 0.6123724356957946 * eta + 0.3535533905932738 * z
    d, e = 0.3535533905932738 * eta - 0.6123724356957945 * z, 0.6846531968814575 * kappa + 0.17677669529663687 * x
    f, g = 0.1767766952966369 * kappa - 0.6846531968814576 * x, 0.7071067811865475 * y
    return a + b, d + e, f + g, a - b, d - e, f - g


@triton.jit
def spread(x, inside, count):
    """Mean, and sum of squared distances to it, over the lanes inside, in float64."""
    mean = tl.sum(tl.where(inside, x.to(tl.float64), 0.0)) / count
    d = tl.where(inside, x.to(tl.float64) - mean, 0.0)
    return mean, tl.sum(d * d)


@triton.jit
def lane_sum(x, inside):
    """The sum over the lanes inside, in float64."""
    return tl.sum(tl.where(inside, x.to(tl.float64), 0.0))


@triton.jit
def add_sum(place, x, inside):
    """Adds that sum to a number that only this program changes."""
    tl.store(place, tl.load(place) + lane_sum(x, inside))


@triton.jit
def add_rows(places, x, inside):
    """Adds lanes to numbers of their own."""
    tl.store(places, tl.load(places, mask=inside, other=0.0) + x.to(tl.float64), mask=inside)


@triton.jit
def put(place, a0, a1, a2, a3, LANES: tl.constexpr):
    """Four numbers of each lane, side by side: one access, and one for the compiler to look at."""
    four = tl.join(tl.join(a0, a2), tl.join(a1, a3)).reshape([LANES, 4])
    tl.store(place + tl.arange(0, LANES)[:, None] * 4 + tl.arange(0, 4)[None, :], four)


@triton.jit
def vectors(place, SIDE: tl.constexpr, ROWS: tl.constexpr, count, LANES: tl.constexpr):
    """A vector that `put` left as a tile, a lane a column, with 0 beyond it and beyond the first ``count`` lanes."""
    i, l = tl.arange(0, SIDE)[:, None], tl.arange(0, LANES)[None, :]  # noqa: E741
    at = (i // 4 * LANES + l) * 4 + i % 4
    return tl.load(place + at, mask=(i < ROWS) & (l < count), other=0.0)


@triton.jit
def product(a, b, DOUBLE: tl.constexpr):
    """``a b^T``; in float32 of three products of 11 bits each, whose sums tensor cores cut off, hence none of steps."""
    if DOUBLE:
        return tl.dot(a, tl.trans(b), input_precision="ieee", out_dtype=tl.float64)
    return tl.dot(a, tl.trans(b), input_precision="ieee", out_dtype=tl.float32)


@triton.jit
def add_tile(place, total, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Adds a tile to a matrix that only this program changes."""
    i, j = tl.arange(0, total.shape[0])[:, None], tl.arange(0, total.shape[1])[None, :]
    inside, at = (i < ROWS) & (j < COLUMNS), place + i * COLUMNS + j
    tl.store(at, tl.load(at, mask=inside, other=0.0) + total.to(tl.float64), mask=inside)


@triton.jit
def add_up_kernel(parts, out, tiles, width, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """``out[j] += sum_i parts[i width + j]`` in an order that the constants alone say."""
    j = tl.program_id(0).to(tl.int64) * WIDTH + tl.arange(0, WIDTH)
    total = tl.zeros([WIDTH], tl.float64)
    for first in range(0, tiles, ROWS):
        i = first + tl.arange(0, ROWS).to(tl.int64)
        there = (i < tiles)[:, None] & (j < width)[None, :]
        total += tl.sum(tl.load(parts + i[:, None] * width + j[None, :], mask=there, other=0.0), axis=0)
    tl.store(out + j, tl.load(out + j, mask=j < width, other=0.0) + total, mask=j < width)
