"""Whole integrations in one kernel: the solver's own step, traced with the user's functions inside it.

Here is decided whether an integration can run this way, and what its kernel is bound to; `recipes` says what of a
solver goes into it, and `sdesolve_kernels.trajectory` makes and runs it.
"""

from __future__ import annotations

import dataclasses
import math
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from typing import final

import torch
from sdesolve_kernels.dispatch import backend_for, requested_backend
from sdesolve_kernels.library import has_tangent
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
    settled,
    trace,
)
from torch import Tensor

from sdesolve.brownian import BrownianPath
from sdesolve.recipes import Recipe, Task, increment_shapes, recipe_for
from sdesolve.saving import SavePlan, observed
from sdesolve.sde import Noise
from sdesolve.solvers.base import Span

_KERNELS_KEPT = 128
# Decided by the equation alone, so that parts of a batch run as the whole does. One thread, float32, d = 2, against
# eager torch: `nn.MLP` of depth 2 and width 16, 32, 64 is 2.9, 2.0, 1.4 times as fast fused on 1024 paths and 3.4, 2.9,
# 2.3 times on 65,536; two plain hidden layers of 16, 32, 64, 128 are 2.5, 2.0, 1.8, 1.4 and 2.4, 1.8, 1.7, 1.6 times.
# Compiling takes 1 to 4 s, once for a shape of network: weights are arguments, and the kernel stays on disk.
_MOST_WEIGHTS = 1 << 16


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
        anew: why the functions are traced in each call; empty where the kernel is kept.
    """

    x1: Tensor
    xs: Tensor
    variances: Tensor | None
    evaluations: int
    source: str
    anew: str = ""


@final
@dataclasses.dataclass(frozen=True)
class _Kernel:
    """A compiled step, and where its arguments come from.

    Attributes:
        trajectory: the kernel.
        where: for each tensor that it reads, its place among the tensors that the functions hold.
        captured: those tensors, if their places are not known; then the kernel is for one call.
        evaluations: of the drift, a step.
        normals: taken from each source of noise in a step.
        read: tensors whose values were made into the kernel: places as in ``where``, and the values.
        batches: kinds of batch that the trace is known to be right for (`check_batch`), and why not for others.
    """

    trajectory: AbstractTrajectory
    where: tuple[int, ...] | None
    captured: tuple[Tensor, ...]
    evaluations: int
    normals: tuple[int, ...]
    read: tuple[tuple[int, Tensor], ...]
    batches: dict[int, str] = dataclasses.field(default_factory=dict)


_kernels: OrderedDict[Hashable, _Kernel | str] = OrderedDict()


def fuse(task: Task, *, wanted: bool = False) -> Fused | str:
    """Runs a task as one kernel, or says why it cannot be; without a compiler, in plain torch if that is wanted."""
    why = _obstacle(task, wanted)
    if why:
        return why
    try:
        held = contents(task.solver, task.equation, task.plan.observable, most_weights=_MOST_WEIGHTS)
    except Unsupported as problem:
        return str(problem)
    if _wants_gradient(task.x0, *held.tensors):
        return _NO_GRADIENT
    if has_tangent(task.x0, *held.tensors):
        return _TRANSFORMED
    recipe = recipe_for(task, task.solver)
    if isinstance(recipe, str):
        return recipe
    with settled():
        kernel = _kernel_for(task, held, recipe)
        if isinstance(kernel, str):
            return kernel
        if _wants_gradient(*kernel.captured):
            return _NO_GRADIENT
        if has_tangent(*kernel.captured):
            return _TRANSFORMED
        try:
            done = _right_for_batch(task, kernel, recipe) or _run(task, kernel, held, recipe)
        except Unsupported as problem:
            return str(problem)
    if isinstance(done, Fused) and kernel.where is None:
        return dataclasses.replace(done, anew=held.opaque or "a tensor that is made as they run")
    return done


_TRANSFORMED = "it takes part in a torch.func transform or in forward-mode differentiation"
_NO_GRADIENT = "gradients are wanted, of the state or of a tensor that the functions hold, and a fused kernel has none"


def _wants_gradient(*tensors: Tensor) -> bool:
    return torch.is_grad_enabled() and any(t.requires_grad for t in tensors)


def _right_for_batch(task: Task, kernel: _Kernel, recipe: Recipe) -> str:
    """Why a kernel is not right for a batch of this size; empty if it is."""
    kind = batch_kind(len(task.x0), task.x0[0].numel())
    if kind not in kernel.batches:
        before = task.watched.evaluations
        try:
            check_batch(kernel.trajectory.plan.program, recipe.step, _observe(task), len(task.x0))
            kernel.batches[kind] = ""
        except Unsupported as problem:
            kernel.batches[kind] = str(problem)
        finally:
            task.watched.evaluations = before
    return kernel.batches[kind]


def _obstacle(task: Task, wanted: bool) -> str:
    """Why this call cannot be fused whatever its functions are; empty if nothing stands in the way."""
    noise = task.noise
    if task.times.ndim == 2:
        return "there is a time grid per sample"
    if len(task.x0) == 0 or task.x0.numel() == 0:
        return "the batch is empty"
    if type(task.x0) not in (Tensor, torch.nn.Parameter):
        return f"the state is a {type(task.x0).__name__}"
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return _TRANSFORMED
    if task.equation.noise is not Noise.NONE and not (isinstance(noise, BrownianPath) and noise.substeps == 1):
        return "increments are coarse, or come from a noise of another class than BrownianPath"
    wanted = wanted or requested_backend() == "reference"
    if backend_for("trajectory", task.x0.device) == "reference" and not wanted:
        return f"no compiler of kernels for {task.x0.device.type} is installed"
    return ""


def _kernel_for(task: Task, held: Contents, recipe: Recipe) -> _Kernel | str:
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
        bool(task.plan.inside),
        recipe.columns,
        recipe.memory,
        tuple((path.kind, draws) for path, draws in recipe.sources),
    )
    if held.complete and key in _kernels:
        _kernels.move_to_end(key)
        found = _kernels[key]
        if isinstance(found, str) or all(torch.equal(held.tensors[i], value) for i, value in found.read):
            return found
    made: _Kernel | str
    try:
        made = _build(task, held, recipe)
        # Making a trace may fill caches that the functions keep; if it changes them each time, it is no function.
        after = contents(task.solver, task.equation, task.plan.observable)
        if after.key != held.key:
            made = _build(task, after, recipe)
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


def _build(task: Task, held: Contents, recipe: Recipe) -> _Kernel:
    x0 = task.x0
    evaluations, before = 0, task.watched.evaluations

    def counted(inputs: Inputs) -> Sequence[Tensor]:
        nonlocal evaluations
        first = task.watched.evaluations
        after = recipe.step(inputs)
        evaluations = task.watched.evaluations - first
        return after

    try:
        noises = recipe.noises()
        states = (tuple(x0.shape[1:]),) * (1 + recipe.memory)
        program = trace(
            counted, Signature(x0.dtype, x0.device, states, noises, recipe.columns, len(x0)), _observe(task)
        )
    finally:
        task.watched.evaluations = before
    trajectory = compile_trajectory(program, [path.kind for path, _ in recipe.sources])
    places = {id(t): i for i, t in enumerate(held.tensors)}
    where = None
    if held.complete and all(id(c) in places for c in program.captured):
        where = tuple(places[id(c)] for c in program.captured)
    return _Kernel(
        trajectory,
        where,
        () if where is not None else program.captured,
        evaluations,
        tuple(math.prod(n) for n in noises),
        () if where is None else tuple((where[i], program.captured[i].detach().clone()) for i in program.read),
    )


def _observe(task: Task) -> Callable[[Tensor], Tensor] | None:
    observable = None if task.plan.inside else task.plan.observable
    return None if observable is None else lambda x: observed(observable, x)


def _run(task: Task, kernel: _Kernel, held: Contents, recipe: Recipe) -> Fused:
    plan, rows = task.plan, recipe.numbers
    places = [
        _place(path, path.first_step * (m // draws), len(task.x0), m * (len(task.times) - 1))
        for (path, draws), m in zip(recipe.sources, kernel.normals, strict=True)
    ]
    captured = kernel.captured if kernel.where is None else tuple(held.tensors[i] for i in kernel.where)
    if plan.inside:
        return _between(task, kernel, Launch(task.x0, task.times, rows, places, _around(plan), False, captured))
    evaluations = kernel.evaluations * (len(task.times) - 1)
    saves = sorted(k for k, slots in plan.on_grid.items() if slots)
    # The end alone needs no saving if it is wanted as it is.
    plain = saves == [len(task.times) - 1] and plan.observable is None and not plan.moments
    saved = kernel.trajectory.run(
        Launch(task.x0, task.times, rows, places, () if plain else saves, plan.moments, captured)
    )
    # Two times at one grid point are two entries of what is returned.
    entry = {slot: i for i, k in enumerate(saves) for slot in plan.on_grid[k]}
    order = [entry[slot] for slot in range(len(plan.ts))]
    shape = kernel.trajectory.plan.program.observed_shape
    shape = tuple(task.x0.shape[1:]) if shape is None else shape
    if saved.moments is not None:
        mean, variance = (m.reshape(len(saves), *shape) for m in (saved.moments.mean, saved.moments.variance))
        mean, variance = (m if order == list(range(len(m))) else m[order] for m in (mean, variance))
        return Fused(saved.x1, mean, variance, evaluations, kernel.trajectory.source)
    xs = saved.x1[None] if saved.states is None else saved.states.reshape(len(saves), len(task.x0), *shape)
    xs = xs if order == list(range(len(xs))) else xs[order]
    return Fused(saved.x1, xs, None, evaluations, kernel.trajectory.source)


def _place(path: BrownianPath, offset: int, batch: int, count: int) -> tuple[int, int, int, int]:
    """Where ``count`` numbers of each of ``batch`` paths begin; refused where they would wrap and repeat others."""
    if path.first_path + batch > 1 << 64:
        raise ValueError(f"first_path + batch must be at most 2^64, got {path.first_path} + {batch}")
    if offset + count > 1 << 58:
        raise ValueError(
            f"a path has 2^58 numbers, and these steps end at number {offset + count}; begin at a smaller first_step, "
            "with another seed"
        )
    return path.seed, int(path.stream), path.first_path, offset


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
    channels = () if task.watched.noise is Noise.NONE else increment_shapes(task)[0]
    for k, x in states.items():
        plan.at_grid_point(k, x)
        if k in plan.inside:
            span = Span(ts[k], ts[k + 1], dts[k])
            plan.within_step(k, task.watched, x, states[k + 1], span, task.noise, (len(x), *channels))
    variances = plan.variances() if plan.moments else None
    evaluations = kernel.evaluations * (len(task.times) - 1) + task.watched.evaluations - before
    return Fused(saved.x1, plan.states(), variances, evaluations, kernel.trajectory.source)
