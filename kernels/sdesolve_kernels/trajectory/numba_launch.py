"""Generated Numba kernels behind the launch layer: blocks of paths by threads, in segments of steps.

A run is cut into pieces, some blocks of paths through some steps, each of which takes about `_BUDGET`. Between two
pieces a thread looks whether the run was stopped. The state of a path, with all that a solver remembers, lies in a
buffer between its segments; noise belongs to coordinates and saves to slots, so how a run is cut changes no bit of it.
"""

from __future__ import annotations

import bisect
import ctypes
import math
import time
from collections.abc import Sequence
from typing import Any, final

import torch
from torch import Tensor

from sdesolve_kernels._numba.trajectory import is_kept
from sdesolve_kernels.backend import int64_bits
from sdesolve_kernels.threads import Job, scratch, single_threaded_if_forked, split
from sdesolve_kernels.trajectory.expressions import topological
from sdesolve_kernels.trajectory.launch import (
    AbstractReverse,
    AbstractTrajectory,
    Launch,
    Saved,
    Tables,
    combined,
    contiguous,
    listed,
)
from sdesolve_kernels.trajectory.numba_backward import NumbaReverse
from sdesolve_kernels.trajectory.numba_source import (
    ARGUMENTS,
    VECTOR,
    NumbaKernel,
    compiled,
    numba_kernel,
    seconds_to_compile,
)
from sdesolve_kernels.trajectory.plan import Plan
from sdesolve_kernels.trajectory.reverse import Reverse

__all__ = ["NumbaTrajectory"]

_GRAIN = 100_000.0  # nanoseconds of work that are worth a thread's while
_BUDGET = 30_000_000.0  # nanoseconds in a piece, which an interrupt waits for
_AT_ONCE = 1_000_000.0  # nanoseconds, as expected, of a run that is not cut
_CAREFUL = 16.0  # by what factor expectations may be too low
_STRETCH = 1 << 18  # steps whose tables are made at a time


class _Arguments(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int64) for name in ARGUMENTS]


@final
class NumbaTrajectory(AbstractTrajectory):
    """A generated Numba kernel."""

    def __init__(self, plan: Plan, increments: Sequence[str], seconds: float = math.inf) -> None:
        self.plan, self._increments = plan, tuple(increments)
        self._tables = self.tables = Tables(plan)
        operations = len(topological(plan.states)) + sum(m.rows * m.columns for m in plan.matrices)
        normals = sum(map(math.prod, plan.program.signature.noises))
        self._cost_of_lane = 0.1 * operations + 0.5 * normals
        kernel, self._better, self._spent = numba_kernel(plan, increments), None, 0
        if plan.program.signature.batch == 1 and not plan.matrices:
            alone = numba_kernel(plan, increments, alone=True)
            if is_kept(kernel.source) and not is_kept(alone.source):
                self._better = alone
            else:
                kernel = alone
        self._use(kernel, seconds)

    def _use(self, kernel: NumbaKernel, seconds: float = math.inf) -> None:
        self._entry = compiled(kernel.source, seconds)
        self._kernel, self.source = kernel, kernel.source
        # Nanoseconds that a block takes for a step: expected, and later as measured.
        self._cost = kernel.lanes * self._cost_of_lane
        self._measured = _CAREFUL * self._cost

    def reverse(self, reverse: Reverse, seconds: float = math.inf) -> AbstractReverse:
        return NumbaReverse(reverse, self._increments, seconds)

    def run(self, launch: Launch) -> Saved:
        better = self._better  # which another thread may take at any time
        if better is not None:  # compiled when runs have taken as long as that takes
            steps = launch.end - launch.first_step
            if self._spent + VECTOR * self._cost_of_lane * steps > 1e9 * seconds_to_compile(better.source):
                self._better = None
                self._use(better)
        begin = time.perf_counter_ns()
        with single_threaded_if_forked():
            run = _Run(self, launch)
        saved = run.finished()
        self._spent += time.perf_counter_ns() - begin
        return saved


