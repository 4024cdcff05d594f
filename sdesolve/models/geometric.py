"""Geometric Brownian motion."""

from __future__ import annotations

import math
from typing import ClassVar, final

import torch
from torch import Tensor

from sdesolve.models.arguments import finite
from sdesolve.sde import AbstractSDE, Calculus, CalculusName, Noise


@final
class GeometricBrownianMotion(AbstractSDE):
    """``dX = rate X dt + volatility X dW`` for each entry of the state; Ito or Stratonovich.

    ``X(t) = X(0) exp(r t + volatility W(t))`` with ``r = rate - volatility^2 / 2``, or ``r = rate`` for Stratonovich.

    Args:
        rate: one over time.
        volatility: one over the square root of time.
        calculus: ``ito`` or ``stratonovich``.

    Raises:
        TypeError: a parameter is no number.
        ValueError: a parameter is not finite, or an unknown calculus.

    Example:
        >>> sde = GeometricBrownianMotion(rate=0.05, volatility=0.2)
        >>> path, x0 = BrownianPath(0), torch.ones(4, 1)
        >>> sol = solve(sde, x0, 0.0, 1.0, 64, solver=SRIW1(), noise=path)
        >>> W = path.increments(grids.uniform(0.0, 1.0, 64), (4, 1)).sum(0)
        >>> error = sol.x1 - sde.exact(x0, W, 1.0)
    """

    noise: ClassVar[Noise] = Noise.DIAGONAL  # type: ignore[misc]  # fixed for the whole class

    def __init__(self, rate: float, volatility: float, calculus: CalculusName = "ito") -> None:
        self.rate, self.volatility = finite(rate, "rate"), finite(volatility, "volatility")
        if calculus not in list(Calculus):
            raise ValueError(f"calculus must be 'ito' or 'stratonovich', got {calculus!r}")
        self.calculus = Calculus(calculus)

    def drift(self, x: Tensor, t: Tensor) -> Tensor:
        return self.rate * x

    def diffusion(self, x: Tensor, t: Tensor) -> Tensor:
        return self.volatility * x

    def exact(self, x0: Tensor, W: Tensor, t: float | Tensor) -> Tensor:
        """The solution at time ``t`` along the Brownian motion whose value there is ``W``, from ``x0`` at time 0."""
        rate = self.rate - (0.5 * self.volatility**2 if self.calculus is Calculus.ITO else 0.0)
        return x0 * torch.exp(rate * t + self.volatility * W)

    def mean(self, x0: Tensor, t: float) -> Tensor:
        """``E X(t)``."""
        return x0 * math.exp(self._growth * t)

    def variance(self, x0: Tensor, t: float) -> Tensor:
        """``Var X(t)``."""
        return self.mean(x0, t).square() * math.expm1(self.volatility**2 * t)

    @property
    def _growth(self) -> float:
        return self.rate + (0.5 * self.volatility**2 if self.calculus is Calculus.STRATONOVICH else 0.0)
