"""Directional derivatives of functions of tensors."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Iterator
from typing import Any, final

import torch
from sdesolve_kernels.transforms import is_transformed
from torch import Tensor
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode

Function = Callable[[Tensor], Tensor]
Push = Callable[[Tensor], Tensor]

# Torch counts nested levels of forward mode in variables that all threads share: where one thread leaves its level, the
# tangents of another are dropped, and a derivative is 0 or an error.
_one_at_a_time = threading.RLock()


def _renew() -> None:
    """A forked child has the lock, but perhaps not the thread that would release it."""
    global _one_at_a_time
    _one_at_a_time = threading.RLock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew)


def jvp(function: Function, x: Tensor, tangent: Tensor) -> tuple[Tensor, Tensor]:
    """``function(x)``, and its derivative at ``x`` along ``tangent``."""
    value, push = linearised(function, x)
    return value, push(tangent)


def linearised(function: Function, x: Tensor) -> tuple[Tensor, Push]:
    """``function(x)``, and its derivative at ``x`` along whatever tangents are asked for.

    By two reverse modes, the second of which goes through the first, for it is linear: on small tensors an eighth of
    the time of forward mode, the function is evaluated once, and its operations need no forward rules. Transforms of
    ``torch.func`` and ``torch.compile`` get forward mode, as do functions that switch autograd off.
    """
    if torch.compiler.is_compiling() or is_transformed():
        return function(x), lambda v: _forward(function, x, v)
    recording = torch.is_grad_enabled()
    with torch.inference_mode(False), torch.enable_grad():
        leaf = _leaf(x)
        y, whole = _recorded(function, leaf)
        if not whole:
            return y.detach(), lambda v: _forward(function, x, v)
        if not y.requires_grad:
            return y, lambda v: torch.zeros_like(y)
        keep = _has_levels() or (recording and (x.requires_grad or _reads_others(y, leaf)))
        cotangent = torch.zeros_like(y).requires_grad_()
        (pulled,) = torch.autograd.grad(y, leaf, cotangent, create_graph=True, allow_unused=True)

    def push(v: Tensor) -> Tensor:
        if pulled is None or not pulled.requires_grad:
            return torch.zeros_like(y)
        with torch.inference_mode(False), torch.enable_grad():
            v = v.clone() if v.is_inference() else v
            (made,) = torch.autograd.grad(pulled, cotangent, v, create_graph=keep or v.requires_grad, retain_graph=True)
        return made if recording or keep else made.detach()

    return (y if keep else y.detach()), push


def slopes(function: Function, x: Tensor) -> tuple[Tensor, Tensor]:
    """``function(x)``, and its derivatives where each component depends on that of ``x`` alone: one reverse mode."""
    if torch.compiler.is_compiling() or is_transformed():
        return jvp(function, x, torch.ones_like(x))
    recording = torch.is_grad_enabled()
    with torch.inference_mode(False), torch.enable_grad():
        leaf = _leaf(x)
        y, whole = _recorded(function, leaf)
        if not whole:
            return y.detach(), _forward(function, x, torch.ones_like(x))
        if not y.requires_grad:
            return y, torch.zeros_like(x)
        keep = _has_levels() or (recording and (x.requires_grad or _reads_others(y, leaf)))
        (slope,) = torch.autograd.grad(y.sum(), leaf, create_graph=keep, allow_unused=True)
    slope = torch.zeros_like(x) if slope is None else slope
    return (y, slope) if keep else (y.detach(), slope.detach())


def gradient(function: Function, x: Tensor) -> Tensor:
    """The derivative of ``function(x)``, a number for each row, in that row: ``(batch, *state)``."""
    if torch.compiler.is_compiling() or is_transformed():
        return torch.func.grad(lambda y: function(y).sum())(x)
    recording = torch.is_grad_enabled()
    with torch.inference_mode(False), torch.enable_grad():
        leaf = _leaf(x)
        y, _ = _recorded(function, leaf)
        if not y.requires_grad:
            return torch.zeros_like(x)
        keep = _has_levels() or (recording and (x.requires_grad or _reads_others(y, leaf)))
        (slope,) = torch.autograd.grad(y.sum(), leaf, create_graph=keep, allow_unused=True)
    if slope is None:
        return torch.zeros_like(x)
    return slope if keep else slope.detach()


_beside = threading.local()


@contextlib.contextmanager
def beside() -> Iterator[None]:
    """Inside the ``with`` block autograd may be switched off: what is computed there is no part of any function."""
    before, _beside.inside = getattr(_beside, "inside", False), True
    try:
        yield
    finally:
        _beside.inside = before


@final
class _Switches(TorchFunctionMode):
    """Sees whether autograd is switched off."""

    off = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch._C._set_grad_enabled and not args[0] and not getattr(_beside, "inside", False):
            self.off = True
        return func(*args, **(kwargs or {}))


def _recorded(function: Function, x: Tensor) -> tuple[Tensor, bool]:
    """``function(x)``, and whether autograd saw all of it."""
    with _Switches() as switches:
        y = function(x)
    return y, not switches.off


def _leaf(x: Tensor) -> Tensor:
    x = x.clone() if x.is_inference() else x
    if x.requires_grad:
        return x
    return (x.view_as(x) if _has_levels() else x.detach()).requires_grad_()


def _has_levels() -> bool:
    """Whether this is inside `forward_ad.dual_level`, whose tangents `Tensor.detach` would drop."""
    return forward_ad._current_level >= 0


def _forward(function: Function, x: Tensor, tangent: Tensor) -> Tensor:
    if torch.compiler.is_compiling():  # one thread traces, and locks cannot be traced
        return torch.func.jvp(function, (x,), (tangent,))[1]
    with _one_at_a_time:
        return torch.func.jvp(function, (x,), (tangent,))[1]


def _reads_others(y: Tensor, leaf: Tensor) -> bool:
    """Whether gradients of ``y`` flow to anything but ``leaf``."""
    seen, todo = set(), [y.grad_fn]
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        variable = getattr(node, "variable", None)
        if variable is not None and variable is not leaf:
            return True
        todo += [following for following, _ in node.next_functions]
    return False
