"""What an adaptive solver is: one attempted step with an estimate of its error."""

from __future__ import annotations

import abc
from collections.abc import Callable
from typing import ClassVar, NamedTuple, final

from torch import Tensor

from sdesolve.solvers.base import Supported

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


class AbstractAdaptive(abc.ABC):
    """A solver that chooses its steps, for each sample by that sample's own error.

    Attributes:
        supported: pairs of calculus and noise type that the scheme converges for.
        ode_order: order of the state that an accepted step goes on with.
        evaluations: drift evaluations an attempt.
        error_order: order of the error estimate, one more than the order of the state it was compared with.
        stochasticity: of the reverse equations it integrates: 0, probability flows.
        rtol: relative tolerance.
        atol: absolute tolerance: a step is accepted if the root mean square over the state of
            ``error / (atol + rtol max(|x|, |x'|))`` is below 1.
        max_steps: attempts that a sample may take.
    """

    supported: ClassVar[Supported]
    ode_order: ClassVar[int]
    evaluations: ClassVar[int]
    stochasticity: ClassVar[float] = 0.0
    error_order: ClassVar[int]
    rtol: float
    atol: float
    max_steps: int

    @final
    def __repr__(self) -> str:
        return f"{type(self).__name__}(rtol={self.rtol:g}, atol={self.atol:g}, max_steps={self.max_steps})"

    @abc.abstractmethod
    def attempt(self, drift: Slope, x: Tensor, slope: Tensor, t: Tensor, dt: Tensor) -> Attempt:
        """One step of each sample's own size from ``x: (batch, *state)`` at ``t: (batch,)``.

        Args:
            drift: ``f(x, t)``.
            x: state.
            slope: ``f(x, t)`` there, known from the step before.
            t: times, float64.
            dt: ``(batch,)``, float64; 0 for samples that have arrived.
        """

    @abc.abstractmethod
    def between(self, x: Tensor, attempt: Attempt, dt: Tensor, theta: Tensor) -> Tensor:
        """The state at the fraction ``theta: (batch,)`` of an accepted step that started at ``x``."""
