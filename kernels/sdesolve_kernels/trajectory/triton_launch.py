"""Generated Triton kernels behind the launch layer: runs in launches of some steps."""

from __future__ import annotations

import bisect
import collections
import math
import time
from collections.abc import Iterator, Sequence
from typing import Any, final

import torch
from torch import Tensor

from sdesolve_kernels.threads import Job
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
from sdesolve_kernels.trajectory.plan import Plan
from sdesolve_kernels.trajectory.reverse import Reverse
from sdesolve_kernels.trajectory.triton_backward import TritonReverse
from sdesolve_kernels.trajectory.triton_generated import Generated, is_steady, moved, nanoseconds, shape_for
from sdesolve_kernels.trajectory.triton_source import Shape, TritonKernel, triton_kernel

__all__ = ["TritonTrajectory"]

_AT_ONCE = 500_000_000.0  # nanoseconds of a run that is one launch


@final
class TritonTrajectory(AbstractTrajectory):
    """Generated Triton kernels of one plan: one for each `Shape` that a launch turns out to need.

    A run is one launch unless it is expected to take more than `_AT_ONCE`. A longer one is launched in segments of
    steps: the first is expected to take a tenth of that, the others are sized by how long those before them took. One
    segment is always queued while another runs; the host waits for the one before, and can be interrupted there.

    Attributes:
        source: of the kernel that ran last.
    """

    def __init__(self, plan: Plan, increments: Sequence[str]) -> None:
        self.plan, self._increments = plan, tuple(increments)
        self._operations = len(topological(plan.states))
        self._tables = self.tables = Tables(plan)
        self._kernels: dict[Shape, TritonKernel] = {}
        self._generated = Generated()
        self.source = self._kernel(Shape(128, 4)).source

    def _kernel(self, shape: Shape) -> TritonKernel:
        if shape not in self._kernels:
            self._kernels[shape] = triton_kernel(self.plan, self._increments, shape)
        return self._kernels[shape]

    def reverse(self, reverse: Reverse, seconds: float = math.inf) -> AbstractReverse:
        return TritonReverse(reverse, self._increments)

    def run(self, launch: Launch) -> Saved:
        plan, device, job = self.plan, launch.x0.device, Job(launch.progress)
        x0 = launch.x0.detach().resolve_neg().contiguous()
        batch, slots, width, full = len(x0), len(launch.saves), math.prod(x0.shape[1:]), len(plan.states)
        table, uniforms = self._tables(launch, launch.first_step, launch.end)
        steady = is_steady(plan, table)
        keep, moments = slots > 0 and not launch.moments, slots > 0 and launch.moments
        kernel = self._kernel(shape_for(batch, self._operations, keep=keep, moments=moments, steady=steady))
        self.source = kernel.source
        table, uniforms = moved(table[:1] if steady else table, uniforms, device)
        captured = [contiguous(c, plan.program.captured[i].dtype) for i, c in enumerate(launch.captured)]
        x_in, x_out = x0, torch.empty_like(x0)
        if full > width:
            memory = x0.new_zeros(batch, full - width) if launch.memory is None else launch.memory.to(x0)
            x_in = torch.cat([x0.reshape(batch, width), memory], 1)
            x_out = torch.empty_like(x_in)
        saves: Tensor | None = None
        saved: Tensor | None = None
        if slots:
            saves = torch.tensor(launch.saves, dtype=torch.int64, device="cpu").to(device, non_blocking=True)
            programs = -(-batch // kernel.shape.lanes)
            size, dtype = ((programs, 2), torch.float64) if moments else ((batch,), x0.dtype)
            saved = torch.empty(slots, *size, kernel.width, dtype=dtype, device=device)
        numbers = listed(launch) if plan.program.signature.listed else None
        for k, stop in self._segments(launch, batch, job) if batch else ():
            begin = k - launch.first_step
            rows = table if steady or not plan.columns else table[begin:]
            chosen = None
            if saves is not None and saved is not None:
                chosen = _saves_between(launch, saves, saved, k, stop)
            normals = [math.prod(shape) for shape in plan.program.signature.noises]
            places = [(*place[:3], place[3] + k * m) for place, m in zip(launch.places, normals, strict=True)]
            self._launch(kernel, x_in, x_out, rows, uniforms, captured, places, stop - k, chosen, numbers)
            x_in = x_out
        x1, remembered = x_out, None
        if full > width:
            x1, remembered = x_out[:, :width].reshape(x0.shape), x_out[:, width:]
        if saved is not None and moments:
            return Saved(x1, None, combined(saved, kernel.shape.lanes, batch), remembered)
        return Saved(x1, saved, None, remembered)

    def _segments(self, launch: Launch, batch: int, job: Job) -> Iterator[tuple[int, int]]:
        """Pairs of steps between which to launch; waits, in between, for the launch before the last."""
        device, k, last = launch.x0.device, launch.first_step, launch.end
        cost = nanoseconds(self._operations, batch)
        count = max(last - k, 1)
        if cost * count > _AT_ONCE and not (device.type == "cuda" and torch.cuda.is_current_stream_capturing()):
            count = max(1, int(_AT_ONCE / 10 / cost))
        queued: collections.deque[tuple[Any, int]] = collections.deque()
        before = time.perf_counter_ns()
        while True:
            stop = min(k + count, last)
            yield k, stop
            if stop == last:
                break
            queued.append((_mark(device), stop - k))
            if len(queued) > 1:
                mark, taken = queued.popleft()
                mark.synchronize()
                job.advance(batch * taken)
                now = time.perf_counter_ns()
                took, before = max(now - before, 1), now
                count = max(1, min(8 * taken, int(_AT_ONCE / 5 * taken / took)))
            k = stop
        job.advance(batch * (last - k + sum(taken for _, taken in queued)))

    def _launch(
        self, kernel: TritonKernel, x_in: Tensor, x_out: Tensor, table: Tensor, uniforms: Tensor,
        captured: Sequence[Tensor], places: Sequence[tuple[int, ...]], steps: int,
        saves: tuple[Tensor, Tensor, int] | None, numbers: Tensor | None = None,
    ) -> None:  # fmt: skip
        """Launches a kernel on the current stream.

        Args:
            kernel: made for the device of ``x_in``.
            x_in: ``(paths, states)``, contiguous; with what the solver remembers, if it does.
            x_out: likewise; may be ``x_in``.
            table: ``(steps, columns)``, contiguous.
            uniforms: ``(uniforms,)``.
            captured: tensors the program reads, contiguous.
            places: seed, stream, first path and index of the first number of each source of noise.
            steps: how many to take.
            saves: steps after which to save, increasing, int64; where to, ``(saves, paths, width)``, or for moments
                float64 ``(saves, programs, 2, width)``: mean, then sum of squared deviations; and how many. ``None`` if
                the kernel does not save.
            numbers: of the rows' paths, where they are listed.
        """
        paths = len(x_in)
        chosen = () if saves is None else saves
        pointers, integers = [x_in, x_out, table, uniforms, *chosen[:2]], [paths, steps, *chosen[2:]]
        self._generated.launch(kernel, -(-paths // kernel.shape.lanes), pointers, integers, captured, places, numbers)


def _saves_between(launch: Launch, saves: Tensor, saved: Tensor, k: int, stop: int) -> tuple[Tensor, Tensor, int]:
    """Steps of a segment after which to save, counted from its start; where to; and how many they are."""
    # What is saved at the start of a segment was saved at the end of the one before.
    first = (bisect.bisect_left if k == launch.first_step else bisect.bisect_right)(launch.saves, k)
    count = bisect.bisect_right(launch.saves, stop) - first
    if count == 0:
        return saves, saved, 0
    chosen = saves[first : first + count]
    return chosen - k if k else chosen, saved[first:], count


class _Done:
    """A mark that is reached at once: the interpreter returns when it is done."""

    def synchronize(self) -> None:
        pass


def _mark(device: torch.device) -> Any:
    """A mark after what was launched so far, to wait for."""
    if device.type != "cuda":
        return _Done()
    event = torch.cuda.Event(blocking=True)
    event.record(torch.cuda.current_stream(device))
    return event
