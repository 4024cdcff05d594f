"""Steps that each path chooses for itself, in a kernel: what is to be made, one run, and what it leaves."""

from __future__ import annotations

import abc
import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import final

import torch
from torch import Tensor

from sdesolve_kernels.dispatch import backend_for
from sdesolve_kernels.trajectory.expressions import F32, F64, Expression, Graph, topological
from sdesolve_kernels.trajectory.launch import AbstractTrajectory, Launch, Saved
from sdesolve_kernels.trajectory.leaves import Column, PathInvariant, Time
from sdesolve_kernels.trajectory.operations import BOOL, FLOATS, OPERATIONS
from sdesolve_kernels.trajectory.plan import Plan, plan
from sdesolve_kernels.trajectory.program import Program
from sdesolve_kernels.trajectory.reactions import ReactionRule
from sdesolve_kernels.trajectory.tracing import Unsupported

__all__ = ["AbstractAdaptive", "AdaptiveLaunch", "AdaptiveSaved", "Rule", "clocked", "compile_adaptive"]

# Status of a path: it arrived; it took as many attempts as it may; it would need a step that is too short; or its steps
# come near the rounding of a time that its functions are given in float32 (`rounds_clock`).
ARRIVED, TOO_MANY, TOO_SHORT, TOO_COARSE = 0, 1, 2, 3
# The rounding of a time in float32, over which share of a step begins to count.
COARSE = 32.0 * 2.0**-23


@final
@dataclasses.dataclass(frozen=True)
class Rule:
    """How steps are chosen.

    Attributes:
        nested: whether steps are cells of the dyadic tree under a grid, driven by three unit numbers a channel; else
            they have any length, and there is no noise.
        doubling: whether the error is the difference of a cell and its halves (the program is one step, carrying the
            state alone); else what the program carries last is its estimate.
        channels: of the noise.
        order: of the error.
        deepest: level of the smallest cells.
    """

    nested: bool
    doubling: bool
    channels: int
    order: float
    deepest: int = 20


@final
@dataclasses.dataclass(frozen=True)
class AdaptiveLaunch:
    """One run.

    Attributes:
        x0: ``(batch, *state)``.
        carried: what a step of any length carries beside it, the slope, of the same shape; ``None`` for nested ones.
        lengths: of first steps, as wanted, ``(batch,)``, float64.
        times: the grid of the largest cells, float64 on the host; or the two ends.
        places: seed, stream, first path and index of the first number: of ``W``, ``H``, ``K``, and the number of step 0
            of the grid's tree.
        captured: tensors that the program reads.
        marks: where states are kept, increasing: with nested steps positions ``k + theta`` on the grid, else times.
        rtol, atol: tolerances.
        max_steps: attempts that a path may take.
        whole: take each cell as one step even where its halves were to be kept.
        progress: called with the number of attempts since the last call.
    """

    x0: Tensor
    carried: Tensor | None
    lengths: Tensor
    times: Tensor
    places: Sequence[tuple[int, int, int, int]]
    captured: Sequence[Tensor]
    marks: Sequence[float]
    rtol: float
    atol: float
    max_steps: int
    whole: bool = False
    progress: Callable[[int], None] | None = None


@final
@dataclasses.dataclass(frozen=True)
class AdaptiveSaved:
    """What a run leaves.

    Attributes:
        x: states where paths have come to, ``(batch, *state)``.
        t: the times of these, float64.
        counts: accepted, rejected and status, ``(batch, 3)``.
        error: of the last attempt.
        states: for each mark where its step began, ``(marks, batch, *state)``.
        steps: and which step that was, ``(marks, batch, 2)``, float64: its level (-1 where the state is the one at the
            mark itself), or its start and length.
    """

    x: Tensor
    t: Tensor
    counts: Tensor
    error: Tensor
    states: Tensor
    steps: Tensor


