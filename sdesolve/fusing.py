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
    batch_kind,
    check_batch,
    compile_trajectory,
    contents,
    trace,
    traced_shape,
)
from torch import Tensor
from torch.autograd import forward_ad

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
        evaluations: of the drift, saving included.
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
        read: tensors whose values were made into the kernel: places as in ``where``, and the values.
        batches: kinds of batch that the trace is known to be right for (`check_batch`), and why not for others.
    """

    trajectory: AbstractTrajectory
    where: tuple[int, ...] | None
    captured: tuple[Tensor, ...]
    evaluations: int
    normals: int
    draws: int
    read: tuple[tuple[int, Tensor], ...]
    batches: dict[int, str] = dataclasses.field(default_factory=dict)


_kernels: OrderedDict[Hashable, _Kernel | str] = OrderedDict()


def fuse(task: Task) -> Fused | str:
    """Runs a task as one kernel, or says why it cannot be."""
    why = _obstacle(task)
    if why:
        return why
    held = contents(task.solver, task.equation, task.plan.observable)
    if _wants_gradient(task.x0, *held.tensors):
        return _NO_GRADIENT
    table = None
    if isinstance(task.solver, AbstractTabulated) and isinstance(task.equation, AbstractSemilinear):
        table = task.solver.table(task.equation, task.times)
    kernel = _kernel_for(task, held, table)
    if isinstance(kernel, str):
        return kernel
    if _wants_gradient(*kernel.captured):
        return _NO_GRADIENT
    return _right_for_batch(task, kernel, table) or _run(task, kernel, held, table)


_NO_GRADIENT = "gradients are wanted, of the state or of a tensor that the functions hold, and a fused kernel has none"


def _wants_gradient(*tensors: Tensor) -> bool:
    return torch.is_grad_enabled() and any(t.requires_grad for t in tensors)


def _right_for_batch(task: Task, kernel: _Kernel, table: Table | None) -> str:
    """Why a kernel is not right for a batch of this size; empty if it is."""
    kind = batch_kind(len(task.x0))
    if kind not in kernel.batches:
        step, observe = _step(task, table)[0], _observe(task)
        before = task.watched.evaluations
        try:
            check_batch(kernel.trajectory.plan.program, step, observe, len(task.x0))
            kernel.batches[kind] = ""
        except Unsupported as problem:
            kernel.batches[kind] = str(problem)
        finally:
            task.watched.evaluations = before
    return kernel.batches[kind]


def _obstacle(task: Task) -> str:
    """Why this call cannot be fused whatever its functions are; empty if nothing stands in the way."""
    noise = task.noise
    if task.times.ndim == 2:
        return "there is a time grid per sample"
    if len(task.x0) == 0 or task.x0.numel() == 0:
        return "the batch is empty"
    if type(task.x0) not in (Tensor, torch.nn.Parameter):
        return f"the state is a {type(task.x0).__name__}"
    if torch._C._functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0:
        return "it takes part in a torch.func transform or in forward-mode differentiation"
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
        torch.get_default_dtype(),
        torch.is_autocast_enabled(x0.device.type),
        task.noise.kind if isinstance(task.noise, BrownianPath) else None,
        bool(task.plan.inside),
        None if table is None else (table.noisy, tuple(r.shape[1] for r in table.rows), table.times.shape[1]),
    )
    if held.complete and key in _kernels:
        _kernels.move_to_end(key)
        found = _kernels[key]
        if isinstance(found, str) or all(torch.equal(held.tensors[i], value) for i, value in found.read):
            return found
    made: _Kernel | str
    try:
        made = _build(task, held, table)
        # Making a trace may fill caches that the functions keep; if it changes them each time, it is no function.
        after = contents(task.solver, task.equation, task.plan.observable)
        if after.key != held.key:
            made = _build(task, after, table)
            if contents(task.solver, task.equation, task.plan.observable).key != after.key:
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
    step, noises, columns = _step(task, table)
    states = (tuple(x0.shape[1:]),) * (
        1 + (task.solver.memory if isinstance(task.solver, AbstractTabulated) and columns else 0)
    )
    signature = Signature(x0.dtype, x0.device, states, noises, columns, len(x0))
    evaluations, before = 0, task.watched.evaluations

    def counted(inputs: Inputs) -> Sequence[Tensor]:
        nonlocal evaluations
        first = task.watched.evaluations
        after = step(inputs)
        evaluations = task.watched.evaluations - first
        return after

    try:
        program = trace(counted, signature, _observe(task))
    finally:
        task.watched.evaluations = before
    kind = task.noise.kind if isinstance(task.noise, BrownianPath) else "normal"
    trajectory = compile_trajectory(program, [kind] * len(noises))
    places = {id(t): i for i, t in enumerate(held.tensors)}
    where = None
    if held.complete and all(id(c) in places for c in program.captured):
        where = tuple(places[id(c)] for c in program.captured)
    return _Kernel(
        trajectory,
        where,
        () if where is not None else program.captured,
        evaluations,
        sum(math.prod(n) for n in noises),
        1 if table is None else table.draws,
        () if where is None else tuple((where[i], program.captured[i].detach().clone()) for i in program.read),
    )


def _observe(task: Task) -> Callable[[Tensor], Tensor] | None:
    observable = None if task.plan.inside else task.plan.observable
    return None if observable is None else lambda x: observed(observable, x)


def _step(
    task: Task, table: Table | None
) -> tuple[Callable[[Inputs], Sequence[Tensor]], tuple[tuple[int, ...], ...], int]:
    """The solver's step, the shapes of its sources of noise, and how many numbers are tabulated for it."""
    if table is None or not isinstance(task.solver, AbstractTabulated):
        return _one_step(task), _increment_shapes(task), 0
    noises = ((table.draws, *task.x0.shape[1:]),) if table.draws else ()
    return _tabulated_step(task.solver, task.watched.field, table), noises, _row_numbers(table).shape[1]


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
    evaluations = kernel.evaluations * (len(task.times) - 1)
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
        return Fused(saved.x1, mean, variance, evaluations, kernel.trajectory.source)
    xs = saved.x1[None] if saved.states is None else saved.states.reshape(len(saves), len(task.x0), *shape)
    return Fused(saved.x1, xs, None, evaluations, kernel.trajectory.source)


def _around(plan: SavePlan) -> list[int]:
    """Grid points that a plan needs, those on both sides of a time between two among them."""
    return sorted({k for k, slots in plan.on_grid.items() if slots} | {k + i for k in plan.inside for i in (0, 1)})


def _between(task: Task, kernel: _Kernel, launch: Launch) -> Fused:
    """A run whose plan has times between grid points: states there follow from those on both sides."""
    saved = kernel.trajectory.run(launch)
    assert saved.states is not None
    before = task.watched.evaluations
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
    evaluations = kernel.evaluations * (len(task.times) - 1) + task.watched.evaluations - before
    return Fused(saved.x1, plan.states(), variances, evaluations, kernel.trajectory.source)
