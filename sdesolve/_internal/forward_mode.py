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
            try:
                pair = torch.func.jvp(function, (x,), (tangent,))
            except RuntimeError as problem:
                if "Nested forward mode" not in str(problem):
                    raise
                return _by_reverse_mode(function, x, tangent)
    return pair[0], pair[1]


def _by_reverse_mode(function: Callable[[Tensor], Tensor], x: Tensor, tangent: Tensor) -> tuple[Tensor, Tensor]:
    """The same inside `forward_ad.dual_level`, in which no other forward mode nests: ``J^T u`` is linear in ``u``."""
    with torch.enable_grad():
        x = x.view_as(x) if x.requires_grad else x.view_as(x).requires_grad_()
        y = function(x)
        u = torch.zeros_like(y, requires_grad=True)
        (back,) = torch.autograd.grad(y, x, u, create_graph=True, allow_unused=True, materialize_grads=True)
        (along,) = torch.autograd.grad(back, u, tangent, create_graph=True, allow_unused=True, materialize_grads=True)
    return y, along
