"""What a solver is: one pure step, and what it can be used on."""

from __future__ import annotations

import abc
import dataclasses
from typing import ClassVar

from torch import Tensor

from sdesolve.sde import AbstractSDE, AbstractSemilinear, Calculus, Noise

Supported = frozenset[tuple[Calculus, Noise]]


def supports(*, ito: tuple[Noise, ...] = (), stratonovich: tuple[Noise, ...] = ()) -> Supported:
    """The pairs of calculus and noise type that a solver is right for."""
    return frozenset([(Calculus.ITO, n) for n in ito] + [(Calculus.STRATONOVICH, n) for n in stratonovich])


@dataclasses.dataclass(frozen=True, slots=True)
class Span:
    """One step of a grid, from ``t0`` to ``t1``.

    ``t0`` and ``t1`` are ``()`` or ``(batch,)``. ``dt = t1 - t0``, negative when time runs backwards, is rounded from
    the float64 grid and not taken from the rounded times; with a time per sample it has the shape
    ``(batch, 1, ..., 1)`` that broadcasts against the state.
    """

    t0: Tensor
    t1: Tensor
    dt: Tensor

    def at(self, fraction: float) -> Tensor:
        """The time that lies ``fraction`` of the way through the step, shaped as ``t0``."""
        return self.t0 + fraction * (self.t1 - self.t0)


class AbstractSolver(abc.ABC):
    """A fixed-step solver: a pure function from the state at the start of a step to the state at its end.

    Capabilities are class attributes, compared with the SDE before the first step:

    Attributes:
        supported: pairs of calculus and noise type that the scheme converges for.
        strong_order: order of ``E|X_h - X|`` in the step size, on SDEs whose noise is neither additive nor none;
            ``None`` if the scheme is for ODEs only.
        weak_order: order of ``|E f(X_h) - E f(X)|``, likewise.
        ode_order: order on an ODE.
        evaluations: drift evaluations a step.
        own_component_diffusion: whether diagonal noise must have each ``g_i`` depend on ``x_i`` alone.
    """

    supported: ClassVar[Supported]
    strong_order: ClassVar[float | None]
    weak_order: ClassVar[float | None]
    ode_order: ClassVar[int]
    evaluations: ClassVar[int]
    own_component_diffusion: ClassVar[bool] = False

    @abc.abstractmethod
    def step(self, sde: AbstractSDE, x: Tensor, span: Span, dW: Tensor | None) -> Tensor:
        """The state at ``span.t1`` from the state ``x: (batch, *state)`` at ``span.t0``.

        ``dW`` is the Brownian increment over the step, of the shape that `AbstractSDE` tabulates; ``None`` for an ODE.
        """


class AbstractTabulated(AbstractSolver):
    """A solver whose step on a semilinear equation is a row of numbers: ``x <- a x + b s(x, t) + c z``."""

    @abc.abstractmethod
    def table(self, sde: AbstractSemilinear, times: Tensor) -> Tensor | None:
        """Rows ``(a, b, c)`` for the steps between consecutive ``times``, in float64.

        Args:
            sde: the equation, with field ``s``.
            times: ``(steps + 1,)`` or ``(steps + 1, batch)``, float64.

        Returns:
            ``(steps, 3)`` or ``(steps, 3, batch)``; ``None`` if the rates of ``sde`` depend on more than time.
        """


def noise_term(sde: AbstractSDE, x: Tensor, t: Tensor, dW: Tensor | None) -> Tensor | float:
    """``g(x, t) dW``, and 0 for an ODE."""
    return 0.0 if dW is None else sde.diffusion_product(x, t, dW)
