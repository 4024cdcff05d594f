"""Generated Triton reverse kernels behind the launch layer: tiles of paths by programs, each tile with sums of its own.

How many paths a tile has depends on the batch alone, and tiles are added up in an order that depends on their number
alone: sums over paths have the same bits in every run and for any number of programs.
"""

from __future__ import annotations

import collections
import functools
from collections.abc import Sequence
from typing import final

import torch
from torch import Tensor

from sdesolve_kernels._triton.arguments import launch
from sdesolve_kernels._triton.paths import add_up_kernel
from sdesolve_kernels.threads import Job
from sdesolve_kernels.trajectory.expressions import topological
from sdesolve_kernels.trajectory.launch import AbstractReverse, Moments, Sweep, combined, contiguous, listed
from sdesolve_kernels.trajectory.reverse import Reverse
from sdesolve_kernels.trajectory.triton_generated import Generated, is_steady, moved, nanoseconds, shape_for
from sdesolve_kernels.trajectory.triton_reverse import reverse_kernel
from sdesolve_kernels.trajectory.triton_source import Shape, TritonKernel

__all__ = ["TritonReverse"]

_LANES_AT_ONCE = 1 << 17  # of all programs: what fills a large GPU
_TAPE = 32 << 20  # bytes of the tapes of all programs, which are to stay in the second-level cache
_FEWEST, _LONGEST = 4, 1024  # steps on a tape
_SEGMENTS = 64  # in a stretch
_SUMS = 32 << 20  # bytes of sums of all tiles
_AT_ONCE = 250_000_000.0  # nanoseconds of a stretch
_ROWS, _WIDTH = 64, 16  # numbers that are added up at a time


