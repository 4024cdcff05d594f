"""What the gradients of the step ops share: products with coefficients, and their transposes."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .dispatch import backend_for, step_function
from .library import PLACE, Route, define, launch_place, recording, route
from .reference_steps import compute_dtype

__all__ = ["keep", "kept", "noise_product", "reduced", "root", "scaled"]

_LARGE = 1 << 17


def keep(ctx: Any, inputs: tuple[Any, ...]) -> None:
    """Save the inputs of an op, of which some are tensors and the last seven a place, for `kept`."""
    tensors, others = [], []
    for v in inputs[:-7]:
        tensor = isinstance(v, Tensor)
        tensors.append(v if tensor else None)
        others.append(None if tensor else v)
    ctx.others = (*others, *inputs[-7:-3], None, None, None)
    ctx.save_for_backward(*tensors, None, None, None, None, *inputs[-3:])


def kept(ctx: Any) -> list[Any]:
    """What `keep` saved."""
    return [other if v is None else v for v, other in zip(ctx.saved_tensors, ctx.others, strict=True)]


def scaled(v: Tensor, c: Any) -> Tensor:
    """``c v`` in the dtype of ``v``, for a number or a tensor of shape ``()`` or ``(batch,)``, rounded once."""
    if not isinstance(c, Tensor):
        return v * c
    if v.numel() > _LARGE and route(v, c) is Route.PLAIN and not recording(v, c):
        out = _scaled_at_once(v, c)
        if out is not None:
            return out
    wide = compute_dtype(v.dtype)
    if c.dtype != wide:
        c = c.to(wide)
    if v.dtype == wide and c.dim() == 0:
        return v * c
    # Of as many dimensions as v: a 0-d factor would be rounded to 16 bits first, and underflow there.
    product = v * c.reshape(-1, *(1,) * (v.dim() - 1))
    return product if v.dtype == wide else product.to(v.dtype)


def _scaled_at_once(v: Tensor, c: Tensor) -> Tensor | None:
    """`scaled` by our kernel, where one runs: it rounds without a wide copy, and leaves torch's threads asleep.

    Those spin on after a product, on the cores that our own threads need for the next step.
    """
    if backend_for("scaled", v.device) == "reference":
        return None
    out: Tensor = step_function("scaled", v.device)(v, c, out=torch.empty_like(v))
    return out


def root(dt: Any, v: Tensor) -> Any:
    """``sqrt|dt|`` in the compute dtype of ``v``."""
    return dt.to(compute_dtype(v.dtype)).abs().sqrt() if isinstance(dt, Tensor) else math.sqrt(abs(dt))


def reduced(v: Tensor, c: Tensor) -> Tensor:
    """The gradient of a coefficient ``c`` of shape ``()`` or ``(batch,)``, from that of what it was broadcast to."""
    wide = compute_dtype(v.dtype)
    if c.dim() == 1 and v.dim() > 1:
        return v.sum(dim=tuple(range(1, v.dim())), dtype=wide).to(c.dtype)
    return (v if c.dim() == 1 else v.sum(dtype=wide)).to(device=c.device, dtype=c.dtype)


def _product(v: Tensor, c: Any, *place: Any) -> Tensor:
    out = torch.empty_like(v, memory_format=torch.contiguous_format)
    if out.numel():
        step_function("noise_product", v.device)(v, c, out=out, **launch_place(place))
    return out


def _product_fake(v: Tensor, c: Any, *place: Any) -> Tensor:
    return torch.empty_like(v, memory_format=torch.contiguous_format)


def _product_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, c, *place = inputs
    ctx.number, ctx.where = None if isinstance(c, Tensor) else c, place[:4]
    ctx.save_for_backward(c if isinstance(c, Tensor) else None, *place[4:])


def _product_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    c, *at = ctx.saved_tensors
    return noise_product(grad, ctx.number if c is None else c, *ctx.where, *at), *(None,) * 8


# c v z: how the gradient of a step meets its noise again. Linear in v, so its gradient is itself; c has none, because
# only what carries no gradient is passed as c.
noise_product = define(
    "noise_product",
    f"(Tensor v, Tensor c, {PLACE}) -> Tensor",
    _product,
    _product_fake,
    _product_setup,
    _product_backward,
)
