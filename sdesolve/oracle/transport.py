"""Wasserstein distances on the line, between what a sampler draws and a mixture."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from sdesolve.diffusions.base import AbstractDiffusion
from sdesolve.oracle.bounds import SAMPLE, UnresolvedError, check_mass, check_sample, is_resolved, twice, unresolved
from sdesolve.oracle.inputs import Drawn, OracleNoise, Silence, seeded
from sdesolve.oracle.joint import Cloud, TooManyError, law_at_last_noise, together
from sdesolve.oracle.particles import REPLICATES, Measured, Particles, estimated, start_of
from sdesolve.oracle.recursion import recursion
from sdesolve.oracle.samplers import Look, Sampler, gaussian_steps, is_deterministic
from sdesolve.scores.mixture import GaussianMixture

_NODES, _MOST_NODES = 1 << 13, 1 << 18
_REACH = 7.0  # standard deviations of a component to either side; 3e-12 of it lies beyond
_WIDTH = 8.5  # standard deviations of a bell to either side beyond which it has no mass worth counting
_PROBES = 8193
# Of the noise of a step. The trapezoidal rule then errs by exp(-2 (pi / 0.6)^2) = 2e-24 if a step is a straight line.
# It is not between two modes, where errors grow from step to step and decide the weights: 0.8 was too much.
_SPACING = 0.6
_FEWEST, _MOST = 512, 1 << 20
_UNLIKELY = 1e-8  # probability of states whose way does not matter


def wasserstein_to_mixture(
    sampler: Sampler, process: AbstractDiffusion, data: GaussianMixture, grid: Tensor, *, prior: bool, denoise: bool
) -> Measured:
    r"""``W_2`` over the true law's standard deviation, for data on the line.

    In one dimension ``W_2^2`` is the mean square difference of quantiles, an integral over the true law, taken on a
    mesh of states: quantiles in equal shares would leave out what lies between modes, where samplers are worst. Of a
    deterministic sampler, which takes start states to end states in order, quantiles are those of the start, carried
    along, so that no sampling error hides the error of the method. Of a stochastic one the density is followed from
    step to step, ``p'(y) = int N(y; m(x), c^2) p(x) dx``, by the trapezoidal rule on a mesh finer than ``c``. Where
    steps remember earlier ones that goes for the joint density (`law_at_last_noise`), and where that is too large the
    law is estimated (`Particles`).

    Every value is found twice, the second time on a coarser mesh, and laws are compared with a sample.

    Raises:
        ValueError: no law that agrees with itself and with the sample was found.
    """
    score, shape = data.score(process), (-1, *data.state_shape)
    start = normal_law(process.prior_at(float(grid[0])).std) if prior else MixtureLaw(data, process, float(grid[0]))
    clean = denoise or float(grid[-1]) == 0.0
    end = MixtureLaw(data, process, None if clean else float(grid[-1]))
    target, u, mass = end.nodes(_NODES)

    def ended(x: Tensor) -> Tensor:
        return (score.denoise(x, grid[-1]) if denoise else x).flatten()

    def distance(x: Tensor, x_true: Tensor = target, share: Tensor = mass) -> float:
        """Of the law with these quantiles."""
        return math.sqrt(float(share @ (x - x_true).square())) / end.std

    def carried() -> Measured:
        found = math.nan
        for count in (_NODES << k for k in range(_MOST_NODES.bit_length() - _NODES.bit_length() + 1)):
            before, (x_true, v, share) = found, end.nodes(count)
            x = start.quantiles(v).reshape(shape)
            x = ended(sampler(process, score, x, grid, OracleNoise(Silence(), tuple(x.shape))))
            found = distance(_in_order(x, share, v), x_true, share)
            if is_resolved(found, before):
                return Measured(found, bound=abs(found - before))
        raise ValueError(unresolved(found, before))

    def compared(x: Tensor) -> Tensor:
        """Quantiles of the end, which a sample agrees with."""
        z = _sampled_start(start, shape)
        y = ended(sampler(process, score, z, grid, OracleNoise(Drawn(), tuple(z.shape))))
        check_sample(x, u, y)
        return x

    def followed(looks: list[Look]) -> Measured:
        def value(coarser: float) -> float:
            x = ended(_followed(looks, start, u, shape, coarser).reshape(shape))
            return distance(compared(_in_order(x, mass, u)))

        return twice(value)

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
    chain.check_end()
    last = chain.random[-1]

    def from_clouds(clouds: Sequence[Cloud]) -> Tensor:
        x = together(clouds).quantiles(u).reshape(shape)
        return _in_order(ended(chain.ahead(last, x, len(chain.points) - 1)), mass, u)

    def by_quadrature(coarser: float) -> float:
        law = law_at_last_noise(chain, start.density, start.quantiles, shape, coarser)
        return distance(compared(from_clouds([law])))

    with contextlib.suppress(TooManyError, UnresolvedError):
        return twice(by_quadrature)
    particles = Particles(chain, start_of(data, process, float(grid[0]), prior=prior), shape, 1)
    clouds = [_cloud(particles.means(r), chain.points[last].c) for r in range(REPLICATES)]
    compared(from_clouds(clouds))
    return estimated(lambda some: distance(from_clouds(some)), clouds)


def _cloud(means: Tensor, std: float) -> Cloud:
    return Cloud(means[:, 0], torch.full((len(means),), 1.0 / len(means), dtype=torch.float64), std).fewer()


def _sampled_start(start: MixtureLaw, shape: tuple[int, ...]) -> Tensor:
    return start.quantiles(torch.special.ndtr(seeded(2, (SAMPLE,)))).reshape(shape)


class MixtureLaw:
    """A mixture on the line at one time, or clean for ``t=None``."""

    def __init__(self, data: GaussianMixture, process: AbstractDiffusion | None, t: float | None) -> None:
        alpha, sigma = (
            (1.0, 0.0) if t is None or process is None else (float(process.alpha(t)), float(process.sigma(t)))
        )
        self.weights, self.means = data.weights, alpha * data.means.reshape(-1)
        self.stds = (alpha**2 * data.covs.reshape(-1) + sigma**2).sqrt()
        self.mean = float((self.weights * self.means).sum())
        spread = self.stds.square() + (self.means - self.mean).square()
        self.std = math.sqrt(float((self.weights * spread).sum()))
        self.width = float(self.stds.amin())

    def density(self, x: Tensor) -> Tensor:
        z = (x[..., None] - self.means) / self.stds
        return (self.weights * (-0.5 * z.square()).exp() / self.stds).sum(-1) / math.sqrt(2 * math.pi)

    def distribution(self, x: Tensor) -> Tensor:
        z = (x[..., None] - self.means) / self.stds
        return (self.weights * torch.special.ndtr(z)).sum(-1)

    def range(self) -> tuple[float, float]:
        """States beyond which no component has mass worth counting."""
        return float((self.means - _WIDTH * self.stds).amin()), float((self.means + _WIDTH * self.stds).amax())

    def nodes(self, count: int) -> tuple[Tensor, Tensor, Tensor]:
        """States in order, the distribution function there, and the masses of the cells about them, which sum to 1."""
        z = torch.linspace(-_REACH, _REACH, count // len(self.means), dtype=torch.float64)
        x = (self.means[:, None] + self.stds[:, None] * z).flatten().sort().values
        edges = torch.cat([torch.zeros(1), self.distribution(0.5 * (x[1:] + x[:-1])), torch.ones(1)])
        return x, self.distribution(x), edges.diff()

    def quantiles(self, u: Tensor) -> Tensor:
        """By bisection of the distribution function."""
        low = (self.means - 10 * self.stds).amin().expand(u.shape)
        high = (self.means + 10 * self.stds).amax().expand(u.shape)
        for _ in range(100):
            middle = 0.5 * (low + high)
            left = self.distribution(middle) < u
            low, high = middle.where(left, low), high.where(left, middle)
        return 0.5 * (low + high)


def _in_order(x: Tensor, mass: Tensor, u: Tensor) -> Tensor:
    """Quantiles ``u`` of the law of states ``x`` with ``mass``, which are those states if they are in order."""
    y, order = x.sort()
    if torch.equal(x, y):
        return x
    F = mass[order].cumsum(0) - 0.5 * mass[order]
    return torch.from_numpy(np.interp(u.numpy(), F.numpy(), y.numpy()))


def normal_law(std: float) -> MixtureLaw:
    """``N(0, std^2)``."""
    return MixtureLaw(GaussianMixture(torch.zeros(1, 1), float(std)), None, None)


def _followed(looks: list[Look], start: MixtureLaw, u: Tensor, shape: tuple[int, ...], coarser: float) -> Tensor:
    """Quantiles of the law after all steps."""
    low, high = start.range()
    count = _count(looks[0], start.density, low, high, shape, start.width, coarser)
    nodes = torch.linspace(low, high, count + 1, dtype=torch.float64)
    cloud, mass = None, start.density(nodes) * (nodes[1] - nodes[0])
    for k, look in enumerate(looks):
        step = look(nodes.reshape(shape))
        if step.std == 0.0:
            if k + 1 < len(looks) or cloud is None:
                raise ValueError("only the last step of a stochastic sampler may be without noise")
            return look(cloud.quantiles(u).reshape(shape)).mean.reshape(-1)
        check_mass(mass)
        cloud = Cloud(step.mean.reshape(-1), mass, step.std).fewer()
        if k + 1 < len(looks):
            low, high = cloud.range()
            count = _count(looks[k + 1], cloud.density, low, high, shape, step.std, coarser)
            nodes, mass = cloud.on_mesh((high - low) / count)
    assert cloud is not None
    return cloud.quantiles(u)


def _count(
    look: Look,
    density: Callable[[Tensor], Tensor],
    low: float,
    high: float,
    shape: tuple[int, ...],
    width: float,
    coarser: float,
) -> int:
    """Cells of a mesh that resolves the next step's transition density and the law, of which no bell is narrower."""
    probes = torch.linspace(low, high, _PROBES, dtype=torch.float64)
    step = look(probes.reshape(shape))
    if step.std == 0.0:
        return _PROBES
    likely = density(probes) * (high - low) > _UNLIKELY
    slopes = (step.mean.reshape(-1).diff() / (probes[1] - probes[0])).abs()[likely[1:] | likely[:-1]]
    sharpness = math.hypot(float(slopes.amax()) / step.std, 1.0 / width)
    count = max(_FEWEST, math.ceil((high - low) * sharpness / (coarser * _SPACING)))
    if count > _MOST:
        raise ValueError(
            f"a step adds noise of size {step.std:.3g} to states spread over {high - low:.3g}: a mesh of {count} "
            f"points would be needed, and {_MOST} are allowed. End the grid at more noise, or take fewer steps"
        )
    return count
