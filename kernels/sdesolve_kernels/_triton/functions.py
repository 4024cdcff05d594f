"""Elementary functions of generated kernels, with the special values of torch's.

On a GPU they are libdevice's, which err by one or two units in the last place; division and square root are the
compiler's own for float32, within two units and one. In the interpreter, which has few of them, torch computes them.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
# (the compiler types device code at each call)

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import libdevice
from triton.runtime.jit import JITFunction

__all__ = ["F32", "F64", "I64", "acos", "asin", "atan", "atan2", "cos", "cosh", "erf", "exp", "expm1", "log", "log1p",
           "maximum", "minimum", "nearest", "power", "sign", "sin", "sinh", "tan", "tanh", "trunc"]  # fmt: skip


@triton.jit
def F32(value: tl.constexpr):
    """A float32 constant."""
    return tl.full((), value, tl.float32)


@triton.jit
def F64(value: tl.constexpr):
    """A float64 constant."""
    return tl.full((), value, tl.float64)


@triton.jit
def I64(value: tl.constexpr):
    """An int64 constant."""
    return tl.full((), value, tl.int64)


@triton.jit
def minimum(a, b):
    """The smaller; nan if either is."""
    return tl.minimum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def maximum(a, b):
    """The larger; nan if either is."""
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def sign(x):
    """-1, 0 or 1; 0 for nan."""
    return (x > 0).to(x.dtype) - (x < 0).to(x.dtype)


def _by_torch(function: Any) -> Any:
    """A function for the interpreter, where a tensor is a numpy array in a wrapper."""
    from triton.runtime.interpreter import TensorHandle

    def call(*args: Any) -> Any:
        like = args[0] if len(args) == 1 else args[0] + args[1]  # has the shape of the result
        values = function(*(torch.from_numpy(a.handle.data) for a in args)).numpy()
        return tl.tensor(TensorHandle(values.reshape(like.handle.data.shape), like.handle.dtype), like.type)

    return call


if isinstance(minimum, JITFunction):

    @triton.jit
    def acos(x):
        return libdevice.acos(x)

    @triton.jit
    def asin(x):
        return libdevice.asin(x)

    @triton.jit
    def atan(x):
        return libdevice.atan(x)

    @triton.jit
    def cos(x):
        return libdevice.cos(x)

    @triton.jit
    def cosh(x):
        return libdevice.cosh(x)

    @triton.jit
    def erf(x):
        return libdevice.erf(x)

    @triton.jit
    def exp(x):
        return libdevice.exp(x)

    @triton.jit
    def expm1(x):
        return libdevice.expm1(x)

    @triton.jit
    def log(x):
        return libdevice.log(x)

    @triton.jit
    def log1p(x):
        return libdevice.log1p(x)

    @triton.jit
    def sin(x):
        return libdevice.sin(x)

    @triton.jit
    def sinh(x):
        return libdevice.sinh(x)

    @triton.jit
    def tan(x):
        return libdevice.tan(x)

    @triton.jit
    def tanh(x):
        return libdevice.tanh(x)

    @triton.jit
    def trunc(x):
        return libdevice.trunc(x)

    @triton.jit
    def nearest(x):
        return libdevice.rint(x)

    @triton.jit
    def power(x, y):
        return libdevice.pow(x, y)

    @triton.jit
    def atan2(y, x):
        return libdevice.atan2(y, x)

else:
    acos, asin, atan, cos, cosh, erf = map(
        _by_torch, (torch.acos, torch.asin, torch.atan, torch.cos, torch.cosh, torch.erf)
    )
    exp, expm1, log, log1p, sin = map(_by_torch, (torch.exp, torch.expm1, torch.log, torch.log1p, torch.sin))
    sinh, tan, tanh, trunc, nearest = map(_by_torch, (torch.sinh, torch.tan, torch.tanh, torch.trunc, torch.round))
    power, atan2 = map(_by_torch, (torch.pow, torch.atan2))
