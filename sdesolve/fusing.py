"""Whole integrations in one kernel: the solver's own step, traced with the user's functions inside it.

What is handed to the compiler is the same pure function that runs in torch, `AbstractOneStep.step` or `row_step`; no
solver is written a second time. Here is decided whether an integration can run this way, and what its kernel is bound
to; `sdesolve_kernels.trajectory` makes and runs it.
"""

from __future__ import annotations

import dataclasses
import math
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from typing import final

import torch
from sdesolve_kernels.dispatch import backend_for
from sdesolve_kernels.trajectory import (
    AbstractTrajectory,
    Contents,
    Inputs,
    Launch,
    Signature,
    Unsupported,
    compile_trajectory,
    contents,
    trace,
    traced_shape,
)
from torch import Tensor

from sdesolve.brownian import AbstractNoise, BrownianPath
from sdesolve.saving import SavePlan, observed
from sdesolve.sde import AbstractSDE, AbstractSemilinear, Field, Noise, noise_shape
from sdesolve.solvers.base import AbstractOneStep, AbstractSolver, Span
from sdesolve.solvers.milstein import check_own_component
from sdesolve.solvers.tabulated import AbstractTabulated, Table, row_step

_KERNELS_KEPT = 128


class AbstractCounted(AbstractSDE):
    """An SDE that counts the evaluations of its drift."""

    evaluations: int

    def field(self, x: Tensor, t: Tensor) -> Tensor:
        """The field of a semilinear equation, counted as an evaluation of its drift."""
        raise NotImplementedError


@final
@dataclasses.dataclass(frozen=True)
class Task:
    """An integration that might be fused.

    Attributes:
        solver: the scheme.
        equation: what the user passed.
        watched: the same, counted and checked.
        noise: the driving noise.
        times: the grid, float64.
        x0: the start.
        plan: what to save.
    """

    solver: AbstractSolver
    equation: AbstractSDE
    watched: AbstractCounted
    noise: AbstractNoise
    times: Tensor
    x0: Tensor
    plan: SavePlan


@final
@dataclasses.dataclass(frozen=True)
class Fused:
    """The outcome of a fused integration.

    Attributes:
        x1: final state.
        xs: saved states or observations, or means.
        variances: with moments.
        evaluations: of the drift, a step.
        source: of the kernel.
    """

    x1: Tensor
    xs: Tensor
    variances: Tensor | None
    evaluations: int
    source: str


@final
@dataclasses.dataclass(frozen=True)
class _Kernel:
    """A compiled step, and where its arguments come from.

    Attributes:
        trajectory: the kernel.
        where: for each tensor that it reads, its place among the tensors that the functions hold.
        captured: those tensors, if their places are not known; then the kernel is for one call.
        evaluations: of the drift, a step.
        normals: taken from the sequence of each source in a step.
        draws: how many of the noise's steps those are.
    """

    trajectory: AbstractTrajectory
    where: tuple[int, ...] | None
    captured: tuple[Tensor, ...]
    evaluations: int
    normals: int
    draws: int


_kernels: OrderedDict[Hashable, _Kernel | str] = OrderedDict()


def fuse(task: Task) -> Fused | str:
    """Runs a task as one kernel, or says why it cannot be."""
    why = _obstacle(task)
    if why:
        return why
    held = contents(task.solver, task.equation, task.plan.observable)
    if torch.is_grad_enabled() and (task.x0.requires_grad or any(t.requires_grad for t in held.tensors)):
        return "gradients are wanted, of the state or of a tensor that the functions hold, and a fused kernel has none"
    table = None
    if isinstance(task.solver, AbstractTabulated) and isinstance(task.equation, AbstractSemilinear):
        table = task.solver.table(task.equation, task.times)
    kernel = _kernel_for(task, held, table)
    return kernel if isinstance(kernel, str) else _run(task, kernel, held, table)


def _obstacle(task: Task) -> str:
    """Why this call cannot be fused whatever its functions are; empty if nothing stands in the way."""
    noise = task.noise
    if not isinstance(task.solver, AbstractOneStep | AbstractTabulated):
        return f"{type(task.solver).__name__} does more than the steps of one solver"
    if task.times.ndim == 2:
        return "there is a time grid per sample"
    if len(task.x0) == 0 or task.x0.numel() == 0:
        return "the batch is empty"
    if task.equation.noise is not Noise.NONE and not (isinstance(noise, BrownianPath) and noise.substeps == 1):
        return "increments are coarse, or come from a noise of another class than BrownianPath"
    name = backend_for("trajectory", task.x0.device)
    return f"the {name} back end makes no generated kernels" if name == "reference" else ""


