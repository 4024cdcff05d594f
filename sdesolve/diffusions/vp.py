"""The variance-preserving process and its noise schedules."""

from __future__ import annotations

import abc
import math
from typing import final

import torch
from torch import Tensor

from sdesolve import grids
from sdesolve._internal.arguments import kind_of, short
from sdesolve.diffusions.base import AbstractDiffusion, Prior, as_time, check_positive, check_times


class AbstractBetaSchedule(abc.ABC):
    """A noise rate ``beta(t) >= 0`` and its integral ``B(t)`` from 0 to ``t``."""

    t_min: float
    t_max: float

    @abc.abstractmethod
    def beta(self, t: Tensor) -> Tensor:
        """``beta(t)``."""

    @abc.abstractmethod
    def integral(self, t: Tensor) -> Tensor:
        """``B(t)``, accurate relative to its own size as ``t -> 0``."""

    @abc.abstractmethod
    def time_at_integral(self, integral: Tensor) -> Tensor:
        """The inverse of `integral`: the time ``t >= 0`` with ``B(t)`` of this value."""

    def time_grid(self, steps: int) -> Tensor:
        """The grid of a number of steps from ``t_max`` to ``t_min``, float64: uniform in time."""
        return grids.uniform(self.t_max, self.t_min, steps)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{k}={v}' for k, v in vars(self).items())})"


@final
class LinearBeta(AbstractBetaSchedule):
    """``beta(t) = beta_min + t (beta_max - beta_min)`` on [0, 1] (Song et al. 2021, eq. 32).

    Args:
        beta_min: rate at 0, positive: with 0 the log-SNR would not be strictly monotone at 0.
        beta_max: rate at 1.
        t_min: where sampling stops.
    """

    t_max = 1.0

    def __init__(self, beta_min: float = 0.1, beta_max: float = 20.0, *, t_min: float = 1e-3) -> None:
        check_positive(beta_min=beta_min, beta_max=beta_max)
        check_times(t_min, self.t_max)
        self.beta_min, self.beta_max, self.t_min = float(beta_min), float(beta_max), float(t_min)

    def beta(self, t: Tensor) -> Tensor:
        return self.beta_min + (self.beta_max - self.beta_min) * t

    def integral(self, t: Tensor) -> Tensor:
        return t * (self.beta_min + 0.5 * (self.beta_max - self.beta_min) * t)

    def time_at_integral(self, integral: Tensor) -> Tensor:
        slope = self.beta_max - self.beta_min
        return 2.0 * integral / (self.beta_min + (self.beta_min**2 + 2.0 * slope * integral).sqrt())


@final
class CosineBeta(AbstractBetaSchedule):
    """``alpha(t) = cos(a(t)) / cos(a(0))`` with ``a(t) = pi/2 (t + s) / (1 + s)`` (Nichol and Dhariwal 2021, eq. 17).

    ``beta(t) = pi / (1 + s) tan a(t)`` has a pole at 1, so the process ends before it. The default end, 0.9946, is
    the one of Lu et al. 2022 (appendix D), near which a thousand-step chain meets the paper's clip of 0.999.

    Args:
        s: offset that keeps the rate away from 0 at ``t = 0``.
        t_min: where sampling stops.
        t_max: where it starts, below 1.
    """

    def __init__(self, s: float = 0.008, *, t_min: float = 1e-3, t_max: float = 0.9946) -> None:
        check_positive(s=s)
        check_times(t_min, t_max)
        if t_max >= 1:
            raise ValueError(f"the cosine schedule has a pole at t = 1; t_max must be below 1, got {short(t_max)}")
        self.s, self.t_min, self.t_max = float(s), float(t_min), float(t_max)

    def beta(self, t: Tensor) -> Tensor:
        return math.pi / (1 + self.s) * self._angle(t).sin() / self._angle_left(t).sin()

    def integral(self, t: Tensor) -> Tensor:
        # B = -2 log alpha. Near 0 alpha^2 = 1 - v with v from a product of sines, which does not cancel; further out
        # the logarithm of alpha itself is the accurate form.
        a0 = self._angle(torch.zeros_like(t))
        v = (0.5 * math.pi / (1 + self.s) * t).sin() * (self._angle(t) + a0).sin() / a0.cos().square()
        return torch.where(
            v < 0.5, -torch.log1p(-v.clamp(max=0.5)), -2.0 * (self._angle_left(t).sin() / a0.cos()).log()
        )

    def time_at_integral(self, integral: Tensor) -> Tensor:
        # cos a = alpha cos a(0), so that sin^2 a - sin^2 a(0) = v = (1 - alpha^2) cos^2 a(0), which is also
        # sin(a - a(0)) sin(a + a(0)): the form of the difference that does not cancel near 0.
        a0 = 0.5 * math.pi * self.s / (1 + self.s)
        v = -torch.expm1(-integral) * math.cos(a0) ** 2
        a = torch.atan2((math.sin(a0) ** 2 + v).sqrt(), (-0.5 * integral).exp() * math.cos(a0))
        near = (v / (a + a0).sin()).clamp(max=0.5).asin()
        return near.where(a - a0 < 0.5, a - a0) * (2.0 * (1 + self.s) / math.pi)

    def _angle(self, t: Tensor) -> Tensor:
        return 0.5 * math.pi * (t + self.s) / (1 + self.s)

    def _angle_left(self, t: Tensor) -> Tensor:
        # pi/2 - a(t). Near the end cos a is the sine of this small angle; cosine of a rounded a would lose 1e-5 of it.
        return 0.5 * math.pi * (1 - t) / (1 + self.s)


