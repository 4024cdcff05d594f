"""Matrix products over lanes, in tiles of sums that stay in registers.

A tile is a few rows of the product by a few vectors of lanes. Going along the columns, it loads each entry of the
matrix once and hands it to a vector, loads each vector of lanes once, and has as many multiply-adds between them as
there are sums: 24 for 10 loads where the processor has 32 registers, 12 for 8 where it has 16. What is added up, and in
which order, does not depend on the tile: every sum is 0, then ``fma(m_j, x_j, sum)`` for one column after another.
"""

from __future__ import annotations

import functools
import platform
from collections.abc import Callable
from typing import Any

import llvmlite.binding as llvm
import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils

from .compile import inline
from .intrinsics import intrinsic

__all__ = ["TALLEST", "products"]

TALLEST = 6  # rows of a tile


def _registers() -> tuple[int, int]:
    """Bytes of the processor's vectors, and how many of them a tile is wide."""
    config: Any = numba.config
    chosen = config.CPU_FEATURES
    features = (llvm.get_host_cpu_features().flatten() if chosen is None else chosen).split(",")
    if "+avx512f" in features:
        return 64, 4
    if platform.machine().lower() in ("arm64", "aarch64"):
        return 16, 4
    return (32, 2) if "+avx" in features else (16, 2)


_BYTES, _VECTORS = _registers()


