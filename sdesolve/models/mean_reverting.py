"""Equations that revert to a level linearly, whose moments are known: Ornstein-Uhlenbeck, CIR, Jacobi."""

from __future__ import annotations

import abc
import math
from typing import ClassVar, final

import torch
from torch import Tensor

from sdesolve.models.arguments import finite, positive, root
from sdesolve.sde import AbstractSDE, Calculus, Noise


class AbstractMeanReverting(AbstractSDE):
    """``dX = rate (level - X) dt + volatility s(X) dW`` for each entry of the state; Ito.

    Args:
        rate: ``kappa``, one over time, positive.
        level: ``theta``.
        volatility: ``xi``.

    Raises:
        TypeError: a parameter is no number.
        ValueError: a parameter is out of range.
    """

    noise: ClassVar[Noise] = Noise.DIAGONAL  # type: ignore[misc]  # fixed for the whole class
    calculus: ClassVar[Calculus] = Calculus.ITO  # type: ignore[misc]

    def __init__(self, rate: float, level: float, volatility: float) -> None:
        self.rate, self.level = positive(rate, "rate"), finite(level, "level")
        self.volatility = positive(volatility, "volatility")
        self._check()

    def _check(self) -> None:  # some have nothing more to check
        """Refuses a level where the equation has no solution."""

    @final
    def drift(self, x: Tensor, t: Tensor) -> Tensor:
        return self.rate * (self.level - x)

    @final
    def mean(self, x0: Tensor, t: float) -> Tensor:
        """``E X(t)`` from ``x0`` at time 0."""
        return self.level + (x0 - self.level) * math.exp(-self.rate * t)

    @abc.abstractmethod
    def variance(self, x0: Tensor, t: float) -> Tensor:
        """``Var X(t)`` from ``x0`` at time 0."""


@final
class OrnsteinUhlenbeck(AbstractMeanReverting):
    """``dX = rate (level - X) dt + volatility dW``, of normal law. `OU` is the process of score-based models.

    Args:
        rate: speed of the return to ``level``, one over a time; positive.
        level: mean of the stationary law.
        volatility: size of the noise; positive.
    """

    noise: ClassVar[Noise] = Noise.ADDITIVE  # type: ignore[misc]

    def diffusion(self, x: Tensor, t: Tensor) -> Tensor:
        return torch.full_like(x, self.volatility)

    def variance(self, x0: Tensor, t: float) -> Tensor:
        return torch.full_like(x0, -math.expm1(-2.0 * self.rate * t) * self.volatility**2 / (2.0 * self.rate))

    def density(self, x: Tensor, x0: Tensor, t: float) -> Tensor:
        """Of each entry of ``X(t)`` at ``x``."""
        variance = self.variance(x0, t)
        return torch.exp(-0.5 * (x - self.mean(x0, t)).square() / variance) / (2.0 * math.pi * variance).sqrt()


@final
class CIR(AbstractMeanReverting):
    """``dX = rate (level - X) dt + volatility sqrt(X) dW``: Cox, Ingersoll and Ross 1985; positive for ``x0 >= 0``.

    0 is not reached where ``2 rate level >= volatility^2``. `ImplicitSquareRoot` and `QE` are made for it and stay
    positive; for other solvers the root is that of ``max(X, 0)``.

    Args:
        rate: speed of the return to ``level``, one over a time; positive.
        level: mean of the stationary law; positive.
        volatility: size of the noise; positive.
    """

    def _check(self) -> None:
        positive(self.level, "level")

    def diffusion(self, x: Tensor, t: Tensor) -> Tensor:
        return self.volatility * root(x)

    def variance(self, x0: Tensor, t: float) -> Tensor:
        e, gone = math.exp(-self.rate * t), -math.expm1(-self.rate * t)
        return self.volatility**2 * gone / self.rate * (x0 * e + 0.5 * self.level * gone)


@final
class Jacobi(AbstractMeanReverting):
    """``dX = rate (level - X) dt + volatility sqrt(X (1 - X)) dW``: Wright-Fisher diffusion; stays in [0, 1].

    For solvers that leave the interval the root is that of 0 there.

    Args:
        rate: speed of the return to ``level``, one over a time; positive.
        level: mean of the stationary law; between 0 and 1.
        volatility: size of the noise; positive.
    """

    def _check(self) -> None:
        if not 0.0 < self.level < 1.0:
            raise ValueError(f"level must be between 0 and 1, got {self.level!r}")

    def diffusion(self, x: Tensor, t: Tensor) -> Tensor:
        return self.volatility * root(x * (1.0 - x))

    def variance(self, x0: Tensor, t: float) -> Tensor:
        # m2' = -(2 rate + volatility^2) m2 + (2 rate level + volatility^2) m1, and m1 = level + c exp(-rate t)
        k, s = self.rate, self.volatility**2
        decay, source, c = 2.0 * k + s, 2.0 * k * self.level + s, x0 - self.level
        still = source * self.level / decay
        moving = source / (decay - k) * c
        second = still + moving * math.exp(-k * t) + (x0 * x0 - still - moving) * math.exp(-decay * t)
        return second - self.mean(x0, t).square()
