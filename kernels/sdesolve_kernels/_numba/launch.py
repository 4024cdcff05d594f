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
from .arguments import NAMES, Operands, noise_numbers, number_or_rows, rows_of, run
from .steps import combine

__all__ = ["combined", "euler_maruyama_step", "linear_step", "noise_product", "perturb", "scaled"]

_ABSENT, _NO_NUMBERS = (0,) * 5, (0.0,) * 5
_DOUBLES = {n: ctypes.c_double * n for n in range(2, 7)}


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
    if type(dt) is not float:
        dt = number_or_rows(dt)
    root = rows_of(dt, x).abs().sqrt() if isinstance(dt, Tensor) else math.sqrt(abs(dt))
    terms = ((1.0, x), (dt, f))
    if isinstance(g, Tensor) and g.dim() > 1:  # a coefficient has no more than one
        return combined(out, terms, root, g, noise)
    g = number_or_rows(g)
    if isinstance(g, Tensor):
        g = rows_of(g, x)
    return combined(out, terms, g * root, None, noise)


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
    elif table.dtype == torch.float64 and table.is_contiguous() and not table.is_neg():  # a third of the time of tolist
        n = len(history) + 2
        coefficients = _DOUBLES[n].from_address(table.data_ptr() + 8 * n * row)
    else:
        coefficients = table[row].tolist()
    a, *b, c = coefficients
    terms = ((a, x), *zip(b, history, strict=True)) if history else ((a, x),)
    return combined(out, terms, c if stochastic else None, None, noise)


def perturb(x0: Tensor, alpha: Any, sigma: Any, *, out: Tensor, noise: NoiseOffset) -> Tensor:
    """See `reference_steps.perturb`."""
    return combined(out, ((number_or_rows(alpha), x0),), number_or_rows(sigma), None, noise)


def noise_product(v: Tensor, c: Any, *, out: Tensor, noise: NoiseOffset) -> Tensor:
    """See `reference_steps.noise_product`."""
    return combined(out, (), number_or_rows(c), v, noise)


def scaled(v: Tensor, c: Any, *, out: Tensor) -> Tensor:
    """``c v``, rounded once."""
    return combined(out, ((number_or_rows(c), v),))