class AbstractAdaptive(AbstractTrajectory):
    """A compiled program that goes in steps of each path's own; on a grid that is given, where nothing is rejected."""

    rule: Rule

    @abc.abstractmethod
    def adapt(self, launch: AdaptiveLaunch) -> AdaptiveSaved:
        """Carries all paths to the end of the times."""

    @final
    def run(self, launch: Launch) -> Saved:
        x0 = launch.x0
        lengths = torch.full((len(x0),), torch.inf, dtype=torch.float64)
        times = launch.times[launch.first_step : launch.end + 1]
        if self.rule.nested:
            width = self.rule.channels
            k = launch.first_step
            *drivers, bridge = launch.places if len(launch.places) == 4 else (*launch.places, (0, 0, 0, 0))
            places = [(seed, stream, path, n + k * width) for seed, stream, path, n in drivers]
            places.append((*bridge[:3], bridge[3] + k))
        else:
            places = []
        carried = None if self.rule.nested else torch.zeros_like(x0)
        if launch.memory is not None and carried is not None:
            carried = launch.memory[:, : x0[0].numel()].reshape(x0.shape)
        made = self.adapt(
            AdaptiveLaunch(x0, carried, lengths, times, places, launch.captured, (), 1e30, 1e30, 1 << 40, True)
        )
        return Saved(made.x, None, None)


def compile_adaptive(program: Program, rule: Rule | ReactionRule, seconds: float = math.inf) -> AbstractTrajectory:
    """Generates and compiles the kernel of a program for its device.

    Args:
        program: one attempt.
        rule: how steps are chosen.
        seconds: that the compilation may take.

    Raises:
        Unsupported: the back end makes none, or none of this program.
        TooCostly: it would take longer.
    """
    return backend_for("trajectory", program.signature.device).adaptive(plan(program), rule, seconds)


def clocked(made: Plan) -> tuple[Plan, list[Expression]]:
    """The plan with what follows from time as numbers of each path, and those, over times of float64.

    They have the values that tables of a grid have (`evaluate`): computed in float64 from times as functions see them,
    but for what a comparison or a rounding to whole numbers looks at.

    Raises:
        Unsupported: something there that is no arithmetic on time.
    """
    graph, first = made.program.graph, len(made.path_invariants)

    def placed(e: Expression) -> Expression:
        if isinstance(e.data, Column):
            return graph.leaf(PathInvariant(first + e.data.i), e.dtype)
        return e

    n = len(made.states)
    states = graph.rebuilt([*made.states, *made.observed], placed)[:n]
    wide = [_wide(graph, e) for e in made.columns]
    return dataclasses.replace(made, states=tuple(states), observed=(), columns=()), wide


def rounds_clock(columns: Sequence[Expression]) -> bool:
    """Whether a time of day, and not the length of a step alone, is rounded to float32 on the way to one of these."""

    @functools.cache
    def tells(e: Expression) -> bool:
        if isinstance(e.data, Time):
            return e.data.name in ("t0", "t1")
        if e.op == "sub":
            return tells(e.args[0]) != tells(e.args[1])
        return e.op in ("cast", "neg", "add", "mul", "div") and any(tells(a) for a in e.args)

    return any(e.op == "cast" and e.dtype == F32 and tells(e.args[0]) for e in topological(columns))


def _wide(graph: Graph, root: Expression) -> Expression:
    """An expression of time in float64."""

    @functools.cache
    def of(e: Expression, wide: bool) -> Expression:
        if e.op in ("product", "element", "sum", "vector", "table_column"):
            raise Unsupported("a long sum or a product of matrices follows from the time of a step")
        if isinstance(e.data, Time):
            made = graph.cast(graph.leaf(e.data, F64), e.dtype)
            return graph.cast(made, F64) if wide else made
        if not e.args:
            return (
                graph.const(e.data, F64)
                if wide and e.op == "const" and e.dtype == F32
                else (graph.cast(e, F64) if wide and e.dtype == F32 else e)
            )
        if e.op == "cast":
            made = graph.cast(of(e.args[0], False), e.dtype)
            return graph.cast(made, F64) if wide and e.dtype == F32 else made
        looks = OPERATIONS[e.op].jump
        args = [of(a, wide and not looks and a.dtype in FLOATS) for a in e.args]
        if e.op == "where":
            args = [of(e.args[0], False), *(of(a, wide and a.dtype in FLOATS) for a in e.args[1:])]
        made = graph.op(e.op, *args)
        return graph.cast(made, F64) if wide and made.dtype == F32 else made

    for e in topological([root]):
        if e.op not in OPERATIONS and e.op not in ("const", "time", "shared", "cast"):
            raise Unsupported(f"{e.op} follows from the time of a step")
    return of(root, root.dtype != BOOL)
