"""One path's step as a program: what it carries, what it reads, and an expression for everything it makes."""

from __future__ import annotations

import dataclasses
import math
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, final

import numpy as np
import torch
from torch import Tensor

from sdesolve_kernels.trajectory import decompositions, layouts, matrices, reductions
from sdesolve_kernels.trajectory.expressions import Expression, Graph, topological
from sdesolve_kernels.trajectory.leaves import NoiseLeaf, PathEntry, State, TableColumn, Time
from sdesolve_kernels.trajectory.pointwise import HANDLERS
from sdesolve_kernels.trajectory.tracing import (
    NOT_ALIKE,
    Call,
    Deadline,
    Traced,
    Tracer,
    Unread,
    Unsupported,
    dtype_name,
    filled,
    user_line,
)

__all__ = ["Inputs", "Program", "Signature", "check_size", "trace"]

_HANDLERS = HANDLERS
_REGISTERED = (decompositions, layouts, matrices, reductions)  # importing them adds their handlers

_LARGEST_PROGRAM = 40_000
_LARGEST_STATE = 8192


@final
@dataclasses.dataclass(frozen=True)
class Signature:
    """What a step takes, for one path.

    Attributes:
        dtype: of the state, float32 or float64.
        device: where the kernel will run.
        states: shapes of the tensors carried from step to step.
        noises: shapes of the standard normals drawn in a step, one for each source of noise.
        columns: length of the row of numbers that the solver tabulates for each step.
        batch: paths in the call that is traced.
        clock: dtype of the times at the ends of a step; ``None`` for that of the state.
        graded: whether derivatives will be taken backwards.
        swapped: whether steps ``2 k`` and ``2 k + 1`` of the sequences take each other's numbers.
        listed: whether the numbers of the rows' paths are listed, and not those after the first path in order.
        pushed: whether derivatives will be taken forwards.
    """

    dtype: torch.dtype
    device: torch.device
    states: tuple[tuple[int, ...], ...]
    noises: tuple[tuple[int, ...], ...]
    columns: int
    batch: int
    clock: torch.dtype | None = None
    graded: bool = False
    swapped: bool = False
    listed: bool = False
    pushed: bool = False


@final
@dataclasses.dataclass(frozen=True)
class Inputs:
    """What a traced step is called with.

    Attributes:
        states: ``(batch, *state)`` each.
        noises: standard normals, ``(batch, *shape)`` each.
        t0, t1: times at the ends of the step, ``()``.
        dt: ``t1 - t0``, ``()``.
        scale: ``sqrt|dt|``, ``()``.
        row: the solver's numbers for this step, ``(columns,)``.
    """

    states: tuple[Tensor, ...]
    noises: tuple[Tensor, ...]
    t0: Tensor
    t1: Tensor
    dt: Tensor
    scale: Tensor
    row: Tensor


@final
@dataclasses.dataclass(frozen=True)
class Program:
    """A traced step.

    Attributes:
        signature: what it takes.
        graph: where its expressions live.
        states: the state after the step, flattened over all tensors carried.
        observed: what is observed of all that is carried, flattened; empty if nothing but the state itself is.
        observed_shape: of the observation, for one path; ``None`` if there is none.
        captured: tensors from outside that it reads; ``parameter`` of `Shared` and `PathEntry` leaves counts them.
        by_path: which of them have a row per path.
        split: whether tensors of as many rows as the batch were taken to have a row per path.
        read: which of them an index was read from: the program is right while their values stay the same.
        calls: operations of the trace of two rows, and of three: those of other batches follow from them (`agreement`).
    """

    signature: Signature
    graph: Graph
    states: tuple[Expression, ...]
    observed: tuple[Expression, ...]
    observed_shape: tuple[int, ...] | None
    captured: tuple[Tensor, ...]
    by_path: tuple[bool, ...]
    split: bool
    read: tuple[int, ...] = ()
    calls: tuple[tuple[Call, ...], tuple[Call, ...]] = ((), ())

    @property
    def operations(self) -> int:
        """How many operations a step of one path takes, which is what compiling it costs."""
        return len(topological([*self.states, *self.observed]))


Step = Callable[[Inputs], Sequence[Tensor]]
Observe = Callable[[tuple[Tensor, ...]], Tensor]


def _nothing() -> None:
    pass


