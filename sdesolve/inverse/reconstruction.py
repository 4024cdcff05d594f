"""Reconstruction guidance: the observation's likelihood at the denoised state."""

from __future__ import annotations

import math
from typing import final

from torch import Tensor

from sdesolve._internal.arguments import short
from sdesolve.diffusions.base import AbstractDiffusion
from sdesolve.inverse.base import AbstractPosteriorScore
from sdesolve.inverse.operators import AbstractOperator, check_noise_std
from sdesolve.reverse import Score


@final
class DPS(AbstractPosteriorScore):
    r"""``score + scale grad_x log N(y; A x_hat(x), noise_std^2 I)`` with ``x_hat = E[x_0 | x_t = x]``.

    Chung et al. 2023, eq. 11 and 16 (``rho = scale / noise_std^2``). It takes ``p(x_0 | x_t)`` for a point, so at large
    noise it trusts the observation far too much: biased already on Gaussian data, and stiff, with rates up to
    ``g^2 |A|^2 / noise_std^2``. Too few steps diverge. The paper's experiments divide the gradient by the residual's
    norm in every step of one sampler instead, which depends on the number of steps and is not a score.

    Args:
        score: ``grad_x log p_t(x)`` of the prior, differentiable.
        process: the forward process.
        operator: ``A``.
        y: ``(*observation)`` or ``(batch, *observation)``.
        noise_std: of the observation, positive.
        scale: factor of the guidance.

    Raises:
        ValueError: as `AbstractPosteriorScore`; ``noise_std`` is 0; a negative ``scale``.
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
        scale: float = 1.0,
    ) -> None:
        super().__init__(score, process, operator, y, check_noise_std(noise_std, positive=True))
        if not 0.0 <= scale < math.inf:
            raise ValueError(f"scale must be a finite number that is not negative, got {short(scale)}")
        self.scale = float(scale)

    def combine(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        e = self.estimate(x, t)
        residual = y - self.operator(e.data.detach())
        return e.score + self.scale / self.noise_std**2 * e.pull_back(residual, self.operator)
