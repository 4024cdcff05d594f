"""Kernels of the steps that are one pass over the state: Euler-Maruyama, linear, perturbation."""

# mypy: allow-untyped-defs, allow-incomplete-defs
# (the compiler types device code at each call)

from __future__ import annotations

import triton
import triton.language as tl

from .tiles import (
    PER_SAMPLE,
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

# Integers change from call to call and must not compile a kernel anew when they happen to be 1 or a multiple of 16.
# Coefficients may be numbers in an integer's clothing (`tiles.NUMBER`).
PLAIN = [
    "batch", "m", "chunks", "seed", "stream_id", "first_path", "step", "stride", "row", "splits", "groups",
    "g_c", "dt_c", "alpha_c", "sigma_c", "size_c", "p_c", "q_c", "weight_c", "upstream_c", "share_c", "expected_c",
]  # fmt: skip

# What `perturb_kernel` does with noise.
ABSENT, ADDED, FACTOR = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)


@triton.jit(do_not_specialize=PLAIN)
def euler_maruyama_kernel(
    x_ptr, f_ptr, g_ptr, g_c, dt_c, out_ptr,
    batch: tl.int64, m: tl.int64, seed: tl.int64, stream_id: tl.int64, first_path: tl.int64, step: tl.int64,
    G: tl.constexpr, DT: tl.constexpr, LOADED: tl.constexpr, VEC: tl.constexpr, LANES: tl.constexpr,
    BLOCK: tl.constexpr, ALIGNED: tl.constexpr, INTERPRETED: tl.constexpr, DOUBLE: tl.constexpr,
):  # fmt: skip
    """``out = x + f dt + g sqrt|dt| z``; ``G`` is 3 for a whole ``g`` at ``g_ptr``, else how ``g_c`` is passed."""
    ROWS: tl.constexpr = BLOCK // LANES
    dtype: tl.constexpr = tl.float64 if DOUBLE else tl.float32
    seed, first_path, step = integer(seed, LOADED & 1), integer(first_path, LOADED & 2), integer(step, LOADED & 4)
    batch, m = batch.to(tl.int64), row_length(m, VEC, ALIGNED)
    first, column, inside, q = columns(column_tile(), step * m, m, LANES, BLOCK, VEC, ALIGNED)
    row_start = tl.program_id(0).to(tl.int64) * ROWS
    # What the rows share is loaded once: the loop stores, so the compiler would load and convert it for every tile.
    if DT != PER_SAMPLE:
        dt = coefficient(dt_c, row_start, batch, DT, LANES, BLOCK, DOUBLE)
    if G != PER_SAMPLE and G != 3:
        g = coefficient(g_c, row_start, batch, G, LANES, BLOCK, DOUBLE)
    for row0 in range(row_start, batch, tl.num_programs(0).to(tl.int64) * ROWS):
        base, offset, mask = elements(row0, batch, first, column, inside, m, LANES, BLOCK, VEC)
        x = tl.load(x_ptr + base + offset, mask=mask).to(dtype)
        f = tl.load(f_ptr + base + offset, mask=mask).to(dtype)
        if DT == PER_SAMPLE:
            dt = coefficient(dt_c, row0, batch, DT, LANES, BLOCK, DOUBLE)
        c = tl.sqrt(tl.abs(dt))
        z = noise(seed, stream_id, first_path + row0, q, VEC, LANES, BLOCK, INTERPRETED, DOUBLE)
        if G == 3:
            g = tl.load(g_ptr + base + offset, mask=mask).to(dtype)
            c = over_elements(c, DT, VEC, LANES, BLOCK) * g
        elif G == PER_SAMPLE:
            g = coefficient(g_c, row0, batch, G, LANES, BLOCK, DOUBLE)
            c = over_elements(c * g, G, VEC, LANES, BLOCK)
        else:
            c = over_elements(c * g, DT, VEC, LANES, BLOCK)
        y = x + f * over_elements(dt, DT, VEC, LANES, BLOCK) + c * z
        store(out_ptr + base + offset, y, mask, INTERPRETED)


@triton.jit
def _table_row(
    table_ptr, width, row0, batch, TERMS: tl.constexpr, KIND: tl.constexpr,
    LANES: tl.constexpr, BLOCK: tl.constexpr, DOUBLE: tl.constexpr,
):  # fmt: skip
    """``a, b_0 ... b_3, c``; entries beyond ``TERMS`` are copies of ``c``, which is there, and unused."""
    LAST: tl.constexpr = TERMS + 1
    I1: tl.constexpr = 2 if TERMS > 1 else LAST
    I2: tl.constexpr = 3 if TERMS > 2 else LAST
    I3: tl.constexpr = 4 if TERMS > 3 else LAST
    a = coefficient(table_ptr, row0, batch, KIND, LANES, BLOCK, DOUBLE)
    b0 = coefficient(table_ptr + width, row0, batch, KIND, LANES, BLOCK, DOUBLE)
    b1 = coefficient(table_ptr + I1 * width, row0, batch, KIND, LANES, BLOCK, DOUBLE)
    b2 = coefficient(table_ptr + I2 * width, row0, batch, KIND, LANES, BLOCK, DOUBLE)
    b3 = coefficient(table_ptr + I3 * width, row0, batch, KIND, LANES, BLOCK, DOUBLE)
    c = coefficient(table_ptr + LAST * width, row0, batch, KIND, LANES, BLOCK, DOUBLE)
    return a, b0, b1, b2, b3, c


