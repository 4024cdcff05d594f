"""The one-pass step ops on CPU tensors: names and arguments of `reference_steps`, and the tensor to write."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..reference_steps import compute_dtype
from .arguments import NAMES, NOTHING, Operands, number_or_rows, place, rows_of, run, simple
from .steps import combine

__all__ = ["combined", "euler_maruyama_step", "linear_step", "noise_product", "perturb", "scaled"]

_DOUBLES = {n: ctypes.c_double * n for n in range(2, 7)}


def combined(
    out: Tensor,
    terms: Sequence[tuple[Any, Tensor]],
    noise: Any = None,
    gain: Tensor | None = None,
    where: dict[str, Any] | None = None,
) -> Tensor:
    """``sum c_k s_k + noise gain z`` for pairs ``(c_k, s_k)``; without `noise`, no noise."""
    rows = out.shape[0]
    m = out.numel() // rows
    arguments = simple(out, terms, noise, gain, where, m)
    if arguments is not None:
        run(combine(NAMES[out.dtype]), arguments, rows, m)
        return out
    operands, arguments = Operands(out), NOTHING.copy()
    arguments[0] = operands.begin
    for i, (c, s) in enumerate(terms, 1):
        arguments[i] = operands.state(s)
        arguments[i + 5], arguments[i + 10] = operands.coefficient(c)
    if noise is not None:
        arguments[17:20] = *operands.coefficient(noise), 1
    if gain is not None:
        arguments[16] = operands.state(gain)
    if where is not None:
        arguments[20:24] = place(where, m)
    run(combine(NAMES[out.dtype]), arguments, rows, m)
    return operands.finish()


def euler_maruyama_step(x: Tensor, f: Tensor, g: Any, dt: Any, *, out: Tensor, **where: Any) -> Tensor:
    """See `reference_steps.euler_maruyama_step`."""
    if type(dt) is not float:
        dt = number_or_rows(dt)
    root = rows_of(dt, x).abs().sqrt() if isinstance(dt, Tensor) else math.sqrt(abs(dt))
    terms = ((1.0, x), (dt, f))
    if isinstance(g, Tensor) and g.dim() > 1:  # a coefficient has no more than one
        return combined(out, terms, root, g, where)
    g = number_or_rows(g)
    if isinstance(g, Tensor):
        g = rows_of(g, x)
    return combined(out, terms, g * root, None, where)


def linear_step(
    x: Tensor,
    history: Sequence[Tensor],
    table: Tensor,
    row: int,
    *,
    stochastic: bool = True,
    out: Tensor,
    **where: Any,
) -> Tensor:
    """See `reference_steps.linear_step`."""
    if table.dim() == 3:
        coefficients: Any = table[row].to(compute_dtype(x.dtype)).contiguous().unbind(0)
    elif table.dtype == torch.float64 and table.is_contiguous():  # a third of the time of tolist
        n = len(history) + 2
        coefficients = _DOUBLES[n].from_address(table.data_ptr() + 8 * n * row)
    else:
        coefficients = table[row].tolist()
    a, *b, c = coefficients
    terms = ((a, x), *zip(b, history, strict=True)) if history else ((a, x),)
    return combined(out, terms, c if stochastic else None, None, where)


def perturb(x0: Tensor, alpha: Any, sigma: Any, *, out: Tensor, **where: Any) -> Tensor:
    """See `reference_steps.perturb`."""
    return combined(out, ((number_or_rows(alpha), x0),), number_or_rows(sigma), None, where)


def noise_product(v: Tensor, c: Any, *, out: Tensor, **where: Any) -> Tensor:
    """See `reference_steps.noise_product`."""
    return combined(out, (), number_or_rows(c), v, where)


def scaled(v: Tensor, c: Any, *, out: Tensor) -> Tensor:
    """``c v``, rounded once."""
    return combined(out, ((number_or_rows(c), v),))
