"""Gaussian mixtures: multimodal data whose scores are still known exactly."""

from __future__ import annotations

from collections.abc import Callable
from typing import final

import torch
from sdesolve_kernels import Stream, normal, uniform
from sdesolve_kernels.threads import survives_forks
from torch import Tensor

from sdesolve._internal.arguments import real, whole_number
from sdesolve._internal.copies import Copies
from sdesolve.inverse.operators import AbstractOperator
from sdesolve.scores.base import AbstractData
from sdesolve.scores.components import Components, Spectrum, colour, converted, matrix_spectra
from sdesolve.scores.posterior import condition

# Displacements from every mean are (K, batch, d); larger batches go through in blocks of about this many elements. On
# the host, blocks that stay in cache are up to ten times faster (500 components, d = 64: 6 ms against 67 ms for 2^22);
# elsewhere the limit is for memory.
_HOST_ELEMENTS, _DEVICE_ELEMENTS = 1 << 20, 1 << 25

# The component of path i is drawn from word 0 of its sequence; normals start at the next block of four words, so that
# they share none with it.
_NORMALS_OFFSET = 4

_Function = Callable[[Components, Tensor, Tensor, Tensor], Tensor]


@final
class GaussianMixture(AbstractData):
    """``x_0 ~ sum_k w_k N(mean_k, cov_k)``; noised, ``x_t ~ sum_k w_k N(alpha mean_k, alpha^2 cov_k + sigma^2 I)``.

    With responsibilities ``r_k(x)``, the softmax over ``k`` of ``log w_k + log N(x; ...)``, the score is
    ``sum_k r_k score_k(x)`` and the denoiser ``sum_k r_k E_k[x_0 | x]``, each term that of a `Gaussian`. Sums are
    taken on a log scale, so nothing underflows far from all modes.

    Args:
        means: ``(K, *state)``.
        stds: standard deviations: a number, ``(K,)`` for one per component, or ``(K, *state)``. 0 is allowed: point
            masses, such as the empirical law of a data set.
        weights: ``(K,)``, positive, normalised here; equal by default.
        covs: instead of ``stds``, ``(K, d, d)`` covariances over the flattened state, positive semi-definite.

    Raises:
        ValueError: shapes that do not fit, negative standard deviations, weights that are not positive, covariances
            that are not symmetric positive semi-definite, both or neither of ``stds`` and ``covs``, values that are not
            finite.
        TypeError: complex numbers.

    Example:
        >>> data = GaussianMixture(torch.tensor([[-2.0, 0.0], [2.0, 0.0]]), 0.3, weights=torch.tensor([1.0, 3.0]))
    """

    def __init__(
        self,
        means: Tensor,
        stds: Tensor | float | None = None,
        weights: Tensor | None = None,
        *,
        covs: Tensor | None = None,
    ) -> None:
        self.means = real(means, "means")
        if self.means.ndim == 0 or self.means.numel() == 0:
            raise ValueError(
                f"means must have shape (K, *state), at least one component and one element; got "
                f"{tuple(self.means.shape)}"
            )
        self.state_shape = tuple(self.means.shape[1:])
        self.weights = _weights(weights, len(self.means))
        self._spectra = _spectra(stds, covs, self.means)
        values, vectors = self._spectra
        self._constants = Copies(
            Components(
                self.means.flatten(1)[:, None] if self.state_shape else self.means[:, None, None],
                values[:, None],
                vectors,
                self.weights.log()[:, None],
            ),
            converted,
        )

    @property
    def covs(self) -> Tensor:
        """Covariances of the components over the flattened state, ``(K, d, d)``, float64."""
        values, vectors = self._spectra
        d = self.means[0].numel()
        scaled = values.expand(len(self.means), d)
        return torch.diag_embed(scaled) if vectors is None else vectors @ (scaled.unsqueeze(-1) * vectors.mT)

    @property
    def has_density(self) -> bool:
        return bool((self._spectra.values > 0).all())

    def noised_log_prob(self, x: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        return self._by_rows(_log_prob, x, alpha, sigma)

    def noised_score(self, x: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        return self._by_rows(_score, x, alpha, sigma)

    def posterior_mean(self, x: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        return self._by_rows(_posterior_mean, x, alpha, sigma)

    @survives_forks
    def sample(
        self,
        n: int,
        *,
        seed: int,
        first_path: int = 0,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> Tensor:
        n, d = whole_number(n, "n", 0), self.means[0].numel()
        u = uniform(n, 1, seed=seed, stream=Stream.DATA, first_path=first_path, dtype=torch.float64, device="cpu")
        k = torch.searchsorted(self.weights.cumsum(0), u[:, 0], right=True).clamp(max=len(self.means) - 1)
        z = normal(
            n,
            d,
            seed=seed,
            stream=Stream.DATA,
            first_path=first_path,
            offset=_NORMALS_OFFSET,
            dtype=dtype,
            device=device,
        )
        k = k.to(z.device)
        c, (values, vectors) = self._constants.like(z), self._spectra
        if vectors is None:
            x = c.mean[k, 0] + c.values[k, 0].sqrt() * z
        else:
            x = c.mean[k, 0]
            for component in k.unique().tolist():
                rows = (k == component).nonzero()[:, 0]
                x[rows] += colour(z[rows], values[component], vectors[component])
        return x.reshape(n, *self.state_shape)

    def condition(self, operator: AbstractOperator | Tensor, y: Tensor, noise_std: float) -> GaussianMixture:
        """The law of ``x_0`` given ``y = A x_0 + noise_std z``: that of each component, weighted by its evidence.

        Components whose weight vanishes in float64 are left out.

        Args:
            operator: ``A``, of `sdesolve.operators`, or a matrix ``(m, d)`` over the flattened state.
            y: one observation, ``(*observation)``.
            noise_std: standard deviation of its noise; positive unless ``A x_0`` has a density in every component.

        Raises:
            ValueError: shapes that do not fit, negative noise, values that are not finite; no noise and a component for
                which ``A x_0`` has no density.
            TypeError: ``operator`` is neither an operator nor a matrix.
        """
        given = condition(self.means.reshape(len(self.means), -1), self.covs, operator, y, noise_std, self.state_shape)
        if not bool(given.regular.all()):
            raise ValueError(
                f"component {int((~given.regular).nonzero()[0])} does not give A x_0 a density, so that weights cannot "
                "be compared; give a positive noise_std"
            )
        weights = (self.weights.log() + given.log_evidence).softmax(0)
        kept = weights > 0
        return GaussianMixture(
            given.mean[kept].reshape(-1, *self.state_shape), weights=weights[kept], covs=given.cov[kept]
        )

    def _by_rows(self, function: _Function, x: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        limit = _HOST_ELEMENTS if x.device.type == "cpu" else _DEVICE_ELEMENTS
        c, rows = self._constants.like(x), max(1, limit // self.means.numel())
        if len(x) <= rows:
            return function(c, x, alpha, sigma)
        parts = [slice(k, k + rows) for k in range(0, len(x), rows)]
        if alpha.ndim == 0:
            return torch.cat([function(c, x[part], alpha, sigma) for part in parts])
        return torch.cat([function(c, x[part], alpha[part], sigma[part]) for part in parts])


def _log_prob(c: Components, x: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    return _log_joint(c, c.displacement(x, alpha), c.variances(alpha, sigma)).logsumexp(0)


def _score(c: Components, x: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    y, v = c.displacement(x, alpha), c.variances(alpha, sigma)
    responsibility = _log_joint(c, y, v).softmax(0).unsqueeze(-1)
    return -(responsibility * c.from_eigenbasis(y / v)).sum(0)


def _posterior_mean(c: Components, x: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    y, v = c.displacement(x, alpha), c.variances(alpha, sigma)
    responsibility = _log_joint(c, y, v).softmax(0).unsqueeze(-1)
    return (responsibility * (c.mean + c.from_eigenbasis(c.posterior_gain(alpha, v) * y))).sum(0)


def _log_joint(c: Components, y: Tensor, v: Tensor) -> Tensor:
    """``log w_k + log N(x; ...)``, ``(K, batch)``."""
    return c.log_weights + c.log_density(y, v)


def _weights(weights: Tensor | None, components: int) -> Tensor:
    if weights is None:
        return torch.full((components,), 1.0 / components, dtype=torch.float64)
    w = real(weights, "weights")
    if w.shape != (components,):
        raise ValueError(f"weights must have shape ({components},), one per component, got {tuple(w.shape)}")
    if not bool((w > 0).all()):
        raise ValueError(f"weights must be positive, got {w.tolist()}; leave out components that have none")
    return w / w.sum()


def _spectra(stds: Tensor | float | None, covs: Tensor | None, means: Tensor) -> Spectrum:
    """Eigenvalues ``(K, 1)`` or ``(K, d)``, and vectors if there are any."""
    if (stds is None) == (covs is None):
        raise ValueError("give stds (standard deviations) or covs (covariance matrices), exactly one of them")
    K, d = len(means), means[0].numel()
    if covs is not None:
        covs = real(covs, "covs")
        if covs.shape != (K, d, d):
            raise ValueError(
                f"covs must have shape ({K}, {d}, {d}): one matrix over the flattened state for each component; got "
                f"{tuple(covs.shape)}"
            )
        return matrix_spectra(covs)
    stds = real(stds, "stds")
    if stds.ndim != 0 and stds.shape not in ((K,), means.shape):
        raise ValueError(
            f"stds must be a number, ({K},) or {tuple(means.shape)}, got shape {tuple(stds.shape)}; for covariance "
            "matrices use covs="
        )
    if bool((stds < 0).any()):
        raise ValueError(f"stds are standard deviations, which cannot be negative; the smallest is {float(stds.min())}")
    return Spectrum(stds.square().expand(K)[:, None] if stds.ndim == 0 else stds.square().reshape(K, -1), None)
