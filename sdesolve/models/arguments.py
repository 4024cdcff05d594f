"""Checks of the parameters of a model."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from sdesolve._internal.arguments import kind_of, number, short


def finite(value: Any, name: str) -> float:
    """``value`` as a float; refuses what is no finite real number.

    Raises:
        TypeError: no number.
        ValueError: nan or inf.
    """
    if not math.isfinite(value := number(value, name)):
        raise ValueError(f"{name} must be finite, got {short(value)}")
    return value


def positive(value: Any, name: str, *, zero: bool = False) -> float:
    """``value`` as a float; refuses what is not positive, and with ``zero`` what is negative.

    Raises:
        TypeError: no number.
        ValueError: out of range, nan or inf.
    """
    if (value := finite(value, name)) < 0.0 or (value == 0.0 and not zero):
        raise ValueError(f"{name} must be {'at least 0' if zero else 'positive'}, got {short(value)}")
    return value


def function(value: Any, name: str) -> Callable[..., Any]:
    """``value``, which must be a function of ``(x, t)``.

    Raises:
        TypeError: it cannot be called.
    """
    if not callable(value):
        raise TypeError(f"{name} must be a function of (x, t), got {kind_of(value)}")
    return value
