"""`solve`: one integration, of any SDE or ODE, by any solver, in either direction of time."""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch
from torch import Tensor
from tqdm import tqdm

from sdesolve import grids
from sdesolve.adaptive import solve_adaptively
from sdesolve.brownian import AbstractNoise, BrownianPath, Increments
from sdesolve.checks import all_finite, check_pair, check_process_times, check_state
from sdesolve.integration import Watched, stepwise
from sdesolve.saving import Observable, SaveAt, SavePlan
from sdesolve.sde import ODE, SDE, AbstractSDE, Noise, State
from sdesolve.solution import Solution, Stats
from sdesolve.solvers.adaptive import AbstractAdaptive
from sdesolve.solvers.base import AbstractSolver
from sdesolve.solvers.predictor_corrector import PredictorCorrector

Backend = Literal["auto", "fused", "kernel", "eager"]
_PLAIN = ("auto", "eager")


def solve(
    sde: AbstractSDE,
    x0: State,
    t0: float | Tensor | None = None,
    t1: float | Tensor | None = None,
    steps: int | None = None,
    *,
    solver: AbstractSolver | AbstractAdaptive,
    grid: Tensor | None = None,
    seed: int | None = None,
    noise: AbstractNoise | None = None,
    save_at: SaveAt = None,
    params: Any = None,
    observable: Observable | None = None,
    reduce: Literal["moments"] | None = None,
    increments: Increments | None = None,
    backend: Backend = "auto",
    progress: bool = False,
    check_finite: bool = True,
) -> Solution:
    r"""Integrates ``dX = f(X, t) dt + g(X, t) dW`` (or an ODE) from ``x0`` over a grid of times.

    Args:
        sde: what to integrate: an `SDE`, an `ODE`, a forward process, a `ReverseSDE` or a `ProbabilityFlow`.
        x0: ``(batch, *state)``, float32 or float64; an empty batch gives an empty result.
        t0: start time; a number, or ``(batch,)`` for a start per sample.
        t1: end time, on either side of ``t0``; likewise.
        steps: number of equal steps. Times are ``t0 + (t1 - t0) k / steps``, computed in float64 for each ``k``.
        solver: the scheme, such as ``EulerMaruyama()``. An adaptive one (`DormandPrince`) takes no ``steps`` or
            ``grid``, and ``save_at`` only as times, whose states its interpolant gives.
        grid: explicit times instead of ``t0, t1, steps``: ``(steps + 1,)`` or ``(steps + 1, batch)``, monotone.
        seed: short for ``noise=BrownianPath(seed)``. Without either, a seed is drawn from torch's default generator; it
            is in ``stats.seed``, so the run can be repeated.
        noise: the driving Brownian motion; its step 0 is the first step of this grid.
        save_at: times whose states to keep, ``"grid"`` for every grid point, or ``None`` for the last. A time between
            grid points is reached by a Brownian bridge of the same path (`SavePlan`), and asking for it changes nothing
            else.
        params: given to the functions of an `SDE` or `ODE` as a third argument: a tensor, or a tuple or dictionary of
            them. A tensor of ``batch`` rows has a row for each path, others are shared by all.
        observable: keep ``observable(x)``, ``(batch, *values)``, in ``xs`` in place of the state.
        reduce: ``"moments"`` keeps mean and variance over the batch at each time in place of every path.
        increments: short for ``noise=BrownianPath(seed, kind=increments)``: ``two-point`` and ``three-point`` numbers
            for weak convergence at a fraction of the cost.
        backend: ``fused`` is the whole trajectory in one generated kernel, ``kernel`` one kernel a step, ``eager`` the
            solver's own step in plain torch; none of these falls back to another. ``auto`` takes the first that can do
            it, and says in ``stats`` why no earlier one could. The README says what can be fused.
        progress: show a progress bar.
        check_finite: raise `DivergenceError` if the final state is not finite.

    Returns:
        A `Solution`. Gradients flow to ``x0`` and to whatever drift and diffusion are made of.

    Raises:
        ValueError: bad shapes, times, steps or grids, a diffusion that does not fit its noise type, or a solver that
            does not converge for this calculus and noise type; times of a reverse SDE or probability flow outside
            the ``[0, t_max]`` of its process.
        TypeError: bad types or dtypes.
        DivergenceError: a value became nan or inf; says at which step, time and path, and in which function.
        RuntimeError: an adaptive solver cannot meet its tolerances.
    """
    check_pair(solver, sde)
    check_state(x0)
    if params is not None:
        if not isinstance(sde, SDE | ODE):
            raise TypeError(
                f"params go to the functions of an SDE or ODE, and {type(sde).__name__} is neither; let its functions "
                "hold their parameters"
            )
        sde = sde.with_params(params)
    if isinstance(solver, AbstractAdaptive):
        given = any(value is not None for value in (steps, grid, observable, reduce))
        if given or isinstance(save_at, str) or backend not in _PLAIN:
            raise ValueError(
                f"{type(solver).__name__} chooses its own steps and runs eagerly: give t0 and t1, and save_at=[times] "
                "for states between; no steps, grid, observable, reduce or kernel backend"
            )
        ends = _grid_of(t0, t1, 1, None, len(x0))
        check_process_times(sde, ends)
        return solve_adaptively(sde, x0, ends, solver, save_at, progress=progress)
    times = _grid_of(t0, t1, steps, grid, len(x0))
    check_process_times(sde, times)
    random = sde.noise is not Noise.NONE or isinstance(solver, PredictorCorrector)
    noise = _noise_of(random, seed, noise, increments)
    for name, value, choices in (("backend", backend, get_args(Backend)), ("reduce", reduce, (None, "moments"))):
        if value not in choices:
            raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")
    watched = Watched(sde)
    plan = SavePlan(times, save_at, observable, moments=reduce is not None)
    if plan.inside and isinstance(solver, PredictorCorrector):
        raise ValueError("a corrected chain has states at grid points alone; save_at holds times between them")
    seed_used = noise.seed if isinstance(noise, BrownianPath) and random else None
    why = ""
    if backend in ("auto", "fused"):
        from sdesolve.fusing import Fused, fuse  # not with the package: the compiler is a third of its import
        from sdesolve.recipes import Task

        with tqdm(total=len(times) - 1, disable=not progress, unit="step", leave=False) as bar:
            fused = fuse(Task(solver, sde, watched, noise, times, x0, plan))
            bar.update(len(times) - 1 if isinstance(fused, Fused) else 0)
        if isinstance(fused, Fused):
            if check_finite and not all_finite(fused.x1):
                run = stepwise(solver, sde, watched, noise, times, x0, check_finite, eager=True)
                run.report_divergence(x0)
                run.report_end(fused.x1)  # rounding took the kernel alone over the edge
            stats = Stats(
                solver=type(solver).__name__,
                steps=len(times) - 1,
                nfe=fused.evaluations,
                backend="fused",
                reason="the whole trajectory is one generated kernel",
                seed=seed_used,
                source=fused.source,
            )
            return _solution(plan, fused.x1, fused.xs, fused.variances, stats)
        if backend == "fused":
            raise ValueError(f"this integration cannot be fused: {fused}. backend='auto' runs it in another way")
        why = f"; not fused: {fused}"
    run = stepwise(solver, sde, watched, noise, times, x0, check_finite, eager=backend == "eager")
    if backend == "kernel" and run.stepper.backend != "kernel":
        raise ValueError(f"no kernel does a step of this integration: {run.stepper.reason}")
    x = x0
    plan.at_grid_point(0, x)
    states = enumerate(run.states(x0))
    for k, (x_before, x, span) in tqdm(states, total=run.steps, disable=not progress, unit="step", leave=False):
        plan.within_step(k, watched, x_before, x, span, noise, run.shape)
        plan.at_grid_point(k + 1, x)
    if check_finite and not all_finite(x):
        run.report_divergence(x0)
    stats = Stats(
        solver=type(solver).__name__,
        steps=run.steps,
        nfe=watched.evaluations,
        backend=run.stepper.backend,
        reason=run.stepper.reason + why,
        seed=seed_used,
    )
    return _solution(plan, x, plan.states(), plan.variances() if plan.moments else None, stats)


