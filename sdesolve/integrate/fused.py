"""The executor of whole integrations as one kernel: the lowered step, traced with the user's functions inside it.

Here is decided whether an integration can run this way, and what its kernel is bound to; `lowering` says what of a
solver goes into it, and `sdesolve_kernels.trajectory` makes and runs it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import sys
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import final

import torch
from sdesolve_kernels.dispatch import backend_for, requested_backend, use_backend
from sdesolve_kernels.trajectory import (
    AbstractTrajectory,
    Adjoint,
    Bindings,
    Guards,
    Inputs,
    Launch,
    Pushforward,
    Signature,
    TooCostly,
    Unsupported,
    agree,
    check_size,
    coarsest,
    compile_adaptive,
    compile_trajectory,
    look_into,
    recorded,
    reverse,
    same_operations,
    trace,
    unchanged,
)
from sdesolve_kernels.trajectory.expressions import topological
from sdesolve_kernels.trajectory.launch import Saved as Run
from sdesolve_kernels.trajectory.program import Program
from sdesolve_kernels.trajectory.snapshots import random_states
from sdesolve_kernels.transforms import directions, is_transformed
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from sdesolve._internal.progress import progress_bar
from sdesolve.brownian import AbstractNoise, BrownianPath, BrownianRows, GivenNormals, Increment
from sdesolve.integrate import refusals
from sdesolve.integrate.checks import all_finite
from sdesolve.integrate.executors import CannotExecute, Eager
from sdesolve.integrate.fused_gradient import Again, check_without_hooks, compare_gradients, differentiated
from sdesolve.integrate.fused_tangents import Tangents, compare_tangents
from sdesolve.integrate.lowering import Lowered, NoiseSource, StepContext, apart, assembled, lower, together
from sdesolve.integrate.non_finite import refuse_overflow
from sdesolve.integrate.path_measure import between
from sdesolve.integrate.plans import Plan
from sdesolve.integrate.problem import Problem
from sdesolve.integrate.save_at import SavePlan
from sdesolve.integrate.solution import Saved
from sdesolve.integrate.stopping import Stopping
from sdesolve.integrate.structure import check_noise, check_noise_ahead, has_structure, is_proved
from sdesolve.solvers.base import Span
from sdesolve.solvers.predictor_corrector import PredictorCorrector
from sdesolve.solvers.reactions import Gillespie
from sdesolve.solvers.tabulated import Row, torch_row

_KERNELS_KEPT, _SPANS_KEPT, _ROWS_AT_ONCE = 384, 1024, 1 << 16
# Sums over fine steps are written out: with 128 of them, increments and areas of one channel take 5 s to compile.
_MOST_SUMMED, _MOST_SUMMED_UNASKED = 512, 4
# Decided by the equation alone, so that parts of a batch run as the whole does. One thread, float32, d = 2, against
# eager torch: `nn.MLP` of depth 2 and width 16, 32, 64 is 2.9, 2.0, 1.4 times as fast fused on 1024 paths and 3.4, 2.9,
# 2.3 times on 65,536; two plain hidden layers of 16, 32, 64, 128 are 2.5, 2.0, 1.8, 1.4 and 2.4, 1.8, 1.7, 1.6 times.
# Compiling takes 1 to 4 s, once for a shape of network: weights are arguments, and the kernel stays on disk.
_MOST_WEIGHTS = 1 << 16
# Of matrices with a gradient, unless asked for. Likewise, fused gradients of two hidden layers of 32, 64, 128, 200, on
# 512 paths: 1.7, 1.2, 0.7, 0.5 times as fast as eager ones.
_MOST_GRADED = 1 << 13


# What making a kernel may cost before anybody knows that it pays, unless it was asked for: seconds for a trace, and for
# compiling, by an estimate.
_SECONDS, _COMPILING = 5.0, 10.0


@final
@dataclasses.dataclass(frozen=True)
class Kernel:
    """A compiled step, and where its arguments come from.

    Attributes:
        trajectory: the kernel.
        where: for each tensor that it reads, its place among the tensors that the functions hold.
        weights: in matrices that it keeps whole and has gradients of.
        evaluations: of the drift, a step.
        noises: shapes of a step's numbers from each source of noise.
        read: tensors whose values were made into the kernel: places as in ``where``, and the values.
        bindings: what names in libraries stood for (`unchanged`).
        proved: whether the trace shows that its noise is what the solver takes it for.
        adjoint: with its reverse, if gradients are wanted.
        spans: ends of grids for which that was looked at, where it does not.
        batches: sizes of batch for which it was compared with torch, and why it is not right for one.
    """

    trajectory: AbstractTrajectory
    where: tuple[int, ...]
    weights: int
    evaluations: int
    noises: tuple[tuple[int, ...], ...]
    read: tuple[tuple[int, Tensor], ...]
    bindings: Bindings
    proved: bool
    adjoint: Adjoint | None
    spans: set[tuple[float, float]] = dataclasses.field(default_factory=set)
    batches: dict[int, Unsupported | None] = dataclasses.field(default_factory=dict)

    def told(self, launch: Launch) -> tuple[str, str]:
        """What `Saved` says of a run, and its source."""
        source, adjoint = self.trajectory.source, self.adjoint  # which may depend on the launch
        if adjoint is None:
            return _PUSHED if self.pushed else _REASON, source
        apart = f"{_GRADED}{_APART if launch.moments else ''}"
        return _AT_ONCE if adjoint.at_once(launch) else apart, f"{source}\n\n{adjoint.source}"

    @property
    def pushed(self) -> bool:
        """Whether it carries tangents."""
        return isinstance(self.trajectory, Pushforward)

    def fits(self, guards: Guards) -> bool:
        """Whether nothing beyond the key of the guards has changed."""
        return unchanged(self.bindings) and all(torch.equal(guards.tensors[i], value) for i, value in self.read)


# By what they depend on; among them plans of calls, and the kinds of calls that have one.
_kernels: OrderedDict[Hashable, Kernel | Plan | Unsupported | None] = OrderedDict()
_lock = threading.Lock()


def is_planned(call: Hashable) -> bool:
    """Whether there is a plan for any call of a kind (`Call.key`)."""
    return call in _kernels


def planned(call: Hashable, *roots: object) -> tuple[Plan, Guards] | None:
    """The plan of a call whose functions hold what they did then, and what that is."""
    try:
        guards = look_into(*roots, most_weights=_MOST_WEIGHTS)
        plan = _found((call, guards.key))
        if isinstance(plan, Plan) and plan.kernel.fits(guards):
            return plan, guards
    except Exception:  # which the call in full tells of
        pass
    return None


def _found(key: Hashable) -> Kernel | Plan | Unsupported | None:
    with _lock:
        found = _kernels.get(key)
        if found is not None:
            _kernels.move_to_end(key)
    return found


def _plan(problem: Problem, kernel: Kernel, guards: Guards, lowered: Lowered) -> None:
    """Has the next call of this kind know what this one became."""
    call = problem.call
    plan = None if call is None else Plan.of(problem, lowered, kernel)
    if call is not None and plan is not None:
        _keep(call.key, None)
        _keep((call.key, guards.key), plan)


@final
class Fused:
    """The whole trajectory as one generated kernel.

    Args:
        wanted: nothing else will do, so a kernel is walked in plain torch where no compiler is installed.
    """

    def __init__(self, wanted: bool) -> None:
        self._wanted = wanted

    def run(self, problem: Problem, lowered: Lowered) -> Saved:
        if isinstance(problem.solver, Gillespie):
            from sdesolve.integrate.fused_reactions import run_reactions  # likewise

            return run_reactions(problem, self._wanted)
        if lowered.eager:
            raise CannotExecute(lowered.eager)
        if problem.solver.controller is not None:
            from sdesolve.integrate.fused_adaptive import run_adaptively  # which is made of what follows

            return run_adaptively(problem, lowered, self._wanted)
        problem, lowered = _numbered(problem, lowered)
        refusal = "" if self._wanted else refusals.kept(problem)
        if refusal:
            raise CannotExecute(refusal)
        try:
            kernel, guards = prepared(problem, lowered, self._wanted)
        except CannotExecute as met:
            refusals.keep(problem, str(met))
            raise
        stopping: Stopping | None = None
        if _leaves(problem, kernel.adjoint is not None or kernel.pushed):
            stopping = Stopping(kernel.trajectory, sum(map(math.prod, lowered.shapes(problem.x0)[1:-3])))
            kernel = dataclasses.replace(kernel, trajectory=stopping)
        try:
            launch = _launch(problem, kernel, guards, lowered)
            saved = _run(problem, kernel, lowered, launch, _start(problem, kernel, guards, lowered))
        except Unsupported as met:
            raise CannotExecute(str(met)) from None
        if not kernel.proved:
            check_noise(problem, saved.x1, problem.times[-1].to(saved.x1))
        if problem.check_finite and not all_finite(saved.x1):
            _report_divergence(problem, kernel.trajectory, lowered, launch)
        if stopping is None:
            _plan(problem, kernel, guards, lowered)
        return saved if stopping is None else dataclasses.replace(saved, work=stopping.work)


def _leaves(problem: Problem, graded: bool) -> bool:
    """Whether paths that stop leave the batch; where gradients are wanted, or tangents, all stay."""
    return problem.following is not None and problem.following.stops and not graded


def prepared(problem: Problem, lowered: Lowered, wanted: bool) -> tuple[Kernel, Guards]:
    """A kernel for an integration, known or made now, and what its functions hold.

    Raises:
        CannotExecute: there is none.
    """
    _check_fusible(problem, lowered, wanted)
    with _uncounted(problem):
        with _explained():
            guards = look_into(*_roots(problem), most_weights=_MOST_WEIGHTS)
            tangents = Tangents.of(problem, lowered, guards)
        if tangents is None:
            return _prepared(problem, lowered, guards, wanted, None)
        with _explained():
            plain, guards = tangents.plain(problem, lowered), tangents.valued(guards)
            given = (problem, lowered), tangents
        with tangents.values_alone():
            kernel, _ = _prepared(*plain, guards, wanted, given)
    return kernel, tangents.guards


# An integration as it is, and what of it has tangents, beside one of plain tensors.
Given = tuple[tuple[Problem, Lowered], Tangents]


def _prepared(
    problem: Problem, lowered: Lowered, guards: Guards, wanted: bool, given: Given | None
) -> tuple[Kernel, Guards]:
    """`prepared`, for an integration of plain tensors."""
    with _explained():
        kernel = _known(problem, guards, lowered, wanted, given)
    if kernel is None or len(problem.x0) not in kernel.batches:
        noises = tuple(source.numbers() for source in lowered.sources)  # what this refuses, every executor does
        check_noise_ahead(problem)
        with _explained(), _disable_current_modes():  # what watches this call is not to see it
            kernel, guards = _tried(problem, guards, lowered, noises, kernel, wanted, given)
    elif not kernel.proved and _span(problem) not in kernel.spans:
        check_noise_ahead(problem)
    if not kernel.proved:
        if len(kernel.spans) == _SPANS_KEPT:
            kernel.spans.clear()
        kernel.spans.add(_span(problem))
    return kernel, guards


def _span(problem: Problem) -> tuple[float, float]:
    return float(problem.times[0]), float(problem.times[-1])


def _roots(problem: Problem) -> tuple[object, ...]:
    return problem.solver, problem.equation, problem.save.observable, problem.prior, *problem.roots


@contextlib.contextmanager
def _explained() -> Iterator[None]:
    """Whatever stands in the way of a kernel is a reason; objects of the user may answer anything with an exception."""
    try:
        yield
    except (Unsupported, CannotExecute) as met:
        raise CannotExecute(str(met)) from None
    except Exception as met:
        raise CannotExecute(f"what the functions hold cannot be looked into ({_described(met)})") from met


@contextlib.contextmanager
def _uncounted(problem: Problem) -> Iterator[None]:
    """Evaluations of the functions inside the ``with`` block are no part of the integration."""
    before = problem.watched.evaluations
    try:
        yield
    finally:
        problem.watched.evaluations = before


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
        z = None if draw is None else self._lowered.sources[0].coarse(self._inputs.noises[0])[:, draw]
        return torch_row(self._inputs.row[columns], z)

    def increment(self) -> Increment | None:
        if not self._lowered.driving:
            return None
        driving = self._lowered.driving
        return assembled(driving, self._inputs.noises[: len(driving)], self._inputs.scale)

    def corrections(self) -> tuple[AbstractNoise, int]:
        i = len(self._lowered.driving)
        return GivenNormals(self._lowered.sources[i].coarse(self._inputs.noises[i]).transpose(0, 1)), 0

    def within(self) -> Tensor:
        return self._inputs.noises[-1]


def _traced_step(lowered: Lowered) -> Callable[[Inputs], Sequence[Tensor]]:
    return lambda inputs: lowered.step(TracedContext(lowered, inputs), inputs.states)


def _is_graded(problem: Problem, guards: Guards, lowered: Lowered) -> bool:
    """Whether gradients may be wanted."""
    tensors = (
        problem.x0,
        *problem.memory,
        *lowered.extra,
        *guards.tensors,
        *(() if lowered.table is None else (lowered.table,)),
    )
    return torch.is_grad_enabled() and any(t.requires_grad for t in tensors)


def _check_fusible(problem: Problem, lowered: Lowered, wanted: bool) -> None:
    """Refuses what cannot be fused whatever the functions are."""
    solver, x0 = problem.solver, problem.x0
    if problem.hook is not None:
        raise CannotExecute("a callback is called after every step")
    if isinstance(solver, PredictorCorrector) and not solver.corrector.affine:
        raise CannotExecute(
            "the corrector's step size depends on the state: norms='level' and a fixed step_size= do not"
        )
    if problem.times.ndim == 2:
        raise CannotExecute("there is a time grid per sample")
    if problem.padded:
        raise CannotExecute("the grid repeats its last time")
    if len(x0) == 0 or x0.numel() == 0:
        raise CannotExecute("the batch is empty")
    if type(x0) not in (Tensor, torch.nn.Parameter):
        raise CannotExecute(f"the state is a {type(x0).__name__}")
    if is_transformed() and directions() is None:
        raise CannotExecute(
            "it takes part in a torch.func transform other than one jvp or jacfwd, which kernels are blind to"
        )
    others = [e.dtype for e in lowered.extra if e.dtype != x0.dtype]
    if others:
        what = "times" if problem.following is not None and problem.time_dtype in others else "a carry"
        raise CannotExecute(f"{what} of {others[0]} beside a state of {x0.dtype}, and a kernel carries one dtype")
    for source in lowered.sources:
        path = source.noise
        if not isinstance(path, BrownianPath):
            raise CannotExecute("increments come from a noise of another class than BrownianPath")
        if path.substeps > (_MOST_SUMMED if wanted else _MOST_SUMMED_UNASKED):
            raise CannotExecute(f"{path.substeps} fine increments to a step are too many to be written out in a kernel")
        if path.kind == "sobol":
            raise CannotExecute("Sobol points are increments of all steps together, which are made in torch")
        if path.swapped and path.substeps % 2 and (path.substeps > 1 or source.draws > 1):
            raise CannotExecute("pairs of increments that change places lie in two steps")
        if path.swapped and path.substeps == 1 and source.path.kind == "two-point":
            raise CannotExecute("two-point numbers of two steps change places")
    if len({s.noise.swapped and s.substeps == 1 for s in lowered.sources if isinstance(s.noise, BrownianPath)}) > 1:
        raise CannotExecute("increments of two steps change places, and what is drawn within steps does not")
    if not (backend_for("trajectory", x0.device).compiles or wanted or requested_backend() != "auto"):
        kind = x0.device.type
        mend = f": pip install 'sdesolve[{'cpu' if kind == 'cpu' else 'gpu'}]'" if kind in ("cpu", "cuda") else ""
        raise CannotExecute(f"no compiler of kernels for {kind} is installed{mend}")


def _swaps(lowered: Lowered) -> bool:
    """Whether two steps take each other's numbers, which lies in the sequence and not in the step."""
    return any(isinstance(s.noise, BrownianPath) and s.noise.swapped and s.substeps == 1 for s in lowered.sources)


