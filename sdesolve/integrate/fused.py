"""The executor of whole integrations as one kernel: the lowered step, traced with the user's functions inside it.

Here is decided whether an integration can run this way, and what its kernel is bound to; `lowering` says what of a
solver goes into it, and `sdesolve_kernels.trajectory` makes and runs it.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from typing import final

import torch
from sdesolve_kernels import Stream
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
from tqdm import tqdm

from sdesolve.brownian import AbstractNoise, BrownianPath, GivenNormals, Increment
from sdesolve.integrate.checks import all_finite
from sdesolve.integrate.executors import CannotExecute, Eager
from sdesolve.integrate.lowering import Lowered, NoiseSource, StepContext
from sdesolve.integrate.non_finite import refuse_end
from sdesolve.integrate.problem import Problem
from sdesolve.integrate.save_at import SavePlan, observed
from sdesolve.integrate.solution import Saved
from sdesolve.solvers.base import Span
from sdesolve.solvers.predictor_corrector import PredictorCorrector
from sdesolve.solvers.tabulated import Row, torch_row

_KERNELS_KEPT = 128
# Decided by the equation alone, so that parts of a batch run as the whole does. One thread, float32, d = 2, against
# eager torch: `nn.MLP` of depth 2 and width 16, 32, 64 is 2.9, 2.0, 1.4 times as fast fused on 1024 paths and 3.4, 2.9,
# 2.3 times on 65,536; two plain hidden layers of 16, 32, 64, 128 are 2.5, 2.0, 1.8, 1.4 and 2.4, 1.8, 1.7, 1.6 times.
# Compiling takes 1 to 4 s, once for a shape of network: weights are arguments, and the kernel stays on disk.
_MOST_WEIGHTS = 1 << 16


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
    batches: dict[int, Unsupported | None] = dataclasses.field(default_factory=dict)


_kernels: OrderedDict[Hashable, _Kernel | Unsupported] = OrderedDict()
_lock = threading.Lock()


@final
class Fused:
    """The whole trajectory as one generated kernel.

    Args:
        wanted: nothing else will do, so a kernel is walked in plain torch where no compiler is installed.
    """

    def __init__(self, wanted: bool) -> None:
        self._wanted = wanted

    def run(self, problem: Problem, lowered: Lowered) -> Saved:
        _check_fusible(problem, lowered, self._wanted)
        try:
            held = contents(problem.solver, problem.equation, problem.save.observable, most_weights=_MOST_WEIGHTS)
            _check_untransformed(problem.x0, *held.tensors)
            with settled():
                kernel = _kernel_for(problem, held, lowered)
                _check_untransformed(*kernel.captured)
                _check_batch(problem, kernel, lowered)
                with tqdm(total=problem.steps, disable=not problem.progress, unit="step", leave=False) as bar:
                    saved = _run(problem, kernel, held, lowered)
                    bar.update(problem.steps)
        except Unsupported as problem_met:
            raise CannotExecute(str(problem_met)) from None
        if problem.check_finite and not all_finite(saved.x1):
            Eager().begin(problem, lowered).report_divergence()
            refuse_end(problem, saved.x1)  # rounding took the kernel alone over the edge
        if kernel.where is None:
            anew = held.opaque or "a tensor that is made as they run"
            reason = f"{saved.reason}, traced in each call, as the functions hold {anew}"
            return dataclasses.replace(saved, reason=reason)
        return saved


@final
class TracedContext(StepContext):
    """A step whose every input is a symbol."""

    def __init__(self, lowered: Lowered, inputs: Inputs) -> None:
        self._lowered, self._inputs = lowered, inputs
        self.span = Span(inputs.t0, inputs.t1, inputs.dt)

    def number(self, column: int) -> Tensor:
        return self._inputs.row[column]

    def skips(self, part: int) -> bool:
        return False  # what is not needed is multiplied by 0

    def row(self, columns: slice, draw: int | None) -> Row:
        return torch_row(self._inputs.row[columns], None if draw is None else self._inputs.noises[0][:, draw])

    def increment(self) -> Increment | None:
        if not self._lowered.driving:
            return None
        scale = self._inputs.scale
        scales = {"W": scale, "H": scale * math.sqrt(1.0 / 12.0)}
        pairs = zip(self._lowered.driving, self._inputs.noises, strict=False)
        return Increment(**{str(source.of): z * scales[str(source.of)] for source, z in pairs})

    def corrections(self) -> tuple[AbstractNoise, int]:
        return GivenNormals(self._inputs.noises[-1].transpose(0, 1)), 0


def _traced_step(lowered: Lowered) -> Callable[[Inputs], Sequence[Tensor]]:
    return lambda inputs: lowered.step(TracedContext(lowered, inputs), inputs.states)


_TRANSFORMED = "it takes part in a torch.func transform or in forward-mode differentiation"


def _check_untransformed(*tensors: Tensor) -> None:
    """Refuses derivatives, of which a fused kernel has none."""
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        raise CannotExecute(
            "gradients are wanted, of the state or of a tensor that the functions hold, and a fused kernel has none"
        )
    if has_tangent(*tensors):
        raise CannotExecute(_TRANSFORMED)


def _check_batch(problem: Problem, kernel: _Kernel, lowered: Lowered) -> None:
    """Refuses a kernel that is not right for a batch of this size."""
    kind = batch_kind(len(problem.x0), problem.x0[0].numel())
    if kind not in kernel.batches:
        before = problem.watched.evaluations
        try:
            check_batch(kernel.trajectory.plan.program, _traced_step(lowered), _observe(problem), len(problem.x0))
            kernel.batches[kind] = None
        except Unsupported as met:
            kernel.batches[kind] = met
        finally:
            problem.watched.evaluations = before
    refusal = kernel.batches[kind]
    if refusal is not None:
        raise refusal


def _check_fusible(problem: Problem, lowered: Lowered, wanted: bool) -> None:
    """Refuses what cannot be fused whatever the functions are."""
    solver, x0 = problem.solver, problem.x0
    if solver.controller is not None:
        raise CannotExecute(f"{type(solver).__name__} chooses its own steps and runs eagerly")
    if isinstance(solver, PredictorCorrector) and not solver.corrector.affine:
        raise CannotExecute(
            "the corrector's step size depends on the state: norms='level' and a fixed step_size= do not"
        )
    if problem.times.ndim == 2:
        raise CannotExecute("there is a time grid per sample")
    if len(x0) == 0 or x0.numel() == 0:
        raise CannotExecute("the batch is empty")
    if type(x0) not in (Tensor, torch.nn.Parameter):
        raise CannotExecute(f"the state is a {type(x0).__name__}")
    if torch._C._functorch.peek_interpreter_stack() is not None:
        raise CannotExecute(_TRANSFORMED)
    if any(not isinstance(s.noise, BrownianPath) or s.noise.substeps > 1 for s in lowered.sources):
        raise CannotExecute("increments are coarse, or come from a noise of another class than BrownianPath")
    if not (backend_for("trajectory", x0.device).compiles or wanted or requested_backend() != "auto"):
        raise CannotExecute(f"no compiler of kernels for {x0.device.type} is installed")


def _path(source: NoiseSource) -> BrownianPath:
    """Where a source's unit numbers stand."""
    path = source.noise
    assert isinstance(path, BrownianPath)  # by _check_fusible
    return dataclasses.replace(path, stream=Stream.LEVY) if source.of == "H" else path


