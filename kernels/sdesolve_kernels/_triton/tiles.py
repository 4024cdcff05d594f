"""Device functions: which rows, columns and normals a program works on.

A state is ``batch`` rows of ``m`` elements. A program owns ``BLOCK`` lanes, ``LANES`` of them along a row, so
``BLOCK // LANES`` rows; a lane owns ``VEC`` elements that lie next to each other. Tensors over elements are flat, of
``BLOCK * VEC`` entries: with the four normals of one Philox call joined as the fastest dimension every thread holds 16
contiguous bytes, and nothing passes through shared memory.

Three layouts, chosen by the launcher from ``m`` and the index of the first normal:

- ``VEC`` 4 or 8, ``ALIGNED``: ``m`` is a multiple of ``VEC``, every row starts a Philox block.
- ``VEC`` 4, not aligned: rows start inside a block; lanes follow the blocks, and the columns are shifted by the part of
  the first block that belongs to earlier steps.
- ``VEC`` 1: a lane is one element and picks its normal from a Philox call of its own; for ``m`` below 4.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
# (the compiler types device code at each call)

from __future__ import annotations

import triton
import triton.language as tl

from .noise import box_muller, normals, words

# A second and third grid dimension hold the column tiles: each is limited to 65535.
CHUNKS_PER_Z = tl.constexpr(32768)

# How a coefficient is passed.
SHARED = tl.constexpr(0)  # pointer to one number
PER_SAMPLE = tl.constexpr(1)  # pointer to one number a row
NUMBER = tl.constexpr(2)  # the bits of a float64, in an integer: exact, and no transfer


@triton.jit
def integer(value, LOADED: tl.constexpr):
    """An int64 from an argument that is the integer or, if ``LOADED``, its address in device memory."""
    value = value.to(tl.int64)
    if LOADED:
        value = tl.load(value.to(tl.pointer_type(tl.int64)))
    return value


@triton.jit
def column_tile():
    """Index of this program's column tile."""
    return (tl.program_id(2) * CHUNKS_PER_Z + tl.program_id(1)).to(tl.int64)


