"""The ops: what they compute, what they accept, and the call of whichever implementation runs."""

from __future__ import annotations

from typing import Any, SupportsIndex

import torch
from torch import Tensor

from .checks import FLOATS, check_out, index, integer
from .dispatch import backend_for, implementation
from .streams import Stream
from .transforms import is_transformed, outside_transforms

__all__ = ["normal", "uniform", "words"]


def _place(name: str, value: Any, high: int, bound: str) -> int | Tensor:
    """An integer, or one on a device, which is read there: reading it here would wait, and a capture would keep it."""
    if isinstance(value, Tensor) and value.device.type != "cpu":
        return index(name, value, high, bound, read=False)
    return integer(name, value, 0, high, bound)


def _where(paths: int, count: int, seed: Any, stream: Any, first_path: Any, offset: Any) -> dict[str, Any]:
    """The coordinates of the first number, checked."""
    where: dict[str, Any] = {
        "seed": _place("seed", seed, 1 << 64, "2^64"),
        "stream": integer("stream", stream, 0, 256, "256"),
        "first_path": _place("first_path", first_path, 1 << 64, "2^64"),
        "offset": _place("offset", offset, 1 << 58, "2^58"),
    }
    if not isinstance(where["first_path"], Tensor) and where["first_path"] + paths > 1 << 64:
        raise ValueError(
            f"first_path + paths must be at most 2^64, got {where['first_path']} + {paths}; path indices would wrap "
            "and repeat noise"
        )
    if not isinstance(where["offset"], Tensor) and where["offset"] + count > 1 << 58:
        raise ValueError(
            f"offset + count must be at most 2^58, got {where['offset']} + {count}; use another stream or seed"
        )
    return where


def _fill(
    op: str,
    paths: Any,
    count: Any,
    *,
    seed: Any,
    stream: Any,
    first_path: Any,
    offset: Any,
    dtype: torch.dtype | None,
    device: torch.device | str | None,
    out: Tensor | None,
) -> Tensor:
    """Validate, allocate, dispatch: the same for every op that makes noise."""
    # The usual case, in a fifth of the time: numbers so small that no bound can be met.
    usual = type(paths) is type(count) is type(seed) is type(first_path) is type(offset) is int
    usual = usual and (type(stream) is Stream or type(stream) is int) and 0 <= stream < 256
    numbers = (paths, count, seed, first_path, offset)
    if usual and min(numbers) >= 0 and max(numbers) < 1 << 57:
        where: dict[str, Any] = {"seed": seed, "stream": stream + 0, "first_path": first_path, "offset": offset}
    else:
        paths = integer("paths", paths, 0, 1 << 63, "2^63")
        count = integer("count", count, 0, 1 << 58, "2^58")
        where = _where(paths, count, seed, stream, first_path, offset)
    if op != "words" and dtype is not None and dtype not in FLOATS:
        raise TypeError(f"dtype must be one of {', '.join(map(str, FLOATS))}, got {str(dtype)[:60]}")
    allocated = out is None
    if out is None:
        default = torch.int64 if op == "words" else torch.float32
        out = torch.empty((paths, count), dtype=default if dtype is None else dtype, device=device)
    else:
        check_out(out, paths, count, dtype, device)
        if op != "words" and out.dtype not in FLOATS:
            raise TypeError(f"out must be of a dtype among {', '.join(map(str, FLOATS))}, got {out.dtype}")
    if is_transformed():
        with outside_transforms():  # noise is a constant there: it depends on its coordinates alone
            made = torch.empty(out.shape, dtype=out.dtype, device=out.device)
            made = _fill(op, paths, count, **where, dtype=None, device=None, out=made)
        return made if allocated else out.copy_(made)
    backend_for(op, out.device)  # refuses, also for an empty tensor, what `use_backend` cannot run there
    if out.numel():
        torch.autograd.graph.increment_version(out)
        implementation("fill", out.device)(op, out, **where)
    return out