def _numbered(problem: Problem, lowered: Lowered) -> tuple[Problem, Lowered]:
    """The integration with its paths numbered as kernels take them: in order, or by a list."""
    noise = problem.noise
    if isinstance(noise, BrownianRows) and noise.listed is not None:
        path, numbers = noise.listed
        problem = dataclasses.replace(problem, noise=path)
        return problem, dataclasses.replace(lower(problem), rows=numbers.to(problem.x0.device))
    driving = lowered.sources[0].noise if lowered.sources else None
    if isinstance(driving, BrownianPath) and driving.repeat is not None:
        rows = (driving.first_row + torch.arange(len(problem.x0), device=problem.x0.device)) % driving.repeat
        return problem, dataclasses.replace(lowered, rows=rows)
    return problem, lowered


def _known(problem: Problem, guards: Guards, lowered: Lowered, wanted: bool, given: Given | None) -> Kernel | None:
    """The kernel of an integration from an earlier call, if there is one.

    Raises:
        Unsupported: there can be none, or it is not right for a batch of this size.
    """
    found = _found(_key(problem, guards, lowered, given))
    if isinstance(found, Unsupported):
        if wanted and isinstance(found, TooCostly):
            return None
        raise found
    if not isinstance(found, Kernel) or not found.fits(guards):
        return None
    refusal = found.batches.get(len(problem.x0))
    if refusal is not None:
        raise refusal
    if not wanted:
        _check_weights(found.weights)
    return found