@triton.jit
def columns(chunk, n0, m, LANES: tl.constexpr, BLOCK: tl.constexpr, VEC: tl.constexpr, ALIGNED: tl.constexpr):
    """Of column tile ``chunk``: first column, columns relative to it, which exist, and the lanes' noise index.

    The noise index is that of the Philox block, or of the normal if ``VEC`` is 1. ``n0`` is the index of the first
    normal of a row.
    """
    lane = tl.arange(0, BLOCK) % LANES
    column = tl.arange(0, BLOCK * VEC) % (LANES * VEC)
    if VEC == 1:
        first = chunk * LANES
        inside = column < tl.minimum(m - first, LANES).to(tl.int32)
        q = n0 + first + lane
    else:
        first = chunk * (LANES * VEC)
        q = (n0 >> 2) + (chunk * LANES + lane) * (VEC // 4)
        if ALIGNED:
            # Written as a multiple of VEC: that is what lets the masked accesses stay 128 bits wide.
            inside = column < (tl.minimum(m - first, LANES * VEC).to(tl.int32) // VEC) * VEC
        else:
            first -= n0 & 3
            inside = column < tl.minimum(m - first, LANES * VEC).to(tl.int32)
            inside = inside & (column >= -tl.minimum(first, 0).to(tl.int32))
    return first, column, inside, q


@triton.jit
def row_length(m, VEC: tl.constexpr, ALIGNED: tl.constexpr):
    """``m`` as int64, written so that the compiler sees the multiple it is when ``ALIGNED``."""
    m = m.to(tl.int64)
    if ALIGNED:
        m = (m // VEC) * VEC
    return m


@triton.jit
def spread(v, VEC: tl.constexpr, BLOCK: tl.constexpr):
    """A value a lane, repeated for each of its elements."""
    if VEC != 1:
        v = tl.join(v, v)
        v = tl.join(v, v)
        if VEC == 8:
            v = tl.join(v, v)
        v = tl.reshape(v, [BLOCK * VEC])
    return v


@triton.jit
def elements(row0, batch, first, column, inside, m, LANES: tl.constexpr, BLOCK: tl.constexpr, VEC: tl.constexpr):
    """Offsets of a tile's elements: a 64-bit scalar, 32-bit remainders, and the mask of those that exist."""
    base = row0 * m + first
    if BLOCK != LANES:
        row = tl.arange(0, BLOCK * VEC) // (LANES * VEC)
        inside = inside & (row < tl.minimum(batch - row0, BLOCK // LANES).to(tl.int32))
        # The launcher sees to it that a tile of several rows spans less than 2^31 elements.
        column = row * m.to(tl.int32) + column
    return base, column, inside


@triton.jit
def noise(
    seed, stream, path0, q, VEC: tl.constexpr, LANES: tl.constexpr, BLOCK: tl.constexpr,
    INTERPRETED: tl.constexpr, DOUBLE: tl.constexpr,
):  # fmt: skip
    """The normals of a tile whose first row is path ``path0``; ``q`` is the noise index from `columns`."""
    path = path0
    if BLOCK != LANES:
        path = path0 + tl.arange(0, BLOCK) // LANES
    if VEC == 1:
        w0, w1, w2, w3 = words(seed, stream, path, q >> 2)
        second = (q & 2) != 0
        z0, z1 = box_muller(tl.where(second, w2, w0), tl.where(second, w3, w1), INTERPRETED, DOUBLE)
        z = tl.where((q & 1) != 0, z1, z0)
    else:
        z0, z1, z2, z3 = normals(seed, stream, path, q, INTERPRETED, DOUBLE)
        if VEC == 4:
            z = tl.join(tl.join(z0, z2), tl.join(z1, z3))
        else:
            z4, z5, z6, z7 = normals(seed, stream, path, q + 1, INTERPRETED, DOUBLE)
            even = tl.join(tl.join(z0, z4), tl.join(z2, z6))
            odd = tl.join(tl.join(z1, z5), tl.join(z3, z7))
            z = tl.join(even, odd)
        z = tl.reshape(z, [BLOCK * VEC])
    return z


@triton.jit
def _squares(z0, z1, z2, z3, column, low, high, ALIGNED: tl.constexpr):
    if ALIGNED:  # all four exist, or none
        total = tl.where(column < high, z0 * z0 + z1 * z1 + z2 * z2 + z3 * z3, 0.0)
    else:
        total = tl.where((column >= low) & (column < high), z0 * z0, 0.0)
        total += tl.where((column >= low - 1) & (column < high - 1), z1 * z1, 0.0)
        total += tl.where((column >= low - 2) & (column < high - 2), z2 * z2, 0.0)
        total += tl.where((column >= low - 3) & (column < high - 3), z3 * z3, 0.0)
    return total


@triton.jit
def noise_squares(
    seed, stream, path0, q, first, m, VEC: tl.constexpr, LANES: tl.constexpr, BLOCK: tl.constexpr,
    ALIGNED: tl.constexpr, INTERPRETED: tl.constexpr, DOUBLE: tl.constexpr,
):  # fmt: skip
    """Sum over each lane's existing elements of ``z^2``: `noise` without the arrangement into elements.

    Squaring the arranged tile under its mask takes passes through shared memory: 30 instructions an element and 10
    barriers, where this takes 26 and none.
    """
    path = path0
    if BLOCK != LANES:
        path = path0 + tl.arange(0, BLOCK) // LANES
    column = (tl.arange(0, BLOCK) % LANES) * VEC
    low = -tl.minimum(first, 0).to(tl.int32)
    high = tl.minimum(m - first, LANES * VEC).to(tl.int32)
    if VEC == 1:
        z = noise(seed, stream, path0, q, VEC, LANES, BLOCK, INTERPRETED, DOUBLE)
        total = tl.where(column < high, z * z, 0.0)
    else:
        z0, z1, z2, z3 = normals(seed, stream, path, q, INTERPRETED, DOUBLE)
        total = _squares(z0, z1, z2, z3, column, low, high, ALIGNED)
        if VEC == 8:
            z0, z1, z2, z3 = normals(seed, stream, path, q + 1, INTERPRETED, DOUBLE)
            total += _squares(z0, z1, z2, z3, column, low, high, ALIGNED)
    return total


@triton.jit
def coefficient(
    c, row0, batch, KIND: tl.constexpr, LANES: tl.constexpr, BLOCK: tl.constexpr, DOUBLE: tl.constexpr,
):  # fmt: skip
    """A coefficient in the compute dtype: a scalar, or a value a lane if it is per sample and the tile has rows."""
    if KIND == NUMBER:
        v = c.to(tl.int64).to(tl.float64, bitcast=True)
    elif KIND == SHARED:
        v = tl.load(c)
    elif BLOCK == LANES:
        v = tl.load(c + row0)
    else:
        row = tl.arange(0, BLOCK) // LANES
        v = tl.load(c + row0 + row, mask=row < tl.minimum(batch - row0, BLOCK // LANES).to(tl.int32), other=0.0)
    return v.to(tl.float64 if DOUBLE else tl.float32)


@triton.jit
def over_elements(v, KIND: tl.constexpr, VEC: tl.constexpr, LANES: tl.constexpr, BLOCK: tl.constexpr):
    """What `coefficient` returned, shaped to multiply elements."""
    if KIND == PER_SAMPLE and BLOCK != LANES:
        v = spread(v, VEC, BLOCK)
    return v


@triton.jit
def store(ptr, y, mask, INTERPRETED: tl.constexpr):
    """Store elements rounded to nearest even in the pointer's dtype."""
    dtype: tl.constexpr = ptr.dtype.element_ty
    if INTERPRETED and dtype == tl.bfloat16:
        # The interpreter (Triton 3.9) truncates to bfloat16, where the hardware rounds: round before it does.
        w = y.to(tl.int32, bitcast=True)
        w = (w + 0x7FFF + ((w >> 16) & 1)) & -65536
        y = tl.where(y == y, w.to(tl.float32, bitcast=True), y)
    tl.store(ptr, y.to(dtype), mask=mask)
