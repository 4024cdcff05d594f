"""Single LLVM instructions that Numba has no spelling for."""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic as _typed_intrinsic

__all__ = [
    "as_float32",
    "as_float64",
    "as_int32",
    "as_int64",
    "fma",
    "from_float16",
    "pointer",
    "select",
    "to_float16",
]

# Numba's annotations count the typing context as an argument of the finished intrinsic.
intrinsic: Any = _typed_intrinsic


@intrinsic
def fma(typing_context: Any, a: Any, b: Any, c: Any) -> Any:
    """``a * b + c`` with one rounding, for three floats of one type.

    Written out because it fixes the bits: the same in a vector body, in its scalar tail and on any x86 or ARM core,
    where contraction by the compiler depends on what it happened to do with each copy of the loop.
    """
    if not (a == b == c and isinstance(a, types.Float)):
        return None

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.fma(*args)

    return a(a, b, c), codegen


@intrinsic
def select(typing_context: Any, condition: Any, a: Any, b: Any) -> Any:
    """``a if condition else b`` as one instruction, never a branch: a branch may keep a loop from vectorising."""
    if a != b or condition != types.boolean:
        return None

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.select(*args)

    return a(condition, a, b), codegen


def _bitcast(source: Any, target: Any, doc: str) -> Any:
    def bits(typing_context: Any, x: Any) -> Any:
        if x != source:
            return None

        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            return builder.bitcast(args[0], context.get_value_type(target))

        return target(source), codegen

    bits.__doc__ = doc
    return intrinsic(bits)


as_int32 = _bitcast(types.float32, types.int32, "The bits of a float32 as an int32.")
as_float32 = _bitcast(types.int32, types.float32, "The float32 that has these bits.")
as_int64 = _bitcast(types.float64, types.int64, "The bits of a float64 as an int64.")
as_float64 = _bitcast(types.int64, types.float64, "The float64 that has these bits.")


@intrinsic
def pointer(typing_context: Any, address: Any, element: Any) -> Any:
    """The address, an int64, as a pointer to the type `element`."""
    if address != types.int64:
        return None
    result = types.CPointer(element.instance_type if isinstance(element, types.TypeRef) else element.dtype)

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.inttoptr(args[0], context.get_value_type(result))

    return result(address, element), codegen


@intrinsic
def from_float16(typing_context: Any, bits: Any) -> Any:
    """The float32 equal to the float16 with these bits, a uint16."""
    if bits != types.uint16:
        return None

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.fpext(builder.bitcast(args[0], ir.HalfType()), ir.FloatType())

    return types.float32(bits), codegen


@intrinsic
def to_float16(typing_context: Any, x: Any) -> Any:
    """The bits, as a uint16, of the float16 nearest to a float32."""
    if x != types.float32:
        return None

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.bitcast(builder.fptrunc(args[0], ir.HalfType()), ir.IntType(16))

    return types.uint16(x), codegen