def _check_weights(weights: int) -> None:
    if weights > _MOST_GRADED:
        raise TooCostly(f"gradients of {weights} weights, more than {_MOST_GRADED}, take less time in torch")


def _tried(
    problem: Problem,
    guards: Guards,
    lowered: Lowered,
    noises: tuple[tuple[int, ...], ...],
    kernel: Kernel | None,
    wanted: bool,
    given: Given | None,
) -> tuple[Kernel, Guards]:
    """A kernel, made now if there is none, that was compared with torch for the batch of this integration."""
    batch = len(problem.x0)
    try:
        if kernel is None:
            kernel, guards = _build(problem, guards, lowered, noises, wanted, given)
    except Unsupported as met:
        _keep(_key(problem, guards, lowered, given), met)
        raise
    try:
        if backend_for("trajectory", problem.x0.device).compared:
            with guards.preserved(watched=False):
                _compare(problem, kernel, guards, lowered, given)
        kernel.batches[batch] = None
    except Unsupported as met:
        kernel.batches[batch] = met
        raise
    finally:
        if batch in kernel.batches:
            _keep(_key(problem, guards, lowered, given), kernel)
    return kernel, guards


def _keep(key: Hashable, made: Kernel | Plan | Unsupported | None) -> None:
    with _lock:
        _kernels[key] = made
        while len(_kernels) > _KERNELS_KEPT:
            _kernels.popitem(last=False)


