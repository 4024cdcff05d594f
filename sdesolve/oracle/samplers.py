"""What the oracle takes for a sampler, and how it looks at one step of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple, Protocol, final

import torch
from torch import Tensor

from sdesolve._internal.arguments import kind_of
from sdesolve.brownian import AbstractNoise
from sdesolve.diffusions.base import AbstractDiffusion
from sdesolve.integrate.solve import solve
from sdesolve.oracle.inputs import AbstractNumbers, Constant, OracleNoise, Silence
from sdesolve.reverse import ProbabilityFlow, ReverseSDE, Score
from sdesolve.scores.mixture import GaussianMixture
from sdesolve.solvers.base import AbstractSolver

_SAME = 1e-9  # of the size of the states


class Sampler(Protocol):
    """Any sampler, of this library or not, as the oracle runs it."""

    def __call__(
        self, process: AbstractDiffusion, score: Score, x: Tensor, grid: Tensor, noise: OracleNoise, /
    ) -> Tensor:
        """States at the end of ``grid`` from states ``x`` at its start.

        Args:
            process: the forward diffusion.
            score: ``grad_x log p_t(x)``, a function of ``(x, t)``.
            x: ``(rows, *state)``, float64; each row must go its own way.
            grid: decreasing times ``(steps + 1,)``, float64.
            noise: call it for standard normals of the shape of ``x``, new ones at each call.
        """


@final
class SolverSampler:
    """A solver of this library as a `Sampler`."""

    def __init__(self, solver: AbstractSolver, stochasticity: float | None = None) -> None:
        if not isinstance(solver, AbstractSolver) or solver.controller is not None:
            raise TypeError(f"solver must be a fixed-step solver such as EulerMaruyama(), got {kind_of(solver)}")
        self.solver = solver
        self.stochasticity = solver.sampling_stochasticity if stochasticity is None else stochasticity

    def equation(self, process: AbstractDiffusion, score: Score) -> ReverseSDE | ProbabilityFlow:
        """What the solver integrates."""
        q = self.stochasticity
        return process.probability_flow(score) if q == 0 else process.reverse(score, q)

    def __call__(
        self, process: AbstractDiffusion, score: Score, x: Tensor, grid: Tensor, noise: AbstractNoise, /
    ) -> Tensor:
        sde = self.equation(process, score)
        return solve(sde, x, grid=grid, solver=self.solver, noise=noise, backend="eager").x1


def as_sampler(solver: AbstractSolver, stochasticity: float | None = None) -> SolverSampler:
    """The sampler that a solver makes of a reverse SDE or, with ``stochasticity = 0``, of the probability flow.

    Args:
        solver: a fixed-step solver.
        stochasticity: as `sample`; by default what the solver is made for.

    Raises:
        TypeError: not such a solver.
    """
    return SolverSampler(solver, stochasticity)


def checked_sampler(sampler: Sampler | AbstractSolver) -> Sampler:
    """A solver as the sampler that it makes, and a function as it is.

    Raises:
        TypeError: neither.
    """
    if isinstance(sampler, AbstractSolver):
        return SolverSampler(sampler)
    if isinstance(sampler, type) or not callable(sampler):
        raise TypeError(f"sampler must be a solver such as DDIM() or a function, got {kind_of(sampler)}")
    return sampler


def is_deterministic(sampler: Sampler, process: AbstractDiffusion, data: GaussianMixture, grid: Tensor) -> bool:
    """Whether a run of ``sampler`` asks for no noise."""
    heard = Silence()
    x = torch.ones(1, *data.state_shape, dtype=torch.float64)
    sampler(process, data.score(process), x, grid, OracleNoise(heard, tuple(x.shape)))
    return not heard.draws


class Step(NamedTuple):
    """One step as a Gaussian transition, ``x' ~ N(mean, std^2 I)``.

    Attributes:
        mean: ``(rows, *state)`` for the states the step was looked at.
        std: of the noise, the same for all states.
    """

    mean: Tensor
    std: float


Look = Callable[[Tensor], Step]


def gaussian_steps(sampler: Sampler, process: AbstractDiffusion, data: GaussianMixture, grid: Tensor) -> Iterator[Look]:
    """Each step of ``sampler`` in turn, as a function that looks at it from given states; ``m`` may be any function.

    Raises:
        ValueError: the sampler's steps are not Gaussian transitions: they remember earlier ones, draw more than once,
            or their noise goes through the score.
    """
    score = data.score(process)
    _check_memoryless(sampler, process, data, grid)
    for k in range(len(grid) - 1):
        yield _looked_at(sampler, process, score, grid[k : k + 2])


def _looked_at(sampler: Sampler, process: AbstractDiffusion, score: Score, grid: Tensor) -> Look:
    def run(x: Tensor, numbers: AbstractNumbers) -> Tensor:
        return sampler(process, score, x, grid, OracleNoise(numbers, tuple(x.shape)))

    def look(x: Tensor) -> Step:
        heard = Silence()
        mean = run(x, heard)
        if sum(heard.draws.values()) > 1:
            raise ValueError(f"this sampler draws noise {sum(heard.draws.values())} times a step; {EXPECTED}")
        return _step(mean, [run(x, Constant(z)) for z in (1.0, -2.0)])

    return look


def _step(mean: Tensor, shifted: list[Tensor]) -> Step:
    by_one, by_two = ((y - mean) / z for y, z in zip(shifted, (1.0, -2.0), strict=True))
    std = by_one.flatten()[0]
    if not bool(((torch.stack([by_one, by_two]) - std).abs() <= _SAME * (std.abs() + mean.abs().amax())).all()):
        raise ValueError(f"the noise in a step of this sampler depends on the state; {EXPECTED}")
    return Step(mean, abs(float(std)))


def _check_memoryless(sampler: Sampler, process: AbstractDiffusion, data: GaussianMixture, grid: Tensor) -> None:
    score, d = data.score(process), data.means[0].numel()
    x = float(process.sigma(grid[0])) * torch.linspace(-1.0, 1.0, 3 * d, dtype=torch.float64).reshape(
        3, *data.state_shape
    )

    def run(x: Tensor, times: Tensor) -> Tensor:
        return sampler(process, score, x, times, OracleNoise(Silence(), tuple(x.shape)))

    whole, parts = run(x, grid), x
    for k in range(len(grid) - 1):
        parts = run(parts, grid[k : k + 2])
    if not bool(((whole - parts).abs() <= 1e-6 * (whole.abs() + 1e-3)).all()):
        raise ValueError(f"the steps of this sampler depend on earlier ones or on the whole grid; {EXPECTED}")


EXPECTED = (
    "on mixtures the oracle knows deterministic samplers, ones that take combinations of states, scores and noise with "
    "coefficients that depend on time alone, as all of this library do, and ones whose steps are x' = m(x) + c z each "
    "for itself. On Gaussian data it knows all that are affine"
)
