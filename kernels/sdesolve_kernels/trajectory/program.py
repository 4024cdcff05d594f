"""One path's step as a program: what it carries, what it reads, and an expression for everything it makes."""

from __future__ import annotations

import dataclasses
import math
import random
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, final

import numpy as np
import torch
from torch import Tensor

from sdesolve_kernels.trajectory import decompositions, layouts, matrices, reductions
from sdesolve_kernels.trajectory.alike import TooMuchWork, alike_rows, thin_axis
from sdesolve_kernels.trajectory.expressions import Expression, Graph, topological
from sdesolve_kernels.trajectory.leaves import NoiseLeaf, PathEntry, State, TableColumn, Time
from sdesolve_kernels.trajectory.pointwise import HANDLERS
from sdesolve_kernels.trajectory.tracing import (
    NOT_ALIKE,
    Traced,
    Tracer,
    Unread,
    Unsupported,
    cast,
    dtype_name,
    filled,
    user_line,
)

__all__ = ["Inputs", "Program", "Signature", "batch_kind", "check_batch", "trace", "traced_shape"]

_HANDLERS = HANDLERS
_REGISTERED = (decompositions, layouts, matrices, reductions)  # importing them adds their handlers

_LARGEST_PROGRAM = 40_000
_LARGEST_STATE = 8192
# Of the batch that a program is checked for, by the size of a state; primes, so that few axes are as long by chance.
_MOST_ROWS, _MOST_SMALL_ROWS, _MOST_NUMBERS = 1021, 65_521, 1 << 18


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
    """

    dtype: torch.dtype
    device: torch.device
    states: tuple[tuple[int, ...], ...]
    noises: tuple[tuple[int, ...], ...]
    columns: int
    batch: int


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
        observed: what is observed of a state, flattened; empty if nothing but the state itself is.
        observed_shape: of the observation, for one path; ``None`` if there is none.
        captured: tensors from outside that it reads; ``parameter`` of `Shared` and `PathEntry` leaves counts them.
        by_path: which of them have a row per path.
        split: whether tensors of as many rows as the batch were taken to have a row per path.
        read: which of them an index was read from: the program is right while their values stay the same.
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


Step = Callable[[Inputs], Sequence[Tensor]]
Observe = Callable[[Tensor], Tensor]


def trace(step: Step, signature: Signature, observe: Observe | None = None) -> Program:
    """Traces ``step``, and ``observe`` on the first state.

    The batch that is traced has two rows and, once more, three: a step that is right for a path on its own gives every
    row the same expression of that row's inputs. One that does not couples the paths of the batch, or depends on its
    size.

    A tensor with one row for each path of the call is read as such, and if that fails as one that all paths share.

    Raises:
        Unsupported: the step cannot become a kernel; says which operation stands in the way, and in which line.
    """
    size = sum(map(math.prod, (*signature.states, *signature.noises)))
    if size > _LARGEST_STATE:
        raise Unsupported(f"a path has {size} numbers, state and noise, more than the {_LARGEST_STATE} of a kernel")
    orders = (False, True) if signature.batch == 1 else (True, False)
    problems: list[Unsupported] = []
    for by_path in orders:
        try:
            return _trace(step, signature, observe, by_path)
        except Unsupported as problem:
            problems.append(problem)
    raise problems[0]


def check_batch(program: Program, step: Step, observe: Observe | None, batch: int) -> None:
    """Traces once more with the rows of a call, all alike: a step may do something else from some number on.

    Raises:
        Unsupported: it is another program for a batch of this size, or in some of its rows.
    """
    rows = batch_kind(batch, math.prod(program.signature.states[0]))
    signature = dataclasses.replace(program.signature, batch=batch)
    try:
        with alike_rows(rows):
            (after, observed, _), _ = _rows(program.graph, step, signature, observe, program.split, rows, alike=True)
    except TooMuchWork as problem:
        if problem.told_apart:
            raise Unsupported(NOT_ALIKE) from problem
        return
    own, seen = list(program.states), list(program.observed)
    if any(e != own for e in after) or any(e != seen for e in observed):
        raise Unsupported(NOT_ALIKE)


def batch_kind(batch: int, size: int) -> int:
    """Batches of one kind, of states of ``size`` numbers, need one `check_batch`."""
    return min(batch, max(_MOST_ROWS, min(_MOST_SMALL_ROWS, _MOST_NUMBERS // size)))


def _kinds_of_rows(results: Sequence[Traced]) -> int:
    """How many rows there are to look at: one if they are all alike."""
    return 1 if all(len(thin_axis(-a.ndim, a.elements)[1]) for a in results) else len(results[0])


def traced_shape(function: Callable[[Inputs], Tensor], signature: Signature) -> tuple[int, ...]:
    """Shape of what a function returns for one path, found without computing it; refuses as `trace` does.

    The shape is that without the batch axis, or all of it if there is none.
    """
    orders = (False, True) if signature.batch == 1 else (True, False)
    problems: list[Unsupported] = []
    for by_path in orders:
        tracer = Tracer(Graph(), signature.device, _HANDLERS, 3, signature.batch, by_path)
        try:
            with tracer, Unread(), torch.no_grad():
                made = _called(function, _inputs(tracer, signature))
        except Unsupported as problem:
            problems.append(problem)
        else:
            return tuple(made.shape)
    raise problems[0]


def _trace(step: Step, signature: Signature, observe: Observe | None, by_path: bool) -> Program:
    graph = Graph()
    drawn = _drawn()
    first, tracer = _rows(graph, step, signature, observe, by_path, 2)
    size = len(topological([*first[0][0], *first[1][0]]))
    if size > _LARGEST_PROGRAM:
        raise Unsupported(f"its step has {size} operations for each path, more than the {_LARGEST_PROGRAM} of a kernel")
    second, other = _rows(graph, step, signature, observe, by_path, 3)
    if drawn != _drawn():
        raise Unsupported("it draws random numbers in Python; all noise comes from the solver's increments")
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
    )


def _drawn() -> object:
    """Changes with every random number that Python's or numpy's global generator makes."""
    state: Any = np.random.get_state(legacy=False)  # noqa: NPY002
    return random.getstate(), state["state"]["pos"], state["has_gauss"], state["state"]["key"].tobytes()


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
    alike: bool = False,
) -> tuple[tuple[list[list[Expression]], list[list[Expression]], tuple[int, ...] | None], Tracer]:
    """Expressions of each row of the state after a step, and of the observation, and the observation's shape."""
    tracer = Tracer(graph, signature.device, _HANDLERS, rows, signature.batch, by_path, alike)
    name, inputs = dtype_name(signature.dtype), _inputs(tracer, signature)
    states = inputs.states
    with tracer, Unread(), torch.no_grad():
        outputs = [_result(tracer, a) for a in _called(step, inputs)]
        seen = None if observe is None else _result(tracer, _called(observe, states[0]))
    wrong = [(a, s) for a, s in zip(outputs, states, strict=True) if a.shape != s.shape or a.dtype != s.dtype]
    if wrong:
        a, s = wrong[0]
        raise Unsupported(f"the step turns {s.dtype} {tuple(s.shape)} into {a.dtype} {tuple(a.shape)}")
    if alike:
        rows = _kinds_of_rows([*outputs, *([] if seen is None else [seen])])
    after = [[e for a in outputs for e in a.elements[r : r + 1].flat] for r in range(rows)]
    if seen is None:
        return (after, [[] for _ in range(rows)], None), tracer
    if seen.ndim == 0 or seen.shape[0] != tracer.rows:
        raise Unsupported(f"the observable must return one row per path, (batch, ...), got shape {tuple(seen.shape)}")
    observed = [list(cast(graph, seen.elements[r : r + 1], name).flat) for r in range(rows)]
    return (after, observed, tuple(seen.shape[1:])), tracer