def _kernel_for(task: Task, held: Contents, table: Table | None) -> _Kernel | str:
    batch, x0 = len(task.x0), task.x0
    key = (
        held.key,
        tuple(t.ndim > 0 and len(t) == batch for t in held.tensors),
        batch == 1,
        tuple(x0.shape[1:]),
        x0.dtype,
        x0.device,
        backend_for("trajectory", x0.device),
        task.noise.kind if isinstance(task.noise, BrownianPath) else None,
        bool(task.plan.inside),
        None if table is None else (table.noisy, tuple(r.shape[1] for r in table.rows), table.times.shape[1]),
    )
    if held.complete and key in _kernels:
        _kernels.move_to_end(key)
        return _kernels[key]
    made: _Kernel | str
    try:
        made = _build(task, held, table)
        # Making a trace may fill caches that the functions keep; if it changes them each time, it is no function.
        after = contents(task.solver, task.equation, task.plan.observable)
        if held.complete and after.key != held.key:
            held = after
            made = _build(task, held, table)
            if contents(task.solver, task.equation, task.plan.observable).key != held.key:
                return "a function changes Python values that it holds (a counter, a cache) each time it is called"
            return made
    except Unsupported as problem:
        made = str(problem)
    if held.complete and (isinstance(made, str) or made.where is not None):
        _kernels[key] = made
        while len(_kernels) > _KERNELS_KEPT:
            _kernels.popitem(last=False)
    return made


def _build(task: Task, held: Contents, table: Table | None) -> _Kernel:
    x0 = task.x0
    state = tuple(x0.shape[1:])
    columns = 0
    calls = 0
    noises: tuple[tuple[int, ...], ...]
    step: Callable[[Inputs], Sequence[Tensor]]
    if table is not None and isinstance(task.solver, AbstractTabulated):
        columns = _row_numbers(table).shape[1]
        step, memory, draws = _tabulated_step(task.solver, task.watched.field, table), task.solver.memory, table.draws
        noises = ((draws, *state),) if draws else ()
    else:
        memory, draws = 0, 1
        noises = _increment_shapes(task)
        step = _one_step(task)
    signature = Signature(x0.dtype, x0.device, (state,) * (1 + memory), noises, columns, len(x0))

    def counted(inputs: Inputs) -> Sequence[Tensor]:
        nonlocal calls
        calls += 1
        return step(inputs)

    before = task.watched.evaluations
    observable = None if task.plan.inside else task.plan.observable
    try:
        program = trace(counted, signature, None if observable is None else lambda x: observed(observable, x))
        evaluations = (task.watched.evaluations - before) // max(calls, 1)
    finally:
        task.watched.evaluations = before
    kind = task.noise.kind if isinstance(task.noise, BrownianPath) else "normal"
    trajectory = compile_trajectory(program, [kind] * len(noises))
    places = {id(t): i for i, t in enumerate(held.tensors)}
    where = None
    if held.complete and all(id(c) in places for c in program.captured):
        where = tuple(places[id(c)] for c in program.captured)
    normals = sum(math.prod(n) for n in noises)
    return _Kernel(trajectory, where, () if where is not None else program.captured, evaluations, normals, draws)


def _one_step(task: Task) -> Callable[[Inputs], Sequence[Tensor]]:
    solver, sde = task.solver, task.watched
    if not isinstance(solver, AbstractOneStep):
        raise Unsupported(f"{type(solver).__name__} has no step for {type(task.equation).__name__}")

    def step(inputs: Inputs) -> Sequence[Tensor]:
        dW = inputs.noises[0] * inputs.scale if inputs.noises else None
        return (solver.step(sde, inputs.states[0], Span(inputs.t0, inputs.t1, inputs.dt), dW),)

    return step


