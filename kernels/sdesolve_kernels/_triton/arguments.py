"""Host side of the kernels' arguments, and the one place that launches.

Nothing here waits for the device or copies to or from it. Integers that say where the noise is, and the row of a table,
may be Python integers or 0-d int64 tensors on the device; a kernel then loads them, so that a captured CUDA graph sees
their new values at every replay.
"""

from __future__ import annotations

import contextlib
import struct
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton.runtime.jit import JITFunction

from ..backend import int64_bits
from .fill import fill_kernel
from .geometry import Geometry
from .tiles import NUMBER, PER_SAMPLE, SHARED

__all__ = ["Launch", "bits", "coefficient", "launch", "prepare", "record", "recording", "result", "state"]

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


def launch(kernel: Any, grid: tuple[int, int, int], device: torch.device, arguments: dict[str, Any]) -> None:
    """Run a kernel on the current stream of ``device``."""
    if record(lambda: Launch(kernel, grid, arguments, NUM_WARPS)):
        return
    # Fusion on: it is what the instruction counts are for, and saying so keeps the bits the same from Triton 3.10 on,
    # where the default changes.
    options = {"num_warps": NUM_WARPS, "enable_fp_fusion": True}
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            kernel[grid](**arguments, **options)
    else:
        kernel[grid](**arguments, **options)


def prepare(x: Tensor, tile: Geometry, integers: Mapping[str, int | Tensor], stream: int) -> dict[str, Any]:
    """Arguments that all tiled kernels share; ``integers`` holds seed, first_path, step and possibly row."""
    loaded, values = 0, {}
    for name, value in integers.items():
        if isinstance(value, Tensor):
            if value.dtype != torch.int64 or value.ndim != 0 or value.device != x.device:
                raise ValueError(
                    f"{name} as a tensor must be int64, 0-d and on {x.device}; "
                    f"got {value.dtype} of shape {tuple(value.shape)} on {value.device}"
                )
            loaded |= _FLAGS[name]
            values[name] = value.data_ptr()
        else:
            values[name] = int64_bits(value)
    return {
        **values,
        "stream_id": int(stream),
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


def coefficient(name: str, c: Tensor | float, x: Tensor) -> tuple[Any, int]:
    """What to pass for a coefficient of ``x``, and how: a number, a pointer to one, or to one a row."""
    if not isinstance(c, Tensor):
        return bits(float(c)), _KIND["number"]
    if c.ndim == 0:
        if c.device != x.device and c.device.type == "cpu":
            return bits(float(c)), _KIND["number"]
        kind = "shared"
    elif c.shape == x.shape[:1]:
        kind = "per_sample"
    else:
        raise ValueError(f"{name} must be a number, () or ({x.shape[0]},), got shape {tuple(c.shape)}")
    if c.device != x.device:
        raise ValueError(f"{name} must be on {x.device} like the state, got {c.device}")
    return c.resolve_neg().contiguous(), _KIND[kind]


def state(name: str, v: Tensor, x: Tensor) -> Tensor:
    """``v`` dense in row-major order and of the shape of ``x``; a copy where it is not."""
    if v.device != x.device:
        raise ValueError(f"{name} must be on {x.device} like x, got {v.device}")
    return v.expand(x.shape).resolve_neg().contiguous()


def result(x: Tensor, out: Tensor | None) -> tuple[Tensor, Tensor]:
    """Where the kernel writes, and what the caller gets: two tensors when ``out`` is not dense in row-major order."""
    if out is None:
        out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    elif out.shape != x.shape or out.dtype != x.dtype or out.device != x.device:
        raise ValueError(
            f"out must be like x, {tuple(x.shape)} {x.dtype} on {x.device}; "
            f"got {tuple(out.shape)} {out.dtype} on {out.device}"
        )
    return (
        out if out.is_contiguous() and not out.is_neg() else torch.empty(x.shape, dtype=x.dtype, device=x.device)
    ), out
