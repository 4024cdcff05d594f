"""The step ops by `reference_steps`, with the tensors to write that every backend is given."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import reference_steps

__all__ = ["dsm_loss", "euler_maruyama_step", "langevin_step", "linear_step", "noise_product", "perturb"]


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
    residual: Tensor | None,
    **where: Any,
) -> Tensor:
    """See `reference_steps.dsm_loss`; the mean over the batch if `mean`, and the residual written to `residual`."""
    p, q, weight = (torch.as_tensor(c, dtype=None if isinstance(c, Tensor) else torch.float64) for c in (p, q, weight))
    r = reference_steps.dsm_residual(output, x0, p, q, **_integers(where))
    if residual is not None:
        residual.copy_(r)
    loss = weight.to(r) * reference_steps._flat(r).square().mean(1)
    return out.copy_(loss.mean() if mean else loss)
