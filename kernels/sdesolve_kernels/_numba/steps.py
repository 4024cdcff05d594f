"""The step kernel: a linear combination of states and noise, one pass over memory.

Every step of the library is ``out = sum_k c_k s_k + c g z`` with coefficients that are numbers or one for each row. The
states of a tile are added up in the first-level cache, one or two at a time: the number of states is then not part of
the compiled code, and each loop has few enough pointers for LLVM's overlap checks (a loop over six states with six rows
of coefficients stays scalar). An output that is also an input needs no care, and no loop reads a state while it
writes the output: LLVM's check would send such a loop to its scalar version.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np

from .compile import inline, kernel
from .intrinsics import fma
from .memory import COMPUTE, at, storage
from .tile import BUFFER, TILE, noise_tile, unit_place

__all__ = ["combine", "number", "spread"]

_U64 = np.uint64


def _spread(dtype: Any) -> Callable[..., None]:
    """Function that writes the coefficients of a unit's rows once for each of their elements."""
    view = at[dtype]

    def spread_rows(places: Any, address: Any, row: Any, height: Any, width: Any) -> None:
        c = view(address, row + height)[row:]
        if width == 1:
            for i in range(height):
                places[i] = c[i]
        elif width == 2:
            for i in range(height):
                places[2 * i] = c[i]
                places[2 * i + 1] = c[i]
        elif width == 3:
            for i in range(height):
                places[3 * i] = c[i]
                places[3 * i + 1] = c[i]
                places[3 * i + 2] = c[i]
        elif width == 4:
            for i in range(height):
                places[4 * i] = c[i]
                places[4 * i + 1] = c[i]
                places[4 * i + 2] = c[i]
                places[4 * i + 3] = c[i]
        else:
            for i in range(height):
                value, part = c[i], places[i * width : (i + 1) * width]
                for j in range(width):
                    part[j] = value

    return kernel(spread_rows, dtype.__name__)


def _number(dtype: Any) -> Callable[..., Any]:
    """Function for a coefficient that is one number in a whole unit: as it is, or that of the unit's only row."""
    view = at[dtype]

    @inline
    def number_of(address: Any, value: Any, row: Any) -> Any:
        return dtype(value) if address == 0 else view(address, row + 1)[row]

    return number_of


number = {np.float32: _number(np.float32), np.float64: _number(np.float64)}
spread = {np.float32: _spread(np.float32), np.float64: _spread(np.float64)}


@functools.cache
def combine(dtype: str) -> Callable[..., None]:
    """Kernel for states of a torch dtype, by name."""
    compute = COMPUTE[dtype]
    stored, widen, rounded = storage(dtype)
    memory, buffer, fill, rows_of = at[stored], at[compute], noise_tile(compute), spread[compute]
    number_of = number[compute]

    @inline
    def add(total: Any, state: Any, size: Any, value: Any, each: Any, per_row: Any, first: Any) -> None:
        if first:
            if per_row:
                for i in range(size):
                    total[i] = each[i] * widen(state[i])
            else:
                for i in range(size):
                    total[i] = value * widen(state[i])
        elif per_row:
            for i in range(size):
                total[i] = fma(each[i], widen(state[i]), total[i])
        else:
            for i in range(size):
                total[i] = fma(value, widen(state[i]), total[i])

    @inline
    def add_two(total: Any, state: Any, other: Any, size: Any, value: Any, value2: Any, first: Any) -> None:
        """`add` twice, with numbers: to the bit the same, and a pass through the cache less."""
        if first:
            for i in range(size):
                total[i] = fma(value2, widen(other[i]), value * widen(state[i]))
        else:
            for i in range(size):
                total[i] = fma(value2, widen(other[i]), fma(value, widen(state[i]), total[i]))

    def combine_tiles(
        out_at: Any,
        s0: Any, s1: Any, s2: Any, s3: Any, s4: Any,
        a0: Any, a1: Any, a2: Any, a3: Any, a4: Any,
        v0: Any, v1: Any, v2: Any, v3: Any, v4: Any,
        gain_at: Any, noise_at: Any, noise_value: Any, noisy: Any,
        seed: Any, stream: Any, first_path: Any, offset: Any,
        rows: Any, m: Any, start: Any, stop: Any, scratch: Any,
    ) -> None:  # fmt: skip
        """Units `start` to `stop` of ``(rows, m)`` states.

        ``s0 ... s4`` are addresses of states, 0 after the last; the coefficient of each is the number ``v`` unless
        ``a`` is the address of one for each row. The noise's is likewise, times the array at `gain_at` unless that is
        0; there is none unless `noisy`. `scratch` is the address of the thread's own `SCRATCH` bytes.
        """
        states, addresses, values = (s0, s1, s2, s3, s4), (a0, a1, a2, a3, a4), (v0, v1, v2, v3, v4)
        total, each = buffer(scratch, TILE), buffer(scratch + BUFFER, TILE)
        for unit in range(start, stop):
            row, height, j, width = unit_place(unit, rows, m)
            begin, size = row * m + j, height * width
            k = 0
            while k < 5 and states[k] != 0:
                state, per_row = memory(states[k], begin + size)[begin:], addresses[k] != 0 and height > 1
                if per_row:
                    rows_of(each, addresses[k], row, height, width)
                    add(total, state, size, compute(0), each, True, k == 0)
                    k += 1
                    continue
                value = number_of(addresses[k], values[k], row)
                if k < 4 and states[k + 1] != 0 and (addresses[k + 1] == 0 or height == 1):
                    other, value2 = (
                        memory(states[k + 1], begin + size)[begin:],
                        number_of(addresses[k + 1], values[k + 1], row),
                    )
                    add_two(total, state, other, size, value, value2, k == 0)
                    k += 2
                else:
                    add(total, state, size, value, each, False, k == 0)
                    k += 1
            if k == 0:
                total[:size] = 0
            out = memory(out_at, begin + size)[begin:]
            if not noisy:
                for i in range(size):
                    out[i] = rounded(total[i])
                continue
            path, n = _U64(first_path) + _U64(row), _U64(offset) + _U64(j)
            made = buffer(fill(scratch, _U64(seed), _U64(stream), path, n, height, width), size)
            if gain_at != 0:
                gain = memory(gain_at, begin + size)[begin:]
                for i in range(size):
                    made[i] *= widen(gain[i])
            if noise_at != 0 and height > 1:
                rows_of(each, noise_at, row, height, width)
                for i in range(size):
                    out[i] = rounded(fma(each[i], made[i], total[i]))
            else:
                value = number_of(noise_at, noise_value, row)
                for i in range(size):
                    out[i] = rounded(fma(value, made[i], total[i]))

    return kernel(combine_tiles, dtype)
