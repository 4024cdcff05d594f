"""Distances between normal laws, and between samples by way of the normal laws fitted to them."""

from __future__ import annotations

import torch
from sdesolve_kernels.threads import survives_forks
from torch import Tensor

from sdesolve._internal.arguments import real
from sdesolve.metrics.samples import Features, Samples, featured, samples
from sdesolve.scores.components import Spectrum, spectrum


@survives_forks
def bures_wasserstein(
    mean0: Tensor | float, cov0: Tensor | float, mean1: Tensor | float, cov1: Tensor | float
) -> Tensor:
    r"""The 2-Wasserstein distance between ``N(mean0, cov0)`` and ``N(mean1, cov1)``, not squared; 0-d float64.

    ``W^2 = |mean0 - mean1|^2 + tr(C0 + C1 - 2 (C0^(1/2) C1 C0^(1/2))^(1/2))`` (Gelbrich 1990, theorem 2.1). Computed as
    ``|mean0 - mean1|^2 + min_Q |A0 - A1 Q|^2`` over orthogonal ``Q``, for factors with ``A A^T = C`` (Bhatia, Jain and
    Lim 2019, theorem 1): the trace formula loses all distances below 1e-8 of the laws' size to cancellation, this one
    keeps them down to about 1e-14 of it, unless a covariance is singular.

    Args:
        mean0: ``(*state)``.
        cov0: a number, variances ``(*state)``, or ``(d, d)`` over the flattened state; may be singular.
        mean1: ``(*state)``.
        cov1: in any of the three forms, not necessarily that of ``cov0``.

    Raises:
        ValueError: means of different shapes, or a covariance that is not one for its mean (`Gaussian`).
    """
    return _squared_bures(*_pair(mean0, cov0, mean1, cov1)).sqrt()


@survives_forks
def gaussian_kl(mean0: Tensor | float, cov0: Tensor | float, mean1: Tensor | float, cov1: Tensor | float) -> Tensor:
    r"""The divergence ``KL(N(mean0, cov0) || N(mean1, cov1))`` in nats; 0-d float64.

    ``(|C1^(-1/2) (mean0 - mean1)|^2 + sum_i (l_i - 1 - log l_i)) / 2`` with ``l_i`` the eigenvalues of
    ``C1^(-1/2) C0 C1^(-1/2)`` (Kullback 1959, chapter 9). ``inf`` if ``cov0`` is singular.

    Args:
        mean0: ``(*state)``.
        cov0: a number, variances ``(*state)``, or ``(d, d)`` over the flattened state.
        mean1: ``(*state)``.
        cov1: likewise; not singular.

    Raises:
        ValueError: as `bures_wasserstein`; ``cov1`` is singular.
    """
    shift, s0, s1 = _pair(mean0, cov0, mean1, cov1)
    if not bool((s1.values > 0).all()):
        raise ValueError("cov1 is singular, so that N(mean1, cov1) has no density; add a small variance to it")
    if s0.vectors is None and s1.vectors is None:
        shift, ratios = shift / s1.values.sqrt(), (s0.values / s1.values).expand(shift.shape)
    else:
        whiten = _factor(s1, len(shift), power=-0.5)
        shift = whiten.mT @ shift
        # Squared singular values of C1^(-1/2) A0 are more accurate than eigenvalues of the product near singularity.
        ratios = torch.linalg.svdvals(whiten.mT @ _factor(s0, len(shift))).square()
    excess = ratios - 1.0
    return 0.5 * (shift.square().sum() + (excess - torch.log1p(excess)).sum())


@survives_forks
def frechet_distance(
    features_a: Samples, features_b: Samples, *, features: Features | None = None, batch_size: int = 256
) -> Tensor:
    r"""The Frechet distance of two sets of feature vectors, squared as is the custom for FID; 0-d float64.

    ``|m_a - m_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2))`` with sample means and unbiased sample covariances (Heusel
    et al. 2017, eq. 6; Dowson and Landau 1982): the squared `bures_wasserstein` distance of the fitted Gaussians.
    Everything is float64 and symmetric eigendecompositions, so fewer samples than features are no trouble.

    Finite samples bias it upwards: for two samples of the same law the expectation is positive and falls like ``1 / n``
    (the means alone give ``tr(C) (1 / n_a + 1 / n_b)``), so compare only distances from equal sample sizes, and quote
    the distance between two real samples of those sizes beside it (Binkowski et al. 2018; Chong and Forsyth 2020).

    Args:
        features_a: ``(n_a, features)``, at least two rows.
        features_b: ``(n_b, features)``.
        features: of a batch of samples, ``(batch, ...)``, to compare in place of the samples: a network such as
            Inception's, in evaluation mode here. Samples may then come in batches: a list, or a loader.
        batch_size: samples that features are made of at once.

    Raises:
        ValueError: not two matrices with the same number of columns, fewer than two rows, or values that are not
            finite.

    Example:
        >>> frechet_distance(loader, drawn, features=inception)  # inception: (batch, 3, 299, 299) to (batch, 2048)
    """
    a = samples(featured(features_a, "features_a", features, batch_size), "features_a", 2)
    b = samples(featured(features_b, "features_b", features, batch_size), "features_b", 2)
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1]:
        raise ValueError(
            f"features must be (samples, features) with as many features on both sides, got {tuple(a.shape)} and "
            f"{tuple(b.shape)}; flatten images, or take features=network"
        )
    return _squared_bures(a.mean(0) - b.mean(0), _sample_spectrum(a), _sample_spectrum(b))


def _pair(
    mean0: Tensor | float, cov0: Tensor | float, mean1: Tensor | float, cov1: Tensor | float
) -> tuple[Tensor, Spectrum, Spectrum]:
    """Difference of the means, flattened, and both spectra."""
    m0, m1 = real(mean0, "mean0"), real(mean1, "mean1")
    if m0.shape != m1.shape:
        raise ValueError(f"both means must have one shape, got {tuple(m0.shape)} and {tuple(m1.shape)}")
    shape = tuple(m0.shape)
    return (
        (m0 - m1).reshape(-1),
        spectrum(real(cov0, "cov0"), shape, "cov0"),
        spectrum(real(cov1, "cov1"), shape, "cov1"),
    )


def _squared_bures(shift: Tensor, s0: Spectrum, s1: Spectrum) -> Tensor:
    d = len(shift)
    if s0.vectors is None and s1.vectors is None:
        return shift.square().sum() + (s0.values.sqrt() - s1.values.sqrt()).expand(d).square().sum()
    a0, a1 = _factor(s0, d), _factor(s1, d)
    # The orthogonal matrix nearest to A1^T A0 is the best Q (the Procrustes problem).
    u, _, vh = torch.linalg.svd(a1.mT @ a0)
    return shift.square().sum() + (a0 - a1 @ (u @ vh)).square().sum()


def _factor(s: Spectrum, d: int, power: float = 0.5) -> Tensor:
    """``U diag(values^power)``, ``(d, d)``."""
    scale = s.values**power
    return torch.diag(scale.expand(d)) if s.vectors is None else s.vectors * scale


def _sample_spectrum(x: Tensor) -> Spectrum:
    d = x.shape[1]
    return spectrum(x.mT.cov(correction=1).reshape(d, d), (d,))
