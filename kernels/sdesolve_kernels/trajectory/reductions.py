"""What aten operations that reduce along axes do to arrays of expressions: sums, extremes, norms, softmax, moments."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from sdesolve_kernels.trajectory.expressions import BOOL, FLOATS, I64, Expression, Graph
from sdesolve_kernels.trajectory.matrices import written_product
from sdesolve_kernels.trajectory.pointwise import EXTREMES, HANDLERS, elements_of, handles
from sdesolve_kernels.trajectory.tracing import Traced, Tracer, Unsupported, cast, dtype_name, mapped


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
    out = np.expand_dims(out, axes)
    return out if keepdim else out.squeeze(axes)


def _chain(tracer: Tracer, name: str, start: float, dtype: str) -> Callable[[list[Expression]], Expression]:
    op = tracer.graph.op
    if name == "add":
        return lambda es: tracer.graph.sum(es, dtype)
    return lambda es: functools.reduce(lambda a, b: op(name, a, b), es) if es else tracer.graph.const(start, dtype)


def _sum_dtype(a: Traced, dtype: torch.dtype | None) -> torch.dtype:
    return dtype or (a.dtype if a.dtype.is_floating_point else torch.int64)


@handles("sum")
def _sum(
    tracer: Tracer, func: Any, a: Traced, dim: Any = None, keepdim: bool = False, *, dtype: torch.dtype | None = None
) -> Traced:
    dtype = _sum_dtype(a, dtype)
    name = dtype_name(dtype)
    e, axes = cast(tracer.graph, a.elements, name), _axes(a, dim)
    product = written_product(tracer.graph, np.moveaxis(e, axes[0], -1), name) if len(axes) == 1 else None
    if product is not None:
        return tracer.traced(np.expand_dims(product, axes[0]) if keepdim else product, dtype)
    return tracer.traced(_reduced(e, axes, keepdim, _chain(tracer, "add", 0.0, name)), dtype)


@handles("mean")
def _mean(
    tracer: Tracer, func: Any, a: Traced, dim: Any = None, keepdim: bool = False, *, dtype: torch.dtype | None = None
) -> Traced:
    total = _sum(tracer, func, a, dim, keepdim, dtype=dtype)
    count = a.elements.size // max(total.elements.size, 1)
    scale = tracer.graph.const(1.0 / count if count else float("nan"), dtype_name(total.dtype))
    return tracer.traced(mapped(lambda e: tracer.graph.op("mul", e, scale), total.elements), total.dtype)


@handles("prod")
def _prod(
    tracer: Tracer, func: Any, a: Traced, dim: Any = None, keepdim: bool = False, *, dtype: torch.dtype | None = None
) -> Traced:
    dtype = _sum_dtype(a, dtype)
    e = cast(tracer.graph, a.elements, dtype_name(dtype))
    return tracer.traced(_reduced(e, _axes(a, dim), keepdim, _chain(tracer, "mul", 1.0, dtype_name(dtype))), dtype)


def _extreme(name: str) -> Callable[..., Traced]:
    def handler(tracer: Tracer, func: Any, a: Traced, dim: Any = None, keepdim: bool = False) -> Traced:
        dtype = dtype_name(a.dtype)
        fold = functools.partial(functools.reduce, functools.partial(EXTREMES[name, dtype], tracer.graph))
        if tracer.graded and dtype in FLOATS:
            fold = functools.partial(_tied, tracer.graph, name)
        return tracer.traced(_reduced(a.elements, _axes(a, dim), keepdim, fold), a.dtype)

    return handler


def _tied(g: Graph, name: str, entries: Sequence[Expression]) -> Expression:
    """The extreme of some numbers, counting those that have it: they share its derivative."""
    best, one = entries[0], g.const(1, entries[0].dtype)
    count = one
    for e in entries[1:]:
        now = g.op(f"tied_{name}", best, e, count)
        more = g.op("where", g.op("eq", best, e), g.op("add", count, one), count)
        count = g.op("where", g.op("lt" if name == "max" else "gt", best, e), one, more)
        best = now
    return best


def _first(g: Graph, name: str, entries: Sequence[Expression]) -> Expression:
    """The extreme of some numbers, whose derivative belongs to the first that has it."""
    return functools.reduce(lambda a, b: g.op(f"clamp_{'min' if name == 'max' else 'max'}", a, b), entries)


HANDLERS["amax"], HANDLERS["amin"] = _extreme("max"), _extreme("min")


def _extreme_and_place(name: str) -> Callable[..., Any]:
    def handler(tracer: Tracer, func: Any, a: Traced, *args: Any) -> Any:
        if args and isinstance(args[0], Traced):
            return HANDLERS[{"max": "maximum", "min": "minimum"}[name]](tracer, func, a, *args)
        dim, keepdim = (None, False) if not args else (args[0], bool(args[1:] and args[1]))
        best: Traced = HANDLERS[f"a{name}"](tracer, func, a, dim, keepdim)
        if dim is None:
            return best
        if tracer.graded and dtype_name(a.dtype) in FLOATS:
            fold = functools.partial(_first, tracer.graph, name)
            best = tracer.traced(_reduced(a.elements, _axes(a, dim), keepdim, fold), a.dtype)
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
    top = mapped(lambda e: g.op("where", g.op("eq", g.op("abs", e), finite[0]), finite[1], e), top)
    return top, mapped(lambda e, m: g.op("exp", g.op("sub", e, m)), a.elements, top)


@handles("logsumexp")
def _logsumexp(tracer: Tracer, func: Any, a: Traced, dim: Any, keepdim: bool = False) -> Traced:
    g, axes = tracer.graph, _axes(a, dim)
    top, powers = _shifted(tracer, a, dim)
    total = _reduced(powers, axes, True, _chain(tracer, "add", 0.0, dtype_name(a.dtype)))
    out = mapped(lambda s, m: g.op("add", g.op("log", s), m), total, top)
    return tracer.traced(out if keepdim else out.squeeze(axes), a.dtype)


@handles("_softmax", "_log_softmax", "softmax", "log_softmax")
def _softmax(tracer: Tracer, func: Any, a: Traced, dim: int, *_: Any) -> Traced:
    g, name = tracer.graph, dtype_name(a.dtype)
    top = _reduced(a.elements, _axes(a, dim), True, _chain(tracer, "max", 0.0, name))
    shifted = mapped(lambda e, m: g.op("sub", e, m), a.elements, top)
    powers = mapped(lambda e: g.op("exp", e), shifted)
    total = _reduced(powers, _axes(a, dim), True, _chain(tracer, "add", 0.0, name))
    if "log" in func.overloadpacket.__name__:
        return tracer.traced(mapped(lambda e, s: g.op("sub", e, g.op("log", s)), shifted, total), a.dtype)
    return tracer.traced(mapped(lambda e, s: g.op("div", e, s), powers, total), a.dtype)


@handles("linalg_vector_norm")
def _vector_norm(
    tracer: Tracer,
    func: Any,
    a: Traced,
    ord: float = 2,
    dim: Any = None,
    keepdim: bool = False,
    *,
    dtype: torch.dtype | None = None,
) -> Traced:
    dtype = dtype or a.dtype
    g, name, axes = tracer.graph, dtype_name(dtype), _axes(a, dim)
    elements = cast(g, a.elements, name)
    size = mapped(lambda e: g.op("abs", e), elements)
    if ord in (float("inf"), float("-inf")):
        out = _reduced(size, axes, keepdim, _chain(tracer, "max" if ord > 0 else "min", 0.0, name))
    elif ord == 2:
        squares = mapped(lambda e: g.op("mul", e, e), elements)
        out = _roots(g, _reduced(squares, axes, keepdim, _chain(tracer, "add", 0.0, name)), name, tracer.graded)
    elif ord == 0:
        zero = g.const(0.0, name)
        present = mapped(lambda e: g.cast(g.op("ne", e, zero), name), elements)
        out = _reduced(present, axes, keepdim, _chain(tracer, "add", 0.0, name))
    elif ord == 1:
        out = _reduced(size, axes, keepdim, _chain(tracer, "add", 0.0, name))
    else:
        power, root = g.const(ord, name), g.const(1.0 / ord, name)
        powers = mapped(lambda e: g.op("pow", e, power), size)
        total = _reduced(powers, axes, keepdim, _chain(tracer, "add", 0.0, name))
        out = mapped(lambda e: g.op("pow", e, root), total)
    return tracer.traced(out, dtype)


@handles("cumsum", "cumprod")
def _cumulative(tracer: Tracer, func: Any, a: Traced, dim: int, *, dtype: torch.dtype | None = None) -> Traced:
    name = "add" if func.overloadpacket.__name__ == "cumsum" else "mul"
    dtype = _sum_dtype(a, dtype)
    elements = cast(tracer.graph, a.elements, dtype_name(dtype))
    if not a.ndim:
        return tracer.traced(elements, dtype)
    out = np.moveaxis(elements, dim, 0).copy()
    for i in range(1, len(out)):
        out[i : i + 1] = mapped(functools.partial(tracer.graph.op, name), out[i - 1 : i], out[i : i + 1])
    return tracer.traced(np.moveaxis(out, 0, dim), dtype)


def _spread(tracer: Tracer, a: Traced, dim: Any, correction: float) -> tuple[np.ndarray, np.ndarray]:
    """Mean and variance along some axes, which are kept with length 1; two passes, as torch."""
    g, name, axes = tracer.graph, dtype_name(a.dtype), _axes(a, dim)
    count = math.prod(a.shape[i] for i in axes)

    def average(e: np.ndarray, n: float) -> np.ndarray:
        # Without a degree of freedom left, torch divides by 0.
        operation, by = ("mul", g.const(1.0 / n, name)) if n > 0 else ("div", g.const(0.0, name))
        total = _reduced(e, axes, True, _chain(tracer, "add", 0.0, name))
        return mapped(lambda s: g.op(operation, s, by), total)

    mean = average(a.elements, count)
    apart = mapped(lambda x, m: g.op("sub", x, m), a.elements, mean)
    return mean, average(mapped(lambda d: g.op("mul", d, d), apart), count - correction)


def _roots(g: Graph, squares: np.ndarray, name: str, graded: bool) -> np.ndarray:
    """Square roots of sums of squares; where such a sum is 0 no derivative passes, as in torch."""
    if not graded:
        return mapped(lambda s: g.op("sqrt", s), squares)
    zero = g.const(0.0, name)
    return mapped(lambda s: g.op("where", g.op("eq", s, zero), zero, g.op("sqrt", s)), squares)


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
            out["std"] = _roots(tracer.graph, variance, dtype_name(a.dtype), tracer.graded)
        shaped = [out[k] if keepdim else out[k].squeeze(_axes(a, dim)) for k in result.split("_")]
        made = [tracer.traced(e, a.dtype) for e in shaped]
        return made[0] if len(made) == 1 else tuple(made)

    return handler


for _result in ("var", "std", "var_mean", "std_mean"):
    HANDLERS[_result] = _spread_of(_result)


@handles("native_layer_norm")
def _layer_norm(
    tracer: Tracer, func: Any, a: Traced, shape: Sequence[int], weight: Traced | None, bias: Traced | None, eps: float
) -> tuple[Traced, Traced, Traced]:
    g, name = tracer.graph, dtype_name(a.dtype)
    if any(p is not None and tuple(p.shape) != tuple(shape) for p in (weight, bias)):
        raise RuntimeError(f"a weight or bias of layer_norm is not of shape {tuple(shape)}")
    mean, variance = _spread(tracer, a, list(range(-len(shape), 0)), 0.0)
    one, small = g.const(1.0, name), g.const(eps, name)
    scale = mapped(lambda v: g.op("div", one, g.op("sqrt", g.op("add", v, small))), variance)
    out = mapped(lambda x, m, s: g.op("mul", g.op("sub", x, m), s), a.elements, mean, scale)
    for name_of, factor in (("mul", weight), ("add", bias)):
        if factor is not None:
            out = mapped(functools.partial(g.op, name_of), out, factor.elements)
    return tracer.traced(out, a.dtype), tracer.traced(mean, a.dtype), tracer.traced(scale, a.dtype)


def _places(tracer: Tracer, boundaries: Traced, a: Any, right: bool, out_int32: bool) -> Traced:
    """How many of the sorted boundaries along the last axis lie below each number (``right``: or at it)."""
    g, name = tracer.graph, dtype_name(boundaries.dtype)
    values = elements_of(tracer, a, name)
    edges = boundaries.elements if boundaries.ndim == 1 else boundaries.elements[..., None, :]

    def before(edge: Expression, value: Expression) -> Expression:  # nan comes last
        return g.cast(g.op("not", g.op("gt" if right else "ge", edge, value)), I64)

    passed = mapped(before, edges, values[..., None])
    out = _reduced(passed, (passed.ndim - 1,), False, _chain(tracer, "add", 0, I64))
    return tracer.traced(out, torch.int32 if out_int32 else torch.int64)


@handles("bucketize")
def _bucketize(
    tracer: Tracer, func: Any, a: Any, boundaries: Traced, *, out_int32: bool = False, right: bool = False
) -> Traced:
    return _places(tracer, boundaries, a, right, out_int32)


@handles("searchsorted")
def _searchsorted(
    tracer: Tracer,
    func: Any,
    boundaries: Traced,
    a: Any,
    *,
    out_int32: bool = False,
    right: bool = False,
    side: str | None = None,
    sorter: Traced | None = None,
) -> Traced:
    if sorter is not None:
        raise Unsupported("it calls searchsorted with a sorter")
    return _places(tracer, boundaries, a, right or side == "right", out_int32)
