"""Integration with steps that each sample chooses for itself."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from sdesolve._internal.progress import progress_bar
from sdesolve._internal.transforms import refuse_vmap
from sdesolve.integrate.problem import Problem
from sdesolve.integrate.save_at import SavePlan
from sdesolve.integrate.solution import AdaptiveCounts, DivergenceError, Reached, Saved, StepLimitError
from sdesolve.integrate.structure import treats_rows_alike
from sdesolve.sde import per_sample
from sdesolve.solvers.adaptive import Adaptive
from sdesolve.solvers.embedded import AbstractEmbedded, Attempt, Slope

_FEW, _LEAST = 0.8, 16  # arrived samples leave where at most this share of at least so many is still going


def integrate_adaptively(problem: Problem) -> Saved:
    """Takes every sample from the first to the last of ``problem.times``, in steps of its own.

    Samples that have arrived stand still in the batch. They leave it when they are many and a trace of the drift shows
    that it treats all rows alike: one may hold something for each row, such as labels, and use it at some times only.

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
    plan.at_grid_point(0, x)

    drift = float_drift(problem)
    # Forward differentiation by an expanded tensor fails.
    t, t1 = (end.expand(len(x)).to(x.device).contiguous() for end in problem.times)
    slope = drift(x, t)
    refuse_nonfinite(slope, t)
    h = first_step(drift, solver, x, slope, t, t1)
    none = torch.zeros_like(t, dtype=torch.int64)
    batch = _Samples(torch.arange(len(x), device=x.device), x, slope, t, t1, h, none.bool(), none, none)
    whole, starts, narrows = batch, problem.watched.evaluations, functools.cache(lambda: treats_rows_alike(problem))
    with progress_bar(problem.progress, unit="attempt", leave=False) as bar:
        while True:
            going = batch.t != batch.t1
            count = int(going.sum())
            if not count:
                break
            if len(going) >= _LEAST and count <= _FEW * len(going) and narrows():
                whole = whole.updated(batch)
                batch = batch.at(going.nonzero().squeeze(1))
            batch = _attempted(drift, solver, batch, plan, whole)
            bar.update()
    whole = whole.updated(batch)
    plan.at_grid_point(1, whole.x)
    accepted, rejected = whole.accepted, whole.rejected
    counts = AdaptiveCounts(accepted, rejected, starts + solver.evaluations * (accepted + rejected))
    steps = int(accepted.amax()) if len(x) else 0
    return Saved(
        whole.x,
        plan.states(),
        None,
        steps,
        problem.watched.evaluations,
        "eager",
        "steps differ between samples",
        adaptive=counts,
    )


def _attempted(drift: Slope, solver: AbstractEmbedded, batch: _Samples, plan: SavePlan, whole: _Samples) -> _Samples:
    """The samples after one attempt of each; those of a whole batch that are still going."""
    rows, x, slope, t, t1, h, held, accepted, rejected = batch
    active = t != t1
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
    _save(plan, solver, batch, attempt, t_next, good, len(whole.t))
    h = solver.controller.next_step(dt, error, solver.error_order, held | ~good).where(active, h)
    held = active & ~good
    x, slope, t = _chosen(good, attempt.x, x), _chosen(good, attempt.slopes[-1], slope), t_next.where(good, t)
    accepted, rejected = accepted + good, rejected + held
    late = (accepted + rejected >= solver.max_steps) & (t != t1)
    smallest = 10 * torch.finfo(x.dtype).eps * t.abs()
    h = torch.maximum(h, 1e-15 * t.abs())  # a step that leaves t where it is would be repeated for ever
    after = _Samples(rows, x, slope, t, t1, h, held, accepted, rejected)
    if bool((stuck := (held & (h < smallest)) | late).any()):
        reached = whole.updated(after)
        how = f"in max_steps={solver.max_steps} steps that its time can resolve"
        states = Reached(reached.x, reached.t, reached.accepted, reached.rejected)
        raise beyond_reach(solver, rows[stuck], error[stuck], how, states)
    return after


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
    """Where samples are, a row each; ``rows`` says which of the whole batch they are, ``held`` whose last attempt was
    rejected."""

    rows: Tensor
    x: Tensor
    slope: Tensor
    t: Tensor
    t1: Tensor
    h: Tensor
    held: Tensor
    accepted: Tensor
    rejected: Tensor

    def at(self, index: Tensor) -> _Samples:
        return _Samples(*(v.index_select(0, index) for v in self))

    def updated(self, some: _Samples) -> _Samples:
        if len(some.t) == len(self.t):
            return some
        return _Samples(*(v.index_copy(0, some.rows, w) for v, w in zip(self, some, strict=True)))


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


def _save(
    plan: SavePlan,
    solver: AbstractEmbedded,
    batch: _Samples,
    attempt: Attempt,
    t_next: Tensor,
    good: Tensor,
    n: int,
) -> None:
    """Keeps what the accepted steps reached or passed of the times in the plan, for a whole batch of ``n``."""
    t = batch.t
    for slot in (slot for slot, _ in plan.inside.get(0, ())):
        time = float(plan.ts[slot])
        here = good & (((t < time) & (time <= t_next)) | ((t_next <= time) & (time < t)))
        if bool(here.any()):
            theta = ((time - t) / (t_next - t)).where(here, 1.0)
            x = solver.between(batch.x, attempt, t_next - t, theta)
            if len(x) < n:
                x = x.new_zeros(n, *x.shape[1:]).index_copy(0, batch.rows, x)
                here = here.new_zeros(n).index_copy(0, batch.rows, here)
            plan.fill(slot, x, here)


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
