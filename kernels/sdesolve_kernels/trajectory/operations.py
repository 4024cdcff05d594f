"""What each aten operation does to arrays of expressions."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sdesolve_kernels.trajectory.expressions import BOOL, Expression, Graph
from sdesolve_kernels.trajectory.tracing import Traced, Tracer, Unsupported, cast, dtype_name, result_dtype

__all__ = ["HANDLERS"]

HANDLERS: dict[str, Callable[..., Any]] = {}

_FLOAT_RESULT = frozenset((torch.float32, torch.float64))


def handles(*names: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Registers a handler."""

    def register(handler: Callable[..., Any]) -> Callable[..., Any]:
        for name in names:
            HANDLERS[name] = handler
        return handler

    return register


def apply(function: Callable[..., Expression], *arrays: Any) -> np.ndarray:
    """``function`` elementwise, with broadcasting; always an array."""
    out = np.frompyfunc(function, len(arrays), 1)(*arrays)
    if isinstance(out, np.ndarray):
        return out
    made = np.empty((), dtype=object)
    made[()] = out
    return made


def elements_of(tracer: Tracer, value: Any, dtype: str) -> np.ndarray:
    """A tensor's or a number's elements, cast."""
    if isinstance(value, Traced):
        return cast(tracer.graph, value.elements, dtype)
    made = np.empty((), dtype=object)
    made[()] = tracer.graph.const(value, dtype)
    return made


# Pointwise -------------------------------------------------------------------------------------------------------
def pointwise(name: str, function: Callable[..., Expression], *, compare: bool = False) -> None:
    """Registers ``function(graph, *expressions)`` for an operation on tensors and numbers.

    Operands are promoted to the result's dtype, or, for comparisons, to the dtype torch would compare in.
    """

    def handler(tracer: Tracer, func: Any, *args: Any, **kwargs: Any) -> Traced:
        dtype = result_dtype(func, args, kwargs)
        operands = [elements_of(tracer, a, dtype_name(_common(args) if compare else dtype)) for a in args]
        if "alpha" in kwargs:
            operands[1] = (
                apply(lambda b: tracer.graph.op("mul", b, scale), operands[1])
                if (scale := tracer.graph.const(kwargs["alpha"], dtype_name(dtype))).data != 1
                else operands[1]
            )
        out = apply(lambda *e: function(tracer.graph, *e), *operands)
        return tracer.traced(out, dtype)

    HANDLERS[name] = handler


def _common(args: Any) -> torch.dtype:
    """The dtype in which torch compares."""
    with torch.utils._python_dispatch._disable_current_modes():
        singles = [torch.ones((1,) * a.ndim, dtype=a.dtype) if isinstance(a, Tensor) else a for a in args[:2]]
        return singles[0].dtype if len(singles) == 1 else torch.result_type(*singles)


def _op(name: str) -> Callable[..., Expression]:
    return lambda g, *e: g.op(name, *e)


for _name in ("neg", "abs", "sqrt", "exp", "expm1", "log", "log1p", "sin", "cos", "tan", "tanh", "sinh", "cosh",
              "asin", "acos", "atan", "floor", "ceil", "trunc", "round", "erf", "sign", "atan2"):  # fmt: skip
    pointwise(_name, _op(_name))
for _name, _same in {"add": "add", "sub": "sub", "mul": "mul", "maximum": "max", "minimum": "min"}.items():
    pointwise(_name, _op(_same))
for _name in ("lt", "le", "gt", "ge", "eq", "ne"):
    pointwise(_name, _op(_name), compare=True)
for _name, _same in {"logical_and": "and", "logical_or": "or", "logical_not": "not"}.items():
    pointwise(_name, _op(_same))
pointwise("bitwise_and", lambda g, a, b: g.op("and", _boolean(a), _boolean(b)))
pointwise("bitwise_or", lambda g, a, b: g.op("or", _boolean(a), _boolean(b)))
pointwise("bitwise_not", lambda g, a: g.op("not", _boolean(a)))
pointwise("logical_xor", lambda g, a, b: g.op("ne", _boolean(a), _boolean(b)))


def _boolean(a: Expression) -> Expression:
    if a.dtype != BOOL:
        raise Unsupported("it does bitwise arithmetic on integers")
    return a


def _number(g: Graph, value: float, like: Expression) -> Expression:
    return g.const(value, like.dtype)


def _sigmoid(g: Graph, a: Expression) -> Expression:
    one = _number(g, 1.0, a)
    return g.op("div", one, g.op("add", one, g.op("exp", g.op("neg", a))))


def _rsqrt(g: Graph, a: Expression) -> Expression:
    return g.op("div", _number(g, 1.0, a), g.op("sqrt", a))


def _remainder(g: Graph, a: Expression, b: Expression) -> Expression:
    return g.op("sub", a, g.op("mul", g.op("floor", g.op("div", a, b)), b))


def _isnan(g: Graph, a: Expression) -> Expression:
    return g.op("ne", a, a)