@final
class _Run:
    """One run, and the memory that its threads read and write: both live as long as one of them works on it."""

    def __init__(self, trajectory: NumbaTrajectory, launch: Launch) -> None:
        plan, kernel = trajectory.plan, trajectory._kernel
        self.trajectory, self.launch, self.job = trajectory, launch, Job(launch.progress)
        self.first, self.last = launch.first_step, launch.end
        x0 = launch.x0.detach().resolve_neg().contiguous()
        self.batch, self.width, self.full = len(x0), math.prod(x0.shape[1:]), len(plan.states)
        self.blocks = -(-self.batch // kernel.lanes)
        self.x1 = torch.empty_like(x0)
        self.carried: Tensor | None = None
        if self.full > self.width or not self._is_short():
            self.carried = torch.empty(self.batch, self.full, dtype=x0.dtype, device="cpu")
        start = x0 if launch.memory is None else torch.cat([x0.reshape(self.batch, -1), launch.memory.to(x0)], 1)
        slots = len(launch.saves)
        self.states: Tensor | None = None
        self.moments: Tensor | None = None
        if slots and launch.moments:
            self.moments = torch.empty(slots, self.blocks, 2, kernel.width, dtype=torch.float64, device="cpu")
        elif slots:
            self.states = torch.empty(slots, self.batch, kernel.width, dtype=x0.dtype, device="cpu")
        captured = [contiguous(c, plan.program.captured[i].dtype) for i, c in enumerate(launch.captured)]
        noise = [int64_bits(number) for place in launch.places for number in place]
        lists = [_int64s(*launch.saves, -1), _int64s(*noise, 0), _int64s(*(c.data_ptr() for c in captured), 0)]
        saves, noise_at, pointers = map(ctypes.addressof, lists)
        rows = listed(launch, kernel.lanes) if plan.program.signature.listed else None
        self.memory = (start, captured, lists, rows)
        self.arguments = _Arguments(
            x_in=start.data_ptr(), in_width=start.numel() // max(self.batch, 1), paths=self.batch, blocks=self.blocks,
            saves=saves, saved=0 if self.states is None else self.states.data_ptr(),
            moments=0 if self.moments is None else self.moments.data_ptr(), noise=noise_at, pointers=pointers,
            rows=0 if rows is None else rows.data_ptr(),
        )  # fmt: skip

    def _is_short(self) -> bool:
        return self.trajectory._cost * self.blocks * (self.last - self.first) < _AT_ONCE

    def finished(self) -> Saved:
        """What the run leaves, once it is done."""
        for first in range(self.first, max(self.last, self.first + 1), _STRETCH):
            self._stretch(first, min(first + _STRETCH, self.last))
        with single_threaded_if_forked():
            x1, memory, moments = self.x1, None, None
            if self.carried is not None and self.full > self.width:
                x1.copy_(self.carried[:, : self.width].reshape(x1.shape))
                memory = self.carried[:, self.width :]
            if self.moments is not None:
                moments = combined(self.moments, self.trajectory._kernel.lanes, self.batch)
        return Saved(x1, self.states, moments, memory)

    def _stretch(self, first: int, last: int) -> None:
        """All paths from step `first` to step `last`, with tables for these steps."""
        trajectory = self.trajectory
        with single_threaded_if_forked():
            table, uniforms = trajectory._tables(self.launch, first, last)
        columns = len(trajectory.plan.columns)
        self.arguments.table = table.data_ptr() - first * columns * table.element_size()
        self.arguments.uniforms = uniforms.data_ptr()
        tables = table, uniforms

        if self.carried is None or self._is_short():
            self._piece(0, self.blocks, first, last)
            self.job.advance(self.batch * (last - first))
            return

        def work(start: int, stop: int, tables: Any = tables) -> None:
            while start < stop and not self.job.stopped:
                count = self._within_budget(last - first, stop - start)
                self._through(start, start + count, first, last)
                start += count

        split(work, self.blocks, max(1, int(_GRAIN / max(trajectory._cost * (last - first), 1.0))), self.job)

    def _through(self, start: int, stop: int, first: int, last: int) -> None:
        """Some blocks through all steps of a stretch, in segments; measures what they cost."""
        trajectory, k, most = self.trajectory, first, last - first
        paths = min(stop * trajectory._kernel.lanes, self.batch) - start * trajectory._kernel.lanes
        while True:
            count = min(most, self._within_budget(stop - start, last - k))
            begin = time.perf_counter_ns()
            self._piece(start, stop, k, k + count)
            took = time.perf_counter_ns() - begin
            self.job.advance(paths * count)
            k += count
            if k >= last or self.job.stopped:
                return
            trajectory._measured = took / ((stop - start) * count)
            most = 8 * count  # should the clock be wrong

    def _within_budget(self, factor: int, most: int) -> int:
        """How many blocks, times so many steps, or steps, times so many blocks, fit into the budget; up to `most`."""
        return max(1, min(most, int(_BUDGET / max(self.trajectory._measured * factor, 1e-3))))

    def _piece(self, start: int, stop: int, first: int, last: int) -> None:
        """Calls the kernel for some blocks and some steps."""
        a = _Arguments.from_buffer_copy(self.arguments)
        a.first_step, a.last_step = first, last
        saves = self.launch.saves
        if first == self.first:
            a.first_slot = bisect.bisect_left(saves, first)
        else:  # what is saved after step `first` was saved at the end of the piece before
            a.first_slot = bisect.bisect_right(saves, first)
        if self.carried is not None and first > self.first:
            a.x_in, a.in_width = self.carried.data_ptr(), self.full
        a.x_out, a.out_width = self.x1.data_ptr(), self.width
        if self.carried is not None and (last < self.last or self.full > self.width):
            a.x_out, a.out_width = self.carried.data_ptr(), self.full
        memory, address = scratch(self.trajectory._kernel.scratch)
        self.trajectory._entry(ctypes.addressof(a), address, start, stop)
        del memory  # not before the kernel is done with it


def _int64s(*values: int) -> Any:
    return (ctypes.c_int64 * len(values))(*values)
