"""Noise for one tile of a batch, packed, in the first-level cache: what every step kernel adds to its states.

A tile is a *unit* of the batch that depends on the number of elements per path alone: whole rows while they fit into
`TILE` elements, else a piece of one row. Threads, batch splits and chunks deal out whole units, so whatever is summed
within one has the same bits in all of them.

Unlike `noise`, which fills tensors of any layout, this leaves the numbers where the arithmetic of a step finds them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np

from .box_muller import normals32, normals64
from .compile import inline, kernel
from .memory import at
from .philox import philox

__all__ = ["BUFFER", "SCRATCH", "SUMS", "TILE", "Z", "noise_tile", "tile_sum", "unit_count", "unit_place"]

# Elements of a tile. 1024 to 4096 are within 5% of each other; 8 KiB a buffer keeps six of them in the first-level
# cache. Sums run over tiles, so another value gives other last bits.
TILE = 2048
# A thread's scratch memory, in bytes: two buffers of a tile, room for noise, four lists of words and counters,
# and, at the end, room for `SUMS` sums. It is
# handed to the kernels: their own would be taken from the heap and given back in each call, which costs as much as a
# thousand normals.
BUFFER = 8 * TILE
Z, _ROOM = 2 * BUFFER, 4 * TILE + 16
_LIST = 8 * (TILE + 8)
_EVEN = Z + 8 * _ROOM
SUMS = 1024
SCRATCH = _EVEN + 4 * _LIST + 8 * SUMS
# Rows of at most this many entries are made with lanes along the rows: too short for lanes along their blocks.
_NARROW = 3

_U64, _32, _2, _3 = np.uint64, np.uint64(32), np.uint64(2), np.uint64(3)


def unit_count(rows: int, m: int) -> int:
    """How many units `rows` rows of `m` >= 1 entries make."""
    return -(-rows // (TILE // m)) if m <= TILE else rows * -(-m // TILE)


@inline
def unit_place(unit: Any, rows: Any, m: Any) -> Any:
    """First row, number of rows, first entry in the row, and number of entries of a unit."""
    if m <= TILE:
        height = TILE // m
        return unit * height, min(height, rows - unit * height), np.int64(0), m
    pieces = (m + TILE - 1) // TILE
    row = unit // pieces
    j = (unit - row * pieces) * TILE
    return row, np.int64(1), j, min(TILE, m - j)


@kernel
def tile_sum(values: Any, size: Any) -> Any:
    """The sum of ``values[:size]``, which are overwritten, folded in halves: vectorises, and `size` fixes its bits."""
    n = size
    while n > 1:
        half = (n + 1) // 2
        low, high = values[:half], values[half:n]
        for i in range(n - half):
            low[i] += high[i]
        n = half
    return values[0]


@functools.cache
def noise_tile(dtype: Any) -> Callable[..., Any]:
    """Function that fills a tile with normals of `dtype`, np.float32 or np.float64."""
    normals = normals32 if dtype is np.float32 else normals64
    view, lists, halves, itemsize = at[dtype], at[np.uint64], at[np.uint32], np.dtype(dtype).itemsize

    def fill_tile(scratch: Any, seed: Any, stream: Any, path: Any, offset: Any, height: Any, width: Any) -> Any:
        """Make entry j of row i ``Z(seed, stream, path + i, offset + j)``, a packed array in the scratch memory.

        Returns the address of the array. The middle four integers are uint64.
        """
        z = view(scratch + Z, _ROOM)
        q0, skip = offset >> _2, np.int64(offset & _3)
        blocks = (skip + width + 3) // 4
        even64, odd64 = lists(scratch + _EVEN, TILE + 8), lists(scratch + _EVEN + _LIST, TILE + 8)
        even, odd = halves(scratch + _EVEN, 2 * TILE + 16), halves(scratch + _EVEN + _LIST, 2 * TILE + 16)
        if width <= _NARROW:
            left, right = even[: 2 * TILE], odd[: 2 * TILE]
            left2, right2 = left[TILE:], right[TILE:]
            cosines, sines = z[2 * TILE : 2 * TILE + height], z[3 * TILE : 3 * TILE + height]
            for block in range(blocks):
                q = q0 + _U64(block)
                for i in range(height):
                    w0, w1, w2, w3 = philox(seed, stream, path + _U64(i), q)
                    left[i] = np.uint32(w0)
                    right[i] = np.uint32(w1)
                    left2[i] = np.uint32(w2)
                    right2[i] = np.uint32(w3)
                for pair in range(2):
                    j = 4 * block - skip + 2 * pair
                    if j < -1 or j >= width:
                        continue  # one pair of the block is all that is wanted
                    first, second = left[TILE * pair :], right[TILE * pair :]
                    if width == 2 and j == 0:
                        for i in range(height):
                            a, c = normals(first[i], second[i])
                            z[2 * i] = a
                            z[2 * i + 1] = c
                        continue
                    for i in range(height):
                        a, c = normals(first[i], second[i])
                        cosines[i] = a
                        sines[i] = c
                    if width == 1:
                        return scratch + Z + itemsize * (2 * TILE if j == 0 else 3 * TILE)
                    if j >= 0:
                        places = z[j:]
                        for i in range(height):
                            places[i * width] = cosines[i]
                    if j + 1 < width:
                        places = z[j + 1 :]
                        for i in range(height):
                            places[i * width] = sines[i]
            return scratch + Z
        if height == 1:
            for i in range(blocks):
                w0, w1, w2, w3 = philox(seed, stream, path, q0 + _U64(i))
                even64[i] = w0 | (w2 << _32)
                odd64[i] = w1 | (w3 << _32)
        else:
            # Rows of a few blocks: their counters are listed first, so that lanes run on from row to row.
            paths, numbers = lists(scratch + _EVEN + 2 * _LIST, TILE + 8), lists(scratch + _EVEN + 3 * _LIST, TILE + 8)
            b = 0
            for i in range(height):
                for k in range(blocks):
                    paths[b] = path + _U64(i)
                    numbers[b] = q0 + _U64(k)
                    b += 1
            for i in range(height * blocks):
                w0, w1, w2, w3 = philox(seed, stream, paths[i], numbers[i])
                even64[i] = w0 | (w2 << _32)
                odd64[i] = w1 | (w3 << _32)
        for i in range(2 * height * blocks):
            a, c = normals(even[i], odd[i])
            z[2 * i] = a
            z[2 * i + 1] = c
        if height > 1 and 4 * blocks != width:
            for i in range(height):
                packed, made = z[i * width : (i + 1) * width], z[4 * blocks * i + skip : 4 * blocks * i + skip + width]
                for entry in range(width):  # the source is never behind the place it goes to
                    packed[entry] = made[entry]
            return scratch + Z
        return scratch + Z + itemsize * skip

    return kernel(fill_tile, dtype.__name__)
