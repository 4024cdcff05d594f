"""Laws of samplers by randomised quasi-Monte Carlo, where no quadrature is in reach."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.quasirandom import SobolEngine

from sdesolve.diffusions.base import AbstractDiffusion
from sdesolve.oracle.recursion import Known, Recursion
from sdesolve.scores.mixture import GaussianMixture

REPLICATES = 8
_BITS = 30
_COUNTS = {1: 1 << 18, 2: 1 << 16}  # points of a replicate, by dimension


_Part = TypeVar("_Part")


class Measured(NamedTuple):
    """A distance between laws.

    Attributes:
        value: the distance.
        standard_error: 0 if it is known by quadrature; else that of randomised quasi-Monte Carlo, and the bias that
            noise gives a distance, together.
        bound: how far it is off at most if it is known by quadrature: by how much it changed from a coarser mesh.
    """

    value: float
    standard_error: float = 0.0
    bound: float = 0.0


def estimated(distance: Callable[[Sequence[_Part]], float], parts: Sequence[_Part]) -> Measured:
    """A distance from all of several independent parts of a law, with its error by leaving out each in turn."""
    n, value = len(parts), distance(parts)
    without = torch.tensor([distance([*parts[:r], *parts[r + 1 :]]) for r in range(n)], dtype=torch.float64)
    bias = (n - 1) * (float(without.mean()) - value)
    return Measured(value, math.hypot(bias, math.sqrt(float((n - 1) * without.var(correction=0)))))


class Particles:
    """The law of the last point with noise, ``x = mean + c z``, from ``REPLICATES`` independent sets of points.

    Array-RQMC: points are put in order of the state before every draw, and draw the next of a low-discrepancy sequence
    in that order, so that neighbours draw unlike numbers and the law of all points is followed far more closely than by
    as many independent ones. Every replicate is unbiased by itself, since its sequences are shifted by random digits at
    each draw. L'Ecuyer, Lecot and Tuffin 2008. The last draw is not made: the law is a mixture of its normals.

    Args:
        chain: the sampler.
        start: from uniform numbers ``(n, 1 + d)`` to states ``(n, d)`` at its start.
        shape: of states, ``(-1, *state)``.
        d: dimension.
    """

    def __init__(self, chain: Recursion, start: Callable[[Tensor], Tensor], shape: tuple[int, ...], d: int) -> None:
        self._chain, self._start, self._shape, self._d = chain, start, shape, d

    def means(self, replicate: int) -> Tensor:
        """Means of the last point with noise, ``(n, d)``."""
        d, n, stop = self._d, _COUNTS[self._d], self._chain.random[-1]
        generator = torch.Generator().manual_seed(replicate)
        sequence = _Ordered(n, d, generator)
        start = (SobolEngine(1 + d, scramble=True, seed=replicate).draw(n, dtype=torch.float64) + 0.5**31).clamp(max=1)
        x = self._start(start)
        known: Known = {0: (x, torch.zeros_like(x))}
        last = x
        for i, point in enumerate(self._chain.points[1:], 1):
            y = self._chain.mean(i, known)
            if i == stop:
                return y
            if point.c:
                order = sequence.order(last)
                known = {j: (v[order], s[order]) for j, (v, s) in known.items()}
                y = last = y[order] + point.c * torch.special.ndtri(sequence.draw())
            score = self._chain.score(i, y.reshape(self._shape)).reshape(n, d)
            known = {j: known[j] for j in self._chain.kept[i]} | {i: (y, score)}
        raise AssertionError


class _Ordered:
    """A Sobol sequence in ``2 d`` dimensions, ordered by the first half of them as states are, to draw the other half.

    On the line the order is that of numbers; in the plane columns of equally many points are ordered each for itself.
    """

    def __init__(self, n: int, d: int, generator: torch.Generator) -> None:
        points = SobolEngine(2 * d, scramble=False).draw(n, dtype=torch.float64)
        self._columns = 1 << (n.bit_length() - 1) // 2 if d == 2 else 1  # n is a power of 2
        self._generator = generator
        self._digits = (points[self.order(points[:, :d]), d:] * (1 << _BITS)).long()

    def order(self, x: Tensor) -> Tensor:
        """Indices of rows of ``x: (n, d)`` in order."""
        first = x[:, 0].argsort()
        if x.shape[1] == 1:
            return first
        columns = first.reshape(self._columns, -1)
        return columns.gather(1, x[columns, 1].argsort(1)).reshape(-1)

    def draw(self) -> Tensor:
        """Uniform numbers ``(n, d)``, shifted anew."""
        shift = torch.randint(1 << _BITS, (1, self._digits.shape[1]), generator=self._generator)
        return ((self._digits ^ shift).double() + 0.5) * 0.5**_BITS


def start_of(data: GaussianMixture, process: AbstractDiffusion, t: float, *, prior: bool) -> Callable[[Tensor], Tensor]:
    """From uniform numbers to states at the start: the first of them chooses a component."""
    d = data.means[0].numel()
    if prior:
        std = process.prior_at(t).std
        return lambda u: std * torch.special.ndtri(u[:, 1:])
    alpha, sigma = float(process.alpha(t)), float(process.sigma(t))
    covs = alpha**2 * data.covs + sigma**2 * torch.eye(d, dtype=torch.float64)
    factors, means = torch.linalg.cholesky(covs), alpha * data.means.reshape(-1, d)
    edges = data.weights.cumsum(0)[:-1].contiguous()

    def start(u: Tensor) -> Tensor:
        k = torch.bucketize(u[:, 0].contiguous(), edges)
        z = torch.special.ndtri(u[:, 1:])
        return means[k] + (factors[k] @ z[..., None])[..., 0]

    return start
