"""Linear diffusions and interpolants from any alpha(t) and sigma(t)."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import final

import torch
from torch import Tensor

from sdesolve import grids
from sdesolve._internal.arguments import short
from sdesolve._internal.derivatives import jvp
from sdesolve.diffusions.base import (
    AbstractDiffusion,
    AbstractInterpolant,
    Prior,
    as_time,
    check_data_at,
    check_times,
    inverse_log_snr,
)

_NOTHING = 2.0**-50  # what rounding leaves of an alpha that is 0
_END = 1e-6  # how far alpha and sigma may be from 1 and 0 where data are


class _OfFunctions(AbstractDiffusion):
    """What ``alpha`` and ``sigma`` in the time of the process, held as ``_alpha`` and ``_sigma``, make of it."""

    _alpha: Callable[[Tensor], Tensor]
    _sigma: Callable[[Tensor], Tensor]

    def log_alpha(self, t: Tensor | float) -> Tensor:
        t = as_time(t)
        alpha = self._alpha(t.double())
        return torch.where(alpha.abs() < _NOTHING, 0.0, alpha).log().to(t.dtype)

    def sigma(self, t: Tensor | float) -> Tensor:
        t = as_time(t)
        return self._sigma(t.double()).to(t.dtype)

    def time_at_log_snr(self, log_snr: Tensor | float) -> Tensor:
        return inverse_log_snr(self, log_snr)

    def drift_rate(self, t: Tensor | float) -> Tensor:
        value, slope = _value_and_slope(self._alpha, as_time(t))
        return (slope / value).to(as_time(t).dtype)

    def squared_diffusion(self, t: Tensor | float) -> Tensor:
        t = as_time(t)
        sigma, slope = _value_and_slope(self._sigma, t)
        return (2.0 * sigma * (slope - self.drift_rate(t.double()) * sigma)).to(t.dtype)

    @property
    def prior(self) -> Prior:
        """``N(0, sigma(t_max)^2 I)``."""
        return Prior(float(self.sigma(self.t_max)))

    def time_grid(self, steps: int) -> Tensor:
        """Uniform in time."""
        return grids.uniform(self.t_max, self.t_min, steps)


@final
class LinearDiffusion(_OfFunctions):
    """``x_t = alpha(t) x_0 + sigma(t) z`` for differentiable functions that you give.

    The SDE's coefficients follow by automatic differentiation, ``f = alpha' / alpha`` and
    ``g^2 = 2 sigma (sigma' - f sigma)``, in float64 whatever the precision of the time.

    Args:
        alpha: scale of the data, elementwise in a tensor of times; positive, but at ``t_max`` it may be 0 ("zero
            terminal SNR"): samplers that step in the denoised state start there, if the score predicts data or
            velocity.
        sigma: standard deviation of the noise, positive on ``[t_min, t_max]``, likewise.
        t_min: where sampling stops.
        t_max: where it starts.

    Raises:
        TypeError: ``alpha`` or ``sigma`` cannot be called, or returns something else than a tensor of the time's shape.
        ValueError: on ``[t_min, t_max]`` either is not positive and finite, or the signal-to-noise ratio grows
            somewhere, which would need an imaginary diffusion. The message says at which time.

    Example:
        >>> straight = LinearDiffusion(alpha=lambda t: 1 - t, sigma=lambda t: t, t_max=0.999)
    """

    def __init__(
        self,
        alpha: Callable[[Tensor], Tensor],
        sigma: Callable[[Tensor], Tensor],
        *,
        t_min: float = 1e-3,
        t_max: float = 1.0,
    ) -> None:
        check_times(t_min, t_max)
        self._alpha, self._sigma, self.t_min, self.t_max = alpha, sigma, float(t_min), float(t_max)
        _check(self)


@final
class LinearInterpolant(_OfFunctions, AbstractInterpolant):
    """``x_s = alpha(s) x_0 + sigma(s) z``, ``0 <= s <= 1``, from data to noise or from noise to data.

    The family of flow matching and one-sided stochastic interpolants (Albergo et al. 2023, section 3.3; Lipman et al.
    2023, eq. 10), for ``predicts="flow"``: a network of it returns ``alpha'(s) x_0 + sigma'(s) z`` in expectation, the
    velocity of the probability flow. As an SDE it is `LinearDiffusion`, with the rates ``f = alpha' / alpha`` and
    ``g^2 = 2 sigma (sigma' - f sigma)``, and every sampler takes it.

    Args:
        alpha: scale of the data, elementwise in a tensor of times ``s``: 1 where the data are.
        sigma: standard deviation of the noise, likewise: 0 where the data are.
        data_at: the end where the data are, 0 or 1. `t_min`, `t_max`, grids and the times of solvers are distances
            ``t`` from there: ``s`` itself, or ``1 - s``.
        t_min: where sampling stops.
        t_max: where it starts; 1 if the interpolant can be inverted there.

    Raises:
        TypeError: ``alpha`` or ``sigma`` cannot be called, or returns something else than a tensor of the time's shape.
        ValueError: the data are at the other end, or at neither; ``alpha`` or ``sigma`` is not positive and finite
            between; the signal-to-noise ratio grows towards the noise; a time of ``[t_min, t_max]`` at which ``x_0``
            and ``z`` do not follow from state and velocity, as ``alpha sigma' - alpha' sigma`` is 0.

    Example:
        >>> import math
        >>> curve = LinearInterpolant(lambda s: (math.pi / 2 * s).sin(), lambda s: (math.pi / 2 * s).cos(), data_at=1)
    """

    def __init__(
        self,
        alpha: Callable[[Tensor], Tensor],
        sigma: Callable[[Tensor], Tensor],
        *,
        data_at: int = 0,
        t_min: float = 1e-3,
        t_max: float = 0.999,
    ) -> None:
        check_times(t_min, t_max)
        if t_max > 1.0:
            raise ValueError(f"t_max must be at most 1, where nothing is left of the data; got {short(t_max)}")
        self.data_at, self.t_min, self.t_max = check_data_at(data_at), float(t_min), float(t_max)
        for name, function in (("alpha", alpha), ("sigma", sigma)):
            _values(function, torch.linspace(0.0, 1.0, 257, dtype=torch.float64, device="cpu"), name)
        if self.data_at:
            alpha, sigma = functools.partial(_mirrored, alpha), functools.partial(_mirrored, sigma)
        self._alpha, self._sigma = alpha, sigma
        self._check_ends()
        _check(self)

    def velocity_rates(self, t: Tensor | float) -> tuple[Tensor, Tensor]:
        t = as_time(t)
        return _value_and_slope(self._alpha, t)[1].to(t.dtype), _value_and_slope(self._sigma, t)[1].to(t.dtype)

    def _check_ends(self) -> None:
        ends = torch.tensor([0.0, 1.0], dtype=torch.float64, device="cpu")
        alpha, sigma = self._alpha(ends), self._sigma(ends)
        at_data, at_noise = ((alpha - 1.0).abs() + sigma.abs() < _END).tolist()
        if at_noise and not at_data:
            raise ValueError(
                f"the data are on the wrong side: alpha = 1 and sigma = 0 at s = {1 - self.data_at}, and data_at = "
                f"{self.data_at}; say data_at={1 - self.data_at}"
            )
        if not at_data:
            raise ValueError(
                f"where the data are, at s = {self.data_at}, alpha must be 1 and sigma 0, got "
                f"{float(alpha[0]):.6g} and {float(sigma[0]):.6g}; a process that never reaches clean data is a "
                "LinearDiffusion"
            )


def _values(function: Callable[[Tensor], Tensor], t: Tensor, name: str) -> Tensor:
    """The function at these times, refused unless it gives one number for each."""
    if not callable(function):
        raise TypeError(f"{name} must be a function of a tensor of times, got {type(function).__name__}")
    values = function(t)
    if not isinstance(values, Tensor) or values.shape != t.shape:
        got = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
        raise TypeError(
            f"{name}(t) must return a tensor of the shape of t, {tuple(t.shape)}, got {got}; for a constant "
            "write torch.ones_like(t)"
        )
    return values


def _check(process: _OfFunctions) -> None:
    alpha, sigma = process._alpha, process._sigma
    t = torch.linspace(process.t_min, process.t_max, 257, dtype=torch.float64, device="cpu")
    for name, function in (("alpha", alpha), ("sigma", sigma)):
        values = _values(function, t, name)
        good = values.isfinite() & (values > 0)
        if name == "alpha":
            good[-1] |= values[-1].abs() < _NOTHING
        _first_failure(good, t, values, f"{name}(t) must be positive and finite")
    if isinstance(process, AbstractInterpolant):
        alpha_rate, sigma_rate = process.velocity_rates(t)
        turn = alpha(t) * sigma_rate - alpha_rate * sigma(t)
        rule = (
            "an interpolant has no inverse where alpha sigma' - alpha' sigma is 0, as data and noise do not follow "
            "from state and velocity there: keep t_min and t_max away from it"
        )
        _first_failure(turn.isfinite() & (turn.abs() > 1e-12), t, turn, rule)
    t = t[:-1]  # the rates have no value where alpha is 0
    g2 = process.squared_diffusion(t)
    scale = process.sigma(t).square() / t
    rule = "alpha(t) / sigma(t) must not grow with t: g(t)^2 would be negative"
    if not isinstance(process, AbstractInterpolant) and float(process.log_snr(t[0])) < float(process.log_snr(t[-1])):
        rule += "; data at t = 1 are for LinearInterpolant(alpha, sigma, data_at=1)"
    _first_failure(g2 >= -1e-9 * scale, t, g2, rule)


def _mirrored(function: Callable[[Tensor], Tensor], t: Tensor) -> Tensor:
    return function(1.0 - t)


def _value_and_slope(function: Callable[[Tensor], Tensor], t: Tensor) -> tuple[Tensor, Tensor]:
    t = t.double().contiguous()  # an expanded time has no memory of its own for a tangent
    return jvp(function, t, torch.ones_like(t))


def _first_failure(good: Tensor, t: Tensor, values: Tensor, rule: str) -> None:
    if not bool(good.all()):
        k = int((~good).nonzero()[0])
        raise ValueError(f"{rule}; at t = {float(t[k]):.6g} it is {float(values[k]):.6g}")
