"""How Triton spells expressions, and lines of its source."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import final

from sdesolve_kernels.trajectory.codegen import AbstractDialect
from sdesolve_kernels.trajectory.operations import OpSpec

__all__ = ["Triton", "plus", "wrapped"]

_LINE = 116
_KINDS = {"float32": "F32", "float64": "F64", "int64": "I64"}
_LITERAL = re.compile(r'-?(\d[\d.e+-]*|float\("\w+"\))')


@final
class Triton(AbstractDialect):
    """Triton's language."""

    def constant(self, value: float | bool, dtype: str) -> str:
        if isinstance(value, float) and not math.isfinite(value):
            return f'float("{value}")' if value != -math.inf else '-float("inf")'
        return repr(value)

    def call(self, operation: OpSpec, args: Sequence[str], dtype: str) -> str:
        # A literal takes the type of what it meets in an operator, but not always in a function.
        if not operation.operator:
            args = [f"{_KINDS[dtype]}({a})" if _LITERAL.fullmatch(a) else a for a in args]
        return operation.triton.format(*args)

    def cast(self, value: str, source: str, target: str) -> str:
        return f"({value}).to({'tl.int1' if target == 'bool' else 'tl.' + target})"


def plus(place: str, offset: int) -> str:
    """A place a few numbers further on."""
    return f"{place} + {offset}" if offset else place


def wrapped(start: str, items: Sequence[str], end: str) -> list[str]:
    """A line of items, or several within the line length."""
    line = start + ", ".join(items) + end
    if len(line) <= _LINE - 16 or not end:
        return [line]
    lines, current = [start], "   "
    for item in items:
        if len(current) + len(item) > _LINE - 20:
            lines.append(current)
            current = "   "
        current += f" {item},"
    return [*lines, current, end]
