"""Values of expressions that do not depend on a path, in float64, for all steps at once."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from sdesolve_kernels.trajectory.expressions import Expression, topological

__all__ = ["evaluate"]

_FUNCTIONS: dict[str, Callable[..., Tensor]] = {
    "add": torch.add,
    "sub": torch.sub,
    "mul": torch.mul,
    "div": torch.div,
    "pow": torch.pow,
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
    for e in topological(roots):
        match e.op:
            case "const":
                value: Any = torch.tensor(e.data, dtype=torch.bool if e.dtype == "bool" else torch.float64)
            case "time":
                value = times[e.data]
            case "row":
                assert rows is not None
                value = rows[:, e.data]
            case "shared":
                parameter = parameters[e.data[0]]
                assert parameter is not None
                value = parameter[e.data[1]]
            case "cast":
                value = values[e.args[0].number]
                if value.dtype == torch.bool or e.dtype == "bool":
                    value = value.to(torch.bool if e.dtype == "bool" else torch.float64)
                elif e.dtype == "int64":
                    value = value.trunc()
            case "product":
                matrix, parameter = e.data, parameters[e.data.parameter]
                assert parameter is not None
                strided = parameter.as_strided(
                    (matrix.rows, matrix.columns), (matrix.down, matrix.across), matrix.offset
                )
                vector = torch.stack(torch.broadcast_tensors(*(values[a.number] for a in e.args)))
                value = strided @ vector
            case "sum":
                value = torch.stack(torch.broadcast_tensors(*(values[a.number] for a in e.args))).sum(0)
            case "element":
                value = values[e.args[0].number][e.data]
            case name:
                value = _FUNCTIONS[name](*(values[a.number] for a in e.args))
        values[e.number] = value
    return [values[e.number] for e in roots]
