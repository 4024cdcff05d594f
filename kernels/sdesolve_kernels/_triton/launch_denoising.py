"""Launcher of the denoising score-matching loss."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .arguments import coefficient, constants, launch_kept, places, result, state
from .denoising import denoising_kernel, loss_kernel, mean_kernel
from .geometry import Grid, row_grid, splits_of, tree
from .launch import Index, tile_of
from .launch_langevin import GROUP

__all__ = ["DenoisingLoss", "dsm_loss_parts"]

# Programs that look at whether a gradient is what it has to be: enough to write it anew at full speed where it is not.
_WHERE_MADE = 2048


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
    dense, out = result(output, out, x0, p, q, weight, upstream) if grad else (None, None)
    compute = torch.float64 if output.dtype == torch.float64 else torch.float32
    batch, device = output.shape[0], output.device
    if loss and loss_out is None:
        loss_out = torch.empty(() if mean else (batch,), dtype=compute, device=device)
    if output.numel() == 0:  # an empty mean is NaN, in torch and here
        if loss_out is not None:
            loss_out.fill_(torch.nan)
        return DenoisingLoss(loss_out, out)
    if made and dense is not None and dense is not out:
        dense.copy_(out)  # type: ignore[arg-type]
    m, tile = tile_of(output)
    per_split, splits = splits_of(tile)
    output = output.resolve_neg().contiguous()
    p_c, p_kind, p_tag = coefficient("p", p, output)
    q_c, q_kind, q_tag = coefficient("q", q, output)
    weight_c, weight_kind, weight_tag = coefficient("weight", weight, output)
    upstream_c, upstream_kind, upstream_tag = coefficient("upstream", upstream, output)
    partial = torch.empty((splits, batch), dtype=compute, device=device) if loss else output
    data = output if x0 is None else state("x0", x0, output)
    integers, loaded = places(output, seed, first_path, step)

    def make() -> tuple[Grid, dict[str, Any]]:
        own = {"DATA": x0 is not None, "LOSS": loss, "GRAD": grad, "MADE": made, "CHUNKS": per_split}
        kinds = {"P": p_kind, "Q": q_kind, "WEIGHT": weight_kind, "UPSTREAM": upstream_kind}
        programs, y, z = row_grid(batch, tile, splits)
        if made:
            programs = min(programs, max(1, _WHERE_MADE // (y * z)))
        return (programs, y, z), constants(output, tile, loaded, **own, **kinds)

    share = 2.0 / (m * batch if mean else m)
    share_c, _, share_tag = coefficient("share", share, output)
    values = [
        output, data, p_c, q_c, weight_c, upstream_c, share_c, output if dense is None else dense, partial,
        batch, m, tile.chunks, integers[0], int(stream), *integers[1:],
    ]  # fmt: skip
    tags = p_kind, p_tag, q_kind, q_tag, weight_kind, weight_tag, upstream_kind, upstream_tag, share_tag
    key = batch, m, output.dtype, data.dtype, x0 is None, loss, grad, made, loaded, *tags
    launch_kept(denoising_kernel, device, key, values, make)
    if loss:
        lanes, rows = tree(splits)
        groups = -(-batch // rows)
        sums = torch.empty((groups,), dtype=torch.float64, device=device) if mean and groups > 1 else partial
        own = {"WEIGHT": weight_kind, "MEAN": mean, "ONE_GROUP": groups == 1, "ROWS": rows, "LANES": lanes}
        values = [partial, weight_c, loss_out, sums, batch, m, splits]
        last = batch, m, output.dtype, loss_out.dtype if loss_out is not None else None, mean, weight_kind, weight_tag
        launch_kept(loss_kernel, device, last, values, lambda: ((groups, 1, 1), own))
        if mean and groups > 1:
            values = [sums, loss_out, batch, groups]
            launch_kept(mean_kernel, device, last, values, lambda: ((1, 1, 1), {"GROUP": GROUP}))
    if out is not None and dense is not out:
        out.copy_(dense)  # type: ignore[arg-type]
    return DenoisingLoss(loss_out, out)
