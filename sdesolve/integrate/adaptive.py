"""Integration with steps that each sample chooses for itself."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple, final

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from sdesolve._internal.progress import progress_bar
from sdesolve._internal.transforms import refuse_vmap
from sdesolve.carry import Passage
from sdesolve.crossing import Crossing
from sdesolve.integrate.following import side_of
from sdesolve.integrate.problem import Problem
from sdesolve.integrate.solution import AdaptiveCounts, DivergenceError, Reached, Saved, StepLimitError
from sdesolve.integrate.structure import treats_rows_alike
from sdesolve.sde import per_sample
from sdesolve.solvers.adaptive import Adaptive
from sdesolve.solvers.base import Span
from sdesolve.solvers.embedded import AbstractEmbedded, Attempt, Slope

if TYPE_CHECKING:
    from sdesolve.integrate.following import Following
    from sdesolve.integrate.lowering import Lowered, NoiseSource

_ROOT_STEPS = 60  # that no bracket needs
_FEW, _LEAST = 0.8, 16  # arrived samples leave where at most this share of at least so many is still going


def integrate_adaptively(problem: Problem, lowered: Lowered) -> Saved:
    """Takes every sample from the first to the last of ``problem.times``, in steps of its own that end at each of them.

    Samples that have arrived stand still in the batch. They leave it when they are many and a trace of the drift shows
    that it treats all rows alike: one may hold something for each row, such as labels, and use it at some times only.
    What follows or changes the samples keeps them in.

    Args:
        problem: the integration.
        lowered: has what follows the samples at their start, and its normals.

    Raises:
        ValueError: tolerances below the resolution of the state's dtype; a call under `torch.func.vmap`.
        DivergenceError: the drift is not finite at the start.
        StepLimitError: a sample needs steps below the resolution of its time, or more than ``max_steps``.
    """
    solver, x, plan = problem.solver, problem.x0, problem.save
    refuse_vmap(f"{type(solver).__name__} chooses its steps by the values of the state")
    solver = solver.pair() if isinstance(solver, Adaptive) else solver
    assert isinstance(solver, AbstractEmbedded)
    refuse_coarse_tolerance(solver.rtol, x)
    drift = float_drift(problem)
    # Forward differentiation by an expanded tensor fails.
    t, t1, end = (problem.times[k].expand(len(x)).to(x.device).contiguous() for k in (0, 1, -1))
    slope = drift(x, t)
    refuse_nonfinite(slope, t)
    h = first_step(drift, solver, x, slope, t, t1)
    none = torch.zeros_like(t, dtype=torch.int64)
    rows = torch.arange(len(x), device=x.device)
    batch = _Samples(rows, x, slope, t, t1, h, none.bool(), none, none, none + 1, lowered.extra)
    run = _Run(problem, solver, drift, lowered.within, end)
    run.keep(0, batch, rows >= 0)
    whole, starts = batch, problem.watched.evaluations
    narrows = functools.cache(lambda: not (problem.roots or problem.changes) and treats_rows_alike(problem))
    with progress_bar(problem.progress, unit="attempt", leave=False) as bar:
        while True:
            going = run.going(batch)
            count = int(going.sum())
            if not count:
                break
            if len(going) >= _LEAST and count <= _FEW * len(going) and narrows():
                whole = whole.updated(batch)
                batch = batch.at(going.nonzero().squeeze(1))
                going = going[going]
            batch = run.attempted(batch, going, whole)
            bar.update()
    whole = whole.updated(batch)
    for k in plan.on_grid:  # samples that have stopped stand still, and those that left the batch have arrived
        run.keep(k, whole, (whole.goal <= k) if k < problem.steps else rows >= 0)
    plan.settle()
    accepted, rejected = whole.accepted, whole.rejected
    counts = AdaptiveCounts(accepted, rejected, starts + solver.evaluations * (accepted + rejected), whole.t)
    steps = int(accepted.amax()) if len(x) else 0
    return Saved(
        whole.x,
        plan.states(),
        plan.variances() if plan.moments else None,
        steps,
        problem.watched.evaluations,
        "eager",
        "steps differ between samples",
        adaptive=counts,
        memory=whole.beside,
        work=int((accepted + rejected).sum()) if whole.beside else None,
    )


@final
@dataclasses.dataclass(frozen=True)
class _Run:
    """One run.

    Attributes:
        problem: the integration.
        solver: takes its steps.
        drift: of times in float64.
        within: normals of a step.
        end: the last times, of all samples.
    """

    problem: Problem
    solver: AbstractEmbedded
    drift: Slope
    within: NoiseSource | None
    end: Tensor

    def going(self, batch: _Samples) -> Tensor:
        """Which samples have neither arrived nor stopped."""
        going, following = batch.goal <= self.problem.steps, self.problem.following
        return going & (batch.beside[-3] == 0) if following is not None and following.stops else going

    def keep(self, k: int, batch: _Samples, rows: Tensor) -> None:
        """Keeps what was asked for at a grid point, of these rows."""
        slots = self.problem.save.on_grid.get(k, [])
        if slots and (not len(rows) or bool(rows.any())):
            for slot in slots:
                self.problem.save.reach(slot, rows, batch.x, *batch.beside)

    def attempted(self, batch: _Samples, active: Tensor, whole: _Samples) -> _Samples:
        """The samples after one attempt of each; those of a whole batch that are still going."""
        rows, x, slope, t, t1, h, held, accepted, rejected, goal, beside = batch
        drift, solver, problem = self.drift, self.solver, self.problem
        t_next = torch.where((t1 - t).abs() <= h, t1, t + h.copysign(t1 - t)).where(active, t)
        dt = t_next - t
        attempt = solver.attempt(drift, x, slope, t, dt)
        scale = solver.controller.scale(torch.maximum(x.abs(), attempt.x.abs()))
        error = norm(attempt.error, scale)
        good = active & (error < 1.0)  # nan is not
        if x.dtype != torch.float64:
            refuse_coarse_clock(
                x, t, dt, scale, active, lambda off: per_sample(dt.to(x.dtype), x) * (drift(x, t + off) - slope)
            )
        self._save(batch, attempt, t_next, good, len(whole.t))
        cut = good & (t_next == t1) & (goal < problem.steps)  # which says nothing against longer steps
        longer = solver.controller.next_step(dt, error, solver.error_order, held | ~good)
        h = torch.where(cut, torch.maximum(longer, h), longer).where(active, h)
        held = active & ~good
        x_next, slope_next = attempt.x, attempt.slopes[-1]
        if problem.following is not None and bool(good.any()):
            x_next, slope_next, t_next, beside = self._followed(problem.following, batch, attempt, t_next, good)
        x, slope, t = _chosen(good, x_next, x), _chosen(good, slope_next, slope), t_next.where(good, t)
        accepted, rejected = accepted + good, rejected + held
        after = _Samples(rows, x, slope, t, t1, h, held, accepted, rejected, goal, beside)
        arrived = good & (t == t1)
        if problem.times.ndim == 1 and len(problem.times) > 2:
            after = self._arrived(after, arrived)
        else:
            after = after._replace(goal=goal + arrived)
        late = (accepted + rejected >= solver.max_steps) & self.going(after)
        smallest = 10 * torch.finfo(x.dtype).eps * t.abs()
        # A step that leaves t where it is would be repeated for ever.
        after = after._replace(h=torch.maximum(after.h, 1e-15 * t.abs()))
        if bool((stuck := (held & (h < smallest)) | late).any()):
            reached = whole.updated(after)
            how = f"in max_steps={solver.max_steps} steps that its time can resolve"
            states = Reached(reached.x, reached.t, reached.accepted, reached.rejected)
            raise beyond_reach(solver, rows[stuck], error[stuck], how, states)
        return after

    def _followed(
        self, following: Following, batch: _Samples, attempt: Attempt, t_next: Tensor, good: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, tuple[Tensor, ...]]:
        """States, slopes and times at the ends of accepted steps, and what is carried there."""
        problem, within, x = self.problem, self.within, batch.x
        end = t_next.where(good, batch.t)
        dt = (end - batch.t).to(x.dtype)
        span = Span(problem.clock(batch.t), problem.clock(end), per_sample(dt, x))
        z = None if within is None else within.path.normals(batch.rows, batch.accepted, within.draws, x.detach())
        free = all(isinstance(b, Crossing) for b in following.boundaries)  # who is pushed back leaves the curve
        curve = functools.partial(self.solver.between, x, attempt, end - batch.t) if free else None
        meets = None if curve is None else functools.partial(self._met, following, curve)
        states = (x, *batch.beside)
        x_next, *beside = following.passed(problem.watched, states, (attempt.x,), span, z, meets, curve)
        slope = attempt.slopes[-1]
        if following.stops:
            share = beside[-1].double()
            end = torch.where(good & (share < 1.0), batch.t + share * (end - batch.t), end)
        if curve is None and bool((moved := good & (x_next != attempt.x).reshape(len(x), -1).any(1)).any()):
            slope = _chosen(moved, self.drift(x_next, end), slope)
        chosen = tuple(_chosen(good, a, b) for a, b in zip(beside, batch.beside, strict=True))
        return x_next, slope, end, chosen

    def _met(
        self, following: Following, curve: Callable[[Tensor], Tensor], b: Crossing, passage: Passage, _: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Where the solver's own curve between the ends of a step first meets a boundary.

        It is looked at at quarters of the step, and the root within one of them is found by the Illinois method.
        """
        t, length = passage.t, passage.t_next - passage.t

        def level(theta: Tensor) -> Tensor:
            return following.level(b, curve(theta.double()), t + theta.to(t.dtype) * length)

        with torch.no_grad():
            before = following.level(b, passage.x, t)
            side = side_of(b, before)
            low, high, f_low = torch.zeros_like(before), torch.ones_like(before), side * before
            f_high = side * following.level(b, passage.x_next, passage.t_next)
            hit = f_high <= 0
            if not b.bridge:
                return hit, high, passage.x_next
            for quarter in (0.75, 0.5, 0.25):
                there = torch.full_like(before, quarter)
                f = side * level(there)
                beyond = f <= 0
                high, f_high = torch.where(beyond, there, high), torch.where(beyond, f, f_high)
                hit = hit | beyond
                ahead = ~beyond & (high > there) & (low < there)
                low = torch.where(ahead, there, torch.where(beyond, 0.0, low))
                f_low = torch.where(ahead, f, torch.where(beyond, side * before, f_low))
            if bool(hit.any()):
                high = _root(lambda theta: side * level(theta), low, high, f_low, f_high, hit)
            theta = torch.where(hit, high, 1.0)
        return hit, theta, torch.where(per_sample(theta == 1.0, passage.x), passage.x_next, curve(theta.double()))

    def _arrived(self, batch: _Samples, arrived: Tensor) -> _Samples:
        """The samples with those that are at a grid point changed and kept there, and on their way to the next."""
        problem, drift, times = self.problem, self.drift, self.problem.times.to(batch.t.device)
        changes = problem.changes
        for k in batch.goal[arrived].unique().tolist():
            here = arrived & (batch.goal == k)
            if changes is not None and k in changes.points:
                x, *beside = changes.at_point(problem, k, (batch.x, *batch.beside), here)
                batch = batch._replace(x=x, beside=tuple(beside))
                if k < problem.steps:
                    slope = _chosen(here, drift(x, batch.t), batch.slope)
                    refuse_nonfinite(_chosen(here, slope, torch.zeros_like(slope)), batch.t)
                    start, end = batch.t, torch.where(here, times[k + 1], batch.t1)
                    h = first_step(drift, self.solver, x, slope, start, end)
                    batch = batch._replace(slope=slope, h=torch.where(here, h, batch.h), held=batch.held & ~here)
            self.keep(k, batch, here)
        goal = batch.goal + arrived
        return batch._replace(goal=goal, t1=torch.where(arrived, times[goal.clamp(max=problem.steps)], batch.t1))

    def _save(self, batch: _Samples, attempt: Attempt, t_next: Tensor, good: Tensor, n: int) -> None:
        """Keeps what the accepted steps reached or passed of the times in the plan, for a whole batch of ``n``."""
        t, plan = batch.t, self.problem.save
        for slot in (slot for places in plan.inside.values() for slot, _ in places):
            time = float(plan.ts[slot])
            here = good & (((t < time) & (time <= t_next)) | ((t_next <= time) & (time < t)))
            if bool(here.any()):
                theta = ((time - t) / (t_next - t)).where(here, 1.0)
                x = self.solver.between(batch.x, attempt, t_next - t, theta)
                if len(x) < n:
                    x = x.new_zeros(n, *x.shape[1:]).index_copy(0, batch.rows, x)
                    here = here.new_zeros(n).index_copy(0, batch.rows, here)
                clock = () if self.problem.following is None else (self.problem.clock(plan.ts[slot]).expand(n),)
                plan.reach(slot, here, x, *clock)


