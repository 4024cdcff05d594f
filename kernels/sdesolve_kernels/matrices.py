"""Ops on a matrix for each row: products with vectors, and the Euler-Maruyama step of general noise."""

from __future__ import annotations

from typing import Any, SupportsIndex

import torch
from torch import Tensor

from .backend import NoiseOffset
from .checks import FLOATS, check_output, coefficient, no_gradient, noise_offset, same_as_state, state
from .dispatch import implementation
from .gradients import noise_product, root, scaled
from .library import NOISE, CallContext, call_context, define, define_out, keep, kept, recording
from .reference_steps import compute_dtype
from .steps import Index, empty_like
from .streams import Stream

__all__ = ["matrix_product", "matrix_step"]


def _outer(a: Tensor, v: Tensor, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """The gradient of ``g: shape`` from that of ``g v``: ``a v^T``, summed over the batch where it has one matrix."""
    if shape[0] == 1 < a.shape[0]:
        return (a.reshape(a.shape[0], -1).T @ v).reshape(shape).to(dtype)
    return (a.unsqueeze(-1) * v.reshape(v.shape[0], *(1,) * (a.dim() - 1), v.shape[1])).to(dtype)


def _step_into(out: Tensor, x: Tensor, f: Tensor, g: Tensor, dt: Any, noise: NoiseOffset) -> None:
    if out.numel():
        implementation("matrix_step", x.device)(x, f, g, dt, out=out, noise=noise)


def _step(x: Tensor, *rest: Any) -> Tensor:
    out = empty_like(x)
    _step_into(out, x, *rest)
    return out


def _step_setup(ctx: Any, x: Tensor, f: Tensor, g: Tensor, dt: Any, noise: NoiseOffset) -> None:
    ctx.shape, ctx.dtype = g.shape, g.dtype
    keep(ctx, dt, noise)


def _step_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    dt, noise = kept(ctx)
    _, wants_f, wants_g, *_ = ctx.needs_input_grad
    grad_f = scaled(grad, dt) if wants_f else None
    if not wants_g:
        return grad, grad_f, None
    wide = compute_dtype(grad.dtype)
    z = noise_product(grad.new_ones(grad.shape[0], ctx.shape[-1], dtype=wide), 1.0, noise)
    rooted = scaled(grad.to(wide), root(dt, grad))
    return grad, grad_f, _outer(rooted, z, ctx.shape, ctx.dtype)


_STEP = f"Tensor x, Tensor f, Tensor g, Tensor dt, {NOISE}"
_step_op = define("matrix_step", f"({_STEP}) -> Tensor", _step, empty_like, _step_setup, _step_backward)
_step_out = define_out("matrix_step", f"(Tensor(a!) out, {_STEP}) -> ()", _step_into)


def matrix_step(
    x: Tensor,
    f: Tensor,
    g: Tensor,
    dt: Tensor | float,
    *,
    seed: Index,
    stream: SupportsIndex = Stream.DRIVING,
    first_path: Index = 0,
    step: Index = 0,
    out: Tensor | None = None,
) -> Tensor:
    r"""One Euler-Maruyama step of $dX = f\,dt + g\,dW$ (Ito, general noise): $x + f\,dt + \sqrt{|dt|}\, g z$.

    $z$ has a normal for each of the m channels: channel k of row i takes $Z(seed, stream, first\_path + i,
    step \cdot m + k)$, which `normal` makes for ``offset = step * m``. Products are added up channel by channel,
    whatever the batch. Strong order 1/2, weak order 1. Time runs backwards for negative `dt`.

    Args:
        x: State, shape ``(batch, *state)``; dtypes as for `euler_maruyama_step`.
        f: Drift at x, like `x`.
        g: Diffusion at x, ``(batch, *state, channels)``, or ``(1, *state, channels)`` for one matrix for all rows.
        dt: Step in time: a number, ``()`` or ``(batch,)``.
        seed, stream, first_path, step: As for `euler_maruyama_step`.
        out: Tensor to write into and return, like `x`; may be `x` or `f` itself. Not recorded by autograd.

    Returns:
        The new state, contiguous, or `out`. Differentiable in `x`, `f` and `g`; the noise is made again for it.

    Raises:
        TypeError, ValueError: As for `euler_maruyama_step`.

    Source: Maruyama, 1955; Kloeden and Platen, 1992, section 10.2.
    """
    state("x", x)
    same_as_state("f", f, x)
    _check_matrix(g, x)
    dt = coefficient("dt", dt, x)
    context = call_context(x, f, g, dt)
    noise = noise_offset(x, seed, stream, first_path, step, context is CallContext.PLAIN, g.shape[-1])
    if isinstance(dt, Tensor):
        no_gradient("matrix_step", "it is a number of the time grid", dt=dt)
    if out is None:
        return _step_op.call(context, recording(x, f, g), x, f, g, dt, noise)
    check_output(out, x)
    if recording(x, f, g):
        no_gradient("matrix_step with out=", "out is overwritten unseen by autograd", x=x, f=f, g=g)
    _step_out(context, out, x, f, g, dt, noise)
    return out


def _check_matrix(g: Tensor, x: Tensor) -> None:
    if not isinstance(g, Tensor):
        raise TypeError(f"g must be a tensor of shape (batch, *state, channels), got {type(g).__name__}")
    if g.dim() != x.dim() + 1 or g.shape[1:-1] != x.shape[1:] or g.shape[0] not in (1, x.shape[0]) or not g.shape[-1]:
        expected = ", ".join(map(str, x.shape[1:]))
        raise ValueError(
            f"g must have shape ({x.shape[0]}, {expected + ', ' if expected else ''}channels), or 1 in place of "
            f"{x.shape[0]}, got {tuple(g.shape)}"
        )
    if g.dtype != x.dtype:
        raise TypeError(f"g must have the dtype of x, {x.dtype}, got {g.dtype}; convert it with .to({x.dtype})")
    if g.device != x.device:
        raise ValueError(f"g must be on {x.device} like x, got {g.device}; move it with .to({str(x.device)!r})")


class _Product(torch.autograd.Function):
    """``g v`` by a kernel; its derivatives are products again."""

    @staticmethod
    def forward(ctx: Any, g: Tensor, v: Tensor) -> Tensor:
        ctx.save_for_backward(g, v)
        return _multiplied(g, v)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        g, v = ctx.saved_tensors
        wants_g, wants_v = ctx.needs_input_grad
        grad_v = None
        if wants_v and g.shape[0] == 1:
            grad_v = matrix_product(g.reshape(-1, g.shape[-1]).T[None], grad.reshape(grad.shape[0], -1))
        elif wants_v:
            grad_v = (g * grad.unsqueeze(-1)).reshape(g.shape[0], -1, g.shape[-1]).sum(1)
        return _outer(grad, v, g.shape, g.dtype) if wants_g else None, grad_v


def _multiplied(g: Tensor, v: Tensor) -> Tensor:
    out = v.new_empty(v.shape[0], *g.shape[1:-1])
    implementation("matrix_product", v.device)(g, v, out=out)
    return out


# A trace keeps a larger shared matrix whole: 32 x 32 products written out take 6 s to compile, and 2 s so. In a batch
# of one nothing tells a shared matrix from a row's own, which must be traced as in other batches: small ones are alike.
_WRITTEN_OUT = 256


def matrix_product(g: Tensor, v: Tensor) -> Tensor:
    r"""$g v$ of each row, added up channel by channel: the bits of a row depend on that row alone.

    Those of a batched product of torch depend on the batch, and of one with a shared matrix on the number of threads
    too. In compilers, dispatch modes and transforms of ``torch.func`` it is what one would write in torch.

    Args:
        g: ``(batch, *state, channels)``, or ``(1, *state, channels)`` for one matrix for all rows.
        v: ``(batch, channels)``, of its dtype.

    Returns:
        ``(batch, *state)``, differentiable in both, any number of times.
    """
    rows = v.shape[0]
    kernel = g.dtype is v.dtype and g.dtype in FLOATS and g.shape[0] in (1, rows) and g.shape[-1] == v.shape[1]
    if kernel and g.numel() and rows and g.device == v.device and call_context(g, v) is CallContext.PLAIN:
        product: Tensor = _Product.apply(g, v) if recording(g, v) else _multiplied(g, v)
        return product
    if g.shape[0] == 1 and g.numel() > _WRITTEN_OUT:
        return (v @ g.reshape(-1, g.shape[-1]).T).reshape(rows, *g.shape[1:-1])
    return (g * v.reshape(rows, *(1,) * (g.dim() - 2), v.shape[1])).sum(-1)
