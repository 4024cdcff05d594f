"""Values of expressions that do not depend on a path, for all steps at once.

Arithmetic is done in float64, from the same numbers that torch starts from: times are rounded to the precision of the
state, as its functions see them, and what a comparison or a rounding to whole numbers looks at is computed in that
precision from there on. Else a switch at ``t - 0.1 < 0.3`` could fall into another step than it does in torch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from sdesolve_kernels.trajectory.expressions import F32, Expression, topological

__all__ = ["evaluate"]

_JUMPS = frozenset(("lt", "le", "gt", "ge", "eq", "ne", "floor", "ceil", "trunc", "round", "sign", "fmod"))

_FUNCTIONS: dict[str, Callable[..., Tensor]] = {
    "add": torch.add,
    "sub": torch.sub,
    "mul": torch.mul,
    "div": torch.div,
    "pow": torch.pow,
    "fmod": torch.fmod,
    "min": torch.minimum,
    "max": torch.maximum,
    "and": torch.logical_and,
    "or": torch.logical_or,
    "not": torch.logical_not,
    **{
        name: getattr(torch, name)
        for name in (
            "neg", "abs", "sqrt", "exp", "expm1", "log", "log1p", "sin", "cos", "tan", "tanh", "sinh", "cosh", "asin",
            "acos", "atan", "atan2", "floor", "ceil", "trunc", "round", "erf", "sign", "lt", "le", "gt", "ge", "eq",
            "ne", "where",
        )
    },
}  # fmt: skip


def evaluate(
    roots: Sequence[Expression], times: Mapping[str, Tensor], rows: Tensor | None, parameters: Sequence[Tensor | None]
) -> list[Tensor]:
    """Values of ``roots``.

    Args:
        roots: expressions of times, table rows and shared parameters.
        times: by name, ``(steps,)``, float64 on the host.
        rows: the solver's table, ``(steps, columns)``, float64.
        parameters: flattened tensors that all paths share, float64 (or bool or int64) on the host; ``None`` for others.

    Returns:
        ``(steps,)`` for what depends on time, ``()`` for what does not; float64, or bool.
    """
    values: dict[int, Any] = {}
    order = topological(roots)
    # In float32, of what jumps depend on.
    seen: dict[int, Tensor] = {e.number: torch.empty(0) for e in _looked_at(order)}

    def look(a: Expression) -> Tensor:
        return seen[a.number].double() if a.number in seen else values[a.number]

    for e in order:
        match e.op:
            case "const":
                value: Any = torch.tensor(
                    e.data, dtype=torch.bool if e.dtype == "bool" else torch.float64, device="cpu"
                )
            case "time":
                value = _rounded(times[e.data], e)
            case "row":
                assert rows is not None
                value = _rounded(rows[:, e.data], e)
            case "shared":
                parameter = parameters[e.data[0]]
                assert parameter is not None
                value = parameter[e.data[1]]
            case "cast":
                value = look(e.args[0])
                if value.dtype == torch.bool or e.dtype == "bool":
                    value = value.to(torch.bool if e.dtype == "bool" else torch.float64)
                elif e.dtype == "int64":
                    value = value.trunc()
                else:
                    value = _rounded(value, e)
            case "product":
                matrix, parameter = e.data, parameters[e.data.parameter]
                assert parameter is not None
                i = torch.arange(matrix.rows, device="cpu")[:, None]
                j = torch.arange(matrix.columns, device="cpu")
                vector = torch.stack(torch.broadcast_tensors(*(values[a.number] for a in e.args)))
                value = parameter[matrix.entry(i, j)] @ vector
            case "sum":
                value = torch.stack(torch.broadcast_tensors(*(values[a.number] for a in e.args))).sum(0)
            case "element":
                value = values[e.args[0].number][e.data]
            case name:
                value = _FUNCTIONS[name](*(look(a) if name in _JUMPS else values[a.number] for a in e.args))
        values[e.number] = value
        if e.number in seen:
            own = e.op in _FUNCTIONS
            seen[e.number] = _FUNCTIONS[e.op](*(seen.get(a.number, values[a.number]) for a in e.args)) if own else value
            seen[e.number] = seen[e.number].float()
    return [values[e.number] for e in roots]


def _looked_at(order: Sequence[Expression]) -> list[Expression]:
    """Numbers in float32 that a comparison or a rounding to whole numbers depends on."""
    found: set[int] = set()
    for e in reversed(order):
        if e.op in _JUMPS or e.op == "cast" or e.number in found:
            found.update(a.number for a in e.args)
    return [e for e in order if e.number in found and e.dtype == F32]


def _rounded(value: Tensor, e: Expression) -> Tensor:
    """The value as ``e`` has it in torch."""
    return value.float().double() if e.dtype == F32 and value.is_floating_point() else value
