"""Matrices times vectors, one for each row of a batch, and the Euler-Maruyama step whose noise is such a product.

Every entry of a product is ``g_0 w_0``, then ``fma(g_k, w_k, sum)`` for one channel ``k`` after another. So its bits
depend neither on the batch, nor on whether rows share a matrix, nor on which of two loops adds it up: one with lanes
along the rows for a shared matrix, one with several entries of a row at a time for a matrix of each row's own, which is
read from memory once and bounds the speed.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np

from .compile import inline, kernel
from .intrinsics import fma
from .memory import COMPUTE, at, storage
from .tile import SCRATCH, TILE, noise_tile

__all__ = ["matrices", "scratch_size", "unit_height"]

_U64 = np.uint64
_1, _2, _3 = _U64(1), _U64(2), _U64(3)
_LANES = 32
_FEW = 8  # rows, which the loop for one row at a time does as fast


def unit_height(d: int, m: int) -> int:
    """Rows of a unit, for ``d x m`` matrices: what fits into a tile, and whole groups of lanes."""
    return max(_LANES, TILE // max(d, m) // _LANES * _LANES)


def scratch_size(d: int, m: int) -> int:
    """Bytes of a thread's scratch memory."""
    return SCRATCH + 8 * (unit_height(d, m) * (d + m) + _LANES * (m + 4))


