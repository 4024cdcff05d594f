"""What the gradients of the step ops share: products with coefficients, and their transposes."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .backend import NoiseOffset
from .dispatch import implementation
from .library import NOISE, CallContext, call_context, define, keep, kept, recording
from .reference_steps import compute_dtype

__all__ = ["noise_product", "reduced", "root", "scaled"]

_LARGE = 1 << 17


def scaled(v: Tensor, c: Any) -> Tensor:
    """``c v`` in the dtype of ``v``, for a number or a tensor of shape ``()`` or ``(batch,)``, rounded once."""
    if not isinstance(c, Tensor):
        return v * c
    if v.numel() > _LARGE and call_context(v, c) is CallContext.PLAIN and not recording(v, c):
        # Our kernel rounds without a wide copy, and leaves torch's threads asleep. Those spin on after a product, on
        # the cores that our own threads need for the next step.
        out: Tensor = implementation("scaled", v.device)(v, c, out=torch.empty_like(v))
        return out
    wide = compute_dtype(v.dtype)
    if c.dtype != wide:
        c = c.to(wide)
    if v.dtype == wide and c.dim() == 0:
        return v * c
    # Of as many dimensions as v: a 0-d factor would be rounded to 16 bits first, and underflow there.
    product = v * c.reshape(-1, *(1,) * (v.dim() - 1))
    return product if v.dtype == wide else product.to(v.dtype)


def root(dt: Any, v: Tensor) -> Any:
    """``sqrt|dt|`` in the compute dtype of ``v``."""
    return dt.to(compute_dtype(v.dtype)).abs().sqrt() if isinstance(dt, Tensor) else math.sqrt(abs(dt))


def reduced(v: Tensor, c: Tensor) -> Tensor:
    """The gradient of a coefficient ``c`` of shape ``()`` or ``(batch,)``, from that of what it was broadcast to."""
    wide = compute_dtype(v.dtype)
    if c.dim() == 1 and v.dim() > 1:
        return v.sum(dim=tuple(range(1, v.dim())), dtype=wide).to(c.dtype)
    return (v if c.dim() == 1 else v.sum(dtype=wide)).to(device=c.device, dtype=c.dtype)


def _product(v: Tensor, c: Any, noise: NoiseOffset) -> Tensor:
    out = torch.empty_like(v, memory_format=torch.contiguous_format)
    if out.numel():
        implementation("noise_product", v.device)(v, c, out=out, noise=noise)
    return out


def _product_fake(v: Tensor, c: Any, noise: NoiseOffset) -> Tensor:
    return torch.empty_like(v, memory_format=torch.contiguous_format)


def _product_setup(ctx: Any, v: Tensor, c: Any, noise: NoiseOffset) -> None:
    keep(ctx, c, noise)


def _product_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    c, noise = kept(ctx)
    return (noise_product(grad, c, noise),)


# c v z: how the gradient of a step meets its noise again. Linear in v, so its gradient is itself; c has none, because
# only what carries no gradient is passed as c.
noise_product = define(
    "noise_product",
    f"(Tensor v, Tensor c, {NOISE}) -> Tensor",
    _product,
    _product_fake,
    _product_setup,
    _product_backward,
)
