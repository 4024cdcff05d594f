"""The exact distance between what a sampler draws and what it should draw."""

from __future__ import annotations

import torch
from torch import Tensor

from sdesolve.diffusions.base import AbstractDiffusion
from sdesolve.grids import check_grid
from sdesolve.metrics import bures_wasserstein
from sdesolve.oracle.inputs import OracleNoise
from sdesolve.oracle.moments import ChainMoments, affine_moments
from sdesolve.oracle.plane import variation_2d
from sdesolve.oracle.samplers import Sampler, as_sampler
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
    r"""How far the law that ``sampler`` ends with is from the true one, with no Monte Carlo error.

    What is measured depends on the data:

    ======================  ========================================================================================
    `Gaussian`              2-Wasserstein distance over the true law's standard deviation ``sqrt(tr C)``; exact
    mixture of dimension 1  the same, from the sampler's law by quantiles of the start or by quadrature
    mixture of dimension 2  total variation distance, by quadrature
    ======================  ========================================================================================

    On a mixture the sampler must be deterministic, or a solver of this library whose steps have no memory and add noise
    once (`EulerMaruyama`, `ReverseDiffusion`, `Ancestral`, `DDIM`, and such with a `LangevinCorrector` of fixed step or
    ``norms="level"``): the quadrature follows the density from step to step.

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
            dimension 3 or more.
        TypeError: other data.
    """
    if isinstance(sampler, AbstractSolver):
        sampler = as_sampler(sampler)
    grid = check_grid(grid)
    if isinstance(data, Gaussian):
        law = sampled_law(sampler, process, data, grid, prior=prior, denoise=denoise)
        target = true_law(process, data, grid, denoise=denoise)
        return float(bures_wasserstein(*law, *target) / total_variance(target).sqrt())
    if not isinstance(data, GaussianMixture):
        raise TypeError(f"data must be a Gaussian or a GaussianMixture, got {type(data).__name__}")
    d = data.means[0].numel()
    if d == 1:
        return wasserstein_to_mixture(sampler, process, data, grid, prior=prior, denoise=denoise)
    if d == 2 and not denoise:
        return variation_2d(sampler, process, data, grid, prior=prior)
    raise ValueError(
        "errors on a mixture are known in dimension 1, and in dimension 2 without denoising; got dimension "
        f"{d}{' and denoise=True' if denoise else ''}. On a Gaussian they are known in any dimension"
    )


def sampled_law(
    sampler: Sampler, process: AbstractDiffusion, data: Gaussian, grid: Tensor, *, prior: bool, denoise: bool
) -> ChainMoments:
    """Mean and covariance of what ``sampler`` draws: variances alone where the data's components are independent."""
    score = data.score(process)
    elementwise = spectrum(data.cov, data.state_shape)[1] is None
    start = data.moments(process, float(grid[0]))
    if prior:
        start = Moments(torch.zeros_like(start.mean), torch.tensor(process.prior.std**2, dtype=torch.float64))

    def chain(x: Tensor, noise: OracleNoise) -> Tensor:
        x = sampler(process, score, x, grid, noise)
        return score.denoise(x, grid[-1]) if denoise else x

    return affine_moments(chain, *start, diagonal=elementwise)


def true_law(process: AbstractDiffusion, data: Gaussian, grid: Tensor, *, denoise: bool) -> Moments:
    """What should be drawn: clean data if the sampler ends with it, else the noised law at the end of the grid."""
    clean = denoise or float(grid[-1]) == 0.0
    return Moments(data.mean, data.cov) if clean else data.moments(process, float(grid[-1]))


def total_variance(law: Moments) -> Tensor:
    """``tr C``."""
    values, vectors = spectrum(law.cov, tuple(law.mean.shape))
    del vectors
    return values.expand(law.mean.numel()).sum()
