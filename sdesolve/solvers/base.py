"""What a solver is, and what it can be used on; solvers whose step works on any SDE."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable
from typing import final

import torch
from torch import Tensor

from sdesolve._internal.tables import html_table
from sdesolve.brownian import Increment, Part
from sdesolve.sde import AbstractSDE, Calculus, Noise
from sdesolve.solvers.controller import StepController

Supported = frozenset[tuple[Calculus, Noise]]
Estimate = Callable[[], Tensor]


def supports(*, ito: tuple[Noise, ...] = (), stratonovich: tuple[Noise, ...] = ()) -> Supported:
    """The pairs of calculus and noise type that a solver is right for.

    Args:
        ito, stratonovich: the noise types for which it converges to the solution of that calculus.
    """
    return frozenset([(Calculus.ITO, n) for n in ito] + [(Calculus.STRATONOVICH, n) for n in stratonovich])


@dataclasses.dataclass(frozen=True, slots=True)
class Span:
    """One step of a grid, from ``t0`` to ``t1``.

    Attributes:
        t0, t1: ``()`` or ``(batch,)``.
        dt: ``t1 - t0``, negative when time runs backwards, rounded from the float64 grid and not taken from the rounded
            times; with a time per sample ``(batch, 1, ..., 1)``, which broadcasts against the state.
        numbers: shaped as ``dt``, what the solver made of the grid beforehand (`AbstractOneStep.numbers`).
    """

    t0: Tensor
    t1: Tensor
    dt: Tensor
    numbers: tuple[Tensor, ...] = ()

    def at(self, fraction: float) -> Tensor:
        """The time that lies ``fraction`` of the way through the step, shaped as ``t0``."""
        return self.t0 + fraction * (self.t1 - self.t0)


class AbstractSolver(abc.ABC):
    """A solver, with pure steps: either an `AbstractOneStep` or an `AbstractTabulated` one, or both.

    Two solvers of one class with the same settings are equal. Capabilities are data, compared with the SDE before the
    first step: a class attribute, or a property where they depend on the settings.
    """

    @property
    @abc.abstractmethod
    def supported(self) -> Supported:
        """Pairs of calculus and noise type that the scheme converges for."""

    @property
    @abc.abstractmethod
    def strong_order(self) -> float | None:
        """Order of ``E|X_h - X|`` in the step size, on SDEs whose noise is neither additive nor none.

        ``None`` if the scheme is for ODEs only, or for additive noise only.
        """

    @property
    def strong_orders(self) -> tuple[float | None, float | None, float | None]:
        """Of additive, of commutative (scalar, diagonal by own components) and of general noise; ``None`` if refused.

        By default ``max(1, strong_order)`` for additive noise, and `strong_order`.
        """
        p, noises = self.strong_order, {noise for _, noise in self.supported}
        additive = max(1.0, p or 0.0) if Noise.ADDITIVE in noises else None
        general = p if Noise.GENERAL in noises else None
        return additive, p if noises & {Noise.DIAGONAL, Noise.SCALAR} else None, general

    @property
    @abc.abstractmethod
    def weak_order(self) -> float | None:
        """Order of ``|E f(X_h) - E f(X)|``; ``None`` if the scheme is for ODEs only."""

    @property
    @abc.abstractmethod
    def ode_order(self) -> int | None:
        """Order on an ODE; ``None`` if the scheme is not for ODEs."""

    @property
    @abc.abstractmethod
    def evaluations(self) -> int:
        """Evaluations of the drift (for a reverse SDE or probability flow, of the score) a step."""

    @property
    def diffusion_evaluations(self) -> int:
        """Evaluations of the diffusion a step, where there is noise."""
        return 1

    @property
    def column_evaluations(self) -> int | None:
        """How often general noise has each column of the diffusion evaluated by itself, after once as a whole.

        ``None`` where it is evaluated as a whole, `diffusion_evaluations` times.
        """
        return None

    @property
    def stochasticity(self) -> float | None:
        """Of the reverse SDE that the scheme is made for (`ReverseSDE`), 0 being the flow; ``None`` for any."""
        return None

    @property
    @final
    def sampling_stochasticity(self) -> float:
        """Of the reverse equation that samples are drawn by unless told otherwise.

        What the scheme is made for; else 1, the reverse SDE, if it takes additive noise, and 0, the flow, if not.
        """
        if self.stochasticity is not None:
            return self.stochasticity
        return 1.0 if (Calculus.ITO, Noise.ADDITIVE) in self.supported else 0.0

    @property
    def equations(self) -> tuple[type[AbstractSDE], ...]:
        """Classes of SDEs that the step is made for; empty for any SDE of a supported kind."""
        return ()

    @property
    def own_component_diffusion(self) -> bool:
        """Whether diagonal noise must have each ``g_i`` depend on ``x_i`` alone, which `solve` then checks."""
        return False

    @property
    def commutative_noise(self) -> bool:
        """Whether general noise must commute, ``(g_j . grad) g_k = (g_k . grad) g_j``, which `solve` then checks."""
        return False

    @property
    def by_products(self) -> bool:
        """Whether a step reads general and additive noise by products ``g v`` alone, and never ``g`` itself."""
        return False

    @property
    def failure(self) -> str | None:
        """What it means that the step itself gives nan at finite values of the functions, for the error's message."""
        return None

    @property
    def needs(self) -> tuple[Part, ...]:
        """Parts of the `Increment` that a step reads."""
        return ("W",)

    @property
    def divisible(self) -> bool:
        """Whether a run may be cut at a grid point and gone on with: no step depends on how many there are in all."""
        return self.controller is None

    @property
    def controller(self) -> StepController | None:
        """How it chooses its own steps; ``None`` for a solver that takes those of a given grid."""
        return None

    @final
    def settings(self) -> dict[str, object]:
        """What the solver was made with."""
        return {k: v for k, v in vars(self).items() if not k.startswith("_")}

    @final
    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{k}={v!r}' for k, v in self.settings().items())})"

    def _repr_html_(self) -> str:
        strong = ", ".join("-" if p is None else f"{p:g}" for p in self.strong_orders)
        weak, ode = ("-" if p is None else f"{p:g}" for p in (self.weak_order, self.ode_order))
        kinds = ", ".join(sorted({f"{noise.value} ({calculus.value})" for calculus, noise in self.supported}))
        rows = {"noise": kinds, "strong order": f"{strong} (additive, diagonal, general)", "weak order": weak}
        return html_table(repr(self), {**rows, "order without noise": ode})

    @final
    def __eq__(self, other: object) -> bool:
        return type(self) is type(other) and self.settings() == other.settings()

    @final
    def __hash__(self) -> int:
        return hash((type(self), *self.settings().items()))


