"""What a solver is, and what it can be used on; solvers whose step works on any SDE."""

from __future__ import annotations

import abc
import dataclasses
from typing import final

from torch import Tensor

from sdesolve.sde import AbstractSDE, Calculus, Noise

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
    """A fixed-step solver, with pure steps: either an `AbstractOneStep` or an `AbstractTabulated` one, or both.

    Two solvers of one class with the same settings are equal. Capabilities are attributes, compared with the SDE before
    the first step:

    Attributes:
        supported: pairs of calculus and noise type that the scheme converges for.
        strong_order: order of ``E|X_h - X|`` in the step size, on SDEs whose noise is neither additive nor none;
            ``None`` if the scheme is for ODEs only, or for additive noise only.
        weak_order: order of ``|E f(X_h) - E f(X)|``; ``None`` if the scheme is for ODEs only.
        ode_order: order on an ODE; ``None`` if the scheme is not for ODEs.
        evaluations: evaluations of the drift (for a reverse SDE or probability flow, of the score) a step.
        stochasticity: of the reverse SDE that the scheme is made for (`ReverseSDE`), 0 being the probability flow;
            ``None`` if it takes any.
        own_component_diffusion: whether diagonal noise must have each ``g_i`` depend on ``x_i`` alone.
    """

    supported: Supported
    strong_order: float | None
    weak_order: float | None
    ode_order: int | None
    evaluations: int
    stochasticity: float | None = None
    own_component_diffusion: bool = False

    @final
    def settings(self) -> dict[str, object]:
        """What the solver was made with."""
        return {k: v for k, v in vars(self).items() if not k.startswith("_") and k not in _CAPABILITIES}

    @final
    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{k}={v!r}' for k, v in self.settings().items())})"

    @final
    def __eq__(self, other: object) -> bool:
        return type(self) is type(other) and self.settings() == other.settings()

    @final
    def __hash__(self) -> int:
        return hash((type(self), *self.settings().items()))


_CAPABILITIES = frozenset(AbstractSolver.__annotations__) | {"memory"}


class AbstractOneStep(AbstractSolver):
    """A solver for any SDE of a supported kind: its step is a function of state, times and Brownian increment."""

    @abc.abstractmethod
    def step(self, sde: AbstractSDE, x: Tensor, span: Span, dW: Tensor | None) -> Tensor:
        """The state at ``span.t1`` from the state ``x: (batch, *state)`` at ``span.t0``.

        ``dW`` is the Brownian increment over the step, of the shape that `AbstractSDE` tabulates; ``None`` for an ODE.
        """


def noise_term(sde: AbstractSDE, x: Tensor, t: Tensor, dW: Tensor | None) -> Tensor | float:
    """``g(x, t) dW``, and 0 for an ODE."""
    return 0.0 if dW is None else sde.diffusion_product(x, t, dW)
