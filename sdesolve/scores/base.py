"""Laws of data whose noised marginals are known in closed form, and the exact scores that follow."""

from __future__ import annotations

import abc
import math
from typing import final

import torch
from torch import Tensor

from sdesolve._internal.arguments import kind_of
from sdesolve.diffusions.base import AbstractDiffusion, as_time
from sdesolve.scores.components import STATE_DTYPES
from sdesolve.sde import State, Time


class AbstractData(abc.ABC):
    """A law ``p_0`` of data for which the law of ``x = alpha x_0 + sigma z``, ``z ~ N(0, I)``, is known exactly.

    Subclasses work on flattened states ``x: (batch, d)``, float32 or float64, and on coefficients that are ``()`` or
    ``(batch, 1)`` in the dtype of ``x``; what users call takes states of shape ``(batch, *state_shape)``.
    """

    state_shape: tuple[int, ...]

    @abc.abstractmethod
    def noised_log_prob(self, x: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        """Log density of ``alpha x_0 + sigma z`` at ``x``, in nats, ``(batch,)``."""

    @abc.abstractmethod
    def noised_score(self, x: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        """Gradient of `noised_log_prob` with respect to ``x``, ``(batch, d)``."""

    @abc.abstractmethod
    def posterior_mean(self, x: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        """``E[x_0 | alpha x_0 + sigma z = x]``, ``(batch, d)``."""

    @property
    @abc.abstractmethod
    def has_density(self) -> bool:
        """Whether ``p_0`` has a density: no direction without variance."""

    @abc.abstractmethod
    def sample(
        self,
        n: int,
        *,
        seed: int,
        first_path: int = 0,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> Tensor:
        """Draws ``x_0``, shape ``(n, *state_shape)``; row ``i`` is a function of ``(seed, first_path + i)`` alone."""

    @final
    def score(self, process: AbstractDiffusion) -> ExactScore:
        """The exact score of this data noised by ``process``."""
        return ExactScore(self, process)

    @final
    def log_prob(self, x: State) -> Tensor:
        """Log density of clean data in nats, ``(batch,)``.

        Raises:
            ValueError: ``x`` is not ``(batch, *state_shape)``, or some direction has no variance, so that there is no
                density.
            TypeError: ``x`` is not float32 or float64.
        """
        check_state(x, self.state_shape)
        if not self.has_density:
            raise ValueError(
                "this law has a direction without variance, so it has no density; take the noised one, "
                "score(process).log_prob(x, t), or add a small variance to the covariance"
            )
        return self.noised_log_prob(flat(x), x.new_ones(()), x.new_zeros(()))


@final
class ExactScore:
    """``score(x, t) = grad_x log p_t(x)`` in closed form, with what else is known of ``p_t``.

    ``x`` is ``(batch, *state)``, float32 or float64, and the result has its dtype; ``t`` is ``()`` or ``(batch,)``.
    Where the data has a direction without variance, neither score nor density exists at ``t = 0``: they are nan or inf
    there. Gradients flow to ``x`` and ``t``.

    Args:
        data: a `Gaussian` or `GaussianMixture`.
        process: the forward process that noises it.

    Raises:
        TypeError: ``process`` is not a forward process.
    """

    def __init__(self, data: AbstractData, process: AbstractDiffusion) -> None:
        check_process(process)
        self.data, self.process = data, process

    def __call__(self, x: State, t: Time | float) -> Tensor:
        """``grad_x log p_t(x)``, of the shape of ``x``."""
        check_state(x, self.data.state_shape)
        alpha, sigma = coefficients(self.process, x, t)
        return self.data.noised_score(flat(x), alpha, sigma).reshape(x.shape)

    def log_prob(self, x: State, t: Time | float) -> Tensor:
        """``log p_t(x)`` in nats, ``(batch,)``."""
        check_state(x, self.data.state_shape)
        alpha, sigma = coefficients(self.process, x, t)
        return self.data.noised_log_prob(flat(x), alpha, sigma)

    def denoise(self, x: State, t: Time | float) -> Tensor:
        """``E[x_0 | x_t = x]``, of the shape of ``x``.

        Equal to ``(x + sigma^2 score(x, t)) / alpha`` (Tweedie; Efron 2011, eq. 1.4), but computed without that
        difference, so it keeps its accuracy where ``alpha`` is tiny and where ``sigma`` is.
        """
        check_state(x, self.data.state_shape)
        alpha, sigma = coefficients(self.process, x, t)
        return self.data.posterior_mean(flat(x), alpha, sigma).reshape(x.shape)


def check_state(x: Tensor, state_shape: tuple[int, ...]) -> None:
    """Refuses what is not a float32 or float64 tensor of shape ``(batch, *state_shape)``."""
    if not isinstance(x, Tensor):
        raise TypeError(f"x must be a tensor of shape (batch, *state), got {type(x).__name__}")
    if x.dtype not in STATE_DTYPES:
        raise TypeError(f"x must be float32 or float64, got {x.dtype}; convert it with x.float()")
    if x.ndim == 0 or x.shape[1:] != state_shape:
        expected = ", ".join(["batch", *map(str, state_shape)])
        hint = "; for a single state pass x[None]" if x.shape == state_shape else ""
        raise ValueError(f"x must have shape ({expected}) to fit this law of data, got {tuple(x.shape)}{hint}")


def flat(x: Tensor) -> Tensor:
    """``(batch, d)`` from ``(batch, *state)``; also for an empty batch, and for states of rank 0."""
    return x.reshape(x.shape[0], math.prod(x.shape[1:]))


def coefficients(process: AbstractDiffusion, x: Tensor, t: Tensor | float) -> tuple[Tensor, Tensor]:
    """``alpha(t)`` and ``sigma(t)`` in the dtype of ``x``, as ``()`` or ``(batch, 1)``.

    Raises:
        ValueError: ``t`` is neither ``()`` nor ``(batch,)``.
        TypeError: ``t`` holds a whole number for each sample.
    """
    t = as_time(t)
    if t.ndim == 1 and not t.is_floating_point():
        raise TypeError(
            f"times of samples must be a floating-point tensor, got {t.dtype}: are they steps of a chain? "
            "chain.score_from(process, score) makes a score of steps from this one"
        )
    if t.ndim > 1 or (t.ndim == 1 and t.shape[0] != x.shape[0]):
        raise ValueError(f"t must be a number or one time per sample, ({x.shape[0]},), got shape {tuple(t.shape)}")
    alpha, sigma = process.alpha(t), process.sigma(t)
    if t.ndim == 0:  # may stay on the host: a 0-d tensor multiplies tensors of any device without a copy
        return alpha.to(x.dtype), sigma.to(x.dtype)
    return alpha.to(x).unsqueeze(1), sigma.to(x).unsqueeze(1)


def check_process(process: AbstractDiffusion) -> None:
    """Refuses what is not a forward process."""
    if not isinstance(process, AbstractDiffusion):
        raise TypeError(f"process must be a forward process such as VP(), got {kind_of(process)}")
