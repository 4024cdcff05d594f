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
    "ceil",
    "copysign",
    "fabs",
    "floor",
    "fma",
    "from_float16",
    "pointer",
    "polynomial",
    "round_to_even",
    "select",
    "sqrt",
    "to_float16",
    "trunc",
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


def polynomial(*coefficients: float) -> Any:
    """The function ``x -> sum_k coefficients[k] x^k`` of a float, by Horner's rule in fused multiply-adds."""

    @intrinsic
    def evaluate(typing_context: Any, x: Any) -> Any:
        if not isinstance(x, types.Float):
            return None

        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            *rest, value = (ir.Constant(context.get_value_type(x), c) for c in coefficients)
            for c in reversed(rest):
                value = builder.fma(value, args[0], c)
            return value

        return x(x), codegen

    return evaluate


def _of_a_float(name: str, doc: str) -> Any:
    def function(typing_context: Any, x: Any) -> Any:
        if not isinstance(x, types.Float):
            return None

        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            return builder.call(builder.module.declare_intrinsic(name, [args[0].type]), args)

        return x(x), codegen

    function.__doc__ = doc
    return intrinsic(function)


# np.sqrt is a call into the C library, which LLVM makes an instruction of in vectors, not in the scalar tail.
sqrt = _of_a_float("llvm.sqrt", "The square root of x, NaN below 0.")


fabs = _of_a_float("llvm.fabs", "x without its sign bit.")
# Instructions from SSE4.1, ARMv8 and AVX on; LLVM calls the C library's function of the same name elsewhere.
floor = _of_a_float("llvm.floor", "The largest whole number that is at most x, of the same type.")
ceil = _of_a_float("llvm.ceil", "The smallest whole number that is at least x, of the same type.")
trunc = _of_a_float("llvm.trunc", "x without its fractional part, of the same type.")
round_to_even = _of_a_float("llvm.rint", "The whole number nearest to x, the even one of two, of the same type.")


@intrinsic
def copysign(typing_context: Any, magnitude: Any, sign: Any) -> Any:
    """The float `magnitude` with the sign bit of the float `sign`."""
    if magnitude != sign or not isinstance(sign, types.Float):
        return None

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        kind = args[0].type
        function = ir.FunctionType(kind, (kind, kind))
        return builder.call(builder.module.declare_intrinsic("llvm.copysign", [kind], function), args)

    return sign(magnitude, sign), codegen


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
