"""Host side of the kernels' arguments, and the one place that launches.

Nothing here waits for the device or copies to or from it. Integers that say where the noise is, and the row of a table,
may be Python integers or 0-d int64 tensors on the device; a kernel then loads them, so that a captured CUDA graph sees
their new values at every replay.
"""

from __future__ import annotations

import contextlib
import functools
import struct
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.runtime.jit import JITFunction

from ..backend import int64_bits
from .fill import fill_kernel
from .geometry import Geometry, Grid, tuning
from .tiles import NUMBER, PER_SAMPLE, SHARED

__all__ = [
    "Launch",
    "bits",
    "coefficient",
    "constants",
    "launch",
    "launch_kept",
    "places",
    "record",
    "recording",
    "result",
    "state",
]

NUM_WARPS = 4
# Interpreted when TRITON_INTERPRET was set before triton was imported.
INTERPRETED = not isinstance(fill_kernel, JITFunction)

_KIND = {"shared": SHARED.value, "per_sample": PER_SAMPLE.value, "number": NUMBER.value}
_FLAGS = {"seed": 1, "first_path": 2, "step": 4, "row": 8}


class Launch(NamedTuple):
    """One kernel launch: what a recorder sees in place of the device.

    ``fp_fusion``: whether the compiler may form multiply-adds. ``path_steps``: of a generated trajectory, paths of a
    thread times steps in a turn of its innermost loop.
    """

    kernel: Any
    grid: tuple[int, int, int]
    arguments: dict[str, Any]
    num_warps: int
    fp_fusion: bool = True
    path_steps: int = 0


_recorder: list[Launch] | None = None
_kept: dict[tuple[Any, ...], tuple[Any, list[Any]]] = {}
_MOST_KEPT = 4096
# Compiled kernels of Triton 3.2 are launched without constants.
_TAKES_CONSTANTS = tuple(int(part) for part in triton.__version__.split(".")[:2]) >= (3, 3)


@contextlib.contextmanager
def recording() -> Iterator[list[Launch]]:
    """Collect launches and run none: the ahead-of-time report compiles exactly what the launchers would run."""
    global _recorder
    previous, _recorder = _recorder, []
    try:
        yield _recorder
    finally:
        _recorder = previous


def is_recording() -> bool:
    """Whether launches are being collected, and none run."""
    return _recorder is not None


def record(item: Callable[[], Launch]) -> bool:
    """Whether launches are being collected; if so, this one is."""
    if _recorder is None:
        return False
    _recorder.append(item())
    return True


def launch(kernel: Any, grid: Grid, device: torch.device, arguments: dict[str, Any]) -> Any:
    """Run a kernel on the current stream of ``device``; what Triton compiled for it."""
    if record(lambda: Launch(kernel, grid, arguments, NUM_WARPS)):
        return None
    # Fusion on: it is what the instruction counts are for, and saying so keeps the bits the same from Triton 3.10 on,
    # where the default changes.
    options = {"num_warps": NUM_WARPS, "enable_fp_fusion": True}
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            return kernel[grid](**arguments, **options)
    return kernel[grid](**arguments, **options)


def launch_kept(
    kernel: Any, device: torch.device, key: tuple[Any, ...], values: list[Any],
    make: Callable[[], tuple[Grid, dict[str, Any]]],
) -> None:  # fmt: skip
    """Run a kernel as `launch` does; from the second launch of a kind on past Triton's handling of arguments.

    That takes two thirds of the host's time of a step: it sorts arguments by name, asks each what it is, and compares
    the globals of the kernel.

    Args:
        kernel: To run.
        device: Where.
        key: With the kernel, the device and which tensors start at a multiple of 16 bytes it decides the grid, the
            constants, and all that a compiled kernel depends on: dtypes of tensors, and the tags of `coefficient`.
        values: The arguments, in the order of the kernel's parameters, but constants, which come last.
        make: The grid and the constants by name; called where they are not known yet.
    """
    if _recorder is not None or INTERPRETED:
        grid, constant = make()
        launch(kernel, grid, device, dict(zip(kernel.arg_names, values, strict=False)) | constant)
        return
    aligned = 1
    for value in values:
        if type(value) is not int:
            aligned += aligned + (value.data_ptr() % 16 == 0)
    whole = id(kernel), device, aligned, tuning(), key
    kept = _kept.get(whole)
    if kept is None:
        grid, constant = make()
        compiled = launch(kernel, grid, device, dict(zip(kernel.arg_names, values, strict=False)) | constant)
        if len(_kept) >= _MOST_KEPT:
            _kept.clear()
        rest = [constant[name] for name in kernel.arg_names[len(values) :]] if _TAKES_CONSTANTS else []
        _kept[whole] = compiled[grid], rest
        return
    run, rest = kept
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            run(*values, *rest)
    else:
        run(*values, *rest)