def _root(
    f: Callable[[Tensor], Tensor], low: Tensor, high: Tensor, f_low: Tensor, f_high: Tensor, rows: Tensor
) -> Tensor:
    """The upper ends of brackets of roots, ``f(low) > 0 >= f(high)``, as narrow as the dtype has them."""
    close, kept = 4.0 * torch.finfo(low.dtype).eps, torch.zeros_like(low)
    for i in range(_ROOT_STEPS):
        if not bool((rows & (high - low > close) & (f_high != 0)).any()):
            break
        secant = low + (high - low) * (f_low / (f_low - f_high)).nan_to_num(0.5).clamp(0.0, 1.0)
        near = 0.5 * close
        middle = 0.5 * (low + high) if i % 3 == 2 else torch.minimum(torch.maximum(secant, low + near), high - near)
        value = f(middle)
        beyond = value <= 0
        # An end that stays twice counts half.
        f_low = torch.where(beyond, torch.where(kept == 1, 0.5 * f_low, f_low), value)
        f_high = torch.where(beyond, value, torch.where(kept == -1, 0.5 * f_high, f_high))
        low, high = torch.where(beyond, low, middle), torch.where(beyond, middle, high)
        kept = torch.where(beyond, 1.0, -1.0)
    return high


def refuse_coarse_clock(
    x: Tensor, t: Tensor, dt: Tensor, scale: Tensor, active: Tensor, moves: Callable[[Tensor], Tensor]
) -> None:
    """Refuses an equation that the rounding of its time, to the dtype of the state, moves by more than the tolerance.

    Args:
        x: states, with fewer digits than the times.
        t: where steps begin, ``(batch,)``, float64.
        dt: their lengths.
        scale: of errors that are accepted.
        active: samples that are going.
        moves: what a step adds to the state more if it begins so much later.

    Raises:
        ValueError: it does.
    """
    off = torch.finfo(x.dtype).eps * t.abs()
    coarse = active & (off > dt.abs() / 32.0)
    if not bool(coarse.any()):
        return
    with torch.no_grad():
        moved = norm(moves(off), scale)
    if bool((coarse & (moved > 1.0)).any()):
        row = int((coarse & (moved > 1.0)).nonzero()[0])
        raise ValueError(
            f"{x.dtype} holds t = {float(t[row]):.6g} to {float(off[row]):.2g}, by which the equation changes too much "
            "for the tolerances: integrate in float64, x0.double(), or count time from a nearer origin"
        )