class AbstractOneStep(AbstractSolver):
    """A solver for any SDE of a supported kind: its step is a function of state, times and Brownian increment."""

    def numbers(self, sde: AbstractSDE, times: Tensor) -> Tensor | None:
        """Numbers of each step that follow from its ends, ``(steps, columns[, batch])``, float64; ``None`` for none.

        Args:
            sde: the equation.
            times: the grid, ``(steps + 1[, batch])``, float64 on the host.
        """
        return None

    @abc.abstractmethod
    def step(self, sde: AbstractSDE, x: Tensor, span: Span, noise: Increment | None) -> Tensor:
        """The state at ``span.t1`` from the state ``x: (batch, *state)`` at ``span.t0``.

        Args:
            sde: the equation.
            x: state.
            span: the step in time.
            noise: the Brownian motion over the step, with the parts that the solver `needs`; ``None`` for an ODE.
        """


class AbstractEstimating(AbstractOneStep):
    """A one-step solver whose step comes with an estimate of its error, from what the step itself evaluates."""

    @abc.abstractmethod
    def attempt(self, sde: AbstractSDE, x: Tensor, span: Span, noise: Increment | None) -> tuple[Tensor, Estimate]:
        """The state at ``span.t1``, and what gives the estimate, of the shape of ``x``; arguments as for `step`.

        The estimate is the difference from another consistent scheme on the same stages. It may use no other value of
        the path than the step does: steps that are chosen by more are biased.
        """

    @final
    def step(self, sde: AbstractSDE, x: Tensor, span: Span, noise: Increment | None) -> Tensor:
        return self.attempt(sde, x, span, noise)[0]


class AbstractRemembering(AbstractOneStep):
    """A one-step solver that carries tensors of the state's shape beside it, which are 0 at the start."""

    @property
    @abc.abstractmethod
    def memory(self) -> int:
        """How many."""

    @abc.abstractmethod
    def advance(
        self, sde: AbstractSDE, states: tuple[Tensor, ...], span: Span, noise: Increment | None
    ) -> tuple[Tensor, ...]:
        """The state and what is carried at ``span.t1`` from those at ``span.t0``; otherwise as `step`."""

    def check_end(self, x0: Tensor, x: Tensor, memory: tuple[Tensor, ...]) -> None:
        """Looks at what a run from ``x0`` to ``x`` leaves, and refuses what is no solution.

        Raises:
            ValueError: it is none.
        """

    @final
    def step(self, sde: AbstractSDE, x: Tensor, span: Span, noise: Increment | None) -> Tensor:
        """The first step of an integration."""
        return self.advance(sde, (x, *(torch.zeros_like(x),) * self.memory), span, noise)[0]


def drift_and_noise(sde: AbstractSDE, x: Tensor, t: Tensor, noise: Increment | None) -> tuple[Tensor, Tensor | float]:
    """``f(x, t)`` and `noise_term`, evaluated together."""
    if noise is None:
        return sde.drift(x, t), 0.0
    f, g = sde.drift_and_product_at(x, t)
    return f, g(noise.W)


def noise_term(sde: AbstractSDE, x: Tensor, t: Tensor, noise: Increment | None) -> Tensor | float:
    """``g(x, t) W``, and 0 for an ODE."""
    return 0.0 if noise is None else sde.diffusion_product(x, t, noise.W)