@triton.jit(do_not_specialize=PLAIN)
def linear_kernel(
    x_ptr, s0_ptr, s1_ptr, s2_ptr, s3_ptr, table_ptr, out_ptr,
    batch: tl.int64, m: tl.int64, row: tl.int64,
    seed: tl.int64, stream_id: tl.int64, first_path: tl.int64, step: tl.int64,
    TERMS: tl.constexpr, STOCHASTIC: tl.constexpr, KIND: tl.constexpr, LOADED: tl.constexpr, VEC: tl.constexpr,
    LANES: tl.constexpr, BLOCK: tl.constexpr, ALIGNED: tl.constexpr, INTERPRETED: tl.constexpr, DOUBLE: tl.constexpr,
):  # fmt: skip
    """``out = a x + sum_i b_i s_i + c z``, where ``(a, b_0 ... b_{TERMS - 1}, c)`` is row ``row`` of the table."""
    ROWS: tl.constexpr = BLOCK // LANES
    dtype: tl.constexpr = tl.float64 if DOUBLE else tl.float32
    seed, first_path, step = integer(seed, LOADED & 1), integer(first_path, LOADED & 2), integer(step, LOADED & 4)
    batch, m = batch.to(tl.int64), row_length(m, VEC, ALIGNED)
    width = batch if KIND == PER_SAMPLE else 1
    table_ptr += integer(row, LOADED & 8) * (width * (TERMS + 2))
    first, column, inside, q = columns(column_tile(), step * m, m, LANES, BLOCK, VEC, ALIGNED)
    row_start = tl.program_id(0).to(tl.int64) * ROWS
    if KIND != PER_SAMPLE:
        a, b0, b1, b2, b3, c = _table_row(table_ptr, width, row_start, batch, TERMS, KIND, LANES, BLOCK, DOUBLE)
    for row0 in range(row_start, batch, tl.num_programs(0).to(tl.int64) * ROWS):
        base, offset, mask = elements(row0, batch, first, column, inside, m, LANES, BLOCK, VEC)
        if KIND == PER_SAMPLE:
            a, b0, b1, b2, b3, c = _table_row(table_ptr, width, row0, batch, TERMS, KIND, LANES, BLOCK, DOUBLE)
        y = over_elements(a, KIND, VEC, LANES, BLOCK) * tl.load(x_ptr + base + offset, mask=mask).to(dtype)
        if TERMS > 0:
            y += over_elements(b0, KIND, VEC, LANES, BLOCK) * tl.load(s0_ptr + base + offset, mask=mask).to(dtype)
        if TERMS > 1:
            y += over_elements(b1, KIND, VEC, LANES, BLOCK) * tl.load(s1_ptr + base + offset, mask=mask).to(dtype)
        if TERMS > 2:
            y += over_elements(b2, KIND, VEC, LANES, BLOCK) * tl.load(s2_ptr + base + offset, mask=mask).to(dtype)
        if TERMS > 3:
            y += over_elements(b3, KIND, VEC, LANES, BLOCK) * tl.load(s3_ptr + base + offset, mask=mask).to(dtype)
        if STOCHASTIC:
            z = noise(seed, stream_id, first_path + row0, q, VEC, LANES, BLOCK, INTERPRETED, DOUBLE)
            y += over_elements(c, KIND, VEC, LANES, BLOCK) * z
        store(out_ptr + base + offset, y, mask, INTERPRETED)


@triton.jit(do_not_specialize=PLAIN)
def perturb_kernel(
    x_ptr, alpha_c, sigma_c, out_ptr,
    batch: tl.int64, m: tl.int64, seed: tl.int64, stream_id: tl.int64, first_path: tl.int64, step: tl.int64,
    ALPHA: tl.constexpr, SIGMA: tl.constexpr, NOISE: tl.constexpr, LOADED: tl.constexpr, VEC: tl.constexpr,
    LANES: tl.constexpr, BLOCK: tl.constexpr, ALIGNED: tl.constexpr, INTERPRETED: tl.constexpr, DOUBLE: tl.constexpr,
):  # fmt: skip
    """``out = alpha x``, plus ``sigma z`` or times ``z``."""
    ROWS: tl.constexpr = BLOCK // LANES
    dtype: tl.constexpr = tl.float64 if DOUBLE else tl.float32
    seed, first_path, step = integer(seed, LOADED & 1), integer(first_path, LOADED & 2), integer(step, LOADED & 4)
    batch, m = batch.to(tl.int64), row_length(m, VEC, ALIGNED)
    first, column, inside, q = columns(column_tile(), step * m, m, LANES, BLOCK, VEC, ALIGNED)
    row_start = tl.program_id(0).to(tl.int64) * ROWS
    if ALPHA != PER_SAMPLE:
        alpha = coefficient(alpha_c, row_start, batch, ALPHA, LANES, BLOCK, DOUBLE)
    if SIGMA != PER_SAMPLE:
        sigma = coefficient(sigma_c, row_start, batch, SIGMA, LANES, BLOCK, DOUBLE)
    for row0 in range(row_start, batch, tl.num_programs(0).to(tl.int64) * ROWS):
        base, offset, mask = elements(row0, batch, first, column, inside, m, LANES, BLOCK, VEC)
        x = tl.load(x_ptr + base + offset, mask=mask).to(dtype)
        if ALPHA == PER_SAMPLE:
            alpha = coefficient(alpha_c, row0, batch, ALPHA, LANES, BLOCK, DOUBLE)
        if SIGMA == PER_SAMPLE:
            sigma = coefficient(sigma_c, row0, batch, SIGMA, LANES, BLOCK, DOUBLE)
        y = over_elements(alpha, ALPHA, VEC, LANES, BLOCK) * x
        if NOISE != ABSENT:
            z = noise(seed, stream_id, first_path + row0, q, VEC, LANES, BLOCK, INTERPRETED, DOUBLE)
            if NOISE == ADDED:
                y += over_elements(sigma, SIGMA, VEC, LANES, BLOCK) * z
            else:
                y *= z
        store(out_ptr + base + offset, y, mask, INTERPRETED)
