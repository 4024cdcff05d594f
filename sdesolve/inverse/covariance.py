"""Guidance that knows how uncertain the denoised state is."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import final

import torch
from torch import Tensor

from sdesolve._internal.arguments import whole_number
from sdesolve.diffusions.base import AbstractDiffusion
from sdesolve.inverse.base import AbstractPosteriorScore
from sdesolve.inverse.operators import AbstractOperator
from sdesolve.reverse import Score
from sdesolve.sde import per_sample


@final
class PiGDM(AbstractPosteriorScore):
    r"""``score + J^T A^T (r_t^2 A A^T + noise_std^2 I)^-1 (y - A x_hat)``, ``J = d x_hat / d x_t``.

    ``p(x_0 | x_t)`` is taken for ``N(x_hat, r_t^2 I)`` with the variance that it has for data ``N(m, prior_std^2 I)``,
    ``r_t^2 = prior_std^2 sigma^2 / (sigma^2 + prior_std^2 alpha^2)``: exact for those, biased for data whose covariance
    is another. Without noise the inverse is a pseudo-inverse. Song et al. 2023 (Pseudoinverse-guided diffusion models),
    eq. 7; they have ``prior_std = 1``, and their sampler weights the guidance by ``r_t^2`` once more, which is left
    out: it is no approximation of the posterior score.

    Args:
        score: ``grad_x log p_t(x)`` of the prior, differentiable.
        process: the forward process.
        operator: ``A``.
        y: ``(*observation)`` or ``(batch, *observation)``.
        noise_std: of the observation; may be 0.
        prior_std: standard deviation of the data.

    Raises:
        ValueError: as `AbstractPosteriorScore`; ``prior_std`` is not positive.
        TypeError: as `AbstractPosteriorScore`.
    """

    def __init__(
        self,
        score: Score,
        process: AbstractDiffusion,
        operator: AbstractOperator,
        y: Tensor,
        noise_std: float,
        *,
        prior_std: float = 1.0,
    ) -> None:
        super().__init__(score, process, operator, y, noise_std)
        if not 0.0 < prior_std < math.inf:
            raise ValueError(f"prior_std must be positive and finite, got {prior_std}")
        self.prior_std = float(prior_std)

    def combine(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        e = self.estimate(x, t)
        p2 = self.prior_std**2
        r2 = p2 * e.sigma.square() / (e.sigma.square() + p2 * e.alpha.square())
        residual = y - self.operator(e.data.detach())
        noise = torch.full_like(r2, self.noise_std**2)
        return e.score + e.pull_back(self.operator.solve_gram(residual, r2, noise), self.operator)


@final
class MMPS(AbstractPosteriorScore):
    r"""``score + J^T A^T (A V A^T + noise_std^2 I)^-1 (y - A x_hat)`` with ``V = Cov[x_0 | x_t] = sigma^2 / alpha J``.

    Rozet et al. 2024 (moment matching posterior sampling), eq. 13 and algorithm 2: mean and covariance of
    ``p(x_0 | x_t)`` are those that the score implies (Tweedie), so the result is exact for Gaussian data. The system is
    solved by conjugate gradients, each iteration one more backward pass through the score; with as many iterations as
    observed elements it is solved to rounding.

    Args:
        score: ``grad_x log p_t(x)`` of the prior, differentiable.
        process: the forward process.
        operator: ``A``.
        y: ``(*observation)`` or ``(batch, *observation)``.
        noise_std: of the observation; may be 0 if ``A V A^T`` is regular.
        iterations: of conjugate gradients, at least 1.

    Raises:
        ValueError: as `AbstractPosteriorScore`; no iteration.
        TypeError: as `AbstractPosteriorScore`; ``iterations`` is no integer.
    """

    def __init__(
        self,
        score: Score,
        process: AbstractDiffusion,
        operator: AbstractOperator,
        y: Tensor,
        noise_std: float,
        *,
        iterations: int = 5,
    ) -> None:
        super().__init__(score, process, operator, y, noise_std)
        self.iterations = whole_number(iterations, "iterations", 1)

    def combine(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        e = self.estimate(x, t)
        # The covariance is symmetric, and so J^T, which one backward pass applies, stands for J.
        gain = e.sigma.square() / e.alpha

        def covariance(v: Tensor) -> Tensor:
            Vv = self.operator(e.pull_back(v, self.operator, again=True))
            return per_sample(gain, v) * Vv + self.noise_std**2 * v

        residual = y - self.operator(e.data.detach())
        v = conjugate_gradients(covariance, residual, self.iterations)
        return e.score + e.pull_back(v, self.operator)


def conjugate_gradients(S: Callable[[Tensor], Tensor], b: Tensor, iterations: int) -> Tensor:
    """``S^-1 b`` for each row, from 0, with ``S`` symmetric positive definite (Hestenes and Stiefel 1952).

    A row whose residual has reached rounding, or that meets a direction in which ``S`` is not positive (a learned score
    need not be a gradient), stays where it is.
    """
    v, r = torch.zeros_like(b), b
    p, rho = r, _dot(r, r)
    floor = torch.finfo(b.dtype).eps ** 2 * rho
    for _ in range(iterations):
        q = S(p)
        curvature = _dot(p, q)
        going = (rho > floor) & (curvature > 0)
        step = torch.where(going, rho / torch.where(going, curvature, 1.0), 0.0)
        v, r = v + per_sample(step, b) * p, r - per_sample(step, b) * q
        old, rho = rho, torch.where(going, _dot(r, r), 0.0)
        p = r + per_sample(torch.where(going, rho / torch.where(going, old, 1.0), 0.0), b) * p
    return v


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).reshape(len(a), -1).sum(1) if a.numel() else a.new_zeros(len(a))
