"""`solve`: one integration, of any SDE or ODE, by any solver, in either direction of time."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
from collections.abc import Iterable, Mapping
from numbers import Number
from typing import Any, Literal, cast, get_args

import torch
from sdesolve_kernels.transforms import is_transformed, outside_transforms
from torch import Tensor

from sdesolve import grids
from sdesolve._internal.arguments import flag, kind_of, positional, short, whole_number
from sdesolve._internal.copies import remembered
from sdesolve._internal.modes import evaluation_mode, warn_of_training
from sdesolve._internal.transforms import refuse_transforms, runs_as_it_is
from sdesolve.brownian import AbstractNoise, AbstractPath, BrownianPath, BrownianRows, Increments, drawn_seed
from sdesolve.carry import as_carry
from sdesolve.crossing import as_boundaries
from sdesolve.delays import DelaySDE
from sdesolve.integrate.changes import At, Changes, check_restarts
from sdesolve.integrate.checks import check_pair, check_process_times, check_state
from sdesolve.integrate.clock import check_clock, needs_float64
from sdesolve.integrate.delays import Delayed
from sdesolve.integrate.executors import CannotExecute, Eager, Executor, RowKernels, Stepwise
from sdesolve.integrate.following import Following
from sdesolve.integrate.hooks import Hook
from sdesolve.integrate.lowering import lower
from sdesolve.integrate.narrow import flows_in_16_bits
from sdesolve.integrate.non_finite import watch_loss
from sdesolve.integrate.path_measure import Prior, check_at_end, check_at_start, prior_of
from sdesolve.integrate.plans import PLANNED, Call
from sdesolve.integrate.problem import Gradients, Problem, Watched, reads_noise
from sdesolve.integrate.save_at import Observable, SaveAt, SavePlan, with_points
from sdesolve.integrate.solution import Continuation, Saved, Solution, finished
from sdesolve.jumps import AbstractJumping, JumpSDE, Reactions
from sdesolve.reverse import ProbabilityFlow, ReverseSDE
from sdesolve.scores.network import NetworkScore
from sdesolve.sde import ODE, SDE, AbstractSDE, Noise, State
from sdesolve.solvers.adaptive import Adaptive
from sdesolve.solvers.base import AbstractRemembering, AbstractSolver
from sdesolve.solvers.euler_maruyama import EulerMaruyama
from sdesolve.solvers.predictor_corrector import PredictorCorrector
from sdesolve.solvers.reversible_heun import ReversibleHeun
from sdesolve.sums import Sums

Backend = Literal["auto", "fused", "kernel", "eager"]
_BACKENDS = get_args(Backend)
Seed = int | Iterable[int] | Tensor | None
_SHARED_STEPS = 1 << 16  # of grids that are kept for other calls


@flows_in_16_bits
@runs_as_it_is
def solve(
    sde: AbstractSDE,
    x0: State | None = None,
    t0: float | Tensor | None = None,
    t1: float | Tensor | None = None,
    steps: int | None = None,
    *,
    solver: AbstractSolver,
    grid: Tensor | None = None,
    start: Continuation | None = None,
    seed: Seed = None,
    noise: AbstractNoise | None = None,
    paths: Iterable[int] | Tensor | None = None,
    save_at: SaveAt = None,
    params: Any = None,
    observable: Observable | None = None,
    carry: Any = None,
    until: Any = None,
    at: At | None = None,
    reduce: Literal["moments", "sums"] | None = None,
    increments: Increments | None = None,
    kl_to: Prior | None = None,
    backend: Backend = "auto",
    gradients: Gradients = "auto",
    progress: bool = False,
    check_finite: bool = True,
) -> Solution:
    r"""Integrates ``dX = f(X, t) dt + g(X, t) dW`` (or an ODE) from ``x0`` over a grid of times.

    The networks within the score of a `ReverseSDE` or `ProbabilityFlow` are in evaluation mode meanwhile, and have
    their own modes again afterwards. Those in the functions of an `SDE` or `ODE` stay as they are, so that they can be
    trained through `solve`: call ``net.eval()`` first where dropout is not to draw and batch statistics are to stay.
    Under ``torch.no_grad()`` a warning says so.

    Functions are given ``t`` in the dtype of the state; in float64, where that one does not hold the times of the grid
    to within 1/1024 of a step and they take it, or to within 1/64, as float32 does not a day after the origin with
    steps of a millisecond.

    Args:
        sde: what to integrate: an `SDE`, an `ODE`, a forward process, a `ReverseSDE` or a `ProbabilityFlow`.
        x0: ``(batch, *state)``, float32 or float64; an empty batch gives an empty result. For an ODE also float16 or
            bfloat16: its functions compute in 16 bits, steps are made in float32, and ``x1`` and ``xs`` have 16 bits.
        t0: start time; a number, or ``(batch,)`` for a start per sample. Times are read in the precision that they come
            in, as tensors, arrays, or collections of numbers.
        t1: end time, on either side of ``t0``; likewise.
        steps: number of equal steps. Times are ``t0 + (t1 - t0) k / steps``, computed in float64 for each ``k``.
        solver: the scheme, such as ``EulerMaruyama()``. An adaptive one (`DormandPrince`) takes no ``steps`` or
            ``grid``, and ``save_at`` only as times, whose states its interpolant gives. What follows paths sees each
            accepted step; steps end at times of ``at``, and with ``until`` or an observable of what is carried at those
            of ``save_at``, on paths whose first cells end there. An ODE meets a `Crossing` on the curve of its solver.
        grid: explicit times instead of ``t0, t1, steps``: ``(steps + 1,)`` or ``(steps + 1, batch)``, monotone. Rows
            with fewer steps are padded by repeating their last time: a step of no length leaves a row alone.
        start: go on from the ``state`` of another `Solution`, with its noise and what the solver remembers, in place of
            ``x0``, ``t0`` and ``seed`` or ``noise``. A grid begins at the time of that state.
        seed: short for ``noise=BrownianPath(seed)``, or, one for each row, for ``BrownianRows(seed)``. Without either,
            a seed is drawn from torch's default generator; it is in ``stats.seed``, so the run can be repeated.
        noise: the driving Brownian motion; its step 0 is the first step of this grid.
        paths: short for ``noise=BrownianRows(seed, paths)``: the number of each row's path, ``(batch,)``, for those who
            take chosen rows of a run again, or leave rows out on the way.
        save_at: times whose states to keep, ``"grid"`` for every grid point, or ``None`` for the last. A time between
            grid points is reached by a Brownian bridge of the same path (`SavePlan`), and asking for it changes nothing
            else.
        params: given to the functions of an `SDE` or `ODE` as a third argument: a tensor, or a tuple or dictionary of
            them. A tensor of ``batch`` rows has a row for each path, others are shared by all.
        observable: keep ``observable(x)``, ``(batch, *values)``, in ``xs`` in place of the state. It may take
            ``(x, t)``, or ``(x, t, carry)``; ``t: (batch,)`` is the time of each path, which stands still with a path
            that has stopped.
        carry: a functional that is carried along each path, such as `Carry`, `Integral` or `RunningMaximum`; several
            as a dictionary or tuple. ``sol.carry`` is what it becomes.
        until: where paths stop, a `Crossing`, or are turned back, a `Reflection`; or a list of them. A path that has
            stopped stands still, with all that it carries: ``sol.x1`` is its state there, ``sol.stopped``,
            ``sol.stop_time`` and ``sol.boundary`` say which, when and where. Steps are taken for those that still run.
        at: changes of the state at given times, such as doses and resets: a list of pairs ``(times, map)``. The times,
            one or several, are points of the grid; the map is ``map(x)`` or ``map(x, t)``, a function of each row alone
            that keeps shape and dtype. Maps at one time apply in the order of the list: at ``t0`` before the first
            step, at ``t1`` after the last. A state that is saved there is the changed one, as is the one that a run
            ends with; a run that goes on from it (``start``) takes an ``at`` of its own. ``carry``, ``until`` and
            ``kl_to`` see the step end at the state before the change, and the next begin at the one after it. A path
            that is taken across a `Crossing` stops there and then (at ``t0`` it is refused), and one that has stopped
            is not changed. Other times are put on the grid by ``grid=torch.cat([grid, missing]).unique()`` (in
            float64; backwards with ``.flip(0)``): such steps are others, and take other increments. Solvers that choose
            their steps do it by themselves, and begin anew after a change. Those that go by earlier steps, as multistep
            ones do, take no ``at``.
        reduce: ``"moments"`` keeps mean and variance over the batch at each time in place of every path; ``"sums"``
            exact `Sums` of them, without gradients, which add up over batches to the same bits however paths are split.
            Where gradients are wanted of moments of one number at one time, as of a loss that is an ``observable``, a
            fused run makes the gradient of the mean on its way, and ``backward`` only scales it.
        increments: short for ``noise=BrownianPath(seed, kind=increments)``: ``two-point`` and ``three-point`` numbers
            for weak convergence at a fraction of the cost, ``sobol`` points for quasi-Monte Carlo.
        kl_to: a prior whose law the paths are compared with, and whose diffusion ``g`` is that of the SDE: its drift
            ``h(x, t)``, given ``params`` too if there are any, or an SDE of the same noise and calculus. With ``g u =
            f - h``, ``u`` the shortest where there are several, ``Solution.kl`` is ``1/2 int |u|^2 dt`` and
            ``Solution.log_weight`` is ``-int u dW - 1/2 int |u|^2 dt``, whichever the direction of time. In
            Stratonovich calculus too these are Ito integrals: the correction is that of ``g``, which both share, so it
            is no part of ``f - h``. Weights take ``u`` at the start of each step, so that ``E exp(log_weight) = 1``
            holds for normal increments whatever the steps, and with `EulerMaruyama` means under weights are those of
            the prior's Euler chain; otherwise they have weak order 1. ``kl`` takes it at the start where a solver has
            order 1 on an ODE (with `EulerMaruyama`, the divergence of the two chains), and by the trapezoidal rule
            elsewhere. Li et al. 2020, section 5 (torchsde's ``logqp``).
        backend: ``fused`` is the whole trajectory in one generated kernel, ``kernel`` one kernel a step, ``eager`` the
            solver's own step in plain torch; none of these falls back to another. ``auto`` takes the first that can do
            it, and says in ``stats`` why no earlier one could. `docs/fusing.md` says what can be fused.
        gradients: how a run that goes step by step gives gradients; values do not depend on it, and a fused run always
            has its own way. ``auto`` has torch keep what it needs of every step. ``checkpoint`` keeps some states, and
            takes all but the last steps again on the way back: the same gradients to the bit, for at most an eighth of
            that memory, or 512 MB or twice what a step needs if that is less, and once more the time of the run if all
            states are kept. ``reversible`` undoes the steps of `ReversibleHeun` instead, and raises a RuntimeError in
            ``backward`` if that drifts away from states that were kept. ``none`` records nothing.
        progress: show a progress bar.
        check_finite: raise `DivergenceError` if the final state is not finite, and in ``backward`` if the loss takes
            values that are not: of an observable, a carry, or a state that was saved.

    Returns:
        A `Solution`. Gradients flow to ``x0`` and to whatever drift and diffusion are made of; a fused run has a fused
        gradient, in memory that does not grow with the number of steps, and what has none runs in torch
        (``stats.reason``). Forward mode is fused too: one `torch.func.jvp` or `jacfwd`, or dual tensors. A second
        derivative runs the integration again in torch, and warns. As in torch, the derivative of a floor, of rounding,
        of a comparison and of the step at which a path stops is 0, and noise of any kind is a constant. What stops
        being finite is refused on the way forward, so that a gradient is of values.

    Raises:
        ValueError: a prior from which the divergence is infinite from the start, or that cannot be compared with; bad
            shapes, times, steps or grids, a diffusion that does not fit its noise type, or a solver that
            does not converge for this calculus and noise type; times of a reverse SDE or probability flow outside
            the ``[0, t_max]`` of its process.
        TypeError: bad types or dtypes.
        DivergenceError: a value became nan or inf; says at which step, time and path, and in which function.
        RuntimeError: an adaptive solver cannot meet its tolerances.
    """
    call = Call.of(locals(), _LEFT_OUT)
    if call is not None:
        known = call.again()
        if known is not None:
            return known
        seed = call.seed
    _check_choice("reduce", reduce, (None, "moments", "sums"))
    check_finite, progress = flag(check_finite, "check_finite"), flag(progress, "progress")
    if start is not None:
        check_start(
            start, solver, x0=x0, seed=seed, noise=noise, increments=increments,
            carry=getattr(start, "carry", None) and carry, until=(getattr(start, "until", None) or None) and until,
        )  # fmt: skip
        x0, t0, noise = start.x, start.t if grid is None and t0 is None else t0, start.noise
    elif x0 is None:
        raise TypeError("give x0, the states to start from, or start, the state of a Solution to go on with")
    _check_arguments(sde, x0, solver, backend)
    _check_gradients(gradients, solver)
    if reduce is not None and len(x0) == 0:
        raise ValueError(
            f"reduce={reduce!r} averages over the batch, and x0 has no rows; leave it out for empty batches"
        )
    if not ((torch.is_grad_enabled() and gradients != "none") or isinstance(sde, ReverseSDE | ProbabilityFlow)):
        warn_of_training(sde)
    if params is not None and not isinstance(sde, SDE | ODE | DelaySDE | AbstractJumping):
        raise TypeError(
            f"params go to the functions of an SDE or ODE, and {type(sde).__name__} is neither; let its functions "
            "hold their parameters"
        )
    prior = None if kl_to is None else prior_of(kl_to, sde, params, solver)
    if isinstance(sde, SDE | ODE | DelaySDE | JumpSDE | Reactions) and params is not None:
        sde = sde.with_params(params)
    functional, boundaries = as_carry(carry), as_boundaries(until)
    if start is not None:
        functional, boundaries = start.carry or functional, start.until or boundaries
    follows = bool(functional or boundaries) or (observable is not None and positional(observable) > 1)
    changes = None if at is None or (isinstance(at, list | tuple) and not at) else Changes(at, positional)
    beside = follows or prior is not None or changes is not None or isinstance(sde, AbstractJumping)
    if beside and gradients == "reversible":
        raise ValueError(
            "gradients='reversible' undoes the solver's steps, and not what follows paths (carry=, until=, kl_to=, an "
            "observable of time) or changes them (at=, jumps); take gradients='checkpoint'"
        )
    if solver.controller is None:
        with outside_transforms():  # grids are kept for later calls
            times, rounding = _grid_of(t0, t1, steps, grid, len(x0))
    else:
        if steps is not None or grid is not None or isinstance(save_at, str) or backend == "kernel":
            raise ValueError(
                f"{type(solver).__name__} chooses its own steps: give t0 and t1, and save_at=[times] for states "
                "between; no steps, grid or kernel backend"
            )
        parts = solver.first_steps if isinstance(solver, Adaptive) and sde.noise is not Noise.NONE else 1
        times, rounding = _grid_of(t0, t1, parts, None, len(x0))
        if times.ndim == 1:
            ends = [] if changes is None else changes.given
            if save_at is not None and (boundaries or (observable is not None and positional(observable) > 2)):
                ends = [*ends, save_at]
            times = with_points(times, ends, rounding)
    if paths is not None:
        if noise is not None:
            raise ValueError("paths is short for noise=BrownianRows(seed, paths); give one of them")
        noise = BrownianRows(drawn_seed() if seed is None else seed, paths, kind=increments or "normal")
        seed = increments = None
    noise = noise_of(seed, noise, increments, random=reads_noise(sde, solver))
    if isinstance(noise, BrownianRows):
        noise.check_rows(len(x0))
    if isinstance(noise, BrownianPath) and noise.first_path + len(x0) > 1 << 64:
        raise ValueError(
            f"first_path + batch must be at most 2^64, got {noise.first_path} + {len(x0)}; paths would repeat noise"
        )
    times = _continued(start, times, rounding)
    noise = noise.over(len(times) - 1)
    first = 0 if start is None else start.steps
    direction = _direction(times, x0.dtype, x0.device)
    sde = sde.directed(direction)
    if isinstance(sde, DelaySDE):
        if changes is not None and not isinstance(solver, EulerMaruyama):
            raise ValueError(
                f"at= changes states that delays read, and {type(solver).__name__} reads them at the end of its step, "
                "before the change: take EulerMaruyama"
            )
        sde = Delayed(sde, times, x0, start.delays if start else None)
    if changes is not None:
        check_restarts(solver)
        changes.place(times, rounding, first)
    save = SavePlan(times[first:], save_at, observable, moments=reduce == "moments", rounding=rounding, first=first)
    problem = Problem(
        solver,
        sde,
        Watched(sde, times),
        noise,
        times,
        x0,
        save,
        check_finite,
        progress,
        first,
        start.memory if start else (),
        Following(functional, boundaries, observable) if follows else None,
        start,
        gradients,
        prior and prior.directed(direction),
        isinstance(kl_to, AbstractSDE),
        changes,
        call,
    )
    with torch.no_grad() if gradients == "none" else contextlib.nullcontext():
        if changes is not None:
            problem = changes.at_start(problem)
        if prior is not None:
            check_at_start(problem)
        made = _solution(problem, backend)
    if reduce == "sums":
        return dataclasses.replace(made, xs=x0.new_empty(0, *x0.shape), sums=Sums.of(made.xs))
    return made


# What arguments have that no plan is for, where they are left out.
_LEFT_OUT = {name: p.default for name, p in inspect.signature(solve).parameters.items() if name not in PLANNED}


def integrate(
    sde: AbstractSDE,
    x0: State,
    times: Tensor,
    *,
    solver: AbstractSolver,
    noise: AbstractNoise | None = None,
    start: Continuation | None = None,
    backend: Backend = "auto",
    progress: bool = False,
    save_at: SaveAt = None,
    hook: Hook | None = None,
) -> Solution:
    """`solve` on times that are ready: the grid, or the two ends for a solver that chooses its own steps.

    Args:
        sde: as for `solve`, as are those that are not named here.
        x0: ``(batch, *state)``.
        times: ``(steps + 1,)``.
        solver: the scheme.
        noise: what drives it; a path of a drawn seed by default.
        start: what to go on from, at the first of these times; ``x0`` is its state and ``noise`` its noise.
        backend: which executor.
        progress: show a progress bar.
        save_at: which states to keep.
        hook: what is called after each step.

    Raises:
        ValueError, TypeError: as `solve`.
    """
    times = grids.check_grid(times)
    noise = noise_of(None, noise, random=reads_noise(sde, solver))
    plain = start is None and hook is None and save_at is None and not progress
    call = None if not plain else Call.on(sde, x0, times, solver, noise, backend)
    known = None if call is None else call.again()
    if known is not None:
        return known
    _check_arguments(sde, x0, solver, backend)
    times, first, memory = _continued(start, times), *((start.steps, start.memory) if start else (0, ()))
    noise = noise.over(len(times) - 1)
    save, sde = SavePlan(times[first:], save_at, first=first), sde.directed(_direction(times, x0.dtype, x0.device))
    problem = Problem(solver, sde, Watched(sde, times), noise, times, x0, save, progress=progress, call=call)
    if first or hook is not None:
        problem = dataclasses.replace(problem, first=first, memory=memory, hook=hook)
    return _solution(problem, backend)


def _check_arguments(sde: AbstractSDE, x0: State, solver: AbstractSolver, backend: Backend) -> None:
    _check_choice("backend", backend, _BACKENDS)
    check_pair(solver, sde)
    check_state(x0)


def _check_gradients(gradients: Gradients, solver: AbstractSolver) -> None:
    _check_choice("gradients", gradients, get_args(Gradients))
    if gradients not in ("checkpoint", "reversible"):
        return
    if solver.controller is not None:
        raise ValueError(
            f"{type(solver).__name__} chooses its own steps, and gradients={gradients!r} takes those of a grid again; "
            "leave gradients= out"
        )
    if gradients == "reversible" and not isinstance(solver, ReversibleHeun):
        raise ValueError(
            f"gradients='reversible' undoes steps of ReversibleHeun, and those of {type(solver).__name__} cannot be "
            "undone; take gradients='checkpoint'"
        )
    refuse_transforms(
        f"gradients={gradients!r}",
        "leave gradients= out, or call backward()",
        "steps are taken again for torch's own graph",
    )


def _check_choice(name: str, value: object, choices: tuple[object, ...]) -> None:
    if not isinstance(value, str | None) or value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {short(value)}")


def _solution(problem: Problem, backend: Backend) -> Solution:
    solver, noise, times, save, x0 = problem.solver, problem.noise, problem.times, problem.save, problem.x0
    check_process_times(problem.equation, times)
    if times.ndim == 2:
        check_clock(times, x0, by_row=True)
    elif problem.time_dtype != x0.dtype and needs_float64(times, x0.dtype):
        gaps = times.diff().abs()
        problem.watched.step = float(gaps[gaps > 0].min())
    _check_plan(problem)
    equation = problem.equation
    if isinstance(equation, ReverseSDE | ProbabilityFlow) and isinstance(equation.score, NetworkScore):
        equation.score.check_conditions(len(problem.x0))
    with evaluation_mode(*((equation.score,) if isinstance(equation, ReverseSDE | ProbabilityFlow) else ())):
        saved, reason = _executed(problem, backend)
    if saved.x1 is x0:  # a step may return the state that it was given
        saved = dataclasses.replace(saved, x1=x0.clone())
    if isinstance(solver, AbstractRemembering) and problem.check_finite:
        solver.check_end(x0, saved.x1, saved.memory[: solver.memory])
    adaptive, following, parts = saved.adaptive, problem.following, None
    outcome: dict[str, Any] = {}
    memory, accepted = saved.memory, adaptive and adaptive.accepted
    weights: tuple[Tensor, ...] = ()
    jumps: tuple[Tensor, ...] = ()
    if isinstance(equation, AbstractJumping):
        own = solver.memory if isinstance(solver, AbstractRemembering) else 0
        jumps, memory = memory[own : own + 3], memory[:own] + memory[own + 3 :]
        outcome["jumps"] = jumps[2].round().long()
    delays, memory = memory[: problem.delays], memory[problem.delays :]
    if problem.prior is not None:
        own = solver.memory if isinstance(solver, AbstractRemembering) else 0
        weights, memory = memory[own : own + 2], memory[:own] + memory[own + 2 :]
        if problem.check_finite:
            check_at_end(problem, weights[0], own + 1, functools.partial(_again, problem))
        outcome["kl"], outcome["log_weight"] = weights
        if saved.weights is not None:
            outcome["kls"], outcome["log_weights"] = saved.weights.unbind(1)
    if following is not None:
        parts = following.parts((saved.x1, *memory))
        memory = (*parts.memory, *parts.carried, *(parts.stops or ()))
        outcome["carry"] = following.result(parts.carried)
        if parts.stops is not None:
            reached = adaptive and adaptive.reached
            if problem.check_finite:
                following.refuse_nan(problem, parts.stops, reached)
            outcome["stopped"], outcome["stop_time"], outcome["boundary"], accepted = following.stopped(
                problem, parts.stops, reached
            )
    if problem.check_finite and solver.controller is None and torch.is_grad_enabled() and not is_transformed():
        watch_loss(problem, saved, outcome.get("carry"), functools.partial(_again, problem))
    seed = noise.seed if isinstance(noise, BrownianPath) and problem.random else None
    carried = (None, ()) if following is None else (following.carry, following.boundaries)
    work = None if following is None or not following.stops else saved.work or problem.taken * len(x0)
    return finished(
        saved,
        reason,
        solver,
        noise,
        seed,
        times[: problem.first + saved.steps + 1],
        save.ts,
        memory,
        carried,
        weights,
        accepted,
        work,
        waiting=jumps,
        delays=delays,
        **outcome,
    )


def _again(problem: Problem, save: SavePlan | None = None) -> Stepwise:
    """The same integration step by step in torch, of which nothing is kept, or what another plan says."""
    save = SavePlan(problem.times, None) if save is None else save
    bare = dataclasses.replace(problem, save=save, check_finite=False, progress=False)
    return Eager().begin(bare, lower(bare))


def check_start(start: Continuation, solver: AbstractSolver, **others: object) -> None:
    """Refuses what an integration by ``solver`` cannot go on from, and arguments that it has already."""
    if not isinstance(start, Continuation):
        raise TypeError(f"start must be the state of a Solution, got {kind_of(start)}; tensors go to x0")
    given = [name for name, value in others.items() if value is not None]
    if given:
        raise ValueError(f"start holds state and noise of the run to go on with: leave {' and '.join(given)} out")
    if solver != start.solver:
        raise ValueError(
            f"start comes from {short(start.solver)}, which goes on with what it remembers, and not {short(solver)}; "
            "to change the solver, begin another run at x0=start.x, t0=start.t"
        )


def _continued(start: Continuation | None, times: Tensor, rounding: float = 0.0) -> Tensor:
    """The grid of the whole integration, of which ``times`` are the rest."""
    if start is None:
        return times
    off = (times[0] - start.t).abs()
    if bool((off > rounding + 2.0**-44 * start.t.abs()).any()):
        row = int(off.flatten().argmax())
        at, begin = float(start.t.expand_as(off).flatten()[row]), float(times[0].flatten()[row])
        raise ValueError(f"start is the state at t = {short(at)}, and the grid begins at {short(begin)}")
    past, rest = start.times, times[1:]
    if past.ndim != rest.ndim:
        past, rest = (t if t.ndim == 2 else t[:, None].expand(-1, len(start.x)) for t in (past, rest))
    return torch.cat([past, rest])


def _executed(problem: Problem, backend: Backend) -> tuple[Saved, str]:
    """What the first executor leaves that can carry out the integration, and why no earlier one could."""
    lowered = lower(problem)
    passed: list[str] = []
    for name in _BACKENDS[1:] if backend == "auto" else (backend,):
        try:
            saved = _executor(name, backend).run(problem, lowered)
        except CannotExecute as met:
            if backend != "auto":
                why = f": {reason}" if (reason := str(met) or lowered.eager) else ""
                raise ValueError(f"{_REFUSED[name]}{why}. backend='auto' runs it in another way") from None
            passed.append(f"{_PASSED[name]}{met}")
        else:
            return saved, "; ".join(filter(None, [saved.reason, *passed])) or "requested"
    raise AssertionError("the eager executor can carry out everything")


_REFUSED = {"fused": "this integration cannot be fused", "kernel": "no kernel does a step of this integration"}
_PASSED = {"fused": "not fused: ", "kernel": ""}


@functools.cache
def _executor(name: str, backend: Backend) -> Executor:
    if name == "fused":
        from sdesolve.integrate.fused import Fused  # not with the package: the compiler is a third of its import

        return Fused(wanted=backend == "fused")
    return RowKernels() if name == "kernel" else Eager()


@remembered
def _direction(times: Tensor, dtype: torch.dtype, device: torch.device) -> float | Tensor:
    """1 where time increases, -1 where it decreases: one number, or ``(batch,)`` where samples differ."""
    signs = (times[-1] - times[0]).sign()
    if signs.numel() and bool((signs == signs.flatten()[:1]).all()):
        return float(signs.flatten()[0])
    return signs.to(dtype=dtype, device=device)


def _check_plan(problem: Problem) -> None:
    """Refuses times between grid points where nothing is known of them."""
    if not problem.save.inside or problem.solver.controller is not None:
        return
    following = problem.following
    if isinstance(problem.equation, AbstractJumping):
        raise ValueError("paths that jump have values at grid points alone; put every time of save_at on the grid")
    if problem.delays:
        raise ValueError("delays are known at grid points alone; put every time of save_at on the grid")
    if problem.changes is not None and any(k + 1 in problem.changes.points for k in problem.save.inside):
        raise ValueError(
            "save_at holds a time inside a step whose end at= changes, where the state is known at grid points alone; "
            "put every time of save_at on the grid"
        )
    if following is not None and (following.boundaries or following.takes > 1):
        what = "paths that stop or are reflected" if following.boundaries else "an observable of time or of a carry"
        raise ValueError(f"{what} have values at grid points alone; put every time of save_at on the grid")
    if isinstance(problem.solver, PredictorCorrector):
        raise ValueError("a corrected chain has states at grid points alone; save_at holds times between them")
    if problem.random and not isinstance(problem.noise, AbstractPath):
        raise ValueError(
            f"noise of class {type(problem.noise).__name__} is known at grid points alone; put every time of save_at "
            "on the grid"
        )


def _grid_of(t0: Any, t1: Any, steps: int | None, grid: Any, batch: int) -> tuple[Tensor, float]:
    """The grid, and how far its times may be from those that were meant."""
    if grid is not None:
        if not (t0 is None and t1 is None and steps is None):
            raise ValueError("give either grid or t0, t1 and steps, not both")
        given = grids.read_times(grid, "grid")
        times = grids.check_grid(given.values, padded=True)
        if times.ndim == 2 and times.shape[1] != batch:
            raise ValueError(f"grid has times for {times.shape[1]} samples, x0 has {batch}")
        return times, given.rounding
    if t0 is None or t1 is None or steps is None:
        missing = [name for name, value in (("t0", t0), ("t1", t1), ("steps", steps)) if value is None]
        raise ValueError(f"give t0, t1 and steps, or a grid of times; missing: {', '.join(missing)}")
    (start, coarse0), (end, coarse1) = grids.read_times(t0, "t0"), grids.read_times(t1, "t1")
    coarsest = max(coarse0, coarse1)
    if start.ndim == end.ndim == 0:
        uniform = _equal_steps if whole_number(steps, "steps", 1) <= _SHARED_STEPS else grids.uniform
        times = uniform(float(start), float(end), int(steps))
        return times, coarsest * max(abs(float(start)), abs(float(end)))
    steps = grids.count_of_steps(steps)
    for name, t in (("t0", start), ("t1", end)):
        if t.ndim > 1 or (t.ndim == 1 and len(t) != batch):
            raise ValueError(f"{name} must be a number or one time per sample, ({batch},), got shape {tuple(t.shape)}")
    if not bool((start.isfinite() & end.isfinite()).all()):
        raise ValueError("t0 and t1 must be finite for every sample")
    if bool((start == end).any()):
        row = int((start == end).expand(batch).nonzero()[0])
        raise ValueError(f"t0 and t1 must differ; for sample {row} they are equal, and there is nothing to integrate")
    u = torch.arange(steps + 1, dtype=torch.float64, device="cpu")[:, None] / steps
    times = start + (end - start) * u
    times[0], times[-1] = start, end
    return grids.check_resolved(times), coarsest * float(times.abs().max()) if batch else 0.0


@functools.lru_cache(32)
def _equal_steps(t0: float, t1: float, steps: int) -> Tensor:
    """A grid that calls share: nobody writes into it."""
    return grids.uniform(t0, t1, steps)


def noise_of(
    seed: Seed, noise: AbstractNoise | None, increments: Increments | None = None, *, random: bool = True
) -> AbstractNoise:
    """The noise that ``seed=``, ``noise=`` and ``increments=`` of `solve` or `sample` ask for.

    Args:
        seed, noise, increments: as `solve`.
        random: whether anything reads it; a seed is drawn only then.
    """
    if seed is not None and noise is not None:
        raise ValueError("seed is short for noise=BrownianPath(seed); give one of them")
    if increments is not None and noise is not None:
        raise ValueError("increments is short for noise=BrownianPath(seed, kind=increments); give one of them")
    if noise is not None:
        if not isinstance(noise, AbstractNoise):
            raise TypeError(f"noise must be a BrownianPath, got {type(noise).__name__}; a number goes to seed=")
        return noise
    if seed is None:
        seed = 0 if not random else drawn_seed()
    if not isinstance(seed, int) and not isinstance(seed, Number) and getattr(seed, "ndim", 1) > 0:
        if not isinstance(seed, Iterable) or isinstance(seed, str | bytes | Mapping):
            raise TypeError(f"seed must be a whole number, or one for each row, got {short(seed)}")
        return BrownianRows(seed, kind="normal" if increments is None else increments)
    return BrownianPath(cast("int", seed), kind="normal" if increments is None else increments)