@final
class TritonReverse(AbstractReverse):
    """Generated Triton kernels of one reverse: one for each `Shape` that a sweep turns out to need.

    Attributes:
        source: of the kernel that ran last.
    """

    def __init__(self, reverse: Reverse, increments: Sequence[str]) -> None:
        self._reverse, self._increments = reverse, tuple(increments)
        plan = reverse.plan
        self._operations = len(topological([*plan.states, *reverse.step.states, *reverse.step.sums]))
        self._kernels: dict[Shape, TritonKernel] = {}
        self._generated = Generated()
        self.source = self._kernel(Shape(128, 4)).source

    def _kernel(self, shape: Shape) -> TritonKernel:
        if shape not in self._kernels:
            self._kernels[shape] = reverse_kernel(self._reverse, self._increments, shape)
        return self._kernels[shape]

    def _cut(self, lanes: int, batch: int) -> tuple[int, int, int]:
        """Tiles, programs, and the steps of a segment."""
        tiles = -(-batch // lanes)
        step = lanes * len(self._reverse.plan.states) * self._reverse.plan.program.signature.dtype.itemsize
        programs = max(1, min(tiles, _LANES_AT_ONCE // lanes, _TAPE // (_FEWEST * step)))
        return tiles, programs, max(_FEWEST, min(_LONGEST, _TAPE // (programs * step)))

    def steps(self, batch: int, columns: int) -> tuple[int, int]:
        tiles, _, segment = self._cut(_shape(batch).lanes, batch)
        by_time = max(segment, int(_AT_ONCE / nanoseconds(self._operations, batch)))
        by_sums = _SUMS // (8 * tiles * columns) if columns else by_time
        most = max(1, min(_SEGMENTS * segment, by_time, by_sums))
        return min(segment, most), most

    def run(self, sweep: Sweep) -> Moments | None:
        run, plan, reverse = sweep.launch, self._reverse.plan, self._reverse
        batch, steps, device = len(sweep.starts), run.end - run.first_step, sweep.starts.device
        if not batch:
            return None
        first, last = sweep.slots
        keep, moments = (last >= first and t is not None for t in (sweep.saved, sweep.moments))
        steady = is_steady(plan, sweep.table)
        each_step = sweep.each_step and bool(reverse.columns)
        ends = sweep.ends if moments else None
        kind = {"keep": keep, "moments": moments, "steady": steady, "each_step": each_step, "ends": ends is not None}
        kernel = self._kernel(_shape(batch, **kind))
        self.source = kernel.source
        tiles, programs, segment = self._cut(kernel.shape.lanes, batch)
        segment = min(segment, steps)
        table, uniforms = moved(sweep.table[:1] if steady else sweep.table, sweep.uniforms, device)
        a_lane = kernel.scratch + (-(-steps // segment) + segment) * len(plan.states)
        scratch = torch.empty(programs * kernel.shape.lanes * a_lane, dtype=sweep.starts.dtype, device=device)
        parts = sweep.sums.new_zeros(tiles, kernel.parts)
        pointers = [sweep.starts, sweep.cotangents, table, uniforms, scratch, parts]
        by_step = sweep.columns.new_zeros(tiles, *sweep.columns.shape) if each_step else None
        pointers += [t for t in (by_step, sweep.path_sums if reverse.path_invariants else None) if t is not None]
        integers = [batch, steps, segment]
        seen = sweep.saved if keep else sweep.moments if moments else None
        if seen is not None:
            saves = [-1, *(k - run.first_step for k in run.saves[first : last + 1])]
            on_host = torch.tensor(saves, dtype=torch.int64, device="cpu")
            pointers += [on_host.to(device, non_blocking=True), seen[first:]]
            integers.append(last + 1 - first)
        values: Tensor | None = None
        if ends is not None:
            values = parts.new_empty(last + 1 - first, tiles, 2, kernel.width)
            pointers += [ends, values]
        captured = [contiguous(c, plan.program.captured[i].dtype) for i, c in enumerate(run.captured)]
        normals = zip(run.places, plan.noises, strict=True)
        places = [(*place[:3], place[3] + run.first_step * m) for place, m in normals]
        numbers = listed(run) if plan.program.signature.listed else None
        self._generated.launch(kernel, programs, pointers, integers, captured, places, numbers)
        if by_step is not None:
            _add_up(by_step.flatten(1), sweep.columns)
        added, columns = parts.new_zeros(kernel.parts), 0 if each_step else len(reverse.columns)
        _add_up(parts, added)
        sums = parts.new_zeros(columns + reverse.totals)
        for terms, targets in _rounds(kernel, device):
            sums[targets] += added[terms]
        if columns:
            sweep.columns[0] += sums[:columns]
        sweep.sums.add_(sums[columns:])
        if values is None:
            return None
        Job(run.progress).advance(batch * steps)
        return combined(values, kernel.shape.lanes, batch)


@functools.lru_cache(maxsize=64)
def _rounds(kernel: TritonKernel, device: torch.device) -> list[tuple[Tensor, Tensor]]:
    """The places of terms and the sums they belong to, each sum at most once in a round: that fixes their order."""
    rounds: list[dict[int, int]] = []
    seen: collections.Counter[int] = collections.Counter()
    for place, target in kernel.entries:
        if seen[target] == len(rounds):
            rounds.append({})
        rounds[seen[target]][target] = place
        seen[target] += 1
    return [(torch.tensor([*r.values()], device=device), torch.tensor([*r], device=device)) for r in rounds]


def _shape(batch: int, **kind: bool) -> Shape:
    """As of a run, with a path to a thread: there is more to keep in registers."""
    return shape_for(batch, 1 << 30, **{"keep": False, "moments": False, "steady": False, **kind})


def _add_up(parts: Tensor, out: Tensor) -> None:
    """Adds parts, a row a tile, to numbers."""
    width = out.numel()
    if width:
        launch(
            add_up_kernel,
            (-(-width // _WIDTH), 1, 1),
            out.device,
            {"parts": parts, "out": out, "tiles": len(parts), "width": width, "ROWS": _ROWS, "WIDTH": _WIDTH},
        )
