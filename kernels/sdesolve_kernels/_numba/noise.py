"""Kernels that fill a tensor with words, uniforms or normals, any strides, vectorised along either index.

Both work on tiles that stay in the first-level cache, in three loops: counters to words, words to numbers, numbers to
their places. Apart, each is simple enough for LLVM to vectorise, which four interleaved stores in one loop are not.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
from numba import types
from numba.extending import overload

from .box_muller import normals32, normals64
from .compile import inline, kernel
from .philox import philox

__all__ = ["columns", "rows"]

_U64, _32, _2, _3 = np.uint64, np.uint64(32), np.uint64(2), np.uint64(3)


@inline
def _uniforms(w0: Any, w1: Any) -> Any:
    return (np.float64(w0) + 0.5) * 2.0**-32, (np.float64(w1) + 0.5) * 2.0**-32


@inline
def _words(w0: Any, w1: Any) -> Any:
    return np.int64(w0), np.int64(w1)


def _numbers(kind: Any, out: Any, w0: Any, w1: Any) -> Any:
    """Two entries of `kind` from two uint32 words; chosen while compiling, by `kind` and the type of array `out`."""
    raise NotImplementedError("compiled code only")


@overload(_numbers, prefer_literal=True, jit_options={"forceinline": True})
def _choose_numbers(kind: Any, out: Any, w0: Any, w1: Any) -> Any:
    if not isinstance(kind, types.StringLiteral):
        return None
    function = {
        ("normal", types.float32): normals32,
        ("normal", types.float64): normals64,
        ("uniform", types.float32): _uniforms,
        ("uniform", types.float64): _uniforms,
        ("words", types.int64): _words,
    }[kind.literal_value, out.dtype]

    def call(kind: Any, out: Any, w0: Any, w1: Any) -> Any:
        return function(w0, w1)

    return call


@functools.cache
def rows(kind: str) -> Callable[..., None]:
    """Kernel with lanes along a path's entries: for few paths, or rows of more than a few blocks."""

    def fill_rows(
        out: Any, strides: Any, inner: Any, counter: Any, count: Any, start: Any, stop: Any, tile_size: Any
    ) -> None:
        """Blocks `start` to `stop` of all blocks of all paths, path after path.

        Entry ``[i, k * inner + c]`` lies at ``out[i * strides[0] + k * strides[1] + c * strides[2]]``; `counter` holds
        seed, stream, first path and offset; `tile_size` is how many blocks are made at once. A block that lies partly
        outside is made in full and stored in part.
        """
        seed, stream, first_path, offset = counter[0], counter[1], counter[2], counter[3]
        path_stride, outer_stride, inner_stride = strides
        q0, skip = offset >> _2, np.int64(offset & _3)
        blocks = (skip + count + 3) // 4
        # Words 0 and 2 of a block side by side, and 1 and 3: then pair i is (even[i], odd[i]), and the numbers made
        # from pair i are entries 2 i and 2 i + 1.
        even64, odd64 = np.empty(tile_size, np.uint64), np.empty(tile_size, np.uint64)
        even, odd = even64.view(np.uint32), odd64.view(np.uint32)
        z = np.empty(4 * tile_size, out.dtype)
        for tile in range(start, stop, tile_size):
            size = min(tile_size, stop - tile)
            at = 0
            while at < size:
                row = (tile + at) // blocks
                first = (tile + at) - row * blocks
                run = min(size - at, blocks - first)
                path, q = first_path + _U64(row), q0 + _U64(first)
                # Slices, because Numba wraps negative indices: at + i might be one, i cannot, and the test for it
                # keeps the loop scalar (2.6 ns per normal against 0.7).
                even_run, odd_run = even64[at : at + run], odd64[at : at + run]
                for i in range(run):
                    w0, w1, w2, w3 = philox(seed, stream, path, q + _U64(i))
                    even_run[i] = w0 | (w2 << _32)
                    odd_run[i] = w1 | (w3 << _32)
                at += run
            for i in range(2 * size):
                a, b = _numbers(kind, out, even[i], odd[i])
                z[2 * i] = a
                z[2 * i + 1] = b
            at = 0
            while at < size:
                row = (tile + at) // blocks
                first = (tile + at) - row * blocks
                run = min(size - at, blocks - first)
                shift = 4 * at - (4 * first - skip)  # entry j of this row is z[j + shift]
                j, end = max(4 * first - skip, 0), min(4 * (first + run) - skip, count)
                while j < end:
                    outer = j // inner
                    length = min(end - j, (outer + 1) * inner - j)
                    base = row * path_stride + outer * outer_stride + (j - outer * inner) * inner_stride
                    values, places = z[j + shift : j + shift + length], out[base:]
                    if inner_stride == 1:
                        for c in range(length):
                            places[c] = values[c]
                    else:
                        for c in range(length):
                            places[c * inner_stride] = values[c]
                    j += length
                at += run

    return kernel(fill_rows, kind)


@functools.cache
def columns(kind: str) -> Callable[..., None]:
    """Kernel with lanes along the paths: for many paths with few entries each, or whose paths lie side by side."""

    def fill_columns(
        out: Any, strides: Any, inner: Any, counter: Any, count: Any, start: Any, stop: Any, tile_size: Any
    ) -> None:
        """All entries of paths `start` to `stop`; arguments as for the other kernel; tiles are of paths."""
        seed, stream, first_path, offset = counter[0], counter[1], counter[2], counter[3]
        path_stride, outer_stride, inner_stride = strides
        q0, skip = offset >> _2, np.int64(offset & _3)
        blocks = (skip + count + 3) // 4
        words = np.empty((4, tile_size), np.uint32)
        z = np.empty((4, tile_size), out.dtype)
        word0, word1, word2, word3 = words[0], words[1], words[2], words[3]
        for tile in range(start, stop, tile_size):
            size = min(tile_size, stop - tile)
            for block in range(blocks):
                q, path = q0 + _U64(block), first_path + _U64(tile)
                for i in range(size):
                    w0, w1, w2, w3 = philox(seed, stream, path + _U64(i), q)
                    word0[i] = np.uint32(w0)
                    word1[i] = np.uint32(w1)
                    word2[i] = np.uint32(w2)
                    word3[i] = np.uint32(w3)
                first = 4 * block - skip  # the block's first entry; may lie before 0
                begin: Any = max(first, 0)
                end: Any = min(first + 4, count)
                for pair in range((begin - first) // 2, (end - first + 1) // 2):
                    left, right = words[2 * pair], words[2 * pair + 1]
                    cosines, sines = z[2 * pair], z[2 * pair + 1]
                    for i in range(size):
                        a, b = _numbers(kind, out, left[i], right[i])
                        cosines[i] = a
                        sines[i] = b
                for j in range(begin, end):
                    outer = j // inner
                    base = tile * path_stride + outer * outer_stride + (j - outer * inner) * inner_stride
                    values, places = z[j - first], out[base:]
                    if path_stride == 1:
                        for i in range(size):
                            places[i] = values[i]
                    else:
                        for i in range(size):
                            places[i * path_stride] = values[i]

    return kernel(fill_columns, kind)
