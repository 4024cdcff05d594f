"""Normal laws in their eigenbases: the arithmetic that `Gaussian` and `GaussianMixture` share."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

# Relative to the largest entry or eigenvalue. Covariances that were estimated or read from float32 files miss symmetry
# and positivity by about 1e-7 of their size; anything beyond is a mistake of the caller's.
_SYMMETRY_TOLERANCE = 1e-6
_POSITIVITY_TOLERANCE = 1e-6

STATE_DTYPES = (torch.float32, torch.float64)


class Spectrum(NamedTuple):
    """Covariances ``U diag(values) U^T``, of one law or of a stack of them.

    Attributes:
        values: eigenvalues, ``(*stack, d)``, or ``(*stack, 1)`` for a multiple of the identity.
        vectors: eigenvectors as columns, ``(*stack, d, d)``; ``None`` for the identity.
    """

    values: Tensor
    vectors: Tensor | None


class Components(NamedTuple):
    """Normal laws ``N(mean, U diag(values) U^T)`` over the flattened state; ``stack`` is ``()`` or ``(K,)``.

    After noising, ``x = alpha x_0 + sigma z``, each has mean ``alpha mean``, the same eigenvectors and the eigenvalues
    ``alpha^2 values + sigma^2``. ``alpha`` and ``sigma`` are ``()`` or ``(batch, 1)``, of the dtype of the state.

    Attributes:
        mean: ``(*stack, 1, d)``.
        values: ``(*stack, 1, d)`` or ``(*stack, 1, 1)``.
        vectors: ``(*stack, d, d)`` or ``None``.
        log_weights: ``(K, 1)``, of no meaning for a single law.
    """

    mean: Tensor
    values: Tensor
    vectors: Tensor | None
    log_weights: Tensor

    def displacement(self, x: Tensor, alpha: Tensor) -> Tensor:
        """``U^T (x - alpha mean)``: ``(*stack, batch, d)`` from ``x: (batch, d)``."""
        # Differences first: expanding |x - m|^2 into |x|^2 - 2 x m + |m|^2 would cancel where the noise is small.
        r = x - alpha * self.mean
        return r if self.vectors is None else r @ self.vectors

    def from_eigenbasis(self, y: Tensor) -> Tensor:
        """``U y``."""
        return y if self.vectors is None else y @ self.vectors.mT

    def variances(self, alpha: Tensor, sigma: Tensor) -> Tensor:
        """``alpha^2 values + sigma^2``, broadcastable to the displacement."""
        return alpha.square() * self.values + sigma.square()

    def log_density(self, y: Tensor, v: Tensor) -> Tensor:
        """Log density of each law, ``(*stack, batch)``, from the displacement and its variances."""
        d = y.shape[-1]
        log_det = v.log().sum(-1) * (d // v.shape[-1])
        return -0.5 * ((y.square() / v).sum(-1) + log_det + d * math.log(2.0 * math.pi))

    def posterior_gain(self, alpha: Tensor, v: Tensor) -> Tensor:
        """``alpha values / v``: the share of a displacement of ``x`` that is one of ``x_0``; 0 where it cannot vary."""
        return alpha * self.values / v.clamp_min(torch.finfo(v.dtype).tiny)


def converted(parts: Components, dtype: torch.dtype, device: torch.device) -> Components:
    """The same in another precision, on another device."""
    mean, values, log_weights = (c.to(device, dtype) for c in (parts.mean, parts.values, parts.log_weights))
    vectors = None if parts.vectors is None else parts.vectors.to(device, dtype)
    return Components(mean, values, vectors, log_weights)


def spectrum(cov: Tensor, state_shape: tuple[int, ...], name: str = "cov") -> Spectrum:
    """The spectrum of a covariance in any of three forms.

    Args:
        cov: float64; ``()`` for a variance of every component, ``state_shape`` for one variance each, or ``(d, d)``
            over the flattened state.
        state_shape: shape of one state; ``d`` is its number of elements.
        name: what messages call it.

    Raises:
        ValueError: another shape, a matrix that is not symmetric, a negative variance or eigenvalue.
    """
    d = math.prod(state_shape)
    if cov.ndim == 0 or cov.shape == state_shape:
        if bool((cov < 0).any()):
            raise ValueError(
                f"{name} holds variances, which cannot be negative; the smallest is {float(cov.min()):.6g}"
            )
        return Spectrum(cov.reshape(-1), None)
    if cov.shape != (d, d):
        raise ValueError(
            f"{name} must be a number (one variance), variances of the shape of the state {state_shape}, or a matrix "
            f"{(d, d)} over the flattened state; got shape {tuple(cov.shape)}"
        )
    return Spectrum(*_eigh(cov, name))


def matrix_spectra(covs: Tensor, name: str = "covs") -> Spectrum:
    """The spectra of a stack of matrices, ``(K, d, d)``; checked as in `spectrum`."""
    return Spectrum(*_eigh(covs, name))


def _eigh(cov: Tensor, name: str) -> tuple[Tensor, Tensor]:
    size = float(cov.abs().max())
    skew = float((cov - cov.mT).abs().max())
    if skew > _SYMMETRY_TOLERANCE * size:
        raise ValueError(
            f"{name} must be symmetric; entries differ from their mirror images by up to {skew:.3g}. If that is "
            f"rounding, pass ({name} + {name}.mT) / 2"
        )
    values, vectors = torch.linalg.eigh(0.5 * (cov + cov.mT))
    least = float(values.min())
    if least < -_POSITIVITY_TOLERANCE * size:
        raise ValueError(f"{name} must be positive semi-definite; its smallest eigenvalue is {least:.6g}")
    # Below this, eigh cannot tell an eigenvalue from 0; as a zero, it keeps what is singular from passing for regular.
    rounding = values.shape[-1] * torch.finfo(values.dtype).eps * values.amax(-1, keepdim=True)
    return torch.where(values > rounding, values, 0.0), vectors


def covariance_form(values: Tensor, vectors: Tensor | None, shape: tuple[int, ...]) -> Tensor:
    """A covariance of a given shape, ``()``, ``state_shape`` or ``(d, d)``, from its spectrum."""
    return values.reshape(shape) if vectors is None else (vectors * values.unsqueeze(-2)) @ vectors.mT


def colour(z: Tensor, values: Tensor, vectors: Tensor | None) -> Tensor:
    """``U sqrt(values) z`` for rows ``z: (rows, d)``: draws from ``N(0, U diag(values) U^T)``.

    Row ``i`` depends on row ``i`` alone, to the bit: a matrix product sums in an order that changes with the number of
    rows, so a sample would depend on the batch it was drawn in. Products and sums of columns do not.
    """
    if vectors is None:
        return z * values.sqrt().to(device=z.device, dtype=z.dtype)
    rows = (vectors * values.sqrt()).mT.to(device=z.device, dtype=z.dtype)
    blocks = []
    for block in z.split(max(1, (1 << 16) // z.shape[1])):  # 2^16 elements: stays in cache over the d passes
        total = torch.zeros_like(block)
        for j, row in enumerate(rows):
            total += block[:, j : j + 1] * row
        blocks.append(total)
    return torch.cat(blocks)