def float_drift(problem: Problem) -> Slope:
    """The drift at times of float64, given to it in the dtype of the state; its first value is checked."""

    def drift(x: Tensor, t: Tensor) -> Tensor:
        f = problem.watched.drift(x, t.to(x.dtype))
        problem.watched.checking = False
        return f

    return drift


class _Samples(NamedTuple):
    """Where samples are, a row each.

    ``rows`` says which of the whole batch they are, ``held`` whose last attempt was rejected, ``goal`` which grid point
    is next, at ``t1``, and ``beside`` has what follows them.
    """

    rows: Tensor
    x: Tensor
    slope: Tensor
    t: Tensor
    t1: Tensor
    h: Tensor
    held: Tensor
    accepted: Tensor
    rejected: Tensor
    goal: Tensor
    beside: tuple[Tensor, ...]

    def at(self, index: Tensor) -> _Samples:
        return tree_map(lambda v: v.index_select(0, index), self)

    def updated(self, some: _Samples) -> _Samples:
        if len(some.t) == len(self.t):
            return some
        return tree_map(lambda v, w: v.index_copy(0, some.rows, w), self, some)


def first_step(drift: Slope, solver: AbstractEmbedded, x: Tensor, slope: Tensor, t0: Tensor, t1: Tensor) -> Tensor:
    """Starting step sizes: Hairer, Norsett and Wanner 1993, section II.4, for each sample."""
    length = (t1 - t0).abs()
    scale = solver.controller.scale(x.abs())
    d0, d1 = norm(x, scale), norm(slope, scale)
    h = torch.minimum(torch.where((d0 < 1e-5) | (d1 < 1e-5), 1e-6, 0.01 * d0 / d1), length)
    step = h.copysign(t1 - t0)
    bent = drift(x + per_sample(step.to(x.dtype), x) * slope, t0 + step)
    steepest = torch.maximum(d1, (norm(bent - slope, scale) / h).nan_to_num(math.inf))
    other = torch.where(steepest <= 1e-15, (1e-3 * h).clamp(min=1e-6), (0.01 / steepest) ** (1.0 / solver.error_order))
    return torch.minimum(torch.minimum(100.0 * h, other), length).clamp(min=torch.finfo(torch.float64).tiny)


