"""Generated Triton sources as kernels: how a batch is cut into programs, compiling, launching.

Triton keeps compiled kernels on disk under their content; a trajectory keeps one for each source and device. After the
first launch Triton's own argument handling is passed by: no argument is specialised on its value or alignment, so
nothing is left for it to decide.
"""

from __future__ import annotations

import functools
import hashlib
import linecache
from collections.abc import Sequence
from typing import Any, final

import torch
from torch import Tensor

from sdesolve_kernels._triton import arguments as triton
from sdesolve_kernels.backend import int64_bits
from sdesolve_kernels.trajectory.plan import Plan
from sdesolve_kernels.trajectory.triton_source import Shape, TritonKernel

__all__ = ["Generated", "is_steady", "load", "moved", "nanoseconds", "shape_for"]

_WIDE_FROM = 1 << 16  # paths
_SMALL_STEP = 60  # operations
_OPTIONS = {"enable_fp_fusion": False}  # multiply-adds are in the source
_LATENCY, _THROUGHPUT = 4.0, 1e-4  # nanoseconds, at most, of an operation: of one path, and for each of very many


def shape_for(
    paths: int, operations: int, *, keep: bool, moments: bool, steady: bool, each_step: bool = False, ends: bool = False
) -> Shape:
    """How to cut a batch into programs.

    Few paths go in programs of one warp, so that they spread over the multiprocessors; of many, a thread takes two if
    the step is small: what all paths share is then read once for both.
    """
    if paths < _WIDE_FROM:
        return Shape(32, 1, keep, moments, steady, each_step, ends)
    each = 2 if operations <= _SMALL_STEP else 1
    return Shape(128 * each, 4, keep, moments, steady, each_step, ends)


def nanoseconds(operations: int, paths: int) -> float:
    """What a step of so many operations takes, at most."""
    return operations * max(_LATENCY, _THROUGHPUT * paths)


@functools.lru_cache(maxsize=256)
def load(source: str) -> Any:
    """The kernel of a generated source."""
    name = f"<sdesolve {hashlib.sha256(source.encode()).hexdigest()[:12]}>"
    linecache.cache[name] = (len(source), None, source.splitlines(keepends=True), name)
    names: dict[str, Any] = {"__name__": "sdesolve_trajectory", "__file__": name}
    exec(compile(source, name, "exec"), names)
    return names["trajectory"]


@final
class Generated:
    """Launches generated kernels; compiles each once for a device."""

    def __init__(self) -> None:
        self._compiled: dict[tuple[str, int], Any] = {}

    def launch(
        self, kernel: TritonKernel, programs: int, pointers: Sequence[Tensor], integers: Sequence[int],
        captured: Sequence[Tensor], places: Sequence[tuple[int, ...]], numbers: Tensor | None = None,
    ) -> None:  # fmt: skip
        """Launches a kernel on the current stream of the device of its first pointer.

        Args:
            kernel: what to launch.
            programs: of the grid.
            pointers: tensors that it takes before the program's.
            integers: that it takes before those of noise.
            captured: tensors the program reads, contiguous.
            places: seed, stream, first path and index of the first number of each source of noise.
            numbers: of the rows' paths, where they are listed.
        """
        listed = () if numbers is None else (numbers,)
        noise = [int64_bits(number) for g in kernel.sources for number in places[g]]
        arguments = [*pointers, *(captured[i] for i in kernel.parameters), *listed, *integers, *noise]
        grid, function, warps = (programs, 1, 1), load(kernel.source), kernel.shape.warps

        def recorded() -> triton.Launch:
            named = dict(zip(function.arg_names, arguments, strict=True))
            path_steps = max(kernel.group, 1) * kernel.shape.lanes // (32 * warps)
            return triton.Launch(function, grid, named, warps, False, path_steps)

        if triton.record(recorded):
            return
        if triton.INTERPRETED:
            function[grid](*arguments, num_warps=warps, **_OPTIONS)
            return
        with torch.cuda.device(pointers[0].device):
            key = kernel.source, torch.cuda.current_device()
            compiled = self._compiled.get(key)
            if compiled is None:
                options = {"num_warps": warps, **_OPTIONS}
                compiled = self._compiled[key] = function.warmup(*arguments, **options, grid=grid)
            compiled[grid](*arguments)


def is_steady(plan: Plan, table: Tensor) -> bool:
    """Whether all steps have the same row of the table."""
    return bool(plan.columns) and len(table) > 0 and torch.equal(table, table[:1].expand_as(table))


def moved(table: Tensor, uniforms: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    """Both on the device, in one copy."""
    if device.type == "cpu":
        return table, uniforms
    columns = table.shape[1:]
    both = torch.cat([table.reshape(-1), uniforms]).to(device, non_blocking=True)
    return both[: table.numel()].reshape(-1, *columns), both[table.numel() :]
