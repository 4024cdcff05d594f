"""What posterior scores have in common: a prior's score, an operator, an observation and its noise."""

from __future__ import annotations

import abc
from typing import NamedTuple, final

import torch
from torch import Tensor

from sdesolve._internal.arguments import short
from sdesolve._internal.copies import Copies
from sdesolve.diffusions.base import AbstractDiffusion, as_time
from sdesolve.inverse.operators import AbstractOperator, check_noise_std, check_observation
from sdesolve.reverse import Score, evaluated
from sdesolve.sde import per_sample


class Estimate(NamedTuple):
    """What the prior's score says of a noisy state, with the graph that leads back to it.

    Attributes:
        x: the state, a leaf that requires a gradient, ``(batch, *state)``.
        score: ``grad log p_t(x)``, detached.
        data: ``E[x_0 | x_t = x]``, attached to ``x``.
        alpha: ``()`` or ``(batch,)``, in the dtype of ``x``.
        sigma: likewise.
    """

    x: Tensor
    score: Tensor
    data: Tensor
    alpha: Tensor
    sigma: Tensor

    def pull_back(self, v: Tensor, operator: AbstractOperator, *, again: bool = False) -> Tensor:
        """``J^T A^T v`` with ``J = d data / d x``; ``again`` keeps the graph for another call."""
        (gradient,) = torch.autograd.grad(self.data, self.x, operator.adjoint(v), retain_graph=again)
        return gradient


class AbstractPosteriorScore(abc.ABC):
    """An approximation of ``grad_x log p_t(x | y)`` for ``y = A x_0 + noise_std z``, from the score of the prior.

    It is called as ``score(x, t)``, so `sample`, `AbstractDiffusion.reverse` and `AbstractDiffusion.probability_flow`
    take it with any solver. What it returns carries no gradient.

    Args:
        score: ``grad_x log p_t(x)`` of the prior; gradients must flow through it to ``x``.
        process: the forward process.
        operator: ``A``.
        y: ``(*observation)`` for all samples, or ``(batch, *observation)`` for one each.
        noise_std: standard deviation of the observation noise.

    Raises:
        TypeError: ``score`` is not callable, ``process`` no diffusion, ``operator`` none of `sdesolve.operators`.
        ValueError: ``y`` does not fit the operator; a negative ``noise_std``. When called: states that do not fit the
            operator or are not as many as observations.
    """

    def __init__(
        self, score: Score, process: AbstractDiffusion, operator: AbstractOperator, y: Tensor, noise_std: float
    ) -> None:
        if not callable(score):
            raise TypeError(f"score must be a function of (x, t), got {type(score).__name__}")
        if not isinstance(process, AbstractDiffusion):
            raise TypeError(f"process must be a diffusion such as VP(), got {short(process)}")
        if not isinstance(operator, AbstractOperator):
            raise TypeError(
                f"operator must be one of sdesolve.operators, got {type(operator).__name__}; wrap a matrix in "
                "operators.Matrix"
            )
        self.score, self.process, self.operator = score, process, operator
        observed = check_observation(operator, y)
        self._y, self._observations = Copies(observed), len(observed)
        self.noise_std = check_noise_std(noise_std)

    @abc.abstractmethod
    def combine(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """The posterior score at states that have been checked, ``y: (batch, *observation)`` in their dtype."""

    @final
    def __call__(self, x: Tensor, t: Tensor | float) -> Tensor:
        """``grad_x log p_t(x | y)``, of the shape of ``x: (batch, *state)``; ``t`` is ``()`` or ``(batch,)``."""
        if x.ndim == 0 or tuple(x.shape[1:]) != self.operator.state_shape:
            raise ValueError(
                f"the operator takes states of shape (batch, *{self.operator.state_shape}), got {tuple(x.shape)}"
            )
        self.operator.check_rows(len(x))
        if self._observations not in (1, len(x)):
            raise ValueError(
                f"there are {self._observations} observations and {len(x)} states; give one for all, without a batch "
                "axis, or one for each"
            )
        with torch.inference_mode(False), torch.no_grad():
            x = x.clone() if x.is_inference() else x.detach()
            return self.combine(x, as_time(t), self._y.like(x).expand(len(x), *self.operator.observation_shape))

    @final
    def coefficients(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """``alpha(t)`` and ``sigma(t)``, ``()`` or ``(batch,)``, in the dtype of ``x``."""
        alpha, sigma = self.process.alpha(t), self.process.sigma(t)
        return (alpha.to(x.dtype), sigma.to(x.dtype)) if t.ndim == 0 else (alpha.to(x), sigma.to(x))

    @final
    def estimate(self, x: Tensor, t: Tensor) -> Estimate:
        """The prior's score and denoised state by Tweedie's formula (Efron 2011, eq. 2.8), ready to be pulled back.

        Raises:
            TypeError: no gradient flows through the score.
        """
        alpha, sigma = self.coefficients(x, t)
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            s = evaluated(self.score, x, t)
            if not s.requires_grad:
                raise TypeError(
                    "no gradient flows from this score to the state, so that it cannot be pulled back through; leave "
                    "torch.no_grad and .detach() out of the score, or take Replacement, which needs none"
                )
            data = (x + per_sample(sigma.square(), x) * s) / per_sample(alpha, x)
        return Estimate(x, s.detach(), data, alpha, sigma)
