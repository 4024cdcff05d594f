"""A program made ready to run: which back end, its kernel, and the arguments of one launch."""

from __future__ import annotations

import abc
import bisect
import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import final

import numpy as np
import torch
from torch import Tensor

from sdesolve_kernels.dispatch import backend_for
from sdesolve_kernels.trajectory.evaluate import evaluate
from sdesolve_kernels.trajectory.expressions import topological
from sdesolve_kernels.trajectory.plan import Plan, plan
from sdesolve_kernels.trajectory.program import Program
from sdesolve_kernels.trajectory.reverse import Reverse
from sdesolve_kernels.trajectory.tracing import Unsupported, dtype_name

__all__ = [
    "AbstractReverse",
    "AbstractTrajectory",
    "Launch",
    "Moments",
    "Saved",
    "Sweep",
    "Tables",
    "combined",
    "compile_trajectory",
    "contiguous",
    "listed",
    "named",
    "on_host",
    "tables",
]

_MOST_AT_ONCE = 1 << 14  # times whose tables are made at once although only some of them are asked for
_LARGEST_KEY = 1 << 18  # bytes that a table is made from, of those that are kept


@final
@dataclasses.dataclass(frozen=True)
class Moments:
    """Mean and unbiased variance over the paths at each saving time, ``(times, width)``, float64."""

    mean: Tensor
    variance: Tensor


@final
@dataclasses.dataclass(frozen=True)
class Launch:
    """One run of a kernel.

    Attributes:
        x0: ``(batch, *state)``.
        times: ``(steps + 1,)``, float64 on the host.
        rows: the solver's numbers for each step, ``(steps, columns)``, float64 on the host; ``None`` without any.
        places: seed, stream, first path, and index of the first number, of each source of noise.
        saves: steps after which to save, increasing; 0 is the start.
        moments: save mean and variance over the paths instead of every path.
        captured: tensors the program reads, as `Program.captured`.
        first_step: the step to begin with; `x0` is the state before it. ``times``, ``rows``, ``places`` and ``saves``
            are those of the whole integration whatever the first step and the last.
        last_step: the step to end before; ``None`` for the end of the times.
        memory: what the solver remembers before the first step, as `Saved.memory`; ``None`` for zeros.
        paths: numbers of the rows' paths, less the first path of `places`, ``(batch,)``, int64; for a program that has
            them listed (`Signature.listed`), and ``None`` there for 0, 1, ....
        progress: called now and then, in the caller's thread, with the number of path-steps (a path by a step) that
            were done since. What it raises stops the run, as KeyboardInterrupt does: within a fraction of a second, and
            when nothing is written any more.
    """

    x0: Tensor
    times: Tensor
    rows: Tensor | None
    places: Sequence[tuple[int, int, int, int]]
    saves: Sequence[int]
    moments: bool
    captured: Sequence[Tensor]
    first_step: int = 0
    last_step: int | None = None
    memory: Tensor | None = None
    paths: Tensor | None = None
    progress: Callable[[int], None] | None = None

    @property
    def end(self) -> int:
        """The number of the step to end before."""
        return len(self.times) - 1 if self.last_step is None else self.last_step


@final
@dataclasses.dataclass(frozen=True)
class Saved:
    """What a run leaves.

    Attributes:
        x1: the state at its end, ``(batch, *state)``.
        states: ``(times, batch, width)``, what was saved of it.
        moments: or its moments over the paths.
        memory: what the solver remembers at the end, ``(batch, numbers)``; ``None`` if it remembers nothing.
    """

    x1: Tensor
    states: Tensor | None
    moments: Moments | None
    memory: Tensor | None = None


