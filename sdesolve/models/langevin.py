"""Underdamped Langevin dynamics."""

from __future__ import annotations

import math
from typing import ClassVar, final

import torch
from torch import Tensor

from sdesolve._internal.arguments import kind_of
from sdesolve.models.arguments import function, positive
from sdesolve.sde import AbstractSDE, Calculus, Field, Noise


@final
class UnderdampedLangevin(AbstractSDE):
    """``dX = V dt``, ``dV = -friction V dt - grad U(X, t) / mass dt + sqrt(2 friction temperature / mass) dW``.

    The state is ``(batch, 2, *state)``: ``x[:, 0]`` holds positions and ``x[:, 1]`` velocities; `state` puts the two
    together. ``W`` drives the velocities alone, ``(batch, 1, *state)``. The stationary law has the density
    ``exp(-U(x) / temperature - mass v^2 / (2 temperature))``. `ALIGN`, `QUICSORT`, `UBU`, `BAOAB` and `OBABO` are made
    for it; every solver for additive noise takes it too. Backwards in time friction feeds energy: velocities grow as
    ``exp(friction |t|)``.

    Args:
        gradient: ``grad U(x, t)``, of the shape of the positions ``x: (batch, *state)``.
        mass: a number, or a tensor that broadcasts to the positions of one path, ``(*state)``.
        friction: one over time; 0 for Newton's equation.
        temperature: in units of energy (``k_B = 1``).

    Raises:
        TypeError: ``gradient`` cannot be called, or a parameter is no number.
        ValueError: ``mass`` is not positive, ``friction`` or ``temperature`` negative.

    Example:
        >>> oscillator = UnderdampedLangevin(lambda x, t: 2.0 * x, friction=2.0, temperature=0.5)
        >>> start = oscillator.state(torch.zeros(1000, 3), torch.zeros(1000, 3))
    """

    noise: ClassVar[Noise] = Noise.ADDITIVE  # type: ignore[misc]  # fixed for the whole class
    calculus: ClassVar[Calculus] = Calculus.ITO  # type: ignore[misc]

    def __init__(
        self, gradient: Field, mass: float | Tensor = 1.0, friction: float = 1.0, temperature: float = 1.0
    ) -> None:
        self._gradient = function(gradient, "gradient")
        if isinstance(mass, Tensor):
            if not mass.is_floating_point() or not bool((mass > 0).all() & mass.isfinite().all()):
                raise ValueError("mass must be positive: a number, or a tensor of such that broadcasts to one position")
            self.mass: float | Tensor = mass
        else:
            self.mass = positive(mass, "mass")
        self.friction = positive(friction, "friction", zero=True)
        self.temperature = positive(temperature, "temperature", zero=True)

    @staticmethod
    def state(x: Tensor, v: Tensor) -> Tensor:
        """The state of positions and velocities, both ``(batch, *state)``."""
        return torch.stack([x, v], 1)

    def channels(self, x: Tensor) -> tuple[int, ...]:
        self._check(x)
        return (1, *x.shape[2:])

    def drift(self, x: Tensor, t: Tensor) -> Tensor:
        self._check(x)
        q, v = x.unbind(1)
        gradient = self._gradient(q, t)
        if not isinstance(gradient, Tensor) or gradient.shape != q.shape:
            got = tuple(gradient.shape) if isinstance(gradient, Tensor) else kind_of(gradient)
            raise ValueError(f"gradient must return a tensor of the shape of positions, {tuple(q.shape)}, got {got}")
        return self.state(v, -self.friction * v - gradient / self._of(q, self.mass))

    def diffusion(self, x: Tensor, t: Tensor) -> Tensor:
        """``(0, sqrt(2 friction temperature / mass))`` for positions and velocities."""
        self._check(x)
        q = x[:, 0]
        return self.state(torch.zeros_like(q), torch.ones_like(q) * self.noise_scale(q))

    def noise_scale(self, x: Tensor) -> float | Tensor:
        """``sqrt(2 friction temperature / mass)``, for positions ``x``."""
        mass, energy = self._of(x, self.mass), 2.0 * self.friction * self.temperature
        return (energy / mass).sqrt() if isinstance(mass, Tensor) else math.sqrt(energy / mass)

    @staticmethod
    def _of(x: Tensor, mass: float | Tensor) -> float | Tensor:
        return mass.to(x) if isinstance(mass, Tensor) else mass

    @staticmethod
    def _check(x: Tensor) -> None:
        if x.ndim < 2 or x.shape[1] != 2:
            raise ValueError(
                "the state of UnderdampedLangevin is (batch, 2, *state), positions and velocities, got "
                f"{tuple(x.shape)}; UnderdampedLangevin.state(x, v) makes it of both"
            )
