"""Wasserstein distances on the line, between what a sampler draws and a mixture."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from sdesolve.diffusions.base import AbstractDiffusion
from sdesolve.oracle.inputs import OracleNoise, Silence
from sdesolve.oracle.joint import Cloud, TooManyError, law_at_last_noise, together
from sdesolve.oracle.particles import REPLICATES, Measured, Particles, estimated, start_of
from sdesolve.oracle.recursion import recursion
from sdesolve.oracle.samplers import Look, Sampler, gaussian_steps, is_deterministic
from sdesolve.scores.mixture import GaussianMixture

_NODES = 4096
_REACH = 7.0  # standard deviations of a component to either side; 3e-12 of it lies beyond
_PROBES = 1025
_WIDTH = 8.0  # standard deviations to either side of the mean beyond which a law has no mass worth counting
# Of the noise of a step. The trapezoidal rule then errs by exp(-2 (pi / 0.6)^2) = 2e-24 if a step is a straight line.
# It is not between two modes, where errors grow from step to step and decide the weights: 0.8 was too much.
_SPACING = 0.6
_FEWEST, _MOST = 512, 1 << 15
_BLOCK = 1 << 22


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
    """
    score, shape = data.score(process), (-1, *data.state_shape)
    start = normal_law(process.prior.std) if prior else MixtureLaw(data, process, float(grid[0]))
    clean = denoise or float(grid[-1]) == 0.0
    end = MixtureLaw(data, process, None if clean else float(grid[-1]))
    target, u, mass = end.nodes()

    def distance(x: Tensor) -> float:
        """Of the law with these quantiles at the end of the grid."""
        x = x.reshape(shape)
        if denoise:
            x = score.denoise(x, grid[-1])
        x = _in_order(x.flatten(), mass, u)
        return math.sqrt(float(mass @ (x - target).square())) / end.std

    def carried() -> Measured:
        x = start.quantiles(u).reshape(shape)
        return Measured(distance(sampler(process, score, x, grid, OracleNoise(Silence(), tuple(x.shape)))))

    if is_deterministic(sampler, process, data, grid):
        return carried()
    try:
        chain = recursion(sampler, process, data, grid)
    except ValueError:  # steps that are no combinations may still be Gaussian, each for itself
        looks = list(gaussian_steps(sampler, process, data, grid))
        return Measured(distance(_quantiles(looks, start, u, shape)))
    if not chain.random:
        return carried()
    if not chain.memory:
        return Measured(distance(_quantiles(chain.looks(), start, u, shape)))
    chain.check_end()
    last = chain.random[-1]

    def from_clouds(clouds: Sequence[Cloud]) -> float:
        law = _Mixture(*together(clouds))
        x = _inverse(law, *law.range(), u).reshape(shape)
        return distance(chain.ahead(last, x, len(chain.points) - 1))

    try:
        return Measured(from_clouds([law_at_last_noise(chain, start.density, start.quantiles, shape)]))
    except TooManyError:
        particles = Particles(chain, start_of(data, process, float(grid[0]), prior=prior), shape, 1)
    return estimated(from_clouds, [_cloud(particles.means(r), chain.points[last].c) for r in range(REPLICATES)])


def _cloud(means: Tensor, std: float) -> Cloud:
    return Cloud(means[:, 0], torch.full((len(means),), 1.0 / len(means), dtype=torch.float64), std).fewer()


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

    def nodes(self) -> tuple[Tensor, Tensor, Tensor]:
        """States in order, the distribution function there, and the masses of the cells about them, which sum to 1."""
        z = torch.linspace(-_REACH, _REACH, _NODES // len(self.means), dtype=torch.float64)
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


def _quantiles(looks: list[Look], start: MixtureLaw, u: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Quantiles of the law after all steps."""
    low, high = start.mean - _WIDTH * start.std, start.mean + _WIDTH * start.std
    law: MixtureLaw | _Mixture = start
    for k, look in enumerate(looks):
        nodes = _nodes(look, low, high, shape, law.width)
        mass = law.density(nodes) * (nodes[1] - nodes[0])
        step = look(nodes.reshape(shape))
        if step.std == 0.0:
            if k + 1 < len(looks) or not isinstance(law, _Mixture):
                raise ValueError("only the last step of a stochastic sampler may be without noise")
            return look(_inverse(law, low, high, u).reshape(shape)).mean.reshape(-1)
        law = _Mixture(step.mean.reshape(-1), mass, step.std)
        low, high = law.range()
    assert isinstance(law, _Mixture)
    return _inverse(law, low, high, u)


def _nodes(look: Look, low: float, high: float, shape: tuple[int, ...], width: float) -> Tensor:
    """An equispaced mesh that resolves the next step's transition density and the law, of which no bell is narrower."""
    probes = torch.linspace(low, high, _PROBES, dtype=torch.float64)
    step = look(probes.reshape(shape))
    if step.std == 0.0:
        return probes
    steepest = float(step.mean.reshape(-1).diff().abs().amax()) / float(probes[1] - probes[0])
    count = max(_FEWEST, math.ceil((high - low) * math.hypot(steepest / step.std, 1.0 / width) / _SPACING))
    if count > _MOST:
        raise ValueError(
            f"a step adds noise of size {step.std:.3g} to states spread over {high - low:.3g}: a mesh of {count} "
            f"points would be needed, and {_MOST} are allowed. End the grid at more noise, or take fewer steps"
        )
    return torch.linspace(low, high, count + 1, dtype=torch.float64)


class _Mixture:
    """The law after a step: ``sum_j mass_j N(mean_j, std^2)``."""

    def __init__(self, mean: Tensor, mass: Tensor, std: float) -> None:
        kept = mass > 1e-18 * mass.amax()
        self._mean, self._mass, self._std = mean[kept], mass[kept], std
        self._total = self._mass.sum()
        self.width = std

    def range(self) -> tuple[float, float]:
        centre = float((self._mass * self._mean).sum() / self._total)
        spread = float((self._mass * (self._mean - centre).square()).sum() / self._total)
        reach = _WIDTH * math.sqrt(spread + self._std**2)
        low, high = float(self._mean.amin()) - _WIDTH * self._std, float(self._mean.amax()) + _WIDTH * self._std
        return max(low, centre - reach), min(high, centre + reach)

    def density(self, y: Tensor) -> Tensor:
        scale = self._std * math.sqrt(2 * math.pi) * self._total
        return self._summed(y, lambda z: (-0.5 * z.square()).exp()) / scale

    def distribution(self, y: Tensor) -> Tensor:
        return self._summed(y, torch.special.ndtr) / self._total

    def _summed(self, y: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
        rows = max(1, _BLOCK // len(self._mean))
        return torch.cat([function((part[:, None] - self._mean) / self._std) @ self._mass for part in y.split(rows)])


def _inverse(law: _Mixture, low: float, high: float, u: Tensor) -> Tensor:
    """Quantiles by monotone cubic interpolation of the inverse distribution function, on a mesh of 8192 points."""
    from scipy.interpolate import PchipInterpolator  # not with the package: importing it takes longer than the rest

    y = torch.linspace(low, high, 8193, dtype=torch.float64)
    F = law.distribution(y)
    rising = torch.cat([torch.ones(1, dtype=torch.bool), F[1:] > F.cummax(0).values[:-1]])
    F, y = F[rising], y[rising]
    return torch.from_numpy(PchipInterpolator(F.numpy(), y.numpy())(u.numpy()))
