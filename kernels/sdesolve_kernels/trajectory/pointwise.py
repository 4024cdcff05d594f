"""What each aten operation does to arrays of expressions."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sdesolve_kernels.trajectory.expressions import BOOL, F32, F64, FLOATS, I64, Expression, Graph
from sdesolve_kernels.trajectory.tracing import (
    READS,
    Traced,
    Tracer,
    Unsupported,
    cast,
    dtype_name,
    mapped,
    result_dtype,
)

__all__ = ["EXTREMES", "HANDLERS"]

HANDLERS: dict[str, Callable[..., Any]] = {}

_FLOAT_RESULT = frozenset((torch.float32, torch.float64))


def handles(*names: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Registers a handler."""

    def register(handler: Callable[..., Any]) -> Callable[..., Any]:
        for name in names:
            HANDLERS[name] = handler
        return handler

    return register


def elements_of(tracer: Tracer, value: Any, dtype: str) -> np.ndarray:
    """A tensor's or a number's elements, cast."""
    if isinstance(value, Traced):
        return cast(tracer.graph, value.elements, dtype)
    made = np.empty((), dtype=object)
    made[()] = tracer.graph.const(value, dtype)
    return made


Rule = Callable[..., Expression]


def pointwise(
    name: str, function: Rule | str, *, whole: Rule | None = None, boolean: Rule | None = None, compare: bool = False
) -> None:
    """Registers ``function(graph, *expressions)`` for an operation on tensors and numbers.

    Operands are promoted to the result's dtype, or, for comparisons, to the dtype torch would compare in.

    Args:
        name: of the aten operation.
        function: for floats; for a comparison, for all types. A name stands for that row of `OPERATIONS`.
        whole: for a result of whole numbers; refused without.
        boolean: for a result of truth values; refused without.
        compare: whether the result is a truth value whatever the operands are.
    """
    function = _op(function) if isinstance(function, str) else function
    rules = {I64: whole, BOOL: boolean}

    def handler(tracer: Tracer, func: Any, *args: Any, alpha: float = 1) -> Traced:
        dtype = result_dtype(func, args, {} if alpha == 1 else {"alpha": alpha})
        kind = dtype_name(_common(args) if compare else dtype)
        rule = function if compare else rules.get(kind, function)
        if rule is None:
            raise Unsupported(f"it calls {name} on {kind} tensors, which no kernel is generated for")
        operands = [elements_of(tracer, a, kind) for a in args]
        if alpha != 1:
            # The scaled operand is the one that is added to, or subtracted from, the other.
            scaled, scale = 0 if name == "rsub" else 1, tracer.graph.const(alpha, kind)
            operands[scaled] = mapped(lambda b: tracer.graph.op("mul", b, scale), operands[scaled])
        return tracer.traced(mapped(lambda *e: rule(tracer.graph, *e), *operands), dtype)

    HANDLERS[name] = handler


def _common(args: Any) -> torch.dtype:
    """The dtype in which torch compares."""
    with torch.utils._python_dispatch._disable_current_modes():
        singles = [torch.ones((1,) * a.ndim, dtype=a.dtype) if isinstance(a, Tensor) else a for a in args[:2]]
        return singles[0].dtype if len(singles) == 1 else torch.result_type(*singles)


def _op(name: str) -> Rule:
    return lambda g, *e: g.op(name, *e)


def _unchanged(g: Graph, a: Expression) -> Expression:
    return a


def _larger(g: Graph, a: Expression, b: Expression) -> Expression:
    return g.op("where", g.op("gt", a, b), a, b)


def _smaller(g: Graph, a: Expression, b: Expression) -> Expression:
    return g.op("where", g.op("lt", a, b), a, b)


def constant(g: Graph, value: float, like: Expression) -> Expression:
    """A constant of the type of ``like``."""
    return g.const(value, like.dtype)


def _whole_sign(g: Graph, a: Expression) -> Expression:
    zero = constant(g, 0, a)
    return g.op("sub", g.cast(g.op("gt", a, zero), I64), g.cast(g.op("lt", a, zero), I64))


for _name in ("sqrt", "exp", "expm1", "log", "log1p", "sin", "cos", "tan", "tanh", "sinh", "cosh", "asin", "acos",
              "atan", "erf", "atan2"):  # fmt: skip
    pointwise(_name, _op(_name))
for _name in ("floor", "ceil", "trunc"):
    pointwise(_name, _op(_name), whole=_unchanged)
for _name in ("add", "sub", "mul"):
    pointwise(_name, _op(_name), whole=_op(_name), boolean=_op({"add": "or", "mul": "and"}.get(_name, _name)))
pointwise("neg", _op("neg"), whole=_op("neg"))
pointwise("abs", _op("abs"), whole=lambda g, a: _larger(g, a, g.op("neg", a)), boolean=_unchanged)
pointwise("sign", _op("sign"), whole=_whole_sign, boolean=_unchanged)
EXTREMES: dict[tuple[str, str], Rule] = {
    ("max", F32): _op("max"),
    ("max", F64): _op("max"),
    ("max", I64): _larger,
    ("max", BOOL): _op("or"),
    ("min", F32): _op("min"),
    ("min", F64): _op("min"),
    ("min", I64): _smaller,
    ("min", BOOL): _op("and"),
}
for _name, _same in {"maximum": "max", "minimum": "min"}.items():
    pointwise(_name, EXTREMES[_same, F32], whole=EXTREMES[_same, I64], boolean=EXTREMES[_same, BOOL])
