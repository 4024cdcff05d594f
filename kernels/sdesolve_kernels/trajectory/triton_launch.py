"""Generated Triton kernels behind the launch layer: from source to launches.

Triton keeps compiled kernels on disk under their content; what is kept here is one compiled kernel for each source and
device in this process. After the first launch Triton's own argument handling is passed by: no argument is specialised
on its value or alignment, so nothing is left for it to decide.
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
from sdesolve_kernels.trajectory.expressions import topological
from sdesolve_kernels.trajectory.launch import AbstractTrajectory, Launch, Saved, combined, contiguous, tables
from sdesolve_kernels.trajectory.plan import Plan
from sdesolve_kernels.trajectory.triton_source import Shape, TritonKernel, triton_kernel

__all__ = ["TritonTrajectory", "shape_for"]

_WIDE_FROM = 1 << 16  # paths
_SMALL_STEP = 60  # operations
_OPTIONS = {"enable_fp_fusion": False}  # multiply-adds are in the source
_compiled: dict[tuple[str, int], Any] = {}


def shape_for(paths: int, operations: int, *, keep: bool, moments: bool, steady: bool) -> Shape:
    """How to cut a batch into programs.

    Few paths go in programs of one warp, so that they spread over the multiprocessors; of many, a thread takes two if
    the step is small: what all paths share is then read once for both.
    """
    if paths < _WIDE_FROM:
        return Shape(32, 1, keep, moments, steady)
    each = 2 if operations <= _SMALL_STEP else 1
    return Shape(128 * each, 4, keep, moments, steady)


@functools.lru_cache(maxsize=1024)
def load(source: str) -> Any:
    """The kernel of a generated source."""
    name = f"<sdesolve {hashlib.sha256(source.encode()).hexdigest()[:12]}>"
    linecache.cache[name] = (len(source), None, source.splitlines(keepends=True), name)
    names: dict[str, Any] = {"__name__": "sdesolve_trajectory", "__file__": name}
    exec(compile(source, name, "exec"), names)
    return names["trajectory"]


@final
class TritonTrajectory(AbstractTrajectory):
    """Generated Triton kernels of one plan: one for each `Shape` that a launch turns out to need.

    Attributes:
        source: of the kernel that ran last.
    """

    def __init__(self, plan: Plan, increments: Sequence[str]) -> None:
        self.plan, self._increments = plan, tuple(increments)
        self._operations = len(topological(plan.states))
        self._kernels: dict[Shape, TritonKernel] = {}
        self.source = self._kernel(Shape(128, 4)).source

    def _kernel(self, shape: Shape) -> TritonKernel:
        if shape not in self._kernels:
            self._kernels[shape] = triton_kernel(self.plan, self._increments, shape)
        return self._kernels[shape]

    def run(self, launch: Launch) -> Saved:
        plan, device = self.plan, launch.x0.device
        x0 = launch.x0.detach().contiguous()
        batch, steps, slots = len(x0), len(launch.times) - 1, len(launch.saves)
        table, uniforms = tables(plan, launch)
        steady = bool(plan.columns) and steps > 0 and torch.equal(table, table[:1].expand_as(table))
        keep, moments = slots > 0 and not launch.moments, slots > 0 and launch.moments
        kernel = self._kernel(shape_for(batch, self._operations, keep=keep, moments=moments, steady=steady))
        self.source = kernel.source
        table, uniforms = _moved(table[:1] if steady else table, uniforms, device)
        captured = [contiguous(c, plan.program.captured[i].dtype) for i, c in enumerate(launch.captured)]
        x1 = torch.empty_like(x0)
        saves: Tensor | None = None
        saved: Tensor | None = None
        if slots:
            saves = torch.tensor(launch.saves, dtype=torch.int64, device="cpu").to(device, non_blocking=True)
            programs = -(-batch // kernel.shape.lanes)
            size, dtype = ((programs, 2), torch.float64) if moments else ((batch,), x0.dtype)
            saved = torch.empty(slots, *size, kernel.width, dtype=dtype, device=device)
        if batch:
            _run(kernel, x0, x1, table, uniforms, captured, launch.places, steps, saves, saved)
        if saved is not None and moments:
            return Saved(x1, None, combined(saved, kernel.shape.lanes, batch))
        return Saved(x1, saved, None)


def _moved(table: Tensor, uniforms: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    """Both on the device, in one copy."""
    if device.type == "cpu":
        return table, uniforms
    both = torch.cat([table.reshape(-1), uniforms]).to(device, non_blocking=True)
    return both[: table.numel()], both[table.numel() :]


def _run(
    kernel: TritonKernel, x_in: Tensor, x_out: Tensor, table: Tensor, uniforms: Tensor, captured: Sequence[Tensor],
    places: Sequence[tuple[int, int, int, int]], steps: int,
    saves: Tensor | None = None, saved: Tensor | None = None,
) -> None:  # fmt: skip
    """Launches a kernel on the current stream.

    Args:
        kernel: made for the device of ``x_in``.
        x_in: ``(paths, carried)``, contiguous.
        x_out: likewise; may be ``x_in``.
        table: ``(steps, columns)``, contiguous.
        uniforms: ``(uniforms,)``.
        captured: tensors the program reads, contiguous.
        places: seed, stream, first path and index of the first number of each source of noise.
        steps: how many to take.
        saves: steps after which to save, increasing, int64, if the kernel's shape says to save.
        saved: ``(saves, paths, width)``, or for moments float64 ``(saves, programs, 2, width)``: mean, then sum of
            squared deviations.
    """
    paths = len(x_in)
    arguments: list[Any] = [x_in, x_out, table, uniforms, *(captured[i] for i in kernel.parameters)]
    slots = 0
    if saves is not None:
        arguments += [saves, saved]
        slots = len(saves)
    arguments += [paths, steps]
    for g in kernel.sources:
        seed, *rest = places[g]
        arguments += [int64_bits(seed), *rest]
    if saves is not None:
        arguments.append(slots)
    grid = (-(-paths // kernel.shape.lanes), 1, 1)
    function = load(kernel.source)
    warps = kernel.shape.warps

    def launch() -> triton.Launch:
        named = dict(zip(function.arg_names, arguments, strict=True))
        return triton.Launch(
            function, grid, named, warps, False, max(kernel.group, 1) * kernel.shape.lanes // (32 * warps)
        )

    if triton.record(launch):
        return
    if triton.INTERPRETED:
        function[grid](*arguments, num_warps=warps, **_OPTIONS)
        return
    with torch.cuda.device(x_in.device):
        key = kernel.source, torch.cuda.current_device()
        compiled = _compiled.get(key)
        if compiled is None:
            options = {"num_warps": warps, **_OPTIONS}
            compiled = _compiled[key] = function.warmup(*arguments, **options, grid=grid)
        compiled[grid](*arguments)
