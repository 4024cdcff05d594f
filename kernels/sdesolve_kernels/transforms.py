"""What the transforms of ``torch.func`` hide: the tensors beneath them, and plain torch outside of them."""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor
from torch._functorch.pyfunctorch import (
    retrieve_all_functorch_interpreters,
    temporarily_clear_interpreter_stack,
)

__all__ = ["any_copy", "is_mapped", "is_transformed", "outside_transforms", "plain"]


def is_transformed() -> bool:
    """Whether a transform of ``torch.func`` is at work."""
    return torch._C._functorch.peek_interpreter_stack() is not None


def is_mapped() -> bool:
    """Whether `vmap` is at work, under which nothing may depend on values."""
    vmap = torch._C._functorch.TransformType.Vmap
    return is_transformed() and any(each.key() == vmap for each in retrieve_all_functorch_interpreters())


def outside_transforms() -> contextlib.AbstractContextManager[object]:
    """Makes tensors that belong to no transform, inside a ``with`` block that reads no others.

    A tensor made under ``torch.func.grad`` is wrapped: it has no memory that a kernel could write to, and is worth
    nothing to whoever keeps it for later.
    """
    return temporarily_clear_interpreter_stack() if is_transformed() else contextlib.nullcontext()


def plain(x: Tensor) -> Tensor:
    """The values of ``x``, beneath all transforms; axes that `vmap` hides are among its own."""
    functorch = torch._C._functorch
    while functorch.is_functorch_wrapped_tensor(x):
        x = functorch.get_unwrapped(x)
    return x


def any_copy(mask: Tensor) -> Tensor:
    """``mask`` as a plain tensor of its own shape: true where it is in any of the copies that `vmap` makes."""
    functorch = torch._C._functorch
    mapped = []
    while functorch.is_functorch_wrapped_tensor(mask):
        if functorch.is_batchedtensor(mask):
            mapped.append(functorch.maybe_get_bdim(mask))
        mask = functorch.get_unwrapped(mask)
    for axis in reversed(mapped):
        mask = mask.any(axis)
    return mask