def _key(problem: Problem, guards: Guards, lowered: Lowered, given: Given | None) -> Hashable:
    batch, x0 = len(problem.x0), problem.x0
    return (
        guards.key,
        given and given[1].key(guards, lowered),
        tuple(t.shape[:1] == (batch,) for t in guards.tensors),
        batch == 1,
        tuple(x0.shape[1:]),
        x0.dtype,
        problem.time_dtype,
        x0.device,
        backend_for("trajectory", x0.device).name,
        torch.get_default_dtype(),
        torch.is_autocast_enabled(x0.device.type),
        torch.is_grad_enabled(),
        _is_graded(problem, guards, lowered),
        lowered.table is not None and lowered.table.requires_grad,
        torch.is_inference_mode_enabled(),
        bool(problem.save.inside),
        lowered.columns,
        lowered.memory,
        tuple(lowered.shapes(x0)),
        lowered.rows is not None,
        problem.following and problem.following.key,
        _saves_all(problem),
        lowered.denoised,
        lowered.rule,
        tuple(_made_of(source) for source in lowered.sources),
    )


def _made_of(source: NoiseSource) -> Hashable:
    """What of a source of noise goes into a kernel."""
    path = source.noise
    assert isinstance(path, BrownianPath)  # by _check_fusible
    return source.path.kind, source.draws, source.of, path.substeps, path.mirrored, path.swapped


