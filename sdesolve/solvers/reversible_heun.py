"""The reversible Heun method."""

from __future__ import annotations

from typing import final

from torch import Tensor

from sdesolve._internal.arguments import number
from sdesolve.brownian import Increment
from sdesolve.sde import AbstractSDE, Noise
from sdesolve.solvers.base import AbstractRemembering, Span, drift_and_noise, supports


@final
class ReversibleHeun(AbstractRemembering):
    """``z' = 2 x - z + f(z, t) h + g(z, t) W``, ``x' = x + [f(z, t) + f(z', t')] h / 2 + [g(z, t) + g(z', t')] W / 2``.

    Its steps can be undone exactly: from ``(x', z')`` the same formulas with ``-h`` and ``-W`` give ``(x, z)``. Strong
    order 1/2 on a Stratonovich SDE, 1 when the noise commutes, and weak order 1; second order on an ODE. An Ito SDE is
    accepted only with additive noise. What it carries beside ``x`` is ``z - x``, which is 0 at the start.

    It is unstable wherever a solution contracts, whatever the step: ``z - x`` grows as fast as differences between
    solutions shrink, by ``exp(rate T)`` for ``x' = -rate x``. `solve` compares it with the way that ``x`` has gone.
    Kidger, Foster, Li and Lyons 2021, "Efficient and accurate gradients for neural SDEs", algorithm 1.

    Args:
        tolerance: the most that ``z - x`` may be at the end of a run, root mean square over batch and state, relative
            to ``x`` less where it started.

    Raises:
        ValueError: ``tolerance`` is not positive; in `solve`, ``z`` and ``x`` have come apart.
    """

    supported = supports(ito=(Noise.NONE, Noise.ADDITIVE), stratonovich=tuple(Noise))
    strong_order = 0.5
    strong_orders = (1.0, 1.0, 0.5)
    weak_order = 1.0
    ode_order = 2
    evaluations, diffusion_evaluations = 2, 2
    by_products = True
    memory = 1

    def __init__(self, tolerance: float = 0.5) -> None:
        self.tolerance = number(tolerance, "tolerance")
        if not self.tolerance > 0.0:
            raise ValueError(f"tolerance must be positive, got {tolerance}")

    def advance(
        self, sde: AbstractSDE, states: tuple[Tensor, ...], span: Span, noise: Increment | None
    ) -> tuple[Tensor, ...]:
        (x, gap), dt = states, span.dt
        z = x + gap
        f, g_W = drift_and_noise(sde, z, span.t0, noise)
        move = f * dt + g_W
        z_next = x - gap + move
        f, g_W = drift_and_noise(sde, z_next, span.t1, noise)
        after = x + 0.5 * (move + f * dt + g_W)
        return after, z_next - after

    def undo(
        self, sde: AbstractSDE, states: tuple[Tensor, ...], span: Span, noise: Increment | None
    ) -> tuple[Tensor, ...]:
        """The state and what is carried at ``span.t0`` from those at ``span.t1``; otherwise as `advance`."""
        (x_next, gap), dt = states, span.dt
        f, g_W = drift_and_noise(sde, x_next + gap, span.t1, noise)
        move = f * dt + g_W
        z = x_next - gap - move
        f, g_W = drift_and_noise(sde, z, span.t0, noise)
        x = x_next - 0.5 * (move + f * dt + g_W)
        return x, z - x

    def check_end(self, x0: Tensor, x: Tensor, memory: tuple[Tensor, ...]) -> None:
        (gap,) = memory
        if not gap.numel():
            return
        apart, gone = (float(v.detach().double().square().mean().sqrt()) for v in (gap, x - x0))
        if not apart <= self.tolerance * gone:
            raise ValueError(
                f"ReversibleHeun is unstable here: its two states are {apart:.2g} apart at the end, the solution has "
                f"gone {gone:.2g}; it does not suit solutions that contract. Take Heun or SPaRK, or another tolerance="
            )
