"""Kernel of products of a matrix for each row, and of the Euler-Maruyama step whose noise is such a product.

A program owns a tile of ``rows x outputs`` and goes along the channels in chunks; a lane of a chunk is a Philox block
of a row, made once for all outputs of the tile. A chunk's products are summed in a fixed order, which like the size of
a tile depends on the shape of a matrix alone: a row has the same bits in any batch.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
# (the compiler types device code at each call)

from __future__ import annotations

import triton
import triton.language as tl

from .noise import normals
from .steps import PLAIN
from .tiles import PER_SAMPLE, coefficient, column_tile, integer, row_length, store


@triton.jit(do_not_specialize=[*PLAIN, "d"])
def matrix_kernel(
    x_ptr, f_ptr, g_ptr, v_ptr, dt_c, out_ptr,
    batch: tl.int64, d: tl.int64, m: tl.int64,
    seed: tl.int64, stream_id: tl.int64, first_path: tl.int64, step: tl.int64,
    STEP: tl.constexpr, ONE_MATRIX: tl.constexpr, DT: tl.constexpr, LOADED: tl.constexpr, OUTPUTS: tl.constexpr,
    CHANNELS: tl.constexpr, VEC: tl.constexpr, BLOCK: tl.constexpr, ALIGNED: tl.constexpr, INTERPRETED: tl.constexpr,
    DOUBLE: tl.constexpr,
):  # fmt: skip
    """``out = x + f dt + sqrt|dt| g z``, or, unless ``STEP``, ``out = g v``."""
    LANES: tl.constexpr = CHANNELS // VEC
    ROWS: tl.constexpr = BLOCK // (OUTPUTS * LANES)
    dtype: tl.constexpr = tl.float64 if DOUBLE else tl.float32
    seed, first_path, step = integer(seed, LOADED & 1), integer(first_path, LOADED & 2), integer(step, LOADED & 4)
    batch, d, m = batch.to(tl.int64), d.to(tl.int64), row_length(m, VEC, ALIGNED)
    row0 = tl.program_id(0).to(tl.int64) * ROWS
    row, output = row0 + tl.arange(0, ROWS), column_tile() * OUTPUTS + tl.arange(0, OUTPUTS)
    n0 = step * m if STEP else step * 0
    # Chunks begin with whole Philox blocks: of a row that starts inside one, the first channels are not its own.
    begin = step * 0 if ALIGNED else -(n0 & 3)
    there, some = row < batch, output < d
    matrix = output[None, :, None] * m
    if not ONE_MATRIX:
        matrix += row[:, None, None] * (d * m)
    total = tl.zeros([ROWS, OUTPUTS], dtype)
    for k0 in range(begin, m, CHANNELS):
        k = k0 + tl.arange(0, CHANNELS)
        inside = k < m
        if not ALIGNED:
            inside = inside & (k >= 0)
        if STEP:
            q = ((n0 + k0) >> 2) + tl.arange(0, LANES)
            path = (first_path + row)[:, None]
            z0, z1, z2, z3 = normals(seed, stream_id, path, q[None, :], INTERPRETED, DOUBLE)
            z = tl.reshape(tl.join(tl.join(z0, z2), tl.join(z1, z3)), [ROWS, CHANNELS])
        else:
            v_mask = there[:, None] & inside[None, :]
            z = tl.load(v_ptr + row[:, None] * m + k[None, :], mask=v_mask, other=0.0).to(dtype)
        mask = some[None, :, None] & inside[None, None, :]
        if not ONE_MATRIX:
            mask = mask & there[:, None, None]
        g = tl.load(g_ptr + matrix + k[None, None, :], mask=mask, other=0.0).to(dtype)
        total += tl.sum(g * tl.expand_dims(z, 1), 2)
    element, mask = row[:, None] * d + output[None, :], there[:, None] & some[None, :]
    if STEP:
        x = tl.load(x_ptr + element, mask=mask).to(dtype)
        f = tl.load(f_ptr + element, mask=mask).to(dtype)
        if DT == PER_SAMPLE:
            dt = tl.expand_dims(tl.load(dt_c + row, mask=there, other=0.0).to(dtype), 1)
        else:
            dt = coefficient(dt_c, row0, batch, DT, 1, 1, DOUBLE)
        total = x + f * dt + tl.sqrt(tl.abs(dt)) * total
    store(out_ptr + element, total, mask, INTERPRETED)
