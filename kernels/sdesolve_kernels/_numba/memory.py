"""Tensors as kernels see them: an address and a storage type, widened where it is read and rounded where it is written.

Addresses instead of arrays, because unpacking one array costs Numba as much as unpacking ten integers, and a step on a
thousand elements takes a microsecond.
"""

from __future__ import annotations

import platform
from collections.abc import Callable
from typing import Any

import llvmlite.binding as llvm
import numba
import numpy as np
from numba import carray
from numba.np.numpy_support import from_dtype

from .compile import inline
from .intrinsics import as_float32, as_int32, from_float16, pointer, select, to_float16

__all__ = ["COMPUTE", "at", "storage"]

# Name of a torch dtype -> numpy dtype that it is computed in.
COMPUTE: dict[str, Any] = {"float32": np.float32, "float64": np.float64, "bfloat16": np.float32, "float16": np.float32}

_16, _13, _1 = np.uint32(16), np.uint32(13), np.uint32(1)
_ROUND, _NAN = np.uint32(0x7FFF), np.uint32(0x7FC0)
# float16: sign, all but the sign, infinity, smallest normal number, NaN; and its smallest number of all
_SIGN16, _SIZE16, _INFINITY16 = np.uint32(0x8000), np.uint32(0x7FFF), np.uint32(0x7C00)
_NORMAL16, _NAN16, _SMALLEST16 = np.uint32(0x400), np.uint32(0x7E00), np.float32(2.0**-24)
# float32: all but the sign, infinity, 2^16, 2^-14, 1/2; and by how much exponents differ
_SIZE32, _INFINITY32, _OVERFLOW32 = np.uint32(0x7FFFFFFF), np.uint32(0x7F800000), np.uint32(0x47800000)
_NORMAL32, _HALF32, _REBIAS = np.uint32(0x38800000), np.uint32(0x3F000000), np.uint32(0x38000000)


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
def _from_float16_software(value: Any) -> Any:
    half = np.uint32(value)
    size = np.uint32(half & _SIZE16)
    normal = np.uint32(np.uint32(size << _13) + _REBIAS)
    special = np.uint32(np.uint32(size << _13) | _INFINITY32)
    small = np.uint32(as_int32(np.float32(np.int32(size)) * _SMALLEST16))
    bits = select(size >= _INFINITY16, special, select(size < _NORMAL16, small, normal))
    return as_float32(np.int32(np.uint32(bits | np.uint32(np.uint32(half & _SIGN16) << _16))))


@inline
def _to_float16_software(value: Any) -> Any:
    bits = np.uint32(as_int32(value))
    size = np.uint32(bits & _SIZE32)
    # To the nearest even: in integers for normal numbers, whose overflow is infinity; by the addition, whose last bit
    # is worth the smallest float16, for smaller ones.
    odd = np.uint32(np.uint32(size >> _13) & _1)
    normal = np.uint32(np.uint32(np.uint32(np.uint32(size + np.uint32(0xFFF)) + odd) - _REBIAS) >> _13)
    small = np.uint32(np.uint32(as_int32(as_float32(np.int32(size)) + np.float32(0.5))) - _HALF32)
    special = select(size > _INFINITY32, _NAN16, _INFINITY16)
    half = select(size >= _OVERFLOW32, special, select(size < _NORMAL32, small, normal))
    return np.uint16(half | np.uint32(np.uint32(bits >> _16) & _SIGN16))


@inline
def _from_float16_hardware(value: Any) -> Any:
    return from_float16(value)


@inline
def _to_float16_hardware(value: Any) -> Any:
    return to_float16(value)


def _converts_float16() -> bool:
    """Whether the processor that Numba compiles for has instructions for it. Without, LLVM calls a missing function."""
    if platform.machine().lower() not in ("x86_64", "amd64", "i386", "i686", "x86"):
        return True
    config: Any = numba.config
    chosen = config.CPU_FEATURES
    features = llvm.get_host_cpu_features().flatten() if chosen is None else chosen
    return "+f16c" in features.split(",")


if _converts_float16():
    _from_float16, _to_float16 = _from_float16_hardware, _to_float16_hardware
else:
    _from_float16, _to_float16 = _from_float16_software, _to_float16_software


def storage(dtype: str) -> tuple[Any, Callable[..., Any], Callable[..., Any]]:
    """The numpy type in memory, and the functions that widen it for computing and round it to nearest even."""
    return {
        "float32": (np.float32, _same, _same),
        "float64": (np.float64, _same, _same),
        "bfloat16": (np.uint16, _from_bfloat16, _to_bfloat16),
        "float16": (np.uint16, _from_float16, _to_float16),
    }[dtype]
