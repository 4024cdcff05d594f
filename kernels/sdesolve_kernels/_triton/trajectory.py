"""Generated trajectory kernels: from source to a launch.

Triton keeps compiled kernels on disk under their content; what is kept here is one compiled kernel for each source and
device in this process. After the first launch Triton's own argument handling is passed by: no argument is specialised
on its value or alignment, so nothing is left for it to decide.
"""

from __future__ import annotations

import functools
import hashlib
import linecache
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sdesolve_kernels.trajectory.triton_source import Shape, TritonKernel

from .arguments import INTERPRETED, Launch, record, signed

__all__ = ["load", "run", "shape_for"]

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


def run(
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
        arguments += [signed(seed), *rest]
    if saves is not None:
        arguments.append(slots)
    grid = (-(-paths // kernel.shape.lanes), 1, 1)
    function = load(kernel.source)
    warps = kernel.shape.warps

    def launch() -> Launch:
        named = dict(zip(function.arg_names, arguments, strict=True))
        return Launch(function, grid, named, warps, False, max(kernel.group, 1) * kernel.shape.lanes // (32 * warps))

    if record(launch):
        return
    if INTERPRETED:
        function[grid](*arguments, num_warps=warps, **_OPTIONS)
        return
    with torch.cuda.device(x_in.device):
        key = kernel.source, torch.cuda.current_device()
        compiled = _compiled.get(key)
        if compiled is None:
            options = {"num_warps": warps, **_OPTIONS}
            compiled = _compiled[key] = function.warmup(*arguments, **options, grid=grid)
        compiled[grid](*arguments)
