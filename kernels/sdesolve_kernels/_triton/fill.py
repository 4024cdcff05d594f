"""Kernel that fills a tensor with normals, uniforms or words."""

# mypy: allow-untyped-defs, allow-incomplete-defs
# (the compiler types device code at each call)

from __future__ import annotations

import triton
import triton.language as tl

from .noise import words
from .steps import PLAIN
from .tiles import column_tile, columns, elements, integer, noise, row_length, store

NORMAL = tl.constexpr(0)
UNIFORM = tl.constexpr(1)
WORDS = tl.constexpr(2)


@triton.jit
def _raw(seed, stream, path0, q, VEC: tl.constexpr, LANES: tl.constexpr, BLOCK: tl.constexpr):
    """The words of a tile, arranged as `tiles.noise` arranges the normals."""
    path = path0
    if BLOCK != LANES:
        path = path0 + tl.arange(0, BLOCK) // LANES
    if VEC == 1:
        w0, w1, w2, w3 = words(seed, stream, path, q >> 2)
        odd = (q & 1) != 0
        w = tl.where((q & 2) != 0, tl.where(odd, w3, w2), tl.where(odd, w1, w0))
    else:
        w0, w1, w2, w3 = words(seed, stream, path, q)
        if VEC == 4:
            w = tl.join(tl.join(w0, w2), tl.join(w1, w3))
        else:
            w4, w5, w6, w7 = words(seed, stream, path, q + 1)
            first_half = tl.join(tl.join(w0, w4), tl.join(w2, w6))
            w = tl.join(first_half, tl.join(tl.join(w1, w5), tl.join(w3, w7)))
        w = tl.reshape(w, [BLOCK * VEC])
    return w


@triton.jit(do_not_specialize=PLAIN)
def fill_kernel(
    out_ptr, batch: tl.int64, m: tl.int64, stride: tl.int64,
    seed: tl.int64, stream_id: tl.int64, first_path: tl.int64, step: tl.int64,
    OP: tl.constexpr, LOADED: tl.constexpr, VEC: tl.constexpr, LANES: tl.constexpr,
    BLOCK: tl.constexpr, ALIGNED: tl.constexpr, INTERPRETED: tl.constexpr, DOUBLE: tl.constexpr,
):  # fmt: skip
    """``out[i, j] = Z(seed, stream, first_path + i, step stride + j)``, or the uniform or word there."""
    ROWS: tl.constexpr = BLOCK // LANES
    seed, first_path, step = integer(seed, LOADED & 1), integer(first_path, LOADED & 2), integer(step, LOADED & 4)
    batch, m = batch.to(tl.int64), row_length(m, VEC, ALIGNED)
    first, column, inside, q = columns(column_tile(), step * stride, m, LANES, BLOCK, VEC, ALIGNED)
    row_start = tl.program_id(0).to(tl.int64) * ROWS
    for row0 in range(row_start, batch, tl.num_programs(0).to(tl.int64) * ROWS):
        base, offset, mask = elements(row0, batch, first, column, inside, m, LANES, BLOCK, VEC)
        if OP == NORMAL:
            y = noise(seed, stream_id, first_path + row0, q, VEC, LANES, BLOCK, INTERPRETED, DOUBLE)
        else:
            y = _raw(seed, stream_id, first_path + row0, q, VEC, LANES, BLOCK)
            if OP == UNIFORM:
                # By way of float64, so that every narrower type gets the exact number rounded once, as the reference.
                y = y.to(tl.float64) * 2.3283064365386963e-10 + 1.1641532182693481e-10
                y = y.to(tl.float64 if DOUBLE else tl.float32)
        store(out_ptr + base + offset, y, mask, INTERPRETED)
