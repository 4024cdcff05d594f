"""Checks of the parameters of a model, and what several models are made of."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

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


def root(v: Tensor) -> Tensor:
    """``sqrt(max(v, 0))``, whose derivative is 0, and not nan, where ``v`` is not positive."""
    return torch.where(v > 0.0, v, 1.0).sqrt().where(v > 0.0, 0.0)
