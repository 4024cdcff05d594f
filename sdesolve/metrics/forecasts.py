"""Scores of ensemble forecasts: how good the law is that members are drawn from, judged by what was observed."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sdesolve._internal.arguments import flag, kind_of


def crps(members: Tensor, y: Tensor, *, fair: bool = True) -> Tensor:
    r"""Continuous ranked probability score ``E|X - y| - E|X - X'| / 2`` of each number, of the shape of ``y``.

    In the units of the data; 0 is perfect, and for one member it is the absolute error. Gneiting and Raftery 2007, eq.
    21. With ``fair`` pairs of different members alone are averaged, so that the expectation is that of an infinite
    ensemble (Ferro 2014); otherwise it is the score of the ensemble as it is.

    Args:
        members: ``(members, *shape)``.
        y: what was observed, ``(*shape)``.
        fair: see above; needs two members.

    Raises:
        ValueError: shapes that do not fit; too few members; values that are not finite.
        TypeError: no floating-point tensors.
    """
    m = _checked(members, y, 2 if flag(fair, "fair") else 1)
    x = members.double().sort(0).values
    rank = torch.arange(m, dtype=torch.float64, device=x.device).reshape(m, *(1,) * y.ndim)
    pairs = 2.0 * ((2.0 * rank - m + 1.0) * x).sum(0)  # of |x_i - x_j| over all i, j
    return (x - y.double()).abs().mean(0) - 0.5 * pairs / (m * (m - 1 if fair else m))


def energy_score(members: Tensor, y: Tensor, *, fair: bool = True) -> Tensor:
    """``E|X - y| - E|X - X'| / 2`` with norms of whole states, ``(batch,)``: `crps` of vectors, correlations included.

    Gneiting and Raftery 2007, eq. 22.

    Args:
        members: ``(members, batch, *state)``.
        y: what was observed, ``(batch, *state)``.
        fair: as for `crps`.

    Raises:
        ValueError, TypeError: as `crps`.
    """
    m = _checked(members, y, 2 if flag(fair, "fair") else 1)
    if y.ndim == 0:
        raise ValueError("y must have a batch axis, (batch, *state), got a single number")
    x, v = members.double().reshape(m, len(y), -1).movedim(0, 1), y.double().reshape(len(y), 1, -1)
    error = (x - v).norm(dim=2).mean(1)
    pairs = torch.stack([torch.cdist(row, row, compute_mode="donot_use_mm_for_euclid_dist").sum() for row in x])
    return error - 0.5 * pairs / (m * (m - 1 if fair else m))


def rank_histogram(members: Tensor, y: Tensor, *, seed: int = 0) -> Tensor:
    """How often the observation lies at each rank among the members: counts ``(members + 1,)``, int64.

    Flat where forecasts are reliable, hollow where members spread too much, and high at the ends where they spread too
    little (Hamill 2001). Ties are broken at random.

    Args:
        members: ``(members, *shape)``.
        y: what was observed, ``(*shape)``.
        seed: of ties.

    Raises:
        ValueError, TypeError: as `crps`.
    """
    m = _checked(members, y, 1)
    below, ties = (members < y).sum(0), (members == y).sum(0)
    u = torch.rand(y.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(y.device)
    rank = below + (u * (ties + 1)).long().clamp(max=ties)
    return torch.bincount(rank.flatten(), minlength=m + 1)


def spread_skill(members: Tensor, y: Tensor) -> float:
    """Spread over error: ``sqrt((m + 1) / m mean variance) / rms error of the mean``; 1 where forecasts are reliable.

    Below 1 members spread too little. Fortin et al. 2014, eq. 15.

    Args:
        members: ``(members, *shape)``, at least two.
        y: what was observed, ``(*shape)``.

    Raises:
        ValueError, TypeError: as `crps`.
    """
    m = _checked(members, y, 2)
    x = members.double()
    error = float((x.mean(0) - y.double()).square().mean().sqrt())
    spread = math.sqrt((m + 1) / m * float(x.var(0).mean()))
    return spread / error if error else math.inf


def _checked(members: Tensor, y: Tensor, least: int) -> int:
    for name, value in (("members", members), ("y", y)):
        if not isinstance(value, Tensor) or not value.is_floating_point():
            got = value.dtype if isinstance(value, Tensor) else kind_of(value)
            raise TypeError(f"{name} must be a floating-point tensor, got {got}")
        if not bool(value.isfinite().all()):
            raise ValueError(f"{name} must be finite, it holds nan or inf")
    if members.shape[1:] != y.shape or members.ndim == 0:
        raise ValueError(
            f"members must be (members, *shape) for observations y of one shape, got {tuple(members.shape)} and "
            f"{tuple(y.shape)}"
        )
    if len(members) < least or not y.numel():
        raise ValueError(f"there must be observations and at least {least} member(s), got {len(members)}")
    return len(members)
