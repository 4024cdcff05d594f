"""What aten operations that move elements do to arrays of expressions."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from sdesolve_kernels.trajectory.pointwise import HANDLERS, handles
from sdesolve_kernels.trajectory.tracing import Traced, Tracer, Unsupported, cast, dtype_name


def view(*names: str) -> Callable[[Callable[..., np.ndarray]], Callable[..., np.ndarray]]:
    """Registers a function of an array that returns a view, or a copy where torch returns one."""

    def register(function: Callable[..., np.ndarray]) -> Callable[..., np.ndarray]:
        def handler(tracer: Tracer, func: Any, a: Traced, *args: Any, **kwargs: Any) -> Traced:
            return tracer.traced(function(a.elements, *args, **kwargs), a.dtype)

        for name in names:
            HANDLERS[name] = handler
        return function

    return register


@view("view", "_unsafe_view", "reshape", "_reshape_alias")
def _reshape(e: np.ndarray, shape: Sequence[int], *_: Any) -> np.ndarray:
    return e.reshape(tuple(shape))


@view("expand")
def _expand(e: np.ndarray, shape: Sequence[int], *, implicit: bool = False) -> np.ndarray:
    new = len(shape) - e.ndim
    return np.broadcast_to(e, tuple(e.shape[i - new] if n == -1 else n for i, n in enumerate(shape)))


@view("permute")
def _permute(e: np.ndarray, dims: Sequence[int]) -> np.ndarray:
    return e.transpose(tuple(dims))


@view("transpose")
def _transpose(e: np.ndarray, a: int, b: int) -> np.ndarray:
    return e.swapaxes(a, b) if e.ndim else e


@view("t")
def _t(e: np.ndarray) -> np.ndarray:
    if e.ndim > 2:
        raise RuntimeError(f"t() expects at most 2 axes, got {e.ndim}")
    return e.T


@view("unsqueeze")
def _unsqueeze(e: np.ndarray, dim: int) -> np.ndarray:
    return np.expand_dims(e, dim)


@view("squeeze")
def _squeeze(e: np.ndarray, dim: int | Sequence[int] | None = None) -> np.ndarray:
    dims = range(e.ndim) if dim is None else [dim] if isinstance(dim, int) else dim
    return e.squeeze(tuple(d for d in dims if e.ndim and e.shape[d] == 1))


@view("select")
def _select(e: np.ndarray, dim: int, index: int) -> np.ndarray:
    return e[(slice(None),) * (dim % e.ndim) + (index, ...)]


@view("slice")
def _slice(e: np.ndarray, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1) -> np.ndarray:
    return e[(slice(None),) * (dim % e.ndim) + (slice(start, end, step),)]


@view("alias", "detach", "lift_fresh", "view_of", "positive")
def _alias(e: np.ndarray) -> np.ndarray:
    return e[...]


@view("contiguous")
def _contiguous(e: np.ndarray, **_: Any) -> np.ndarray:
    return e if e.flags.c_contiguous else e.copy()


@view("clone", "lift_fresh_copy")
def _clone(e: np.ndarray, **_: Any) -> np.ndarray:
    return e.copy()


@view("diagonal")
def _diagonal(e: np.ndarray, offset: int = 0, dim1: int = 0, dim2: int = 1) -> np.ndarray:
    picked = np.diagonal(e, offset, dim1, dim2)  # for reading only, and torch's is not
    corner = np.moveaxis(e, (dim1, dim2), (0, 1))[max(-offset, 0) :, max(offset, 0) :]
    return np.lib.stride_tricks.as_strided(corner, picked.shape, picked.strides, writeable=e.flags.writeable)


@view("flip")
def _flip(e: np.ndarray, dims: Sequence[int]) -> np.ndarray:
    return np.flip(e, tuple(dims)).copy() if e.ndim else e.copy()


@view("roll")
def _roll(e: np.ndarray, shifts: Sequence[int], dims: Sequence[int] = ()) -> np.ndarray:
    return np.roll(e, tuple(shifts), tuple(dims)) if dims else np.roll(e, shifts[0])


@view("repeat")
def _repeat(e: np.ndarray, repeats: Sequence[int]) -> np.ndarray:
    return np.tile(e, tuple(repeats))


def _parts(tracer: Tracer, a: Traced, sizes: Sequence[int], dim: int) -> list[Traced]:
    edges = np.cumsum([0, *sizes])
    return [tracer.traced(_slice(a.elements, dim, i, j), a.dtype) for i, j in itertools.pairwise(edges)]


@handles("split")
def _split(tracer: Tracer, func: Any, a: Traced, size: int, dim: int = 0) -> list[Traced]:
    n = a.shape[dim]
    return _parts(tracer, a, [min(size, n - i) for i in range(0, n, size)], dim)


@handles("split_with_sizes")
def _split_with_sizes(tracer: Tracer, func: Any, a: Traced, sizes: Sequence[int], dim: int = 0) -> list[Traced]:
    return _parts(tracer, a, sizes, dim)


@handles("unbind")
def _unbind(tracer: Tracer, func: Any, a: Traced, dim: int = 0) -> list[Traced]:
    return [tracer.traced(_select(a.elements, dim, i), a.dtype) for i in range(a.shape[dim])]


def _promoted(tracer: Tracer, tensors: Sequence[Traced]) -> tuple[list[np.ndarray], torch.dtype]:
    dtype = functools.reduce(torch.promote_types, [a.dtype for a in tensors])
    return [cast(tracer.graph, a.elements, dtype_name(dtype)) for a in tensors], dtype


@handles("cat")
def _cat(tracer: Tracer, func: Any, tensors: Sequence[Traced], dim: int = 0) -> Traced:
    tensors = [a for a in tensors if a.shape != (0,)]
    arrays, dtype = _promoted(tracer, tensors)
    return tracer.traced(np.concatenate(arrays, dim), dtype)


@handles("stack")
def _stack(tracer: Tracer, func: Any, tensors: Sequence[Traced], dim: int = 0) -> Traced:
    arrays, dtype = _promoted(tracer, tensors)
    return tracer.traced(np.stack(arrays, dim), dtype)


def _whole_numbers(tracer: Tracer, index: Traced) -> np.ndarray:
    """The entries of an index, which are made into the kernel: those of an outside tensor are noted as read."""
    flat = tracer.values(index)
    if flat is None:
        raise Unsupported("it indexes with a tensor that is not constant; torch.where chooses by value")
    return np.array(flat, dtype=bool if index.dtype == torch.bool else np.int64).reshape(index.shape)


@handles("index")
def index(tracer: Tracer, func: Any, a: Traced, indices: Sequence[Traced | None]) -> Traced:
    """Indexing by constant tensors, laid out as torch does."""
    where = [slice(None) if i is None else _whole_numbers(tracer, i) for i in indices]
    return tracer.traced(a.elements[tuple(where)], a.dtype)


@handles("index_put")
def _index_put(
    tracer: Tracer, func: Any, a: Traced, indices: Sequence[Traced | None], values: Traced, accumulate: bool = False
) -> Traced:
    if accumulate:
        raise Unsupported("it accumulates into indexed places")
    mask = indices[0]
    if len(indices) == 1 and mask is not None and mask.dtype == torch.bool and values.elements.size == 1:
        # One number wherever a mask holds, which need not be constant.
        rest = a.ndim - mask.ndim
        if mask.shape != a.shape[: mask.ndim]:
            raise IndexError(f"a mask of shape {tuple(mask.shape)} does not fit a tensor of shape {tuple(a.shape)}")
        value = values.reshape(())
        return HANDLERS["masked_fill"](tracer, func, a, mask.reshape(*mask.shape, *[1] * rest), value)
    out = a.elements.copy()
    where = tuple(slice(None) if i is None else _whole_numbers(tracer, i) for i in indices)
    out[where] = cast(tracer.graph, values.elements, dtype_name(a.dtype))
    return tracer.traced(out, a.dtype)


@handles("index_select")
def _index_select(tracer: Tracer, func: Any, a: Traced, dim: int, which: Traced) -> Traced:
    return tracer.traced(np.take(a.elements, _whole_numbers(tracer, which).reshape(-1), dim), a.dtype)


@handles("gather")
def _gather(tracer: Tracer, func: Any, a: Traced, dim: int, which: Traced, *, sparse_grad: bool = False) -> Traced:
    where = _whole_numbers(tracer, which)
    if not a.ndim:
        return tracer.traced(a.elements.copy(), a.dtype)
    # Along other axes the index may be shorter, and then only so much is picked.
    part = tuple(slice(None if i == dim % a.ndim else n) for i, n in enumerate(where.shape))
    return tracer.traced(np.take_along_axis(a.elements[part], where, dim), a.dtype)


@handles("constant_pad_nd")
def _pad(tracer: Tracer, func: Any, a: Traced, widths: Sequence[int], value: float = 0.0) -> Traced:
    pairs = [(widths[i], widths[i + 1]) for i in range(0, len(widths), 2)]
    before = [(0, 0)] * (a.ndim - len(pairs)) + pairs[::-1]
    shape = [n + lo + hi for n, (lo, hi) in zip(a.shape, before, strict=True)]
    out = np.empty(shape, dtype=object)
    out[...] = tracer.graph.const(value, dtype_name(a.dtype))
    source = tuple(slice(max(-lo, 0), n - max(-hi, 0)) for n, (lo, hi) in zip(a.shape, before, strict=True))
    target = tuple(slice(max(lo, 0), n - max(hi, 0)) for n, (lo, hi) in zip(shape, before, strict=True))
    out[target] = a.elements[source]
    return tracer.traced(out, a.dtype)


def _triangle(keep: Callable[..., np.ndarray]) -> Callable[..., Traced]:
    def handler(tracer: Tracer, func: Any, a: Traced, offset: int = 0) -> Traced:
        mask = keep(np.ones(a.shape[-2:], dtype=bool), offset)
        out = a.elements.copy()
        out[np.broadcast_to(~mask, a.shape)] = tracer.graph.const(0, dtype_name(a.dtype))
        return tracer.traced(out, a.dtype)

    return handler


HANDLERS["tril"], HANDLERS["triu"] = _triangle(np.tril), _triangle(np.triu)


@handles("diag_embed")
def _diag_embed(tracer: Tracer, func: Any, a: Traced, offset: int = 0, dim1: int = -2, dim2: int = -1) -> Traced:
    if (dim1, dim2) != (-2, -1):
        raise Unsupported("it calls diag_embed along other axes than the last two")
    n = a.shape[-1] + abs(offset)
    out = np.empty((*a.shape[:-1], n, n), dtype=object)
    out[...] = tracer.graph.const(0, dtype_name(a.dtype))
    i = np.arange(a.shape[-1])
    out[..., i + max(-offset, 0), i + max(offset, 0)] = a.elements
    return tracer.traced(out, a.dtype)
