"""Kernels of the denoising score-matching loss: residual, gradient and sum of squares in one pass."""

# mypy: allow-untyped-defs, allow-incomplete-defs
# (the compiler types device code at each call)

from __future__ import annotations

import triton
import triton.language as tl

from .steps import PLAIN
from .tiles import (
    NUMBER,
    coefficient,
    column_tile,
    columns,
    elements,
    integer,
    noise,
    over_elements,
    row_length,
    store,
)


@triton.jit
def _tile(
    o_ptr, x0_ptr, p_c, q_c, weight_c, upstream_c, share_c, grad_ptr, partial_ptr,
    row0, split, batch, m, chunks, seed, stream_id, first_path, step,
    DATA: tl.constexpr, LOSS: tl.constexpr, GRAD: tl.constexpr,
    P: tl.constexpr, Q: tl.constexpr, WEIGHT: tl.constexpr, UPSTREAM: tl.constexpr,
    CHUNKS: tl.constexpr, VEC: tl.constexpr, LANES: tl.constexpr,
    BLOCK: tl.constexpr, ALIGNED: tl.constexpr, INTERPRETED: tl.constexpr, DOUBLE: tl.constexpr,
):  # fmt: skip
    """One split of a tile of rows."""
    ROWS: tl.constexpr = BLOCK // LANES
    dtype: tl.constexpr = tl.float64 if DOUBLE else tl.float32
    c_z = over_elements(coefficient(q_c, row0, batch, Q, LANES, BLOCK, DOUBLE), Q, VEC, LANES, BLOCK)
    if DATA:
        c_x = over_elements(coefficient(p_c, row0, batch, P, LANES, BLOCK, DOUBLE), P, VEC, LANES, BLOCK)
    if GRAD:
        scale = over_elements(
            coefficient(weight_c, row0, batch, WEIGHT, LANES, BLOCK, DOUBLE), WEIGHT, VEC, LANES, BLOCK
        )
        above = coefficient(upstream_c, row0, batch, UPSTREAM, LANES, BLOCK, DOUBLE)
        share = coefficient(share_c, row0, batch, NUMBER, LANES, BLOCK, DOUBLE)
        scale = scale * over_elements(above, UPSTREAM, VEC, LANES, BLOCK) * share
    r_sum = tl.zeros([BLOCK * VEC], dtype)
    for chunk in range(split * CHUNKS, tl.minimum(split * CHUNKS + CHUNKS, chunks)):
        first, column, inside, q = columns(chunk, step * m, m, LANES, BLOCK, VEC, ALIGNED)
        base, offset, mask = elements(row0, batch, first, column, inside, m, LANES, BLOCK, VEC)
        o = tl.load(o_ptr + base + offset, mask=mask, other=0.0).to(dtype)
        z = noise(seed, stream_id, first_path + row0, q, VEC, LANES, BLOCK, INTERPRETED, DOUBLE)
        r = o - c_z * z
        if DATA:
            r -= c_x * tl.load(x0_ptr + base + offset, mask=mask, other=0.0).to(dtype)
        if GRAD:
            store(grad_ptr + base + offset, scale * r, mask, INTERPRETED)
        if LOSS:
            r = tl.where(mask, r, 0.0)
            r_sum += r * r
    if LOSS:
        row = tl.arange(0, ROWS)
        left = tl.minimum(batch - row0, (chunks - split * CHUNKS) * ROWS)  # none in splits past the last
        there = row < tl.minimum(left, ROWS).to(tl.int32)
        r_rows = tl.sum(tl.reshape(r_sum, [ROWS, LANES * VEC]), 1)
        tl.store(partial_ptr + split * batch + row0 + row, r_rows, mask=there)