def norm(v: Tensor, scale: Tensor) -> Tensor:
    """Root mean square of ``v / scale`` over the state, ``(batch,)``, float64."""
    d = math.prod(v.shape[1:])
    return ((v.detach() / scale).double().reshape(len(v), d).square().sum(1) / max(d, 1)).sqrt()


def _chosen(mask: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return torch.where(per_sample(mask, a), a, b)


def refuse_coarse_tolerance(rtol: float, x: Tensor) -> None:
    """Refuses a tolerance that the dtype of the state cannot tell from its rounding.

    Raises:
        ValueError: it is one.
    """
    eps = torch.finfo(x.dtype).eps
    if rtol < 4 * eps:
        raise ValueError(
            f"rtol={rtol:.3g} is below what {x.dtype} resolves: take at least {4 * eps:.2g}, or a float64 state"
        )


def refuse_nonfinite(slope: Tensor, t: Tensor, what: str = "drift") -> None:
    """Refuses a drift, or a diffusion, that is not finite where samples start.

    Raises:
        DivergenceError: it is not.
    """
    bad = ~slope.detach().isfinite().reshape(len(slope), math.prod(slope.shape[1:])).all(1)
    if bool(bad.any()):
        row = int(bad.nonzero()[0])
        raise DivergenceError(
            f"the {what} is not finite at the start, t = {float(t[row]):.6g}, for sample {row} and "
            f"{int(bad.sum()) - 1} more",
            step=0,
            time=float(t[row]),
            path=row,
        )


def beyond_reach(
    solver: AbstractEmbedded | Adaptive, rows: Tensor, error: Tensor, how: str, reached: Reached, first_path: int = 0
) -> StepLimitError:
    """What is raised where samples cannot be taken to their end.

    Args:
        solver: which cannot.
        rows: those samples.
        error: of their last attempts, in units of the tolerance.
        how: with what they cannot.
        reached: where all samples are.
        first_path: number of the first.
    """
    row = int(rows[0])
    what = "it may be stiff or singular there" if math.isfinite(error[0]) else "its drift is not finite there"
    return StepLimitError(
        f"the equation of sample {row + first_path} cannot be taken further than t = {float(reached.t[row]):.6g} {how} "
        f"({len(rows) - 1} more samples are stuck): {what}, or the tolerances are too tight (rtol={solver.rtol:.3g}, "
        f"atol={solver.atol:.3g}). The error has what was reached, in `reached`",
        reached=reached,
        time=float(reached.t[row]),
        path=row + first_path,
    )