def normal(
    paths: SupportsIndex,
    count: SupportsIndex,
    *,
    seed: SupportsIndex,
    stream: SupportsIndex = Stream.DRIVING,
    first_path: SupportsIndex = 0,
    offset: SupportsIndex = 0,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    out: Tensor | None = None,
) -> Tensor:
    r"""Standard normals that are a function of where they stand.

    Entry [i, j] is $Z(seed, stream, first\_path + i, offset + j)$ whatever the shape, the number of threads or the
    backend: with $n = offset + j$ and $q = \lfloor n / 4 \rfloor$, Philox4x32-10 with the seed as key and the counter
    $(q \bmod 2^{32},\ path \bmod 2^{32},\ \lfloor path / 2^{32} \rfloor,\ stream + 256 \lfloor q / 2^{32} \rfloor)$
    gives words $w_0 \dots w_3$; $u = (w_0 + \tfrac12) 2^{-32}$, $r = \sqrt{-2 \ln u}$ and
    $\theta = 2 \pi w_1 / 2^{32}$ give entries 0 and 1 of the block, $(r \cos\theta, r \sin\theta)$, and $w_2, w_3$
    likewise entries 2 and 3. Magnitudes reach 6.76.

    Args:
        paths: Number of rows, >= 0.
        count: Number of entries of each path, >= 0.
        seed: In [0, 2^64). It, `first_path` and `offset` may be 0-d int64 tensors on the device: a captured graph then
            draws anew at each replay.
        stream: In [0, 256); see `Stream`.
        first_path: SupportsIndex of the first row's path, with first_path + paths <= 2^64.
        offset: SupportsIndex of the first entry, with offset + count <= 2^58.
        dtype: float32 (if neither this nor `out` says otherwise), float64, float16 or bfloat16. All come from the same
            words; the 16-bit types are rounded.
        device: Where to make them; torch's default device if not given. Must not contradict `out`.
        out: Tensor to write into and return, of shape ``(paths, ...)`` and any strides; the dimensions after the first
            hold the `count` entries in row-major order. A buffer of shape (steps, paths, m) is filled through
            ``out=buffer.transpose(0, 1)`` with ``count = steps * m``.

    Returns:
        Tensor of shape ``(paths, count)``, or `out`. Not differentiable.

    Raises:
        TypeError: An index is not an integer; the dtype is not floating.
        ValueError: An index is out of range; `out` does not fit, overlaps itself or requires a gradient; the backend
            asked for by `use_backend` does not run on the device.

    Source: Salmon, Moraes, Dror and Shaw, SC 2011; Box and Muller, 1958.
    """
    return _fill(
        "normal", paths, count, seed=seed, stream=stream, first_path=first_path, offset=offset,
        dtype=dtype, device=device, out=out,
    )  # fmt: skip


def uniform(
    paths: SupportsIndex,
    count: SupportsIndex,
    *,
    seed: SupportsIndex,
    stream: SupportsIndex,
    first_path: SupportsIndex = 0,
    offset: SupportsIndex = 0,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    out: Tensor | None = None,
) -> Tensor:
    r"""Uniforms $(w + \tfrac12) 2^{-32}$, where $w$ is word ``n mod 4`` of block ``n div 4`` and n = offset + j.

    Strictly inside (0, 1) in float64. Rounding to a narrower type can give exactly 1 (in float32, with probability
    2^-25) but never 0, except in float16, whose smallest positive number is 2^-24. The words are those of `normal` at
    the same place, so the stream must be one that makes no normals.

    Args, Returns, Raises: as for `normal`, without a default for `stream`.
    """
    return _fill(
        "uniform", paths, count, seed=seed, stream=stream, first_path=first_path, offset=offset,
        dtype=dtype, device=device, out=out,
    )  # fmt: skip


def words(
    paths: SupportsIndex,
    count: SupportsIndex,
    *,
    seed: SupportsIndex,
    stream: SupportsIndex,
    first_path: SupportsIndex = 0,
    offset: SupportsIndex = 0,
    device: torch.device | str | None = None,
) -> Tensor:
    """The 32-bit random words themselves, as int64 in [0, 2^32), shape ``(paths, count)``.

    Entry [i, j] is word ``n mod 4`` of block ``n div 4`` of path first_path + i, n = offset + j. Identical to the bit
    on every backend. Arguments and errors as for `normal`.
    """
    return _fill(
        "words", paths, count, seed=seed, stream=stream, first_path=first_path, offset=offset,
        dtype=None, device=device, out=None,
    )  # fmt: skip
