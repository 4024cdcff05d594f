"""Adaptive steps of an SDE in plain torch: for each path, nested cells of the dyadic tree under a coarse grid."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import final

import torch
from torch import Tensor

from sdesolve._internal.levy_area import VARIANCES
from sdesolve._internal.progress import progress_bar
from sdesolve._internal.transforms import refuse_vmap
from sdesolve.brownian import BrownianPath, Increment, halved
from sdesolve.integrate.adaptive import (
    beyond_reach,
    norm,
    refuse_coarse_clock,
    refuse_coarse_tolerance,
    refuse_nonfinite,
)
from sdesolve.integrate.changes import Changes
from sdesolve.integrate.following import Following
from sdesolve.integrate.lowering import Lowered
from sdesolve.integrate.problem import Problem
from sdesolve.integrate.solution import AdaptiveCounts, Reached, Saved
from sdesolve.integrate.structure import check_noise, check_noise_ahead, has_structure
from sdesolve.sde import is_matrix, per_sample
from sdesolve.solvers.adaptive import Adaptive
from sdesolve.solvers.base import AbstractEstimating, Span

# Factors between lengths of steps, and the least error that the next one remembers.
SHRINK, GROW, SAFETY, LEAST_ERROR = 0.25, 2.0, 0.9, 1e-4
_LATEST = 16  # attempts after which the noise is looked at again, and then at every power of 2


def check_nested(problem: Problem) -> BrownianPath:
    """The path that an adaptive run goes along.

    Raises:
        ValueError: noise that has no halves of steps.
    """
    path = problem.noise
    if not isinstance(path, BrownianPath) or path.kind != "normal" or path.substeps != 1:
        given = repr(path) if isinstance(path, BrownianPath) else type(path).__name__
        raise ValueError(
            "steps that each path chooses need halves of the steps of a Brownian path, which has normal increments and "
            f"substeps=1: give one seed, seed=0, or a BrownianPath, not {given}"
        )
    m = math.prod(problem.increment.shape[1:])
    if (path.first_step + problem.steps + 1) * 3 * max(m, 1) >= 1 << 37:
        raise ValueError(
            f"first_step={path.first_step} is too far along the path for halves of its steps; below 2^35 / m"
        )
    return path


@final
@dataclasses.dataclass
class _Paths:
    """Where paths are, a row each.

    Attributes:
        x: states.
        root, level, index: the next cell, number ``index`` of the ``2^level`` of step ``root`` of the grid.
        cell: unit numbers of ``W``, ``H`` and ``K`` over it, ``(batch, 3, m)``.
        wanted: how long a step should be, float64.
        previous: logarithm of the error of the last accepted one.
        held: whether the last attempt was rejected.
        accepted, rejected: counts.
        beside: what follows the paths.
        reached: the times of the states.
    """

    x: Tensor
    root: Tensor
    level: Tensor
    index: Tensor
    cell: Tensor
    wanted: Tensor
    previous: Tensor
    held: Tensor
    accepted: Tensor
    rejected: Tensor
    beside: tuple[Tensor, ...]
    reached: Tensor


@final
class Nested:
    """One run.

    Args:
        problem: the integration.
        lowered: has what follows the paths at their start, and its normals.
    """

    def __init__(self, problem: Problem, lowered: Lowered) -> None:
        solver = problem.solver
        assert isinstance(solver, Adaptive)
        refuse_vmap(f"{type(solver).__name__} chooses its steps by the values of the state")
        refuse_coarse_tolerance(solver.rtol, problem.x0)
        self.problem, self.solver, self.sde, self.path = problem, solver, problem.watched, check_nested(problem)
        x0, batch = problem.x0, len(problem.x0)
        self.m, self.like = math.prod(problem.increment.shape[1:]), x0.detach().new_empty(0)
        self.rows = torch.arange(batch, device=x0.device)
        self.k, self.shared = solver.order(problem.equation.noise), solver.shared and batch > 0
        if self.shared and problem.following is not None and problem.following.stops:
            raise ValueError("paths that stop at until= take steps of their own; leave shared= out")
        grid = problem.times if problem.times.ndim == 2 else problem.times[:, None].expand(-1, batch)
        self.grid = grid.to(x0.device)
        none = torch.zeros(batch, dtype=torch.int64, device=x0.device)
        zero = torch.zeros(batch, dtype=torch.float64, device=x0.device)
        self.root = functools.lru_cache(8)(lambda step: self.path.roots(step, batch, self.m, self.like))
        self.waiting = x0.new_empty(0)  # second halves, by level
        self.within = lowered.within
        self.now = _Paths(
            x0, none, none, none, self.root(0), zero + math.inf, zero, none.bool(), none, none, lowered.extra,
            self.grid[0],
        )  # fmt: skip
        save = problem.save
        self.inside = {slot: (x0, none) for places in save.inside.values() for slot, _ in places}

    def run(self) -> Saved:
        """To the end.

        Raises:
            DivergenceError, StepLimitError: as `solve`.
        """
        problem, save = self.problem, self.problem.save
        problem.watched.checking = True
        check_noise_ahead(problem)
        structured = has_structure(problem)
        self._keep(0, self.rows >= 0)
        self.look()
        attempts = 0
        self.waiting = self.like.new_zeros(self.solver.max_level + 1, len(self.rows), 3, self.m)
        with progress_bar(problem.progress, unit="attempt", leave=False) as bar:
            while bool((going := self._going()).any()):
                self._halve(going)
                self._attempt(going)
                attempts += 1
                if structured and attempts >= _LATEST and attempts & (attempts - 1) == 0:
                    check_noise(problem, self.now.x, self._one(self._ends()[0]).to(problem.time_dtype))
                bar.update()
        for k, places in save.inside.items():
            for slot, theta in places:
                save.reach(slot, going, self._between(k, slot, theta), *self._clock(save.ts[slot]))
        now = self.now
        for k in save.on_grid:  # paths that have stopped stand still
            self._keep(k, (now.root < k) & ~going)
        save.settle()
        evaluations = self.solver.evaluations * (now.accepted + now.rejected)
        steps = int(now.accepted.amax()) if len(now.x) else 0
        return Saved(
            now.x,
            save.states(),
            save.variances() if save.moments else None,
            steps,
            problem.watched.evaluations,
            "eager",
            "steps differ between paths",
            adaptive=AdaptiveCounts(now.accepted, now.rejected, evaluations, now.reached),
            memory=now.beside,
            work=int((now.accepted + now.rejected).sum()) if now.beside else None,
        )

    def _going(self) -> Tensor:
        going, following = self.now.root < self.problem.steps, self.problem.following
        return going & (self.now.beside[-3] == 0) if following is not None and following.stops else going

    def _keep(self, k: int, rows: Tensor) -> None:
        """Keeps what was asked for at a grid point, of these rows."""
        slots = self.problem.save.on_grid.get(k, [])
        if slots and (not len(rows) or bool(rows.any())):
            for slot in slots:
                self.problem.save.reach(slot, rows, self.now.x, *self.now.beside)

    def _clock(self, t: Tensor) -> tuple[Tensor, ...]:
        """What an observable of a time between grid points is called with beside the state."""
        following = self.problem.following
        return () if following is None else (self.problem.clock(t).expand(len(self.rows)),)

    def look(self) -> None:
        """Calls both functions once, checked, and chooses the length of the first steps."""
        self.now.wanted = self._first(self.problem.x0.detach(), 0)
        self.sde.checking, self.sde.evaluations = False, 0
        self.sde.narrows = self.problem.time_dtype != self.like.dtype

    def _first(self, x: Tensor, k: int) -> Tensor:
        """Lengths of first steps, from grid point ``k``."""
        solver = self.solver
        with torch.no_grad():
            t = self.problem.clock(self.problem.times[k])
            f = self.sde.drift(x, t)
            ones = x.new_ones(self.problem.increment.shape)
            g = self.sde.diffusion(x, t) if self.sde.has_diffusion else self.sde.diffusion_product(x, t, ones)
        g = (g.square().sum(-1).sqrt() if is_matrix(g, x) else g).expand_as(x)
        if not k:
            refuse_nonfinite(f, self.grid[0])
            refuse_nonfinite(g, self.grid[0], "diffusion")
        wanted = first_length(solver, self.k, x, f, g, self._length())
        return wanted.amin().expand_as(wanted) if self.shared else wanted

    def _ends(self, level: Tensor | None = None, index: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Ends of the next cells; of those that have arrived, the end of the grid twice."""
        now = self.now
        level, index = now.level if level is None else level, now.index if index is None else index
        last = len(self.grid) - 1
        a = self.grid.gather(0, now.root.clamp(max=last)[None])[0]
        b = self.grid.gather(0, (now.root + 1).clamp(max=last)[None])[0]
        part = torch.ldexp(torch.ones_like(a), -level)
        start, end = a + (b - a) * (index * part), a + (b - a) * ((index + 1) * part)
        return start, torch.where((index + 1) * part == 1.0, b, end)

    def _length(self) -> Tensor:
        a, b = self._ends(torch.zeros_like(self.now.level), torch.zeros_like(self.now.index))
        return torch.ldexp((b - a).abs(), -self.now.level)

    def _children(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        now = self.now
        node = (1 << now.level[rows]) + now.index[rows]
        return halved(now.cell[rows], self.path.nodes(rows, now.root[rows], node, self.m, self.like))

    def _halve(self, going: Tensor) -> None:
        """Halves cells until none is longer than wanted."""
        now = self.now
        while bool((long := going & (self._length() > now.wanted) & (now.level < self._deepest)).any()):
            rows = long.nonzero().squeeze(1)
            first, second = self._children(rows)
            now.cell = now.cell.index_copy(0, rows, first)
            self.waiting[now.level[rows] + 1, rows] = second
            now.index = torch.where(long, 2 * now.index, now.index)
            now.level = now.level + long

    @property
    def _deepest(self) -> int:
        return self.solver.max_level - (not self.solver.estimates)

    def increment(self, parts: Tensor, dt: Tensor) -> Increment:
        """From unit numbers ``(batch, 3, m)``."""
        shape = (len(parts), *self.problem.increment.shape[1:])
        root = dt.abs().sqrt().to(self.like)
        made = {}
        for part, z in zip("WHK", parts.unbind(1), strict=True):
            if part == "W" or part in self.solver.needs:
                unit = z if part == "W" else math.sqrt(VARIANCES[part]) * z
                made[part] = unit.reshape(shape) * root.reshape(-1, *(1,) * (len(shape) - 1))
        return Increment(**made)

    def span(self, start: Tensor, end: Tensor) -> Span:
        x, dt = self.problem.x0, (end - start).to(self.like)
        return Span(
            self.problem.clock(self._one(start)), self.problem.clock(self._one(end)), per_sample(self._one(dt), x)
        )

    def _one(self, t: Tensor) -> Tensor:
        """Times or lengths of rows, ``(batch,)``, as functions are given them: one for all where rows share steps."""
        return t[0] if self.shared else t

    def _attempt(self, going: Tensor) -> None:
        now, solver = self.now, self.solver
        start, end = self._ends()
        if isinstance(solver.solver, AbstractEstimating):
            x, estimate = solver.solver.attempt(
                self.sde, now.x, self.span(start, end), self.increment(now.cell, end - start)
            )
            error = estimate()
        else:
            first, second = self._children(self.rows)
            _, middle = self._ends(now.level + 1, 2 * now.index)
            middle = torch.where(going, middle, start)
            whole = solver.solver.step(self.sde, now.x, self.span(start, end), self.increment(now.cell, end - start))
            half = solver.solver.step(self.sde, now.x, self.span(start, middle), self.increment(first, middle - start))
            x = solver.solver.step(self.sde, half, self.span(middle, end), self.increment(second, end - middle))
            error = x - whole
        scale = solver.controller.scale(torch.maximum(now.x.abs(), x.abs()))
        if self.problem.time_dtype != torch.float64:
            evaluations = self.sde.evaluations
            moves = functools.partial(self._moved, start, end)
            refuse_coarse_clock(now.x.detach(), start, end - start, scale, going, moves)
            self.sde.evaluations = evaluations
        size = norm(error, scale)
        finite = bool_rows(x)
        if self.shared:
            size, finite = size.square().mean().sqrt().expand_as(size), finite.all()
        good = going & (size < 1.0) & finite
        beside, end = now.beside, end.where(good, now.reached)
        following = self.problem.following
        if following is not None and bool(good.any()):
            x, *rest = self._followed(following, x, start, end.where(good, start))
            beside = tuple(rest)
            if following.stops:
                share = beside[-1].double()
                end = torch.where(good & (share < 1.0), start + share * (end - start), end)
        now.reached = end
        self._advance(going, good, x, size, beside)

    def _followed(self, following: Following, x: Tensor, start: Tensor, end: Tensor) -> tuple[Tensor, ...]:
        """What is carried after a step of every row, were it accepted."""
        now, within = self.now, self.within
        z = None if within is None else within.path.normals(self.rows, now.accepted, within.draws, self.like)
        evaluations = self.sde.evaluations
        made = following.passed(self.sde, (now.x, *now.beside), (x,), self.span(start, end), z)
        self.sde.evaluations = evaluations
        return made

    def _moved(self, start: Tensor, end: Tensor, off: Tensor) -> Tensor:
        """What a step adds to the state more, of drift and of noise of a deviation, if it begins ``off`` later."""
        x, ones = self.now.x.detach(), self.like.new_ones(self.problem.increment.shape)

        def added(t: Tensor) -> Tensor:
            f, g = self.sde.drift(x, t), self.sde.diffusion_product(x, t, ones)
            return span.dt * f + span.dt.abs().sqrt() * g

        span = self.span(start, end)
        return added(self.problem.clock(self._one(start + off))) - added(span.t0)

    def _advance(self, going: Tensor, good: Tensor, x: Tensor, size: Tensor, beside: tuple[Tensor, ...]) -> None:
        now, solver, save = self.now, self.solver, self.problem.save
        log = size.clamp(min=LEAST_ERROR).log()
        growth = (SAFETY * (-0.4 / self.k * log + 0.1 / self.k * now.previous).exp()).nan_to_num(SHRINK)
        length = self._length()
        factor = torch.where(good, growth.clamp(max=GROW), growth.clamp(max=SAFETY)).clamp(min=SHRINK)
        factor = torch.where(now.held, factor.clamp(max=1.0), factor)
        now.wanted = torch.where(going, length * factor, now.wanted)
        now.previous = torch.where(good, log, now.previous)
        bad = going & ~good
        now.accepted, now.rejected, now.held = now.accepted + good, now.rejected + bad, bad
        self._record(good, x)
        now.x = torch.where(per_sample(good, x), x, now.x)
        if beside is not now.beside:
            now.beside = tuple(torch.where(per_sample(good, a), a, b) for a, b in zip(beside, now.beside, strict=True))
        tries = now.accepted + now.rejected
        self._pop(good)
        arrived = good & (now.index == 0) & (now.level == 0)
        if self.problem.changes is not None:
            self._change(self.problem.changes, arrived)
        for k in save.on_grid:
            if k:
                self._keep(k, arrived & (now.root == k))
        going = self._going()
        stuck = (bad & (now.level >= self._deepest)) | (going & (tries >= solver.max_steps))
        if bool(stuck.any()):
            reached = Reached(now.x, self._ends()[0], now.accepted, now.rejected)
            how = (
                f"in max_steps={solver.max_steps} steps that are no shorter than 2^-{solver.max_level} of "
                f"1/{solver.first_steps} of the way (max_level, first_steps)"
            )
            raise beyond_reach(solver, stuck.nonzero()[:, 0], size[stuck], how, reached, self.problem.first_path)

    def _change(self, changes: Changes, arrived: Tensor) -> None:
        """Changes states at grid points, from where their paths begin anew."""
        now = self.now
        for k in changes.points:
            here = arrived & (now.root == k)
            if k and bool(here.any()):
                now.x, *beside = changes.at_point(self.problem, k, (now.x, *now.beside), here)
                now.beside = tuple(beside)
                if k < self.problem.steps:
                    evaluations = self.sde.evaluations
                    now.wanted = torch.where(here, self._first(now.x.detach(), k), now.wanted)
                    self.sde.evaluations = evaluations
                    now.previous = torch.where(here, 0.0, now.previous)

    def _record(self, good: Tensor, after: Tensor) -> None:
        """Keeps where the steps began that times inside them are reached from, and the states at times they end at."""
        now = self.now
        for k, places in self.problem.save.inside.items():
            here = good & (now.root == k)
            if not bool(here.any()):
                continue
            part = torch.ldexp(torch.ones_like(now.wanted), -now.level)
            for slot, theta in places:
                end = (now.index + 1) * part
                if bool((held := here & (now.index * part < theta) & (theta <= end)).any()):
                    x, level = self.inside[slot]
                    there = torch.where(per_sample(end == theta, after), after, now.x)
                    self.inside[slot] = (
                        torch.where(per_sample(held, x), there, x),
                        torch.where(held, torch.where(end == theta, -1, now.level), level),
                    )

    def _between(self, k: int, slot: int, theta: float) -> Tensor:
        return between(self, k, theta, *self.inside[slot])

    def _pop(self, good: Tensor) -> None:
        """Turns to the cells after those that were accepted."""
        now = self.now
        level, index = now.level, now.index
        while bool((up := good & (level > 0) & (index % 2 == 1)).any()):
            level, index = level - up.long(), torch.where(up, index // 2, index)
        beside, done = good & (level > 0), good & (level == 0)
        now.level, now.index = level, torch.where(beside, index + 1, index)
        now.root = now.root + done
        rows = beside.nonzero().squeeze(1)
        now.cell = now.cell.index_copy(0, rows, self.waiting[level[rows], rows])
        now.index = torch.where(done, 0, now.index)
        for step in now.root[done].unique().tolist():
            if step < self.problem.steps:
                now.cell = torch.where((done & (now.root == step))[:, None, None], self.root(step), now.cell)


def first_length(solver: Adaptive, k: float, x: Tensor, f: Tensor, g: Tensor, longest: Tensor) -> Tensor:
    """Of first steps: drift and diffusion move a state by ``rtol^(1 / 2k)`` of its size, ``|x| + atol / rtol``.

    Errors are about a power ``2k`` of that. A first step that is too long can be accepted by chance, for the estimate
    changes sign; one that is too short costs a few doublings, ten at the most.
    """
    size = x.abs() + solver.atol / solver.rtol
    move = solver.rtol ** (0.5 / k)
    by_drift, by_noise = move / norm(f, size), (move / norm(g, size)).square()
    least = 2.0 ** -min(10, solver.max_level) * longest
    return torch.minimum(by_drift, by_noise).nan_to_num(math.inf).minimum(longest).maximum(least)


def bool_rows(x: Tensor) -> Tensor:
    """Which rows are finite, ``(batch,)``."""
    return x.detach().isfinite().reshape(len(x), math.prod(x.shape[1:])).all(1)


def between(run: Nested, k: int, theta: float, x: Tensor, level: Tensor) -> Tensor:
    """The state at the fraction ``theta`` of step ``k`` of the grid, by a step from where the cell that holds it began.

    Args:
        run: gives equation, path and grid.
        k: step of the grid.
        theta: in (0, 1).
        x: the states at the start of those cells.
        level: of those cells, ``(batch,)``; below 0 where ``x`` is the state at ``theta`` itself.
    """
    there, level = level < 0, level.clamp(min=0)
    if bool(there.all()):
        return x
    a, b = run.grid[k], run.grid[k + 1]
    size = torch.ldexp(torch.ones_like(a), -level)
    index = (theta / size).ceil() - 1
    start, end = a + (b - a) * (index * size), a + (b - a) * theta
    parts = run.path.beginning(k, theta, level, run.m, run.like)
    shape, root = (len(x), *run.problem.increment.shape[1:]), (b - a).abs().sqrt().to(run.like)
    made = {
        part: v.reshape(shape) * root.reshape(-1, *(1,) * (len(shape) - 1))
        for part, v in zip("WHK", parts, strict=True)
        if part == "W" or part in run.solver.needs
    }
    stepped = run.solver.solver.step(run.sde, x, run.span(start, end), Increment(**made))
    return torch.where(per_sample(there, x), x, stepped)
