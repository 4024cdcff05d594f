"""Discrepancies that are means of a kernel over pairs of samples: estimates without bias, and their intervals."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from sdesolve_kernels.threads import survives_forks
from torch import Tensor

from sdesolve._internal.arguments import number, short, whole_number
from sdesolve.metrics.samples import Features, Samples, flat_pair

_BLOCK_ELEMENTS = 1 << 22
_MEDIAN_ROWS = 1000


class Estimate(NamedTuple):
    """An estimate and its confidence interval; 0-d float64.

    Attributes:
        value: the estimate, without bias; may be negative where the truth is near 0.
        std_error: its standard error.
        low: lower end of the interval.
        high: upper end.
    """

    value: Tensor
    std_error: Tensor
    low: Tensor
    high: Tensor


@survives_forks
def squared_mmd(
    a: Samples,
    b: Samples,
    *,
    bandwidth: float | None = None,
    degree: int | None = None,
    confidence: float = 0.95,
    features: Features | None = None,
    batch_size: int = 256,
) -> Estimate:
    r"""The squared maximum mean discrepancy for ``k(x, y) = exp(-|x - y|^2 / (2 bandwidth^2))``.

    With ``degree=3`` the kernel is ``(x . y / d + 1)^3``, and that of features of Inception's network the kernel
    inception distance (Binkowski et al. 2018).

    ``E k(X, X') + E k(Y, Y') - 2 E k(X, Y)`` with each mean over pairs of different samples (Gretton et al. 2012,
    lemma 6). The standard error is the jackknife's over both samples (Arvesen 1969), whose expectation is never too
    small (Efron and Stein 1981); where both laws are one the estimate is a degenerate U-statistic, and the jackknife
    variance is about twice the true one. The interval is that of a score test: it holds what the estimate is compatible
    with, by the standard deviation that each value would give it, and reaches further up than down. An interval that
    holds 0 tells no difference: that is the floor. Time ``O((n + m)^2)``, memory in blocks.

    Args:
        a: ``(n, *state)``, at least two samples.
        b: ``(m, *state)``.
        bandwidth: of the kernel. By default the median distance within the pooled sample (at most 500 evenly
            spaced rows of each); give a number to compare several pairs.
        degree: of a polynomial kernel, in place of the Gaussian one.
        confidence: of the interval.
        features: of a batch of samples, ``(batch, ...)``, to compare in place of the samples: a network such as
            Inception's, in evaluation mode here. Samples may then come in batches: a list, or a loader.
        batch_size: samples that features are made of at once.

    Raises:
        ValueError: fewer than two samples, states of different shapes, values that are not finite, a bandwidth that is
            not positive, a bandwidth and a degree, a confidence outside ``(0, 1)``.
    """
    a, b = flat_pair(a, b, 2, features, batch_size)
    if degree is not None:
        if bandwidth is not None:
            raise ValueError("bandwidth is of the Gaussian kernel and degree of the polynomial one: give one of them")
        power = whole_number(degree, "degree", 1)

        def polynomial(x: Tensor, y: Tensor) -> Tensor:
            return (x @ y.mT / x.shape[1] + 1.0) ** power

        return _discrepancy(polynomial, lambda x: (x.square().sum(1) / x.shape[1] + 1.0) ** power, a, b, confidence)
    h = _median_distance(a, b) if bandwidth is None else number(bandwidth, "bandwidth")
    if not 0.0 < h < math.inf:
        raise ValueError(f"bandwidth must be positive and finite, got {short(h)}; if all samples are equal, give one")

    def kernel(x: Tensor, y: Tensor) -> Tensor:
        return torch.exp(-0.5 * (torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist") / h).square())

    return _discrepancy(kernel, lambda x: x.new_ones(()), a, b, confidence)


@survives_forks
def energy_distance(
    a: Samples, b: Samples, *, confidence: float = 0.95, features: Features | None = None, batch_size: int = 256
) -> Estimate:
    r"""The energy distance ``2 E|X - Y| - E|X - X'| - E|Y - Y'|`` (Szekely and Rizzo 2013, eq. 1).

    Zero only for equal laws; on the line it is ``2 int (F - G)^2``. Means over pairs of different samples, so without
    bias; standard error and interval as for `squared_mmd`.

    Args:
        a: ``(n, *state)``, at least two samples.
        b: ``(m, *state)``.
        confidence: of the interval.
        features: of a batch of samples, ``(batch, ...)``, to compare in place of the samples: a network such as
            Inception's, in evaluation mode here. Samples may then come in batches: a list, or a loader.
        batch_size: samples that features are made of at once.

    Raises:
        ValueError: as `squared_mmd`.
    """
    a, b = flat_pair(a, b, 2, features, batch_size)

    def kernel(x: Tensor, y: Tensor) -> Tensor:
        return -torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist")

    return _discrepancy(kernel, lambda x: x.new_zeros(()), a, b, confidence)


def _discrepancy(
    kernel: Callable[[Tensor, Tensor], Tensor], own: Callable[[Tensor], Tensor], a: Tensor, b: Tensor, confidence: float
) -> Estimate:
    """From a kernel of two samples, and what it is of each row and itself."""
    if not 0.0 < number(confidence, "confidence") < 1.0:
        raise ValueError(f"confidence must lie between 0 and 1, got {short(confidence)}")
    n, m = len(a), len(b)
    aa, bb = _row_sums(kernel, a, a), _row_sums(kernel, b, b)
    # Of the embeddings' difference and its covariance S: |D + noise|^2, of expectation |D|^2 + tr S, and tr S^2.
    ab, ba = _row_sums(kernel, a, b), _row_sums(kernel, b, a)
    biased = aa.sum() / n**2 + bb.sum() / m**2 - 2.0 * ab.sum() / (n * m)
    traced = (
        _squared_covariance(kernel, a, a, aa, aa) / n**2
        + _squared_covariance(kernel, b, b, bb, bb) / m**2
        + 2.0 * _squared_covariance(kernel, a, b, ab, ba) / (n * m)
    )
    aa, bb = aa - own(a), bb - own(b)
    value = aa.sum() / (n * (n - 1)) + bb.sum() / (m * (m - 1)) - 2.0 * ab.sum() / (n * m)
    variance = _jackknife(aa, ab, n, m) + _jackknife(bb, ba, m, n)
    low, high = _interval(value, variance, biased, traced, min(n, m), confidence)
    return Estimate(value, variance.sqrt(), low, high)


def _interval(
    value: Tensor, variance: Tensor, biased: Tensor, traced: Tensor, n: int, confidence: float
) -> tuple[Tensor, Tensor]:
    """All ``theta`` that are within ``z`` of their own standard deviations of ``value``.

    The variance of the estimate is ``4 <D, S D> + 2 tr S^2`` with ``theta = |D|^2``: it grows with ``theta``, so that
    the deviation at the estimate is too small for larger ones. ``<D, S D> / |D|^2`` is the jackknife's for the ``D``
    that was seen, and of what in it is noise no more than the largest eigenvalue of ``S``.
    """
    from scipy.special import chdtri, stdtrit  # not with the package: importing scipy takes longer than the rest

    z = float(stdtrit(n - 1, 0.5 + 0.5 * confidence))
    # The part of no direction is a sum of squares: its upper quantiles are, at most, those of chi^2 of one degree.
    skew = (float(chdtri(1, 0.5 - 0.5 * confidence)) - 1.0) / (z * math.sqrt(2.0))
    seen = biased.clamp(min=torch.finfo(biased.dtype).tiny)
    slope, noise = variance / (4.0 * seen), ((biased - value) / seen).clamp(0.0, 1.0)
    slope = slope + noise * (traced.sqrt() - slope).clamp(min=0.0)
    a, least = 2.0 * slope * z**2, (2.0 * traced).sqrt() * z  # a negative value has no variance but that of noise
    down, up = max(skew, 1.0) * least, least
    low = torch.where(value <= down, value - down, value + a - (a * (a + 2.0 * value) + down**2).clamp(min=0.0).sqrt())
    high = torch.where(value <= -up, value + up, value + a + (a * (a + 2.0 * value) + up**2).clamp(min=0.0).sqrt())
    return low, high


def _squared_covariance(
    kernel: Callable[[Tensor, Tensor], Tensor], a: Tensor, b: Tensor, rows: Tensor, columns: Tensor
) -> Tensor:
    """``tr S_a S_b``: the mean square of the kernel centred over both samples, whose row sums are given."""
    total, blocks = rows.sum() / (len(a) * len(b)), max(1, _BLOCK_ELEMENTS // len(b))
    squares = [
        (kernel(part, b) - sums[:, None] / len(b) - columns / len(a) + total).square().sum()
        for part, sums in zip(a.split(blocks), rows.split(blocks), strict=True)
    ]
    return torch.stack(squares).sum() / (len(a) * len(b))


def _jackknife(within: Tensor, across: Tensor, n: int, m: int) -> Tensor:
    """Variance from leaving out one sample of ``n`` at a time: ``(n - 1)/n sum_i (theta_i - mean)^2``."""
    if n == 2:  # without one of two there is no pair left; the first-order (Hajek) term instead
        projection = 2.0 * within / (n - 1) - 2.0 * across / m
        return (projection - projection.mean()).square().sum() / (n * (n - 1))
    left = (within.sum() - 2.0 * within) / ((n - 1) * (n - 2)) - 2.0 * (across.sum() - across) / ((n - 1) * m)
    return (n - 1) / n * (left - left.mean()).square().sum()


def _row_sums(kernel: Callable[[Tensor, Tensor], Tensor], a: Tensor, b: Tensor) -> Tensor:
    rows = max(1, _BLOCK_ELEMENTS // len(b))
    return torch.cat([kernel(part, b).sum(1) for part in a.split(rows)])


def _median_distance(a: Tensor, b: Tensor) -> float:
    x = torch.cat([part[:: -(-len(part) // (_MEDIAN_ROWS // 2))] for part in (a, b)])
    return float(torch.pdist(x).median())