def places(x: Tensor, *integers: int | Tensor) -> tuple[list[int], int]:
    """Integers as kernels take them, and flags of those that are addresses: seed, first path, step and perhaps row."""
    if type(integers[0]) is int and type(integers[1]) is int and type(integers[2]) is int and type(integers[-1]) is int:
        return [int64_bits(value) for value in integers], 0  # type: ignore[arg-type]
    loaded, values = 0, []
    for name, value in zip(_FLAGS, integers, strict=False):
        if isinstance(value, Tensor):
            if value.dtype != torch.int64 or value.ndim != 0 or value.device != x.device:
                raise ValueError(
                    f"{name} as a tensor must be int64, 0-d and on {x.device}; "
                    f"got {value.dtype} of shape {tuple(value.shape)} on {value.device}"
                )
            loaded |= _FLAGS[name]
            values.append(value.data_ptr())
        else:
            values.append(int64_bits(value))
    return values, loaded


def constants(x: Tensor, tile: Geometry, loaded: int, **own: Any) -> dict[str, Any]:
    """Constants of a tiled kernel: those that all of them share, and its own."""
    return own | {
        "LOADED": loaded,
        "VEC": tile.vec,
        "LANES": tile.lanes,
        "BLOCK": tile.block,
        "ALIGNED": tile.aligned,
        "INTERPRETED": INTERPRETED,
        "DOUBLE": x.dtype == torch.float64,
    }


def bits(value: float) -> int:
    """A float64 as an int64: a number travels exactly, where a kernel's float argument is rounded to 32 bits."""
    return int(struct.unpack("<q", struct.pack("<d", value))[0])


def coefficient(name: str, c: Tensor | float, x: Tensor) -> tuple[Any, int, Any]:
    """What to pass for a coefficient of ``x``; how: a number, a pointer to one, or to one a row; and its tag.

    Two coefficients with one tag are the same to a compiled kernel. Triton types integers by their value, and has
    kernels of their own for 1 and multiples of 16.
    """
    if not isinstance(c, Tensor):
        return _number(float(c))
    if c.ndim == 0:
        if c.device != x.device and c.device.type == "cpu":
            return _number(float(c))
        kind = "shared"
    elif c.shape == x.shape[:1]:
        kind = "per_sample"
    else:
        raise ValueError(f"{name} must be a number, () or ({x.shape[0]},), got shape {tuple(c.shape)}")
    if c.device != x.device:
        raise ValueError(f"{name} must be on {x.device} like the state, got {c.device}")
    return c.resolve_neg().contiguous(), _KIND[kind], (kind, c.dtype)


def _number(value: float) -> tuple[int, int, Any]:
    return _kept_number(value) if value else _kept_number.__wrapped__(value)  # -0.0 and 0.0 are equal, and two numbers


@functools.lru_cache(maxsize=1024)
def _kept_number(value: float) -> tuple[int, int, Any]:
    number = bits(value)
    return number, _KIND["number"], (number == 1, number % 16 == 0, -(1 << 31) <= number < 1 << 31)


def state(name: str, v: Tensor, x: Tensor) -> Tensor:
    """``v`` dense in row-major order and of the shape of ``x``; a copy where it is not."""
    if v.device != x.device:
        raise ValueError(f"{name} must be on {x.device} like x, got {v.device}")
    return (v if v.shape == x.shape else v.expand(x.shape)).resolve_neg().contiguous()


def result(x: Tensor, out: Tensor | None, *read: Any) -> tuple[Tensor, Tensor]:
    """Where the kernel writes, and what the caller gets.

    They are two tensors where ``out`` is not dense in row-major order, or shares memory with a part of ``x`` or of what
    else is ``read``, which programs that run later would find changed.
    """
    if out is None:
        out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        return out, out
    if out.shape != x.shape or out.dtype != x.dtype or out.device != x.device:
        raise ValueError(
            f"out must be like x, {tuple(x.shape)} {x.dtype} on {x.device}; "
            f"got {tuple(out.shape)} {out.dtype} on {out.device}"
        )
    if out.is_contiguous() and not out.is_neg() and not any(_overlaps(out, v) for v in (x, *read)):
        return out, out
    return torch.empty(x.shape, dtype=x.dtype, device=x.device), out


def _overlaps(out: Tensor, v: Any) -> bool:
    """Whether writing to `out` changes entries of another tensor that a kernel has yet to read.

    A tensor in another than row-major order is copied before the kernel runs.
    """
    if v is out or not isinstance(v, Tensor) or not v.is_contiguous():
        return False
    if v.untyped_storage().data_ptr() != out.untyped_storage().data_ptr():
        return False
    first, start = out.data_ptr(), v.data_ptr()
    if first == start and v.shape == out.shape and v.dtype is out.dtype:
        return False  # the same entries
    return start < first + out.numel() * out.element_size() and first < start + v.numel() * v.element_size()
