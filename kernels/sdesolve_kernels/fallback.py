"""The step ops by `reference_steps`, with the tensors to write that every backend is given."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import reference_steps

__all__ = [
    "dsm_gradient",
    "dsm_loss",
    "euler_maruyama_step",
    "langevin_step",
    "linear_step",
    "noise_product",
    "perturb",
]


def _integers(where: dict[str, Any]) -> dict[str, int]:
    """Unsigned: places arrive in two's complement, or as tensors."""
    whole = {name: int(value) for name, value in where.items()}
    return whole | {name: whole[name] % (1 << 64) for name in ("seed", "first_path")}


def euler_maruyama_step(x: Tensor, f: Tensor, g: Any, dt: Any, *, out: Tensor, **where: Any) -> Tensor:
    """See `reference_steps.euler_maruyama_step`."""
    g, dt = (torch.as_tensor(c, dtype=None if isinstance(c, Tensor) else torch.float64) for c in (g, dt))
    return out.copy_(reference_steps.euler_maruyama_step(x, f, g, dt, **_integers(where)))


def linear_step(
    x: Tensor,
    history: Sequence[Tensor],
    table: Tensor,
    row: int | Tensor,
    *,
    stochastic: bool = True,
    out: Tensor,
    **where: Any,
) -> Tensor:
    """See `reference_steps.linear_step`."""
    made = reference_steps.linear_step(x, list(history), table, int(row), stochastic=stochastic, **_integers(where))
    return out.copy_(made)


def langevin_step(x: Tensor, score: Tensor, *, mode: str, size: Any, alpha: Any, out: Tensor, **where: Any) -> Tensor:
    """See `reference_steps.langevin_step`."""
    alpha = torch.as_tensor(alpha, dtype=None if isinstance(alpha, Tensor) else torch.float64, device=x.device)
    if isinstance(size, Tensor):
        size = size.to(x.device)
    return out.copy_(reference_steps.langevin_step(x, score, mode=mode, size=size, alpha=alpha, **_integers(where)))


def perturb(x0: Tensor, alpha: Any, sigma: Any, *, out: Tensor, **where: Any) -> Tensor:
    """See `reference_steps.perturb`."""
    alpha, sigma = (torch.as_tensor(c, dtype=None if isinstance(c, Tensor) else torch.float64) for c in (alpha, sigma))
    return out.copy_(reference_steps.perturb(x0, alpha, sigma, **_integers(where)))


def noise_product(v: Tensor, c: Any, *, out: Tensor, **where: Any) -> Tensor:
    """See `reference_steps.noise_product`."""
    c = torch.as_tensor(c, dtype=None if isinstance(c, Tensor) else torch.float64)
    return out.copy_(reference_steps.noise_product(v, c, **_integers(where)))


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
    p, q, weight = (torch.as_tensor(c, dtype=None if isinstance(c, Tensor) else torch.float64) for c in (p, q, weight))
    loss = reference_steps.dsm_loss(output, x0, p, q, weight, **_integers(where))
    if gradient is not None:
        dsm_gradient(output, x0, p, q, weight, 1.0, mean=mean, out=gradient, **where)
    return out.copy_(loss.mean() if mean else loss)


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
    """``2 upstream weight (output - p x0 - q z) / m``, and over the batch if `mean`: the gradient of `dsm_loss`.

    `upstream` is the gradient of the loss, a number, ``()`` or ``(batch,)``; `made` says that `out` holds what it is
    for an upstream of 1, which other backends make use of.
    """
    p, q, weight, upstream = (
        torch.as_tensor(c, dtype=None if isinstance(c, Tensor) else torch.float64) for c in (p, q, weight, upstream)
    )
    r = reference_steps.dsm_residual(output, x0, p, q, **_integers(where))
    scale = upstream.to(r) * weight.to(r) * (2.0 / (output.numel() if mean else output[0].numel()))
    return out.copy_(scale.reshape(-1, *(1,) * (r.dim() - 1)) * r if scale.dim() else scale * r)
