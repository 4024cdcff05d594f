"""Kernels that sum squares over each path: the denoising loss, and the norms of the Langevin corrector.

A sum has the same bits for any number of threads, split of the batch and chunk: each unit is summed in an order that
its length fixes, and the units of a path are added in order, in float64.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np

from .compile import inline, kernel
from .intrinsics import fma
from .memory import COMPUTE, at, storage
from .steps import spread
from .tile import BUFFER, TILE, Z, noise_tile, tile_sum, unit_place

__all__ = ["finish_loss", "finish_norms", "norms", "residual"]

_U64 = np.uint64
_float64 = at[np.float64]
# Rows up to here are summed by four running sums, longer ones by folding (which costs some 100 cycles a row).
_SHORT = 64


@inline
def _store_sums(squares: Any, partial_at: Any, row: Any, height: Any, j: Any, width: Any, m: Any) -> None:
    """The sum of each row of a unit to its place among the partial sums; `squares` are overwritten."""
    pieces = (m + TILE - 1) // TILE
    first = row * pieces + j // TILE
    partial = _float64(partial_at, first + height)[first:]
    if m > _SHORT:
        for i in range(height):
            partial[i] = np.float64(tile_sum(squares[i * width : (i + 1) * width], width))
    else:
        for i in range(height):
            part = squares[i * width : (i + 1) * width]
            zero = squares.dtype.type(0)
            a, b, c, d = zero, zero, zero, zero
            for n in range(width // 4):
                a += part[4 * n]
                b += part[4 * n + 1]
                c += part[4 * n + 2]
                d += part[4 * n + 3]
            for n in range(width // 4 * 4, width):
                a += part[n]
            partial[i] = np.float64((a + c) + (b + d))


@inline
def _total(partial: Any, i: Any, pieces: Any) -> Any:
    """The sum of row `i` from those of its pieces."""
    total = 0.0
    for n in range(pieces):
        total += partial[i * pieces + n]
    return total


@functools.cache
def finish_loss(compute: Any) -> Callable[..., None]:
    """Kernel for the weighted mean squares, of each row or of all."""
    view = at[compute]

    def finish_rows(
        partial_at: Any, weight_at: Any, weight_value: Any, loss_at: Any, mean: Any, rows: Any, m: Any, scratch: Any
    ) -> None:
        pieces = (m + TILE - 1) // TILE
        partial, block = _float64(partial_at, rows * pieces), _float64(scratch, TILE)
        weight, loss = view(weight_at, rows), view(loss_at, 1 if mean else rows)
        total = 0.0
        for first in range(0, rows, TILE):
            size = min(TILE, rows - first)
            for i in range(size):
                block[i] = _total(partial, first + i, pieces) / m
            if weight_at != 0:
                for i in range(size):
                    block[i] *= np.float64(weight[first + i])
            else:
                for i in range(size):
                    block[i] *= weight_value
            if mean:
                total += tile_sum(block, size)
            else:
                for i in range(size):
                    loss[first + i] = compute(block[i])
        if mean:
            loss[0] = compute(total / rows)

    return kernel(finish_rows)


@functools.cache
def residual(dtype: str) -> Callable[..., None]:
    """Kernel for ``r = output - p x0 - q z``, kept if asked for, and the sum of its squares."""
    compute = COMPUTE[dtype]
    stored, widen, rounded = storage(dtype)
    memory, buffer, fill, rows_of = at[stored], at[compute], noise_tile(compute), spread[compute]
    finish = finish_loss(compute)

    @inline
    def subtract(total: Any, values: Any, size: Any, each: Any, address: Any, value: Any) -> None:
        """``total -= c values``; c is in `each` where it has an address."""
        if address != 0:
            for i in range(size):
                total[i] = fma(-each[i], values[i], total[i])
        else:
            c = -compute(value)
            for i in range(size):
                total[i] = fma(c, values[i], total[i])

    def residual_tiles(
        output_at: Any, x0_at: Any, residual_at: Any, partial_at: Any,
        p_at: Any, p_value: Any, q_at: Any, q_value: Any, weight_at: Any, weight_value: Any, loss_at: Any, mean: Any,
        seed: Any, stream: Any, first_path: Any, offset: Any,
        rows: Any, m: Any, start: Any, stop: Any, scratch: Any,
    ) -> None:  # fmt: skip
        """Units `start` to `stop`; then the loss too, unless ``loss_at`` is 0: only where these are all units.

        Where ``x0_at`` or ``residual_at`` is 0 there is none. Coefficients as in `combine`.
        """
        total, each = buffer(scratch, TILE), buffer(scratch + BUFFER, TILE)
        for unit in range(start, stop):
            row, height, j, width = unit_place(unit, rows, m)
            begin, size = row * m + j, height * width
            output = memory(output_at, begin + size)[begin:]
            for i in range(size):
                total[i] = widen(output[i])
            if x0_at != 0:
                x0, values = memory(x0_at, begin + size)[begin:], buffer(scratch + Z, size)
                for i in range(size):
                    values[i] = widen(x0[i])
                if p_at != 0:
                    rows_of(each, p_at, row, height, width)
                subtract(total, values, size, each, p_at, p_value)
            path, n = _U64(first_path) + _U64(row), _U64(offset) + _U64(j)
            made = buffer(fill(scratch, _U64(seed), _U64(stream), path, n, height, width), size)
            if q_at != 0:
                rows_of(each, q_at, row, height, width)
            subtract(total, made, size, each, q_at, q_value)
            if residual_at != 0:
                kept = memory(residual_at, begin + size)[begin:]
                for i in range(size):
                    kept[i] = rounded(total[i])
            for i in range(size):
                total[i] *= total[i]
            _store_sums(total, partial_at, row, height, j, width, m)
        if loss_at != 0:
            finish(partial_at, weight_at, weight_value, loss_at, mean, rows, m, scratch)

    return kernel(residual_tiles)


@functools.cache
def norms(dtype: str) -> Callable[..., None]:
    """Kernel for the sums of squares of a score, and of the noise at the same places."""
    compute = COMPUTE[dtype]
    stored, widen, _ = storage(dtype)
    memory, buffer, fill = at[stored], at[compute], noise_tile(compute)

    def norm_tiles(
        score_at: Any, score_partial_at: Any, noise_partial_at: Any,
        seed: Any, stream: Any, first_path: Any, offset: Any,
        rows: Any, m: Any, start: Any, stop: Any, scratch: Any,
    ) -> None:  # fmt: skip
        """Units `start` to `stop`; no noise is made where ``noise_partial_at`` is 0."""
        total = buffer(scratch, TILE)
        for unit in range(start, stop):
            row, height, j, width = unit_place(unit, rows, m)
            begin, size = row * m + j, height * width
            score = memory(score_at, begin + size)[begin:]
            for i in range(size):
                total[i] = widen(score[i]) * widen(score[i])
            _store_sums(total, score_partial_at, row, height, j, width, m)
            if noise_partial_at != 0:
                path, n = _U64(first_path) + _U64(row), _U64(offset) + _U64(j)
                made = buffer(fill(scratch, _U64(seed), _U64(stream), path, n, height, width), size)
                for i in range(size):
                    made[i] *= made[i]
                _store_sums(made, noise_partial_at, row, height, j, width, m)

    return kernel(norm_tiles)


@kernel
def finish_norms(partial_at: Any, keep: Any, rows: Any, m: Any, scratch: Any) -> Any:
    """The mean of the norms; with `keep`, the norm of each row replaces the first of the sums, row by row."""
    pieces = (m + TILE - 1) // TILE
    partial, block = _float64(partial_at, rows * pieces), _float64(scratch, TILE)
    total = 0.0
    for first in range(0, rows, TILE):
        size = min(TILE, rows - first)
        for i in range(size):
            block[i] = np.sqrt(_total(partial, first + i, pieces))
        if keep:
            for i in range(size):
                partial[first + i] = block[i]
        total += tile_sum(block, size)
    return total / rows
