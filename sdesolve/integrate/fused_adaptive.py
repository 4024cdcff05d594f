"""Runs in steps that each path chooses, as one kernel (`sdesolve_kernels.trajectory.adaptive`).

What is traced is one attempt: the state after it, and the estimate of its error. States at times inside steps are made
afterwards, in torch, from where the kernel says that their steps began.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import torch
from sdesolve_kernels import Stream
from sdesolve_kernels.trajectory import AbstractAdaptive, AdaptiveLaunch, Rule
from sdesolve_kernels.trajectory.adaptive import ARRIVED, TOO_COARSE, AdaptiveSaved
from torch import Tensor

from sdesolve._internal.progress import progress_bar
from sdesolve.integrate.adaptive import (
    beyond_reach,
    first_step,
    float_drift,
    refuse_coarse_tolerance,
    refuse_nonfinite,
)
from sdesolve.integrate.executors import CannotExecute
from sdesolve.integrate.fused import places_of, prepared
from sdesolve.integrate.lowering import Lowered, NoiseSource, StepContext
from sdesolve.integrate.nested import Nested, between
from sdesolve.integrate.problem import Problem
from sdesolve.integrate.save_at import SavePlan
from sdesolve.integrate.solution import AdaptiveCounts, Reached, Saved
from sdesolve.sde import Noise
from sdesolve.solvers.adaptive import Adaptive
from sdesolve.solvers.base import AbstractEstimating
from sdesolve.solvers.embedded import AbstractEmbedded

_REASON = "the whole trajectory is one generated kernel, in steps that each path chooses"


def run_adaptively(problem: Problem, lowered: Lowered, wanted: bool) -> Saved:
    """Carries an adaptive integration out.

    Raises:
        CannotExecute: it cannot be done in a kernel.
        StepLimitError, DivergenceError: as `solve`.
    """
    if isinstance(problem.solver, AbstractEmbedded) and not wanted:
        raise CannotExecute(
            f"compiling takes seconds, so {type(problem.solver).__name__} is fused where backend='fused' asks for it"
        )
    following = problem.following
    if problem.changes is not None or (following is not None and (following.boundaries or following.carry)):
        raise CannotExecute("carry=, until= and at= follow steps that each path chooses in torch alone")
    run = _free if problem.equation.noise is Noise.NONE else _nested
    return run(problem, lowered, wanted)


def _inner(problem: Problem, solver: AbstractEmbedded | Adaptive) -> Problem:
    """The problem of one attempt: tolerances, and what is saved, are none of a kernel's business."""
    scheme = solver.solver if isinstance(solver, Adaptive) else solver
    return dataclasses.replace(problem, solver=scheme, save=SavePlan(problem.times, None), following=None)


