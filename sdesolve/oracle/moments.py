"""Exact moments of discretised chains: what a sampler does to a Gaussian, with no Monte Carlo error."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from sdesolve._internal.arguments import real
from sdesolve.grids import check_grid
from sdesolve.integrate.save_at import SaveAt
from sdesolve.integrate.solve import solve
from sdesolve.oracle.inputs import OracleNoise, Silence, UnitInputs
from sdesolve.scores.components import spectrum
from sdesolve.sde import AbstractSDE, Noise, is_matrix
from sdesolve.solvers.base import AbstractSolver

# Rows go through in blocks of so many elements, which stay in cache and below the size at which torch starts threads:
# a thousand steps of a 64-dimensional elementwise chain take 0.7 s like this and took 14 s in one block on a busy CPU.
# What is kept of a block, every step of it perhaps, is limited for memory.
_BLOCK_ELEMENTS, _KEPT_ELEMENTS = 1 << 15, 1 << 24
_AFFINE_TOLERANCE = 1e-8


class ChainMoments(NamedTuple):
    """Mean and covariance of a chain at its end, or at every grid point with a leading axis of ``steps + 1``; float64.

    Attributes:
        mean: ``(*state)``.
        cov: ``(d, d)`` over the flattened state; variances ``(*state)`` from ``diagonal=True``.
    """

    mean: Tensor
    cov: Tensor


def chain_moments(
    sde: AbstractSDE,
    solver: AbstractSolver,
    grid: Tensor,
    mean0: Tensor | float,
    cov0: Tensor | float,
    *,
    diagonal: bool = False,
    every_step: bool = False,
) -> ChainMoments:
    r"""The exact mean and covariance of what ``solver`` makes of ``x_0 ~ N(mean0, cov0)``.

    If drift is affine in ``x`` and diffusion independent of it, as for a forward process or for the reversal of one
    with `Gaussian` data, the end of the chain is affine in its inputs, ``x_N = c + A x_0 + sum_k B_k dW_k``. The
    sampler itself is run on a batch whose rows have one unit input each (a column of a factor of ``cov0``, or one noise
    channel of one step), and on one row without any: differences to that row are the columns of ``A`` and ``B_k``, and
    sums of their squares the covariance. One more row with a random combination of all inputs proves the chain affine.

    Args:
        sde: what the chain integrates: an SDE, a forward process, a reverse SDE or an ODE.
        solver: the scheme.
        grid: times ``(steps + 1,)``.
        mean0: ``(*state)``.
        cov0: a number, variances ``(*state)``, or ``(d, d)`` over the flattened state; may be singular.
        diagonal: drift and diffusion act on each component alone and ``cov0`` is no matrix. Then all components share a
            row and ``steps + 3`` rows do, rather than ``d (steps + 1) + 2``.
        every_step: moments at every grid point, not at the end alone.

    Raises:
        ValueError: shapes that do not fit; the chain is not affine, or with ``diagonal`` not elementwise.

    Example:
        >>> ou = OU()
        >>> chain_moments(ou, EulerMaruyama(), grids.uniform(0.0, 20.0, 200), 0.0, 1.0).cov  # 1 / (1 - 0.1 / 2)
        tensor([[1.0526]], dtype=torch.float64)
    """
    mean, grid = real(mean0, "mean0"), check_grid(grid)
    if grid.ndim != 1:
        raise ValueError(f"the moments of a chain need one grid for all rows, (steps + 1,), got {tuple(grid.shape)}")
    if (
        diagonal
        and sde.noise in (Noise.ADDITIVE, Noise.GENERAL)
        and is_matrix(sde.diffusion(x := mean[None], grid[0]), x)
    ):
        raise ValueError("this diffusion is a matrix, which mixes components; pass diagonal=False")

    def states(x: Tensor, noise: OracleNoise) -> Tensor:
        save_at: SaveAt = "grid" if every_step else None
        return solve(sde, x, grid=grid, solver=solver, noise=noise, save_at=save_at, backend="eager").xs

    moments = _moments(states, mean, real(cov0, "cov0"), diagonal)
    return moments if every_step else ChainMoments(moments.mean[-1], moments.cov[-1])


def affine_moments(
    chain: Callable[[Tensor, OracleNoise], Tensor],
    mean0: Tensor | float,
    cov0: Tensor | float,
    *,
    diagonal: bool = False,
) -> ChainMoments:
    """The exact mean and covariance of ``chain(x_0, noise)`` for ``x_0 ~ N(mean0, cov0)``, whatever ``chain`` is.

    The same method for any function that is affine in its start and in its noise: a sampler from elsewhere, a
    corrector, a Markov chain.

    Args:
        chain: takes states ``(rows, *state)``, float64, to states of that shape, each row for itself. ``noise`` is an
            `OracleNoise`: call it for the next standard normals, or use it as the noise of a `solve`.
        mean0: ``(*state)``.
        cov0: a number, variances ``(*state)``, or ``(d, d)`` over the flattened state; may be singular.
        diagonal: the chain acts on each component alone and ``cov0`` is no matrix.

    Raises:
        ValueError: as `chain_moments`.

    Example:
        >>> affine_moments(lambda x, noise: 0.8 * x + 0.6 * noise(), 0.0, 1.0).cov
        tensor([[1.]], dtype=torch.float64)
    """
    moments = _moments(lambda x, noise: chain(x, noise)[None], real(mean0, "mean0"), real(cov0, "cov0"), diagonal)
    return ChainMoments(moments.mean[0], moments.cov[0])


@torch.no_grad()
def _moments(
    states: Callable[[Tensor, OracleNoise], Tensor], mean: Tensor, cov0: Tensor, diagonal: bool
) -> ChainMoments:
    """Moments at all times of ``states``, which gives ``(times, rows, *state)``."""
    factor, heard = _initial_factor(mean, cov0, diagonal), Silence()
    start = mean[None]
    centre = states(start, OracleNoise(heard, tuple(start.shape)))[:, 0]
    inputs = UnitInputs(factor, heard, diagonal)
    predicted = centre.clone()
    cov = torch.zeros(len(centre), *(mean.shape if diagonal else (mean.numel(),) * 2), dtype=torch.float64)
    rows = max(1, min(_BLOCK_ELEMENTS // mean.numel(), _KEPT_ELEMENTS // centre.numel()))
    for displacement, noise, weights in inputs.blocks(rows):
        response = states(mean + displacement, noise) - centre[:, None]
        predicted += (weights * response).sum(1)
        if diagonal:
            cov += response.square().sum(1)
        else:
            columns = response.reshape(*response.shape[:2], mean.numel())
            cov += columns.mT @ columns
    displacement, noise = inputs.combined()
    _check_affine(states(mean + displacement, noise)[:, 0] - predicted, cov, centre, diagonal)
    return ChainMoments(centre, cov)


def _initial_factor(mean: Tensor, cov0: Tensor, diagonal: bool) -> Tensor:
    """Rows whose squares add up to ``cov0``: ``(rows, *state)``."""
    values, vectors = spectrum(cov0, tuple(mean.shape), "cov0")
    if diagonal:
        if vectors is not None:
            raise ValueError("with diagonal=True, cov0 must be a number or variances of the shape of mean0")
        return values.sqrt().expand(mean.numel()).reshape(1, *mean.shape)
    scaled = torch.diag(values.sqrt().expand(mean.numel())) if vectors is None else (vectors * values.sqrt()).mT
    return scaled.reshape(-1, *mean.shape)


def _check_affine(error: Tensor, cov: Tensor, centre: Tensor, diagonal: bool) -> None:
    scale = float((cov if diagonal else cov.diagonal(dim1=-2, dim2=-1)).amax().sqrt()) + float(centre.abs().amax())
    worst = float(error.abs().amax())
    if not worst <= _AFFINE_TOLERANCE * scale:
        also = ", or its components interact: try diagonal=False" if diagonal else ""
        raise ValueError(
            f"this chain is not affine in its start and noise: a combination of inputs misses the same combination of "
            f"outputs by {worst:.3g}, at states of size {scale:.3g}{also}. Exact moments need a drift that is affine "
            "in x, a diffusion that does not depend on it, and step sizes that do not depend on the state"
        )
