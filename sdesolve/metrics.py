"""Distances between laws: closed forms for Gaussians, and estimates from samples."""

from __future__ import annotations

import math

import torch
from sdesolve_kernels import Stream, normal
from torch import Tensor

from sdesolve.grids import whole_number
from sdesolve.scores.components import Spectrum, real, spectrum


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


def frechet_distance(features_a: Tensor, features_b: Tensor) -> Tensor:
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

    Raises:
        ValueError: not two matrices with the same number of columns, fewer than two rows, or values that are not
            finite.
    """
    a, b = _samples(features_a, "features_a", 2), _samples(features_b, "features_b", 2)
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1]:
        raise ValueError(
            f"features must be (samples, features) with as many features on both sides, got {tuple(a.shape)} and "
            f"{tuple(b.shape)}; flatten images, or take features of a network"
        )
    return _squared_bures(a.mean(0) - b.mean(0), _sample_spectrum(a), _sample_spectrum(b))


def wasserstein_1d(a: Tensor, b: Tensor, p: float = 2.0) -> Tensor:
    r"""The exact ``p``-Wasserstein distance between two empirical laws on the line; float64.

    ``W_p^p = int_0^1 |F_a^-1(u) - F_b^-1(u)|^p du``: sorted samples are matched, with fractions of points where the
    sample sizes differ (Santambrogio 2015, proposition 2.17).

    Args:
        a: ``(n,)``, or ``(n, columns)`` for one distance per column.
        b: ``(m,)`` or ``(m, columns)``.
        p: order, at least 1.

    Returns:
        0-d, or ``(columns,)``.

    Raises:
        ValueError: empty samples, other or different shapes, ``p < 1``, values that are not finite.
    """
    a, b = _samples(a, "a", 1), _samples(b, "b", 1)
    if a.ndim > 2 or a.shape[1:] != b.shape[1:]:
        raise ValueError(
            f"samples must be (n,) and (m,), or (n, columns) and (m, columns), got {tuple(a.shape)} and "
            f"{tuple(b.shape)}"
        )
    return _quantile_cost(a, b, _order(p)) ** (1.0 / p)


def sliced_wasserstein(a: Tensor, b: Tensor, *, projections: int = 256, p: float = 2.0, seed: int = 0) -> Tensor:
    r"""The sliced ``p``-Wasserstein distance between two samples; 0-d float64.

    ``(E_theta W_p^p(theta^T a, theta^T b))^(1/p)`` over directions ``theta`` uniform on the sphere (Bonneel et al.
    2015), as the average over ``projections`` random ones, each one-dimensional distance exact (`wasserstein_1d`). The
    same seed gives the same directions, so that distances can be compared. As for any distance of samples, two samples
    of one law are not at distance 0.

    Args:
        a: ``(n, *state)``.
        b: ``(m, *state)``.
        projections: number of directions.
        p: order, at least 1.
        seed: of the directions.

    Raises:
        ValueError: empty samples, states of different shapes, ``p < 1``, values that are not finite.
        TypeError: ``projections`` is not an integer.
    """
    a, b = _samples(a, "a", 1), _samples(b, "b", 1)
    if a.shape[1:] != b.shape[1:]:
        raise ValueError(
            f"states of both samples must have one shape, got {tuple(a.shape[1:])} and {tuple(b.shape[1:])}"
        )
    a, b = a.reshape(len(a), -1), b.reshape(len(b), -1)
    count = whole_number(projections, "projections", 1)
    theta = normal(count, a.shape[1], seed=seed, stream=Stream.PROBES, dtype=torch.float64).to(a.device)
    theta = theta / theta.norm(dim=1, keepdim=True)
    return _quantile_cost(a @ theta.mT, b @ theta.mT, _order(p)).mean() ** (1.0 / p)


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


def _samples(x: Tensor, name: str, least: int) -> Tensor:
    """``x`` as float64 on its own device."""
    x = torch.as_tensor(x).detach()
    if x.is_complex():
        raise TypeError(f"{name} must be real, got {x.dtype}")
    if x.ndim == 0 or len(x) < least or x.numel() == 0:
        raise ValueError(
            f"{name} must hold at least {least} sample(s) along its first axis, got shape {tuple(x.shape)}"
        )
    x = x.double()
    if not bool(x.isfinite().all()):
        raise ValueError(f"{name} must be finite, it holds nan or inf")
    return x


def _order(p: float) -> float:
    if not (1.0 <= p < math.inf):
        raise ValueError(f"the order p must be a number of at least 1, got {p}")
    return float(p)


def _quantile_cost(a: Tensor, b: Tensor, p: float) -> Tensor:
    """``int |F_a^-1 - F_b^-1|^p`` along the first axis."""
    n, m = len(a), len(b)
    a, b = a.sort(0).values, b.sort(0).values
    if n == m:
        return (a - b).abs().pow(p).mean(0)
    # Both quantile functions are constant between neighbouring multiples of 1/n and 1/m; in units of 1/(n m) those are
    # integers, so no level is lost or doubled by rounding.
    levels = torch.cat([m * torch.arange(n, device=a.device), n * torch.arange(m, device=a.device)]).unique()
    widths = torch.diff(levels, append=levels.new_tensor([n * m])).double() / (n * m)
    cost = (a[levels // m] - b[levels // n]).abs().pow(p)
    return (widths.reshape(-1, *(1,) * (cost.ndim - 1)) * cost).sum(0)
