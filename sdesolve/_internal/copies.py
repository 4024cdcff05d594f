"""Constants that are used in several dtypes and on several devices, copied once for each; what is known of a tensor."""

from __future__ import annotations

import functools
import types
import weakref
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar, final

import torch
from torch import Tensor

_HOST_DTYPES = (torch.float32, torch.float64)
_KNOWN = 256  # values that are remembered
_NUMBERS = (bool, int, float, str, type(None))
_METHODS = (types.FunctionType, property, staticmethod, classmethod)
R = TypeVar("R")
T = TypeVar("T", bound=Tensor | tuple[Tensor | None, ...])


def converted(constant: Tensor, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A constant in another precision, on another device.

    Complex constants become complex numbers of the same precision, integer ones keep their dtype.
    """
    if constant.is_complex():
        dtype = dtype.to_complex()
    elif not constant.is_floating_point():
        dtype = constant.dtype
    return constant.to(device, dtype)


@final
class Copies(Generic[T]):
    """A constant, or a tuple of them, and copies for the dtypes and devices of the tensors that it meets.

    Without copies every use would convert the constant again, and a transfer from the host cannot be captured in a CUDA
    graph. Copies for the host are made at once: one made while a function is being traced would belong to that trace.

    Args:
        constant: float64.
        convert: gives it in another dtype, on another device.
    """

    def __init__(self, constant: T, convert: Callable[[T, torch.dtype, torch.device], T] = converted) -> None:  # type: ignore[assignment]
        self._constant, self._convert = constant, convert
        self._copies: dict[tuple[torch.dtype, torch.device], T] = {}
        for dtype in _HOST_DTYPES:
            self._copies[dtype, torch.device("cpu")] = self._copy(dtype, torch.device("cpu"))

    def like(self, x: Tensor) -> T:
        """The constant in the precision and on the device of ``x``."""
        key = (x.dtype, x.device)
        found = self._copies.get(key)
        if found is not None:
            return found
        made = self._copy(*key)
        first = made if isinstance(made, Tensor) else made[0]
        if type(first) is Tensor and not torch._C._functorch.is_functorch_wrapped_tensor(first):
            self._copies[key] = made
        return made

    def _copy(self, dtype: torch.dtype, device: torch.device) -> T:
        # A copy made in inference mode could not take part in a gradient later.
        with torch.inference_mode(False), torch.no_grad():
            return self._convert(self._constant, dtype, device)


def numbers_of(thing: object) -> Hashable | None:
    """What an object of this library is, if it holds numbers and such objects alone; `None` for any other.

    Equal for objects that compute the same: their classes, the methods that these have now, and the numbers.
    """
    kind = type(thing)
    if not kind.__module__.startswith("sdesolve.") or not hasattr(thing, "__dict__"):
        return None
    held: list[Hashable] = [kind.__qualname__, id(kind)]
    for base in kind.__mro__[:-1]:
        held += [value for value in vars(base).values() if isinstance(value, _METHODS)]
    for name, value in vars(thing).items():
        part: Hashable = (type(value), repr(value)) if isinstance(value, _NUMBERS) else numbers_of(value)
        if part is None:
            return None
        held += (name, part)
    return tuple(held)


def remembered(function: Callable[..., R]) -> Callable[..., R]:
    """``function(tensor, *arguments)``, whose values are kept while the tensor lives and nobody writes to it.

    Grids of equal steps are one tensor for all integrations over them.
    """
    known: dict[tuple[object, ...], tuple[weakref.ref[Tensor], int, R]] = {}

    @functools.wraps(function)
    def call(tensor: Tensor, *arguments: object) -> R:
        if tensor.is_inference():  # which counts no versions
            return function(tensor, *arguments)
        key = (id(tensor), *arguments)
        held = known.get(key)
        if held is not None and held[0]() is tensor and held[1] == tensor._version:
            return held[2]
        value = function(tensor, *arguments)
        if len(known) >= _KNOWN:
            known.clear()
        known[key] = weakref.ref(tensor), tensor._version, value
        return value

    return call
