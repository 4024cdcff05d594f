"""The ops by the Triton launchers: what the launchers do not spell as `reference_steps` does is put together here."""

from __future__ import annotations

import math
from typing import Any, cast

import torch
from torch import Tensor

from ._triton.launch import euler_maruyama_step, fill, linear_step, perturb
from ._triton.launch_denoising import dsm_loss_parts
from ._triton.launch_langevin import langevin_step
from .reference_steps import compute_dtype

__all__ = ["dsm_loss", "euler_maruyama_step", "fill", "langevin_step", "linear_step", "noise_product", "perturb"]


def noise_product(v: Tensor, c: Any, *, out: Tensor, **where: Any) -> Tensor:
    """See `reference_steps.noise_product`."""
    z = torch.empty(v.shape, dtype=compute_dtype(v.dtype), device=v.device)
    place = {"seed": where["seed"], "stream": where["stream"], "first_path": where["first_path"]}
    fill("normal", z, **place, offset=where["step"], stride=math.prod(v.shape[1:]))
    if isinstance(c, Tensor):
        c = c.to(z).reshape(-1, *(1,) * (v.dim() - 1)) if c.dim() == 1 else c.to(z)
    return out.copy_(c * z.mul_(v))


def dsm_loss(
    output: Tensor,
    x0: Tensor | None,
    p: Any,
    q: Any,
    weight: Any,
    *,
    mean: bool,
    out: Tensor,
    residual: Tensor | None,
    **where: Any,
) -> Tensor:
    """See `reference_steps.dsm_loss`; the mean over the batch if `mean`, and the residual written to `residual`."""
    # The launcher writes upstream 2 w r / m; with w = 1 and upstream = m / 2 that is the residual, and its loss lacks
    # the weight, which is a product of (batch,) tensors.
    m = math.prod(output.shape[1:])
    parts = dsm_loss_parts(
        output, x0, p, q, 1.0, loss=True, grad=residual is not None, upstream=m / 2, out=residual, **where
    )
    unweighted = cast(Tensor, parts.loss)  # asked for, so it is there
    loss = unweighted * (weight.to(unweighted) if isinstance(weight, Tensor) else weight)
    return out.copy_(loss.mean() if mean else loss)
