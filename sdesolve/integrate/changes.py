"""Changes of the state at given times, such as doses and resets: a wrapper round the step, as what follows paths is."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Set
from typing import TYPE_CHECKING, Any, final

import torch
from sdesolve_kernels.transforms import is_transformed
from torch import Tensor

from sdesolve._internal.arguments import kind_of, short
from sdesolve.crossing import Crossing
from sdesolve.grids import read_times
from sdesolve.integrate.checks import check_drift, check_state, unchanged
from sdesolve.integrate.probing import unnoticed
from sdesolve.integrate.save_at import located
from sdesolve.sde import per_sample
from sdesolve.solvers.base import AbstractRemembering, AbstractSolver

if TYPE_CHECKING:
    from sdesolve.integrate.lowering import Lowered, StepContext
    from sdesolve.integrate.problem import Problem

At = Iterable[tuple[float | Iterable[float] | Tensor, Callable[..., Tensor]]]
States = tuple[Tensor, ...]


@final
class Changes:
    """Maps of the state at points of the grid, in the order in which they apply where several share a point.

    Args:
        at: pairs of times and a map, of ``x`` or of ``(x, t)``.
        takes: tells how many arguments a map takes.

    Attributes:
        maps: of the state.

    Raises:
        TypeError: it holds something else.
    """

    def __init__(self, at: At, takes: Callable[[Callable[..., Any]], int]) -> None:
        if not isinstance(at, list | tuple) or not all(isinstance(one, list | tuple) and len(one) == 2 for one in at):
            hint = ": write at=[(times, map)]" if isinstance(at, tuple) and len(at) == 2 else ""
            raise TypeError(f"at must be a list of pairs (times, map), got {short(at)}{hint}")
        for i, (_, change) in enumerate(at):
            if not callable(change):
                raise TypeError(f"at[{i}] must hold a map, a function of x or of (x, t), got {kind_of(change)}")
            if takes(change) > 2:
                raise TypeError(f"a map takes (x) or (x, t), and that of at[{i}] has {takes(change)} arguments")
        self._given = [times for times, _ in at]
        self.maps = tuple(change for _, change in at)
        self._takes = tuple(takes(change) for change in self.maps)
        self._points: list[set[int]] = []

    @property
    def points(self) -> set[int]:
        """Grid points at which the state changes."""
        return set().union(*self._points)

    @property
    def one_each(self) -> set[int]:
        """Of each map that changes the end of a step, one such step."""
        return {min(points) - 1 for points in (p - {0} for p in self._points) if points}

    @property
    def given(self) -> list[Any]:
        """The times of each pair, as they were given."""
        return self._given

    def place(self, times: Tensor, rounding: float, first: int) -> None:
        """Finds the times on the grid, ``times`` from grid point ``first`` on.

        Raises:
            ValueError: one is no point of it, or the grid has a time per sample.
        """
        if times.ndim == 2:
            raise ValueError("at= holds times of all samples, and here each sample has a grid of its own: solve apart")
        grid = times[first:]
        forwards = bool(grid[-1] > grid[0])
        for i, given in enumerate(self._given):
            name = f"at[{i}]"
            read = read_times(sorted(given) if isinstance(given, Set) else given, name)
            values = read.values.reshape(1) if read.values.ndim == 0 else read.values
            if values.ndim != 1 or not len(values):
                raise ValueError(
                    f"{name} must hold a time or a list of at least one, the same for all samples; got shape "
                    f"{tuple(read.values.shape)}"
                )
            k, on = located(grid, values, max(read.rounding, rounding), name)
            if not bool(on.all()):
                order = "" if forwards else ".flip(0)"
                raise ValueError(
                    f"{name} holds {float(values[~on][0])!r}, which is no point of the grid: give "
                    f"grid=torch.cat([grid, missing]).unique(){order}, missing such times in float64, and grid that of "
                    "now, for equal steps sds.grids.uniform(t0, t1, steps)"
                )
            # The last time may be repeated, and a step of no length changes nothing.
            points = torch.searchsorted(grid if forwards else -grid, grid[k] if forwards else -grid[k]).tolist()
            if len(set(points)) < len(points):
                raise ValueError(f"{name} holds a time twice; to apply a map twice give another pair with it")
            self._points.append({first + p for p in points})

    def at_start(self, problem: Problem) -> Problem:
        """The integration with its maps checked, from the state that they make of the one it starts from.

        Raises:
            ValueError: a map returns another shape, couples the paths, or makes a value that is not finite.
            TypeError: it returns another type or dtype.
        """
        x = problem.x0
        t = problem.clock(problem.times[problem.first])
        if len(x) and not is_transformed():
            for i in range(len(self.maps)):
                with torch.no_grad(), unnoticed(self.maps[i]):
                    self._check(i, x.detach(), t)
        applied = [i for i, points in enumerate(self._points) if problem.first in points]
        if not applied:
            return problem
        for i in applied:
            x = self._called(i, x, t)
            check_state(x, f"what at[{i}] makes of x0")
        memory, earlier = list(problem.memory), problem.earlier
        if earlier is not None and any(isinstance(b, Crossing) for b in earlier.until):
            x = torch.where(per_sample(memory[-3] == 0, x), x, problem.x0)  # paths that have stopped stand
        if memory and isinstance(problem.solver, AbstractRemembering):
            own = problem.solver.memory
            memory[:own] = [torch.zeros_like(m) for m in memory[:own]]
        return dataclasses.replace(problem, x0=x, memory=tuple(memory))

    def _called(self, i: int, x: Tensor, t: Tensor) -> Tensor:
        return self.maps[i](x) if self._takes[i] == 1 else self.maps[i](x, t)

    def _check(self, i: int, x: Tensor, t: Tensor) -> None:
        from sdesolve_kernels.trajectory.snapshots import random_states  # as in `probing`

        what = f"map of at[{i}]"
        rewind = random_states()
        y = unchanged(lambda x, t: self._called(i, x, t), x.clone(), t, what)
        check_drift(y, x, t, what)
        if y.dtype != x.dtype:
            raise TypeError(f"{what} returned {y.dtype}, the state is {x.dtype}; convert it with .to(x.dtype)")
        if len(x) > 1:
            moved = x.clone()
            moved[0] += 0.1 + 0.1 * moved[0].abs()
            rewind()
            if not torch.equal(y[1:].nan_to_num(), self._called(i, moved, t)[1:].nan_to_num()):
                raise ValueError(
                    f"the {what} couples the paths: when the state of row 0 changes, what it returns for other rows "
                    "does. Each row is a function of its own path"
                )

    def at_point(self, problem: Problem, k: int, states: States, here: Tensor) -> States:
        """What is carried, with the rows that are at grid point ``k`` changed there."""
        following, t = problem.following, problem.clock(problem.times[k])
        for i, points in enumerate(self._points):
            if k not in points:
                continue
            x, stops = states[0], following is not None and following.stops
            rows = here & (states[-3] == 0) if stops else here
            states = (torch.where(per_sample(rows, x), self._called(i, x, t), x), *states[1:])
            if following is not None and stops:
                after = following.taken_across(x, states, t)
                states = (*states[:-3], torch.where(rows, after[-3], states[-3]), *states[-2:])
        return states

    def follow(self, problem: Problem, lowered: Lowered) -> Lowered:
        """The step, with the state changed after it.

        Whether a map applies is a number of the step. What follows paths sees the step end before the change, and the
        next begin after it; a solver that remembers begins anew.
        """
        column, part, own, following = lowered.columns, lowered.parts, lowered.memory, problem.following
        flags = torch.tensor([[k + 1 in points for points in self._points] for k in range(problem.steps)], device="cpu")

        def step(context: StepContext, states: States) -> States:
            states = lowered.step(context, states)
            for i in range(len(self.maps)):
                if context.skips(part + i):
                    continue
                x, *rest = states
                new = [self._called(i, x, context.span.t1), *(torch.zeros_like(m) for m in rest[:own])]
                if following is not None and following.stops:
                    running = states[-3] == 0
                    new = [torch.where(per_sample(running, a), a, b) for a, b in zip(new, states, strict=False)]
                applies = context.number(column + i) != 0
                y, *rest[:own] = (torch.where(applies, a, b) for a, b in zip(new, states, strict=False))
                states = (y, *rest)
                if following is not None and following.stops:
                    states = following.taken_across(x, states, context.span.t1)
            return states

        table, numbers, skipped = lowered.table, flags.double(), ~flags
        return dataclasses.replace(
            lowered,
            step=step,
            table=numbers if table is None else torch.cat([table, numbers], dim=1),
            skipped=skipped if lowered.skipped is None else torch.cat([lowered.skipped, skipped], dim=1),
        )


def check_restarts(solver: AbstractSolver) -> None:
    """Refuses a solver that goes by earlier steps, which a change of the state makes worthless.

    Raises:
        ValueError: it is one.
    """
    if getattr(solver, "memory", 0) and not isinstance(solver, AbstractRemembering):
        raise ValueError(
            f"{type(solver).__name__} goes by states of earlier steps, which at= changes: take a solver of one step "
            "such as Heun or EulerMaruyama"
        )
