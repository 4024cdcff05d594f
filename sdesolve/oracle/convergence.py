"""Tables of exact errors against network evaluations, with the order they show."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Sequence
from typing import final

import torch
from torch import Tensor

from sdesolve._internal.arguments import kind_of, short, whole_number
from sdesolve.diffusions.base import AbstractDiffusion
from sdesolve.oracle.errors import measure
from sdesolve.oracle.inputs import OracleNoise, Silence
from sdesolve.oracle.samplers import Sampler, checked_sampler
from sdesolve.reverse import Score
from sdesolve.scores.base import check_process
from sdesolve.scores.gaussian import Gaussian
from sdesolve.scores.mixture import GaussianMixture
from sdesolve.solvers.base import AbstractSolver

_PROBED = (8, 12)  # steps from which evaluations a step are read off


@dataclasses.dataclass(frozen=True)
class Convergence:
    """What `convergence` returns; prints as a table.

    Attributes:
        name: of the sampler.
        steps: steps of each grid.
        nfes: score evaluations that a sample took on each.
        errors: as `error`.
        standard_errors: of those that are estimates, 0 for the others; empty for none.
    """

    name: str
    steps: tuple[int, ...]
    nfes: tuple[int, ...]
    errors: tuple[float, ...]
    standard_errors: tuple[float, ...] = ()

    @property
    def order(self) -> float:
        """Slope of ``-log error`` against ``log steps``, by least squares; nan for fewer than two grids."""
        if len(self.steps) < 2 or min(self.errors) <= 0:
            return math.nan
        x, y = (torch.tensor(v, dtype=torch.float64).log() for v in (self.steps, self.errors))
        x = x - x.mean()
        return -float((x * y).sum() / x.square().sum())

    def __str__(self) -> str:
        rows = [f"{'evaluations':>12s} {'steps':>8s} {'error':>12s} {'order':>8s}"]
        for k, (nfe, steps, error_) in enumerate(zip(self.nfes, self.steps, self.errors, strict=True)):
            local = ""
            if k and error_ > 0:
                local = f"{math.log(self.errors[k - 1] / error_) / math.log(steps / self.steps[k - 1]):8.2f}"
            estimate = self.standard_errors[k] if self.standard_errors else 0.0
            note = f"   estimate, +- {estimate:.1e}" if estimate else ""
            rows.append(f"{nfe:12d} {steps:8d} {error_:12.4e} {local:>8s}{note}")
        return "\n".join([self.name, *rows, f"fitted order {self.order:.2f}"])


def convergence(
    sampler: Sampler | AbstractSolver,
    process: AbstractDiffusion,
    data: Gaussian | GaussianMixture,
    nfes: Sequence[int],
    *,
    grid: Callable[[int], Tensor] | None = None,
    prior: bool = False,
    denoise: bool = False,
    name: str | None = None,
) -> Convergence:
    """Exact errors of a sampler for several numbers of score evaluations, and the order they show.

    By default the sampler starts from the true law at the start of the grid and is compared with that at its end, so
    that the errors are those of discretisation alone and go to 0; with ``prior`` and ``denoise`` they are those of the
    samples that users get, which stop falling where starting from the prior costs more.

    Args:
        sampler: a solver of this library, or any function as `Sampler` describes.
        process: the forward diffusion.
        data: the law of clean data.
        nfes: numbers of score evaluations, increasing; each grid is the longest that does not exceed its number.
        grid: from a number of steps to decreasing times; ``process.time_grid`` by default.
        prior: start from ``process.prior``.
        denoise: end with Tweedie's formula, which is counted, and compare with clean data.
        name: for the table.

    Raises:
        ValueError: as `error`; ``nfes`` that do not increase, or too few for one step.
        TypeError: as `error`.

    Example:
        >>> def heun(process, score, x, grid, noise):  # a sampler from elsewhere
        ...     f = process.probability_flow(score).drift
        ...     for t, u in zip(grid[:-1], grid[1:]):
        ...         k = f(x, t)
        ...         x = x + (u - t) / 2 * (k + f(x + (u - t) * k, u))
        ...     return x
        >>> print(convergence(heun, VP(), Gaussian(torch.zeros(2), 0.25), [32, 64, 128]))
    """
    check_process(process)
    name, sampler = name or _name(sampler), checked_sampler(sampler)
    if not isinstance(data, Gaussian | GaussianMixture):
        raise TypeError(f"data must be a Gaussian or a GaussianMixture, got {kind_of(data)}")
    if isinstance(nfes, int):
        raise TypeError(f"nfes must be increasing numbers of evaluations, such as [32, 64, 128], got {short(nfes)}")
    if grid is not None and not callable(grid):
        raise TypeError(
            f"grid must be a function from a number of steps to times, such as lambda n: karras_sigma(process, n), "
            f"got {kind_of(grid)}; for one grid there is oracle.error"
        )
    make = process.time_grid if grid is None else grid
    wanted = [whole_number(n, "nfes", 1) for n in nfes]
    if not wanted or any(b <= a for a, b in itertools.pairwise(wanted)):
        raise ValueError(f"nfes must be increasing numbers of evaluations, got {wanted}")
    low, high = (evaluations(sampler, process, data, make(n)) + denoise for n in _PROBED)
    each = (high - low) / (_PROBED[1] - _PROBED[0])
    if each <= 0:
        raise ValueError("this sampler makes no more score evaluations on longer grids: does it use its grid?")
    steps = [math.floor((n - low) / each + _PROBED[0] + 1e-9) for n in wanted]
    if steps[0] < 1:
        raise ValueError(f"{wanted[0]} evaluations are too few for one step of this sampler")
    counted, errors = [], []
    for n in steps:
        counted.append(evaluations(sampler, process, data, make(n)) + denoise)
        errors.append(measure(sampler, process, data, make(n), prior=prior, denoise=denoise))
    values, deviations, _ = zip(*errors, strict=True)
    return Convergence(name, tuple(steps), tuple(counted), values, deviations)


def evaluations(sampler: Sampler, process: AbstractDiffusion, data: Gaussian | GaussianMixture, grid: Tensor) -> int:
    """Score evaluations of one run, counted."""
    score = _Counted(data.score(process))
    x = torch.zeros(1, *data.state_shape, dtype=torch.float64)
    with torch.no_grad():
        sampler(process, score, x, grid, OracleNoise(Silence(), tuple(x.shape)))
    return score.calls


@final
class _Counted:
    def __init__(self, score: Score) -> None:
        self._score, self.calls = score, 0

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        self.calls += 1
        return self._score(x, t)


def _name(sampler: Sampler | AbstractSolver) -> str:
    return (
        repr(sampler) if isinstance(sampler, AbstractSolver) else getattr(sampler, "__name__", type(sampler).__name__)
    )
