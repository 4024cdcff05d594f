"""What messages about arguments have in common."""

from __future__ import annotations

import functools
import inspect
import math
import numbers
import operator
import reprlib
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor


def kind_of(value: Any) -> str:
    """The type of ``value`` for a message; a class passed where an object of it is wanted is named as such."""
    if isinstance(value, type):
        return f"the class {value.__name__}; did you mean {value.__name__}(...)?"
    return type(value).__name__


_BRIEF = reprlib.Repr()
_BRIEF.maxlist = _BRIEF.maxtuple = _BRIEF.maxset = _BRIEF.maxfrozenset = _BRIEF.maxdict = _BRIEF.maxdeque = 4
_BRIEF.maxlevel, _BRIEF.maxstring, _BRIEF.maxother = 2, 60, 100


def short(value: object) -> str:
    """``value`` in a message, in at most some hundred characters."""
    if isinstance(value, Tensor | np.ndarray) and math.prod(value.shape) != 1:
        return f"{kind_of(value)} of shape {tuple(value.shape)}"
    try:
        text = _BRIEF.repr(value)
    except Exception:  # the object is the user's
        text = kind_of(value)
    return text if len(text) <= 160 else f"{text[:120]}... ({kind_of(value)})"


def flag(value: object, name: str) -> bool:
    """``value`` as a truth value; refuses what is none.

    Raises:
        TypeError: something else.
    """
    if not isinstance(value, bool | np.bool_ | int):
        raise TypeError(f"{name} must be True or False, got {short(value)}")
    return bool(value)


def number(value: Any, name: str) -> float:
    """``value`` as a float; anything but a real number is refused, text that spells one too.

    Raises:
        TypeError: something else.
    """
    if not isinstance(value, numbers.Real):
        raise TypeError(f"{name} must be a number, got {short(value)} of type {kind_of(value)}")
    return float(value)


def whole_number(value: Any, name: str, minimum: int) -> int:
    """``value`` as a Python integer of at least ``minimum``; refuses floats and booleans."""
    if isinstance(value, bool):
        raise TypeError(f"{name} must be an integer, got {short(value)}")
    try:
        number = operator.index(value)
    except TypeError:
        hint = f"; write {int(value)}" if isinstance(value, float) and value.is_integer() else ""
        raise TypeError(f"{name} must be an integer, got {short(value)} of type {type(value).__name__}{hint}") from None
    if number < minimum:
        raise ValueError(f"{name} must be at least {minimum}, got {number}")
    return number


def positional(function: Callable[..., Any]) -> int:
    """How many arguments a function has to be given; 1 where that cannot be told."""
    target = function.forward if isinstance(function, torch.nn.Module) else function
    try:
        parameters = inspect.signature(target).parameters.values()
    except (TypeError, ValueError):
        return 1
    wanted = [p for p in parameters if p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    return max(1, len(wanted))


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
    try:
        tensor = value if isinstance(value, Tensor) else torch.as_tensor(np.asarray(value))
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"{name} must be a number or a tensor of them, got {short(value)}") from None
    if tensor.is_complex():
        raise TypeError(f"{name} must be real, got {tensor.dtype}")
    tensor = tensor.detach().to(device="cpu", dtype=torch.float64, copy=True)
    if not bool(tensor.isfinite().all()):
        raise ValueError(f"{name} must be finite, it holds nan or inf")
    return tensor


def device_of(device: torch.device | str | None) -> torch.device:
    """The device that ``device`` names, torch's default one for None.

    Raises:
        ValueError: there is none.
    """
    try:
        return torch.empty(0, device=device).device
    except Exception as problem:  # of many types, by the build of torch
        reason = str(problem).partition("\n")[0].partition(",")[0]
        raise ValueError(
            f"there is no device {short(device)} here ({reason[:120]}); device='cpu' is always there"
        ) from None