def check_size(states: Sequence[tuple[int, ...]], noises: Sequence[tuple[int, ...]] = ()) -> None:
    """Refuses paths that are too large for a kernel."""
    size = sum(map(math.prod, (*states, *noises)))
    if size > _LARGEST_STATE:
        raise Unsupported(f"a path has {size} numbers, state and noise, more than the {_LARGEST_STATE} of a kernel")


def trace(step: Step, signature: Signature, observe: Observe | None = None, *, seconds: float = math.inf) -> Program:
    """Traces ``step``, and ``observe`` on the tensors that it carries.

    The batch that is traced has two rows and, once more, three: a step that is right for a path on its own gives every
    row the same expression of that row's inputs. One that does not couples the paths of the batch, or depends on its
    size. What it does for the batch of a call is compared by `agreement`.

    Tensors that the functions hold are read as ones that all paths share; if that fails, those with as many rows as the
    call has paths as having one for each, but for parameters of modules.

    Args:
        step: the step.
        signature: what it takes.
        observe: the observable; `None` for the state itself.
        seconds: how long tracing may take.

    Raises:
        Unsupported: the step cannot become a kernel; says which operation stands in the way, and in which line.
    """
    check_size(signature.states, signature.noises)
    deadline = Deadline(seconds)
    problems: list[Unsupported] = []
    for by_path in (False, True):
        try:
            return _trace(step, signature, observe, by_path, deadline)
        except Unsupported as problem:
            problems.append(problem)
    raise problems[signature.batch > 1]


def _check(tracer: Tracer) -> None:
    """Raises what went wrong in a trace, though the code that was traced may have caught it."""
    tracer.graph.on_growth = _nothing  # the graph stays, and the tracer with all its tensors need not
    if tracer.problem is not None:
        raise tracer.problem


def _trace(step: Step, signature: Signature, observe: Observe | None, by_path: bool, deadline: Deadline) -> Program:
    graph = Graph()
    first, tracer = _rows(graph, step, signature, observe, by_path, 2, deadline)
    size = len(topological([*first[0][0], *first[1][0]]))
    if size > _LARGEST_PROGRAM:
        raise Unsupported(f"its step has {size} operations for each path, more than the {_LARGEST_PROGRAM} of a kernel")
    second, other = _rows(graph, step, signature, observe, by_path, 3, deadline)
    if [id(a) for a in tracer.captured] != [id(a) for a in other.captured]:
        raise Unsupported("it makes new tensors from data outside torch each time it is called")
    own = [_own_row(graph, e, r) for rows in (first, second) for r, e in enumerate(rows[0])]
    seen = [_own_row(graph, e, r) for rows in (first, second) for r, e in enumerate(rows[1])]
    if any(e != own[0] for e in own) or any(e != seen[0] for e in seen):
        raise Unsupported(NOT_ALIKE)
    shape = first[2]
    return Program(
        signature,
        graph,
        tuple(own[0]),
        tuple(seen[0]) if observe is not None else (),
        shape,
        tuple(tracer.captured),
        tuple(tracer.captured_by_path),
        by_path,
        tuple(sorted(tracer.read)),
        (tuple(tracer.calls), tuple(other.calls)),
    )


def _own_row(graph: Graph, roots: Sequence[Expression], row: int) -> list[Expression]:
    """Expressions of row ``row`` as if it were row 0; refuses any other row's inputs."""

    def renamed(e: Expression) -> Expression:
        if not isinstance(e.data, (State, NoiseLeaf, PathEntry)):
            return e
        if e.data.batch_row != row:
            raise Unsupported(
                "it couples the paths of the batch: what it returns for one depends on another (a mean or sort over "
                "the batch, or x[0] for x[:, 0])"
            )
        return graph.leaf(e.data._replace(batch_row=0), e.dtype)

    if any(e.op == "unknown" for e in roots):
        raise Unsupported("it returns an index")
    return graph.rebuilt(roots, renamed)


