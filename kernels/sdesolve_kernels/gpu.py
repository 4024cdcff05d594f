"""The step ops by the Triton launchers."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ._triton.launch import euler_maruyama_step, fill, linear_step, noise_product, perturb, scaled
from ._triton.launch_denoising import dsm_loss_parts
from ._triton.launch_langevin import langevin_step

__all__ = [
    "dsm_gradient",
    "dsm_loss",
    "euler_maruyama_step",
    "fill",
    "langevin_step",
    "linear_step",
    "noise_product",
    "perturb",
    "scaled",
]


def dsm_loss(
    output: Tensor,
    x0: Tensor | None,
    p: Any,
    q: Any,
    weight: Any,
    *,
    mean: bool,
    out: Tensor,
    gradient: Tensor | None,
    **where: Any,
) -> Tensor:
    """See `reference_steps.dsm_loss`; the mean over the batch if `mean`, and its gradient written to `gradient`."""
    keep = gradient is not None
    dsm_loss_parts(output, x0, p, q, weight, mean=mean, loss_out=out, grad=keep, out=gradient, **where)
    return out


def dsm_gradient(
    output: Tensor,
    x0: Tensor | None,
    p: Any,
    q: Any,
    weight: Any,
    upstream: Any,
    *,
    mean: bool,
    out: Tensor,
    made: bool = False,
    **where: Any,
) -> Tensor:
    """The gradient of `dsm_loss` for a gradient `upstream` of the loss; `made` if `out` holds that for 1 already."""
    dsm_loss_parts(
        output, x0, p, q, weight, mean=mean, loss=False, grad=True, out=out, upstream=upstream, made=made, **where
    )
    return out