def _isinf(g: Graph, a: Expression) -> Expression:
    return g.op("eq", g.op("abs", a), _number(g, float("inf"), a))


pointwise("rsub", lambda g, a, b: g.op("sub", b, a))
pointwise("reciprocal", lambda g, a: g.op("div", _number(g, 1.0, a), a))
pointwise("square", lambda g, a: g.op("mul", a, a))
pointwise("sigmoid", _sigmoid)
pointwise("rsqrt", _rsqrt)
pointwise("relu", lambda g, a: g.op("max", a, _number(g, 0.0, a)))
pointwise("silu", lambda g, a: g.op("mul", a, _sigmoid(g, a)))
pointwise("exp2", lambda g, a: g.op("exp", g.op("mul", a, _number(g, 0.6931471805599453, a))))
pointwise("log2", lambda g, a: g.op("mul", g.op("log", a), _number(g, 1.4426950408889634, a)))
pointwise("log10", lambda g, a: g.op("mul", g.op("log", a), _number(g, 0.4342944819032518, a)))
pointwise("erfc", lambda g, a: g.op("sub", _number(g, 1.0, a), g.op("erf", a)))
pointwise("isnan", _isnan, compare=True)
pointwise("isinf", _isinf, compare=True)
pointwise("isfinite", lambda g, a: g.op("lt", g.op("abs", a), _number(g, float("inf"), a)), compare=True)
pointwise("pow", _op("pow"))
pointwise("remainder", _remainder)
pointwise("fmod", lambda g, a, b: g.op("sub", a, g.op("mul", g.op("trunc", g.op("div", a, b)), b)))


@handles("div", "true_divide")
def div(tracer: Tracer, func: Any, a: Any, b: Any, *, rounding_mode: str | None = None) -> Traced:
    """Division, true or rounded."""
    kwargs = {} if rounding_mode is None else {"rounding_mode": rounding_mode}
    dtype = result_dtype(func, (a, b), kwargs)
    name = dtype_name(dtype)
    rounding = {None: None, "floor": "floor", "trunc": "trunc"}[rounding_mode]

    def divide(x: Expression, y: Expression) -> Expression:
        q = tracer.graph.op("div", x, y)
        return tracer.graph.op(rounding, q) if rounding else q

    return tracer.traced(apply(divide, elements_of(tracer, a, name), elements_of(tracer, b, name)), dtype)


@handles("where")
def where(tracer: Tracer, func: Any, condition: Traced, a: Any = None, b: Any = None) -> Traced:
    """``a`` where the condition holds."""
    if a is None:
        raise Unsupported("it asks for the indices where a condition holds")
    dtype = result_dtype(func, (condition, a, b), {})
    name = dtype_name(dtype)
    c = cast(tracer.graph, condition.elements, BOOL)
    out = apply(_where(tracer), c, elements_of(tracer, a, name), elements_of(tracer, b, name))
    return tracer.traced(out, dtype)


def _where(tracer: Tracer) -> Callable[..., Expression]:
    return lambda c, x, y: tracer.graph.op("where", c, x, y)


@handles("masked_fill")
def masked_fill(tracer: Tracer, func: Any, a: Traced, mask: Traced, value: Any) -> Traced:
    """``value`` where the mask holds."""
    dtype = dtype_name(a.dtype)
    return tracer.traced(apply(_where(tracer), mask.elements, elements_of(tracer, value, dtype), a.elements), a.dtype)


@handles("clamp", "clip")
def clamp(tracer: Tracer, func: Any, a: Traced, min: Any = None, max: Any = None) -> Traced:
    """Limits; nan stays nan."""
    dtype = result_dtype(func, (a, min, max), {})
    name = dtype_name(dtype)
    out = elements_of(tracer, a, name)
    for op, bound in (("max", min), ("min", max)):
        if bound is not None:
            out = apply(functools.partial(tracer.graph.op, op), out, elements_of(tracer, bound, name))
    return tracer.traced(out, dtype)


@handles("clamp_min")
def clamp_min(tracer: Tracer, func: Any, a: Traced, min: Any) -> Traced:
    """Lower limit."""
    return clamp(
        tracer, torch.ops.aten.clamp.Tensor if isinstance(min, Tensor) else torch.ops.aten.clamp.default, a, min
    )


@handles("clamp_max")
def clamp_max(tracer: Tracer, func: Any, a: Traced, max: Any) -> Traced:
    """Upper limit."""
    overload = torch.ops.aten.clamp.Tensor if isinstance(max, Tensor) else torch.ops.aten.clamp.default
    return clamp(tracer, overload, a, None, max)


@handles("softplus")
def softplus(tracer: Tracer, func: Any, a: Traced, beta: float = 1, threshold: float = 20) -> Traced:
    """``log(1 + exp(beta x)) / beta``, and ``x`` above the threshold."""
    g = tracer.graph

    def one(x: Expression) -> Expression:
        scaled = g.op("mul", x, _number(g, beta, x))
        smooth = g.op("div", g.op("log1p", g.op("exp", scaled)), _number(g, beta, x))
        return g.op("where", g.op("gt", scaled, _number(g, threshold, x)), x, smooth)

    return tracer.traced(apply(one, a.elements), a.dtype)


