"""Counts from uniform numbers: quantiles of Poisson and binomial laws, to the last of 64 bits.

A law is inverted, so that one number makes one count, and a larger one never a smaller count. The number is 64 bits,
given by the nearer of its two tails, so that chances down to 2^-65 are those of the law: the value of a quantile is
wrong only where the number is within rounding of a step of the distribution function.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["LARGEST_MEAN", "Tail", "binomial", "poisson", "tail"]

LARGEST_MEAN = 1e10
_SEARCHED, _SURE = 10.0, 1e-3  # means below which values are added up one by one; chances that a sum of them resolves
_REACH = 9.4  # standard deviations of a normal law beyond which 2^-65 lies, and a little more
_ELEMENTS = 1 << 22


class Tail(NamedTuple):
    """A uniform number in (0, 1), as the chance of what lies on its nearer side.

    Attributes:
        chance: float64, at most 1/2: of the number itself, or of what is above it.
        upper: whether it is of what is above.
    """

    chance: Tensor
    upper: Tensor

    @property
    def value(self) -> Tensor:
        """The numbers themselves, rounded."""
        return torch.where(self.upper, 1.0 - self.chance, self.chance)

    def at(self, index: Tensor) -> Tail:
        """These of the numbers, of one axis."""
        return Tail(self.chance[index], self.upper[index])


def tail(high: Tensor, low: Tensor) -> Tail:
    """The number ``(2^32 high + low + 1/2) 2^-64``, from two words of the generator."""
    upper = high >= 1 << 31
    high, low = (torch.where(upper, (1 << 32) - 1 - w, w).double() for w in (high, low))
    return Tail((high * 2.0**32 + (low + 0.5)) * 2.0**-64, upper)


def poisson(u: Tail, mean: Tensor) -> Tensor:
    """The least ``k`` with ``P(X <= k) >= u`` for ``X`` of a Poisson law.

    Values are added up for means below 10. Above, ``k`` is the whole part of the expansion

        mean + sqrt(mean) w + (w^2 + 2)/6 - (w^3 + 2 w)/(72 sqrt(mean)) + (3 w^4 + 7 w^2 - 16)/(810 mean)

    in the normal quantile ``w`` of ``u``, wherever it is farther from a whole number than its error can be. Giles 2016,
    "Approximation of the inverse Poisson cumulative distribution function", ACM Transactions on Mathematical Software
    42. Everywhere else chances are added up from both ends of the law.

    Args:
        u: any shape.
        mean: float64, of that shape, in [0, 1e10].
    """
    shape = mean.shape
    u, mean = Tail(u.chance.reshape(-1), u.upper.reshape(-1)), mean.reshape(-1)
    k, found = torch.zeros_like(mean), mean == 0
    small = (mean < _SEARCHED) & (~u.upper | (u.chance >= _SURE)) & ~found
    if bool(small.any()):
        rows = small.nonzero().squeeze(1)
        k[rows], found[rows] = _added(u.at(rows), mean[rows]), True
    large = (mean >= _SEARCHED) & ~found
    if bool(large.any()):
        rows = large.nonzero().squeeze(1)
        k[rows], found[rows] = _expanded(u.at(rows), mean[rows])
    if not bool(found.all()):
        rows = (~found).nonzero().squeeze(1)
        k[rows] = _summed_poisson(u.at(rows), mean[rows])
    return k.reshape(shape)


def binomial(u: Tail, trials: Tensor, p: float | Tensor = 0.5) -> Tensor:
    """The least ``k`` with ``P(X <= k) >= u`` for ``X`` successes in ``trials``, each of chance ``p`` in (0, 1).

    Args:
        u: any shape.
        trials: float64, of that shape, whole numbers.
        p: one for all, or of that shape.
    """
    shape, n = trials.shape, trials.reshape(-1)
    chance = torch.as_tensor(p, dtype=torch.float64, device=n.device).expand(shape).reshape(-1)
    u = Tail(u.chance.reshape(-1), u.upper.reshape(-1))
    spread = (n * chance * (1 - chance)).sqrt()
    mode = ((n + 1) * chance).floor().minimum(n)

    def ratio(k: Tensor, rows: Tensor) -> Tensor:
        """``P(k + 1) / P(k)``."""
        q = chance[rows, None]
        return ((n[rows, None] - k) / (k + 1) * (q / (1 - q))).clamp_min(0.0)

    return _summed(u, mode, spread, ratio).minimum(n).reshape(shape)


def _added(u: Tail, mean: Tensor) -> Tensor:
    """Values from 0 on, added up until there are enough."""
    goal = u.value
    k, term = torch.zeros_like(mean), (-mean).exp()
    total, i = term.clone(), 0
    while bool((short := total < goal).any()):
        i += 1
        term = term * (mean / i)
        k, total = k + short, total + term
        if i > 200:
            break
    return k


def _expanded(u: Tail, mean: Tensor) -> tuple[Tensor, Tensor]:
    """The expansion, rounded down, and where that is certain."""
    w = torch.special.ndtri(u.chance)
    w = torch.where(u.upper, -w, w)
    root, square = mean.sqrt(), w * w
    x = mean + root * w + (square + 2.0) / 6.0 - w * (square + 2.0) / (72.0 * root)
    x = x + ((3.0 * square + 7.0) * square - 16.0) / (810.0 * mean)
    error = (0.05 + square * (0.02 + square * (0.01 + 0.02 * w.abs()))) / (mean * root) + 2.0**-50 * x.abs()
    k = (x - error).floor()
    certain = (k == (x + error).floor()) & (square < 0.5 * mean)
    return k.clamp_min(0.0), certain | (mean >= LARGEST_MEAN)


def _summed_poisson(u: Tail, mean: Tensor) -> Tensor:
    def ratio(k: Tensor, rows: Tensor) -> Tensor:
        return mean[rows, None] / (k + 1)

    return _summed(u, mean.floor(), mean.sqrt(), ratio)


def _summed(u: Tail, mode: Tensor, spread: Tensor, ratio) -> Tensor:  # type: ignore[no-untyped-def]
    """Quantiles from all chances beside the mode, relative to that of the mode, added up from the ends inwards."""
    k = torch.empty_like(mode)
    reach = (_REACH * spread + 50.0).ceil()
    order = reach.argsort()
    first = 0
    while first < len(order):
        width = int(reach[order[first]])
        count = max(1, _ELEMENTS // (2 * width + 1))
        rows = order[first : first + count]
        width = int(reach[rows].max())
        if len(rows) * (2 * width + 1) > 2 * _ELEMENTS:  # the widest are taken apart
            rows = rows[: max(1, _ELEMENTS // (2 * width + 1))]
            width = int(reach[rows].max())
        first += len(rows)
        k[rows] = _window(u.at(rows), mode[rows], width, rows, ratio)
    return k


def _window(u: Tail, mode: Tensor, width: int, rows: Tensor, ratio) -> Tensor:  # type: ignore[no-untyped-def]
    steps = torch.arange(width, dtype=torch.float64, device=mode.device)
    upwards = ratio(mode[:, None] + steps, rows).cumprod(1)
    below = mode[:, None] - 1.0 - steps
    downwards = torch.where(below >= 0, 1.0 / ratio(below.clamp_min(0.0), rows), 0.0).cumprod(1)
    chances = torch.cat([downwards.flip(1), torch.ones_like(mode)[:, None], upwards], 1)
    under, over = chances.cumsum(1), chances.flip(1).cumsum(1)
    goal = (u.chance * under[:, -1])[:, None]
    # Below: values whose sums fall short of u. Above: those that are followed by more than 1 - u.
    lower = (under < goal).sum(1)
    upper = 2 * width - (over[:, :-1] <= goal).sum(1)
    return (mode - width + torch.where(u.upper, upper, lower)).clamp_min(0.0)
