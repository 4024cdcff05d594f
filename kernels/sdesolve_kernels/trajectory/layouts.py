"""What aten operations that move elements, and that reduce them, do to arrays of expressions."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from sdesolve_kernels.trajectory.expressions import BOOL, Expression
from sdesolve_kernels.trajectory.operations import HANDLERS, apply, handles
from sdesolve_kernels.trajectory.tracing import Traced, Tracer, Unsupported, cast, dtype_name

__all__: list[str] = []


# Views -----------------------------------------------------------------------------------------------------------
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
def reshape(e: np.ndarray, shape: Sequence[int], *_: Any) -> np.ndarray:
    return e.reshape(tuple(shape))


@view("expand")
def expand(e: np.ndarray, shape: Sequence[int], *, implicit: bool = False) -> np.ndarray:
    new = len(shape) - e.ndim
    return np.broadcast_to(e, tuple(e.shape[i - new] if n == -1 else n for i, n in enumerate(shape)))


@view("permute")
def permute(e: np.ndarray, dims: Sequence[int]) -> np.ndarray:
    return e.transpose(tuple(dims))


@view("transpose")
def transpose(e: np.ndarray, a: int, b: int) -> np.ndarray:
    return e.swapaxes(a, b) if e.ndim else e


@view("t")
def t(e: np.ndarray) -> np.ndarray:
    return e.T


@view("unsqueeze")
def unsqueeze(e: np.ndarray, dim: int) -> np.ndarray:
    return np.expand_dims(e, dim)


@view("squeeze")
def squeeze(e: np.ndarray, dim: int | Sequence[int] | None = None) -> np.ndarray:
    dims = range(e.ndim) if dim is None else [dim] if isinstance(dim, int) else dim
    return e.squeeze(tuple(d for d in dims if e.ndim and e.shape[d] == 1))


@view("select")
def select(e: np.ndarray, dim: int, index: int) -> np.ndarray:
    return e[(slice(None),) * (dim % e.ndim) + (index, ...)]


@view("slice")
def slice_(e: np.ndarray, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1) -> np.ndarray:
    return e[(slice(None),) * (dim % e.ndim) + (slice(start, end, step),)]


@view("alias", "detach", "lift_fresh", "view_of")
def alias(e: np.ndarray) -> np.ndarray:
    return e[...]


@view("contiguous")
def contiguous(e: np.ndarray, **_: Any) -> np.ndarray:
    return e


@view("clone", "lift_fresh_copy", "_conj", "positive")
def clone(e: np.ndarray, **_: Any) -> np.ndarray:
    return e.copy()


@view("diagonal")
def diagonal(e: np.ndarray, offset: int = 0, dim1: int = 0, dim2: int = 1) -> np.ndarray:
    return e.diagonal(offset, dim1, dim2)


@view("flip")
def flip(e: np.ndarray, dims: Sequence[int]) -> np.ndarray:
    return np.flip(e, tuple(dims)).copy()


@view("roll")
def roll(e: np.ndarray, shifts: Sequence[int], dims: Sequence[int] = ()) -> np.ndarray:
    return np.roll(e, tuple(shifts), tuple(dims)) if dims else np.roll(e, shifts[0])


@view("repeat")
def repeat(e: np.ndarray, repeats: Sequence[int]) -> np.ndarray:
    return np.tile(e, tuple(repeats))


def _split(tracer: Tracer, a: Traced, sizes: Sequence[int], dim: int) -> list[Traced]:
    edges = np.cumsum([0, *sizes])
    return [tracer.traced(slice_(a.elements, dim, i, j), a.dtype) for i, j in itertools.pairwise(edges)]


@handles("split")
def split(tracer: Tracer, func: Any, a: Traced, size: int, dim: int = 0) -> list[Traced]:
    n = a.shape[dim]
    return _split(tracer, a, [min(size, n - i) for i in range(0, n, size)], dim)


@handles("split_with_sizes")
def split_with_sizes(tracer: Tracer, func: Any, a: Traced, sizes: Sequence[int], dim: int = 0) -> list[Traced]:
    return _split(tracer, a, sizes, dim)


@handles("unbind")
def unbind(tracer: Tracer, func: Any, a: Traced, dim: int = 0) -> list[Traced]:
    return [tracer.traced(select(a.elements, dim, i), a.dtype) for i in range(a.shape[dim])]


# Putting together and picking out --------------------------------------------------------------------------------
def _promoted(tracer: Tracer, tensors: Sequence[Traced]) -> tuple[list[np.ndarray], torch.dtype]:
    dtype = functools.reduce(torch.promote_types, [a.dtype for a in tensors])
    return [cast(tracer.graph, a.elements, dtype_name(dtype)) for a in tensors], dtype


@handles("cat")
def cat(tracer: Tracer, func: Any, tensors: Sequence[Traced], dim: int = 0) -> Traced:
    tensors = [a for a in tensors if a.shape != (0,)]
    arrays, dtype = _promoted(tracer, tensors)
    return tracer.traced(np.concatenate(arrays, dim), dtype)


@handles("stack")
def stack(tracer: Tracer, func: Any, tensors: Sequence[Traced], dim: int = 0) -> Traced:
    arrays, dtype = _promoted(tracer, tensors)
    return tracer.traced(np.stack(arrays, dim), dtype)


def _whole_numbers(index: Traced) -> np.ndarray:
    if any(e.op != "const" for e in index.elements.flat):
        raise Unsupported("it indexes with a tensor that is not constant; torch.where chooses by value")
    flat = [e.data for e in index.elements.flat]
    return np.array(flat, dtype=bool if index.dtype == torch.bool else np.int64).reshape(index.shape)


@handles("index")
def index(tracer: Tracer, func: Any, a: Traced, indices: Sequence[Traced | None]) -> Traced:
    """Indexing by constant tensors, laid out as torch does."""
    where = [slice(None) if i is None else _whole_numbers(i) for i in indices]
    return tracer.traced(a.elements[tuple(where)], a.dtype)


@handles("index_put")
def index_put(
    tracer: Tracer, func: Any, a: Traced, indices: Sequence[Traced | None], values: Traced, accumulate: bool = False
) -> Traced:
    if accumulate:
        raise Unsupported("it accumulates into indexed places")
    out = a.elements.copy()
    where = tuple(slice(None) if i is None else _whole_numbers(i) for i in indices)
    out[where] = cast(tracer.graph, values.elements, dtype_name(a.dtype))
    return tracer.traced(out, a.dtype)


@handles("index_select")
def index_select(tracer: Tracer, func: Any, a: Traced, dim: int, which: Traced) -> Traced:
    return tracer.traced(np.take(a.elements, _whole_numbers(which).reshape(-1), dim), a.dtype)


@handles("gather")
def gather(tracer: Tracer, func: Any, a: Traced, dim: int, which: Traced, *, sparse_grad: bool = False) -> Traced:
    return tracer.traced(np.take_along_axis(a.elements, _whole_numbers(which), dim), a.dtype)


@handles("constant_pad_nd")
def pad(tracer: Tracer, func: Any, a: Traced, widths: Sequence[int], value: float = 0.0) -> Traced:
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
def diag_embed(tracer: Tracer, func: Any, a: Traced, offset: int = 0, dim1: int = -2, dim2: int = -1) -> Traced:
    if (dim1, dim2) != (-2, -1):
        raise Unsupported("it calls diag_embed along other axes than the last two")
    n = a.shape[-1] + abs(offset)
    out = np.empty((*a.shape[:-1], n, n), dtype=object)
    out[...] = tracer.graph.const(0, dtype_name(a.dtype))
    i = np.arange(a.shape[-1])
    out[..., i + max(-offset, 0), i + max(offset, 0)] = a.elements
    return tracer.traced(out, a.dtype)


# Reductions ------------------------------------------------------------------------------------------------------
def _axes(a: Traced, dim: int | Sequence[int] | None) -> tuple[int, ...]:
    if dim is None or (isinstance(dim, list | tuple) and not dim):
        return tuple(range(a.ndim))
    return tuple(d % max(a.ndim, 1) for d in ([dim] if isinstance(dim, int) else dim)) if a.ndim else ()


def _reduced(
    elements: np.ndarray, axes: tuple[int, ...], keepdim: bool, fold: Callable[[list[Expression]], Expression]
) -> np.ndarray:
    """``fold`` over the given axes."""
    kept = [i for i in range(elements.ndim) if i not in axes]
    moved = elements.transpose(kept + list(axes)).reshape(*(elements.shape[i] for i in kept), -1)
    out = np.empty(moved.shape[:-1], dtype=object)
    for i in np.ndindex(out.shape):
        out[i] = fold(list(moved[i]))
    return np.expand_dims(out, axes) if keepdim else out


def _chain(tracer: Tracer, name: str, start: float, dtype: str) -> Callable[[list[Expression]], Expression]:
    op = tracer.graph.op
    if name == "add":
        return lambda es: tracer.graph.sum(es, dtype)
    return lambda es: functools.reduce(lambda a, b: op(name, a, b), es) if es else tracer.graph.const(start, dtype)


def _sum_dtype(a: Traced, dtype: torch.dtype | None) -> torch.dtype:
    return dtype or (a.dtype if a.dtype.is_floating_point else torch.int64)


@handles("sum")
def sum_(
    tracer: Tracer, func: Any, a: Traced, dim: Any = None, keepdim: bool = False, *, dtype: torch.dtype | None = None
) -> Traced:
    dtype = _sum_dtype(a, dtype)
    name = dtype_name(dtype)
    e = cast(tracer.graph, a.elements, name)
    return tracer.traced(_reduced(e, _axes(a, dim), keepdim, _chain(tracer, "add", 0.0, name)), dtype)


@handles("mean")
def mean(
    tracer: Tracer, func: Any, a: Traced, dim: Any = None, keepdim: bool = False, *, dtype: torch.dtype | None = None
) -> Traced:
    total = sum_(tracer, func, a, dim, keepdim, dtype=dtype)
    count = a.elements.size // max(total.elements.size, 1)
    scale = tracer.graph.const(1.0 / count if count else float("nan"), dtype_name(total.dtype))
    return tracer.traced(apply(lambda e: tracer.graph.op("mul", e, scale), total.elements), total.dtype)


@handles("prod")
def prod(
    tracer: Tracer, func: Any, a: Traced, dim: Any = None, keepdim: bool = False, *, dtype: torch.dtype | None = None
) -> Traced:
    dtype = _sum_dtype(a, dtype)
    e = cast(tracer.graph, a.elements, dtype_name(dtype))
    return tracer.traced(_reduced(e, _axes(a, dim), keepdim, _chain(tracer, "mul", 1.0, dtype_name(dtype))), dtype)


def _extreme(name: str) -> Callable[..., Traced]:
    def handler(tracer: Tracer, func: Any, a: Traced, dim: Any = None, keepdim: bool = False) -> Traced:
        fold = _chain(tracer, name, 0.0, dtype_name(a.dtype))
        return tracer.traced(_reduced(a.elements, _axes(a, dim), keepdim, fold), a.dtype)

    return handler


HANDLERS["amax"], HANDLERS["amin"] = _extreme("max"), _extreme("min")


def _extreme_and_place(name: str) -> Callable[..., Any]:
    def handler(tracer: Tracer, func: Any, a: Traced, *args: Any) -> Any:
        if args and isinstance(args[0], Traced):
            return HANDLERS[{"max": "maximum", "min": "minimum"}[name]](tracer, func, a, *args)
        dim, keepdim = (None, False) if not args else (args[0], bool(args[1:] and args[1]))
        best: Traced = HANDLERS[f"a{name}"](tracer, func, a, dim, keepdim)
        if dim is None:
            return best
        # The index is not computed: a tensor of nothing, which shows up as a refusal if it is used.
        return best, tracer.traced(np.full(best.shape, None, dtype=object), torch.int64)

    return handler


HANDLERS["max"], HANDLERS["min"] = _extreme_and_place("max"), _extreme_and_place("min")


def _logical(name: str, start: bool) -> Callable[..., Traced]:
    def handler(tracer: Tracer, func: Any, a: Traced, dim: Any = None, keepdim: bool = False) -> Traced:
        fold = _chain(tracer, name, start, BOOL)
        return tracer.traced(_reduced(cast(tracer.graph, a.elements, BOOL), _axes(a, dim), keepdim, fold), torch.bool)

    return handler


HANDLERS["any"], HANDLERS["all"] = _logical("or", False), _logical("and", True)


def _shifted(tracer: Tracer, a: Traced, dim: Any) -> tuple[np.ndarray, np.ndarray]:
    """The largest entry along some axes, 0 where it is infinite, and ``exp`` of the differences to it."""
    g, name = tracer.graph, dtype_name(a.dtype)
    top = _reduced(a.elements, _axes(a, dim), True, _chain(tracer, "max", 0.0, name))
    finite = g.const(float("inf"), name), g.const(0.0, name)
    top = apply(lambda e: g.op("where", g.op("eq", g.op("abs", e), finite[0]), finite[1], e), top)
    return top, apply(lambda e, m: g.op("exp", g.op("sub", e, m)), a.elements, top)


@handles("logsumexp")
def logsumexp(tracer: Tracer, func: Any, a: Traced, dim: Any, keepdim: bool = False) -> Traced:
    g, axes = tracer.graph, _axes(a, dim)
    top, powers = _shifted(tracer, a, dim)
    total = _reduced(powers, axes, True, _chain(tracer, "add", 0.0, dtype_name(a.dtype)))
    out = apply(lambda s, m: g.op("add", g.op("log", s), m), total, top)
    return tracer.traced(out if keepdim else out.squeeze(axes), a.dtype)


@handles("_softmax", "_log_softmax", "softmax", "log_softmax")
def softmax(tracer: Tracer, func: Any, a: Traced, dim: int, *_: Any) -> Traced:
    g, name = tracer.graph, dtype_name(a.dtype)
    top = _reduced(a.elements, _axes(a, dim), True, _chain(tracer, "max", 0.0, name))
    shifted = apply(lambda e, m: g.op("sub", e, m), a.elements, top)
    powers = apply(lambda e: g.op("exp", e), shifted)
    total = _reduced(powers, _axes(a, dim), True, _chain(tracer, "add", 0.0, name))
    if "log" in func.overloadpacket.__name__:
        return tracer.traced(apply(lambda e, s: g.op("sub", e, g.op("log", s)), shifted, total), a.dtype)
    return tracer.traced(apply(lambda e, s: g.op("div", e, s), powers, total), a.dtype)


@handles("linalg_vector_norm")
def vector_norm(
    tracer: Tracer,
    func: Any,
    a: Traced,
    ord: float = 2,
    dim: Any = None,
    keepdim: bool = False,
    *,
    dtype: torch.dtype | None = None,
) -> Traced:
    g, name, axes = tracer.graph, dtype_name(a.dtype), _axes(a, dim)
    size = apply(lambda e: g.op("abs", e), a.elements)
    if ord in (float("inf"), float("-inf")):
        out = _reduced(size, axes, keepdim, _chain(tracer, "max" if ord > 0 else "min", 0.0, name))
    elif ord == 2:
        squares = apply(lambda e: g.op("mul", e, e), a.elements)
        out = apply(lambda e: g.op("sqrt", e), _reduced(squares, axes, keepdim, _chain(tracer, "add", 0.0, name)))
    elif ord == 1:
        out = _reduced(size, axes, keepdim, _chain(tracer, "add", 0.0, name))
    else:
        power, root = g.const(ord, name), g.const(1.0 / ord if ord else 0.0, name)
        powers = apply(lambda e: g.op("pow", e, power), size)
        total = _reduced(powers, axes, keepdim, _chain(tracer, "add", 0.0, name))
        out = apply(lambda e: g.op("pow", e, root), total)
    return tracer.traced(out, a.dtype)


@handles("cumsum", "cumprod")
def cumulative(tracer: Tracer, func: Any, a: Traced, dim: int, *, dtype: torch.dtype | None = None) -> Traced:
    name = "add" if func.overloadpacket.__name__ == "cumsum" else "mul"
    dtype = _sum_dtype(a, dtype)
    out = np.moveaxis(cast(tracer.graph, a.elements, dtype_name(dtype)), dim, 0).copy()
    for i in range(1, len(out)):
        out[i] = apply(lambda x, y: tracer.graph.op(name, x, y), out[i - 1], out[i])
    return tracer.traced(np.moveaxis(out, 0, dim), dtype)


def _spread(tracer: Tracer, a: Traced, dim: Any, correction: float) -> tuple[np.ndarray, np.ndarray]:
    """Mean and variance along some axes, which are kept with length 1; two passes, as torch."""
    g, name, axes = tracer.graph, dtype_name(a.dtype), _axes(a, dim)
    count = math.prod(a.shape[i] for i in axes)

    def average(e: np.ndarray, n: float) -> np.ndarray:
        scale = g.const(1.0 / n if n > 0 else float("nan"), name)
        return apply(lambda s: g.op("mul", s, scale), _reduced(e, axes, True, _chain(tracer, "add", 0.0, name)))

    mean = average(a.elements, count)
    apart = apply(lambda x, m: g.op("sub", x, m), a.elements, mean)
    return mean, average(apply(lambda d: g.op("mul", d, d), apart), count - correction)


def _spread_of(result: str) -> Callable[..., Any]:
    def handler(
        tracer: Tracer, func: Any, a: Traced, dim: Any = None, *args: Any, correction: float | None = 1, **options: Any
    ) -> Any:
        if isinstance(dim, bool):  # the oldest form: var(unbiased)
            dim, args = None, (dim, *args)
        keepdim = bool(options.get("keepdim", False))
        for i, flag in enumerate(args):  # unbiased, keepdim
            correction, keepdim = (float(flag), keepdim) if i == 0 else (correction, bool(flag))
        mean, variance = _spread(tracer, a, dim, 1.0 if correction is None else correction)
        out = {"mean": mean, "var": variance}
        if "std" in result:
            out["std"] = apply(lambda v: tracer.graph.op("sqrt", v), variance)
        shaped = [out[k] if keepdim else out[k].squeeze(_axes(a, dim)) for k in result.split("_")]
        made = [tracer.traced(e, a.dtype) for e in shaped]
        return made[0] if len(made) == 1 else tuple(made)

    return handler


for _result in ("var", "std", "var_mean", "std_mean"):
    HANDLERS[_result] = _spread_of(_result)


@handles("native_layer_norm")
def layer_norm(
    tracer: Tracer, func: Any, a: Traced, shape: Sequence[int], weight: Traced | None, bias: Traced | None, eps: float
) -> tuple[Traced, Traced, Traced]:
    g, name = tracer.graph, dtype_name(a.dtype)
    mean, variance = _spread(tracer, a, list(range(-len(shape), 0)), 0.0)
    one, small = g.const(1.0, name), g.const(eps, name)
    scale = apply(lambda v: g.op("div", one, g.op("sqrt", g.op("add", v, small))), variance)
    out = apply(lambda x, m, s: g.op("mul", g.op("sub", x, m), s), a.elements, mean, scale)
    for name_of, factor in (("mul", weight), ("add", bias)):
        if factor is not None:
            out = apply(functools.partial(g.op, name_of), out, factor.elements)
    return tracer.traced(out, a.dtype), tracer.traced(mean, a.dtype), tracer.traced(scale, a.dtype)
