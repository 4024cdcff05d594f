"""Kernels of the Langevin corrector: norms, step size, update.

The norms are sums in a fixed order: within a program over tiles of constant size, then over the splits of a row, then
over groups of rows, then over groups. No atomics; the cut depends on the shape of one row alone, so a sample's
norm has the same bits whatever the batch around it.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
# (the compiler types device code at each call)

from __future__ import annotations

import triton
import triton.language as tl

from .steps import PLAIN
from .tiles import (
    PER_SAMPLE,
    coefficient,
    column_tile,
    columns,
    elements,
    integer,
    noise,
    noise_squares,
    over_elements,
    row_length,
    store,
)

SAMPLE = tl.constexpr(0)
BATCH = tl.constexpr(1)
DIMENSION = tl.constexpr(2)


@triton.jit(do_not_specialize=PLAIN)
def norms_kernel(
    s_ptr, partial_ptr,
    batch: tl.int64, m: tl.int64, splits: tl.int64, chunks: tl.int64,
    seed: tl.int64, stream_id: tl.int64, first_path: tl.int64, step: tl.int64,
    WITH_NOISE: tl.constexpr, CHUNKS: tl.constexpr, LOADED: tl.constexpr, VEC: tl.constexpr, LANES: tl.constexpr,
    BLOCK: tl.constexpr, ALIGNED: tl.constexpr, INTERPRETED: tl.constexpr, DOUBLE: tl.constexpr,
):  # fmt: skip
    """Sums of ``s^2`` and of ``z^2`` over the ``CHUNKS`` column tiles of one split: ``partial[2, splits, batch]``."""
    ROWS: tl.constexpr = BLOCK // LANES
    dtype: tl.constexpr = tl.float64 if DOUBLE else tl.float32
    seed, first_path, step = integer(seed, LOADED & 1), integer(first_path, LOADED & 2), integer(step, LOADED & 4)
    batch, m, splits, chunks = batch.to(tl.int64), row_length(m, VEC, ALIGNED), splits.to(tl.int64), chunks.to(tl.int64)
    row0 = tl.program_id(0).to(tl.int64) * ROWS
    split = column_tile()
    s_sum = tl.zeros([BLOCK * VEC], dtype)
    z_sum = tl.zeros([BLOCK], dtype)
    for chunk in range(split * CHUNKS, tl.minimum(split * CHUNKS + CHUNKS, chunks)):
        first, column, inside, q = columns(chunk, step * m, m, LANES, BLOCK, VEC, ALIGNED)
        base, offset, mask = elements(row0, batch, first, column, inside, m, LANES, BLOCK, VEC)
        s = tl.load(s_ptr + base + offset, mask=mask, other=0.0).to(dtype)
        s_sum += s * s
        if WITH_NOISE:
            path0 = first_path + row0
            z_sum += noise_squares(
                seed, stream_id, path0, q, first, m, VEC, LANES, BLOCK, ALIGNED, INTERPRETED, DOUBLE
            )  # fmt: skip
    row = tl.arange(0, ROWS)
    left = tl.minimum(batch - row0, (chunks - split * CHUNKS) * ROWS)  # none in splits past the last
    there = row < tl.minimum(left, ROWS).to(tl.int32)
    partial_ptr += split * batch + row0
    tl.store(partial_ptr + row, tl.sum(tl.reshape(s_sum, [ROWS, LANES * VEC]), 1), mask=there)
    if WITH_NOISE:
        partial_ptr += splits * batch
        tl.store(partial_ptr + row, tl.sum(tl.reshape(z_sum, [ROWS, LANES]), 1), mask=there)


@triton.jit
def _store_size(size_ptr, snr, ratio):
    tl.store(size_ptr, (2.0 * snr * snr * ratio * ratio).to(size_ptr.dtype.element_ty))


@triton.jit(do_not_specialize=PLAIN)
def size_kernel(
    partial_ptr, size_ptr, sums_ptr, size_c, expected_c, batch: tl.int64, splits: tl.int64, groups: tl.int64,
    MODE: tl.constexpr, SIZE: tl.constexpr, ONE_GROUP: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """``2 (snr n / s)^2`` of each sample, or of the batch if it is one group of rows; else the group's sums of norms.

    In float64 all through: this is one program for a group of rows, with a number of lanes for the splits of each.
    """
    batch, splits = batch.to(tl.int64), splits.to(tl.int64)
    row0 = tl.program_id(0).to(tl.int64) * ROWS
    row = tl.arange(0, ROWS)
    there = row < tl.minimum(batch - row0, ROWS).to(tl.int32)
    s = tl.zeros([ROWS, LANES], tl.float64)
    n = tl.zeros([ROWS, LANES], tl.float64)
    for start in range(0, splits, LANES):
        split = start + tl.arange(0, LANES)
        part = partial_ptr + (row0 + row)[:, None] + split[None, :] * batch
        inside = there[:, None] & (split < splits)[None, :]
        s += tl.load(part, mask=inside, other=0.0).to(tl.float64)
        if MODE != DIMENSION:
            n += tl.load(part + splits * batch, mask=inside, other=0.0).to(tl.float64)
    s, n = tl.sum(s, 1), tl.sum(n, 1)
    s, n = tl.sqrt(s), tl.sqrt(n)
    snr = coefficient(size_c, 0, batch, SIZE, 1, 1, True)
    if MODE == SAMPLE:
        ratio = n / tl.where(there, s, 1.0)
        size = 2.0 * snr * snr * ratio * ratio
        tl.store(size_ptr + row0 + row, size.to(size_ptr.dtype.element_ty), mask=there)
    else:
        s_total, n_total = tl.sum(s, 0), tl.sum(n, 0)
        if ONE_GROUP:
            if MODE == DIMENSION:
                n_total = coefficient(expected_c, 0, batch, 2, 1, 1, True) * batch.to(tl.float64)
            _store_size(size_ptr, snr, n_total / s_total)
        else:
            tl.store(sums_ptr + tl.program_id(0), s_total)
            if MODE != DIMENSION:
                tl.store(sums_ptr + groups.to(tl.int64) + tl.program_id(0), n_total)


@triton.jit(do_not_specialize=PLAIN)
def total_size_kernel(
    sums_ptr, size_ptr, size_c, expected_c, batch: tl.int64, groups: tl.int64,
    MODE: tl.constexpr, SIZE: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """``2 (snr n / s)^2`` of the batch from its groups' sums: one program."""
    groups = groups.to(tl.int64)
    s = tl.zeros([GROUP], tl.float64)
    n = tl.zeros([GROUP], tl.float64)
    for start in range(0, groups, GROUP):
        index = start + tl.arange(0, GROUP)
        s += tl.load(sums_ptr + index, mask=index < groups, other=0.0)
        if MODE != DIMENSION:
            n += tl.load(sums_ptr + groups + index, mask=index < groups, other=0.0)
    n_total = tl.sum(n, 0)
    if MODE == DIMENSION:
        n_total = coefficient(expected_c, 0, batch, 2, 1, 1, True) * batch.to(tl.float64)
    _store_size(size_ptr, coefficient(size_c, 0, batch, SIZE, 1, 1, True), n_total / tl.sum(s, 0))