def _kernel_for(problem: Problem, held: Contents, lowered: Lowered) -> _Kernel:
    batch, x0 = len(problem.x0), problem.x0
    key = (
        held.key,
        tuple(t.ndim > 0 and len(t) == batch for t in held.tensors),
        batch == 1,
        tuple(x0.shape[1:]),
        x0.dtype,
        x0.device,
        backend_for("trajectory", x0.device).name,
        torch.get_default_dtype(),
        torch.is_autocast_enabled(x0.device.type),
        bool(problem.save.inside),
        lowered.columns,
        lowered.memory,
        tuple((_path(s).kind, s.draws, s.of) for s in lowered.sources),
    )
    with _lock:
        found = _kernels.get(key) if held.complete else None
        if found is not None:
            _kernels.move_to_end(key)
    if isinstance(found, Unsupported):
        raise found
    if found is not None and all(torch.equal(held.tensors[i], value) for i, value in found.read):
        return found
    made: _Kernel | Unsupported
    try:
        made = _build(problem, held, lowered)
        # Making a trace may fill caches that the functions keep; if it changes them each time, it is no function.
        after = contents(problem.solver, problem.equation, problem.save.observable)
        if after.key != held.key:
            made = _build(problem, after, lowered)
            if contents(problem.solver, problem.equation, problem.save.observable).key != after.key:
                raise CannotExecute(
                    "a function changes Python values that it holds (a counter, a cache) each time it is called"
                )
            return made
    except Unsupported as met:
        made = met
    if held.complete and (isinstance(made, Unsupported) or made.where is not None):
        with _lock:
            _kernels[key] = made
            while len(_kernels) > _KERNELS_KEPT:
                _kernels.popitem(last=False)
    if isinstance(made, Unsupported):
        raise made
    return made


