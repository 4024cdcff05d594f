"""Tensors as kernels see them: an address and a storage type, widened where it is read and rounded where it is written.

Addresses instead of arrays, because unpacking one array costs Numba as much as unpacking ten integers, and a step on a
thousand elements takes a microsecond.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numba import carray
from numba.np.numpy_support import from_dtype

from .compile import inline
from .intrinsics import as_float32, as_int32, from_float16, pointer, select, to_float16

__all__ = ["COMPUTE", "at", "storage"]

# Name of a torch dtype -> numpy dtype that it is computed in.
COMPUTE: dict[str, Any] = {"float32": np.float32, "float64": np.float64, "bfloat16": np.float32, "float16": np.float32}

_16, _1, _ROUND, _NAN = np.uint32(16), np.uint32(1), np.uint32(0x7FFF), np.uint32(0x7FC0)


def _view(dtype: Any) -> Callable[[Any, Any], Any]:
    element = from_dtype(np.dtype(dtype))

    @inline
    def view(address: Any, size: Any) -> Any:
        return carray(pointer(address, element), size)

    return view


# numpy type -> function that makes an array of it from an address and a length
at: dict[Any, Callable[[Any, Any], Any]] = {
    dtype: _view(dtype) for dtype in (np.float32, np.float64, np.uint16, np.uint32, np.uint64)
}


@inline
def _same(value: Any) -> Any:
    return value


@inline
def _from_bfloat16(value: Any) -> Any:
    return as_float32(np.int32(np.uint32(np.uint32(value) << _16)))


@inline
def _to_bfloat16(value: Any) -> Any:
    bits = np.uint32(as_int32(value))
    rounded = np.uint32(np.uint32(bits + np.uint32(_ROUND + np.uint32(np.uint32(bits >> _16) & _1))) >> _16)
    return np.uint16(select(value != value, _NAN, rounded))


@inline
def _from_float16(value: Any) -> Any:
    return from_float16(value)


@inline
def _to_float16(value: Any) -> Any:
    return to_float16(value)


def storage(dtype: str) -> tuple[Any, Callable[..., Any], Callable[..., Any]]:
    """The numpy type in memory, and the functions that widen it for computing and round it to nearest even."""
    return {
        "float32": (np.float32, _same, _same),
        "float64": (np.float64, _same, _same),
        "bfloat16": (np.uint16, _from_bfloat16, _to_bfloat16),
        "float16": (np.uint16, _from_float16, _to_float16),
    }[dtype]
