"""The one-pass step ops on CPU tensors: names and arguments of `reference_steps`, and the tensor to write."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..backend import NoiseOffset
from ..reference_steps import compute_dtype
from ..threads import scratch
from .arguments import ALONE, NAMES, Operands, entries, noise_numbers, number_or_rows, rows_of, run, units
from .steps import combine
from .tile import SCRATCH

__all__ = ["combined", "euler_maruyama_step", "linear_step", "noise_product", "perturb", "scaled"]

_ABSENT, _NO_NUMBERS = (0,) * 5, (0.0,) * 5
_PADDING = [(0,) * (10 - n) for n in range(6)]  # of addresses of up to five states, and of no coefficients
_entries: dict[torch.dtype, Any] = {}  # of `combine`
# Rows of tables, read in a third of the time of tolist.
_ROWS = {
    dtype: [kind * n for n in range(7)]
    for dtype, kind in ((torch.float64, ctypes.c_double), (torch.float32, ctypes.c_float))
}


def _with_numbers(
    out: Tensor, states: Sequence[Tensor], numbers: Sequence[float], scale: float | None, gain: Tensor | None,
    noise: NoiseOffset,
) -> Tensor:  # fmt: skip
    """`combined` where all coefficients are numbers, at half the cost for a call on a thousand elements."""
    entry, size, begin, count = _entries.get(out.dtype), out.nbytes, out.data_ptr(), out.numel()
    plain = count < ALONE and out.is_contiguous() and not out.is_neg()
    addresses = []
    for s in states if gain is None else (*states, gain):
        at = s.data_ptr()
        if at != begin and (-size < at - begin < size):
            plain = False
        if s is not out and not (s.is_contiguous() and not s.is_neg()):
            plain = False
        addresses.append(at)
    if entry is None or not plain:
        combined(out, list(zip(numbers, states, strict=True)), scale, gain, noise)
        if count < ALONE:
            _entries[out.dtype] = entries.get(combine(NAMES[out.dtype]))
        return out
    rows = out.shape[0]
    m = count // rows
    gain_at = 0 if gain is None else addresses.pop()
    seed, stream, first_path, step = noise
    entry(
        begin, *addresses, *_PADDING[len(addresses)], *numbers, *_NO_NUMBERS[len(addresses) :],
        gain_at, 0, scale or 0.0, scale is not None, seed, stream, first_path, step * m, rows, m, 0,
        units(rows, m), scratch(SCRATCH)[1],
    )  # fmt: skip
    return out


def combined(
    out: Tensor,
    terms: Sequence[tuple[Any, Tensor]],
    scale: Any = None,
    gain: Tensor | None = None,
    noise: NoiseOffset | None = None,
) -> Tensor:
    """``sum c_k s_k + scale gain z`` for up to five pairs ``(c_k, s_k)``; without `scale`, no noise."""
    rows = out.shape[0]
    m = out.numel() // rows
    operands = Operands(out)
    states, per_row, numbers = [], [], []
    for c, s in terms:
        states.append(operands.state(s))
        at, number = (0, c) if type(c) is float else operands.coefficient(c)
        per_row.append(at)
        numbers.append(number)
    rest = 5 - len(states)
    gain_at = 0 if gain is None else operands.state(gain)
    scale_at, scale_number = (0, 0.0) if scale is None else operands.coefficient(scale)
    arguments = (
        operands.begin, *states, *_ABSENT[:rest], *per_row, *_ABSENT[:rest], *numbers, *_NO_NUMBERS[:rest],
        gain_at, scale_at, scale_number, 0 if scale is None else 1,
        *(_ABSENT[:4] if noise is None else noise_numbers(noise, m)),
    )  # fmt: skip
    run(combine(NAMES[out.dtype]), arguments, rows, m, operands, terms, scale, gain)
    return operands.finish()


def euler_maruyama_step(x: Tensor, f: Tensor, g: Any, dt: Any, *, out: Tensor, noise: NoiseOffset) -> Tensor:
    """See `reference_steps.euler_maruyama_step`."""
    if type(dt) is float and type(g) is float:
        return _with_numbers(out, (x, f), (1.0, dt), math.sqrt(abs(dt)) * g, None, noise)
    if type(dt) is float and g.dim() > 1:
        return _with_numbers(out, (x, f), (1.0, dt), math.sqrt(abs(dt)), g, noise)
    dt = number_or_rows(dt)
    root = rows_of(dt, x).abs().sqrt() if isinstance(dt, Tensor) else math.sqrt(abs(dt))
    full = isinstance(g, Tensor) and g.dim() > 1  # a coefficient has no more than one
    gain = g if full else None
    if not full:
        g = number_or_rows(g)
        root = root * (rows_of(g, x) if isinstance(g, Tensor) else g)
    if type(dt) is type(root) is float:
        return _with_numbers(out, (x, f), (1.0, dt), root, gain, noise)
    return combined(out, ((1.0, x), (dt, f)), root, gain, noise)


def linear_step(
    x: Tensor,
    history: Sequence[Tensor],
    table: Tensor,
    row: int,
    *,
    stochastic: bool,
    out: Tensor,
    noise: NoiseOffset,
) -> Tensor:
    """See `reference_steps.linear_step`."""
    if table.dim() == 3:
        coefficients: Any = table[row].to(compute_dtype(x.dtype)).contiguous().unbind(0)
    elif table.dtype in _ROWS and table.is_contiguous() and not table.is_neg():
        n = len(history) + 2
        coefficients = _ROWS[table.dtype][n].from_address(table.data_ptr() + table.element_size() * n * row)
    else:
        coefficients = table[row].tolist()
    *numbers, c = coefficients
    scale, states = c if stochastic else None, (x, *history)
    if table.dim() == 2:
        return _with_numbers(out, states, numbers, scale, None, noise)
    return combined(out, list(zip(numbers, states, strict=True)), scale, None, noise)


def perturb(x0: Tensor, alpha: Any, sigma: Any, *, out: Tensor, noise: NoiseOffset) -> Tensor:
    """See `reference_steps.perturb`."""
    return combined(out, ((number_or_rows(alpha), x0),), number_or_rows(sigma), None, noise)


def noise_product(v: Tensor, c: Any, *, out: Tensor, noise: NoiseOffset) -> Tensor:
    """See `reference_steps.noise_product`."""
    return combined(out, (), number_or_rows(c), v, noise)


def scaled(v: Tensor, c: Any, *, out: Tensor) -> Tensor:
    """``c v``, rounded once."""
    return combined(out, ((number_or_rows(c), v),))