def _solution(plan: SavePlan, x1: Tensor, xs: Tensor, variances: Tensor | None, stats: Stats) -> Solution:
    if variances is None:
        return Solution(x1=x1, ts=plan.ts, xs=xs, stats=stats)
    return Solution(x1, plan.ts, x1.new_empty(0, *x1.shape), stats, mean=xs, variance=variances)


def _grid_of(
    t0: float | Tensor | None, t1: float | Tensor | None, steps: int | None, grid: Tensor | None, batch: int
) -> Tensor:
    if grid is not None:
        if not (t0 is None and t1 is None and steps is None):
            raise ValueError("give either grid or t0, t1 and steps, not both")
        grid = grids.check_grid(grid)
        if grid.ndim == 2 and grid.shape[1] != batch:
            raise ValueError(f"grid has times for {grid.shape[1]} samples, x0 has {batch}")
        return grid
    if t0 is None or t1 is None or steps is None:
        missing = [name for name, value in (("t0", t0), ("t1", t1), ("steps", steps)) if value is None]
        raise ValueError(f"give t0, t1 and steps, or a grid of times; missing: {', '.join(missing)}")
    start, end = (_time(t, name) for name, t in (("t0", t0), ("t1", t1)))
    if start.ndim == end.ndim == 0:
        return grids.uniform(float(start), float(end), steps)
    steps = grids.whole_number(steps, "steps", 1)
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
    return times


def _time(t: float | Tensor, name: str) -> Tensor:
    try:
        return torch.as_tensor(t, dtype=torch.float64, device="cpu")
    except (TypeError, ValueError):
        raise TypeError(f"{name} must be a number or a tensor (batch,) of times, got {t!r}") from None


def _noise_of(
    random: bool, seed: int | None, noise: AbstractNoise | None, increments: Increments | None
) -> AbstractNoise:
    if seed is not None and noise is not None:
        raise ValueError("seed is short for noise=BrownianPath(seed); give one of them")
    if increments is not None and noise is not None:
        raise ValueError("increments is short for noise=BrownianPath(seed, kind=increments); give one of them")
    if noise is not None:
        if not isinstance(noise, AbstractNoise):
            raise TypeError(f"noise must be a BrownianPath, got {type(noise).__name__}; a number goes to seed=")
        return noise
    if seed is None:
        seed = 0 if not random else int(torch.randint(2**63 - 1, (), dtype=torch.int64, device="cpu"))
    return BrownianPath(seed, kind=increments or "normal")
