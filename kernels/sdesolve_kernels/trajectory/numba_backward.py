"""Generated reverse kernels behind the launch layer: groups of blocks by threads, each group with sums of its own.

Which blocks make a group depends on the batch alone. A group is gone through in order, and groups are added up in
order, so that sums over paths have the same bits for any number of threads.
"""

from __future__ import annotations

import ctypes
import math
import time
from collections.abc import Sequence
from typing import Any, final

import numpy as np
import torch
from torch import Tensor

from sdesolve_kernels.backend import int64_bits
from sdesolve_kernels.threads import Job, scratch, split
from sdesolve_kernels.trajectory.expressions import topological
from sdesolve_kernels.trajectory.launch import AbstractReverse, Moments, Sweep, combined, contiguous, listed
from sdesolve_kernels.trajectory.numba_reverse import REVERSE_ARGUMENTS, reverse_kernel
from sdesolve_kernels.trajectory.numba_source import compiled
from sdesolve_kernels.trajectory.reverse import Reverse

__all__ = ["NumbaReverse"]

_GROUPS = 64  # at most: as many threads can work
# Bytes of a tape. Lotka-Volterra there and back at once, 2000 steps, in units of the value alone: 2.2 on tapes of 1 MB,
# where noise is made twice, 1.5 on tapes of 4 MB, which are beyond a second-level cache, and 1.6 on 16 MB.
_TAPE = 4 << 20
_FEWEST, _LONGEST = 4, 4096  # steps on a tape
_SEGMENTS = 64  # in a stretch
_SUMS = 8 << 20  # bytes of sums of all groups
_GRAIN = 100_000.0  # as in `numba_launch`
_BUDGET = 30_000_000.0
_CAREFUL = 16.0


class _Arguments(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int64) for name in REVERSE_ARGUMENTS]


@final
class NumbaReverse(AbstractReverse):
    """A generated reverse kernel."""

    def __init__(self, reverse: Reverse, increments: Sequence[str], seconds: float = math.inf) -> None:
        self._reverse, self._kernel = reverse, reverse_kernel(reverse, increments)
        self.source = self._kernel.source
        self._entry = compiled(self.source, seconds, "reverse")
        plan = reverse.plan
        operations = len(topological([*plan.states, *reverse.step.states, *reverse.step.sums]))
        operations += sum(3 * m.rows * m.columns for m in plan.matrices)
        # Nanoseconds that a block takes for a step there and back.
        self._cost = self._kernel.lanes * (0.1 * operations + 0.5 * sum(plan.noises))

    @property
    def _segment(self) -> int:
        return min(max(_FEWEST, _TAPE // self._kernel.step), _LONGEST)

    def _groups(self, blocks: int) -> int:
        return max(1, min(_GROUPS, -(-blocks // 2), _SUMS // (8 * max(1, self._reverse.totals))))

    def steps(self, batch: int, columns: int) -> tuple[int, int]:
        segment, groups = self._segment, self._groups(-(-batch // self._kernel.lanes))
        by_time = int(_BUDGET / self._cost)
        by_sums = _SUMS // (8 * groups * columns) if columns else by_time
        most = max(1, min(_SEGMENTS * segment, max(by_time, segment), by_sums))
        return min(segment, most), most

    def run(self, sweep: Sweep) -> Moments | None:
        return _Run(self, sweep).finished()


@final
class _Run:
    """One sweep, and the memory that its threads read and write."""

    def __init__(self, owner: NumbaReverse, sweep: Sweep) -> None:
        launch, kernel, plan = sweep.launch, owner._kernel, owner._reverse.plan
        self.owner, self.sweep, self.steps = owner, sweep, launch.end - launch.first_step
        self.job = Job(None if sweep.ends is None else launch.progress)
        self.batch, self.blocks = len(sweep.starts), -(-len(sweep.starts) // kernel.lanes)
        self.groups = owner._groups(self.blocks)
        segment = min(owner._segment, self.steps)
        self.bytes = kernel.rows + kernel.start * -(-self.steps // segment) + kernel.step * segment + kernel.spare
        self.columns = np.zeros((self.groups, *sweep.columns.shape))
        self.sums = np.zeros((self.groups, *sweep.sums.shape))
        self.values: Tensor | None = None
        if sweep.ends is not None and sweep.moments is not None:
            self.values = torch.empty(len(launch.saves), self.blocks, 2, plan.width, dtype=torch.float64, device="cpu")
        captured = [contiguous(c, plan.program.captured[i].dtype) for i, c in enumerate(launch.captured)]
        noise = [int64_bits(number) for place in launch.places for number in place]
        lists = [_int64s(*launch.saves, -1), _int64s(*noise, 0), _int64s(*(c.data_ptr() for c in captured), 0)]
        saves, places, pointers = map(ctypes.addressof, lists)
        rows = listed(launch, kernel.lanes) if plan.program.signature.listed else None
        self.memory = captured, lists, rows
        first, last = sweep.slots
        a = launch.first_step
        offset = a * len(plan.columns) * sweep.table.element_size()
        self.arguments = _Arguments(
            x_in=sweep.starts.data_ptr(), cotangents=sweep.cotangents.data_ptr(), first_step=a, last_step=launch.end,
            segment=segment, paths=self.batch, table=sweep.table.data_ptr() - offset,
            uniforms=sweep.uniforms.data_ptr(), first_slot=first, last_slot=last, saves=saves,
            saved=_address(sweep.saved), moments=_address(sweep.moments), ends=_address(sweep.ends),
            values=_address(self.values), noise=places, pointers=pointers,
            each_step=sweep.each_step, path_sums=sweep.path_sums.data_ptr(), columns=self.columns.ctypes.data,
            sums=self.sums.ctypes.data, blocks=self.blocks, groups=self.groups, column_sums=sweep.columns.numel(),
            rows=0 if rows is None else rows.data_ptr(),
        )  # fmt: skip
        self.cost = owner._cost * self.steps

    def finished(self) -> Moments | None:
        """Goes through all groups, and adds up what they leave, in order."""
        a_group = self.cost * self.blocks / self.groups
        split(self._work, self.groups, max(1, int(_GRAIN / max(a_group, 1.0))), self.job)
        for total, parts in ((self.sweep.columns, self.columns), (self.sweep.sums, self.sums)):
            if total.numel():
                total += torch.from_numpy(np.add.reduce(parts, axis=0))
        return None if self.values is None else combined(self.values, self.owner._kernel.lanes, self.batch)

    def _work(self, start: int, stop: int) -> None:
        """All blocks of some groups, as many at a time as an interrupt may wait for."""
        block, end = self.blocks * start // self.groups, self.blocks * stop // self.groups
        count = max(1, int(_BUDGET / (_CAREFUL * self.cost)))
        while block < end and not self.job.stopped:
            until = min(block + count, end)
            begin = time.perf_counter_ns()
            memory, address = scratch(self.bytes)
            self.owner._entry(ctypes.addressof(self.arguments), address, block, until)
            del memory  # not before the kernel is done with it
            took = max(1, time.perf_counter_ns() - begin)
            count = max(1, min(8 * count, int((until - block) * _BUDGET / took)))
            lanes = self.owner._kernel.lanes
            self.job.advance((min(until * lanes, self.batch) - block * lanes) * self.steps)
            block = until


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _int64s(*values: int) -> Any:
    return (ctypes.c_int64 * len(values))(*values)
