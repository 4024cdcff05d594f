"""`sample`: draws from a score-based model by integrating its reverse SDE or probability flow."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, ParamSpec, overload

import torch
from sdesolve_kernels.transforms import is_transformed
from torch import Tensor

from sdesolve import grids
from sdesolve._internal.arguments import device_of, flag, kind_of, number, short, whole_number
from sdesolve._internal.generators import seeded
from sdesolve._internal.modes import in_evaluation
from sdesolve._internal.precision import NARROW, networks_in_their_own
from sdesolve._internal.transforms import runs_as_it_is
from sdesolve.brownian import AbstractNoise, BrownianPath, BrownianRows, drawn_seed
from sdesolve.diffusions.base import AbstractDiffusion
from sdesolve.integrate.checks import check_drift, check_state
from sdesolve.integrate.cuda_graph import StraightSampler, captured, settings_of
from sdesolve.integrate.hooks import Callback, Hook, RecordedScore
from sdesolve.integrate.narrow import function_in, is_narrow, narrowed
from sdesolve.integrate.save_at import SaveAt
from sdesolve.integrate.solution import Continuation, Solution
from sdesolve.integrate.solve import Backend, Seed, check_start, integrate, noise_of
from sdesolve.inverse.base import AbstractPosteriorScore
from sdesolve.reverse import ProbabilityFlow, ReverseSDE, Score
from sdesolve.scores.base import AbstractData, ExactScore
from sdesolve.scores.guidance import ClassifierFreeGuidance, ClassifierGuidance
from sdesolve.scores.network import NetworkScore
from sdesolve.scores.threshold import Clip, Threshold, ThresholdedScore
from sdesolve.sde import per_sample
from sdesolve.solvers.base import AbstractOneStep, AbstractSolver
from sdesolve.solvers.euler_maruyama import EulerMaruyama
from sdesolve.solvers.predictor_corrector import PredictorCorrector
from sdesolve.solvers.tabulated import AbstractTabulated

P = ParamSpec("P")
_FINEST = 1 << 20  # steps of a grid of which the last are taken


def _flows_in_16_bits(sample: Callable[P, Any]) -> Callable[P, Any]:
    """`sample`, with probability flows in 16 bits as flows in float32 by networks in the precision of their weights."""

    @functools.wraps(sample)
    def call(*args: P.args, **kwargs: P.kwargs) -> Any:
        x0, dtype = kwargs.get("x0"), kwargs.get("dtype")
        if not is_narrow(x0) and dtype not in NARROW:
            return sample(*args, **kwargs)
        told, solver = kwargs.get("stochasticity"), kwargs.get("solver")
        if told is None:
            told = solver.sampling_stochasticity if isinstance(solver, AbstractSolver) else 1.0
        narrow = x0.dtype if isinstance(x0, Tensor) and x0.dtype in NARROW else dtype
        apart = isinstance(x0, Tensor) and x0.dtype is not narrow
        if told != 0 or apart or dtype not in (None, narrow) or len(args) < 2:
            return sample(*args, **kwargs)
        assert isinstance(narrow, torch.dtype)
        more: dict[str, Any] = kwargs | {"dtype": torch.float32}
        if isinstance(x0, Tensor):
            more |= {"x0": x0.float(), "dtype": None}
        of_any: Callable[..., Tensor] = sample
        with networks_in_their_own():
            return narrowed(of_any(args[0], function_in(args[1], narrow), *args[2:], **more), narrow)

    return call


@overload
def sample(
    process: AbstractDiffusion,
    score: Score,
    shape: tuple[int, ...] | None = ...,
    *,
    full: Literal[True],
    **options: Any,
) -> Solution: ...
@overload
def sample(process: AbstractDiffusion, score: Score, shape: tuple[int, ...] | None = ..., **options: Any) -> Tensor: ...
@_flows_in_16_bits  # type: ignore[misc]  # options are those below
@runs_as_it_is
@in_evaluation
def sample(
    process: AbstractDiffusion,
    score: Score,
    shape: tuple[int, ...] | None = None,
    *,
    x0: Tensor | None = None,
    from_time: float | None = None,
    start: Continuation | None = None,
    solver: AbstractSolver | None = None,
    steps: int | None = None,
    grid: Tensor | None = None,
    seed: Seed = None,
    noise: AbstractNoise | None = None,
    stochasticity: float | None = None,
    denoise: bool = True,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    backend: Backend = "auto",
    progress: bool = False,
    cuda_graph: bool = False,
    dropout: bool = False,
    given: Mapping[str, Tensor | float] | None = None,
    paths: Iterable[int] | Tensor | None = None,
    threshold: Threshold | None = None,
    callback: Callback | None = None,
    save_at: SaveAt = None,
    full: bool = False,
) -> Tensor | Solution:
    r"""Draws ``shape = (batch, *state)`` samples: prior at ``t_max``, integrated back to ``t_min``, then denoised.

    Row ``i`` is a function of ``(seed, i)`` alone: the first rows of a large batch are the rows of a small one.

    Args:
        process: the forward diffusion.
        score: ``grad_x log p_t(x)``, exact or learned.
        shape: of the result; may be left out with ``x0`` or ``start``.
        x0: states at the first time, ``(batch, *state)``, in place of draws from the prior. To go on from images, add
            the noise of that time first: ``m = process.marginal(images, t)``, ``x0 = m.mean + m.std * z`` (Meng et al.
            2022, SDEdit).
        from_time: the first time, with ``steps``; ``t_max`` by default. Without ``x0`` states are drawn from
            `AbstractDiffusion.prior_at` it, as they are for the first time of a ``grid``.
        start: go on from the ``state`` of a `Solution` of the same reverse equation, with its noise and what its solver
            remembers; in place of ``x0``, ``from_time``, ``seed`` and ``noise``.
        solver: ``EulerMaruyama()`` by default.
        steps: number of steps on the process's own grid (`AbstractDiffusion.time_grid`). `DormandPrince` takes neither
            these nor a grid: it goes from ``t_max`` to ``t_min`` in steps of its own, each sample for itself.
        grid: explicit decreasing times instead of ``steps``. For samplers made for reverse equations, such as
            `DPMSolverPP`, it may end at 0; the last step then is Tweedie's formula and nothing is left to denoise.
        seed: for the start and the driving noise; drawn from torch's default generator if not given. One for each row
            makes row ``i`` the first row of a run of its own with ``seed[i]``.
        noise: the driving noise instead; a `BrownianPath`, or `BrownianRows` with a seed for each row, also gives the
            start.
        stochasticity: 1 for the reverse SDE, 0 for the probability-flow ODE, or between or above (`ReverseSDE`). By
            default what the solver is made for; 1 if that is any SDE with additive noise, 0 if it takes ODEs only.
        denoise: finish with Tweedie's formula ``(x + sigma^2 score) / alpha`` at the last time, which removes the noise
            that is left there at the cost of one score evaluation.
        dtype: float32 (the default) or float64; that of ``x0`` where it is given. Flows have float16 and bfloat16
            too: networks and functions of the score compute in the 16 bits of their weights, steps are made in float32.
        device: where to sample; likewise.
        backend: as for `solve`.
        progress: show a progress bar.
        cuda_graph: capture the whole sampler as a CUDA graph at the first call with these arguments, and replay it
            with the new seed at later ones. The state is then not checked for nan.
        dropout: let dropout draw while sampling. Networks are in evaluation mode otherwise, and have their own modes
            again when the call ends; batch statistics stay as they are in either case. What a network draws depends on
            the seed, and on all rows of the batch.
        given: conditions of the network by name, as for `NetworkScore.given`: ``given={"label": 7}`` is to sample from
            ``score.given(label=7)``. With `ClassifierFreeGuidance` they go to the conditional score.
        paths: number of each row's path, ``(batch,)``, in place of 0, 1, ...: chosen rows of a run, again.
        threshold: a map of the denoised estimate ``E[x_0 | x_t]``, applied wherever the score is evaluated, such as
            ``Clip(-1, 1)`` or ``DynamicThreshold(0.995)`` (`ThresholdedScore`).
        callback: called after each step with a `SamplingStep`: index, times, states and denoised estimate. A tensor
            that it returns is the state to go on with, and that is saved; ``step.stop()`` ends the run there, and the
            sample is what is denoised then. Multistep samplers keep what they remember. Runs go step by step.
        save_at: times whose states to keep, or ``"grid"``, as for `solve`; the result then is a `Solution`.
        full: return a `Solution`: ``x1`` are the samples, denoised if ``denoise``; ``xs`` and ``state`` are states of
            the run, which are not.

    Returns:
        Samples ``(batch, *state)``; a `Solution` with ``full`` or ``save_at``.

    Raises:
        ValueError: as `solve`; a state of another shape from the callback, or one that is not finite; a callback with a
            solver that chooses its own steps; ``from_time`` outside ``(t_min, t_max]``; a grid that leaves
            ``(0, t_max]`` or does not decrease; a score of another process; conditions with another number of rows than
            samples, or none where the network was never trained without.
        TypeError: as `solve`.
        DivergenceError: as `solve`.
    """
    score = score if given is None else given_to(score, given)
    check_model(process, score)
    score = score if threshold is None else ThresholdedScore(process, score, threshold)
    solver = EulerMaruyama() if solver is None else solver
    if not isinstance(solver, AbstractSolver):
        raise TypeError(f"solver must be a solver object such as EulerMaruyama(), got {kind_of(solver)}")
    if start is not None:
        check_start(start, solver, x0=x0, from_time=from_time, seed=seed, noise=noise)
        if start.t.ndim:
            raise ValueError("start has a time for each sample, and sample takes one for all; integrate with solve")
        x0, noise, from_time = start.x, start.noise, float(start.t) if grid is None else None
    denoise, cuda_graph = flag(denoise, "denoise"), flag(cuda_graph, "cuda_graph")
    progress, dropout = flag(progress, "progress"), flag(dropout, "dropout")
    if dtype is not None and dtype not in (torch.float32, torch.float64):
        hint = ""
        if dtype in NARROW:
            hint = (
                ": noise of small steps vanishes in 16 bits. Flows have them, stochasticity=0 or a solver such as "
                "DDIM(); else sample in float32, and let the network compute in 16 bits under torch.autocast"
            )
        raise TypeError(f"dtype must be torch.float32 or torch.float64, got {short(dtype)}{hint}")
    shape, dtype, device = _like(x0, shape, dtype, device)
    times = sampling_times(process, solver, steps, grid, from_time)
    if bool((process.sigma(times[-1]) == 0).any()):
        denoise = False  # nothing is left to remove
    full = flag(full, "full") or save_at is not None
    if paths is not None:
        if noise is not None:
            raise ValueError("paths is short for noise=BrownianRows(seed, paths); give one of them")
        seed, noise = None, BrownianRows(drawn_seed() if seed is None else seed, paths)
    path = noise_of(seed, noise)
    if isinstance(path, BrownianRows):
        path.check_rows(shape[0])
    check_same_process(process, score, shape[0])
    hook, seen = None, score
    if callback is not None:
        if solver.controller is not None:
            raise ValueError(
                f"{type(solver).__name__} takes steps of each sample's own, and a callback sees one step of all: take "
                "a solver of fixed steps, or save_at=[times]"
            )
        seen = recorded = RecordedScore(score, process)
        hook = Hook(callback, recorded)
    if solver.controller is not None and isinstance(save_at, str):
        raise ValueError(f"{type(solver).__name__} chooses its own steps: give save_at=[times] for states between")
    stochasticity = solver.sampling_stochasticity if stochasticity is None else number(stochasticity, "stochasticity")
    backward = process.probability_flow(seen) if stochasticity == 0 else process.reverse(seen, stochasticity)
    if cuda_graph:
        if full or callback is not None:
            raise ValueError("a captured sampler returns samples alone; leave out cuda_graph, or full, save_at")
        if x0 is not None:
            raise ValueError("a captured sampler starts from the prior; leave out cuda_graph, or x0 and start")
        if dropout:
            raise ValueError("a CUDA graph replays its dropout masks; leave cuda_graph out to draw new ones")
        if solver.controller is not None:
            raise ValueError(f"{type(solver).__name__} decides on its steps as it goes, which a CUDA graph cannot hold")
        where = device
        what = (id(score), id(process), solver, tuple(times.tolist()), shape, stochasticity, denoise, dtype, where)
        key = (*what, *settings_of(where))
        if not isinstance(path, BrownianPath) or not path.plain or path.first_step:
            raise ValueError("a captured sampler takes seed= or noise=BrownianPath(seed, first_path) only")

        def straight() -> StraightSampler:
            return StraightSampler(
                process, score, backward, solver, times, shape, denoise=denoise, dtype=dtype, device=where
            )

        return captured(key, straight, where)(path.seed, path.first_path)
    draws: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
    if dropout:
        seed = path.seed if isinstance(path, BrownianPath) else 0
        draws = seeded("dropout", seed, device=device)
    # No record is kept, but what torch.func differentiates has its derivatives.
    with contextlib.nullcontext() if is_transformed() else torch.no_grad(), draws:
        x = x0
        if x is None:
            prior = process.prior_at(float(times[0]))
            if isinstance(path, BrownianRows):
                x = prior.std * path.initial(shape, dtype, device)
            else:
                first = path if isinstance(path, BrownianPath) else BrownianPath(0)
                x = prior.sample(shape, seed=first.seed, first_path=first.first_path, dtype=dtype, device=device)
        solution = integrate(
            backward, x, times, solver=solver, noise=path, start=start, backend=backend, progress=progress,
            save_at=save_at, hook=hook,
        )  # fmt: skip
        x, stats = solution.x1, solution.stats
        last = times[stats.steps] if solver.controller is None else times[-1]
        if bool(process.sigma(last) == 0):  # nothing is left to remove
            x = threshold(x) if isinstance(threshold, Clip) else x
        elif denoise:
            x = tweedie(process, score, x, last.to(dtype=x.dtype, device=x.device))
            stats = dataclasses.replace(stats, nfe=stats.nfe + 1)
        return dataclasses.replace(solution, x1=x, stats=stats) if full else x


def tweedie(process: AbstractDiffusion, score: Score, x: Tensor, t: Tensor) -> Tensor:
    """``E[x_0 | x_t = x] = (x + sigma^2 score(x, t)) / alpha`` (Robbins 1956; Efron 2011, eq. 2.8).

    Args:
        process: the forward diffusion.
        score: ``grad_x log p_t(x)``.
        x: ``(batch, *state)``.
        t: ``()`` or ``(batch,)``.
    """
    if isinstance(score, ThresholdedScore):
        return score.data(x, t)
    s = score(x, t)
    check_drift(s, x, t, "score")
    return (x + per_sample(process.sigma(t).square(), x) * s) / per_sample(process.alpha(t), x)


def given_to(score: Score, conditions: Mapping[str, Tensor | float]) -> Score:
    """The score under conditions, those of its networks."""
    if isinstance(score, ThresholdedScore):
        return ThresholdedScore(score.process, given_to(score.score, conditions), score.threshold)
    if isinstance(score, ClassifierFreeGuidance):
        return score.of(*(given_to(part, conditions) for part in score.conditionals), score.unconditional)
    if not isinstance(score, NetworkScore):
        raise TypeError(f"given is for a NetworkScore, or guidance by one, got {kind_of(score)}; bind it in the score")
    return score.given(**conditions)  # type: ignore[arg-type]


def check_model(process: AbstractDiffusion, score: Score) -> None:
    """Refuses what is no forward process, and a score that is none or was made for other noise."""
    if not isinstance(process, AbstractDiffusion):
        hint = ""
        if isinstance(process, ReverseSDE | ProbabilityFlow):
            hint = "; give the forward process: it is reversed here"
        elif isinstance(score, AbstractDiffusion):
            hint = "; the process comes first, then the score"
        raise TypeError(f"process must be a linear diffusion such as VP(), got {kind_of(process)}{hint}")
    if isinstance(score, AbstractData):
        raise TypeError(f"score must be a function of (x, t), got the law {kind_of(score)}; give its .score(process)")
    check_same_process(process, score)


def check_same_process(process: AbstractDiffusion, score: Score, samples: int | None = None) -> None:
    """Refuses a score that was made for other noise than that of ``process``, where it says what it was made for.

    Scores within guidance and posterior scores are looked at too. Processes are compared by their alpha and sigma, at
    the ends and in the middle of the working interval.

    Raises:
        TypeError: what is called like a score and says, by ``no_score``, that it is none.
        ValueError: they differ by more than a thousandth; a network lacks a condition that it was never trained
            without, or has one with rows for another number of ``samples``.
    """
    if (no_score := getattr(score, "no_score", None)) is not None:
        raise TypeError(no_score)
    for inner in _scores_within(score):
        check_same_process(process, inner, samples)
    if isinstance(score, NetworkScore):
        score.check_conditions(samples)
    if isinstance(score, ClassifierFreeGuidance) and samples is not None:
        score.check_rows(samples)
    if not isinstance(score, NetworkScore | ExactScore | AbstractPosteriorScore) or score.process is process:
        return
    theirs = score.process
    for t in (process.t_min, 0.5 * (process.t_min + process.t_max), process.t_max):
        for of_process, of_score in ((process.log_alpha, theirs.log_alpha), (process.sigma, theirs.sigma)):
            ours, made_for = float(of_process(t)), float(of_score(t))
            if not math.isclose(ours, made_for, rel_tol=1e-3, abs_tol=1e-9):
                raise ValueError(
                    f"the score was made for {theirs} and not for {process}: at t = {t:.6g} they have alpha "
                    f"{float(theirs.alpha(t)):.4g} and {float(process.alpha(t)):.4g}, sigma "
                    f"{float(theirs.sigma(t)):.4g} and {float(process.sigma(t)):.4g}. Give score.process as the "
                    "process, or make the score for this one"
                )


def _scores_within(score: Score) -> tuple[Score, ...]:
    if isinstance(score, ClassifierFreeGuidance):
        return tuple(part for part, called in zip(score.parts, score.used, strict=True) if called)
    return (score.score,) if isinstance(score, ClassifierGuidance | AbstractPosteriorScore | ThresholdedScore) else ()


def state_shape(shape: object) -> tuple[int, ...]:
    """``(batch, *state)`` as integers."""
    if isinstance(shape, int) or not isinstance(shape, Sequence):
        raise TypeError(f"shape must be (batch, *state), such as (64, 2), got {short(shape)}")
    return tuple(whole_number(n, "each entry of shape", 0) for n in shape)


def _like(
    x0: Tensor | None, shape: object, dtype: torch.dtype | None, device: torch.device | str | None
) -> tuple[tuple[int, ...], torch.dtype, torch.device]:
    """Shape, dtype and device of the samples: those of ``x0``, where it is given."""
    if x0 is None:
        if shape is None:
            raise TypeError("give the shape of the result, (batch, *state), or x0, the states to start from")
        return state_shape(shape), dtype or torch.float32, device_of(device)
    check_state(x0)
    for name, given, own in (("shape", shape and state_shape(shape), tuple(x0.shape)), ("dtype", dtype, x0.dtype)):
        if given is not None and given != own:
            raise ValueError(f"{name} of the samples is that of x0, {own}, got {given}; leave it out")
    if device is not None and device_of(device) != x0.device:
        raise ValueError(f"samples are made where x0 is, on {x0.device}, got device={str(device)!r}; move x0 there")
    return tuple(x0.shape), x0.dtype, x0.device


def _own_grid(process: AbstractDiffusion, steps: int, first: float) -> Tensor:
    """The last times of a grid of the process, after ``first``: ``steps`` steps of about the size that it has there."""

    def enough(n: int) -> bool:
        # A first step next to nothing would leave multistep schemes a difference of rounding errors to go by.
        grid = process.time_grid(n)
        return int((grid[1:] < first + 0.5 * grid.diff()).sum()) >= steps

    low, high = steps, steps
    while not enough(high):
        low, high = high, 2 * high
        if high > _FINEST:
            raise ValueError(
                f"from_time = {first} is too near t_min = {process.t_min} for {steps} steps of the process's own grid; "
                "give grid="
            )
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle + 1, high)
    return torch.cat([torch.tensor([first], dtype=torch.float64), process.time_grid(high)[-steps:]])


def sampling_times(
    process: AbstractDiffusion, solver: AbstractSolver, steps: int | None, grid: Tensor | None, from_time: float | None
) -> Tensor:
    """The grid that `sample` takes for these arguments, ``(steps + 1,)``, float64 on the host."""
    if from_time is not None:
        from_time = number(from_time, "from_time")
        if grid is not None:
            raise ValueError("a grid begins at its own first time: give from_time with steps, or a grid from then on")
        if not process.t_min < from_time <= process.t_max * (1 + 1e-6):
            raise ValueError(
                f"from_time must lie in (t_min, t_max] = ({process.t_min}, {process.t_max}], got {short(from_time)}; "
                "for other times give a grid"
            )
    first = process.t_max if from_time is None else min(from_time, process.t_max)
    if solver.controller is not None:
        if steps is not None or grid is not None:
            raise ValueError(f"{type(solver).__name__} chooses its own steps: leave out steps and grid")
        return torch.tensor([first, process.t_min], dtype=torch.float64, device="cpu")
    if isinstance(solver, PredictorCorrector):
        solver = solver.predictor
    if (steps is None) == (grid is None):
        raise ValueError("give steps, the number of steps on the process's own grid, or grid, explicit times")
    if grid is not None:
        times = grids.check_grid(grid)
    else:
        steps = whole_number(steps, "steps", 1)
        times = process.time_grid(steps) if first == process.t_max else _own_grid(process, steps, first)
    first, last = float(times[0].max()), float(times[-1].min())
    to_zero = isinstance(solver, AbstractTabulated) and not isinstance(solver, AbstractOneStep)
    if times.ndim != 1 or not (0 <= last < first <= process.t_max * (1 + 1e-6)) or (last == 0 and not to_zero):
        hint = "; to end at 0 take a sampler such as DPMSolverPP, whose last step can be exact" if last == 0 else ""
        raise ValueError(
            f"a sampling grid is (steps + 1,) and decreases within {'[' if to_zero else '('}0, t_max = "
            f"{process.t_max}]; got shape {tuple(times.shape)} from {first} to {last}{hint}"
        )
    return times
