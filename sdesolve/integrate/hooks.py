"""What a callback sees of a step of `sample`, and what it may do."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, final

import torch
from torch import Tensor

from sdesolve._internal.arguments import kind_of
from sdesolve.diffusions.base import AbstractDiffusion
from sdesolve.integrate.checks import all_finite, bad_rows
from sdesolve.reverse import Score
from sdesolve.sde import Field, per_sample
from sdesolve.solvers.base import Span

if TYPE_CHECKING:
    from sdesolve.integrate.problem import Problem

Callback = Callable[["SamplingStep"], Any]


@final
class SamplingStep:
    """A step of `sample`, from ``x`` at ``t`` to ``x_next`` at ``t_next``, as its callback sees it.

    Tensors are those of the run: read them, keep them, and return a new state rather than writing into them.

    Attributes:
        index: number of the step, from 0; of the whole run, where it goes on from another (``start``).
        steps: how many there are.
        t, t_next: times on the process's own clock; ``t_next < t``.
        x, x_next: states, ``(batch, *state)``; ``x_next`` is after the corrections of a `PredictorCorrector`.
        denoise: makes `denoised`.
    """

    def __init__(
        self, index: int, steps: int, t: float, t_next: float, x: Tensor, x_next: Tensor, denoise: Callable[[], Tensor]
    ) -> None:
        self.index, self.steps, self.t, self.t_next, self.x, self.x_next = index, steps, t, t_next, x, x_next
        self._denoise: Callable[[], Tensor] | None = denoise
        self._denoised: Tensor | None = None
        self._stops = False

    @property
    def denoised(self) -> Tensor:
        """``E[x_0 | x_t = x]``, the estimate of clean data that the step started from, ``(batch, *state)``.

        It is made of the evaluation that the step began with, where there was one, and costs an evaluation of the score
        otherwise (with churn, for one).

        Raises:
            RuntimeError: first asked for when the callback has returned.
        """
        if self._denoised is None:
            if self._denoise is None:
                raise RuntimeError(
                    "the denoised estimate is made while the callback runs: ask for it there, and keep it"
                )
            self._denoised = self._denoise()
        return self._denoised

    def stop(self) -> None:
        """Makes this the last step."""
        self._stops = True

    def __repr__(self) -> str:
        return f"SamplingStep({self.index} of {self.steps}, t = {self.t:.6g} to {self.t_next:.6g})"


@final
class RecordedScore:
    """A score that remembers what it was at the state a step starts from.

    Args:
        score: ``grad_x log p_t(x)``.
        process: the forward diffusion.
    """

    def __init__(self, score: Score, process: AbstractDiffusion) -> None:
        self.score, self.process = score, process
        self._x: Tensor | None = None
        self._values: list[tuple[Tensor, Tensor, bool]] = []

    def begin(self, x: Tensor | None) -> None:
        """Looks out for evaluations at this state."""
        self._x, self._values = x, []

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        return self._noted(x, t, self.score(x, t), data=False)

    def by(self, denoise: Field) -> Field:
        """``denoise(x, t)``, the denoised state in place of the score, remembered likewise."""
        return lambda x, t: self._noted(x, t, denoise(x, t), data=True)

    def _noted(self, x: Tensor, t: Tensor, value: Tensor, *, data: bool) -> Tensor:
        if x is self._x:
            self._values.append((t, value, data))
        return value

    def denoised(self, x: Tensor, t: Tensor, evaluate: Callable[[], Tensor]) -> Tensor:
        """``E[x_0 | x_t = x]`` from what is remembered; else from the score that ``evaluate`` makes."""
        near = torch.finfo(x.dtype).eps * t.abs()
        found = [(s, data) for at, s, data in self._values if at.ndim == 0 and bool((at - t).abs() <= near)]
        s, is_data = found[0] if found else (evaluate(), False)
        if is_data:
            return s
        alpha, sigma = (per_sample(c.to(x), x) for c in (self.process.alpha(t), self.process.sigma(t)))
        return (x + sigma.square() * s) / alpha


@final
class Hook:
    """A callback, and the score whose evaluations it is shown.

    Args:
        callback: takes a `SamplingStep`; what it returns, if not None, is the state to go on with.
        score: the one within the equation.

    Attributes:
        stopped: whether the callback has ended the run.

    Raises:
        TypeError: ``callback`` is no function of one argument.
    """

    def __init__(self, callback: Callback, score: RecordedScore) -> None:
        if isinstance(callback, type) or not callable(callback):
            raise TypeError(f"callback must be a function of a SamplingStep, got {kind_of(callback)}")
        try:
            inspect.signature(callback).bind(None)
        except ValueError:  # made in C, of which nothing is known
            pass
        except TypeError:
            raise TypeError(
                "callback is called with one argument, a SamplingStep with index, steps, t, t_next, x, x_next, "
                f"denoised and stop(); {kind_of(callback)} {getattr(callback, '__name__', '')!r} does not take that"
            ) from None
        self._callback, self._score, self.stopped = callback, score, False

    def begin(self, x: Tensor) -> None:
        """A step starts from ``x``."""
        self._score.begin(x)

    def after(self, problem: Problem, k: int, span: Span, x: Tensor, x_next: Tensor) -> Tensor:
        """The state to go on with after step ``k``.

        Raises:
            TypeError: the callback returned something else than a tensor of the state's dtype and device, or None.
            ValueError: it returned another shape, or values that are not finite.
        """

        def evaluate() -> Tensor:
            problem.watched.evaluations += 1
            return self._score.score(x, span.t0)

        t, t_next = (float(problem.times[i]) for i in (k, k + 1))
        step = SamplingStep(k, problem.steps, t, t_next, x, x_next, lambda: self._score.denoised(x, span.t0, evaluate))
        new = self._callback(step)
        step._denoise, self.stopped = None, step._stops
        self._score.begin(None)
        if new is None:
            return x_next
        if not isinstance(new, Tensor):
            raise TypeError(
                f"callback returned {kind_of(new)} after step {k}; return a state like x_next, or None to leave it"
            )
        if new.shape != x_next.shape:
            raise ValueError(
                f"callback returned a state of shape {tuple(new.shape)} after step {k}, and states have "
                f"{tuple(x_next.shape)}; return what is like x_next, or None to leave it"
            )
        if new.dtype != x_next.dtype or new.device != x_next.device:
            raise TypeError(
                f"callback returned {new.dtype} on {new.device} after step {k}, and states are {x_next.dtype} on "
                f"{x_next.device}; convert it with .to(step.x_next)"
            )
        if problem.check_finite and not all_finite(new):
            row = int(bad_rows(new).nonzero()[0])
            raise ValueError(f"callback returned a state that is not finite after step {k}: row {row} holds nan or inf")
        return new.detach()
