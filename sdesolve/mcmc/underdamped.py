"""Underdamped Langevin dynamics."""

from __future__ import annotations

import math
from typing import final

from sdesolve_kernels import Stream, normal
from torch import Tensor

from sdesolve.brownian import AbstractNoise, BrownianPath, unit_normals
from sdesolve.mcmc.base import AbstractKernel, Target, Walker, check_step_size


@final
class BAOAB(AbstractKernel):
    """Underdamped Langevin dynamics, ``dX = V dt``, ``dV = s(X) dt - gamma V dt + sqrt(2 gamma) dW``, by splitting.

    One step of size ``h`` is half a kick ``v += h/2 s(x)``, half a drift ``x += h/2 v``, the exact
    Ornstein-Uhlenbeck step ``v = exp(-gamma h) v + sqrt(1 - exp(-2 gamma h)) z``, and the two halves again in reverse:
    one evaluation of the score. The stationary law has ``p(x) N(v; 0, I)`` as its limit; the law of ``x`` is off by
    O(h^2), and by nothing at all on a Gaussian, for any ``h`` below twice its smallest standard deviation (Leimkuhler
    and Matthews 2013, section 3.2).

    Args:
        step_size: ``h``, in time; a Gaussian of standard deviation 1 turns round in ``2 pi``.
        friction: ``gamma``, one over time.

    Raises:
        ValueError: either is not positive.
    """

    has_velocity = True

    def __init__(self, step_size: float, friction: float = 1.0) -> None:
        self.step_size = check_step_size(step_size)
        self.friction = check_step_size(friction, "friction")

    def start(self, target: Target, x: Tensor, velocity: Tensor | None, noise: AbstractNoise) -> Walker:
        return Walker(x, target.score(x), velocity=_thermal(x, noise) if velocity is None else velocity)

    def step(self, target: Target, walker: Walker, k: int, noise: AbstractNoise) -> Walker:
        assert walker.velocity is not None
        h, x, v = self.step_size, walker.x, walker.velocity
        decay = math.exp(-self.friction * h)
        v = v + 0.5 * h * walker.score
        x = x + 0.5 * h * v
        v = decay * v + math.sqrt(-math.expm1(-2.0 * self.friction * h)) * unit_normals(noise, k, x)
        x = x + 0.5 * h * v
        s = target.score(x)
        return Walker(x, s, velocity=v + 0.5 * h * s)


def _thermal(x: Tensor, noise: AbstractNoise) -> Tensor:
    """Velocities from their stationary law."""
    if not isinstance(noise, BrownianPath):
        raise TypeError(f"velocities are drawn from a BrownianPath, not from {type(noise).__name__}; give velocity=")
    d = math.prod(x.shape[1:])
    return normal(
        len(x),
        d,
        seed=noise.seed,
        stream=Stream.VELOCITY,
        first_path=noise.first_path,
        dtype=x.dtype,
        device=x.device,
    ).reshape(x.shape)
