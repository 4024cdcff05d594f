"""Which states an integration keeps, on grid points and between them."""

from __future__ import annotations

import copy
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Set
from typing import Any, Literal

import torch
from torch import Tensor

from sdesolve._internal.arguments import kind_of, short
from sdesolve.grids import read_times
from sdesolve.sde import per_sample

SaveAt = Iterable[float] | Tensor | Literal["grid"] | None
Observable = Callable[..., Tensor]

_SAME_TIME = 2.0**-44  # of the largest time: some roundings of float64, as sums of steps collect


class SavePlan:
    """Where each requested time lies on the grid, and the states found there.

    A time on the grid keeps the solver's own state. One inside a step, between ``x_k`` and ``x_{k+1}``, gets

    - for an SDE ``x_k + theta (x_{k+1} - x_k) + g(x_k, t_k) sqrt|dt| b(theta)`` with the Brownian bridge ``b`` of that
      very path: the chord alone has too little variance (at mid-step of a Wiener path, half of it);
    - for an ODE the cubic Hermite polynomial through both states and both slopes, of local order 4.

    A time is a grid point if it is one up to the precision that it, or the grid, was given in: `ts` then holds that
    of the grid.

    Args:
        grid: ``(steps + 1,)`` or ``(steps + 1, batch)``, float64.
        save_at: times, in the direction of integration; ``"grid"`` for every grid point; ``None`` for the end alone.
        observable: what to keep of a state instead of all of it, ``(batch, *state) -> (batch, *values)``; what it is
            called with is made by `arguments` of all that a step carries.
        moments: keep mean and variance over the batch instead of every path.
        rounding: how far times of the grid may be from those that were meant, by the precision they came in.
        first: index of the first point of the grid, where an integration goes on.

    Raises:
        ValueError: a time outside the grid or out of order, or in a precision that does not tell grid points apart;
            times inside steps on a grid with a time per sample.
        TypeError: ``observable`` cannot be called, or ``save_at`` holds no times.
    """

    def __init__(
        self,
        grid: Tensor,
        save_at: SaveAt,
        observable: Observable | None = None,
        *,
        moments: bool = False,
        rounding: float = 0.0,
        first: int = 0,
    ) -> None:
        if observable is not None and not callable(observable):
            raise TypeError(f"observable must be a function of x, got {kind_of(observable)}")
        steps = len(grid) - 1
        self.observable, self.moments = observable, moments
        self.arguments: Callable[[tuple[Tensor, ...]], tuple[Any, ...]] = lambda states: states[:1]
        self._at_end_alone = save_at is None
        self._nothing: Tensor | None = None
        self.beside: slice | None = None  # what else is kept of all paths
        self.on_grid: dict[int, list[int]] = defaultdict(list)
        self.inside: dict[int, list[tuple[int, float]]] = defaultdict(list)
        self._states: list[Tensor | None]
        self._variances: list[Tensor | None]
        if save_at is None or isinstance(save_at, str):
            if isinstance(save_at, str) and save_at != "grid":
                raise ValueError(f'save_at takes times, "grid" or None, got {short(save_at)}')
            wanted = range(steps + 1) if save_at == "grid" else [steps]
            self.ts = grid[list(wanted)]
            for slot, k in enumerate(wanted):
                self.on_grid[first + k].append(slot)
        else:
            self._place(grid, save_at, rounding, first)
        self._states = [None] * len(self.ts)
        self._variances = [None] * len(self.ts)
        self._beside: list[Tensor | None] = [None] * len(self.ts)

    def observed(self, states: tuple[Tensor, ...]) -> Tensor:
        """What is kept of a state, the first of what a step carries."""
        return states[0] if self.observable is None else observed(self.observable, *self.arguments(states))

    def _keep(self, slot: int, *states: Tensor) -> None:
        kept = self.observed(states)
        if self.beside is not None and not self.moments:
            self._beside[slot] = torch.stack(states[self.beside])
        self._states[slot] = kept
        if self.moments:
            self._summed(slot, kept)

    def _summed(self, slot: int, kept: Tensor) -> None:
        kept = kept.double()
        self._variances[slot] = kept.var(0) if len(kept) > 1 else torch.full_like(kept[0], math.nan)
        self._states[slot] = kept.mean(0)

    def _place(self, grid: Tensor, save_at: Iterable[float] | Tensor, rounding: float, offset: int) -> None:
        forwards = bool(grid.flatten()[-1] > grid.flatten()[0])
        if isinstance(save_at, Set):
            save_at = sorted(save_at, reverse=not forwards)
        given = read_times(save_at, "save_at")
        if given.values.ndim != 1 or given.values.numel() == 0:
            shape = tuple(given.values.shape)
            hint = "; for one time write save_at=[t], for every step save_at='grid'" if not shape else ""
            raise ValueError(f"save_at must be a list of at least one time, got shape {shape}{hint}")
        if grid.ndim == 2:
            raise ValueError('with a time per sample, save_at can be None or "grid" only')
        sign = 1.0 if forwards else -1.0
        times, points = sign * given.values, sign * grid
        first, last = float(grid[0]), float(grid[-1])
        if not bool((times.diff() > 0).all()):
            raise ValueError(
                f"save_at must follow the direction of integration, from {first} to {last}, without repeats"
            )
        k, is_on = located(grid, given.values, max(given.rounding, rounding), "save_at")
        on = is_on.tolist()
        same = [k[i] == k[i + 1] and on[i] and on[i + 1] for i in range(len(on) - 1)]
        if any(same):
            i = same.index(True)
            raise ValueError(
                f"save_at holds {float(given.values[i])!r} and {float(given.values[i + 1])!r}, which are one point "
                "in the precision that they came in; leave one of them out, or put both on the grid"
            )
        self.ts = torch.where(is_on, grid[k], given.values)
        for slot, (here, is_point) in enumerate(zip(k.tolist(), on, strict=True)):
            if is_point:
                self.on_grid[offset + here].append(slot)
                continue
            step = here if float(times[slot]) > float(points[here]) else here - 1
            t0, t1 = float(grid[step]), float(grid[step + 1])
            self.inside[offset + step].append((slot, (float(self.ts[slot]) - t0) / (t1 - t0)))

    def holds(self, k: int) -> bool:
        """Whether anything is wanted of step ``k`` or its end."""
        return k in self.inside or k + 1 in self.on_grid

    def blank(self) -> SavePlan:
        """The same plan with nothing kept yet."""
        made = copy.copy(self)
        made._states, made._variances = [None] * len(self.ts), [None] * len(self.ts)
        made._beside = [None] * len(self.ts)
        return made

    def every_path(self) -> SavePlan:
        """The same times with all paths, and nothing kept yet."""
        made = self.blank()
        made.moments = False
        return made

    @property
    def kept(self) -> list[Tensor]:
        """What was kept so far."""
        return [x for x in self._states if x is not None]

    def at_grid_point(self, k: int, *states: Tensor) -> None:
        """Keeps the state at grid point ``k``, the first of what a step carries, if it was asked for."""
        for slot in self.on_grid.get(k, ()):
            self._keep(slot, *states)

    def within_step(self, k: int, between: Callable[[float], tuple[Tensor, ...]]) -> None:
        """Keeps the states asked for inside step ``k``, given by the fraction of the step."""
        for slot, theta in self.inside.get(k, ()):
            self._keep(slot, *between(theta))

    def fill(self, slot: int, x: Tensor, rows: Tensor) -> None:
        """Keeps the ``rows: (batch,)`` of a state that samples reach one after another."""
        old = self._states[slot]
        self._states[slot] = x if old is None else torch.where(per_sample(rows, x), x, old)

    def reach(self, slot: int, rows: Tensor, *states: Tensor) -> None:
        """`fill` with what is kept of states, the first of what is carried."""
        self.fill(slot, self.observed(states), rows)

    def settle(self) -> None:
        """Makes moments of what samples have reached one after another."""
        if self.moments:
            for slot, kept in enumerate(self._states):
                if kept is not None:
                    self._summed(slot, kept)

    def end_at(self, time: Tensor, *states: Tensor) -> None:
        """Leaves out what was asked for of times beyond ``time``, where a run is stopped.

        Where the end alone was asked for, that is the end.
        """
        if self._at_end_alone:
            self.ts = time[None]
            self._keep(0, *states)
        self._nothing = states[0].new_empty(0, *states[0].shape)
        self._states = [x for x in self._states if x is not None]
        self.ts = self.ts[: len(self._states)]

    def states(self) -> Tensor:
        """All that was kept, ``(times, batch, *values)``, or means ``(times, *values)``."""
        return torch.stack(self.kept) if self.kept or self._nothing is None else self._nothing

    def weights(self) -> Tensor | None:
        """What was kept beside the states of all paths, ``(times, numbers, batch)``, if there was anything."""
        kept = [b for b in self._beside if b is not None]
        return torch.stack(kept) if kept else None

    def variances(self) -> Tensor:
        """Variances over the batch, ``(times, *values)``."""
        return torch.stack([x for x in self._variances if x is not None])


