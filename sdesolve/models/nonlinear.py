"""Two nonlinear equations: a particle in a double well, and Lotka and Volterra's two species."""

from __future__ import annotations

import functools
from typing import ClassVar, final

import numpy as np
import torch
from torch import Tensor

from sdesolve.models.arguments import positive
from sdesolve.sde import AbstractSDE, Calculus, Noise


@final
class DoubleWell(AbstractSDE):
    """``dX = (X - X^3) dt + volatility dW`` for each entry of the state: wells at -1 and 1.

    Args:
        volatility: one over the square root of time.

    Raises:
        TypeError: it is no number.
        ValueError: it is not positive.
    """

    noise: ClassVar[Noise] = Noise.ADDITIVE  # type: ignore[misc]  # fixed for the whole class
    calculus: ClassVar[Calculus] = Calculus.ITO  # type: ignore[misc]

    def __init__(self, volatility: float = 0.7) -> None:
        self.volatility = positive(volatility, "volatility")

    def drift(self, x: Tensor, t: Tensor) -> Tensor:
        return x - x**3

    def diffusion(self, x: Tensor, t: Tensor) -> Tensor:
        return torch.full_like(x, self.volatility)

    def stationary_density(self, x: Tensor) -> Tensor:
        """Of each entry: ``exp((x^2 - x^4 / 2) / volatility^2)``, normalised."""
        return torch.exp(-((1.0 - x * x) ** 2) / (2.0 * self.volatility**2)) / self._mass

    @functools.cached_property
    def _mass(self) -> float:
        reach = (1.0 + 9.0 * self.volatility) ** 0.5 + 0.1  # beyond, the density is below exp(-40) of its top
        x = np.linspace(-reach, reach, 20_001)  # the trapezoidal rule converges as fast as the density is smooth
        return float(np.exp(-((1.0 - x * x) ** 2) / (2.0 * self.volatility**2)).sum() * (x[1] - x[0]))


@final
class LotkaVolterra(AbstractSDE):
    """Prey and predators, ``(batch, 2)``, with independent multiplicative noise; Ito.

    ``dX = X (growth - predation Y) dt + volatility X dW1``, ``dY = Y (gain X - death) dt + volatility Y dW2``.

    Args:
        growth: of prey, one over time.
        predation: of prey for each predator.
        gain: of predators for each prey.
        death: of predators, one over time.
        volatility: of both; 0 for the ordinary equation, which keeps `invariant`.

    Raises:
        TypeError: a parameter is no number.
        ValueError: a parameter is out of range.
    """

    noise: ClassVar[Noise] = Noise.DIAGONAL  # type: ignore[misc]  # fixed for the whole class
    calculus: ClassVar[Calculus] = Calculus.ITO  # type: ignore[misc]

    def __init__(
        self,
        growth: float = 1.0,
        predation: float = 1.0,
        gain: float = 1.0,
        death: float = 1.0,
        volatility: float = 0.1,
    ) -> None:
        self.growth, self.predation = positive(growth, "growth"), positive(predation, "predation")
        self.gain, self.death = positive(gain, "gain"), positive(death, "death")
        self.volatility = positive(volatility, "volatility", zero=True)

    def drift(self, x: Tensor, t: Tensor) -> Tensor:
        prey, predators = self._species(x)
        return torch.stack([
            prey * (self.growth - self.predation * predators), predators * (self.gain * prey - self.death),
        ], 1)  # fmt: skip

    def diffusion(self, x: Tensor, t: Tensor) -> Tensor:
        return self.volatility * x

    def invariant(self, x: Tensor) -> Tensor:
        """``gain X - death log X + predation Y - growth log Y``, ``(batch,)``.

        Without noise it keeps its value. With noise its mean grows by ``volatility^2 (growth + death) t / 2``.
        """
        prey, predators = self._species(x)
        kept = self.gain * prey - self.death * prey.log()
        return kept + self.predation * predators - self.growth * predators.log()

    @staticmethod
    def _species(x: Tensor) -> tuple[Tensor, Tensor]:
        if x.ndim != 2 or x.shape[1] != 2:
            raise ValueError(f"the state of LotkaVolterra is (batch, 2), prey and predators, got {tuple(x.shape)}")
        return x[:, 0], x[:, 1]