def _build(
    problem: Problem,
    guards: Guards,
    lowered: Lowered,
    noises: tuple[tuple[int, ...], ...],
    wanted: bool,
    given: Given | None,
) -> tuple[Kernel, Guards]:
    x0, watched = problem.x0, problem.watched
    evaluations = 0
    step = _traced_step(lowered)

    def counted(inputs: Inputs) -> Sequence[Tensor]:
        nonlocal evaluations
        first = watched.evaluations
        after = step(inputs)
        evaluations = watched.evaluations - first
        return after

    states = tuple(lowered.shapes(x0))
    try:
        check_size(states)
        failure = None
        try:
            guards = _warm(problem, guards, lowered, noises, given)
        except Unsupported:
            raise
        except Exception as met:  # tracing says more of it
            failure = met
        graded = _is_graded(problem, guards, lowered)
        clock, swapped = problem.time_dtype, _swaps(lowered)
        pushed = given is not None
        listed = lowered.rows is not None or _leaves(problem, graded or pushed)
        shapes = states, noises, lowered.columns
        signature = Signature(x0.dtype, x0.device, *shapes, len(x0), clock, graded, swapped, listed, pushed)
        with guards.preserved() as watch:
            program = trace(counted, signature, _observe(problem), seconds=_SECONDS)
            proved = not has_structure(problem) or is_proved(problem)
        if failure is not None:
            raise Unsupported(f"its first step fails ({_described(failure)})") from failure
        kinds = [source.path.kind for source in lowered.sources]
        weights = _weights(program) if graded else 0
        if not wanted:
            _check_weights(weights)
        seconds = math.inf if wanted else _COMPILING
        rule, adjoint = lowered.rule, None
        trajectory: AbstractTrajectory
        if given is not None:
            trajectory = _pushforward(program, kinds, lowered, given[1], seconds)
        elif rule:
            trajectory = compile_adaptive(program, rule, seconds)
        else:
            trajectory = compile_trajectory(program, kinds, seconds)
        if graded:
            adjoint = _adjoint(problem, lowered, trajectory, seconds)
    except Unsupported:
        raise
    except Exception as met:
        raise Unsupported(f"it cannot be compiled, a fault of sdesolve ({_described(met)})") from met
    places = {id(t): i for i, t in enumerate(guards.tensors)}
    if not all(id(c) in places for c in program.captured):
        raise Unsupported("it uses a tensor that it makes outside torch, or that could not be found beforehand")
    where = tuple(places[id(c)] for c in program.captured)
    read = tuple((where[i], program.captured[i].detach().clone()) for i in program.read)
    return Kernel(trajectory, where, weights, evaluations, noises, read, watch.bindings(), proved, adjoint), guards


def _pushforward(
    program: Program, kinds: Sequence[str], lowered: Lowered, tangents: Tangents, seconds: float
) -> Pushforward:
    """A trajectory with tangents."""
    wanted = [i for i, c in enumerate(program.captured) if tangents.moves(c)]
    rows = lowered.table is not None and tangents.moves(lowered.table)
    return Pushforward(program, kinds, tangents.here.count, wanted, rows, seconds)


def _adjoint(problem: Problem, lowered: Lowered, trajectory: AbstractTrajectory, seconds: float) -> Adjoint:
    """A trajectory with its reverse."""
    program = trajectory.plan.program
    check_without_hooks([problem.x0, *problem.memory, *program.captured])
    wanted, rows = _wanted(program.captured), lowered.table is not None and lowered.table.requires_grad
    return Adjoint(trajectory, reverse(program, wanted, rows=rows), wanted, rows=rows, seconds=seconds)


def _weights(program: Program) -> int:
    """Entries of matrices that are kept whole and have a gradient."""
    matrices = {e.data for e in topological(program.states) if e.op == "product"}
    return sum(m.rows * m.columns for m in matrices if program.captured[m.parameter].requires_grad)


def _wanted(captured: Sequence[Tensor]) -> list[int]:
    """Those that have a gradient."""
    return [i for i, c in enumerate(captured) if c.requires_grad and c.is_floating_point()]


def _warm(
    problem: Problem, guards: Guards, lowered: Lowered, noises: Sequence[tuple[int, ...]], given: Given | None
) -> Guards:
    """Does the first step in torch, so that caches fill as they do in an eager run.

    Returns:
        What the functions hold now.

    Raises:
        Unsupported: what the functions hold changes again in a second call, or that gives another result. It is put
            back as it was.
    """
    with guards.put_back_on_error() as changed:
        inputs = _inputs(problem, lowered, noises, problem.first, problem.steps, problem.x0.detach())
        rewind = random_states()
        first = _evaluated(problem, lowered, inputs)
        what, now = changed(), look_into(*_roots(problem))
        if what or now.key != guards.key:
            guards, forward = now if given is None else given[1].valued(now), random_states()
            rewind()  # a function that seeds a generator each time changes it again
            with guards.put_back_on_error() as changed_again:
                second = _evaluated(problem, lowered, inputs)
                same = all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(first, second, strict=True))
                if changed_again() or not same:
                    raise Unsupported(f"it changes Python values that it holds ({what}) each time it is called")
            forward()
    return guards


def _evaluated(problem: Problem, lowered: Lowered, inputs: Inputs) -> list[Tensor]:
    with use_backend("reference"):  # ops of a step in torch, where kernels need not be loaded for it
        made = [*_traced_step(lowered)(inputs)]
    observe = _observe(problem)
    return made if observe is None else [*made, observe(inputs.states)]