@final
@dataclasses.dataclass(frozen=True)
class Sweep:
    """One way back through some steps, with the way there if that is wanted too.

    Attributes:
        launch: the run that is gone back through, with these steps alone; its `x0` and `memory` are what it began with.
        starts: ``(batch, numbers carried)``, before the first of these steps.
        saved: cotangents of all saved states of the run; or `None`.
        moments: ``(saves, width, 3)``, for each number saved the cotangent at the mean, by how much that grows with the
            number, and the mean; or `None`.
        table, uniforms: of the reverse's plan, for these steps.
        each_step: whether there is a row of `columns` for each step; else there is one for all.
        first: whether the run begins with these steps.
        cotangents: ``(batch, numbers carried)``, of the state after the last of these steps; it becomes that of the
            state before the first.
        columns, sums, path_sums: what is added to, float64: ``(steps or 1, columns)``, ``(Reverse.totals,)``,
            ``(batch, path invariants)``.
        ends: ``(batch, numbers carried)``, where to put the states after the last of these steps; or `None`.
    """

    launch: Launch
    starts: Tensor
    saved: Tensor | None
    moments: Tensor | None
    table: Tensor
    uniforms: Tensor
    each_step: bool
    first: bool
    cotangents: Tensor
    columns: Tensor
    sums: Tensor
    path_sums: Tensor
    ends: Tensor | None = None

    @property
    def slots(self) -> tuple[int, int]:
        """The first save after one of these steps, and the last; the start of the run counts as well.

        None of them if no cotangents are given.
        """
        if self.saved is None and self.moments is None:
            return 0, -1
        saves, a, b = self.launch.saves, self.launch.first_step, self.launch.end
        return (bisect.bisect_left if self.first else bisect.bisect_right)(saves, a), bisect.bisect_right(saves, b) - 1


class AbstractReverse(abc.ABC):
    """The reverse of a trajectory, compiled."""

    source: str

    @abc.abstractmethod
    def steps(self, batch: int, columns: int) -> tuple[int, int]:
        """How many steps to go back through at once, at least and at most.

        Args:
            batch: paths.
            columns: sums that are wanted for each step.
        """

    @abc.abstractmethod
    def run(self, sweep: Sweep) -> Moments | None:
        """Goes back through some steps.

        Returns:
            Moments of what the launch saves, where ends and cotangents of moments are given.
        """


class AbstractTrajectory(abc.ABC):
    """A compiled program."""

    source: str
    plan: Plan
    tables: Tables | None = None  # where it keeps them

    def reverse(self, reverse: Reverse, seconds: float = math.inf) -> AbstractReverse:
        """Compiles the reverse of the program.

        Args:
            reverse: what to compute.
            seconds: that it may take.

        Raises:
            Unsupported: the back end makes no reverse, or none of this one.
            TooCostly: it would take longer.
        """
        raise Unsupported("gradients are wanted, and its back end makes no reverse kernels")

    @abc.abstractmethod
    def run(self, launch: Launch) -> Saved:
        """Carries all paths through all steps."""


def compile_trajectory(program: Program, increments: Sequence[str], seconds: float = math.inf) -> AbstractTrajectory:
    """Generates and compiles the kernel of a program for its device.

    Args:
        program: what to run.
        increments: how the numbers of each source of noise are made: ``normal``, ``two-point`` or ``three-point``.
        seconds: that the compilation may take.

    Raises:
        Unsupported: the back end cannot compile it.
        TooCostly: it would take longer.
    """
    return backend_for("trajectory", program.signature.device).compile(plan(program), increments, seconds)


