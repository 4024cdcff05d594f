"""Gillespie's method as one kernel (`sdesolve_kernels.trajectory.reactions`): what is traced are the propensities."""

from __future__ import annotations

import dataclasses

import torch
from sdesolve_kernels import Stream
from sdesolve_kernels.trajectory import AbstractReactions, ReactionLaunch, ReactionRule, Unsupported
from torch import Tensor

from sdesolve._internal.progress import progress_bar
from sdesolve.integrate.executors import CannotExecute, Eager
from sdesolve.integrate.fused import prepared
from sdesolve.integrate.jumps import Events
from sdesolve.integrate.lowering import Lowered, StepContext, lower
from sdesolve.integrate.probing import unnoticed
from sdesolve.integrate.problem import Problem
from sdesolve.integrate.save_at import SavePlan
from sdesolve.integrate.solution import Saved
from sdesolve.jumps import Reactions
from sdesolve.solvers.reactions import Gillespie

_REASON = "all reactions are one generated kernel, a path after another"


def run_reactions(problem: Problem, wanted: bool) -> Saved:
    """Carries out an integration by `Gillespie`.

    Raises:
        CannotExecute: it cannot be done in a kernel, or something is wrong that the eager run names.
    """
    equation, solver, save, x0 = problem.equation, problem.solver, problem.save, problem.x0
    assert isinstance(equation, Reactions)
    assert isinstance(solver, Gillespie)
    if problem.following is not None or problem.changes is not None:
        raise CannotExecute("what follows paths, or changes them, is done between steps of a kernel of reactions")
    if x0.device.type != "cpu":
        raise CannotExecute("kernels of reactions are for the CPU so far")
    events, m = Events(problem), equation.stoichiometry.shape[1]
    if torch.is_grad_enabled():
        t = problem.clock(problem.times[problem.first]).expand(len(x0))
        with unnoticed(equation):
            graded = equation.propensities(x0, t).requires_grad
        if graded:
            raise CannotExecute("propensities depend on what gradients are asked for")

    def step(context: StepContext, states: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        x = states[0]
        a = equation.propensities(x, context.span.t0.expand(len(x)))
        if torch.promote_types(a.dtype, x.dtype) != x.dtype:
            raise Unsupported(f"propensities are of {a.dtype}, and a kernel of counts in {x.dtype} would round them")
        return x, a.to(x.dtype)

    rule = ReactionRule(tuple(map(tuple, equation.stoichiometry.tolist())))
    lowered = Lowered(step, extra=(x0.new_zeros(len(x0), m),), rule=rule)
    plan = SavePlan(problem.times[problem.first :], None, first=problem.first)
    inner = dataclasses.replace(problem, x0=x0.detach(), memory=(), earlier=None, save=plan)
    with torch.no_grad():
        kernel, guards = prepared(inner, lowered, wanted)
    trajectory = kernel.trajectory
    assert isinstance(trajectory, AbstractReactions)
    points = sorted(k for k in save.on_grid if k > problem.first)
    slots = torch.full((problem.steps + 1,), -1, dtype=torch.int64, device="cpu")
    slots[points] = torch.arange(len(points), device="cpu")
    clock, (path, seed) = torch.stack(events.clock(), 1), events.coordinates.numbers
    launch = ReactionLaunch(
        inner.x0, problem.times, tuple(guards.tensors[i] for i in kernel.where), torch.stack([seed, path], 1),
        int(Stream.JUMP), events.first_number, clock, problem.first, slots,
        x0.new_empty(len(points), *x0.shape), torch.empty_like(inner.x0), solver.max_steps,
    )  # fmt: skip
    before = clock[:, 2].clone()
    with progress_bar(problem.progress, total=len(x0), unit="path", leave=False) as bar:
        launch = dataclasses.replace(launch, progress=bar.update if problem.progress else None)
        status = trajectory.react(launch)
    if bool(status.any()):
        if wanted:
            Eager().run(problem, lower(problem))  # says which path has what, and raises it
        raise CannotExecute("a path has propensities that are none, or too many reactions, which steps in torch name")
    save.at_grid_point(problem.first, x0)
    for k, x in zip(points, launch.kept, strict=True):
        save.at_grid_point(k, x)
    taken = problem.steps - problem.first
    return Saved(
        launch.out,
        save.states(),
        save.variances() if save.moments else None,
        taken,
        taken + int((clock[:, 2] - before).max()),
        "fused",
        _REASON,
        trajectory.source,
        memory=tuple(clock.unbind(1)),
    )