def _inputs(
    problem: Problem, lowered: Lowered, noises: Sequence[tuple[int, ...]], k: int, end: int, x: Tensor
) -> Inputs:
    """What step ``k``, taken to grid point ``end``, is called with in torch."""
    times, batch = problem.times[[k, end]], len(x)
    t, dt = problem.clock(times), times.diff()
    normals = []
    for source, shape in zip(lowered.sources, noises, strict=True):
        path, m = source.path, math.prod(shape)
        first_step = path.first_step * (m // source.draws) + k * m
        if _swaps(lowered) and m:
            first_step += m - first_step // m % 2 * 2 * m
        numbers = dataclasses.replace(path, first_step=first_step)
        units = torch.arange(m + 1, dtype=torch.float64, device="cpu")
        # A process that finds its kernel on disk has not loaded Numba, and need not for this.
        ready = x.device.type == "cpu" and "numba" in sys.modules
        z = x.new_empty(batch, m)
        with contextlib.nullcontext() if ready else use_backend("reference"):
            for first in range(0, batch, _ROWS_AT_ONCE):  # words in torch are 16 times what they make
                some = z[first : first + _ROWS_AT_ONCE]
                own: AbstractNoise = numbers.rows(first)
                if lowered.rows is not None and numbers.repeat is None:
                    own = BrownianRows.of(numbers, lowered.rows[first : first + len(some)].tolist())
                drawn = own.increments(units, (len(some), 1), dtype=x.dtype, device=x.device)
                some.copy_(drawn.reshape(m, len(some)).T)
        normals.append(z.reshape(batch, *shape))
    row = x.new_zeros(0) if lowered.table is None else lowered.table[k].to(x)
    return Inputs(lowered.start(x), tuple(normals), t[0], t[1], dt[0].to(x), dt[0].abs().sqrt().to(x), row)


def _compare(problem: Problem, kernel: Kernel, guards: Guards, lowered: Lowered, given: Given | None) -> None:
    """Compares a kernel with the step in torch on all rows of the batch.

    At the first, middle and last grid times when it is new, and at the first for other sizes of the batch.

    Raises:
        Unsupported: they differ.
    """
    begin, last, x0, table = problem.first, problem.steps, problem.x0.detach(), lowered.table
    step, lowered = _traced_step(lowered), _undifferentiated(lowered)
    observe, captured = _observe(problem), tuple(guards.tensors[i] for i in kernel.where)
    program = kernel.trajectory.plan.program
    eps = coarsest(program)

    def launch(x: Tensor, k: int, end: int, saves: Sequence[int]) -> Launch:
        rows = None if table is None else table[k : k + 1]
        offsets = places_of(problem, kernel, lowered, k)
        return Launch(
            x.contiguous(), problem.times[[k, end]], rows, offsets, saves, False, captured,
            memory=together(lowered.start(x)[1:]), paths=lowered.rows,
        )  # fmt: skip

    def at(k: int) -> None:
        end = last if table is None else k + 1

        def eager(x: Tensor) -> Tensor:
            inputs = _inputs(problem, lowered, kernel.noises, k, end, x)
            with use_backend("reference"):
                after = step(inputs)
            return (_flat(after) if lowered.extra else after[0]).detach()

        def fused(x: Tensor) -> Tensor:
            made = kernel.trajectory.run(launch(x, k, end, ()))
            return made.x1 if made.memory is None or not lowered.extra else _flat((made.x1, made.memory))

        if k == begin:
            inputs = _inputs(problem, lowered, kernel.noises, k, end, x0)
            calls = recorded(step, observe, inputs, kernel.adjoint is not None)
            same_operations(program, calls, len(x0))
        agree(eager, fused, x0, eps)

    try:
        changed = problem.changes.one_each if problem.changes else set[int]()
        for k in sorted({begin} if kernel.batches else {begin, (begin + last - 1) // 2, last - 1} | changed):
            at(k)
        if observe is not None:
            shape = program.observed_shape or ()

            def seen(x: Tensor) -> Tensor:
                states = kernel.trajectory.run(launch(x, 0, 1, (0,))).states
                assert states is not None
                return states.reshape(len(x), *shape)

            agree(lambda x: observe(lowered.start(x)).detach(), seen, x0, eps)
        if kernel.adjoint is not None:
            _compare_gradients(problem, kernel, kernel.adjoint, guards, lowered)
        if given is not None:
            _compare_tangents(*given[0], kernel, x0, given[1])
    except Unsupported:
        raise
    except Exception as met:
        raise Unsupported(f"comparing it with torch fails ({_described(met)})") from met


def _compare_gradients(problem: Problem, kernel: Kernel, adjoint: Adjoint, guards: Guards, lowered: Lowered) -> None:
    """Compares gradients of the first two steps with autograd's."""
    lowered = _undifferentiated(lowered)
    captured = [guards.tensors[i] for i in kernel.where]
    rows = None if lowered.table is None else lowered.table.detach()
    launch, eager = _first_two(problem, kernel, lowered, rows, [c.detach() for c in captured])
    where = _wanted(captured)
    eps = coarsest(kernel.trajectory.plan.program)
    compare_gradients(adjoint, launch, eager, [captured[i] for i in where], where, problem.x0.detach(), eps)


def _compare_tangents(problem: Problem, lowered: Lowered, kernel: Kernel, x0: Tensor, tangents: Tangents) -> None:
    """Compares tangents after the first two steps with torch's."""
    captured = [tangents.guards.tensors[i] for i in kernel.where]
    launch, eager = _first_two(problem, kernel, lowered, lowered.table, captured)

    def fused(x: Tensor) -> list[Tensor | None]:
        saved = kernel.trajectory.run(launch(x))
        return [saved.x1, saved.memory if lowered.extra else None, None if saved.states is None else saved.states[0]]

    compare_tangents(tangents, fused, eager, x0, coarsest(kernel.trajectory.plan.program))


def _first_two(
    problem: Problem, kernel: Kernel, lowered: Lowered, rows: Tensor | None, captured: Sequence[Tensor]
) -> tuple[Callable[[Tensor], Launch], Callable[[Tensor], tuple[Tensor, Tensor | None, Tensor | None]]]:
    """The first two steps from any state, as a launch and in torch.

    In torch they give the state, what is carried beside it where that is looked at, and what is observed; a launch
    saves that alone.
    """
    observe, step, first = _observe(problem), _traced_step(lowered), problem.first
    last, offsets = min(first + 2, problem.steps), places_of(problem, kernel, lowered)

    def launch(x: Tensor) -> Launch:
        saves = () if observe is None else (last,)
        times, memory = problem.times, together(lowered.start(x)[1:])
        return Launch(
            x.contiguous(),
            times,
            rows,
            offsets,
            saves,
            False,
            captured,
            first_step=first,
            last_step=last,
            memory=memory,
            paths=lowered.rows,
        )

    def eager(x: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
        states: Sequence[Tensor] = lowered.start(x)
        for k in range(first, last):
            inputs = _inputs(problem, lowered, kernel.noises, k, k + 1, x)
            with use_backend("reference"):
                states = step(dataclasses.replace(inputs, states=tuple(states)))
        seen = None if observe is None else observe(tuple(states))
        return states[0], together(tuple(states[1:])) if lowered.extra else None, seen

    return launch, eager


def _undifferentiated(lowered: Lowered) -> Lowered:
    """The same, with what is carried at the start as numbers alone."""
    return dataclasses.replace(lowered, extra=tuple(e.detach() for e in lowered.extra))


def _flat(states: Sequence[Tensor]) -> Tensor:
    """All that is carried, ``(batch, numbers)``."""
    return torch.cat([s.reshape(len(s), -1) for s in states], 1)


def _described(problem: Exception) -> str:
    return f"{type(problem).__name__}: {str(problem).strip().partition(chr(10))[0]}"


def places_of(problem: Problem, kernel: Kernel, lowered: Lowered, step: int = 0) -> list[tuple[int, int, int, int]]:
    """Where the numbers of each source begin, ``step`` steps after the first."""
    found = []
    for source, m in zip(lowered.sources, map(math.prod, kernel.noises), strict=True):
        seed, stream, first_path, first = _offset(source.path, m // source.draws, m * problem.steps)
        found.append((seed, stream, first_path, first + step * m))
    return found


def _memory(problem: Problem, lowered: Lowered) -> Tensor | None:
    """What is carried beside the state before the first step; ``None`` for zeros."""
    return together(lowered.start(problem.x0, problem.memory)[1:]) if problem.memory or lowered.extra else None


def _saves_all(problem: Problem) -> bool:
    """Whether all that is carried is saved, and what is kept is made of it afterwards."""
    return problem.prior is not None and not problem.save.moments


def _observe(problem: Problem) -> Callable[[tuple[Tensor, ...]], Tensor] | None:
    if _saves_all(problem):
        return _flat
    return None if problem.save.inside or problem.save.observable is None else problem.save.observed


_REASON = "the whole trajectory is one generated kernel"
_PUSHED = f"{_REASON}, which carries tangents along"
_GRADED = f"{_REASON}, and its gradient another"
_AT_ONCE = "the whole trajectory and the gradient of its mean are one generated kernel"
_APART = " (one gives both for the mean of one number at one time, over steps that fit one launch)"


def _launch(problem: Problem, kernel: Kernel, guards: Guards, lowered: Lowered) -> Launch:
    """The integration from its first step to its last, with nothing saved."""
    captured = tuple(guards.tensors[i] for i in kernel.where)
    offsets = places_of(problem, kernel, lowered)
    memory = _memory(problem, lowered)
    return Launch(
        problem.x0,
        problem.times,
        lowered.table,
        offsets,
        (),
        False,
        captured,
        first_step=problem.first,
        memory=memory,
        paths=lowered.rows,
    )


def _report_divergence(problem: Problem, trajectory: AbstractTrajectory, lowered: Lowered, launch: Launch) -> None:
    """Refuses the first step of a run that gives a state that is not finite.

    It is found by halving the steps between a state that is finite and one that is not, which costs at most another
    run; that step alone is done in torch, to see why.
    """
    first, last, x, memory = problem.first, problem.steps, problem.x0, launch.memory
    while last - first > 1:
        middle = (first + last) // 2
        half = dataclasses.replace(launch, x0=x, memory=memory, first_step=first, last_step=middle)
        reached = trajectory.run(half)
        if all_finite(reached.x1):
            first, x, memory = middle, reached.x1, reached.memory
        else:
            last = middle
    states = lowered.start(x) if memory is None else lowered.apart(x, memory)
    Eager().begin(problem, lowered).report_divergence(first, last, states)
    step = dataclasses.replace(launch, x0=x, memory=memory, first_step=first, last_step=last)
    refuse_overflow(problem, first, trajectory.run(step).x1)


Start = Callable[[Launch], Run]


def _start(problem: Problem, kernel: Kernel, guards: Guards, lowered: Lowered) -> Start:
    """How a launch is run: as a part of torch's graph if gradients are wanted."""
    adjoint = kernel.adjoint
    if adjoint is None:
        return kernel.trajectory.run

    def unchanged() -> bool:
        return look_into(*_roots(problem), most_weights=_MOST_WEIGHTS).key == guards.key

    again = Again(problem, lowered, _observe(problem), unchanged)
    return lambda launch: differentiated(adjoint, launch, again)


def _run(problem: Problem, kernel: Kernel, lowered: Lowered, launch: Launch, start: Start) -> Saved:
    work = problem.taken * len(problem.x0)
    with progress_bar(problem.progress, total=work, unit="path-step", leave=False) as bar:
        launch = dataclasses.replace(launch, progress=bar.update if problem.progress else None)
        after_it = problem.save.inside or _saves_all(problem)
        return (_between if after_it else _on_grid)(problem, kernel, lowered, launch, start)


@final
@dataclasses.dataclass(frozen=True)
class Layout:
    """What of a run is kept, where times of the plan are on the grid alone.

    Attributes:
        saves: steps after which the kernel saves; none, if the end alone is wanted as it is.
        order: of what is returned among what was saved; `None` if that is the same.
        shape: of what is kept of a path.
        memory: shapes of what is carried beside the state, for a path.
        moments: whether mean and variance are kept instead of paths.
        steps: that are taken.
        evaluations: in all of them.
    """

    saves: tuple[int, ...]
    order: list[int] | None
    shape: tuple[int, ...]
    memory: tuple[tuple[int, ...], ...]
    moments: bool
    steps: int
    evaluations: int

    @classmethod
    def of(cls, problem: Problem, kernel: Kernel, lowered: Lowered) -> Layout:
        save, x0 = problem.save, problem.x0
        saves = sorted(k for k, slots in save.on_grid.items() if slots)
        # Two times at one grid point are two entries of what is returned.
        entry = {slot: i for i, k in enumerate(saves) for slot in save.on_grid[k]}
        order = [entry[slot] for slot in range(len(save.ts))]
        as_it_is = saves == [problem.steps] and save.observable is None and not save.moments
        shape = kernel.trajectory.plan.program.observed_shape
        return cls(
            () if as_it_is else tuple(saves),
            None if order == list(range(len(saves))) else order,
            tuple(x0.shape[1:]) if shape is None else shape,
            tuple(lowered.shapes(x0)[1:]),
            save.moments,
            problem.taken,
            kernel.evaluations * problem.taken,
        )

    def saved(self, run: Run, reason: str, source: str) -> Saved:
        """What a run leaves, as an executor does."""
        xs, variances, order = run.x1[None], None, self.order
        if run.moments is not None:
            xs, variances = (m.reshape(len(self.saves), *self.shape) for m in (run.moments.mean, run.moments.variance))
        elif run.states is not None:
            xs = run.states.reshape(len(self.saves), len(run.x1), *self.shape)
        if order is not None:
            xs, variances = xs[order], None if variances is None else variances[order]
        elif not self.saves:
            xs = xs.clone()
        memory = apart(run.x1, run.memory, self.memory)
        return Saved(run.x1, xs, variances, self.steps, self.evaluations, "fused", reason, source, memory=memory)


def _on_grid(problem: Problem, kernel: Kernel, lowered: Lowered, launch: Launch, start: Start) -> Saved:
    """A run whose plan has times on the grid alone."""
    layout = Layout.of(problem, kernel, lowered)
    launch = dataclasses.replace(launch, saves=layout.saves, moments=layout.moments)
    return layout.saved(start(launch), *kernel.told(launch))


def _offset(path: BrownianPath, numbers: int, count: int) -> tuple[int, int, int, int]:
    """Where ``count`` numbers of each path begin, ``numbers`` of them for each of its steps.

    Raises:
        ValueError: they would wrap, and repeat others.
    """
    offset = path.first_step * numbers
    if offset + count > 1 << 58:
        raise ValueError(
            f"a path has 2^58 numbers, and these steps end at number {offset + count}; begin at a smaller first_step, "
            "with another seed"
        )
    return path.seed, int(path.stream), path.first_path, offset


def _around(save: SavePlan) -> list[int]:
    """Grid points that a plan needs, those on both sides of a time between two among them."""
    return sorted({k for k, slots in save.on_grid.items() if slots} | {k + i for k in save.inside for i in (0, 1)})


def _between(problem: Problem, kernel: Kernel, lowered: Lowered, launch: Launch, start: Start) -> Saved:
    """A run of whose states more is made afterwards: those between grid points follow from those on both sides."""
    save, watched = problem.save, problem.watched
    launch = dataclasses.replace(launch, saves=_around(save))
    saved = start(launch)
    assert saved.states is not None
    before = watched.evaluations
    states = {k: _apart(problem, lowered, s) for k, s in zip(launch.saves, saved.states.unbind(0), strict=True)}
    for k, carried in states.items():
        save.at_grid_point(k, *carried)
        if k in save.inside:
            (span,) = problem.spans(k, 1)
            save.within_step(k, functools.partial(between, problem, k, carried, states[k + 1], span))
    variances = save.variances() if save.moments else None
    evaluations = kernel.evaluations * problem.taken + watched.evaluations - before
    reason, source = kernel.told(launch)
    (_, *memory), xs = lowered.apart(problem.x0, saved.memory), save.states()
    made = saved.x1, xs, variances, problem.taken, evaluations, "fused", reason, source
    return Saved(*made, memory=tuple(memory), weights=save.weights())


def _apart(problem: Problem, lowered: Lowered, flat: Tensor) -> tuple[Tensor, ...]:
    """What was saved of a step, ``(batch, numbers)``: the state, or all that is carried."""
    d = problem.x0[0].numel()
    return lowered.apart(flat[:, :d].reshape(problem.x0.shape), flat[:, d:] if _saves_all(problem) else None)