@final
class Tables:
    """Makes the tables of a plan, and keeps the last that it made: calls often differ in their start and seed alone."""

    def __init__(self, plan: Plan) -> None:
        self._plan, self._roots = plan, [*plan.columns, *plan.loop_invariants]
        reads = (e for e in topological(self._roots) if e.op in ("shared", "product"))
        self._read = frozenset(e.data.parameter for e in reads)
        self._empty = torch.empty(0, dtype=plan.program.signature.dtype, device="cpu")
        self._last: tuple[tuple[bytes, ...], tuple[Tensor, Tensor]] | None = None

    def __call__(self, launch: Launch, first: int, last: int) -> tuple[Tensor, Tensor]:
        """Columns of steps `first` to `last`, ``(steps, columns)``, and uniforms, in the state's dtype on the host."""
        if not self._roots:
            return self._empty, self._empty
        times, rows, begin, end = launch.times, launch.rows, 0, launch.times.shape[0] - 1
        rows = None if rows is None else rows.detach()
        if end >= _MOST_AT_ONCE:  # else a run that goes in stretches, and back, has one table
            begin, end, times = first, last, times[first : last + 1]
            rows = None if rows is None else rows[first:last]
        shared: list[Tensor | None] = [None] * len(launch.captured)
        for i in self._read:
            shared[i] = on_host(launch.captured[i])
        inputs = [t for t in (times, rows, *shared) if t is not None]
        key = tuple([t.numpy().tobytes() for t in inputs]) if sum(t.nbytes for t in inputs) <= _LARGEST_KEY else None
        last_made = self._last
        if key is None or last_made is None or last_made[0] != key:
            last_made = key or (), self._made(times, rows, shared)
            self._last = last_made if key is not None else self._last
        table, uniforms = last_made[1]
        return table[first - begin : last - begin] if (first, last) != (begin, end) else table, uniforms

    def _made(self, times: Tensor, rows: Tensor | None, shared: Sequence[Tensor | None]) -> tuple[Tensor, Tensor]:
        dtype, n = self._empty.dtype, len(self._plan.columns)
        values = evaluate(self._roots, named(times), rows, shared)
        table = torch.stack(values[:n], 1).to(dtype) if n else self._empty
        uniforms = torch.stack(values[n:]).to(dtype) if len(values) > n else self._empty
        if not all(bool(made.isfinite().all()) for made in (table, uniforms)):
            largest = torch.finfo(dtype).max
            if any(v.is_floating_point() and bool(((v.abs() > largest) & v.isfinite()).any()) for v in values):
                # Torch might multiply in an order in which nothing overflows.
                raise Unsupported(f"a number that its steps are made with is too large for {dtype_name(dtype)}")
        return table, uniforms


def tables(plan: Plan, launch: Launch) -> tuple[Tensor, Tensor]:
    """Columns for every step, ``(steps, columns)``, and uniforms, in the dtype of the state, on the host."""
    return Tables(plan)(launch, launch.first_step, launch.end)


def named(times: Tensor) -> dict[str, Tensor]:
    """Times of steps, by the names of `leaves.Time`."""
    dt = times.diff()
    # Torch hands even a few roots to threads, and waits for them.
    scale = torch.from_numpy(np.sqrt(dt.abs().numpy()))
    return {"t0": times[:-1], "t1": times[1:], "dt": dt, "scale": scale}


def combined(parts: Tensor, lanes: int, batch: int) -> Moments:
    """Mean and variance over all blocks of means and sums of squares (Chan, Golub and LeVeque 1983, eq. 2.1)."""
    counts = torch.full((parts.shape[1],), float(lanes), dtype=torch.float64, device=parts.device)
    counts[-1] = batch - lanes * (len(counts) - 1)
    return _pooled(parts[:, :, 0], parts[:, :, 1], counts)


def _pooled(means: Tensor, squares: Tensor, counts: Tensor) -> Moments:
    weight, batch = counts[None, :, None], float(counts.sum())
    mean = (weight * means).sum(1) / batch
    between = (weight * (means - mean[:, None]).square()).sum(1)
    return Moments(mean, (squares.sum(1) + between) / (batch - 1 if batch > 1 else math.nan))


def listed(launch: Launch, lanes: int = 1) -> Tensor:
    """`Launch.paths` on the device of the state, in whole blocks of so many lanes."""
    batch, device = len(launch.x0), launch.x0.device
    paths = torch.arange(batch, device=device) if launch.paths is None else launch.paths.to(device, torch.int64)
    return torch.nn.functional.pad(paths, (0, -batch % lanes)).contiguous()


def on_host(c: Tensor) -> Tensor:
    """As `evaluate` reads it: flat, and float64 if it is of floats."""
    c = c.detach().resolve_neg().reshape(-1).cpu()
    return c.double() if c.dtype.is_floating_point else c


def contiguous(c: Tensor, dtype: torch.dtype) -> Tensor:
    """As generated code reads it: in order, whole numbers as int64."""
    c = c.detach().resolve_neg().contiguous()
    return c.to(torch.int64) if dtype == torch.int32 else c
