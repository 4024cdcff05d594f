"""The ops of the reference back end: `reference` and `reference_steps`, written to the tensors that are given."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import reference, reference_steps
from ..backend import Coefficient, Index, NoiseOffset, Residual

__all__ = [
    "dsm_gradient",
    "dsm_loss",
    "euler_maruyama_step",
    "fill",
    "langevin_step",
    "linear_step",
    "matrix_product",
    "matrix_step",
    "noise_product",
    "perturb",
    "scaled",
]


def _written(out: Tensor, value: Tensor) -> Tensor:
    """``out`` with these values. Its version stays, as where a kernel writes: whoever needs it counted says so."""
    out.data.copy_(value)
    return out


def _unsigned(noise: NoiseOffset) -> dict[str, int]:
    """Integers as `reference_steps` takes them; they come in two's complement, or as tensors."""
    return {
        "seed": int(noise.seed) % (1 << 64),
        "stream": noise.stream,
        "first_path": int(noise.first_path) % (1 << 64),
        "step": int(noise.step),
    }


def _tensor(c: Coefficient, device: torch.device | None = None) -> Tensor:
    return torch.as_tensor(c, dtype=None if isinstance(c, Tensor) else torch.float64, device=device)


def fill(kind: str, out: Tensor, *, seed: Index, stream: int, first_path: Index, offset: Index) -> Tensor:
    """See `sdesolve_kernels.normal`, `uniform` and `words`."""
    make: Any = {"normal": reference.normal, "uniform": reference.uniform, "words": reference.numbered_words}[kind]
    dtype = {} if kind == "words" else {"dtype": out.dtype}
    rows, count = len(out), out[0].numel()
    where = {
        "seed": int(seed) % (1 << 64),
        "stream": stream,
        "first_path": int(first_path) % (1 << 64),
        "offset": int(offset),
    }
    return _written(out, make(rows, count, **where, device=out.device, **dtype).reshape(out.shape))


def euler_maruyama_step(
    x: Tensor, f: Tensor, g: Coefficient, dt: Coefficient, *, out: Tensor, noise: NoiseOffset
) -> Tensor:
    """See `reference_steps.euler_maruyama_step`."""
    return _written(out, reference_steps.euler_maruyama_step(x, f, _tensor(g), _tensor(dt), **_unsigned(noise)))


def matrix_step(x: Tensor, f: Tensor, g: Tensor, dt: Coefficient, *, out: Tensor, noise: NoiseOffset) -> Tensor:
    """See `reference_steps.matrix_step`."""
    return _written(out, reference_steps.matrix_step(x, f, g, _tensor(dt), **_unsigned(noise)))


def matrix_product(g: Tensor, v: Tensor, *, out: Tensor) -> Tensor:
    """See `reference_steps.matrix_product`."""
    return _written(out, reference_steps.matrix_product(g, v))


def linear_step(
    x: Tensor, history: Sequence[Tensor], table: Tensor, row: int | Tensor, *, stochastic: bool, out: Tensor,
    noise: NoiseOffset,
) -> Tensor:  # fmt: skip
    """See `reference_steps.linear_step`."""
    made = reference_steps.linear_step(x, list(history), table, int(row), stochastic=stochastic, **_unsigned(noise))
    return _written(out, made)


def langevin_step(
    x: Tensor, score: Tensor, *, mode: str, size: Coefficient, alpha: Coefficient, out: Tensor,
    noise: NoiseOffset,
) -> Tensor:  # fmt: skip
    """See `reference_steps.langevin_step`."""
    size = size.to(x.device) if isinstance(size, Tensor) else size
    alpha = _tensor(alpha, x.device)
    return _written(out, reference_steps.langevin_step(x, score, mode=mode, size=size, alpha=alpha, **_unsigned(noise)))


def perturb(x0: Tensor, alpha: Coefficient, sigma: Coefficient, *, out: Tensor, noise: NoiseOffset) -> Tensor:
    """See `reference_steps.perturb`."""
    return _written(out, reference_steps.perturb(x0, _tensor(alpha), _tensor(sigma), **_unsigned(noise)))


def noise_product(v: Tensor, c: Coefficient, *, out: Tensor, noise: NoiseOffset) -> Tensor:
    """See `reference_steps.noise_product`."""
    return _written(out, reference_steps.noise_product(v, _tensor(c), **_unsigned(noise)))


def scaled(v: Tensor, c: Coefficient, *, out: Tensor) -> Tensor:
    """``c v``, rounded once."""
    wide = reference_steps.compute_dtype(v.dtype)
    c = _tensor(c, v.device).to(wide)
    return _written(out, v.to(wide) * c.reshape(-1, *(1,) * (v.dim() - 1)))


def dsm_loss(r: Residual, *, mean: bool, out: Tensor, gradient: Tensor | None, noise: NoiseOffset) -> Tensor:
    """See `reference_steps.dsm_loss`."""
    p, q, weight = _tensor(r.p), _tensor(r.q), _tensor(r.weight)
    loss = reference_steps.dsm_loss(r.output, r.x0, p, q, weight, **_unsigned(noise))
    if gradient is not None:
        dsm_gradient(r, 1.0, mean=mean, out=gradient, made=False, noise=noise)
    return _written(out, loss.mean() if mean else loss)


def dsm_gradient(
    r: Residual, upstream: Coefficient, *, mean: bool, out: Tensor, made: bool, noise: NoiseOffset
) -> Tensor:
    """The gradient of `dsm_loss`, made anew whether or not `out` holds it for an upstream of 1."""
    residual = reference_steps.dsm_residual(r.output, r.x0, _tensor(r.p), _tensor(r.q), **_unsigned(noise))
    factor = 2.0 / (r.output.numel() if mean else r.output[0].numel())
    scale = _tensor(upstream).to(residual) * _tensor(r.weight).to(residual) * factor
    return _written(
        out, scale.reshape(-1, *(1,) * (residual.dim() - 1)) * residual if scale.dim() else scale * residual
    )
