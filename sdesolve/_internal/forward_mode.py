"""Derivatives by forward-mode differentiation, of which torch does one at a time in a process."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable

import torch
from torch import Tensor

# Torch counts nested levels in variables that all threads share: where one thread leaves its level, the tangents of
# another are dropped, and a derivative is 0 or an error.
_one_at_a_time = threading.RLock()


def _renew() -> None:
    """A forked child has the lock, but perhaps not the thread that would release it."""
    global _one_at_a_time
    _one_at_a_time = threading.RLock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew)


def jvp(function: Callable[[Tensor], Tensor], x: Tensor, tangent: Tensor) -> tuple[Tensor, Tensor]:
    """``function(x)``, and its derivative at ``x`` along ``tangent``."""
    if torch.compiler.is_compiling():  # one thread traces, and locks cannot be traced
        pair = torch.func.jvp(function, (x,), (tangent,))
    else:
        with _one_at_a_time:
            pair = torch.func.jvp(function, (x,), (tangent,))
    return pair[0], pair[1]
