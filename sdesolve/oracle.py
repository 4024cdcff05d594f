"""Exact moments of discretised chains: what a sampler does to a Gaussian, with no Monte Carlo error."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple, final

import torch
from sdesolve_kernels import Stream, normal
from torch import Tensor

from sdesolve.brownian import AbstractNoise
from sdesolve.grids import check_grid
from sdesolve.scores.components import real, spectrum
from sdesolve.sde import AbstractSDE, AbstractSemilinear, Noise, is_matrix, noise_shape
from sdesolve.solve import solve
from sdesolve.solvers.base import AbstractSolver
from sdesolve.solvers.tabulated import AbstractTabulated

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
    chain = _Chain(sde, solver, grid, mean, every_step)
    if diagonal and chain.matrix_noise:
        raise ValueError("this diffusion is a matrix, which mixes components; pass diagonal=False")
    inputs = _Inputs(_initial_factor(mean, real(cov0, "cov0"), diagonal), chain.noise_shape, diagonal)

    centre = chain.run(torch.zeros(1, *mean.shape, dtype=torch.float64), _TableNoise(None))[:, 0]
    predicted = centre.clone()
    cov = torch.zeros(len(centre), *(mean.shape if diagonal else (mean.numel(),) * 2), dtype=torch.float64)
    rows = max(1, min(_BLOCK_ELEMENTS // mean.numel(), _KEPT_ELEMENTS // centre.numel()))
    for start, noise, weights in inputs.blocks(rows):
        response = chain.run(start, noise) - centre[:, None]
        predicted += (weights * response).sum(1)
        if diagonal:
            cov += response.square().sum(1)
        else:
            columns = response.reshape(*response.shape[:2], mean.numel())
            cov += columns.mT @ columns

    _check_affine(chain.run(*inputs.combined())[:, 0] - predicted, cov, centre, diagonal)
    return ChainMoments(centre, cov) if every_step else ChainMoments(centre[-1], cov[-1])


@final
class _Chain:
    """A sampler on a grid, as a map from displacements of the start and noise to states, ``(times, rows, *state)``."""

    def __init__(self, sde: AbstractSDE, solver: AbstractSolver, grid: Tensor, mean: Tensor, every_step: bool) -> None:
        self._sde, self._solver, self._grid, self._mean, self._every_step = sde, solver, grid, mean, every_step
        x = mean[None]
        g = None
        if sde.noise in (Noise.ADDITIVE, Noise.GENERAL):
            g = sde.diffusion(x, grid[0])
        draws = (len(grid) - 1) * _draws(sde, solver, grid)
        self.noise_shape = (0,) if sde.noise is Noise.NONE else (draws, *noise_shape(sde.noise, x, g))
        self.matrix_noise = g is not None and is_matrix(g, x)

    def run(self, displacement: Tensor, noise: AbstractNoise) -> Tensor:
        with torch.no_grad():
            return solve(
                self._sde,
                self._mean + displacement,
                grid=self._grid,
                solver=self._solver,
                noise=noise,
                save_at="grid" if self._every_step else None,
                backend="eager",
            ).xs


@final
class _Inputs:
    """All unit inputs of a chain, in blocks, and one random combination of them.

    Args:
        factor: displacements of the start, ``(rows, *state)``.
        noise_shape: ``(steps, *channels)``.
        together: all components share a row. Each then has random weights of its own, so that the combination shows
            an interaction of components as well.
    """

    def __init__(self, factor: Tensor, noise_shape: tuple[int, ...], together: bool) -> None:
        self._factor, self._together = factor, together
        self._noise_rows = noise_shape[0] if together else math.prod(noise_shape)
        weights = factor.shape if together else (len(factor), *(1,) * (factor.ndim - 1))
        self._start_weights = _random(0, math.prod(weights)).reshape(weights)
        self._noise_weights = _random(1, math.prod(noise_shape)).reshape(noise_shape)

    def blocks(self, rows: int) -> Iterator[tuple[Tensor, AbstractNoise, Tensor]]:
        """Displacements ``(rows, *state)``, noise, and weights in the combination, which broadcast to both."""
        for first in range(0, len(self._factor), rows):
            part = slice(first, first + rows)
            yield self._factor[part], _TableNoise(None), self._start_weights[part]
        weights = self._noise_weights
        if not self._together:
            weights = weights.reshape(-1, *(1,) * (self._factor.ndim - 1))
        for first in range(0, self._noise_rows, rows):
            some = weights[first : first + rows]
            still = self._factor.new_zeros(len(some), *self._factor.shape[1:])
            yield still, _UnitNoise(first, together=self._together), some

    def combined(self) -> tuple[Tensor, AbstractNoise]:
        """The random combination: a displacement of one row, and its noise."""
        return (self._start_weights * self._factor).sum(0, keepdim=True), _TableNoise(self._noise_weights)


class _OracleNoise(AbstractNoise):
    """Noise that is a table of given numbers."""

    @final
    def bridge(
        self,
        step: int,
        theta: float,
        shape: tuple[int, ...],
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> Tensor:
        raise NotImplementedError(
            "the moments of a chain are known for solvers that use increments of the Brownian motion alone; this one "
            "asked for the path inside a step"
        )


@final
class _TableNoise(_OracleNoise):
    """The same increments for every row: ``weights[k] sqrt|dt_k|``, or none."""

    def __init__(self, weights: Tensor | None) -> None:
        self._weights = weights

    def increments(
        self,
        times: Tensor,
        shape: tuple[int, ...],
        *,
        step: int = 0,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> Tensor:
        dW = torch.zeros(len(times) - 1, *shape, dtype=dtype, device=device)
        if self._weights is not None:
            scale = times.diff().abs().sqrt().reshape(-1, *(1,) * (len(shape) - 1))
            dW += (self._weights[step : step + len(dW)] * scale).unsqueeze(1).to(dW)
        return dW


@final
class _UnitNoise(_OracleNoise):
    """One input of size ``sqrt|dt|`` per row: row ``i`` has number ``first + i`` of all pairs of step and channel.

    With ``together`` it has all channels of step ``first + i``.
    """

    def __init__(self, first: int, *, together: bool) -> None:
        self._first, self._together = first, together

    def increments(
        self,
        times: Tensor,
        shape: tuple[int, ...],
        *,
        step: int = 0,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> Tensor:
        rows, *channels = shape
        number = torch.arange(self._first, self._first + rows)
        m = 1 if self._together else math.prod(channels)
        k = number // m - step
        here = ((k >= 0) & (k < len(times) - 1)).nonzero()[:, 0]
        dW = torch.zeros(len(times) - 1, rows, m, dtype=dtype, device=device)
        dW[k[here], here, number[here] % m] = times.diff().abs().sqrt()[k[here]].to(dW)
        if self._together:
            return dW.reshape(*dW.shape[:2], *(1,) * len(channels)).expand(-1, *shape)
        return dW.reshape(-1, *shape)


def _draws(sde: AbstractSDE, solver: AbstractSolver, grid: Tensor) -> int:
    """Independent draws of noise a step."""
    if isinstance(solver, AbstractTabulated) and isinstance(sde, AbstractSemilinear):
        table = solver.table(sde, grid)
        return 1 if table is None else table.draws
    return 1


def _initial_factor(mean: Tensor, cov0: Tensor, diagonal: bool) -> Tensor:
    """Rows whose squares add up to ``cov0``: ``(rows, *state)``."""
    values, vectors = spectrum(cov0, tuple(mean.shape), "cov0")
    if diagonal:
        if vectors is not None:
            raise ValueError("with diagonal=True, cov0 must be a number or variances of the shape of mean0")
        return values.sqrt().expand(mean.numel()).reshape(1, *mean.shape)
    scaled = torch.diag(values.sqrt().expand(mean.numel())) if vectors is None else (vectors * values.sqrt()).mT
    return scaled.reshape(-1, *mean.shape)


def _random(path: int, count: int) -> Tensor:
    return normal(1, count, seed=0, stream=Stream.PROBES, first_path=path, dtype=torch.float64)[0]


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