def _inputs(tracer: Tracer, signature: Signature) -> Inputs:
    """What a step is called with, as leaves."""
    graph, name = tracer.graph, dtype_name(signature.dtype)

    def per_row(kind: type, shape: tuple[int, ...], start: int) -> Traced:
        leaves = tracer.per_row(lambda r, i: graph.leaf(kind(r, start + i), name), shape)
        return _frozen(tracer, leaves, signature.dtype)

    def number(what: str) -> Traced:
        return _frozen(tracer, filled([graph.leaf(Time(what), name)], ()), signature.dtype)

    states = tuple(per_row(State, s, at) for s, at in zip(signature.states, _starts(signature.states), strict=True))
    noises = tuple(per_row(NoiseLeaf, s, at) for s, at in zip(signature.noises, _starts(signature.noises), strict=True))
    columns = [graph.leaf(TableColumn(j), name) for j in range(signature.columns)]
    row = _frozen(tracer, filled(columns, (signature.columns,)), signature.dtype)
    return Inputs(states, noises, number("t0"), number("t1"), number("dt"), number("scale"), row)


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


def _called(function: Callable[..., Any], argument: Any) -> Any:
    """The call, with whatever goes wrong in it turned into `Unsupported`."""
    try:
        return function(argument)
    except (Unsupported, TooMuchWork):
        raise
    except Exception as problem:
        frames = [f for f in traceback.extract_tb(problem.__traceback__) if not _is_internal(f.filename)]
        line = f"{frames[-1].filename}:{frames[-1].lineno}: {frames[-1].line}" if frames else user_line()
        text = str(problem).strip().split("\n")[0]
        raise Unsupported(f"it fails while it is traced ({type(problem).__name__}: {text})", line) from problem


def _is_internal(filename: str) -> bool:
    return filename.startswith(str(torch.__path__[0])) or not {"sdesolve", "sdesolve_kernels"}.isdisjoint(
        Path(filename).parts
    )
