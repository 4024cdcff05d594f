"""Transport distances between samples."""

from __future__ import annotations

import math

import torch
from sdesolve_kernels import Stream, normal
from sdesolve_kernels.threads import survives_forks
from torch import Tensor

from sdesolve._internal.arguments import number, short, whole_number
from sdesolve.metrics.samples import flat_pair, samples


@survives_forks
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
    a, b = samples(a, "a", 1), samples(b, "b", 1)
    if a.ndim > 2 or a.shape[1:] != b.shape[1:]:
        raise ValueError(
            f"samples must be (n,) and (m,), or (n, columns) and (m, columns), got {tuple(a.shape)} and "
            f"{tuple(b.shape)}"
        )
    return _quantile_cost(a, b, _order(p)) ** (1.0 / p)


@survives_forks
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
    a, b = flat_pair(a, b, 1)
    count = whole_number(projections, "projections", 1)
    theta = normal(count, a.shape[1], seed=seed, stream=Stream.PROBES, dtype=torch.float64).to(a.device)
    theta = theta / theta.norm(dim=1, keepdim=True)
    return _quantile_cost(a @ theta.mT, b @ theta.mT, _order(p)).mean() ** (1.0 / p)


def _order(p: float) -> float:
    if not (1.0 <= number(p, "p") < math.inf):
        raise ValueError(f"the order p must be a number of at least 1, got {short(p)}")
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
