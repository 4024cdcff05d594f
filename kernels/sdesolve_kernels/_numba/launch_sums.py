"""The step ops on CPU tensors that sum over paths: the Langevin corrector and the denoising loss."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..backend import Coefficient, NoiseOffset, Residual
from ..reference_steps import chi_mean, compute_dtype
from ..threads import scratch
from .arguments import ALONE, NAMES, Operands, noise_numbers, number_or_rows, rows_of, run
from .launch import combined, scaled
from .memory import COMPUTE
from .sums import denoising, finish_loss, finish_norms, norms
from .tile import SCRATCH, SUMS, TILE, unit_count

__all__ = ["dsm_gradient", "dsm_loss", "langevin_step"]


def _scalar(c: Any) -> bool:
    return not isinstance(c, Tensor) or c.dim() == 0


def langevin_step(
    x: Tensor, score: Tensor, *, mode: str, size: Any, alpha: Any, out: Tensor, noise: NoiseOffset
) -> Tensor:
    """See `reference_steps.langevin_step`."""
    if mode == "fixed":
        delta: Any = (
            float(alpha) * float(size) if _scalar(size) and _scalar(alpha) else rows_of(alpha, x) * rows_of(size, x)
        )
        return combined(out, ((1.0, x), (delta, score)), _noise_scale(delta), None, noise)
    # The output holds the noise between the two passes where it can: to make it again takes twice the time.
    kept = out if mode != "dimension" and _can_hold_noise(out, x, score, alpha) else None
    delta = _size(score, mode, float(size), alpha, kept, noise)
    if kept is None:
        return combined(out, ((1.0, x), (delta, score)), _noise_scale(delta), None, noise)
    return combined(out, ((1.0, x), (delta, score), (_noise_scale(delta), kept)))


def _noise_scale(delta: Any) -> Any:
    if isinstance(delta, Tensor):
        return (2.0 * delta).sqrt()
    return math.sqrt(2.0 * delta) if delta >= 0 else math.nan


def _can_hold_noise(out: Tensor, *inputs: Any) -> bool:
    """Whether noise fits into `out` unrounded, and nothing that is still to be read lies there."""
    if out.dtype is not compute_dtype(out.dtype) or not out.is_contiguous() or out.is_neg():
        return False
    begin, end = out.data_ptr(), out.data_ptr() + out.nbytes
    tensors = (t for t in inputs if isinstance(t, Tensor))
    return all(
        t.is_contiguous() and not t.is_neg() and (t.data_ptr() >= end or t.data_ptr() + t.nbytes <= begin)
        for t in tensors
    )


def _size(score: Tensor, mode: str, snr: float, alpha: Any, kept: Tensor | None, noise: NoiseOffset) -> Any:
    """Step size from norms in float64: a number, or ``(batch,)`` in the compute dtype; the noise is left in `kept`."""
    score = score.resolve_neg().contiguous()
    rows = score.shape[0]
    m = score.numel() // rows
    each = int(mode == "sample")
    partial = torch.empty(2, rows if each and m <= TILE else unit_count(rows, m), dtype=torch.float64, device="cpu")
    score_at, noise_at = partial.data_ptr(), 0 if mode == "dimension" else partial[1].data_ptr()
    addresses = score.data_ptr(), 0 if kept is None else kept.data_ptr(), score_at, noise_at
    run(norms(NAMES[score.dtype]), (*addresses, each, *noise_numbers(noise, m)), rows, m, score, kept, partial)
    s: Any = finish_norms(score_at, each, rows, m)
    n: Any = chi_mean(m) if noise_at == 0 else finish_norms(noise_at, each, rows, m)
    if each:
        s, n = partial[:, :rows].unbind(0)
    elif s == 0.0:  # what IEEE division gives, which Python's refuses
        return _scaled(math.inf if n > 0.0 else math.nan, snr, alpha, score)
    return _scaled(n / s, snr, alpha, score)


def _scaled(ratio: Any, snr: float, alpha: Any, x: Tensor) -> Any:
    alpha = float(alpha) if _scalar(alpha) else alpha.to(torch.float64)
    delta = 2.0 * alpha * (snr * ratio) ** 2
    return delta.to(compute_dtype(x.dtype)) if isinstance(delta, Tensor) else delta


def dsm_loss(r: Residual, *, mean: bool, out: Tensor, gradient: Tensor | None, noise: NoiseOffset) -> Tensor:
    """See `reference_steps.dsm_loss`."""
    output, x0, p, q, weight = r
    rows, size, name = output.shape[0], output.numel(), NAMES[output.dtype]
    m = size // rows
    operands = Operands(output if gradient is None else gradient)
    sums = rows * -(-m // TILE)
    # A thousand sums fit into the scratch memory, and an allocation costs 1 us.
    partial = torch.empty(sums, dtype=torch.float64, device="cpu") if sums > SUMS else None
    partial_at = scratch(SCRATCH)[1] + SCRATCH - 8 * SUMS if partial is None else partial.data_ptr()
    weights = operands.coefficient(weight)
    # A call that takes all units finishes; several calls leave that to one more.
    alone = size < ALONE
    arguments = (
        operands.state(output), 0 if x0 is None else operands.state(x0),
        0 if gradient is None else operands.begin, 2.0 / (m * rows if mean else m), partial_at,
        *operands.coefficient(p), *operands.coefficient(q),
        *weights, out.data_ptr() if alone else 0, int(mean), *noise_numbers(noise, m),
    )  # fmt: skip
    run(denoising(name), arguments, rows, m, operands, r, out, partial)
    if not alone:
        finish_loss(COMPUTE[name])(partial_at, *weights, out.data_ptr(), int(mean), rows, m, scratch(SCRATCH)[1])
    return out


def dsm_gradient(
    r: Residual, upstream: Coefficient, *, mean: bool, out: Tensor, made: bool, noise: NoiseOffset
) -> Tensor:
    """The gradient of `dsm_loss`."""
    output, x0, p, q, weight = r
    upstream = number_or_rows(upstream)
    if made and mean:
        if upstream == 1.0:
            return out
        if out.dtype is compute_dtype(out.dtype):  # one rounding more, which 16 bits would notice
            return scaled(out, upstream, out=out)
    rows, size = output.shape[0], output.numel()
    m = size // rows
    factor = 2.0 / (m * rows if mean else m)
    if isinstance(upstream, Tensor):
        weight = upstream * (weight.to(upstream) if isinstance(weight, Tensor) else weight)
    else:
        factor *= upstream
    operands = Operands(out)
    arguments = (
        operands.state(output), 0 if x0 is None else operands.state(x0), operands.begin, factor, 0,
        *operands.coefficient(p), *operands.coefficient(q), *operands.coefficient(weight),
        0, 0, *noise_numbers(noise, m),
    )  # fmt: skip
    run(denoising(NAMES[output.dtype]), arguments, rows, m, operands, r, weight)
    return operands.finish()
