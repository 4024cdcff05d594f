"""A linear diffusion from any alpha(t) and sigma(t)."""

from __future__ import annotations

from collections.abc import Callable
from typing import final

import torch
from torch import Tensor

from sdesolve import grids
from sdesolve._internal.derivatives import jvp
from sdesolve.diffusions.base import AbstractDiffusion, Prior, as_time, check_times, inverse_log_snr

_NOTHING = 2.0**-50  # what rounding leaves of an alpha that is 0


@final
class LinearDiffusion(AbstractDiffusion):
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
        self._check()

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

    def _check(self) -> None:
        t = torch.linspace(self.t_min, self.t_max, 257, dtype=torch.float64, device="cpu")
        for name, function in (("alpha", self._alpha), ("sigma", self._sigma)):
            if not callable(function):
                raise TypeError(f"{name} must be a function of a tensor of times, got {type(function).__name__}")
            values = function(t)
            if not isinstance(values, Tensor) or values.shape != t.shape:
                got = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
                raise TypeError(
                    f"{name}(t) must return a tensor of the shape of t, {tuple(t.shape)}, got {got}; for a constant "
                    "write torch.ones_like(t)"
                )
            good = values.isfinite() & (values > 0)
            if name == "alpha":
                good[-1] |= values[-1].abs() < _NOTHING
            _first_failure(good, t, values, f"{name}(t) must be positive and finite")
        t = t[:-1]  # the rates have no value where alpha is 0
        g2 = self.squared_diffusion(t)
        scale = self.sigma(t).square() / t
        _first_failure(g2 >= -1e-9 * scale, t, g2, "alpha(t) / sigma(t) must not grow with t: g(t)^2 would be negative")


def _value_and_slope(function: Callable[[Tensor], Tensor], t: Tensor) -> tuple[Tensor, Tensor]:
    t = t.double().contiguous()  # an expanded time has no memory of its own for a tangent
    return jvp(function, t, torch.ones_like(t))


def _first_failure(good: Tensor, t: Tensor, values: Tensor, rule: str) -> None:
    if not bool(good.all()):
        k = int((~good).nonzero()[0])
        raise ValueError(f"{rule}; at t = {float(t[k]):.6g} it is {float(values[k]):.6g}")