@functools.cache
def _tile(rows: int, vectors: int, adding: bool) -> Any:
    """A tile of ``rows`` by ``vectors``; `adding` to what is there, or to 0."""

    @intrinsic
    def tile(
        typing_context: Any, m: Any, at: Any, down: Any, across: Any, x: Any, start: Any, step: Any, out: Any, to: Any,
        stride: Any, columns: Any,
    ) -> Any:  # fmt: skip
        """``sum_j m[at + i down + j across] x[start + j step + l]``, ``j < columns``, to ``out[to + i stride + l]``."""
        if not isinstance(x, types.CPointer) or m != x or out != x:
            return None

        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            m, at, down, across, x, start, step, out, to, stride, columns = args
            number = context.get_value_type(signature.args[4].dtype)
            size = context.get_abi_sizeof(number)
            vector = ir.VectorType(number, _BYTES // size)
            int64 = ir.IntType(64)
            name = f"llvm.fma.v{vector.count}f{8 * size}"
            fma = cgutils.get_or_insert_function(builder.module, ir.FunctionType(vector, [vector] * 3), name)

            def constant(i: int) -> Any:
                return ir.Constant(int64, i)

            def vector_at(base: Any, index: Any, v: int) -> Any:
                index = builder.add(index, constant(v * vector.count))
                return builder.bitcast(builder.gep(base, [index]), vector.as_pointer())

            def load(base: Any, index: Any, v: int) -> Any:
                return builder.load(vector_at(base, index, v), align=size)

            def rows_from(base: Any, distance: Any) -> list[Any]:
                return [builder.add(base, builder.mul(constant(i), distance)) for i in range(rows)]

            entries, sums = rows_from(at, down), rows_from(to, stride)
            zero = ir.Constant(vector, [0.0] * vector.count)
            first = [[load(out, sums[i], v) if adding else zero for v in range(vectors)] for i in range(rows)]
            before = builder.block
            loop, after = builder.append_basic_block("columns"), builder.append_basic_block("sums")
            builder.branch(loop)
            builder.position_at_end(loop)
            j = builder.phi(int64)
            total = [[builder.phi(vector) for _ in range(vectors)] for _ in range(rows)]
            row, column = builder.add(start, builder.mul(j, step)), builder.mul(j, across)
            lanes = [load(x, row, v) for v in range(vectors)]
            places = ir.Constant(ir.VectorType(ir.IntType(32), vector.count), [0] * vector.count)
            added = []
            for i in range(rows):
                entry = builder.load(builder.gep(m, [builder.add(entries[i], column)]))
                one = builder.insert_element(ir.Constant(vector, ir.Undefined), entry, ir.Constant(ir.IntType(32), 0))
                entry = builder.shuffle_vector(one, ir.Constant(vector, ir.Undefined), places)
                added.append([builder.call(fma, [entry, lanes[v], total[i][v]]) for v in range(vectors)])
            next_ = builder.add(j, constant(1))
            builder.cbranch(builder.icmp_signed("<", next_, columns), loop, after)
            j.add_incoming(constant(0), before)
            j.add_incoming(next_, loop)
            for i in range(rows):
                for v in range(vectors):
                    total[i][v].add_incoming(first[i][v], before)
                    total[i][v].add_incoming(added[i][v], loop)
            builder.position_at_end(after)
            for i in range(rows):
                for v in range(vectors):
                    builder.store(added[i][v], vector_at(out, sums[i], v), align=size)
            return context.get_dummy_value()

        return types.void(m, at, down, across, x, start, step, out, to, stride, columns), codegen

    return tile


@intrinsic
def _turn(typing_context: Any, s: Any, start: Any, width: Any, last: Any, out: Any, stride: Any) -> Any:
    """A square of as many rows as a vector has lanes, transposed; rows behind the `last` are the `last` again."""
    if not isinstance(s, types.CPointer):
        return None

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        s, start, width, last, out, stride = args
        number = context.get_value_type(signature.args[0].dtype)
        size = context.get_abi_sizeof(number)
        vector, int64, int32 = ir.VectorType(number, _BYTES // size), ir.IntType(64), ir.IntType(32)
        n = vector.count

        def row(base: Any, i: Any, distance: Any) -> Any:
            place = builder.gep(s, [builder.add(base, builder.mul(i, distance))])
            return builder.bitcast(place, vector.as_pointer())

        held = []
        for i in range(n):
            j = ir.Constant(int64, i)
            j = builder.select(builder.icmp_signed("<", j, last), j, last)
            held.append(builder.load(row(start, j, width), align=size))
        half = n // 2
        while half:  # blocks of so many rows and columns change places across the diagonal
            low = [k if not k & half else k - half + n for k in range(n)]
            high = [k + half if not k & half else k + n for k in range(n)]
            masks = [ir.Constant(ir.VectorType(int32, n), m) for m in (low, high)]
            for i in (i for i in range(n) if not i & half):
                pair = held[i], held[i + half]
                held[i], held[i + half] = (builder.shuffle_vector(*pair, mask) for mask in masks)
            half //= 2
        for i in range(n):
            builder.store(held[i], row(out, ir.Constant(int64, i), stride), align=size)
        return context.get_dummy_value()

    return types.void(s, start, width, last, out, stride), codegen


def _lanes(dtype: Any) -> int:
    return _BYTES // np.dtype(dtype).itemsize


def _product(rows: int, dtype: Any) -> Callable[..., Any]:
    wide, narrow = _tile(rows, _VECTORS, False), _tile(rows, 1, False)
    vector = _lanes(dtype)
    width = vector * _VECTORS

    @inline
    def product(
        s: Any, vector_at: Any, result: Any, m: Any, offset: Any, tiles: Any, columns: Any, down: Any, across: Any,
        used: Any, lanes: Any,
    ) -> Any:  # fmt: skip
        """So many tiles of a matrix times the vector in rows of lanes, to rows of lanes."""
        for l in range(0, used // width * width, width):  # noqa: E741
            for i in range(tiles):
                at, to = offset + i * rows * down, result + i * rows * lanes + l
                wide(m, at, down, across, s, vector_at + l, lanes, s, to, lanes, columns)
        for l in range(used // width * width, used, vector):  # noqa: E741
            for i in range(tiles):
                at, to = offset + i * rows * down, result + i * rows * lanes + l
                narrow(m, at, down, across, s, vector_at + l, lanes, s, to, lanes, columns)

    return product


def _outer(rows: int, dtype: Any) -> Callable[..., Any]:
    wide, narrow = _tile(rows, _VECTORS, True), _tile(rows, 1, True)
    vector = _lanes(dtype)
    width = vector * _VECTORS

    @inline
    def add_outer(s: Any, left: Any, turned: Any, out: Any, tiles: Any, stride: Any, lanes: Any, across: Any) -> Any:
        """Adds ``sum_l left_l right_l^T`` over lanes to so many tiles of a matrix, ``right`` being `turned`."""
        for j in range(0, stride // width * width, width):
            for i in range(tiles):
                at, to = left + i * rows * across, out + i * rows * stride + j
                wide(s, at, across, 1, s, turned + j, stride, s, to, stride, lanes)
        for j in range(stride // width * width, stride, vector):
            for i in range(tiles):
                at, to = left + i * rows * across, out + i * rows * stride + j
                narrow(s, at, across, 1, s, turned + j, stride, s, to, stride, lanes)

    return add_outer


def _turned(dtype: Any) -> Callable[..., Any]:
    vector = _lanes(dtype)

    @inline
    def turn(s: Any, start: Any, columns: Any, out: Any, stride: Any, lanes: Any, across: Any) -> Any:
        """Rows of lanes as columns; `stride` numbers for each lane, the last `columns` of which are padding."""
        for l in range(0, lanes, vector):  # noqa: E741
            for j in range(0, stride, vector):
                first = min(j, columns - 1)
                _turn(s, start + first * across + l, across, columns - 1 - first, out + l * stride + j, stride)

    return turn


def products() -> dict[str, Callable[..., Any]]:
    """Functions ``product_{rows of a tile}_{dtype}``, ``add_outer_...`` likewise, and ``turn_{dtype}``."""
    made: dict[str, Callable[..., Any]] = {}
    for dtype in (np.float32, np.float64):
        name = np.dtype(dtype).name
        made[f"turn_{name}"] = _turned(dtype)
        for rows in range(1, TALLEST + 1):
            made[f"product_{rows}_{name}"] = _product(rows, dtype)
            made[f"add_outer_{rows}_{name}"] = _outer(rows, dtype)
    return made
