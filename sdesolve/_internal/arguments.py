"""What messages about arguments have in common."""

from __future__ import annotations

import functools
import numbers
import operator
from typing import Any

import numpy as np
import torch
from torch import Tensor


def kind_of(value: Any) -> str:
    """The type of ``value`` for a message; a class passed where an object of it is wanted is named as such."""
    if isinstance(value, type):
        return f"the class {value.__name__}; did you mean {value.__name__}(...)?"
    return type(value).__name__


def number(value: Any, name: str) -> float:
    """``value`` as a float; anything but a real number is refused, text that spells one too.

    Raises:
        TypeError: something else.
    """
    if not isinstance(value, numbers.Real):
        raise TypeError(f"{name} must be a number, got {value!r} of type {kind_of(value)}")
    return float(value)


def whole_number(value: Any, name: str, minimum: int) -> int:
    """``value`` as a Python integer of at least ``minimum``; refuses floats and booleans."""
    if isinstance(value, bool):
        raise TypeError(f"{name} must be an integer, got {value!r}")
    try:
        number = operator.index(value)
    except TypeError:
        hint = f"; write {int(value)}" if isinstance(value, float) and value.is_integer() else ""
        raise TypeError(f"{name} must be an integer, got {value!r} of type {type(value).__name__}{hint}") from None
    if number < minimum:
        raise ValueError(f"{name} must be at least {minimum}, got {number}")
    return number


def name_of(function: Any) -> str:
    """What a function given by the user is called, in a text that is the same in every process: without addresses."""
    if isinstance(function, functools.partial):
        given = [repr(v) for v in function.args] + [f"{k}={v!r}" for k, v in function.keywords.items()]
        return f"{name_of(function.func)}({', '.join(given)})"
    kind = type(function)
    own = kind.__qualname__ if kind.__repr__ is object.__repr__ else repr(function)
    return str(getattr(function, "__qualname__", own))


def real(value: object, name: str) -> Tensor:
    """``value`` as a float64 tensor on the host that shares no memory with it; refuses what is not finite."""
    # By way of NumPy, which reads Python numbers as float64; torch would round them to its default dtype, float32.
    tensor = value if isinstance(value, Tensor) else torch.as_tensor(np.asarray(value))
    if tensor.is_complex():
        raise TypeError(f"{name} must be real, got {tensor.dtype}")
    tensor = tensor.detach().to(device="cpu", dtype=torch.float64, copy=True)
    if not bool(tensor.isfinite().all()):
        raise ValueError(f"{name} must be finite, it holds nan or inf")
    return tensor
