"""The law of a sampler on the line whose steps remember earlier ones: the joint density of what has to be known."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from sdesolve.oracle.bounds import check_mass
from sdesolve.oracle.inputs import seeded
from sdesolve.oracle.recursion import Known, Recursion

# With points ``spacing`` apart, the trapezoidal rule errs by ``2 exp(-2 (pi w / spacing)^2)`` on a bell of width ``w``.
_SPACING = 1.0  # of the width
_ERROR = (
    1e-12  # where widths differ: few paths cross between modes, where integrands are sharpest, and decide their weights
)
_FINER = 0.8  # for steps that are no straight lines: the score has poles off the axis between two modes
_WIDTH = 6.8  # standard deviations of a draw to either side; 1e-11 of it lies beyond
_LIGHT = 1e-11  # of the largest mass of a tuple: lighter ones are left out
_PILOTS = 4096
_OUTSIDE, _REACH, _BISECTIONS = 1e-15, 8.5, 40  # mass, standard deviations, halvings of a cell
_MOST, _WIDEST = 1 << 21, 1 << 23
_BLOCK = 1 << 22


class Cloud(NamedTuple):
    """``sum_j mass_j N(mean_j, std^2)``."""

    mean: Tensor
    mass: Tensor
    std: float

    def fewer(self) -> Cloud:
        """The same law by fewer terms: half of the variance is spread over a mesh."""
        std = self.std / math.sqrt(2.0)
        half, spacing = Cloud(self.mean, self.mass, std), _SPACING * std / math.sqrt(2.0)
        lowest, mass = _spread(half, torch.zeros(len(self.mean), dtype=torch.int64), 1, spacing)
        points = spacing * (lowest + torch.arange(mass.shape[1])).double()
        return Cloud(points, mass[0], std)

    def range(self) -> tuple[float, float]:
        """States beyond which there is no mass worth counting."""
        mean, order = self.mean.sort()
        below = self.mass[order].cumsum(0)
        inside = (below > _OUTSIDE * below[-1]) & (below - self.mass[order] < (1.0 - _OUTSIDE) * below[-1])
        return float(mean[inside][0]) - _REACH * self.std, float(mean[inside][-1]) + _REACH * self.std

    def on_mesh(self, spacing: float) -> tuple[Tensor, Tensor]:
        """Equispaced points, and the mass at each."""
        low, high = self.range()
        inside = (self.mean >= low) & (self.mean <= high)
        part = Cloud(self.mean[inside], self.mass[inside], self.std)
        lowest, mass = _spread(part, torch.zeros(len(part.mean), dtype=torch.int64), 1, spacing)
        return spacing * (lowest + torch.arange(mass.shape[1])).double(), mass[0]

    def density(self, y: Tensor) -> Tensor:
        """At points in order, by interpolation."""
        points, mass = self.on_mesh(0.25 * self.std)
        return torch.from_numpy(np.interp(y.numpy(), points.numpy(), (mass / (0.25 * self.std)).numpy(), 0.0, 0.0))

    def quantiles(self, u: Tensor) -> Tensor:
        """By bisection of the distribution function, within the cell of the mesh where it passes ``u``."""
        law = self.fewer()
        h, mass = float(law.mean[1] - law.mean[0]), law.mass / law.mass.sum()
        near = math.ceil(_REACH * law.std / h)  # bells of so many points on either side are neither 0 nor 1
        mass = torch.cat([mass.new_zeros(2 * near + 1), mass, mass.new_zeros(2 * near + 1)])
        before = mass.cumsum(0) - mass
        bells = torch.special.ndtr(torch.arange(near, -near - 1, -1).double() * (h / law.std))
        F = torch.nn.functional.conv1d(mass[None, None], bells[None, None])[0, 0] + before[: len(mass) - 2 * near]
        cell = (torch.searchsorted(F.cummax(0).values, u) - 1).clamp(0, len(F) - 2) + near
        window = torch.arange(-near, near + 2)
        local, base = mass[cell[:, None] + window], before[cell - near]
        low, high = torch.zeros_like(u), torch.ones_like(u)  # parts of the cell
        for _ in range(_BISECTIONS):
            middle = 0.5 * (low + high)
            z = (middle[:, None] - window.double()) * (h / law.std)
            left = base + (local * torch.special.ndtr(z)).sum(1) < u
            low, high = middle.where(left, low), high.where(left, middle)
        return float(law.mean[0]) + h * (cell - 2 * near - 1 + 0.5 * (low + high))


def together(clouds: Sequence[Cloud]) -> Cloud:
    """Their mean, as laws; all have the same ``std``, and so one mesh (`Cloud.fewer`)."""
    if len(clouds) == 1:
        return clouds[0]
    h = _SPACING * clouds[0].std / math.sqrt(2.0)
    places = [(c.mean / h).round().long() for c in clouds]
    first, last = min(int(p[0]) for p in places), max(int(p[-1]) for p in places)
    mass = torch.zeros(last - first + 1, dtype=torch.float64)
    for place, cloud in zip(places, clouds, strict=True):
        mass.index_add_(0, place - first, cloud.mass)
    return Cloud(h * torch.arange(first, last + 1).double(), mass / len(clouds), clouds[0].std)


class TooManyError(ValueError):
    """A joint density needs more points than are allowed."""


class _Tuples(NamedTuple):
    """Values that random points may have together: their mass, where they lie on their meshes, what they lead to."""

    mass: Tensor
    places: dict[int, Tensor]
    known: Known


@torch.no_grad()
def law_at_last_noise(
    chain: Recursion,
    start: Callable[[Tensor], Tensor],
    quantiles: Callable[[Tensor], Tensor],
    shape: tuple[int, ...],
    coarser: float = 1.0,
) -> Cloud:
    """The law of the last point of ``chain`` at which noise is added.

    The joint density of the random points that the future depends on is followed from each to the next. Every one is on
    a mesh of its own, and tuples are left out where they have no mass: a draw is narrow next to the law, so that few
    occur. Integrals are sums over the meshes, by the trapezoidal rule, which are fine enough for it to be exact.

    Args:
        chain: the sampler.
        start: density of its start.
        quantiles: of its start.
        shape: of states, ``(-1, *state)``.
        coarser: factor of the meshes' spacings.

    Raises:
        TooManyError: more than two million tuples.
        UnresolvedError: mass was lost or made.
    """
    last, spacings = chain.random[-1], [coarser * h for h in _spacings(chain, quantiles, shape)]
    far = quantiles(torch.tensor([1e-15, 1 - 1e-15], dtype=torch.float64)) / spacings[0]
    places = torch.arange(math.floor(far[0]), math.ceil(far[1]) + 1)
    y = spacings[0] * places.double()
    tuples = _Tuples(start(y) * spacings[0], {0: places}, {0: (y, torch.zeros_like(y))})
    for i, point in enumerate(chain.points[1:], 1):
        mean = chain.mean(i, tuples.known)
        if i == last:
            check_mass(tuples.mass)
            return Cloud(mean, tuples.mass / tuples.mass.sum(), point.c).fewer()
        if point.c:
            tuples = _after(chain, i, tuples, Cloud(mean, tuples.mass, point.c), spacings[i], shape)
        else:
            kept = {j: tuples.known[j] for j in chain.kept[i]}
            tuples = tuples._replace(known=kept | {i: (mean, _score(chain, i, mean, shape))})
    raise AssertionError


def _after(chain: Recursion, i: int, tuples: _Tuples, cloud: Cloud, spacing: float, shape: tuple[int, ...]) -> _Tuples:
    """Tuples with random point ``i``, and without those that the future does not depend on."""
    held = sorted(chain.held(i))
    keys = torch.zeros_like(tuples.mass, dtype=torch.int64)
    for j in held:
        place = tuples.places[j] - tuples.places[j].amin()
        keys = keys * (place.amax() + 1) + place
    unique, group = keys.unique(return_inverse=True)
    member = torch.empty_like(unique).scatter_(0, group, torch.arange(len(keys)))
    lowest, mass = _spread(cloud, group, len(unique), spacing)
    at, offset = (mass > _LIGHT * mass.amax()).nonzero(as_tuple=True)
    if len(at) > _MOST:
        raise TooManyError(f"a joint density needs {len(at)} points")
    place, source = lowest[at] + offset, member[at]
    nodes = spacing * torch.arange(int(place.amin()), int(place.amax()) + 1, dtype=torch.float64)
    inside = place - place.amin()
    known = {j: (tuples.known[j][0][source], tuples.known[j][1][source]) for j in chain.kept[i]}
    known[i] = (nodes[inside], _score(chain, i, nodes, shape)[inside])
    return _Tuples(mass[at, offset], {j: tuples.places[j][source] for j in held} | {i: place}, known)


def _spread(cloud: Cloud, group: Tensor, groups: int, spacing: float) -> tuple[Tensor, Tensor]:
    """``cloud`` on a mesh for each group of its terms: first places ``(groups,)``, and masses ``(groups, width)``."""
    low = ((cloud.mean - _WIDTH * cloud.std) / spacing).ceil().long()
    reach = math.ceil(2 * _WIDTH * cloud.std / spacing) + 1
    lowest = torch.full((groups,), 1 << 62).scatter_reduce_(0, group, low, "amin")
    first = low - lowest[group]
    width = int(first.amax()) + reach
    if groups * width > _WIDEST:
        raise TooManyError(f"a joint density needs up to {groups * width} points")
    mass, places = torch.zeros(groups * width, dtype=torch.float64), torch.arange(reach)
    factor = spacing / (cloud.std * math.sqrt(2 * math.pi))
    for part in torch.arange(len(low)).split(max(1, _BLOCK // reach)):
        z = (spacing * (low[part, None] + places).double() - cloud.mean[part, None]) / cloud.std
        density = (factor * cloud.mass[part])[:, None] * (-0.5 * z.square()).exp_()
        mass.index_add_(0, ((group[part] * width + first[part])[:, None] + places).reshape(-1), density.reshape(-1))
    return lowest, mass.reshape(groups, width)


def _spacings(chain: Recursion, quantiles: Callable[[Tensor], Tensor], shape: tuple[int, ...]) -> list[float]:
    """Of the mesh of each random point: how sharp the integrand is in it, along paths, by differentiation."""
    y = quantiles((torch.arange(_PILOTS, dtype=torch.float64) + 0.5) / _PILOTS)
    sharpness = {0: 1.0 / y.var().expand_as(y)}
    with torch.enable_grad():
        leaves = {0: y.requires_grad_()}
        known: Known = {0: (y, torch.zeros_like(y))}
        for i, point in enumerate(chain.points[1:], 1):
            y = chain.mean(i, known)
            if point.c:
                sources = sorted(frozenset().union(*(chain.drawn[j] for j in point.window)))
                slopes = torch.autograd.grad(y.sum(), [leaves[j] for j in sources], retain_graph=True)
                for j, slope in zip(sources, slopes, strict=True):
                    sharpness[j] = sharpness[j] + (slope / point.c).square()
                sharpness[i] = torch.full_like(y, point.c**-2).detach()
                y = (y.detach() + point.c * seeded(i, y.shape)).requires_grad_()
                leaves[i] = y
            known = {j: known[j] for j in chain.kept[i]} | {i: (y, _score(chain, i, y, shape))}
    return [_spacing(sharpness[i]) if i in sharpness else 0.0 for i in range(len(chain.points))]


def _spacing(sharpness: Tensor) -> float:
    """At which the trapezoidal rule errs by `_ERROR` on the mean over all paths."""
    low, high = 0.2, 6.0
    for _ in range(40):
        middle = math.sqrt(low * high)
        h2 = middle**2 / sharpness.mean()
        error = float((2.0 * (-2.0 * math.pi**2 / (h2 * sharpness)).exp()).mean())
        low, high = (middle, high) if error < _ERROR else (low, middle)
    return _FINER * low / math.sqrt(float(sharpness.mean()))


def _score(chain: Recursion, i: int, y: Tensor, shape: tuple[int, ...]) -> Tensor:
    return chain.score(i, y.reshape(shape)).reshape(-1)
