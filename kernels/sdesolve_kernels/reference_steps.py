"""The step kernels in plain torch: what they compute, as one reads it. Oracle, fallback and benchmark baseline.

States are ``(batch, *state)`` with ``m`` elements a path. Element ``j`` of row ``i`` in step ``step`` takes the normal
``Z(seed, stream, first_path + i, step m + j)``, the one that `normal` makes for ``offset = step m``. 16-bit states are
computed in float32 and rounded once, at the end. Coefficients are ``()`` or ``(batch,)`` tensors.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from . import reference

__all__ = [
    "chi_mean",
    "dsm_loss",
    "dsm_residual",
    "euler_maruyama_step",
    "langevin_size",
    "langevin_step",
    "linear_step",
    "matrix_product",
    "matrix_step",
    "noise_like",
    "noise_product",
    "perturb",
]


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64 data, float32 for anything narrower."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def noise_like(x: Tensor, *, seed: int, stream: int, first_path: int, step: int) -> Tensor:
    """The normals of one step, of the shape of ``x``, in the dtype that ``x`` is computed in."""
    m = math.prod(x.shape[1:])
    z = reference.normal(
        x.shape[0],
        m,
        seed=seed,
        stream=stream,
        first_path=first_path,
        offset=step * m,
        dtype=compute_dtype(x.dtype),
        device=x.device,
    )
    return z.reshape(x.shape)


def _rows(c: Tensor, x: Tensor) -> Tensor:
    """``c`` of shape ``()`` or ``(batch,)`` in the compute dtype, shaped to broadcast against ``x``."""
    c = c.to(device=x.device, dtype=compute_dtype(x.dtype))
    return c.reshape(-1, *(1,) * (x.ndim - 1)) if c.ndim == 1 else c


def _wide(x: Tensor) -> Tensor:
    return x.to(compute_dtype(x.dtype))


def _flat(x: Tensor) -> Tensor:
    """``(batch, m)``; also for states ``(batch,)`` and for empty ones, which flatten(1) and -1 refuse."""
    return x.reshape(x.shape[0], math.prod(x.shape[1:]))


def euler_maruyama_step(x: Tensor, f: Tensor, g: Tensor, dt: Tensor, **where: int) -> Tensor:
    """``x + f dt + g sqrt|dt| z``.

    ``g`` is ``()``, ``(batch,)`` or of the shape of ``x``; ``dt`` is ``()`` or ``(batch,)``.
    """
    dt = _rows(dt, x)
    g = _wide(g) if g.shape == x.shape else _rows(g, x)
    return (_wide(x) + _wide(f) * dt + g * dt.abs().sqrt() * noise_like(x, **where)).to(x.dtype)


def matrix_product(g: Tensor, v: Tensor) -> Tensor:
    """``g v`` of each row: ``(batch, *state, channels)``, or 1 for the batch, times ``(batch, channels)``."""
    return (_wide(g) * _wide(v).reshape(v.shape[0], *(1,) * (g.ndim - 2), v.shape[1])).sum(-1).to(v.dtype)


def matrix_step(x: Tensor, f: Tensor, g: Tensor, dt: Tensor, **where: int) -> Tensor:
    """``x + f dt + sqrt|dt| g z`` for a matrix ``g: (batch, *state, channels)``, or 1 for the batch.

    A row takes a normal for each channel: channel ``k`` that of entry ``step channels + k``.
    """
    dt = _rows(dt, x)
    z = noise_like(x.new_empty(x.shape[0], g.shape[-1]), **where)
    return (_wide(x) + _wide(f) * dt + dt.abs().sqrt() * matrix_product(_wide(g), z)).to(x.dtype)


def linear_step(
    x: Tensor, history: list[Tensor], table: Tensor, row: int, *, stochastic: bool = True, **where: int
) -> Tensor:
    """``a x + sum_i b_i history_i + c z`` with ``(a, b_1 ... b_K, c) = table[row]``, each a number or ``(batch,)``.

    ``table`` is ``(rows, K + 2)``, or ``(rows, K + 2, batch)`` for coefficients per sample. Without ``stochastic`` the
    last column is not read and no noise is made.
    """
    a, *b, c = table[row].unbind(0)
    total = _rows(a, x) * _wide(x)
    for b_i, s_i in zip(b, history, strict=True):
        total = total + _rows(b_i, x) * _wide(s_i)
    if stochastic:
        total = total + _rows(c, x) * noise_like(x, **where)
    return total.to(x.dtype)


def chi_mean(m: int) -> float:
    """``E|z|`` of a standard normal vector of ``m`` components, ``sqrt(2) Gamma((m + 1) / 2) / Gamma(m / 2)``."""
    return math.sqrt(2.0) * math.exp(math.lgamma((m + 1) / 2) - math.lgamma(m / 2)) if m else 0.0


def langevin_size(score: Tensor, z: Tensor, *, mode: str, snr: float, alpha: Tensor) -> Tensor:
    """Step size ``2 alpha (snr n / s)^2``, ``()`` or ``(batch,)``, from norms of noise ``n`` and score ``s``.

    ``batch``: both are means over the batch of per-sample norms (Song et al. 2021, algorithm 4 and its code).
    ``sample``: each sample's own norms. ``dimension``: ``n`` is the expected norm `chi_mean`, ``s`` the batch mean.
    """
    s = _flat(_wide(score)).square().sum(1).sqrt()
    n = _flat(z).square().sum(1).sqrt()
    if mode == "batch":
        ratio = n.mean() / s.mean()
    elif mode == "sample":
        ratio = n / s
    else:
        ratio = chi_mean(math.prod(score.shape[1:])) / s.mean()
    return 2.0 * alpha.to(ratio) * (snr * ratio).square()


def langevin_step(x: Tensor, score: Tensor, *, mode: str, size: Tensor | float, alpha: Tensor, **where: int) -> Tensor:
    """``x + delta s + sqrt(2 delta) z``.

    ``mode="fixed"``: ``delta = alpha size``, ``size`` a number, ``()`` or ``(batch,)``. Otherwise ``size`` is the
    signal-to-noise ratio and ``delta`` comes from `langevin_size`.
    """
    z = noise_like(x, **where)
    if mode == "fixed":
        delta = alpha.to(z) * (size.to(z) if isinstance(size, Tensor) else size)
    else:
        delta = langevin_size(score, z, mode=mode, snr=float(size), alpha=alpha)
    delta = _rows(delta, x)
    return (_wide(x) + delta * _wide(score) + (2.0 * delta).sqrt() * z).to(x.dtype)


def perturb(x0: Tensor, alpha: Tensor, sigma: Tensor, **where: int) -> Tensor:
    """``alpha x0 + sigma z``; ``alpha`` and ``sigma`` are ``()`` or ``(batch,)``."""
    return (_rows(alpha, x0) * _wide(x0) + _rows(sigma, x0) * noise_like(x0, **where)).to(x0.dtype)


def dsm_loss(output: Tensor, x0: Tensor | None, p: Tensor, q: Tensor, weight: Tensor, **where: int) -> Tensor:
    """Per-sample ``weight mean_j (output - p x0 - q z)_j^2``, ``(batch,)`` in the compute dtype.

    Every parameterisation's target is linear in the data and the noise of `perturb`: noise ``(p, q) = (0, 1)``, score
    ``(0, -1/sigma)``, data ``(1, 0)``, velocity ``(-sigma, alpha)``, and EDM's network output
    ``((1 - c_skip) / c_out, -c_skip sigma / (alpha c_out))``. ``x0=None`` stands for ``p = 0``. Reads ``output`` (and
    ``x0``), makes ``z`` again, keeps nothing.
    """
    residual = dsm_residual(output, x0, p, q, **where)
    return weight.to(residual) * _flat(residual).square().mean(1)


def dsm_residual(output: Tensor, x0: Tensor | None, p: Tensor, q: Tensor, **where: int) -> Tensor:
    """``output - p x0 - q z`` in the compute dtype: half the gradient of `dsm_loss`, but for ``weight / m``."""
    residual = _wide(output) - _rows(q, output) * noise_like(output, **where)
    if x0 is not None:
        residual = residual - _rows(p, output) * _wide(x0)
    return residual


def noise_product(v: Tensor, c: Tensor, **where: int) -> Tensor:
    """``c v z``, ``c`` being ``()`` or ``(batch,)``: how a gradient meets the noise of a step again."""
    return (_rows(c, v) * _wide(v) * noise_like(v, **where)).to(v.dtype)
