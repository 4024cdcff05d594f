"""floor, ceil, trunc, round, sign, abs, minimum and maximum, with torch's special values."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from . import intrinsics
from .intrinsics import fabs, round_to_even, select
from .precision import FLOAT32, FLOAT64, Precision

__all__ = ["ROUNDING"]

_floor, _ceil, _trunc = intrinsics.floor, intrinsics.ceil, intrinsics.trunc


def _rounding(precision: Precision) -> dict[str, Callable[..., Any]]:
    F = precision.real
    zero, one, minus_one = F(0.0), F(1.0), F(-1.0)

    @precision.inline
    def floor(x: Any) -> Any:
        return _floor(x)

    @precision.inline
    def ceil(x: Any) -> Any:
        return _ceil(x)

    @precision.inline
    def trunc(x: Any) -> Any:
        return _trunc(x)

    @precision.inline
    def round(x: Any) -> Any:
        return round_to_even(x)

    @precision.inline
    def sign(x: Any) -> Any:
        return select(x > zero, one, select(x < zero, minus_one, zero))  # NaN has sign 0, as in torch

    @precision.inline
    def abs(x: Any) -> Any:
        return fabs(x)

    @precision.inline
    def minimum(x: Any, y: Any) -> Any:
        return select(x != x, x, select(x < y, x, y))

    @precision.inline
    def maximum(x: Any, y: Any) -> Any:
        return select(x != x, x, select(x > y, x, y))

    functions = {"floor": floor, "ceil": ceil, "trunc": trunc, "round": round, "sign": sign, "abs": abs}
    return functions | {"minimum": minimum, "maximum": maximum}


ROUNDING: dict[tuple[str, str], Callable[..., Any]] = {
    (name, p.name): function for p in (FLOAT32, FLOAT64) for name, function in _rounding(p).items()
}
