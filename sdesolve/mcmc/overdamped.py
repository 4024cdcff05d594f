"""Overdamped Langevin dynamics, unadjusted and Metropolis-adjusted."""

from __future__ import annotations

from typing import final

import torch
from sdesolve_kernels import Stream, langevin_step, uniform
from torch import Tensor

from sdesolve.brownian import AbstractNoise, BrownianPath, unit_normals
from sdesolve.mcmc.base import (
    AbstractKernel,
    Convention,
    ConventionName,
    Target,
    Walker,
    check_step_size,
    squared_norm,
)
from sdesolve.sde import per_sample


@final
class Langevin(AbstractKernel):
    """Unadjusted Langevin dynamics: ``x' = x + delta s(x) + sqrt(2 delta) z``, every step taken.

    Euler-Maruyama on ``dX = s(X) dt + sqrt(2) dW``. Its stationary law is off by O(delta): on a Gaussian of variance
    ``v`` the variance is ``v / (1 - delta / (2 v))``, and there is none from ``delta = 2 v`` on. Roberts and Tweedie
    1996.

    Args:
        step_size: ``eps`` in the sense of ``convention``.
        convention: ``full``, ``delta = eps``, or ``half``, ``delta = eps / 2`` (`Convention`).

    Raises:
        ValueError: a step size that is not positive, an unknown convention.
    """

    def __init__(self, step_size: float, *, convention: ConventionName = "full") -> None:
        self.convention = Convention.named(convention)
        self.step_size = check_step_size(step_size)

    def start(self, target: Target, x: Tensor, velocity: Tensor | None, noise: AbstractNoise) -> Walker:
        return Walker(x, target.score(x))

    def step(self, target: Target, walker: Walker, k: int, noise: AbstractNoise) -> Walker:
        x = langevin_update(walker.x, walker.score, self.convention.step(self.step_size), noise, k)
        return Walker(x, target.score(x))


@final
class MALA(AbstractKernel):
    """The Metropolis-adjusted Langevin algorithm: a step of `Langevin` is proposed, and refused often enough.

    ``y = x + delta s(x) + sqrt(2 delta) z`` is accepted with probability ``min(1, p(y) q(x | y) / (p(x) q(y | x)))``,
    ``q(y | x) = N(y; x + delta s(x), 2 delta I)``, so that ``p`` itself is stationary whatever the step size, and even
    if the score is not that of ``p``. Where a density is nan the proposal is refused. Besag 1994; Roberts and Tweedie
    1996; an acceptance near 0.574 is best in high dimension (Roberts and Rosenthal 1998).

    Args:
        step_size: ``eps`` in the sense of ``convention``.
        convention: ``full``, ``delta = eps``, or ``half``, ``delta = eps / 2`` (`Convention`).

    Raises:
        ValueError: a step size that is not positive, an unknown convention.
    """

    needs_energy = True

    def __init__(self, step_size: float, *, convention: ConventionName = "full") -> None:
        self.convention = Convention.named(convention)
        self.step_size = check_step_size(step_size)

    def start(self, target: Target, x: Tensor, velocity: Tensor | None, noise: AbstractNoise) -> Walker:
        none = torch.zeros(len(x), dtype=torch.int64, device=x.device)
        return Walker(x, target.score(x), target.log_density(x), accepted=none)

    def step(self, target: Target, walker: Walker, k: int, noise: AbstractNoise) -> Walker:
        assert walker.log_density is not None
        assert walker.accepted is not None
        delta = self.convention.step(self.step_size)
        x, s = walker.x, walker.score
        y = langevin_update(x, s, delta, noise, k)
        s_y, log_p = target.score(y), target.log_density(y)
        log_q = (squared_norm(y - x - delta * s) - squared_norm(x - y - delta * s_y)) / (4.0 * delta)
        accept = acceptance_uniforms(noise, k, x).log() < log_p - walker.log_density + log_q
        chosen = per_sample(accept, x)
        return Walker(
            torch.where(chosen, y, x),
            torch.where(chosen, s_y, s),
            torch.where(accept, log_p, walker.log_density),
            accepted=walker.accepted + accept,
        )


def langevin_update(x: Tensor, s: Tensor, delta: float, noise: AbstractNoise, k: int) -> Tensor:
    """``x + delta s + sqrt(2 delta) z`` with draw ``k`` of ``noise``; one kernel where the noise can be made in it."""
    if isinstance(noise, BrownianPath):
        return langevin_step(x, s, mode="fixed", size=delta, **noise.place(k))
    return x + delta * s + (2.0 * delta) ** 0.5 * unit_normals(noise, k, x)


def acceptance_uniforms(noise: AbstractNoise, k: int, x: Tensor) -> Tensor:
    """One uniform number for each sample in step ``k``."""
    if not isinstance(noise, BrownianPath):
        raise TypeError(f"accepting at random needs a BrownianPath, got {type(noise).__name__}")
    u = uniform(
        len(x),
        1,
        seed=noise.seed,
        stream=Stream.ACCEPTANCE,
        first_path=noise.first_path,
        offset=noise.first_step + k,
        dtype=torch.float64,
        device=x.device,
    )
    return u[:, 0]