@triton.jit(do_not_specialize=PLAIN)
def langevin_kernel(
    x_ptr, s_ptr, alpha_c, size_c, out_ptr,
    batch: tl.int64, m: tl.int64, seed: tl.int64, stream_id: tl.int64, first_path: tl.int64, step: tl.int64,
    ALPHA: tl.constexpr, SIZE: tl.constexpr, LOADED: tl.constexpr, VEC: tl.constexpr, LANES: tl.constexpr,
    BLOCK: tl.constexpr, ALIGNED: tl.constexpr, INTERPRETED: tl.constexpr, DOUBLE: tl.constexpr,
):  # fmt: skip
    """``out = x + delta s + sqrt(2 delta) z``, ``delta = alpha size``."""
    ROWS: tl.constexpr = BLOCK // LANES
    dtype: tl.constexpr = tl.float64 if DOUBLE else tl.float32
    KIND: tl.constexpr = PER_SAMPLE if (ALPHA == PER_SAMPLE or SIZE == PER_SAMPLE) else 0
    seed, first_path, step = integer(seed, LOADED & 1), integer(first_path, LOADED & 2), integer(step, LOADED & 4)
    batch, m = batch.to(tl.int64), row_length(m, VEC, ALIGNED)
    first, column, inside, q = columns(column_tile(), step * m, m, LANES, BLOCK, VEC, ALIGNED)
    row_start = tl.program_id(0).to(tl.int64) * ROWS
    if ALPHA != PER_SAMPLE:
        alpha = coefficient(alpha_c, row_start, batch, ALPHA, LANES, BLOCK, DOUBLE)
    if SIZE != PER_SAMPLE:
        size = coefficient(size_c, row_start, batch, SIZE, LANES, BLOCK, DOUBLE)
    for row0 in range(row_start, batch, tl.num_programs(0).to(tl.int64) * ROWS):
        base, offset, mask = elements(row0, batch, first, column, inside, m, LANES, BLOCK, VEC)
        x = tl.load(x_ptr + base + offset, mask=mask).to(dtype)
        s = tl.load(s_ptr + base + offset, mask=mask).to(dtype)
        if ALPHA == PER_SAMPLE:
            alpha = coefficient(alpha_c, row0, batch, ALPHA, LANES, BLOCK, DOUBLE)
        if SIZE == PER_SAMPLE:
            size = coefficient(size_c, row0, batch, SIZE, LANES, BLOCK, DOUBLE)
        delta = alpha * size
        c = over_elements(tl.sqrt(2.0 * delta), KIND, VEC, LANES, BLOCK)
        z = noise(seed, stream_id, first_path + row0, q, VEC, LANES, BLOCK, INTERPRETED, DOUBLE)
        y = x + over_elements(delta, KIND, VEC, LANES, BLOCK) * s + c * z
        store(out_ptr + base + offset, y, mask, INTERPRETED)
