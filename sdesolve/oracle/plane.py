"""Total variation distances in the plane, between what a sampler draws and a mixture."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from sdesolve.diffusions.base import AbstractDiffusion
from sdesolve.oracle.bounds import check_mass, twice, unresolved
from sdesolve.oracle.inputs import OracleNoise, Silence
from sdesolve.oracle.joint import Cloud
from sdesolve.oracle.particles import REPLICATES, Measured, Particles, estimated, start_of
from sdesolve.oracle.recursion import recursion
from sdesolve.oracle.samplers import Look, Sampler, gaussian_steps, is_deterministic
from sdesolve.scores.mixture import GaussianMixture

# Points of each axis: for deterministic samplers, and for densities.
_STARTS = (171, 241, 341, 481, 681)
_ROUGHLY, _AT_LEAST, _INTEGRATED = 0.02, 1e-5, 1e-4  # accuracy of distances of deterministic samplers, and of masses
_PROBES, _FEWEST, _MOST = 129, 64, 384
_WIDTH, _SPACING = 7.0, 0.9  # as for the line; the trapezoidal rule errs by 5e-11
_START_WIDTH = 5.0  # two in a million start beyond
_DIFFERENCE = 1e-5
_BLOCK = 1 << 14


Density = Callable[[list[Tensor]], Tensor]


class Box(NamedTuple):
    """Where a law has its mass: lowest and highest coordinates, ``(2,)``."""

    low: Tensor
    high: Tensor

    def shrunk(self, factor: float) -> Box:
        """The box about the same centre with sides of ``factor`` times the length."""
        centre, half = 0.5 * (self.low + self.high), 0.5 * factor * (self.high - self.low)
        return Box(centre - half, centre + half)

    def axes(self, counts: list[int]) -> list[Tensor]:
        """Equispaced points along each side."""
        sides = zip(self.low.tolist(), self.high.tolist(), counts, strict=True)
        return [torch.linspace(a, b, n, dtype=torch.float64) for a, b, n in sides]


def variation_2d(
    sampler: Sampler, process: AbstractDiffusion, data: GaussianMixture, grid: Tensor, *, prior: bool
) -> Measured:
    r"""``1/2 int |p - q|`` between the sampler's law ``p`` and the true one ``q`` at the end of the grid.

    For a deterministic sampler ``F``, a change of variables makes this ``1/2 E|1 - q(F(x)) |det F'(x)| / p_0(x)|`` over
    start states ``x ~ p_0``, taken by quadrature over the plane, with central differences for ``F'``: good to a
    percent of the distance or so. For a stochastic
    one the density is followed from step to step: ``N(y; m(x), c^2 I)`` is a product over both axes, so that a step is
    one product of matrices. Where steps remember earlier ones the law is estimated (`Particles`).
    """
    score, end = data.score(process), grid[-1]
    t0 = float(grid[0])
    std = process.prior_at(t0).std

    def prior_density(x: Tensor) -> Tensor:
        return (-0.5 * (x / std).square().sum(-1)).exp() / (2 * math.pi * std**2)

    def marginal_density(x: Tensor) -> Tensor:
        return score.log_prob(x, t0).exp()

    if prior:
        start, box = prior_density, Box(-_WIDTH * std * torch.ones(2).double(), _WIDTH * std * torch.ones(2).double())
    else:
        alpha, sigma = float(process.alpha(t0)), float(process.sigma(t0))
        reach = _WIDTH * (alpha**2 * data.covs.diagonal(dim1=1, dim2=2) + sigma**2).sqrt()
        start, box = marginal_density, Box((alpha * data.means - reach).amin(0), (alpha * data.means + reach).amax(0))

    def truth(x: Tensor) -> Tensor:
        return score.log_prob(x, end).exp()

    def carried() -> Measured:
        def run(x: Tensor) -> Tensor:
            return sampler(process, score, x, grid, OracleNoise(Silence(), tuple(x.shape)))

        inner, found = box.shrunk(_START_WIDTH / _WIDTH), math.nan
        for count in _STARTS:
            density = start(_product(inner.axes([count, count])))
            before, found = found, _carried_along(run, density, truth, inner, count)
            if abs(found - before) <= _ROUGHLY * found + _AT_LEAST:
                return Measured(found, bound=abs(found - before))
        raise ValueError(unresolved(found, before))

    def followed(looks: list[Look]) -> Measured:
        return twice(lambda coarser: _followed(looks, start, box, truth, coarser))

    if is_deterministic(sampler, process, data, grid):
        return carried()
    try:
        chain = recursion(sampler, process, data, grid)
    except ValueError:  # steps that are no combinations may still be Gaussian, each for itself
        return followed(list(gaussian_steps(sampler, process, data, grid)))
    if not chain.random:
        return carried()
    if not chain.memory:
        return followed(chain.looks())
    if chain.random[-1] != len(chain.points) - 1:
        raise ValueError(
            "in the plane, the last step of a sampler that remembers must add noise: end the grid above zero noise"
        )
    particles = Particles(chain, start_of(data, process, t0, prior=prior), (-1, *data.state_shape), 2)
    std, means = chain.points[-1].c, [particles.means(r) for r in range(REPLICATES)]
    low, high = (f(torch.stack([f(m, 0).values for m in means]), 0).values for f in (torch.min, torch.max))
    region = Box(low - _WIDTH * std, high + _WIDTH * std)
    axes = region.axes([math.ceil(float(side) / (_SPACING * std)) + 1 for side in region.high - region.low])
    q = truth(_product(axes)).reshape(len(axes[0]), len(axes[1]))

    check_mass(q * _area(axes), _INTEGRATED)

    def distance(densities: Sequence[Tensor]) -> float:
        return float(0.5 * _area(axes) * (torch.stack(list(densities)).mean(0) - q).abs().sum())

    return estimated(distance, [_bumps(m, torch.full_like(m[:, 0], 1 / len(m)), std, axes) for m in means])


def _followed(
    looks: list[Look],
    start: Callable[[Tensor], Tensor],
    box: Box,
    truth: Callable[[Tensor], Tensor],
    coarser: float,
) -> float:
    """The distance after Gaussian steps, and perhaps a last one that adds nothing."""

    def density(axes: list[Tensor]) -> Tensor:
        return start(_product(axes)).reshape(len(axes[0]), len(axes[1]))

    law: Density = density
    width = math.inf
    for k, look in enumerate(looks):
        if k + 1 == len(looks) and look(box.low[None]).std == 0.0:
            count = math.ceil(_STARTS[1] / coarser)
            p = law(box.axes([count, count])).reshape(-1)
            return _carried_along(functools.partial(_mean, look), p, truth, box, count)
        law, box, width = _after(look, law, box, width, coarser)
    count = math.ceil(_MOST / coarser)
    axes = box.axes([count, count])
    p, q = law(axes), truth(_product(axes)).reshape(count, count)
    check_mass(p * _area(axes), _INTEGRATED)
    # What lies outside of the box is of the truth alone.
    outside = 1.0 - float(q.sum()) * _area(axes)
    return float(0.5 * _area(axes) * (p - q).abs().sum()) + 0.5 * abs(outside)


def _mean(look: Look, x: Tensor) -> Tensor:
    return look(x).mean


def _bumps(mean: Tensor, mass: Tensor, std: float, axes: list[Tensor]) -> Tensor:
    """``sum_j mass_j N(x; mean_j, std^2 I)`` on the mesh of ``axes``."""
    total = torch.zeros(len(axes[0]), len(axes[1]), dtype=torch.float64)
    for m, w in zip(mean.split(_BLOCK), mass.split(_BLOCK), strict=True):
        a, b = ((-0.5 * ((axis[:, None] - m[:, i]) / std).square()).exp_() for i, axis in enumerate(axes))
        total += (a * w) @ b.mT
    return total / (2 * math.pi * std**2)


def _carried_along(
    run: Callable[[Tensor], Tensor], density: Tensor, truth: Callable[[Tensor], Tensor], box: Box, count: int
) -> float:
    """``density`` is that of the start on a mesh of ``count`` points an axis, in a row."""
    axes = box.axes([count, count])
    x = _product(axes)
    e = _DIFFERENCE * float((box.high - box.low).amin()) * torch.eye(2, dtype=torch.float64)
    J = torch.stack([(run(x + d) - run(x - d)) / (2 * d.sum()) for d in e], -1)
    determinant = (J[:, 0, 0] * J[:, 1, 1] - J[:, 0, 1] * J[:, 1, 0]).abs()
    return float(0.5 * _area(axes) * (density - truth(run(x)) * determinant).abs().sum())


def _after(look: Look, density: Density, box: Box, width: float, coarser: float) -> tuple[Density, Box, float]:
    """Density and extent of the law after a step, and a width that no bell of it is narrower than."""
    axes = box.axes(_counts(look, density, box, width, coarser))
    mass = density(axes).reshape(-1) * _area(axes)
    mean, std = look(_product(axes))
    if std == 0.0:
        raise ValueError(
            "in the plane, every step of a stochastic sampler must add noise: end the grid above zero noise"
        )
    check_mass(mass, _INTEGRATED)
    kept = mass > 1e-16 * mass.amax()
    mass, mean = mass[kept] / mass[kept].sum(), mean[kept]
    sides = [Cloud(mean[:, i], mass, std).range() for i in (0, 1)]
    low, high = torch.tensor(sides, dtype=torch.float64).unbind(1)

    return lambda axes: _bumps(mean, mass, std, axes), Box(low, high), std


def _counts(look: Look, density: Density, box: Box, width: float, coarser: float) -> list[int]:
    """Points of each axis for a mesh that resolves the step's transition density and the law."""
    axes = box.axes([_PROBES, _PROBES])
    p = density(axes)
    mean, std = look(_product(axes))
    mean = mean.reshape(_PROBES, _PROBES, 2)
    if std == 0.0:
        return [_FEWEST, _FEWEST]
    counts = []
    for i, axis in enumerate(axes):
        seen = (p > 1e-9 * p.amax()).narrow(i, 0, _PROBES - 1)
        steepest = float(mean.diff(dim=i).norm(dim=-1)[seen].amax()) / float(axis[1] - axis[0])
        count = max(
            _FEWEST,
            math.ceil(float(axis[-1] - axis[0]) * math.hypot(steepest / std, 1.0 / width) / (coarser * _SPACING)),
        )
        if count > _MOST:
            raise ValueError(
                f"a step adds noise of size {std:.3g} to states spread over {float(axis[-1] - axis[0]):.3g}: a mesh of "
                f"{count} points an axis would be needed, and {_MOST} are allowed. End the grid at more noise, or take "
                "fewer steps"
            )
        counts.append(count)
    return counts


def _product(axes: list[Tensor]) -> Tensor:
    """All points of a mesh, ``(points, 2)``."""
    return torch.cartesian_prod(*axes)


def _area(axes: list[Tensor]) -> float:
    return math.prod(float(axis[1] - axis[0]) for axis in axes)
