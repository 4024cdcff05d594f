"""Cotangents of a few numbers pulled back to entries of tensors, as Python's numbers.

Torch's autograd takes some microseconds for each operation on a single number; this a tenth of that.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any, final

import numpy as np
import torch
from torch import Tensor

from sdesolve_kernels.trajectory.derivatives import vjp
from sdesolve_kernels.trajectory.expressions import FLOATS, Expression, topological
from sdesolve_kernels.trajectory.launch import on_host
from sdesolve_kernels.trajectory.leaves import Cotangent, Shared, Time
from sdesolve_kernels.trajectory.operations import OPERATIONS
from sdesolve_kernels.trajectory.reverse import Reverse

__all__ = ["Scalars", "scalars"]


def scalars(reverse: Reverse, wanted: Collection[int]) -> Scalars | None:
    """What pulls back columns and loop invariants of a reverse, or ``None``.

    Args:
        reverse: whose `Reverse.columns` and `Reverse.loop_invariants`; its columns are steady.
        wanted: parameters whose gradients are.

    Returns:
        ``None`` for expressions that jump or hold matrices: what those look at is rounded as torch rounds it.
    """
    plan = reverse.plan
    roots = [plan.columns[j] for j in reverse.columns] + [plan.loop_invariants[j] for j in reverse.loop_invariants]
    if not reverse.steady or not all(map(_is_plain, topological(roots))):
        return None
    return Scalars(reverse, roots, wanted)


def _is_plain(e: Expression) -> bool:
    if e.dtype not in FLOATS:
        return False
    if not e.args:
        return e.op == "const" or isinstance(e.data, Shared | Time)
    known = OPERATIONS.get(e.op)
    return e.op in ("cast", "sum") or (known is not None and not known.jump and e.op != "where")


@final
class Scalars:
    """The reverse of some numbers, made of entries of tensors and of the length of a step."""

    def __init__(self, reverse: Reverse, roots: Sequence[Expression], wanted: Collection[int]) -> None:
        graph = reverse.plan.program.graph
        leaves = [e for e in topological(roots) if isinstance(e.data, Shared)]
        self._wrt = [e for e in leaves if e.data.parameter in wanted]
        given = [graph.leaf(Cotangent(i), e.dtype) for i, e in enumerate(roots)]
        self._found = vjp(graph, roots, given, self._wrt)
        self._order = topological(self._found)
        read = {e.data for e in self._order if isinstance(e.data, Shared)}
        self._read = {i: sorted(a.i for a in read if a.parameter == i) for i in {a.parameter for a in read}}

    def __call__(self, captured: Sequence[Tensor], dt: float, cotangents: Sequence[float]) -> dict[int, Tensor]:
        """Gradients by number of the parameter, flat and float64, on the host."""
        numbers: dict[Any, float] = {Time("dt"): dt, Time("scale"): abs(dt) ** 0.5}
        for parameter, places in self._read.items():
            entries = on_host(captured[parameter])[places].tolist()
            numbers |= {Shared(parameter, i): a for i, a in zip(places, entries, strict=True)}
        values: dict[int, Any] = {}
        with np.errstate(all="ignore"):
            for e in self._order:
                values[e.id] = _value(e, [values[a.id] for a in e.args], numbers, cotangents)
        found: dict[int, Tensor] = {}
        for w, e in zip(self._wrt, self._found, strict=True):
            i = w.data.parameter
            if i not in found:
                found[i] = torch.zeros(captured[i].numel(), dtype=torch.float64, device="cpu")
            found[i].numpy()[w.data.i] = values[e.id]
        return found


def _value(e: Expression, args: Sequence[Any], numbers: dict[Any, float], cotangents: Sequence[float]) -> Any:
    match e.op:
        case "const":
            return e.data
        case "cotangent":
            return cotangents[e.data.i]
        case "cast":
            return args[0]
        case "sum":
            return sum(args)
    return OPERATIONS[e.op].fold(*args) if e.args else numbers[e.data]
