"""The step kernel: a linear combination of states and noise, one pass over memory.

Every step of the library is ``out = sum_k c_k s_k + c g z`` with coefficients that are numbers or one for each row. The
states of a tile are added up in the first-level cache, one state after the other: the number of states is then not part
of the compiled code, an output that is also an input needs no care, and each loop has few enough pointers for LLVM's
overlap checks (a loop over six states with six rows of coefficients stays scalar). It costs 0.03 ns per element and
state; the memory behind it costs ten times that.
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

__all__ = ["combine", "spread"]

_U64 = np.uint64


def _spread(dtype: Any) -> Callable[..., None]:
    """Function that writes the coefficients of a unit's rows once for each of their elements."""
    view = at[dtype]

    def spread_rows(places: Any, address: Any, row: Any, height: Any, width: Any) -> None:
        c = view(address, row + height)[row:]
        if width == 1:
            for i in range(height):
                places[i] = c[i]
        elif height == 1:
            value = c[0]
            for j in range(width):
                places[j] = value
        else:
            for i in range(height):
                value, part = c[i], places[i * width : (i + 1) * width]
                for j in range(width):
                    part[j] = value

    return kernel(spread_rows, dtype.__name__)


spread = {np.float32: _spread(np.float32), np.float64: _spread(np.float64)}


@functools.cache
def combine(dtype: str) -> Callable[..., None]:
    """Kernel for states of a torch dtype, by name."""
    compute = COMPUTE[dtype]
    stored, widen, rounded = storage(dtype)
    memory, buffer, fill, rows_of = at[stored], at[compute], noise_tile(compute), spread[compute]

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
            for k in range(5):
                if states[k] == 0:
                    if k == 0:
                        total[:size] = 0
                    break
                if addresses[k] != 0:
                    rows_of(each, addresses[k], row, height, width)
                state = memory(states[k], begin + size)[begin:]
                add(total, state, size, compute(values[k]), each, addresses[k] != 0, k == 0)
            if noisy:
                path, n = _U64(first_path) + _U64(row), _U64(offset) + _U64(j)
                made = buffer(fill(scratch, _U64(seed), _U64(stream), path, n, height, width), size)
                if gain_at != 0:
                    gain = memory(gain_at, begin + size)[begin:]
                    for i in range(size):
                        made[i] *= widen(gain[i])
                value = compute(noise_value)
                if noise_at != 0:
                    rows_of(each, noise_at, row, height, width)
                    for i in range(size):
                        total[i] = fma(each[i], made[i], total[i])
                else:
                    for i in range(size):
                        total[i] = fma(value, made[i], total[i])
            out = memory(out_at, begin + size)[begin:]
            for i in range(size):
                out[i] = rounded(total[i])

    return kernel(combine_tiles, dtype)
