"""Whole integrations in one kernel: the solver's own step, traced with the user's functions inside it.

Here is decided whether an integration can run this way, and what its kernel is bound to; `recipes` says what of a
solver goes into it, and `sdesolve_kernels.trajectory` makes and runs it.
"""

from __future__ import annotations

import dataclasses
import math
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from typing import Any, final

import torch
from sdesolve_kernels.dispatch import backend_for, use_backend
from sdesolve_kernels.library import has_tangent
from sdesolve_kernels.trajectory import (
    AbstractTrajectory,
    Guards,
    Inputs,
    Launch,
    Signature,
    Unsupported,
    agree,
    check_size,
    compile_trajectory,
    look_into,
    recorded,
    same_operations,
    trace,
    unchanged,
)
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

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
_SECONDS = 5.0  # that a trace may take


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
        evaluations: of the drift, a step.
        noises: shapes of the normals of each source.
        read: tensors whose values were made into the kernel: places as in ``where``, and the values.
        bindings: what names in libraries stood for, see `unchanged`.
        batches: sizes of batch that were compared with torch, and why the kernel is not right for one.
    """

    trajectory: AbstractTrajectory
    where: tuple[int, ...]
    evaluations: int
    noises: tuple[tuple[int, ...], ...]
    read: tuple[tuple[int, Tensor], ...]
    bindings: list[Any]
    batches: dict[int, str] = dataclasses.field(default_factory=dict)

    def fits(self, guards: Guards) -> bool:
        """Whether nothing beyond the key of the guards has changed."""
        return unchanged(self.bindings) and all(torch.equal(guards.tensors[i], value) for i, value in self.read)


_kernels: OrderedDict[Hashable, _Kernel | str] = OrderedDict()


def fuse(task: Task) -> Fused | str:
    """Runs a task as one kernel, or says why it cannot be."""
    why = _obstacle(task)
    if why:
        return why
    before = task.watched.evaluations
    try:
        guards = look_into(*_roots(task), most_weights=_MOST_WEIGHTS)
        if _wants_gradient(task.x0, *guards.tensors):
            return _NO_GRADIENT
        if has_tangent(task.x0, *guards.tensors):
            return _TRANSFORMED
        recipe = recipe_for(task, task.solver)
        if isinstance(recipe, str):
            return recipe
        with _disable_current_modes():  # what watches this call is not to see a kernel being made and tried
            kernel, guards = _kernel_for(task, guards, recipe)
        return _run(task, kernel, guards, recipe)
    except Unsupported as problem:
        task.watched.evaluations = before
        return str(problem)


def _roots(task: Task) -> tuple[object, ...]:
    return task.solver, task.equation, task.plan.observable


_TRANSFORMED = "it takes part in a torch.func transform or in forward-mode differentiation"
_NO_GRADIENT = "gradients are wanted, of the state or of a tensor that the functions hold, and a fused kernel has none"


def _wants_gradient(*tensors: Tensor) -> bool:
    return torch.is_grad_enabled() and any(t.requires_grad for t in tensors)


def _obstacle(task: Task) -> str:
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
    name = backend_for("trajectory", task.x0.device)
    return f"the {name} back end makes no generated kernels" if name == "reference" else ""


def _kernel_for(task: Task, guards: Guards, recipe: Recipe) -> tuple[_Kernel, Guards]:
    """The kernel of a task, from an earlier call or made now, known to be right for its batch."""
    batch, key = len(task.x0), _key(task, guards, recipe)
    found = _kernels.get(key)
    if isinstance(found, str):
        raise Unsupported(found)
    kernel = found if found is not None and found.fits(guards) else None
    if kernel is not None and batch in kernel.batches:
        _kernels.move_to_end(key)
        if kernel.batches[batch]:
            raise Unsupported(kernel.batches[batch])
        return kernel, guards
    try:
        if kernel is None:
            kernel, guards = _build(task, guards, recipe)
    except Unsupported as problem:
        _keep(_key(task, guards, recipe), str(problem))
        raise
    why = ""
    try:
        with guards.preserved(watched=False):
            kernel.batches[batch] = ""
            _compare(task, kernel, guards, recipe)
    except Unsupported as problem:
        why = str(problem)
        raise
    finally:
        kernel.batches[batch] = why
        _keep(_key(task, guards, recipe), kernel)
    return kernel, guards


def _keep(key: Hashable, made: _Kernel | str) -> None:
    _kernels[key] = made
    while len(_kernels) > _KERNELS_KEPT:
        _kernels.popitem(last=False)


def _key(task: Task, guards: Guards, recipe: Recipe) -> Hashable:
    batch, x0 = len(task.x0), task.x0
    return (
        guards.key,
        tuple(t.ndim > 0 and len(t) == batch for t in guards.tensors),
        batch == 1,
        tuple(x0.shape[1:]),
        x0.dtype,
        x0.device,
        backend_for("trajectory", x0.device),
        torch.get_default_dtype(),
        torch.is_autocast_enabled(x0.device.type),
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        bool(task.plan.inside),
        recipe.columns,
        recipe.memory,
        tuple((path.kind, draws) for path, draws in recipe.sources),
    )


def _build(task: Task, guards: Guards, recipe: Recipe) -> tuple[_Kernel, Guards]:
    x0, watched = task.x0, task.watched
    evaluations, before = 0, watched.evaluations

    def counted(inputs: Inputs) -> Sequence[Tensor]:
        nonlocal evaluations
        first = watched.evaluations
        after = recipe.step(inputs)
        evaluations = watched.evaluations - first
        return after

    states = (tuple(x0.shape[1:]),) * (1 + recipe.memory)
    try:
        check_size(states)
        failure = None
        try:
            noises, guards = _warm(task, guards, recipe)
        except Unsupported:
            raise
        except Exception as problem:  # tracing says more of it
            failure, noises = problem, recipe.noises()
        signature = Signature(x0.dtype, x0.device, states, noises, recipe.columns, len(x0))
        with guards.preserved() as watch:
            program = trace(counted, signature, _observe(task), seconds=_SECONDS)
        if failure is not None:
            text = str(failure).strip().partition("\n")[0]
            raise Unsupported(f"its first step fails ({type(failure).__name__}: {text})") from failure
        trajectory = compile_trajectory(program, [path.kind for path, _ in recipe.sources])
    except Unsupported:
        raise
    except Exception as problem:
        text = str(problem).strip().partition("\n")[0]
        raise Unsupported(f"it cannot be compiled, a fault of sdesolve ({type(problem).__name__}: {text})") from problem
    finally:
        watched.evaluations = before
    places = {id(t): i for i, t in enumerate(guards.tensors)}
    if not all(id(c) in places for c in program.captured):
        raise Unsupported("it uses a tensor that it makes outside torch, or that could not be found beforehand")
    where = tuple(places[id(c)] for c in program.captured)
    read = tuple((where[i], program.captured[i].detach().clone()) for i in program.read)
    return _Kernel(trajectory, where, evaluations, noises, read, watch.bindings()), guards


def _warm(task: Task, guards: Guards, recipe: Recipe) -> tuple[tuple[tuple[int, ...], ...], Guards]:
    """Does the first step in torch, so that caches fill as they do in an eager run; the noise's shapes, and new guards.

    Raises:
        Unsupported: what the functions hold changes again in a second call, or that gives another result. It is put
            back as it was.
    """
    with guards.put_back_on_error() as changed:
        noises = recipe.noises()
        inputs = _inputs(task, recipe, noises, 0, len(task.times) - 1, task.x0.detach())
        first = _evaluated(task, recipe, inputs)
        what, now = changed(), look_into(*_roots(task))
        if what or now.key != guards.key:
            guards = now
            with guards.put_back_on_error() as changed_again:
                second = _evaluated(task, recipe, inputs)
                same = all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(first, second, strict=True))
                if changed_again() or not same:
                    raise Unsupported(f"it changes Python values that it holds ({what}) each time it is called")
    return noises, guards


def _evaluated(task: Task, recipe: Recipe, inputs: Inputs) -> list[Tensor]:
    made = [*recipe.step(inputs)]
    observe = _observe(task)
    return made if observe is None else [*made, observe(inputs.states[0])]


def _inputs(task: Task, recipe: Recipe, noises: Sequence[tuple[int, ...]], k: int, end: int, x: Tensor) -> Inputs:
    """What step ``k``, taken to grid point ``end``, is called with in torch."""
    times, batch = task.times[[k, end]], len(x)
    t, dt = times.to(x), times.diff().to(x)[0]
    normals = []
    for (path, draws), shape in zip(recipe.sources, noises, strict=True):
        m = math.prod(shape)
        numbers = dataclasses.replace(path, first_step=path.first_step * (m // draws) + k * m)
        units = torch.arange(m + 1, dtype=torch.float64, device="cpu")
        with use_backend("reference"):  # a process that finds its kernel on disk has not loaded Numba
            z = numbers.increments(units, (batch, 1), dtype=x.dtype, device=x.device)
        normals.append(z.reshape(m, batch).T.reshape(batch, *shape))
    row = x.new_zeros(0) if recipe.numbers is None else recipe.numbers[k].to(x)
    states = (x, *(torch.zeros_like(x) for _ in range(recipe.memory)))
    return Inputs(states, tuple(normals), t[0], t[1], dt, times.diff()[0].abs().sqrt().to(x), row)


def _compare(task: Task, kernel: _Kernel, guards: Guards, recipe: Recipe) -> None:
    """Compares a kernel with the step in torch on all rows of the batch.

    At the first, middle and last grid times when it is new, and at the first for other sizes of the batch.
    """
    last, before, x0 = len(task.times) - 1, task.watched.evaluations, task.x0.detach()
    observe = _observe(task)
    try:
        for k in sorted({0, (last - 1) // 2, last - 1} if len(kernel.batches) == 1 else {0}):
            end = last if recipe.numbers is None else k + 1

            def eager(x: Tensor, k: int = k, end: int = end) -> Tensor:
                return recipe.step(_inputs(task, recipe, kernel.noises, k, end, x))[0]

            def fused(x: Tensor, k: int = k, end: int = end) -> Tensor:
                rows = None if recipe.numbers is None else recipe.numbers[k : k + 1]
                places = _places(task, kernel, recipe, k)
                captured = tuple(guards.tensors[i] for i in kernel.where)
                return kernel.trajectory.run(
                    Launch(x.contiguous(), task.times[[k, end]], rows, places, (), False, captured)
                ).x1

            if k == 0:
                inputs = _inputs(task, recipe, kernel.noises, k, end, x0)
                calls = recorded(recipe.step, observe, inputs)
                same_operations(kernel.trajectory.plan.program, calls, len(x0))
            agree(eager, fused, x0)
        if observe is not None:
            shape = kernel.trajectory.plan.program.observed_shape or ()

            def seen(x: Tensor) -> Tensor:
                captured = tuple(guards.tensors[i] for i in kernel.where)
                rows = None if recipe.numbers is None else recipe.numbers[:1]
                launch = Launch(
                    x.contiguous(), task.times[:2], rows, _places(task, kernel, recipe, 0), (0,), False, captured
                )
                states = kernel.trajectory.run(launch).states
                assert states is not None
                return states.reshape(len(x), *shape)

            agree(observe, seen, x0)
    except Unsupported:
        raise
    except Exception as problem:
        text = str(problem).strip().partition("\n")[0]
        raise Unsupported(f"comparing it with torch fails ({type(problem).__name__}: {text})") from problem
    finally:
        task.watched.evaluations = before


def _places(task: Task, kernel: _Kernel, recipe: Recipe, step: int = 0) -> list[tuple[int, int, int, int]]:
    """Where the numbers of each source begin, ``step`` steps after the first."""
    steps = len(task.times) - 1
    found = []
    for (path, draws), m in zip(recipe.sources, map(math.prod, kernel.noises), strict=True):
        offset = path.first_step * (m // draws)
        seed, stream, first_path, offset = _place(path, offset, len(task.x0), m * steps)
        found.append((seed, stream, first_path, offset + step * m))
    return found


def _observe(task: Task) -> Callable[[Tensor], Tensor] | None:
    observable = None if task.plan.inside else task.plan.observable
    return None if observable is None else lambda x: observed(observable, x)


def _run(task: Task, kernel: _Kernel, guards: Guards, recipe: Recipe) -> Fused:
    plan, rows = task.plan, recipe.numbers
    places = _places(task, kernel, recipe)
    captured = tuple(guards.tensors[i] for i in kernel.where)
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
