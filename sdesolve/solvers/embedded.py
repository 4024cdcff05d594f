"""Schemes whose step comes with an estimate of its error."""

from __future__ import annotations

import abc
from collections.abc import Callable, Sequence
from typing import NamedTuple, final

from torch import Tensor

from sdesolve._internal.arguments import whole_number
from sdesolve.brownian import Increment
from sdesolve.sde import AbstractSDE, per_sample
from sdesolve.solvers.base import AbstractOneStep, Span
from sdesolve.solvers.controller import StepController

Slope = Callable[[Tensor, Tensor], Tensor]


class Attempt(NamedTuple):
    """A step that may yet be rejected.

    Attributes:
        x: state at its end, ``(batch, *state)``.
        error: estimate of the error of ``x``.
        slopes: the drift at each stage; the last one is the drift at the end.
    """

    x: Tensor
    error: Tensor
    slopes: tuple[Tensor, ...]


class AbstractEmbedded(AbstractOneStep):
    """An embedded Runge-Kutta pair for ODEs, which chooses its steps by its own error estimate.

    Args:
        rtol, atol, max_steps: as `StepController`, which they make.

    Attributes:
        error_order: order of the error estimate, one more than the order of the state it was compared with.
    """

    error_order: int
    stochasticity = 0.0

    @final
    def __init__(self, rtol: float = 1e-5, atol: float = 1e-5, *, max_steps: int = 10_000) -> None:
        StepController(rtol, atol, max_steps)
        self.rtol, self.atol = float(rtol), float(atol)
        self.max_steps = whole_number(max_steps, "max_steps", 1)

    @property
    def controller(self) -> StepController:
        return StepController(self.rtol, self.atol, self.max_steps)

    @abc.abstractmethod
    def attempt(self, drift: Slope, x: Tensor, slope: Tensor, t: Tensor, dt: Tensor) -> Attempt:
        """One step of each sample's own size from ``x: (batch, *state)`` at ``t``.

        Args:
            drift: ``f(x, t)``.
            x: state.
            slope: ``f(x, t)`` there, known from the step before.
            t: times, ``()`` or ``(batch,)``.
            dt: likewise; 0 for samples that have arrived.
        """

    @abc.abstractmethod
    def between(self, x: Tensor, attempt: Attempt, dt: Tensor, theta: Tensor) -> Tensor:
        """The state at the fraction ``theta: (batch,)`` of an accepted step that started at ``x``."""

    @final
    def step(self, sde: AbstractSDE, x: Tensor, span: Span, noise: Increment | None) -> Tensor:
        dt = span.t1 - span.t0
        return self.attempt(sde.drift, x, sde.drift(x, span.t0), span.t0, dt).x


class AbstractExplicitPair(AbstractEmbedded):
    """An explicit pair whose last stage is the state after the step, so that its slope is the first of the next one.

    Attributes:
        nodes: times of the stages after the first, as fractions of the step.
        stages: weights of slopes in each of them.
        error: weights of slopes in the estimate of the error.
    """

    nodes: tuple[float, ...]
    stages: tuple[tuple[float, ...], ...]
    error: tuple[float, ...]

    @final
    def attempt(self, drift: Slope, x: Tensor, slope: Tensor, t: Tensor, dt: Tensor) -> Attempt:
        h = per_sample(dt.to(x.dtype), x)
        k, y = [slope], x
        for node, weights in zip(self.nodes, self.stages, strict=True):
            y = x + h * combination(weights, k)
            k.append(drift(y, t + node * dt))
        return Attempt(y, h * combination(self.error, k), tuple(k))


def combination(weights: tuple[float, ...], slopes: Sequence[Tensor]) -> Tensor:
    """``sum_j weights_j slopes_j`` over the weights that are not 0."""
    terms = [w * k for w, k in zip(weights, slopes, strict=True) if w]
    return sum(terms[1:], terms[0])