def _build(problem: Problem, held: Contents, lowered: Lowered) -> _Kernel:
    x0 = problem.x0
    evaluations, before = 0, problem.watched.evaluations
    step = _traced_step(lowered)

    def counted(inputs: Inputs) -> Sequence[Tensor]:
        nonlocal evaluations
        first = problem.watched.evaluations
        after = step(inputs)
        evaluations = problem.watched.evaluations - first
        return after

    try:
        noises = tuple(source.shape() for source in lowered.sources)
        states = (tuple(x0.shape[1:]),) * (1 + lowered.memory)
        program = trace(
            counted, Signature(x0.dtype, x0.device, states, noises, lowered.columns, len(x0)), _observe(problem)
        )
    finally:
        problem.watched.evaluations = before
    trajectory = compile_trajectory(program, [_path(source).kind for source in lowered.sources])
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


def _observe(problem: Problem) -> Callable[[Tensor], Tensor] | None:
    observable = None if problem.save.inside else problem.save.observable
    return None if observable is None else lambda x: observed(observable, x)


_REASON = "the whole trajectory is one generated kernel"


def _run(problem: Problem, kernel: _Kernel, held: Contents, lowered: Lowered) -> Saved:
    save, x0, times = problem.save, problem.x0, problem.times
    offsets = [
        _offset(_path(source), m // source.draws, len(x0), m * problem.steps)
        for source, m in zip(lowered.sources, kernel.normals, strict=True)
    ]
    captured = kernel.captured if kernel.where is None else tuple(held.tensors[i] for i in kernel.where)
    trajectory, source = kernel.trajectory, kernel.trajectory.source
    if save.inside:
        return _between(problem, kernel, Launch(x0, times, lowered.table, offsets, _around(save), False, captured))
    evaluations = kernel.evaluations * problem.steps
    saves = sorted(k for k, slots in save.on_grid.items() if slots)
    # The end alone needs no saving if it is wanted as it is.
    plain = saves == [problem.steps] and save.observable is None and not save.moments
    saved = trajectory.run(Launch(x0, times, lowered.table, offsets, () if plain else saves, save.moments, captured))
    # Two times at one grid point are two entries of what is returned.
    entry = {slot: i for i, k in enumerate(saves) for slot in save.on_grid[k]}
    order = [entry[slot] for slot in range(len(save.ts))]
    shape = trajectory.plan.program.observed_shape
    shape = tuple(x0.shape[1:]) if shape is None else shape
    if saved.moments is not None:
        mean, variance = (m.reshape(len(saves), *shape) for m in (saved.moments.mean, saved.moments.variance))
        mean, variance = (m if order == list(range(len(m))) else m[order] for m in (mean, variance))
        return Saved(saved.x1, mean, variance, problem.steps, evaluations, "fused", _REASON, source)
    xs = saved.x1[None] if saved.states is None else saved.states.reshape(len(saves), len(x0), *shape)
    xs = xs if order == list(range(len(xs))) else xs[order]
    return Saved(saved.x1, xs, None, problem.steps, evaluations, "fused", _REASON, source)


def _offset(path: BrownianPath, numbers: int, batch: int, count: int) -> tuple[int, int, int, int]:
    """Where ``count`` numbers of each of ``batch`` paths begin, ``numbers`` of them for each of the path's steps.

    Raises:
        ValueError: they would wrap, and repeat others.
    """
    offset = path.first_step * numbers
    if path.first_path + batch > 1 << 64:
        raise ValueError(f"first_path + batch must be at most 2^64, got {path.first_path} + {batch}")
    if offset + count > 1 << 58:
        raise ValueError(
            f"a path has 2^58 numbers, and these steps end at number {offset + count}; begin at a smaller first_step, "
            "with another seed"
        )
    return path.seed, int(path.stream), path.first_path, offset


def _around(save: SavePlan) -> list[int]:
    """Grid points that a plan needs, those on both sides of a time between two among them."""
    return sorted({k for k, slots in save.on_grid.items() if slots} | {k + i for k in save.inside for i in (0, 1)})


def _between(problem: Problem, kernel: _Kernel, launch: Launch) -> Saved:
    """A run whose plan has times between grid points: states there follow from those on both sides."""
    saved = kernel.trajectory.run(launch)
    assert saved.states is not None
    save, watched = problem.save, problem.watched
    before = watched.evaluations
    states = dict(zip(launch.saves, saved.states.reshape(-1, *problem.x0.shape), strict=True))
    for k, x in states.items():
        save.at_grid_point(k, x)
        if k in save.inside:
            (span,) = problem.spans(k, 1)
            save.within_step(k, functools.partial(problem.between, k, x=x, x_next=states[k + 1], span=span))
    variances = save.variances() if save.moments else None
    evaluations = kernel.evaluations * problem.steps + watched.evaluations - before
    source = kernel.trajectory.source
    return Saved(saved.x1, save.states(), variances, problem.steps, evaluations, "fused", _REASON, source)
