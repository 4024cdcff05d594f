"""Heston's model of stochastic volatility."""

from __future__ import annotations

import math
from typing import ClassVar, final

import numpy as np
import torch
from torch import Tensor

from sdesolve.models.arguments import finite, positive, root
from sdesolve.sde import AbstractSDE, Calculus, Noise

_NODES = 200  # of a Gauss rule: prices to 1e-10 for the cases of the tests


@final
class Heston(AbstractSDE):
    """A log-price and its variance, ``(batch, 2)``; Ito, two Brownian motions.

    ``dX = (rate - V/2) dt + sqrt(V) (correlation dW1 + sqrt(1 - correlation^2) dW2)`` and
    ``dV = reversion (level - V) dt + volatility sqrt(V) dW1``. `QE` is made for it and keeps ``V`` positive; for other
    solvers the roots are those of ``max(V, 0)``. Heston 1993, under the pricing measure.

    Args:
        reversion: ``kappa``, one over time.
        level: ``theta``, of the variance.
        volatility: ``xi``, of the variance.
        correlation: ``rho``, between -1 and 1.
        rate: of interest.

    Raises:
        TypeError: a parameter is no number.
        ValueError: a parameter is out of range.
    """

    noise: ClassVar[Noise] = Noise.GENERAL  # type: ignore[misc]  # fixed for the whole class
    calculus: ClassVar[Calculus] = Calculus.ITO  # type: ignore[misc]

    def __init__(
        self, reversion: float, level: float, volatility: float, correlation: float = 0.0, rate: float = 0.0
    ) -> None:
        self.reversion, self.level = positive(reversion, "reversion"), positive(level, "level")
        self.volatility, self.rate = positive(volatility, "volatility"), finite(rate, "rate")
        self.correlation = finite(correlation, "correlation")
        if not -1.0 <= self.correlation <= 1.0:
            raise ValueError(f"correlation must be between -1 and 1, got {correlation!r}")

    def drift(self, x: Tensor, t: Tensor) -> Tensor:
        v = self._variance(x).clamp(min=0.0)
        return torch.stack([self.rate - 0.5 * v, self.reversion * (self.level - x[:, 1])], 1)

    def diffusion(self, x: Tensor, t: Tensor) -> Tensor:
        deviation, rho = root(self._variance(x)), self.correlation
        price = torch.stack([rho * deviation, math.sqrt(1.0 - rho * rho) * deviation], 1)
        variance = torch.stack([self.volatility * deviation, torch.zeros_like(deviation)], 1)
        return torch.stack([price, variance], 1)

    def call(self, strike: float, price: float, variance: float, t: float) -> float:
        """``E exp(-rate t) max(S(t) - strike, 0)`` from a price and a variance at time 0.

        By Lewis's integral of the characteristic function (2001, equation 3.11), in the form of Albrecher, Mayer,
        Schoutens and Tistaert 2007, which takes no wrong branch of the logarithm.
        """
        k, xi, rho = self.reversion, self.volatility, self.correlation
        nodes, weights = np.polynomial.legendre.leggauss(_NODES)
        y = 0.5 * (nodes + 1.0)  # u = y / (1 - y) on the half line
        u = y / (1.0 - y)
        z = u - 0.5j
        b = k - 1j * rho * xi * z
        d = np.sqrt(b * b + xi * xi * (1j * z + z * z))
        g, e = (b - d) / (b + d), np.exp(-d * t)
        C = k * self.level / xi**2 * ((b - d) * t - 2.0 * np.log((1.0 - g * e) / (1.0 - g)))
        D = (b - d) / xi**2 * (1.0 - e) / (1.0 - g * e)
        phi = np.exp(C + D * variance + 1j * u * (math.log(price / strike) + self.rate * t))
        integral = float(np.sum(0.5 * weights / (1.0 - y) ** 2 * (phi / (u * u + 0.25)).real))
        return price - math.sqrt(price * strike) * math.exp(-0.5 * self.rate * t) * integral / math.pi

    @staticmethod
    def _variance(x: Tensor) -> Tensor:
        if x.ndim != 2 or x.shape[1] != 2:
            raise ValueError(f"the state of Heston is (batch, 2), log-price and variance, got {tuple(x.shape)}")
        return x[:, 1]
