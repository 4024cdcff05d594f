"""Values of expressions that do not depend on a path, for all steps at once.

Arithmetic is done in float64, from the same numbers that torch starts from: times are rounded to the precision of the
state, as its functions see them, and what a comparison or a rounding to whole numbers looks at is computed in that
precision from there on. Else a switch at ``t - 0.1 < 0.3`` could fall into another step than it does in torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from sdesolve_kernels.trajectory.expressions import BOOL, F32, I64, Expression, topological
from sdesolve_kernels.trajectory.operations import OPERATIONS

__all__ = ["evaluate"]


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
    seen: dict[int, Tensor] = {e.id: torch.empty(0) for e in _looked_at(order)}

    def look(a: Expression) -> Tensor:
        return seen[a.id].double() if a.id in seen else values[a.id]

    for e in order:
        match e.op:
            case "const":
                value: Any = torch.tensor(e.data, dtype=torch.bool if e.dtype == BOOL else torch.float64, device="cpu")
            case "time":
                value = _rounded(times[e.data.name], e)
            case "table_column":
                assert rows is not None
                value = _rounded(rows[:, e.data.j], e)
            case "shared":
                parameter = parameters[e.data.parameter]
                assert parameter is not None
                value = parameter[e.data.i]
            case "cast":
                value = _cast(look(e.args[0]), e)
            case "product":
                parameter = parameters[e.data.parameter]
                assert parameter is not None
                value = parameter[e.data.entries("cpu")] @ _stacked([values[a.id] for a in e.args])
            case "sum":
                value = _stacked([values[a.id] for a in e.args]).sum(0)
            case "element":
                value = values[e.args[0].id][e.data]
            case name:
                row = OPERATIONS[name]
                value = row.torch(*(look(a) if row.jump else values[a.id] for a in e.args))
        values[e.id] = value
        if e.id in seen:
            known = OPERATIONS.get(e.op)
            seen[e.id] = known.torch(*(seen.get(a.id, values[a.id]) for a in e.args)) if known else value
            seen[e.id] = seen[e.id].float()
    return [values[e.id] for e in roots]


def _stacked(values: Sequence[Tensor]) -> Tensor:
    return torch.stack(torch.broadcast_tensors(*values))


def _cast(value: Tensor, e: Expression) -> Tensor:
    """A value in the type of ``e``, which is held as a float64 unless it is a truth value."""
    if value.dtype == torch.bool or e.dtype == BOOL:
        return value.to(torch.bool if e.dtype == BOOL else torch.float64)
    return value.trunc() if e.dtype == I64 else _rounded(value, e)


def _looked_at(order: Sequence[Expression]) -> list[Expression]:
    """Numbers in float32 that a comparison or a rounding to whole numbers depends on."""
    found: set[int] = set()
    for e in reversed(order):
        if e.op == "cast" or e.id in found or (e.op in OPERATIONS and OPERATIONS[e.op].jump):
            found.update(a.id for a in e.args)
    return [e for e in order if e.id in found and e.dtype == F32]


def _rounded(value: Tensor, e: Expression) -> Tensor:
    """The value as ``e`` has it in torch."""
    return value.float().double() if e.dtype == F32 and value.is_floating_point() else value
