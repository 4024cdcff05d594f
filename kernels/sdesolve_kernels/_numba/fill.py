"""From a torch tensor to the noise kernels: layout, choice of kernel, threads."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..backend import Index
from ..threads import split
from .noise import columns, rows

__all__ = ["fill"]

_entries: dict[tuple[Any, torch.dtype], Callable[..., None]] = {}
_GRAIN = 1 << 17  # numbers a thread makes at least: 60 us of work in float32, a little more than the handing over


def _two_levels(shape: torch.Size, stride: tuple[int, ...]) -> tuple[int, int, int] | None:
    """Strides and inner size of dimensions as ``k * inner + c``, or None if they do not merge into two.

    Returns ``(outer_stride, inner_stride, inner)``.
    """
    merged: list[tuple[int, int]] = []
    for n, s in zip(shape, stride, strict=True):
        if n == 1:
            continue
        if merged and merged[-1][1] == n * s:
            merged[-1] = (merged[-1][0] * n, s)
        else:
            merged.append((n, s))
    if len(merged) > 2:
        return None
    inner, inner_stride = merged[-1] if merged else (1, 1)
    outer_stride = merged[0][1] if len(merged) == 2 else 0
    return outer_stride, inner_stride, inner


def fill(kind: str, out: Tensor, *, seed: Index, stream: int, first_path: Index, offset: Index) -> None:
    """Write numbers of `kind` ("normal", "uniform", "words") into a CPU tensor of shape ``(paths, ...)``, any strides.

    The dimensions after the first hold the entries of a path in row-major order. The type is a floating one, and int64
    for words.
    """
    if out.numel() == 0:
        return
    if out.dtype in (torch.float16, torch.bfloat16):
        wide = torch.empty(out.shape, dtype=torch.float32, device="cpu")
        fill(kind, wide, seed=seed, stream=stream, first_path=first_path, offset=offset)
        out.copy_(wide)
        return
    paths = out.shape[0]
    count = out.numel() // paths
    if out.is_contiguous():
        outer_stride, inner_stride, inner = 0, 1, count
        strides = (count, 0, 1)
        flat = (out.detach() if out.requires_grad else out).view(-1).numpy()
    else:
        levels = _two_levels(out.shape[1:], out.stride()[1:])
        if levels is None:
            plain = torch.empty_like(out, memory_format=torch.contiguous_format)
            fill(kind, plain, seed=seed, stream=stream, first_path=first_path, offset=offset)
            out.copy_(plain)
            return
        outer_stride, inner_stride, inner = levels
        strides = (out.stride(0), outer_stride, inner_stride)
        span = 1 + sum((n - 1) * s for n, s in zip(out.shape, out.stride(), strict=True))
        flat = out.detach().as_strided((span,), (1,)).numpy()
    offset = int(offset)
    counter = np.array((int(seed), stream, int(first_path), offset), dtype=np.uint64)

    # How many entries of a path lie together before the next path's begin. Short runs, many paths: lanes along paths.
    run = inner if outer_stride > strides[0] else count
    run = 1 if inner_stride > strides[0] else run
    if paths >= 32 and run <= 64:
        # A block of which one number is used costs about half of a full one.
        kernel, total, cost = columns(kind), paths, (count + 4 * ((offset % 4 + count + 3) // 4)) // 2
        # The lines that a tile writes stay in the first-level cache until all blocks have filled them.
        tile_size = max(64, min(512, 4096 // run))
    else:
        blocks = (offset % 4 + count + 3) // 4
        kernel, total, cost = rows(kind), paths * blocks, 4
        tile_size = 512  # 8 KiB of words, 8 or 16 KiB of numbers
    tile_size = min(tile_size, total)
    grain = -(-_GRAIN // cost)
    entry = _entries.get((kernel, out.dtype), kernel)
    if total < 2 * grain:
        entry(flat, strides, inner, counter, count, 0, total, tile_size)
        if entry is kernel:
            _keep_entries(kernel)
        return
    split(lambda start, stop: entry(flat, strides, inner, counter, count, start, stop, tile_size), total, grain)


def _keep_entries(kernel: Any) -> None:
    """Calls this kernel by the signature of a dtype from now on: Numba looks at no argument's type, 2 us of 3."""
    for (out, *_), compiled in kernel.overloads.items():
        _entries[kernel, getattr(torch, str(out.dtype))] = compiled.entry_point
