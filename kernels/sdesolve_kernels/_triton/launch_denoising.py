"""Launcher of the denoising score-matching loss."""

from __future__ import annotations

from typing import NamedTuple, cast

import torch
from torch import Tensor

from .arguments import coefficient, launch, prepare, result, state
from .denoising import denoising_kernel, loss_kernel, mean_kernel
from .geometry import row_grid, splits_of
from .launch import Index, tile_of
from .launch_langevin import GROUP

__all__ = ["DenoisingLoss", "dsm_loss", "dsm_loss_parts"]


class DenoisingLoss(NamedTuple):
    """Per-sample loss ``(batch,)``, its mean ``()`` and the gradient with respect to the output, each if asked for."""

    loss: Tensor | None
    mean: Tensor | None
    grad: Tensor | None


def dsm_loss_parts(
    output: Tensor, x0: Tensor | None, p: Tensor | float, q: Tensor | float, weight: Tensor | float,
    *, seed: Index, stream: int, first_path: Index, step: Index,
    loss: bool = True, mean: bool = False, grad: bool = False, upstream: Tensor | float = 1.0,
    out: Tensor | None = None,
) -> DenoisingLoss:  # fmt: skip
    r"""``r = output - p x0 - q z``; ``weight mean_j r_j^2`` per sample and ``upstream 2 weight r / m``, in one pass.

    Args:
        output: What the network returned, ``(batch, *state)``.
        x0: Clean data, or None for ``p = 0``.
        p: Number, ``()`` or ``(batch,)``, as are `q` and `weight`.
        q: The noise's coefficient in the target.
        weight: Weight of each sample.
        loss: Make the per-sample loss.
        mean: Make its mean too; needs `loss`.
        grad: Make the gradient.
        upstream: Gradient with respect to the per-sample loss, a number, ``()`` or ``(batch,)``; ``1 / batch`` times
            the mean's gradient when the mean is what one differentiates.
        out: Where the gradient goes; may be `output` itself.
        seed, stream, first_path, step: Where the noise is.
    """
    dense, out = result(output, out) if grad else (None, None)
    compute = torch.float64 if output.dtype == torch.float64 else torch.float32
    batch, device = output.shape[0], output.device
    losses = torch.empty((batch,), dtype=compute, device=device) if loss or mean else None
    average = torch.empty((), dtype=compute, device=device) if mean else None
    if output.numel() == 0:  # an empty mean is NaN, in torch and here
        for v in (losses, average):
            if v is not None:
                v.fill_(torch.nan)
        return DenoisingLoss(losses, average, out)
    m, tile = tile_of(output)
    per_split, splits = splits_of(tile)
    output = output.contiguous()
    p_c, p_kind = coefficient("p", p, output)
    q_c, q_kind = coefficient("q", q, output)
    weight_c, weight_kind = coefficient("weight", weight, output)
    upstream_c, upstream_kind = coefficient("upstream", upstream, output)
    partial = output if losses is None else torch.empty((splits, batch), dtype=compute, device=device)
    own = {
        "o_ptr": output, "x0_ptr": output if x0 is None else state("x0", x0, output),
        "p_c": p_c, "q_c": q_c, "weight_c": weight_c, "upstream_c": upstream_c,
        "grad_ptr": output if dense is None else dense, "partial_ptr": partial,
        "batch": batch, "m": m, "chunks": tile.chunks,
        "DATA": x0 is not None, "LOSS": losses is not None, "GRAD": grad, "P": p_kind, "Q": q_kind,
        "WEIGHT": weight_kind, "UPSTREAM": upstream_kind, "CHUNKS": per_split,
    }  # fmt: skip
    shared = prepare(output, tile, {"seed": seed, "first_path": first_path, "step": step}, stream)
    launch(denoising_kernel, row_grid(batch, tile, splits), device, own | shared)
    if losses is not None:
        groups = -(-batch // GROUP)
        sums = torch.empty((groups,), dtype=torch.float64, device=device) if mean else losses
        own = {
            "partial_ptr": partial, "weight_c": weight_c, "loss_ptr": losses, "sums_ptr": sums,
            "batch": batch, "m": m, "splits": splits, "WEIGHT": weight_kind, "MEAN": mean, "GROUP": GROUP,
        }  # fmt: skip
        launch(loss_kernel, (groups, 1, 1), device, own)
        if average is not None:
            own = {"sums_ptr": sums, "mean_ptr": average, "batch": batch, "groups": groups, "GROUP": GROUP}
            launch(mean_kernel, (1, 1, 1), device, own)
    if out is not None and dense is not out:
        out.copy_(dense)  # type: ignore[arg-type]
    return DenoisingLoss(losses, average, out)


def dsm_loss(
    output: Tensor, x0: Tensor | None, p: Tensor | float, q: Tensor | float, weight: Tensor | float,
    *, seed: Index, stream: int, first_path: Index, step: Index,
) -> Tensor:  # fmt: skip
    """Per-sample ``weight mean_j (output - p x0 - q z)_j^2``, ``(batch,)`` in the compute dtype."""
    parts = dsm_loss_parts(output, x0, p, q, weight, seed=seed, stream=stream, first_path=first_path, step=step)
    return cast(Tensor, parts.loss)  # asked for, so it is there
