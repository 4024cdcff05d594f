"""Host side of `tiles`: how a state is cut into tiles. Depends on the shape of one row and on nothing else."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import NamedTuple

__all__ = ["Geometry", "Grid", "geometry", "grid", "row_grid", "splits_of", "tree", "tuned", "tuning"]

# Lanes a program, of 128 threads: two a thread where a lane is 16 bytes of float32 (26 instructions an element at two,
# 33 at one: what a tile pays once is spread further) and where it is one element; else one, because a lane is then
# eight elements or, in float64 and in rows that start inside a Philox block, needs the registers.
_TWO_A_THREAD, _ONE_A_THREAD = 256, 128
_CHUNKS_PER_Z = 32768
# Programs beyond these go on as a loop over rows inside each program, which keeps the Philox key schedule and all that
# depends on columns alone. 16 blocks of 128 threads fit on a multiprocessor and the largest chips have 148.
_ENOUGH_PROGRAMS = 2 * 16 * 148
_MOST_LOOPS = 8  # by then what is paid once a program is 1.5 instructions an element, and the tail stays short

_CHUNKS_PER_SPLIT = 8  # 8192 float32 elements: one program a row for images of 32 x 32, and rows of 10^6 still spread


Grid = tuple[int, int, int]


# Of the second pass of a reduction: lanes along splits, rows, and both together, of a program.
_MOST_LANES, _MOST_ROWS, _IN_SECOND_PASS = 1024, 256, 2048


class Geometry(NamedTuple):
    """Constants of a tile: elements a lane, lanes along a row, lanes a program; and column tiles a row."""

    vec: int
    lanes: int
    block: int
    aligned: bool
    chunks: int

    @property
    def rows(self) -> int:
        """Rows of a tile."""
        return self.block // self.lanes


class _Tuning(NamedTuple):
    block: int | None = None
    programs: int = _ENOUGH_PROGRAMS


_tuning = _Tuning()


def tuning() -> _Tuning:
    """What `tuned` has set."""
    return _tuning


@contextlib.contextmanager
def tuned(*, block: int | None = None, programs: int = _ENOUGH_PROGRAMS) -> Iterator[None]:
    """Launch with ``block`` lanes a program, a power of two, and loop over rows from ``programs`` programs on.

    For tests: results of elementwise kernels do not depend on either, sums of reductions depend on ``block``.
    """
    global _tuning
    previous, _tuning = _tuning, _Tuning(block, programs)
    try:
        yield
    finally:
        _tuning = previous


def geometry(m: int, itemsize: int, aligned: bool, block: int | None = None) -> Geometry:
    """How rows of ``m`` elements are tiled.

    Args:
        m: Elements a row, positive.
        itemsize: Bytes of an element.
        aligned: Whether every row starts with the first normal of a Philox block.
        block: Lanes a program, a power of two, where a kernel has reasons for another number than the usual.
    """
    return _geometry(m, itemsize, aligned, _tuning.block or block)


@functools.lru_cache(maxsize=4096)
def _geometry(m: int, itemsize: int, aligned: bool, block: int | None) -> Geometry:
    aligned = aligned and m % 4 == 0
    if aligned:
        vec = 8 if itemsize == 2 and m % 8 == 0 else 4
        along = m // vec
    elif m < 4:
        vec, along = 1, m
    else:
        vec, along = 4, (m + 6) // 4  # Philox blocks of a row that starts as late as possible in its first
    two = vec == 1 or (aligned and vec == 4 and itemsize <= 4)
    block = block or (_TWO_A_THREAD if two else _ONE_A_THREAD)
    widths = [1 << k for k in range(block.bit_length())]
    # A power of two wastes lanes at the end of a row: take the widest within an eighth of the least waste, but rows of
    # 8 lanes at least (128 bytes), so that accesses stay coalesced.
    floor = min(8, block, 1 << (along - 1).bit_length())
    padded = {w: -(-along // w) * w for w in widths if w >= floor}
    least = min(padded.values())
    lanes = max(w for w, lanes_used in padded.items() if 8 * lanes_used <= 9 * least)
    chunks = -(-along // lanes)
    if (block // lanes) > 1 and (block // lanes) * m >= 2**31:
        lanes, chunks = block, -(-along // block)
    return Geometry(vec, lanes, block, aligned, chunks)


def grid(batch: int, tile: Geometry) -> Grid:
    """Programs along the rows, and column tiles in two dimensions, each within CUDA's limits."""
    row_tiles = -(-batch // tile.rows)
    y = min(tile.chunks, _CHUNKS_PER_Z)
    z = -(-tile.chunks // _CHUNKS_PER_Z)
    # Every program gets the same number of row tiles, or one less.
    loops = min(_MOST_LOOPS, max(1, row_tiles * tile.chunks // _tuning.programs))
    return -(-row_tiles // loops), y, z


def splits_of(tile: Geometry) -> tuple[int, int]:
    """Column tiles that one program of a reduction sums, and the number of such splits of a row."""
    per_split = min(tile.chunks, _CHUNKS_PER_SPLIT)
    return per_split, -(-tile.chunks // per_split)


def tree(splits: int) -> tuple[int, int]:
    """Lanes along the splits of a row that a program of the second pass of a reduction adds up, and rows of such a
    program. Both depend on the shape of one row alone, and so does the order of the sum."""
    lanes = 1 << (min(splits, _MOST_LANES) - 1).bit_length()
    return lanes, min(_MOST_ROWS, _IN_SECOND_PASS // lanes)


def row_grid(batch: int, tile: Geometry, splits: int) -> Grid:
    """Grid of a reduction: a program for every row tile and split of a row; these do not loop over rows."""
    _, y, z = grid(1, tile._replace(chunks=splits))
    return -(-batch // tile.rows), y, z
