"""The likelihood of an observation given a denoised estimate: what particles are weighted by on their way."""

from __future__ import annotations

import math
from typing import final

import torch
from torch import Tensor

from sdesolve._internal.arguments import number, short
from sdesolve._internal.copies import Copies
from sdesolve.diffusions.base import AbstractDiffusion, as_time
from sdesolve.inverse.operators import AbstractOperator, check_noise_std, check_observation


@final
class ObservationPotential:
    r"""``log N(y; A x_hat, noise_std^2 I + r_t^2 A A^T)`` of denoised estimates, for `sequential_monte_carlo`.

    It takes ``p(x_0 | x_t)`` for ``N(x_hat, r_t^2 I)`` as `PiGDM` does, ``r_t^2 = prior_std^2 sigma^2 / (sigma^2 +
    prior_std^2 alpha^2)`` (Song et al. 2023, eq. 7), and at ``t = 0`` is the log-likelihood of ``y = A x_0 + noise_std
    z``, with its constant. At other times the log-determinant is that of ``t = 0``: it depends on time alone, and
    weights are ratios in which it cancels.

    Args:
        process: the forward process.
        operator: ``A``, one for all states.
        y: ``(*observation)``, or ``(runs, *observation)`` for one each.
        noise_std: standard deviation of the observation noise, positive.
        prior_std: standard deviation of the data.

    Raises:
        ValueError: ``y`` does not fit the operator; a standard deviation that is not positive and finite; an operator
            with a map for each state. When called: states that are no multiple of the observations.
        TypeError: ``process`` is no diffusion, ``operator`` none of `sdesolve.operators`.

    Example:
        >>> potential = ObservationPotential(VP(), operators.Mask(seen), y, 0.1)
        >>> found = sequential_monte_carlo(VP(), score, potential, (1, 2), particles=256, steps=150, seed=0)
    """

    def __init__(
        self,
        process: AbstractDiffusion,
        operator: AbstractOperator,
        y: Tensor,
        noise_std: float,
        *,
        prior_std: float = 1.0,
    ) -> None:
        if not isinstance(process, AbstractDiffusion):
            raise TypeError(f"process must be a diffusion such as VP(), got {short(process)}")
        if not isinstance(operator, AbstractOperator):
            raise TypeError(
                f"operator must be one of sdesolve.operators, got {type(operator).__name__}; wrap a matrix in "
                "operators.Matrix"
            )
        if operator.rows is not None:
            raise ValueError(
                f"this operator has a map for each of {operator.rows} states, and particles of a run share one; give a "
                "function of x_0 and t in place of an ObservationPotential"
            )
        self.process, self.operator = process, operator
        observed = check_observation(operator, y)
        self._y, self._observations = Copies(observed), len(observed)
        self.noise_std = check_noise_std(noise_std)
        self.prior_std = number(prior_std, "prior_std")
        for name, value in (("noise_std", self.noise_std), ("prior_std", self.prior_std)):
            if not 0.0 < value < math.inf:
                raise ValueError(f"{name} must be positive and finite, got {short(value)}")

    def __call__(self, x0: Tensor, t: Tensor | float) -> Tensor:
        """The log-likelihood at estimates ``x0: (batch, *state)`` made at a time ``t``, ``(batch,)``."""
        count, t = len(x0), as_time(t)
        if count % self._observations:
            raise ValueError(
                f"there are {self._observations} observations and {count} states; give one for all, without a batch "
                "axis, or one for each run"
            )
        y = self._y.like(x0).repeat_interleave(count // self._observations, 0)
        residual = y - self.operator(x0)
        alpha, sigma = self.process.alpha(t).to(x0), self.process.sigma(t).to(x0)
        p2 = self.prior_std**2
        r2 = p2 * sigma.square() / (sigma.square() + p2 * alpha.square())
        solved = self.operator.solve_gram(residual, r2, torch.full_like(r2, self.noise_std**2))
        m = math.prod(self.operator.observation_shape)
        constant = m * (math.log(self.noise_std) + 0.5 * math.log(2.0 * math.pi))
        return -0.5 * (residual * solved).reshape(count, m).sum(1) - constant
