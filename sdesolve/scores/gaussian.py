"""Gaussian data: every quantity of a linear diffusion in closed form."""

from __future__ import annotations

from typing import NamedTuple, final

import torch
from sdesolve_kernels import Stream, normal
from sdesolve_kernels.threads import survives_forks
from torch import Tensor

from sdesolve._internal.arguments import real, whole_number
from sdesolve._internal.copies import Copies
from sdesolve.diffusions.base import AbstractDiffusion, as_time
from sdesolve.inverse.operators import AbstractOperator
from sdesolve.scores.base import AbstractData, check_process, check_state, coefficients, flat
from sdesolve.scores.components import Components, colour, converted, covariance_form, spectrum
from sdesolve.scores.posterior import condition
from sdesolve.sde import State, Time


class Moments(NamedTuple):
    """Mean and covariance of a law, float64.

    Attributes:
        mean: ``(*state)``.
        cov: ``()``, ``(*state)`` for variances, or ``(d, d)`` over the flattened state; `sdesolve.metrics` takes all
            three.
    """

    mean: Tensor
    cov: Tensor


@final
class Gaussian(AbstractData):
    """``x_0 ~ N(mean, cov)``; noised, ``x_t ~ N(alpha mean, alpha^2 cov + sigma^2 I)``.

    With the eigendecomposition ``cov = U diag(lambda) U^T`` (taken once, in float64) and
    ``v = alpha^2 lambda + sigma^2``, the score is ``-U diag(1 / v) U^T (x - alpha mean)`` and the denoiser
    ``mean + U diag(alpha lambda / v) U^T (x - alpha mean)``.

    Args:
        mean: any shape; it is the shape of the state.
        cov: a number, the variance of every component; a tensor of the shape of the mean, a variance for each; or
            ``(d, d)`` over the flattened state, symmetric positive semi-definite. Singular ones are fine: only clean
            `log_prob` needs a density.

    Raises:
        ValueError: a covariance of another shape, not symmetric or not positive semi-definite; an empty mean; values
            that are not finite.
        TypeError: complex numbers.

    Example:
        >>> data = Gaussian(torch.tensor([1.0, -1.0]), torch.tensor([[1.0, 0.9], [0.9, 1.0]]))
    """

    def __init__(self, mean: Tensor | float, cov: Tensor | float) -> None:
        self.mean = real(mean, "mean")
        self.state_shape = tuple(self.mean.shape)
        if self.mean.numel() == 0:
            raise ValueError(f"mean must have at least one element, got shape {self.state_shape}")
        given = real(cov, "cov")
        self._cov_shape = tuple(given.shape)
        values, vectors = spectrum(given, self.state_shape)
        self._values, self._vectors = values, vectors
        self._constants = Copies(
            Components(self.mean.reshape(1, -1), values[None], vectors, torch.zeros((), dtype=torch.float64)),
            converted,
        )

    @property
    def cov(self) -> Tensor:
        """The covariance, float64: ``()``, of the shape of the mean, or ``(d, d)``, as it was given."""
        return covariance_form(self._values, self._vectors, self._cov_shape)

    @property
    def has_density(self) -> bool:
        return bool((self._values > 0).all())

    def noised_log_prob(self, x: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        c = self._constants.like(x)
        return c.log_density(c.displacement(x, alpha), c.variances(alpha, sigma))

    def noised_score(self, x: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        c = self._constants.like(x)
        return -c.from_eigenbasis(c.displacement(x, alpha) / c.variances(alpha, sigma))

    def posterior_mean(self, x: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        c = self._constants.like(x)
        gain = c.posterior_gain(alpha, c.variances(alpha, sigma))
        return c.mean + c.from_eigenbasis(gain * c.displacement(x, alpha))

    @survives_forks
    def sample(
        self,
        n: int,
        *,
        seed: int,
        first_path: int = 0,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> Tensor:
        n, d = whole_number(n, "n", 0), self.mean.numel()
        z = normal(n, d, seed=seed, stream=Stream.DATA, first_path=first_path, dtype=dtype, device=device)
        return self._constants.like(z).mean.reshape(self.state_shape) + colour(z, self._values, self._vectors).reshape(
            n, *self.state_shape
        )

    def moments(self, process: AbstractDiffusion, t: Tensor | float) -> Moments:
        """Exact mean ``alpha mean`` and covariance ``alpha^2 cov + sigma^2 I`` of ``x_t`` at one time ``t``.

        Raises:
            ValueError: ``t`` is not a single time.
        """
        t = as_time(t).double()
        if t.ndim:
            raise ValueError(f"moments are for one time, a number or a 0-d tensor, got shape {tuple(t.shape)}")
        alpha, sigma = process.alpha(t).cpu(), process.sigma(t).cpu()
        values = alpha.square() * self._values + sigma.square()
        return Moments(alpha * self.mean, covariance_form(values, self._vectors, self._cov_shape))

    def condition(self, operator: AbstractOperator | Tensor, y: Tensor, noise_std: float) -> Gaussian:
        """The law of ``x_0`` given ``y = A x_0 + noise_std z``, exactly.

        Args:
            operator: ``A``, of `sdesolve.operators`, or a matrix ``(m, d)`` over the flattened state.
            y: one observation, ``(*observation)``.
            noise_std: standard deviation of its noise; 0 gives a law without variance in the observed directions.

        Raises:
            ValueError: shapes that do not fit, negative noise, values that are not finite, or an observation without
                noise that is impossible.
            TypeError: ``operator`` is neither an operator nor a matrix.
        """
        d = self.mean.numel()
        values = self._values.expand(d)
        cov = torch.diag(values) if self._vectors is None else (self._vectors * values) @ self._vectors.mT
        given = condition(self.mean.reshape(1, d), cov[None], operator, y, noise_std, self.state_shape)
        return Gaussian(given.mean.reshape(self.state_shape), given.cov[0])

    def flow(self, process: AbstractDiffusion) -> GaussianFlow:
        """The exact solution map of the probability-flow ODE for this data (`GaussianFlow`)."""
        return GaussianFlow(self, process)


@final
class GaussianFlow:
    """The probability flow of Gaussian data, solved: ``x_t`` from ``x_s``, in either direction of time.

    In the eigenbasis of the covariance the flow scales each displacement from the mean by the ratio of marginal
    standard deviations, ``x_t - alpha_t mean = U diag(sqrt(v_t / v_s)) U^T (x_s - alpha_s mean)``: the drift of the ODE
    there is ``f + g^2 / (2 v)``, which is the derivative of ``log sqrt(v)`` since ``dv/dt = 2 f v + g^2``. Follows from
    Song et al. 2021, eq. 13, with a linear score.

    Args:
        data: the law of clean data.
        process: the forward process.
    """

    def __init__(self, data: Gaussian, process: AbstractDiffusion) -> None:
        check_process(process)
        self.data, self.process = data, process

    def __call__(self, x: State, s: Time | float, t: Time | float) -> Tensor:
        """``x_t`` of the solution that passes through ``x`` at time ``s``; ``s``, ``t`` are ``()`` or ``(batch,)``.

        From ``s = 0`` it exists only if the covariance is not singular; the result is nan otherwise.

        Raises:
            ValueError: ``x`` is not ``(batch, *state)``, or a time is neither ``()`` nor ``(batch,)``.
            TypeError: ``x`` is not float32 or float64.
        """
        check_state(x, self.data.state_shape)
        c = self.data._constants.like(x)
        alpha_s, sigma_s = coefficients(self.process, x, s)
        alpha_t, sigma_t = coefficients(self.process, x, t)
        ratio = (c.variances(alpha_t, sigma_t) / c.variances(alpha_s, sigma_s)).sqrt()
        y = alpha_t * c.mean + c.from_eigenbasis(ratio * c.displacement(flat(x), alpha_s))
        return y.reshape(x.shape)