class AbstractScheduled(AbstractDiffusion):
    """``alpha = exp(-B/2)`` with ``B`` the integral of the rates ``beta`` of a schedule, and the limit law ``N(0, I)``.

    Args:
        schedule: `LinearBeta` (the default, 0.1 to 20) or `CosineBeta`, or an `AbstractBetaSchedule` of your own.

    Raises:
        TypeError: ``schedule`` is something else.
    """

    @final
    def __init__(self, schedule: AbstractBetaSchedule | None = None) -> None:
        self.schedule = LinearBeta() if schedule is None else schedule
        if not isinstance(self.schedule, AbstractBetaSchedule):
            raise TypeError(
                "schedule must be an AbstractBetaSchedule, LinearBeta(0.1, 20) or CosineBeta(), got "
                f"{kind_of(schedule)}"
            )
        self.t_min, self.t_max = self.schedule.t_min, self.schedule.t_max

    @final
    def log_alpha(self, t: Tensor | float) -> Tensor:
        return -0.5 * self.schedule.integral(as_time(t))

    @final
    def drift_rate(self, t: Tensor | float) -> Tensor:
        return -0.5 * self.schedule.beta(as_time(t))

    @final
    @property
    def prior(self) -> Prior:
        """The limit law ``N(0, I)``."""
        return Prior(1.0)

    @final
    def prior_at(self, t: float) -> Prior:
        """The limit law ``N(0, I)``, which `VP` keeps for data of unit variance."""
        return self.prior

    @final
    def time_grid(self, steps: int) -> Tensor:
        """That of the schedule: uniform in time, or whole steps of a table."""
        return self.schedule.time_grid(steps)


@final
class VP(AbstractScheduled):
    """Variance preserving: ``dX = -beta(t)/2 X dt + sqrt(beta(t)) dW`` (Song et al. 2021, eq. 11).

    ``alpha = exp(-B/2)`` and ``sigma = sqrt(1 - exp(-B))`` with ``B`` the integral of ``beta``, so
    ``alpha^2 + sigma^2 = 1`` and data of unit variance keep it.

    Args:
        schedule: `LinearBeta` (the default, 0.1 to 20) or `CosineBeta`, or an `AbstractBetaSchedule` of your own.
    """

    def sigma(self, t: Tensor | float) -> Tensor:
        return (-torch.expm1(-self.schedule.integral(as_time(t)))).sqrt()

    def log_alpha_and_sigma(self, t: Tensor | float) -> tuple[Tensor, Tensor]:
        log_alpha = self.log_alpha(t)
        return log_alpha, (-torch.expm1(2.0 * log_alpha)).sqrt()

    def time_at_log_snr(self, log_snr: Tensor | float) -> Tensor:
        # sigma^2 / alpha^2 = exp(B) - 1
        return self.schedule.time_at_integral(torch.log1p((-as_time(log_snr)).exp()))

    def squared_diffusion(self, t: Tensor | float) -> Tensor:
        return self.schedule.beta(as_time(t))
