"""Products of a matrix for each row, and steps with them, on CPU tensors."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from ..backend import NoiseOffset
from ..threads import scratch, split
from .arguments import ALONE, NAMES, Operands, entries, keep_entry, noise_numbers, number_or_rows, rows_of
from .matrices import matrices, scratch_size, unit_height

__all__ = ["matrix_product", "matrix_step"]

_GRAIN = 1 << 18  # multiply-adds a thread takes at least


def matrix_step(x: Tensor, f: Tensor, g: Tensor, dt: Any, *, out: Tensor, noise: NoiseOffset) -> Tensor:
    """See `reference_steps.matrix_step`."""
    dt = number_or_rows(dt)
    root = rows_of(dt, x).abs().sqrt() if isinstance(dt, Tensor) else math.sqrt(abs(dt))
    return _run(g, out, (x, f, dt, root), None, noise)


def matrix_product(g: Tensor, v: Tensor, *, out: Tensor) -> Tensor:
    """See `reference_steps.matrix_product`."""
    return _run(g, out, None, v, None)


def _run(g: Tensor, out: Tensor, step: Any, v: Tensor | None, noise: NoiseOffset | None) -> Tensor:
    rows, m = out.shape[0], g.shape[-1]
    d = out.numel() // rows
    shared = rows == 1 or g.shape[0] == 1 or g.stride(0) == 0
    operands = Operands(out)
    addresses: tuple[Any, ...] = (0, 0, 0, 0.0, 0, 0.0)
    if step is not None:
        x, f, dt, root = step
        addresses = (operands.state(x), operands.state(f), *operands.coefficient(dt), *operands.coefficient(root))
    most = unit_height(d, m)
    units = -(-rows // most)
    numbers = (0, 0, 0, 0) if noise is None else noise_numbers(noise, m)
    arguments = (
        operands.begin, *addresses, operands.apart(g[:1] if shared else g), shared,
        0 if v is None else operands.apart(v), *numbers, rows, d, m, most,
    )  # fmt: skip
    size, kernel = scratch_size(d, m), matrices(NAMES[out.dtype])
    work = rows * d * m
    if work < ALONE or units == 1:
        memory, address = scratch(size)
        entry = entries.get(kernel, kernel)
        entry(*arguments, 0, units, address)
        if entry is kernel:
            keep_entry(kernel)
        del memory
    else:

        def run(start: int, stop: int, kept: Any = (operands, step, g, v)) -> None:
            memory, address = scratch(size)
            kernel(*arguments, start, stop, address)
            del memory, kept

        split(run, units, -(-_GRAIN * units // work))
    return operands.finish()
