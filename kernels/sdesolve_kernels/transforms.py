"""What the transforms of ``torch.func`` hide: the tensors beneath them, and plain torch outside of them."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, final

import torch
from torch import Tensor
from torch._C._functorch import pop_dynamic_layer_stack, push_dynamic_layer_stack
from torch._functorch.pyfunctorch import (
    VmapInterpreter,
    retrieve_all_functorch_interpreters,
    temporarily_clear_interpreter_stack,
)
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

__all__ = [
    "Directions", "any_copy", "directions", "is_mapped", "is_transformed", "outside_transforms", "plain",
    "values_alone",
]  # fmt: skip


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


@final
@dataclasses.dataclass(frozen=True)
class Directions:
    """Forward derivatives that are being taken here: dual tensors, `jvp`, or `vmap` over one `jvp`, as in `jacfwd`.

    Attributes:
        count: tangents at once.
        level: of the `vmap` over them; ``None`` without one.
    """

    count: int
    level: int | None

    def split(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """The plain values of a tensor, and its tangents, ``(count, *shape)``, if it has any.

        Raises:
            ValueError: its values are themselves mapped or differentiated.
        """
        functorch, transformed = torch._C._functorch, is_transformed()
        if transformed and not functorch.is_functorch_wrapped_tensor(x):
            return x, None
        value, tangent = (x, None) if functorch.is_batchedtensor(x) else forward_ad.unpack_dual(x, level=0)
        if transformed and not functorch.is_batchedtensor(value):
            value = functorch.get_unwrapped(value)
            tangent = None if tangent is None else functorch.get_unwrapped(tangent)
        with outside_transforms():
            if tangent is not None and functorch.is_batchedtensor(tangent):
                axis, tangent = functorch.maybe_get_bdim(tangent), functorch.get_unwrapped(tangent)
                tangent = tangent.movedim(axis, 0)
            elif tangent is not None and not functorch.is_functorch_wrapped_tensor(tangent):
                zero = tangent._is_zerotensor()
                tangent = torch.zeros_like(value)[None] if zero else tangent[None]
                tangent = tangent.expand(self.count, *tangent.shape[1:])
        if any(t is not None and functorch.is_functorch_wrapped_tensor(t) for t in (value, tangent)):
            raise ValueError("values under derivatives are mapped or differentiated themselves")
        return value, tangent

    def join(self, x: Tensor, tangents: Tensor) -> Tensor:
        """The tensor of which `split` gives these."""
        if self.level is not None:
            tangents = torch._C._functorch._add_batch_dim(tangents, 0, self.level)
        else:
            with outside_transforms():
                tangents = tangents[0]
        return forward_ad.make_dual(x, tangents, level=0)


def directions() -> Directions | None:
    """Of which forward derivatives are being taken here; ``None`` if of none, or of ones in or over other transforms.

    That torch is able to take them does not mean that any tensor has a tangent.
    """
    if not torch._C._is_fwd_grad_enabled():
        return None
    if not is_transformed():
        return Directions(1, None) if forward_ad._current_level >= 0 else None
    kinds, interpreters = torch._C._functorch.TransformType, retrieve_all_functorch_interpreters()
    match [each.key() for each in interpreters]:
        case [kinds.Jvp]:
            return Directions(1, None)
        case [kinds.Vmap, kinds.Jvp]:
            outer = interpreters[0]
            assert isinstance(outer, VmapInterpreter)
            return Directions(outer.batch_size(), outer.level())
    return None


@contextlib.contextmanager
def values_alone(values: Mapping[int, Tensor]) -> Iterator[Callable[[], contextlib.AbstractContextManager[None]]]:
    """No transform, and no tangents, inside the ``with`` block; gives what undoes that inside another.

    Args:
        values: by identity of tensors that have tangents or belong to a transform, what to read in place of them. It
            may grow.
    """

    @contextlib.contextmanager
    def restored() -> Iterator[None]:
        depth, mode.values = len(stack), {}
        try:
            _push(stack)
            with forward_ad._set_fwd_grad_enabled(True):
                yield
        finally:
            stack.extend(pop_dynamic_layer_stack() for _ in range(depth))
            mode.values = values

    mode, stack = _Reading(values), list[Any]()
    try:
        while is_transformed():
            stack.append(pop_dynamic_layer_stack())
        with forward_ad._set_fwd_grad_enabled(False), mode:
            yield restored
    finally:
        _push(stack)


def _push(stack: list[Any]) -> None:
    """Puts interpreters back, the outermost of which is last."""
    while stack:
        push_dynamic_layer_stack(stack.pop())


class _Reading(TorchFunctionMode):
    """Reads other tensors in place of some."""

    def __init__(self, values: Mapping[int, Tensor]) -> None:
        super().__init__()
        self.values = values

    def __torch_function__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        if self.values:
            args, kwargs = tree_map(lambda a: self.values.get(id(a), a), (args, kwargs))
        return func(*args, **(kwargs or {}))