def with_points(grid: Tensor, given: Iterable[Any], rounding: float) -> Tensor:
    """The grid with times put on it, for runs whose steps end at each of its points.

    Args:
        grid: ``(steps + 1,)``.
        given: collections of times. What is wrong with one is said where it is placed.
        rounding: how far times of the grid may be from those that were meant.
    """
    forwards = bool(grid[-1] > grid[0])
    for times in given:
        read = read_times(sorted(times) if isinstance(times, Set) else times, "at")
        values = read.values.reshape(-1)
        inside = (values - grid[0]) * (grid[-1] - values) > 0
        _, on = located(grid, values[inside], max(read.rounding, rounding), "at")
        grid = torch.cat([grid, values[inside][~on]]).unique()
        grid = grid if forwards else grid.flip(0)
    return grid


def located(grid: Tensor, values: Tensor, rounding: float, name: str) -> tuple[Tensor, Tensor]:
    """The nearest grid point of each time, and whether it is that point up to the precision that it was given in.

    Args:
        grid: ``(steps + 1,)``, in either direction.
        values: ``(times,)``.
        rounding: how far either may be from what was meant.
        name: of the times.

    Raises:
        ValueError: a time outside the grid, or in a precision that does not tell grid points apart.
    """
    first, last = float(grid[0]), float(grid[-1])
    sign = 1.0 if last > first else -1.0
    times, points = sign * values, sign * grid
    k = torch.searchsorted(points, times, right=True).clamp(1, len(grid) - 1) - 1
    k += times - points[k] > points[k + 1] - times
    off = (times - points[k]).abs()
    gaps = points.diff()
    gaps = torch.nn.functional.pad(gaps.where(gaps > 0, math.inf), (1, 1), value=math.inf)  # a repeat is padding
    near = torch.minimum(gaps[k], gaps[k + 1])
    exact = off <= _SAME_TIME * float(points.abs().max())
    alike = off <= rounding
    outside = ~(exact | alike) & ~((times >= points[0]) & (times <= points[-1]))
    if bool(outside.any()):
        raise ValueError(f"{name} holds {float(values[outside][0])}, which is outside the grid from {first} to {last}")
    blurred = alike & ~exact & (near < 2.0 * rounding)
    if bool(blurred.any()):
        raise ValueError(
            f"{name} holds {float(values[blurred][0])} to within {rounding:.2g}, and the grid has points "
            f"{float(near[blurred][0]):.2g} apart there: give grid and {name} in float64"
        )
    return k, exact | alike


def observed(observable: Observable, x: Tensor, *others: Any) -> Tensor:
    """``observable(x)``, or of time and what is carried as well, checked."""
    y = observable(x, *others)
    if not isinstance(y, Tensor) or y.ndim == 0 or len(y) != len(x):
        got = f"shape {tuple(y.shape)}" if isinstance(y, Tensor) else type(y).__name__
        raise ValueError(
            f"observable must return a tensor with a row per path, ({len(x)}, ...), for a state of shape "
            f"{tuple(x.shape)}; got {got}"
        )
    return y