@triton.jit(do_not_specialize=PLAIN)
def denoising_kernel(
    o_ptr, x0_ptr, p_c, q_c, weight_c, upstream_c, share_c, grad_ptr, partial_ptr,
    batch: tl.int64, m: tl.int64, chunks: tl.int64,
    seed: tl.int64, stream_id: tl.int64, first_path: tl.int64, step: tl.int64,
    DATA: tl.constexpr, LOSS: tl.constexpr, GRAD: tl.constexpr, MADE: tl.constexpr,
    P: tl.constexpr, Q: tl.constexpr, WEIGHT: tl.constexpr, UPSTREAM: tl.constexpr,
    CHUNKS: tl.constexpr, LOADED: tl.constexpr, VEC: tl.constexpr, LANES: tl.constexpr,
    BLOCK: tl.constexpr, ALIGNED: tl.constexpr, INTERPRETED: tl.constexpr, DOUBLE: tl.constexpr,
):  # fmt: skip
    """``r = o - p x0 - q z``; ``grad = upstream share weight r``; ``partial[splits, batch]`` holds sums of ``r^2``.

    With ``MADE`` the gradient is there for an upstream of 1: nothing is done if it is, by few programs.
    """
    ROWS: tl.constexpr = BLOCK // LANES
    seed, first_path, step = integer(seed, LOADED & 1), integer(first_path, LOADED & 2), integer(step, LOADED & 4)
    batch, m, chunks = batch.to(tl.int64), row_length(m, VEC, ALIGNED), chunks.to(tl.int64)
    start, split = tl.program_id(0).to(tl.int64) * ROWS, column_tile()
    if MADE:
        above = coefficient(upstream_c, 0, batch, UPSTREAM, LANES, BLOCK, DOUBLE)
        for row0 in range(start, tl.where(above == 1.0, 0, batch), tl.num_programs(0).to(tl.int64) * ROWS):
            _tile(
                o_ptr, x0_ptr, p_c, q_c, weight_c, upstream_c, share_c, grad_ptr, partial_ptr,
                row0, split, batch, m, chunks, seed, stream_id, first_path, step, DATA, LOSS, GRAD,
                P, Q, WEIGHT, UPSTREAM, CHUNKS, VEC, LANES, BLOCK, ALIGNED, INTERPRETED, DOUBLE,
            )  # fmt: skip
    else:
        _tile(
            o_ptr, x0_ptr, p_c, q_c, weight_c, upstream_c, share_c, grad_ptr, partial_ptr,
            start, split, batch, m, chunks, seed, stream_id, first_path, step, DATA, LOSS, GRAD,
            P, Q, WEIGHT, UPSTREAM, CHUNKS, VEC, LANES, BLOCK, ALIGNED, INTERPRETED, DOUBLE,
        )  # fmt: skip


@triton.jit(do_not_specialize=PLAIN)
def loss_kernel(
    partial_ptr, weight_c, loss_ptr, sums_ptr, batch: tl.int64, m: tl.int64, splits: tl.int64,
    WEIGHT: tl.constexpr, MEAN: tl.constexpr, ONE_GROUP: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """``loss_i = weight_i / m sum_split partial``; with ``MEAN``, their sum over this group of rows in its place.

    Of one group alone, the mean. In float64, with a number of lanes for the splits of each row.
    """
    batch, m, splits = batch.to(tl.int64), m.to(tl.int64), splits.to(tl.int64)
    row0 = tl.program_id(0).to(tl.int64) * ROWS
    row = tl.arange(0, ROWS)
    there = row < tl.minimum(batch - row0, ROWS).to(tl.int32)
    total = tl.zeros([ROWS, LANES], tl.float64)
    for start in range(0, splits, LANES):
        split = start + tl.arange(0, LANES)
        part = partial_ptr + (row0 + row)[:, None] + split[None, :] * batch
        total += tl.load(part, mask=there[:, None] & (split < splits)[None, :], other=0.0).to(tl.float64)
    total = tl.sum(total, 1)
    loss = coefficient(weight_c, row0, batch, WEIGHT, 1, ROWS, True) * total / m.to(tl.float64)
    if MEAN:
        total = tl.sum(tl.where(there, loss, 0.0), 0)
        if ONE_GROUP:
            tl.store(loss_ptr, (total / batch.to(tl.float64)).to(loss_ptr.dtype.element_ty))
        else:
            tl.store(sums_ptr + tl.program_id(0), total)
    else:
        tl.store(loss_ptr + row0 + row, loss.to(loss_ptr.dtype.element_ty), mask=there)


@triton.jit(do_not_specialize=PLAIN)
def mean_kernel(sums_ptr, mean_ptr, batch: tl.int64, groups: tl.int64, GROUP: tl.constexpr):
    """Mean over the batch from its groups' sums: one program."""
    groups = groups.to(tl.int64)
    total = tl.zeros([GROUP], tl.float64)
    for start in range(0, groups, GROUP):
        index = start + tl.arange(0, GROUP)
        total += tl.load(sums_ptr + index, mask=index < groups, other=0.0)
    tl.store(mean_ptr, (tl.sum(total, 0) / batch.to(tl.float64)).to(mean_ptr.dtype.element_ty))
