"""Steps of equations with delays, which carry a ring of earlier states."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from fractions import Fraction
from typing import Any, cast, final

import torch
from torch import Tensor

from sdesolve._internal.arguments import short
from sdesolve.delays import DelaySDE, Pasts
from sdesolve.integrate.checks import all_finite
from sdesolve.integrate.lowering import Lowered, States, StepContext, one_step
from sdesolve.integrate.problem import Problem
from sdesolve.sde import AbstractSDE
from sdesolve.solvers.base import AbstractOneStep

EAGER = "delays read states of earlier steps, which no kernel keeps; steps run in torch"
_ROUNDING = 1e-6  # of a step, that grid points and lags may be off
_MOST_STEPS = 10_000_000
_DEEPEST = 1_000_000  # states of the past


@final
class Delayed(AbstractSDE):
    """A `DelaySDE` on a grid, with the past that belongs to each end of a step.

    Args:
        sde: the equation.
        times: the grid of the whole integration, ``(steps + 1,)``.
        x0: states to begin with.
        ring: states of the steps before that, the latest first; made of the history where there are none.

    Raises:
        ValueError: times that are not equally far apart and increase, lags that are no whole steps, a history of the
            wrong shape, or a ring of other lags.
    """

    def __init__(self, sde: DelaySDE, times: Tensor, x0: Tensor, ring: States | None) -> None:
        self.noise, self.calculus, self._sde = sde.noise, sde.calculus, sde
        self.steps = _whole_steps(sde.lags, times)
        dt, depth = float((times[-1] - times[0]) / (len(times) - 1)), max(self.steps)
        self._before = None if sde.history is None else self._history(times[0], x0)
        if ring is None:
            ring = tuple(self._history(times[0] - dt * k, x0) for k in range(1, depth + 1))
        elif len(ring) != depth:
            raise ValueError(
                f"start holds {len(ring)} states of the past, and lags of {short(sde.lags)} need {depth}: go on with a "
                "DelaySDE of the same lags"
            )
        self.ring = ring
        present = tuple(ring[m - 1] for m in self.steps)
        self._ends: tuple[Pasts, Pasts] = present, present
        self._t1: Tensor | None = None

    def _history(self, t: Tensor, x0: Tensor) -> Tensor:
        given = self._sde.history
        value = x0 if given is None else given(t.to(x0.device)) if callable(given) else given
        value = torch.as_tensor(value, dtype=x0.dtype, device=x0.device)
        sizes = zip(value.shape[::-1], x0.shape[::-1], strict=False)
        if value.ndim > x0.ndim or any(a not in (1, b) for a, b in sizes):
            raise ValueError(
                f"history must return what broadcasts to x0, {tuple(x0.shape)}, got {tuple(value.shape)} at t = "
                f"{float(t):.6g}"
            )
        if not all_finite(value):
            raise ValueError(f"history must be finite, and is not at t = {float(t):.6g}")
        return value.expand_as(x0)

    def at(self, k: int, t1: Tensor, x: Tensor, ring: States) -> None:
        """Has step ``k``, from ``x`` to the time ``t1``, read the past from a ring."""
        states = (x, *ring)
        end = [states[m - 1] for m in self.steps]
        if self._before is not None:  # up to the start its past is the history, and from then on the state there
            end = [self._before if m == k + 1 else past for m, past in zip(self.steps, end, strict=True)]
        self._ends, self._t1 = (tuple(states[m] for m in self.steps), tuple(end)), t1

    def _pasts(self, x: Tensor, t: Tensor) -> Pasts:
        pasts = self._ends[t is self._t1]
        if len(x) == len(pasts[0]):
            return pasts
        rows = torch.arange(len(x), device=x.device) % len(pasts[0])  # a check takes a row twice
        return tuple(past[rows] for past in pasts)

    def _given(self, function: Callable[[Tensor, Tensor, Pasts], Tensor], x: Tensor, t: Tensor, what: str) -> Tensor:
        pasts = self._pasts(x, t)
        before = [None if past.is_inference() else past._version for past in pasts]
        value = function(x, t, pasts)
        if any(v is not None and past._version != v for v, past in zip(before, pasts, strict=True)):
            raise ValueError(f"the {what} changed the past that it was given; let it work on a copy, past.clone()")
        return value

    def drift(self, x: Tensor, t: Tensor) -> Tensor:
        return self._given(self._sde.drift_given, x, t, "drift")

    def diffusion(self, x: Tensor, t: Tensor) -> Tensor:
        return self._given(self._sde.diffusion_given, x, t, "diffusion")


def _whole_steps(lags: tuple[float, ...], times: Tensor) -> tuple[int, ...]:
    """How many steps each lag has."""
    if times.ndim != 1:
        raise ValueError("delays need one grid for all paths, and this one has times for each")
    n, length = len(times) - 1, float(times[-1] - times[0])
    if length < 0:
        raise ValueError("equations with delays go to later times, and t1 is before t0")
    dt = length / n
    equal = times[0] + dt * torch.arange(n + 1, dtype=torch.float64, device="cpu")
    if bool(((times - equal).abs() > _ROUNDING * dt).any()):
        raise ValueError("delays need steps of equal length, those of the run gone on with included; give t1 and steps")
    counts = [lag / dt for lag in lags]
    if max(counts) > _DEEPEST:
        raise ValueError(
            f"a lag of {max(lags):.6g} is {max(counts):.6g} steps of {dt:.6g}, and as many earlier states are kept, at "
            f"most {_DEEPEST}; take longer steps"
        )
    off = [lag for lag, count in zip(lags, counts, strict=True) if abs(count - round(count)) > _ROUNDING or count < 0.5]
    if off:
        raise ValueError(
            f"lags must be whole numbers of steps, and {off[0]:.6g} is {off[0] / dt:.6g} of them with steps={n} "
            f"(dt = {dt:.6g}): {_advice(lags, length, n)}"
        )
    return tuple(map(round, counts))


def _advice(lags: tuple[float, ...], length: float, n: int) -> str:
    """The next number of steps at which all lags are whole."""
    shares = [Fraction(lag / length).limit_denominator(1_000_000) for lag in lags]
    common = math.lcm(*(share.denominator for share in shares))
    fit = -(-n // common) * common
    off = max(abs(float(share) * length - lag) for share, lag in zip(shares, lags, strict=True))
    if off <= 0.1 * _ROUNDING * length / fit and fit <= _MOST_STEPS:
        return f"steps={fit} would do"
    return f"end {min(lags):.6g} times a whole number after the start, so that some number of steps fits"


def delayed(problem: Problem) -> Lowered:
    """The step of an equation with delays."""
    equation = problem.equation
    assert isinstance(equation, Delayed)
    base = one_step(problem, cast(AbstractOneStep, problem.solver))

    def step(context: StepContext, states: States) -> States:
        x, *ring = states
        equation.at(cast(Any, context).k, context.span.t1, x, tuple(ring))
        return (*base.step(context, (x,)), x, *ring[:-1])

    return dataclasses.replace(base, step=step, extra=equation.ring, one_step=None, eager=EAGER)
