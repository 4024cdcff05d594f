"""The exact distance between what a sampler draws and what it should draw."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from sdesolve._internal.arguments import kind_of
from sdesolve.diffusions.base import AbstractDiffusion
from sdesolve.grids import check_grid
from sdesolve.metrics import bures_wasserstein, gaussian_kl
from sdesolve.oracle.inputs import OracleNoise
from sdesolve.oracle.moments import ChainMoments, affine_moments, chain_moments
from sdesolve.oracle.particles import Measured
from sdesolve.oracle.plane import variation_2d
from sdesolve.oracle.samplers import Sampler, as_sampler, checked_sampler
from sdesolve.oracle.transport import wasserstein_to_mixture
from sdesolve.scores.components import spectrum
from sdesolve.scores.gaussian import Gaussian, Moments
from sdesolve.scores.mixture import GaussianMixture
from sdesolve.solvers.base import AbstractSolver


def error(
    sampler: Sampler | AbstractSolver,
    process: AbstractDiffusion,
    data: Gaussian | GaussianMixture,
    grid: Tensor,
    *,
    prior: bool = False,
    denoise: bool = False,
) -> float:
    r"""How far the law that ``sampler`` ends with is from the true one.

    What is measured depends on the data:

    ======================  ========================================================================================
    `Gaussian`              2-Wasserstein distance over the true law's standard deviation ``sqrt(tr C)``; exact
    mixture of dimension 1  the same, by quadrature
    mixture of dimension 2  total variation distance, by quadrature
    ======================  ========================================================================================

    On a mixture the sampler must be deterministic, or take combinations of states, scores and noise with coefficients
    that depend on time alone, as solvers of this library do, whatever it remembers and however often it draws in a
    step; or its steps must be ``m(x) + c z`` each for itself, with any ``m``. Densities, or joint densities of what is
    remembered, are followed from draw to draw by quadrature. Where that is out of reach (on the line for SDE samplers
    of third order in few steps; in the plane for all with memory) the value is an estimate by randomised
    quasi-Monte Carlo: `measure` says so, with a standard error.

    Args:
        sampler: a solver, or a function as `Sampler` describes.
        process: the forward diffusion.
        data: the law of clean data.
        grid: decreasing times ``(steps + 1,)``.
        prior: start from ``process.prior``, as users do, and not from the true law at the start of the grid.
        denoise: end with Tweedie's formula, and compare with clean data, not with the law at the end of the grid. For
            the mixture of dimension 2 it must be false.

    Raises:
        ValueError: a sampler that is not affine (on a Gaussian) or not of the kinds above (on a mixture); a mixture of
            dimension 3 or more; a law that no mesh within reach resolves, that loses mass, or that samples do not have.
        TypeError: other data.
    """
    return measure(sampler, process, data, grid, prior=prior, denoise=denoise).value


def measure(
    sampler: Sampler | AbstractSolver,
    process: AbstractDiffusion,
    data: Gaussian | GaussianMixture,
    grid: Tensor,
    *,
    prior: bool = False,
    denoise: bool = False,
) -> Measured:
    """`error`, of the same arguments, with its standard error or a bound from a coarser mesh; both 0 if exact."""
    sampler, grid = checked_sampler(sampler), check_grid(grid)
    if isinstance(data, Gaussian):
        law = sampled_law(sampler, process, data, grid, prior=prior, denoise=denoise)
        target = true_law(process, data, grid, denoise=denoise)
        return Measured(float(bures_wasserstein(*law, *target) / total_variance(target).sqrt()))
    if not isinstance(data, GaussianMixture):
        raise TypeError(f"data must be a Gaussian or a GaussianMixture, got {kind_of(data)}")
    d = data.means[0].numel()
    if d == 1:
        return wasserstein_to_mixture(sampler, process, data, grid, prior=prior, denoise=denoise)
    if d == 2 and not denoise:
        return variation_2d(sampler, process, data, grid, prior=prior)
    raise ValueError(
        "errors on a mixture are known in dimension 1, and in dimension 2 without denoising; got dimension "
        f"{d}{' and denoise=True' if denoise else ''}. On a Gaussian they are known in any dimension"
    )


class StepErrors(NamedTuple):
    """Exact distances at every grid point, ``(steps + 1,)``, float64.

    Attributes:
        times: the grid.
        wasserstein: 2-Wasserstein distance over the true law's standard deviation there.
        kl: divergence from the true law, in nats.
    """

    times: Tensor
    wasserstein: Tensor
    kl: Tensor


def step_errors(
    solver: AbstractSolver,
    process: AbstractDiffusion,
    data: Gaussian,
    grid: Tensor,
    *,
    stochasticity: float | None = None,
    prior: bool = False,
) -> StepErrors:
    """How far a solver's law is from the true one at each point of its grid, for Gaussian data: where errors arise.

    Args:
        solver: a fixed-step solver.
        process: the forward diffusion.
        data: the law of clean data.
        grid: decreasing times ``(steps + 1,)``, all above 0.
        stochasticity: as `sample`; by default what the solver is made for.
        prior: start from ``process.prior``, not from the true law.

    Raises:
        ValueError: the chain is not affine.
        TypeError: not such a solver, or other data.
    """
    if not isinstance(data, Gaussian):
        raise TypeError(f"laws at each step are known for Gaussian data, got {kind_of(data)}; error takes mixtures too")
    grid, start = check_grid(grid), _start(process, data, grid, prior=prior)
    sde = as_sampler(solver, stochasticity).equation(process, data.score(process))
    laws = chain_moments(sde, solver, grid, *start, diagonal=_elementwise(data), every_step=True)
    rows = []
    for t, mean, cov in zip(grid.tolist(), laws.mean, laws.cov, strict=True):
        truth = data.moments(process, t)
        distance = bures_wasserstein(mean, cov, *truth) / total_variance(truth).sqrt()
        rows.append(torch.stack([distance, gaussian_kl(mean, cov, *truth)]))
    return StepErrors(grid, *torch.stack(rows, 1))


def sampled_law(
    sampler: Sampler, process: AbstractDiffusion, data: Gaussian, grid: Tensor, *, prior: bool, denoise: bool
) -> ChainMoments:
    """Mean and covariance of what ``sampler`` draws: variances alone where the data's components are independent."""
    score = data.score(process)

    def chain(x: Tensor, noise: OracleNoise) -> Tensor:
        x = sampler(process, score, x, grid, noise)
        return score.denoise(x, grid[-1]) if denoise else x

    return affine_moments(chain, *_start(process, data, grid, prior=prior), diagonal=_elementwise(data))


def _elementwise(data: Gaussian) -> bool:
    return spectrum(data.cov, data.state_shape)[1] is None


def _start(process: AbstractDiffusion, data: Gaussian, grid: Tensor, *, prior: bool) -> Moments:
    if prior:
        variance = process.prior_at(float(grid[0])).std ** 2
        return Moments(torch.zeros_like(data.mean), torch.tensor(variance, dtype=torch.float64))
    return data.moments(process, float(grid[0]))


def true_law(process: AbstractDiffusion, data: Gaussian, grid: Tensor, *, denoise: bool) -> Moments:
    """What should be drawn: clean data if the sampler ends with it, else the noised law at the end of the grid."""
    clean = denoise or float(grid[-1]) == 0.0
    return Moments(data.mean, data.cov) if clean else data.moments(process, float(grid[-1]))


def total_variance(law: Moments) -> Tensor:
    """``tr C``."""
    values, vectors = spectrum(law.cov, tuple(law.mean.shape))
    del vectors
    return values.expand(law.mean.numel()).sum()
