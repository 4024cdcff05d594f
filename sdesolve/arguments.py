"""What messages about arguments have in common."""

from __future__ import annotations

import numbers
from typing import Any


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
