"""Launcher of the denoising score-matching loss."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .arguments import bits, coefficient, launch, prepare, result, state
from .denoising import denoising_kernel, loss_kernel, mean_kernel
from .geometry import row_grid, splits_of
from .launch import Index, tile_of
from .launch_langevin import GROUP

__all__ = ["DenoisingLoss", "dsm_loss_parts"]


class DenoisingLoss(NamedTuple):
    """The loss, ``(batch,)`` or its mean ``()``, and the gradient with respect to the output, each if asked for."""

    loss: Tensor | None
    grad: Tensor | None


def dsm_loss_parts(
    output: Tensor, x0: Tensor | None, p: Tensor | float, q: Tensor | float, weight: Tensor | float,
    *, seed: Index, stream: int, first_path: Index, step: Index,
    mean: bool = False, loss: bool = True, loss_out: Tensor | None = None,
    grad: bool = False, out: Tensor | None = None, upstream: Tensor | float = 1.0, made: bool = False,
) -> DenoisingLoss:  # fmt: skip
    r"""``r = output - p x0 - q z``; ``weight mean_j r_j^2`` per sample or on average, and its gradient, in one pass.

    Args:
        output: What the network returned, ``(batch, *state)``.
        x0: Clean data, or None for ``p = 0``.
        p: Number, ``()`` or ``(batch,)``, as are `q` and `weight`.
        q: The noise's coefficient in the target.
        weight: Weight of each sample.
        mean: The loss is the mean over the batch.
        loss: Make the loss.
        loss_out: Where the loss goes, contiguous.
        grad: Make the gradient, ``2 upstream weight r / m``, and over the batch if `mean`.
        out: Where the gradient goes; may be `output` itself.
        upstream: Gradient with respect to the loss, a number, ``()`` or, without `mean`, ``(batch,)``.
        made: `out` holds the gradient for an upstream of 1, a tensor ``()``: the kernel leaves it at that if it is 1.
        seed, stream, first_path, step: Where the noise is.
    """
    dense, out = result(output, out) if grad else (None, None)
    compute = torch.float64 if output.dtype == torch.float64 else torch.float32
    batch, device = output.shape[0], output.device
    if loss and loss_out is None:
        loss_out = torch.empty(() if mean else (batch,), dtype=compute, device=device)
    if output.numel() == 0:  # an empty mean is NaN, in torch and here
        if loss_out is not None:
            loss_out.fill_(torch.nan)
        return DenoisingLoss(loss_out, out)
    m, tile = tile_of(output)
    per_split, splits = splits_of(tile)
    output = output.resolve_neg().contiguous()
    p_c, p_kind = coefficient("p", p, output)
    q_c, q_kind = coefficient("q", q, output)
    weight_c, weight_kind = coefficient("weight", weight, output)
    upstream_c, upstream_kind = coefficient("upstream", upstream, output)
    partial = torch.empty((splits, batch), dtype=compute, device=device) if loss else output
    own = {
        "o_ptr": output, "x0_ptr": output if x0 is None else state("x0", x0, output),
        "p_c": p_c, "q_c": q_c, "weight_c": weight_c, "upstream_c": upstream_c,
        "share_c": bits(2.0 / (m * batch if mean else m)),
        "grad_ptr": output if dense is None else dense, "partial_ptr": partial,
        "batch": batch, "m": m, "chunks": tile.chunks,
        "DATA": x0 is not None, "LOSS": loss, "GRAD": grad, "MADE": made, "P": p_kind, "Q": q_kind,
        "WEIGHT": weight_kind, "UPSTREAM": upstream_kind, "CHUNKS": per_split,
    }  # fmt: skip
    shared = prepare(output, tile, {"seed": seed, "first_path": first_path, "step": step}, stream)
    launch(denoising_kernel, row_grid(batch, tile, splits), device, own | shared)
    if loss:
        groups = -(-batch // GROUP)
        sums = torch.empty((groups,), dtype=torch.float64, device=device) if mean and groups > 1 else partial
        own = {
            "partial_ptr": partial, "weight_c": weight_c, "loss_ptr": loss_out, "sums_ptr": sums, "batch": batch,
            "m": m, "splits": splits, "WEIGHT": weight_kind, "MEAN": mean, "ONE_GROUP": groups == 1, "GROUP": GROUP,
        }  # fmt: skip
        launch(loss_kernel, (groups, 1, 1), device, own)
        if mean and groups > 1:
            own = {"sums_ptr": sums, "mean_ptr": loss_out, "batch": batch, "groups": groups, "GROUP": GROUP}
            launch(mean_kernel, (1, 1, 1), device, own)
    if out is not None and dense is not out:
        out.copy_(dense)  # type: ignore[arg-type]
    return DenoisingLoss(loss_out, out)