def _nested(problem: Problem, given: Lowered, wanted: bool) -> Saved:
    solver = problem.solver
    assert isinstance(solver, Adaptive)
    run = Nested(problem, given)
    path = run.path
    if solver.shared:
        raise CannotExecute("paths of a batch share their steps")
    if path.repeat is not None:
        raise CannotExecute("paths are repeated, in steps that each of them chooses")
    scheme, sde, x0, save = solver.solver, problem.watched, problem.x0, problem.save
    estimating = isinstance(scheme, AbstractEstimating)

    def step(context: StepContext, states: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        noise = context.increment()
        if not isinstance(scheme, AbstractEstimating):
            return (scheme.step(sde, states[0], context.span, noise),)
        x, estimate = scheme.attempt(sde, states[0], context.span, noise)
        return x, estimate()

    shape = problem.increment.shape[1:]
    driving = tuple(NoiseSource(run.path, 1, lambda: shape, part) for part in ("W", "H", "K"))
    rule = Rule(True, not estimating, run.m, run.k, solver.max_level)
    lowered = Lowered(step, int(estimating), driving, rule=rule)
    inner = _inner(problem, solver)
    kernel, guards = prepared(inner, lowered, wanted)
    problem.watched.checking = True
    run.look()
    _kept(problem, save.on_grid.get(0, []), x0)
    marks = sorted(
        [(float(k), k, slots, None) for k, slots in save.on_grid.items() if k]
        + [(k + theta, k, [slot], theta) for k, places in save.inside.items() for slot, theta in places]
    )
    bridge = (path.units("H").seed, int(Stream.BRIDGE), path.first_path, path.first_step)
    launch = AdaptiveLaunch(
        x0, None, run.now.wanted, problem.times, [*places_of(inner, kernel, lowered), bridge],
        tuple(guards.tensors[i] for i in kernel.where), [mark for mark, *_ in marks], solver.rtol, solver.atol,
        solver.max_steps,
    )  # fmt: skip
    how = (
        f"in max_steps={solver.max_steps} steps that are no shorter than 2^-{solver.max_level} of "
        f"1/{solver.first_steps} of the way (max_level, first_steps)"
    )
    trajectory = kernel.trajectory
    assert isinstance(trajectory, AbstractAdaptive)
    saved = _ran(problem, trajectory, launch, solver, how)
    for (_, k, slots, theta), x, steps in zip(marks, saved.states, saved.steps, strict=True):
        if theta is not None:
            x = between(run, k, theta, x, steps[:, 0].to(torch.int64).to(x0.device))
        _kept(problem, slots, x)
    return _made(problem, trajectory, saved, solver.evaluations, 0)


def _kept(problem: Problem, slots: Sequence[int], x: Tensor) -> None:
    """Keeps what was asked for of states that all paths have reached."""
    for slot in slots:
        t = problem.clock(problem.save.ts[slot])
        clock = () if problem.following is None else (t.expand(len(x)),)
        problem.save.reach(slot, torch.ones(len(x), dtype=torch.bool, device=x.device), x, *clock)


def _free(problem: Problem, _: Lowered, wanted: bool) -> Saved:
    given, x0, save = problem.solver, problem.x0, problem.save
    assert isinstance(given, Adaptive | AbstractEmbedded)
    pair = given.pair() if isinstance(given, Adaptive) else given
    refuse_coarse_tolerance(pair.rtol, x0)
    drift = float_drift(problem)

    def step(context: StepContext, states: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        t0, t1 = context.span.t0, context.span.t1
        attempt = pair.attempt(drift, states[0], states[1], t0, t1 - t0)
        return attempt.x, attempt.slopes[-1], attempt.error

    lowered = Lowered(step, 2, rule=Rule(False, False, 0, float(pair.error_order)))
    inner = _inner(problem, given)
    vars(inner)["time_dtype"] = torch.float64
    kernel, guards = prepared(inner, lowered, wanted)
    problem.watched.checking = True
    t, t1 = (end.expand(len(x0)).contiguous() for end in problem.times)

    def at_start(x: Tensor, t: Tensor) -> Tensor:  # at one time for all, there is nothing to compare rows with
        return drift(x, problem.times[0])

    slope = at_start(x0, t)
    refuse_nonfinite(slope, t)
    h = first_step(at_start, pair, x0, slope, t, t1)
    starts, way = problem.watched.evaluations, math.copysign(1.0, float(t1[0] - t[0]))
    _kept(problem, save.on_grid.get(0, []), x0)
    slots = [slot for slot, _ in save.inside.get(0, ())]
    marks = [way * float(save.ts[slot]) for slot in slots]
    launch = AdaptiveLaunch(
        x0, slope, h, problem.times, (), tuple(guards.tensors[i] for i in kernel.where), marks, pair.rtol, pair.atol,
        pair.max_steps,
    )  # fmt: skip
    trajectory = kernel.trajectory
    assert isinstance(trajectory, AbstractAdaptive)
    how = f"in max_steps={pair.max_steps} steps that its time can resolve"
    saved = _ran(problem, trajectory, launch, pair, how)
    for slot, x, steps in zip(slots, saved.states, saved.steps, strict=True):
        start, dt = steps.unbind(1)
        attempt = pair.attempt(drift, x, drift(x, start), start, dt)
        _kept(problem, [slot], pair.between(x, attempt, dt, (save.ts[slot] - start) / dt))
    _kept(problem, save.on_grid.get(1, []), saved.x)
    return _made(problem, trajectory, saved, pair.evaluations, starts)


def _ran(
    problem: Problem,
    trajectory: AbstractAdaptive,
    launch: AdaptiveLaunch,
    solver: AbstractEmbedded | Adaptive,
    how: str,
) -> AdaptiveSaved:
    """What a launch leaves.

    Raises:
        CannotExecute: steps come near the rounding of their times, and how much that matters is seen step by step.
        StepLimitError: a path does not arrive.
    """
    with progress_bar(problem.progress, unit="attempt", leave=False) as bar:
        launch = dataclasses.replace(launch, progress=bar.update if problem.progress else None)
        saved = trajectory.adapt(launch)
    coarse = saved.counts[:, 2] == TOO_COARSE
    if bool(coarse.any()):
        t = float(saved.t[coarse][0])
        raise CannotExecute(
            f"its functions get the time in {problem.x0.dtype}, which holds t = {t:.6g} to "
            f"{abs(t) * torch.finfo(problem.x0.dtype).eps:.2g}, and its steps come near to that; x0.double() has the "
            "digits"
        )
    stuck = saved.counts[:, 2] != ARRIVED
    if bool(stuck.any()):
        reached = Reached(saved.x, saved.t, saved.counts[:, 0].clone(), saved.counts[:, 1].clone())
        raise beyond_reach(solver, stuck.nonzero()[:, 0], saved.error[stuck], how, reached, problem.first_path)
    return saved


def _made(problem: Problem, trajectory: AbstractAdaptive, saved: AdaptiveSaved, evaluations: int, before: int) -> Saved:
    accepted, rejected = (saved.counts[:, i].clone() for i in (0, 1))
    counts = AdaptiveCounts(accepted, rejected, before + evaluations * (accepted + rejected))
    save, following = problem.save, problem.following
    save.settle()
    return Saved(
        saved.x,
        save.states(),
        save.variances() if save.moments else None,
        int(accepted.max()),
        int(counts.evaluations.max()),
        "fused",
        _REASON,
        trajectory.source,
        adaptive=counts,
        memory=() if following is None else (problem.clock(saved.t),),
    )