def _rows(
    graph: Graph,
    step: Step,
    signature: Signature,
    observe: Observe | None,
    by_path: bool,
    rows: int,
    deadline: Deadline,
) -> tuple[tuple[list[list[Expression]], list[list[Expression]], tuple[int, ...] | None], Tracer]:
    """Expressions of each row of the state after a step, and of the observation, and the observation's shape."""
    pushed, graded = signature.pushed, signature.graded or signature.pushed
    tracer = Tracer(graph, signature.device, _HANDLERS, rows, signature.batch, by_path, deadline, graded, pushed)
    inputs = _inputs(tracer, signature)
    states = inputs.states
    with tracer, Unread(tracer):
        outputs = [_result(tracer, a) for a in _called(tracer, step, inputs)]
        seen = None if observe is None else _result(tracer, _called(tracer, observe, states))
    _check(tracer)
    wrong = [(a, s) for a, s in zip(outputs, states, strict=True) if a.shape != s.shape or a.dtype != s.dtype]
    if wrong:
        a, s = wrong[0]
        raise Unsupported(f"the step turns {s.dtype} {tuple(s.shape)} into {a.dtype} {tuple(a.shape)}")
    after = [[e for a in outputs for e in a.elements[r : r + 1].flat] for r in range(rows)]
    if seen is None:
        return (after, [[] for _ in range(rows)], None), tracer
    if seen.ndim == 0 or seen.shape[0] != tracer.rows:
        raise Unsupported(f"the observable must return one row per path, (batch, ...), got shape {tuple(seen.shape)}")
    if seen.dtype != signature.dtype:
        raise Unsupported(
            f"the observable returns {seen.dtype} for a state of {signature.dtype}, and a kernel saves one dtype"
        )
    observed = [list(seen.elements[r : r + 1].flat) for r in range(rows)]
    return (after, observed, tuple(seen.shape[1:])), tracer


def _inputs(tracer: Tracer, signature: Signature) -> Inputs:
    """What a step is called with, as leaves."""
    graph, name = tracer.graph, dtype_name(signature.dtype)

    def per_row(kind: type, shape: tuple[int, ...], start: int) -> Traced:
        leaves = tracer.per_row(lambda r, i: graph.leaf(kind(r, start + i), name), shape)
        return _frozen(tracer, leaves, signature.dtype)

    def number(what: str, dtype: torch.dtype = signature.dtype) -> Traced:
        return _frozen(tracer, filled([graph.leaf(Time(what), dtype_name(dtype))], ()), dtype)

    states = tuple(per_row(State, s, at) for s, at in zip(signature.states, _starts(signature.states), strict=True))
    if signature.graded:  # they need gradients, as those of an eager run do from its second step on
        for state in states:
            state.requires_grad_()
    noises = tuple(per_row(NoiseLeaf, s, at) for s, at in zip(signature.noises, _starts(signature.noises), strict=True))
    columns = [graph.leaf(TableColumn(j), name) for j in range(signature.columns)]
    row = _frozen(tracer, filled(columns, (signature.columns,)), signature.dtype)
    t0, t1 = (number(what, signature.clock or signature.dtype) for what in ("t0", "t1"))
    return Inputs(states, noises, t0, t1, number("dt"), number("scale"), row)


def _starts(shapes: Sequence[tuple[int, ...]]) -> list[int]:
    sizes = [math.prod(s) for s in shapes]
    return [sum(sizes[:i]) for i in range(len(sizes))]


def _frozen(tracer: Tracer, elements: np.ndarray, dtype: torch.dtype) -> Traced:
    elements.flags.writeable = False
    return tracer.traced(elements, dtype)


def _result(tracer: Tracer, a: Any) -> Traced:
    if not isinstance(a, Tensor):
        raise Unsupported(f"it returns a {type(a).__name__}, not a tensor")
    made = tracer.known(a)
    if any(e is None for e in made.elements.flat):
        raise Unsupported("it uses the index of a largest or smallest entry")
    return made


def _called(tracer: Tracer, function: Callable[..., Any], argument: Any) -> Any:
    """The call, with whatever goes wrong in it turned into `Unsupported`."""
    try:
        return function(argument)
    except Unsupported:
        raise
    except Exception as problem:
        _check(tracer)
        frames = [f for f in traceback.extract_tb(problem.__traceback__) if not _is_internal(f.filename)]
        line = f"{frames[-1].filename}:{frames[-1].lineno}: {frames[-1].line}" if frames else user_line()
        text = str(problem).strip().split("\n")[0]
        raise Unsupported(f"it fails while it is traced ({type(problem).__name__}: {text})", line) from problem


def _is_internal(filename: str) -> bool:
    return filename.startswith(str(torch.__path__[0])) or not {"sdesolve", "sdesolve_kernels"}.isdisjoint(
        Path(filename).parts
    )