@handles("gelu")
def gelu(tracer: Tracer, func: Any, a: Traced, *, approximate: str = "none") -> Traced:
    """``x Phi(x)``, exact or by tanh."""
    g = tracer.graph

    def one(x: Expression) -> Expression:
        half, unit = _number(g, 0.5, x), _number(g, 1.0, x)
        if approximate == "tanh":
            cube = g.op("mul", g.op("mul", g.op("mul", x, x), x), _number(g, 0.044715, x))
            inner = g.op("tanh", g.op("mul", g.op("add", x, cube), _number(g, 0.7978845608028654, x)))
        else:
            inner = g.op("erf", g.op("mul", x, _number(g, 0.7071067811865476, x)))
        return g.op("mul", g.op("mul", half, x), g.op("add", unit, inner))

    return tracer.traced(apply(one, a.elements), a.dtype)


# Types and values ------------------------------------------------------------------------------------------------
@handles("_to_copy", "to")
def to_copy(tracer: Tracer, func: Any, a: Traced, *, dtype: torch.dtype | None = None, **options: Any) -> Traced:
    """Another dtype; the device is the kernel's."""
    dtype = a.dtype if dtype is None else dtype
    device = options.get("device")
    if device is not None and torch.device(device).type != tracer.device.type:
        raise Unsupported(f"it moves a tensor to {device}, and the state is on {tracer.device}")
    if dtype not in _FLOAT_RESULT and dtype not in (torch.int64, torch.int32, torch.bool):
        raise Unsupported(f"it converts to {dtype}; generated kernels compute in float32 and float64")
    return tracer.traced(cast(tracer.graph, a.elements, dtype_name(dtype)).copy(), dtype)


@handles("copy_")
def copy_(tracer: Tracer, func: Any, target: Traced, source: Traced, non_blocking: bool = False) -> Traced:
    """In-place copy."""
    tracer.store(target, source)
    return target


@handles("copy")
def copy(tracer: Tracer, func: Any, target: Traced, source: Traced, non_blocking: bool = False) -> Traced:
    """Out-of-place copy."""
    out = np.empty(target.shape, dtype=object)
    out[...] = cast(tracer.graph, source.elements, dtype_name(target.dtype))
    return tracer.traced(out, target.dtype)


@handles("fill")
def fill(tracer: Tracer, func: Any, a: Traced, value: Any) -> Traced:
    """One value everywhere."""
    out = np.empty(a.shape, dtype=object)
    out[...] = elements_of(tracer, value, dtype_name(a.dtype))
    return tracer.traced(out, a.dtype)


@handles("zero")
def zero(tracer: Tracer, func: Any, a: Traced) -> Traced:
    """Zeros."""
    return fill(tracer, func, a, 0.0)


def _new(value: float | None) -> Callable[..., Traced]:
    def handler(tracer: Tracer, func: Any, a: Traced, *args: Any, dtype: torch.dtype | None = None, **_: Any) -> Traced:
        name = func.overloadpacket.__name__
        shape = tuple(a.shape) if name.endswith("_like") else tuple(args[0])
        fill_value = args[-1] if "full" in name else 0.0 if value is None else value
        dtype = a.dtype if dtype is None else dtype
        out = np.empty(shape, dtype=object)
        out[...] = tracer.graph.const(fill_value, dtype_name(dtype))
        return tracer.traced(out, dtype)

    return handler


for _kind, _value in {"zeros": 0.0, "ones": 1.0, "full": None, "empty": float("nan")}.items():
    HANDLERS[f"{_kind}_like"] = HANDLERS[f"new_{_kind}"] = _new(_value)
HANDLERS["new_empty_strided"] = _new(float("nan"))


@handles("_local_scalar_dense", "item", "is_nonzero", "equal")
def value_on_host(tracer: Tracer, func: Any, *args: Any) -> Any:
    """The value of one element, which is known only for constants."""
    values = [a.elements.item() for a in args if isinstance(a, Traced) and a.elements.size == 1]
    if len(values) == 1 and values[0].op == "const":
        return values[0].data
    raise Unsupported(
        "it reads the value of a tensor in Python (an if or while on a tensor, float(), int(), .item()); "
        "torch.where chooses without reading"
    )


@handles("is_same_size")
def is_same_size(tracer: Tracer, func: Any, a: Traced, b: Traced) -> bool:
    """Whether shapes are equal."""
    return a.shape == b.shape


@handles("_has_same_storage_numel")
def has_same_storage(tracer: Tracer, func: Any, a: Traced, b: Traced) -> bool:
    """Asked by forward-mode differentiation before it lets a tangent share a layout."""
    return a.elements.size == b.elements.size