for _name in ("lt", "le", "gt", "ge", "eq", "ne"):
    pointwise(_name, _op(_name), compare=True)
for _name, _same in {"and": "and", "or": "or", "not": "not", "xor": "ne"}.items():
    pointwise(f"logical_{_name}", _op(_same), boolean=_op(_same))
    pointwise(f"bitwise_{_name}", _op(_same), boolean=_op(_same))


def whole_quotient(g: Graph, a: Expression, b: Expression, down: bool) -> Expression:
    """``a / b`` of whole numbers, rounded down or towards 0; of constants only."""
    if a.op != "const" or b.op != "const" or b.data == 0:
        raise Unsupported("it divides whole numbers that are not constant; divide floats, and round")
    q = abs(a.data) // abs(b.data)
    return g.const(a.data // b.data if down else q if (a.data < 0) == (b.data < 0) else -q, I64)


def _floored(g: Graph, a: Expression, b: Expression) -> Expression:
    """``a / b`` rounded down, from the remainder: 1 // 0.1 is 9, for 0.1 is a little more than a tenth."""
    zero, one, left = constant(g, 0, a), constant(g, 1, a), g.op("fmod", a, b)
    q = g.op("div", g.op("sub", a, left), b)
    other_side = g.op("ne", g.op("lt", b, zero), g.op("lt", left, zero))
    q = g.op("where", g.op("and", g.op("ne", left, zero), other_side), g.op("sub", q, one), q)
    down = g.op("floor", q)
    down = g.op("where", g.op("gt", g.op("sub", q, down), constant(g, 0.5, a)), g.op("add", down, one), down)
    return g.op("where", g.op("eq", b, zero), g.op("div", a, b), down)


@handles("div", "true_divide")
def div(tracer: Tracer, func: Any, a: Any, b: Any, *, rounding_mode: str | None = None) -> Traced:
    """Division, true or rounded."""
    kwargs = {} if rounding_mode is None else {"rounding_mode": rounding_mode}
    dtype = result_dtype(func, (a, b), kwargs)
    name = dtype_name(dtype)
    rounding = {None: None, "floor": "floor", "trunc": "trunc"}[rounding_mode]

    def divide(x: Expression, y: Expression) -> Expression:
        if name == I64:
            return whole_quotient(tracer.graph, x, y, rounding_mode == "floor")
        if rounding == "floor":
            return _floored(tracer.graph, x, y)
        q = tracer.graph.op("div", x, y)
        return tracer.graph.op(rounding, q) if rounding else q

    return tracer.traced(mapped(divide, elements_of(tracer, a, name), elements_of(tracer, b, name)), dtype)


@handles("where")
def where(tracer: Tracer, func: Any, condition: Traced, a: Any = None, b: Any = None) -> Traced:
    """``a`` where the condition holds."""
    if a is None:
        raise Unsupported("it asks for the indices where a condition holds")
    dtype = result_dtype(func, (condition, a, b), {})
    name = dtype_name(dtype)
    c = cast(tracer.graph, condition.elements, BOOL)
    out = mapped(_where(tracer), c, elements_of(tracer, a, name), elements_of(tracer, b, name))
    return tracer.traced(out, dtype)


def _where(tracer: Tracer) -> Callable[..., Expression]:
    return lambda c, x, y: tracer.graph.op("where", c, x, y)


@handles("masked_fill")
def masked_fill(tracer: Tracer, func: Any, a: Traced, mask: Traced, value: Any) -> Traced:
    """``value`` where the mask holds."""
    dtype = dtype_name(a.dtype)
    return tracer.traced(mapped(_where(tracer), mask.elements, elements_of(tracer, value, dtype), a.elements), a.dtype)


@handles("clamp", "clip")
def clamp(tracer: Tracer, func: Any, a: Traced, min: Any = None, max: Any = None) -> Traced:
    """Limits; nan stays nan."""
    dtype = result_dtype(func, (a, min, max), {})
    name = dtype_name(dtype)
    out = elements_of(tracer, a, name)
    for kind, limit in (("max", min), ("min", max)):
        if limit is not None:
            rule = _op({"max": "clamp_min", "min": "clamp_max"}[kind]) if name in FLOATS else EXTREMES[kind, name]
            out = mapped(functools.partial(rule, tracer.graph), out, elements_of(tracer, limit, name))
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


@handles("_to_copy")
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


@handles("_local_scalar_dense", "item", "is_nonzero", "equal", "allclose")
def value_on_host(tracer: Tracer, func: Any, *args: Any, **_: Any) -> Any:
    """The value of one element, which is known only for constants."""
    values = [a.elements.item() for a in args if isinstance(a, Traced) and a.elements.size == 1]
    if len(values) == 1 and values[0].op == "const":
        return values[0].data
    raise Unsupported(READS.format("an if or while on a tensor, float(), int(), .item()"))


@handles("is_same_size")
def is_same_size(tracer: Tracer, func: Any, a: Traced, b: Traced) -> bool:
    """Whether shapes are equal."""
    return a.shape == b.shape


@handles("_has_same_storage_numel")
def has_same_storage(tracer: Tracer, func: Any, a: Traced, b: Traced) -> bool:
    """Asked by forward-mode differentiation before it lets a tangent share a layout."""
    return a.elements.size == b.elements.size
