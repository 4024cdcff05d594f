"""The chain of denoising diffusion probabilistic models."""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor

from sdesolve._internal.arguments import short
from sdesolve.chains.base import AbstractChain, check_steps, cumulative
from sdesolve.diffusions.base import Prior, check_positive
from sdesolve.diffusions.vp import CosineBeta


@final
class DDPM(AbstractChain):
    """``x_k = sqrt(1 - beta_k) x_{k-1} + sqrt(beta_k) z_k`` (Ho et al. 2020, eq. 2).

    As the number of steps grows, the chains of `linear` tend to the process ``VP(LinearBeta(beta_min, beta_max))`` at
    ``t = k / N``, and those of `cosine` to ``VP(CosineBeta(s))``, with errors of order ``1 / N``.

    Args:
        betas: ``beta_1 ... beta_N``, each within (0, 1).

    Raises:
        ValueError: a beta outside (0, 1), or none.
    """

    def __init__(self, betas: Tensor) -> None:
        betas = torch.as_tensor(betas, dtype=torch.float64, device="cpu")
        if betas.ndim != 1 or len(betas) == 0 or not bool(((betas > 0) & (betas < 1)).all()):
            raise ValueError(
                f"betas must be (steps,) numbers within (0, 1), got shape {tuple(betas.shape)}"
                + (f" from {float(betas.min()):.6g} to {float(betas.max()):.6g}" if betas.numel() else "")
            )
        self.steps, zero = len(betas), betas.new_zeros(1)
        self.scale = torch.cat([zero + 1.0, (1.0 - betas).sqrt()])
        self.noise = torch.cat([zero, betas.sqrt()])
        self.alpha, self.sigma = cumulative(self.scale, self.noise)

    @staticmethod
    def linear(steps: int = 1000, beta_min: float = 0.1, beta_max: float = 20.0) -> DDPM:
        """Betas from ``beta_min / N`` to ``beta_max / N`` in equal steps; with 1000, the 1e-4 to 0.02 of the paper.

        Raises:
            ValueError: a rate that is not positive, or ``beta_max / N`` not below 1.
            TypeError: ``steps`` is not an integer.
        """
        steps = check_steps(steps)
        check_positive(beta_min=beta_min, beta_max=beta_max)
        if max(beta_min, beta_max) >= steps:
            raise ValueError(f"{steps} steps are too few for rates up to {max(beta_min, beta_max)}: a beta would be 1")
        return DDPM(torch.linspace(beta_min / steps, beta_max / steps, steps, dtype=torch.float64))

    @staticmethod
    def cosine(steps: int = 1000, s: float = 0.008, *, largest: float = 0.999) -> DDPM:
        """``1 - beta_k = alpha(k / N)^2 / alpha((k - 1) / N)^2`` with `CosineBeta`, clipped at ``largest``.

        Nichol and Dhariwal 2021, eq. 17.

        Raises:
            ValueError: ``s`` not positive, or ``largest`` outside (0, 1).
            TypeError: ``steps`` is not an integer.
        """
        t = torch.arange(check_steps(steps) + 1, dtype=torch.float64) / steps
        if not 0.0 < largest < 1.0:
            raise ValueError(f"largest must be within (0, 1), got {short(largest)}")
        return DDPM((-torch.expm1(-CosineBeta(s).integral(t).diff())).clamp(max=largest))

    @property
    def prior(self) -> Prior:
        """``N(0, I)``."""
        return Prior(1.0)
