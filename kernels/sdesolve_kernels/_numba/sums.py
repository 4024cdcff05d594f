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
from .steps import number, spread
from .tile import BUFFER, TILE, Z, noise_tile, tile_sum, unit_place

__all__ = ["denoising", "finish_loss", "finish_norms", "norms"]

_U64 = np.uint64
_float64 = at[np.float64]
# Rows up to the first are summed side by side, up to the second by four running sums each, longer ones by folding,
# which costs some 100 cycles a row.
_NARROW, _SHORT = 8, 64


@inline
def _row_sums(squares: Any, sums: Any, height: Any, width: Any) -> None:
    """The sum of each row of a unit to `sums`, float64; `squares` are overwritten."""
    if width <= _NARROW:
        for j in range(1, width):
            column = squares[j:]
            for i in range(height):
                squares[i * width] += column[i * width]
        for i in range(height):
            sums[i] = np.float64(squares[i * width])
    elif width <= _SHORT:
        for i in range(height):
            part = squares[i * width : (i + 1) * width]
            a = b = c = d = squares.dtype.type(0)
            for n in range(width // 4):
                a += part[4 * n]
                b += part[4 * n + 1]
                c += part[4 * n + 2]
                d += part[4 * n + 3]
            for n in range(width // 4 * 4, width):
                a += part[n]
            sums[i] = np.float64((a + c) + (b + d))
    else:
        for i in range(height):
            sums[i] = np.float64(tile_sum(squares[i * width : (i + 1) * width], width))


@inline
def _store(sums: Any, partial_at: Any, first: Any, height: Any) -> None:
    partial = _float64(partial_at, first + height)[first:]
    for i in range(height):
        partial[i] = sums[i]


@inline
def _store_norms(sums: Any, partial_at: Any, unit: Any, height: Any) -> None:
    """The sum of the norms of a unit's rows, as one number."""
    for i in range(height):
        sums[i] = np.sqrt(sums[i])
    _float64(partial_at, unit + 1)[unit] = tile_sum(sums, height)


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

    return kernel(finish_rows, compute.__name__)


@functools.cache
def denoising(dtype: str) -> Callable[..., None]:
    """Kernel for ``r = output - p x0 - q z``: the sum of its squares, and ``factor weight r``."""
    compute = COMPUTE[dtype]
    stored, widen, rounded = storage(dtype)
    memory, buffer, fill, rows_of = at[stored], at[compute], noise_tile(compute), spread[compute]
    number_of = number[compute]
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

    def denoising_tiles(
        output_at: Any, x0_at: Any, gradient_at: Any, factor: Any, partial_at: Any,
        p_at: Any, p_value: Any, q_at: Any, q_value: Any, weight_at: Any, weight_value: Any, loss_at: Any, mean: Any,
        seed: Any, stream: Any, first_path: Any, offset: Any,
        rows: Any, m: Any, start: Any, stop: Any, scratch: Any,
    ) -> None:  # fmt: skip
        """Units `start` to `stop`; then the loss too, unless ``loss_at`` is 0: only where these are all units.

        Where ``x0_at``, ``gradient_at`` or ``partial_at`` is 0 there is none. Coefficients as in `combine`.
        """
        total, each = buffer(scratch, TILE), buffer(scratch + BUFFER, TILE)
        for unit in range(start, stop):
            row, height, j, width = unit_place(unit, rows, m)
            begin, size = row * m + j, height * width
            output = memory(output_at, begin + size)[begin:]
            if x0_at != 0:
                for i in range(size):
                    total[i] = widen(output[i])
                x0, values = memory(x0_at, begin + size)[begin:], buffer(scratch + Z, size)
                for i in range(size):
                    values[i] = widen(x0[i])
                if p_at != 0:
                    rows_of(each, p_at, row, height, width)
                subtract(total, values, size, each, p_at, p_value)
            path, n = _U64(first_path) + _U64(row), _U64(offset) + _U64(j)
            made = buffer(fill(scratch, _U64(seed), _U64(stream), path, n, height, width), size)
            if x0_at == 0 and (q_at == 0 or height == 1):
                c = -number_of(q_at, q_value, row)
                for i in range(size):
                    total[i] = fma(c, made[i], widen(output[i]))
            else:
                if x0_at == 0:
                    for i in range(size):
                        total[i] = widen(output[i])
                if q_at != 0:
                    rows_of(each, q_at, row, height, width)
                subtract(total, made, size, each, q_at, q_value)
            if gradient_at == 0:
                for i in range(size):
                    total[i] *= total[i]
            else:
                gradient = memory(gradient_at, begin + size)[begin:]
                if weight_at != 0 and height > 1:
                    rows_of(each, weight_at, row, height, width)
                    c = compute(factor)
                    for i in range(size):
                        r = total[i]
                        gradient[i] = rounded(c * each[i] * r)
                        total[i] = r * r
                else:
                    c = compute(factor) * number_of(weight_at, weight_value, row)
                    for i in range(size):
                        r = total[i]
                        gradient[i] = rounded(c * r)
                        total[i] = r * r
            if partial_at == 0:
                continue
            sums = _float64(scratch + BUFFER, TILE)
            _row_sums(total, sums, height, width)
            # Units are rows or pieces of rows, so either number counts them.
            _store(sums, partial_at, row if m <= TILE else unit, height)
        if loss_at != 0:
            finish(partial_at, weight_at, weight_value, loss_at, mean, rows, m, scratch)

    return kernel(denoising_tiles, dtype)


@functools.cache
def norms(dtype: str) -> Callable[..., None]:
    """Kernel for the sums of squares of a score, and of the noise at the same places, which it may leave behind."""
    compute = COMPUTE[dtype]
    stored, widen, _ = storage(dtype)
    memory, buffer, fill = at[stored], at[compute], noise_tile(compute)

    def norm_tiles(
        score_at: Any, noise_at: Any, score_partial_at: Any, noise_partial_at: Any, each: Any,
        seed: Any, stream: Any, first_path: Any, offset: Any,
        rows: Any, m: Any, start: Any, stop: Any, scratch: Any,
    ) -> None:  # fmt: skip
        """Units `start` to `stop`; where ``noise_partial_at`` is 0 no noise is made, where ``noise_at`` is, none kept.

        A unit of whole rows writes the sum of their norms, or with `each` the square of each; a unit that is a piece
        of a row writes its sum of squares.
        """
        total, sums = buffer(scratch, TILE), _float64(scratch + BUFFER, TILE)
        for unit in range(start, stop):
            row, height, j, width = unit_place(unit, rows, m)
            begin, size = row * m + j, height * width
            score = memory(score_at, begin + size)[begin:]
            for i in range(size):
                total[i] = widen(score[i]) * widen(score[i])
            _row_sums(total, sums, height, width)
            if m > TILE or each:
                _store(sums, score_partial_at, unit if m > TILE else row, height)
            else:
                _store_norms(sums, score_partial_at, unit, height)
            if noise_partial_at != 0:
                path, n = _U64(first_path) + _U64(row), _U64(offset) + _U64(j)
                made = buffer(fill(scratch, _U64(seed), _U64(stream), path, n, height, width), size)
                if noise_at != 0:
                    noise = buffer(noise_at, begin + size)[begin:]
                    for i in range(size):
                        z = made[i]
                        noise[i] = z
                        made[i] = z * z
                else:
                    for i in range(size):
                        made[i] *= made[i]
                _row_sums(made, sums, height, width)
                if m > TILE or each:
                    _store(sums, noise_partial_at, unit if m > TILE else row, height)
                else:
                    _store_norms(sums, noise_partial_at, unit, height)

    return kernel(norm_tiles, dtype)


@kernel
def finish_norms(partial_at: Any, rows: Any, m: Any) -> Any:
    """The mean of the norms of all rows."""
    if m <= TILE:
        units = (rows + TILE // m - 1) // (TILE // m)
        return _total(_float64(partial_at, units), 0, units) / rows
    pieces = (m + TILE - 1) // TILE
    partial, total = _float64(partial_at, rows * pieces), 0.0
    for i in range(rows):
        total += np.sqrt(_total(partial, i, pieces))
    return total / rows


@functools.cache
def finish_sizes(compute: Any) -> Callable[..., None]:
    """Kernel for the step sizes ``2 alpha (snr n / s)^2`` of rows, and the scales of their noise."""
    view = at[compute]

    def finish_rows(
        score_at: Any, noise_at: Any, snr: Any, alpha_at: Any, alpha_value: Any, sizes_at: Any, rows: Any, m: Any
    ) -> None:
        """Writes both, ``(2, rows)``; alpha is `alpha_value`, or a number for each row at `alpha_at`."""
        pieces = (m + TILE - 1) // TILE
        score, noise = _float64(score_at, rows * pieces), _float64(noise_at, rows * pieces)
        alphas, sizes = _float64(alpha_at, rows), view(sizes_at, 2 * rows)
        for i in range(rows):
            ratio = snr * (np.sqrt(_total(noise, i, pieces)) / np.sqrt(_total(score, i, pieces)))
            alpha = alphas[i] if alpha_at != 0 else alpha_value
            size = compute(2.0 * alpha * (ratio * ratio))
            sizes[i] = size
            sizes[rows + i] = np.sqrt(compute(2.0) * size)

    return kernel(finish_rows, f"sizes-{compute.__name__}")