def _tabulated_step(solver: AbstractTabulated, field: Field, table: Table) -> Callable[[Inputs], Sequence[Tensor]]:
    evaluations, widths = table.times.shape[1], [r.shape[1] for r in table.rows]

    def step(inputs: Inputs) -> Sequence[Tensor]:
        times = inputs.row[:evaluations].unbind(0)
        rows = inputs.row[evaluations:].split(widths)
        normals = iter(inputs.noises[0].unbind(1) if inputs.noises else ())
        x, *memory = inputs.states
        x, after = row_step(
            solver, field, times, rows, [next(normals) if n else None for n in table.noisy], x, tuple(memory)
        )
        return (x, *after)

    return step


def _row_numbers(table: Table) -> Tensor:
    """Everything a step reads of a table: evaluation times, then its rows."""
    return torch.cat([table.times, *table.rows], dim=1)


def _increment_shapes(task: Task) -> tuple[tuple[int, ...], ...]:
    """Shape of the Brownian increment for one path, found without evaluating the diffusion on the whole batch."""
    sde, x0 = task.watched, task.x0
    state = tuple(x0.shape[1:])
    if sde.noise is Noise.NONE:
        return ()
    t = task.times[0].to(x0)
    if task.solver.own_component_diffusion and sde.noise is Noise.DIAGONAL:
        with torch.no_grad():
            check_own_component(sde, x0.detach(), t)
    if sde.noise not in (Noise.ADDITIVE, Noise.GENERAL):
        return (noise_shape(sde.noise, x0),)
    signature = Signature(x0.dtype, x0.device, (state,), (), 0, len(x0))
    g = traced_shape(lambda inputs: sde.diffusion(inputs.states[0], inputs.t0), signature)
    return ((g[-1],) if len(g) == x0.ndim + 1 else state,)


def _run(task: Task, kernel: _Kernel, held: Contents, table: Table | None) -> Fused:
    path, plan = task.noise, task.plan
    places: list[tuple[int, int, int, int]] = []
    if kernel.normals and isinstance(path, BrownianPath):
        first = path.first_step * (kernel.normals // kernel.draws)
        places = [(path.seed, int(path.stream), path.first_path, first)]
    captured = kernel.captured if kernel.where is None else tuple(held.tensors[i] for i in kernel.where)
    rows = None if table is None else _row_numbers(table)
    if plan.inside:
        return _between(task, kernel, Launch(task.x0, task.times, rows, places, _around(plan), False, captured))
    saves = sorted(k for k, slots in plan.on_grid.items() if slots)
    # The end alone needs no saving if it is wanted as it is.
    plain = saves == [len(task.times) - 1] and plan.observable is None and not plan.moments
    saved = kernel.trajectory.run(
        Launch(task.x0, task.times, rows, places, () if plain else saves, plan.moments, captured)
    )
    shape = kernel.trajectory.plan.program.observed_shape
    shape = tuple(task.x0.shape[1:]) if shape is None else shape
    if saved.moments is not None:
        mean, variance = (m.reshape(len(saves), *shape) for m in (saved.moments.mean, saved.moments.variance))
        return Fused(saved.x1, mean, variance, kernel.evaluations, kernel.trajectory.source)
    xs = saved.x1[None] if saved.states is None else saved.states.reshape(len(saves), len(task.x0), *shape)
    return Fused(saved.x1, xs, None, kernel.evaluations, kernel.trajectory.source)


def _around(plan: SavePlan) -> list[int]:
    """Grid points that a plan needs, those on both sides of a time between two among them."""
    return sorted({k for k, slots in plan.on_grid.items() if slots} | {k + i for k in plan.inside for i in (0, 1)})


def _between(task: Task, kernel: _Kernel, launch: Launch) -> Fused:
    """A run whose plan has times between grid points: states there follow from those on both sides."""
    saved = kernel.trajectory.run(launch)
    assert saved.states is not None
    states = dict(zip(launch.saves, saved.states.reshape(-1, *task.x0.shape), strict=True))
    plan, ts = task.plan, task.times.to(task.x0)
    dts = task.times.diff().to(task.x0)
    channels = () if task.watched.noise is Noise.NONE else _increment_shapes(task)[0]
    for k, x in states.items():
        plan.at_grid_point(k, x)
        if k in plan.inside:
            span = Span(ts[k], ts[k + 1], dts[k])
            plan.within_step(k, task.watched, x, states[k + 1], span, task.noise, (len(x), *channels))
    variances = plan.variances() if plan.moments else None
    return Fused(saved.x1, plan.states(), variances, kernel.evaluations, kernel.trajectory.source)
