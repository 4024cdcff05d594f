"""The chain of score matching with Langevin dynamics."""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor

from sdesolve import grids
from sdesolve.chains.base import AbstractChain, check_steps, finite_positive
from sdesolve.diffusions.base import Prior, check_positive


@final
class SMLD(AbstractChain):
    """``x_k = x_{k-1} + sqrt(sigma_k^2 - sigma_{k-1}^2) z_k`` from ``sigma_0 = 0`` (Song et al. 2021, eq. 8 and 20).

    With `geometric` noise levels, ``sigma_k^2 - sigma_1^2`` is exactly the variance of ``VE(sigma_min, sigma_max)`` at
    ``t = (k - 1) / (N - 1)``: this chain is that process, started from data with noise ``sigma_min`` already in it.

    Args:
        sigmas: ``sigma_1 < ... < sigma_N``.

    Raises:
        ValueError: noise levels that do not grow, or are not positive and finite.
    """

    def __init__(self, sigmas: Tensor) -> None:
        sigmas = torch.as_tensor(sigmas, dtype=torch.float64, device="cpu")
        if not finite_positive(sigmas) or not bool((sigmas.diff() > 0).all()):
            raise ValueError(
                f"sigmas must be (steps,) positive noise levels from the lowest to the highest, got {sigmas.tolist()}"
            )
        self.steps = len(sigmas)
        self.sigma = torch.cat([sigmas.new_zeros(1), sigmas])
        self.alpha, self.scale = torch.ones_like(self.sigma), torch.ones_like(self.sigma)
        low, high = self.sigma[:-1], self.sigma[1:]
        self.noise = torch.cat([sigmas.new_zeros(1), ((high - low) * (high + low)).sqrt()])

    @staticmethod
    def geometric(steps: int = 1000, sigma_min: float = 0.01, sigma_max: float = 50.0) -> SMLD:
        """Noise levels in equal ratios from ``sigma_min`` to ``sigma_max`` (Song and Ermon 2019, section 4.3).

        Raises:
            ValueError: a level that is not positive, or ``steps`` below 2.
            TypeError: ``steps`` is not an integer.
        """
        check_positive(sigma_min=sigma_min, sigma_max=sigma_max)
        return SMLD(grids.geometric(sigma_min, sigma_max, check_steps(steps) - 1))

    @property
    def prior(self) -> Prior:
        """``N(0, sigma_N^2 I)``."""
        return Prior(float(self.sigma[-1]))