@functools.cache
def matrices(dtype: str) -> Callable[..., None]:
    """Kernel for states of a torch dtype, by name."""
    compute = COMPUTE[dtype]
    stored, widen, rounded = storage(dtype)
    memory, buffer, fill = at[stored], at[compute], noise_tile(compute)
    itemsize = np.dtype(compute).itemsize

    @inline
    def vectors(
        w: Any, v_at: Any, scratch: Any, seed: Any, stream: Any, path: Any, offset: Any, row: Any, height: Any, m: Any
    ) -> None:
        """The vectors of a unit's rows, given or made."""
        if v_at != 0:
            given = memory(v_at, (row + height) * m)[row * m :]
            for i in range(height * m):
                w[i] = widen(given[i])
            return
        few = max(1, TILE // m)
        for r in range(0, height, few):
            for k in range(0, m, TILE):
                rows, width = min(few, height - r), min(TILE, m - k)
                made = buffer(fill(scratch, seed, stream, path + _U64(r), offset + _U64(k), rows, width), rows * width)
                part = w[r * m + k :]
                for i in range(rows * width):
                    part[i] = made[i]

    @inline
    def by_rows(total: Any, g_at: Any, stride: Any, w: Any, row: Any, count: Any, d: Any, m: Any) -> None:
        for i in range(count):
            begin = (row + i) * stride
            g, v, out = memory(g_at, begin + d * m)[begin:], w[i * m :], total[i * d :]
            length, j = _U64(m), 0
            while j + 4 <= d:
                q, c = _U64(j) * length, v[0]
                q1, q2, q3 = q + length, q + _2 * length, q + _3 * length
                a0, a1, a2, a3 = widen(g[q]) * c, widen(g[q1]) * c, widen(g[q2]) * c, widen(g[q3]) * c
                for k in range(1, m):
                    c, n = v[k], _U64(k)
                    a0 = fma(widen(g[q + n]), c, a0)
                    a1 = fma(widen(g[q1 + n]), c, a1)
                    a2 = fma(widen(g[q2 + n]), c, a2)
                    a3 = fma(widen(g[q3 + n]), c, a3)
                out[j], out[j + 1], out[j + 2], out[j + 3] = a0, a1, a2, a3
                j += 4
            while j < d:
                q = _U64(j) * length
                a = widen(g[q]) * v[0]
                for k in range(1, m):
                    a = fma(widen(g[q + _U64(k)]), v[k], a)
                out[j] = a
                j += 1

    @inline
    def by_lanes(total: Any, g_at: Any, w: Any, lanes: Any, sums: Any, count: Any, d: Any, m: Any) -> None:
        g = memory(g_at, d * m)
        if count < _LANES:
            lanes[: m * _LANES] = 0
        for i in range(count):
            for k in range(m):
                lanes[k * _LANES + i] = w[i * m + k]
        j = 0
        while j < d:
            # The last entries are done more than once where d is no multiple of 4.
            j0, j1, j2, j3 = j, min(j + 1, d - 1), min(j + 2, d - 1), min(j + 3, d - 1)
            q0, q1, q2, q3 = _U64(j0 * m), _U64(j1 * m), _U64(j2 * m), _U64(j3 * m)
            c0, c1, c2, c3 = widen(g[q0]), widen(g[q1]), widen(g[q2]), widen(g[q3])
            for i in range(_LANES):
                z = lanes[i]
                sums[i] = c0 * z
                sums[_LANES + i] = c1 * z
                sums[2 * _LANES + i] = c2 * z
                sums[3 * _LANES + i] = c3 * z
            k = 1
            while k + 2 <= m:  # two channels to a load and a store of the sums
                n, v = _U64(k), lanes[k * _LANES : (k + 2) * _LANES]
                n1 = n + _1
                c0, c1, c2, c3 = widen(g[q0 + n]), widen(g[q1 + n]), widen(g[q2 + n]), widen(g[q3 + n])
                e0, e1, e2, e3 = widen(g[q0 + n1]), widen(g[q1 + n1]), widen(g[q2 + n1]), widen(g[q3 + n1])
                for i in range(_LANES):
                    z, y = v[i], v[_LANES + i]
                    sums[i] = fma(e0, y, fma(c0, z, sums[i]))
                    sums[_LANES + i] = fma(e1, y, fma(c1, z, sums[_LANES + i]))
                    sums[2 * _LANES + i] = fma(e2, y, fma(c2, z, sums[2 * _LANES + i]))
                    sums[3 * _LANES + i] = fma(e3, y, fma(c3, z, sums[3 * _LANES + i]))
                k += 2
            if k < m:
                n = _U64(k)
                c0, c1, c2, c3 = widen(g[q0 + n]), widen(g[q1 + n]), widen(g[q2 + n]), widen(g[q3 + n])
                v = lanes[k * _LANES : (k + 1) * _LANES]
                for i in range(_LANES):
                    z = v[i]
                    sums[i] = fma(c0, z, sums[i])
                    sums[_LANES + i] = fma(c1, z, sums[_LANES + i])
                    sums[2 * _LANES + i] = fma(c2, z, sums[2 * _LANES + i])
                    sums[3 * _LANES + i] = fma(c3, z, sums[3 * _LANES + i])
            for i in range(count):
                out = total[i * d :]
                out[j0] = sums[i]
                out[j1] = sums[_LANES + i]
                out[j2] = sums[2 * _LANES + i]
                out[j3] = sums[3 * _LANES + i]
            j += 4

    def matrix_tiles(
        out_at: Any, x_at: Any, f_at: Any, dt_at: Any, dt_value: Any, root_at: Any, root_value: Any,
        g_at: Any, shared: Any, v_at: Any, seed: Any, stream: Any, first_path: Any, offset: Any,
        rows: Any, d: Any, m: Any, most: Any, start: Any, stop: Any, scratch: Any,
    ) -> None:  # fmt: skip
        """Units `start` to `stop` of ``g w``, or of ``x + f dt + root g w`` unless `x_at` is 0.

        `dt` and `root` are numbers unless there is an address of one for each row. The vectors ``w: (rows, m)`` lie at
        `v_at`, or are normals where that is 0. A unit has `most` rows; `scratch` has `scratch_size` bytes.
        """
        w_at = scratch + SCRATCH
        lanes_at = w_at + itemsize * most * m
        sums_at = lanes_at + itemsize * _LANES * m
        total_at = sums_at + itemsize * _LANES * 4
        w, lanes = buffer(w_at, most * m), buffer(lanes_at, _LANES * m)
        sums, total = buffer(sums_at, 4 * _LANES), buffer(total_at, most * d)
        for unit in range(start, stop):
            row = unit * most
            height = min(most, rows - row)
            path = _U64(first_path) + _U64(row)
            vectors(w, v_at, scratch, _U64(seed), _U64(stream), path, _U64(offset), row, height, m)
            for first in range(0, height, _LANES):
                count = min(_LANES, height - first)
                if shared and count >= _FEW:
                    by_lanes(total[first * d :], g_at, w[first * m :], lanes, sums, count, d, m)
                else:
                    stride = 0 if shared else d * m
                    by_rows(total[first * d :], g_at, stride, w[first * m :], row + first, count, d, m)
            begin, size = row * d, height * d
            out = memory(out_at, begin + size)[begin:]
            if x_at == 0:
                for i in range(size):
                    out[i] = rounded(total[i])
                continue
            x, f = memory(x_at, begin + size)[begin:], memory(f_at, begin + size)[begin:]
            if dt_at == 0 and root_at == 0:
                dt, root = compute(dt_value), compute(root_value)
                for i in range(size):
                    total[i] = fma(root, total[i], fma(dt, widen(f[i]), widen(x[i])))
            else:
                for i in range(height):
                    dt = compute(dt_value) if dt_at == 0 else buffer(dt_at, row + height)[row + i]
                    root = compute(root_value) if root_at == 0 else buffer(root_at, row + height)[row + i]
                    own, drift, state = total[i * d : (i + 1) * d], f[i * d : (i + 1) * d], x[i * d : (i + 1) * d]
                    for j in range(d):
                        own[j] = fma(root, own[j], fma(dt, widen(drift[j]), widen(state[j])))
            for i in range(size):
                out[i] = rounded(total[i])

    return kernel(matrix_tiles, dtype)
