"""The step ops on CPU tensors that sum over paths: the Langevin corrector and the denoising loss."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..backend import Coefficient, NoiseOffset, Residual
from ..reference_steps import chi_mean, compute_dtype
from ..threads import scratch
from .arguments import ALONE, NAMES, Operands, noise_numbers, number_or_rows, rows_of, run, units
from .launch import combined, scaled
from .memory import COMPUTE
from .sums import denoising, finish_loss, finish_norms, finish_sizes, norms
from .tile import SCRATCH, SUMS, TILE

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
    delta, scale = _sizes(score, mode, float(size), alpha, kept, noise)
    if kept is None:
        return combined(out, ((1.0, x), (delta, score)), scale, None, noise)
    return combined(out, ((1.0, x), (delta, score), (scale, kept)))


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


def _sizes(
    score: Tensor, mode: str, snr: float, alpha: Any, kept: Tensor | None, noise: NoiseOffset
) -> tuple[Any, Any]:
    """Step size from norms in float64 and the scale of its noise: numbers, or ``(batch,)`` in the compute dtype.

    The noise is left in `kept`.
    """
    score = score.resolve_neg().contiguous()
    rows = score.shape[0]
    m = score.numel() // rows
    each = int(mode == "sample")
    count = rows if each and m <= TILE else units(rows, m)
    partial = torch.empty(2 * count, dtype=torch.float64, device="cpu")
    score_at, noise_at = partial.data_ptr(), 0 if mode == "dimension" else partial.data_ptr() + 8 * count
    addresses = score.data_ptr(), 0 if kept is None else kept.data_ptr(), score_at, noise_at
    run(norms(NAMES[score.dtype]), (*addresses, each, *noise_numbers(noise, m)), rows, m, score, kept, partial)
    if each:
        wide = compute_dtype(score.dtype)
        sizes = torch.empty(2, rows, dtype=wide, device="cpu")
        factors = None if _scalar(alpha) else alpha.double().contiguous()
        alpha_at, number = (0, float(alpha)) if factors is None else (factors.data_ptr(), 0.0)
        finish_sizes(COMPUTE[NAMES[wide]])(score_at, noise_at, snr, alpha_at, number, sizes.data_ptr(), rows, m)
        return sizes[0], sizes[1]
    s = finish_norms(score_at, rows, m)
    n = chi_mean(m) if noise_at == 0 else finish_norms(noise_at, rows, m)
    # Where the score vanishes, what IEEE division gives, which Python's refuses.
    ratio = n / s if s else math.inf if n > 0.0 else math.nan
    delta: Any = 2.0 * (float(alpha) if _scalar(alpha) else alpha.double()) * (snr * ratio) ** 2
    delta = delta.to(compute_dtype(score.dtype)) if isinstance(delta, Tensor) else delta
    return delta, _noise_scale(delta)


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
