"""The denoising score-matching loss."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, SupportsIndex, cast

import torch
from torch import Tensor

from .backend import NoiseOffset, Residual
from .checks import coefficient, no_gradient, noise_offset, same_as_state, state
from .dispatch import implementation, requested_backend, under
from .gradients import reduced, scaled
from .library import NOISE, CallContext, call_context, define, keep, kept, recording, usual
from .reference_steps import compute_dtype
from .steps import Index, empty_like
from .streams import Stream

__all__ = ["dsm_loss"]


def _empty_loss(output: Tensor, x0: Any, p: Any, q: Any, weight: Any, mean: bool, noise: NoiseOffset) -> Tensor:
    shape, wide = () if mean else output.shape[:1], compute_dtype(output.dtype)
    return output.new_empty(shape) if output.dtype is wide else output.new_empty(shape, dtype=wide)


def _loss_into(loss: Tensor, gradient: Tensor | None, inputs: Sequence[Any]) -> None:
    *residual, mean, noise = inputs
    r = Residual(*residual)
    if r.output.numel():
        run = implementation("dsm_loss", r.output.device)
        run(r, mean=mean, out=loss, gradient=gradient, noise=noise)
    else:
        loss.fill_(math.nan)  # the mean of nothing, as torch has it


def _gradient_into(out: Tensor, made: bool, upstream: Any, inputs: Sequence[Any]) -> None:
    *residual, mean, noise = inputs
    if out.numel():
        run = implementation("dsm_gradient", out.device)
        run(Residual(*residual), upstream, mean=mean, out=out, made=made, noise=noise)


def _gradient(upstream: Any, *inputs: Any) -> Tensor:
    out = empty_like(inputs[0])
    _gradient_into(out, False, upstream, inputs)
    return out


def _gradient_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    upstream, *inputs = kept(ctx)
    output, _, p, _, weight, mean, _ = inputs
    wants_upstream, *wanted = ctx.needs_input_grad
    count = math.prod(output.shape[0 if mean else 1 :])
    slope = upstream * (weight.to(upstream) if isinstance(weight, Tensor) else weight) * (2.0 / max(count, 1))
    grad_upstream = reduced(grad * _gradient_op(1.0, *inputs), upstream) if wants_upstream else None
    return grad_upstream, *_shares(scaled(grad, slope), p, wanted)


def _shares(gradient: Tensor, p: Any, wanted: Sequence[bool]) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of output and data, from that of their difference ``output - p x0``."""
    return gradient if wanted[0] else None, scaled(gradient, -p) if wanted[1] else None


_LOSS = f"Tensor output, Tensor? x0, Tensor p, Tensor q, Tensor weight, bool mean, {NOISE}"
# The gradient of the loss, for any gradient of what follows.
_gradient_op = define(
    "dsm_gradient",
    f"(Tensor upstream, {_LOSS}) -> Tensor",
    _gradient,
    lambda upstream, output, *rest: empty_like(output),
    keep,
    _gradient_backward,
)


def _loss(*inputs: Any) -> Tensor:
    loss = _empty_loss(*inputs)
    _loss_into(loss, None, inputs)
    return loss


def _loss_backward(ctx: Any, upstream: Tensor) -> tuple[Any, ...]:
    inputs = kept(ctx)
    return _shares(_gradient_op(upstream, *inputs), inputs[2], ctx.needs_input_grad)


_loss_op = define("dsm_loss", f"({_LOSS}) -> Tensor", _loss, _empty_loss, keep, _loss_backward)


class _LossAndGradient(torch.autograd.Function):
    """The mean loss, with the gradient made in the same pass for what it is nearly always multiplied by: 1.

    That takes 8 bytes an element, and the noise once. Any other upstream gradient has it written again, by a kernel
    where reading the upstream gradient would wait for a device.
    """

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        loss, ctx.gradient, ctx.backend = _empty_loss(*inputs), empty_like(inputs[0]), requested_backend()
        _loss_into(loss, ctx.gradient, inputs)
        keep(ctx, *inputs)
        return loss

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Any, ...]:
        made: tuple[Any, ...] = under(ctx.backend, _LossAndGradient._gradients, ctx, upstream)
        return made

    @staticmethod
    def _gradients(ctx: Any, upstream: Tensor) -> tuple[Any, ...]:
        inputs = kept(ctx)
        # Handed out once, because whoever gets a gradient may write to it.
        gradient, ctx.gradient = ctx.gradient, None
        if gradient is None or torch.is_grad_enabled():
            gradient = _gradient_op(upstream, *inputs)
        else:
            _gradient_into(gradient, True, upstream, inputs)
        return *_shares(gradient, inputs[2], ctx.needs_input_grad), *(None,) * (len(inputs) - 2)


def dsm_loss(
    output: Tensor,
    x0: Tensor | None,
    p: Tensor | float,
    q: Tensor | float,
    weight: Tensor | float,
    *,
    reduction: str = "mean",
    seed: Index,
    stream: SupportsIndex = Stream.PERTURBATION,
    first_path: Index = 0,
    step: Index = 0,
) -> Tensor:
    r"""Denoising score-matching loss, $w_i \frac1m \sum_j (output - p\,x_0 - q\,z)_{ij}^2$ for sample i.

    `z` is the noise that `perturb` used at the same place, made again. Every parameterisation's target is linear in
    data and noise, with $x_t = \alpha x_0 + \sigma z$:

    ================  ===========================  ==============================================
    the network gives  p                            q
    ================  ===========================  ==============================================
    noise             0                            1
    score             0                            $-1/\sigma$
    data              1                            0
    velocity          $-\sigma$                    $\alpha$
    EDM's F           $(1 - c_{skip}) / c_{out}$   $-c_{skip} \sigma / (\alpha c_{out})$
    ================  ===========================  ==============================================

    Args:
        output: What the network returned, shape ``(batch, *state)``; dtypes as for `euler_maruyama_step`.
        x0: Clean data, like `output`; None where p = 0.
        p: Coefficient of the data in the target: a number, ``()`` or ``(batch,)``.
        q: Coefficient of the noise, likewise.
        weight: Weight of each sample, likewise.
        reduction: "mean" over the batch, or "none".
        seed, stream, first_path, step: As for `perturb`.

    Returns:
        Loss in float32 (float64 for float64 data), ``()`` or ``(batch,)`` by `reduction`; NaN where there is nothing to
        average. Differentiable in `output` and `x0`; nothing is kept for it but the arguments. The mean makes the
        gradient in the same pass, except in float16 and inside compilers; else a second pass makes the noise again.

    Raises:
        TypeError, ValueError: As for `euler_maruyama_step`; a gradient with respect to `p`, `q` or `weight` is asked
            for; x0 is None but p is not 0.

    Source: Vincent, 2011; Song et al., ICLR 2021, equation 7; Karras et al., NeurIPS 2022, appendix B.6.
    """
    plain = usual(output, () if x0 is None else (x0,), (p, q, weight))
    if not plain:
        state("output", output)
        if x0 is not None:
            same_as_state("x0", x0, output, "output")
        p, q = coefficient("p", p, output), coefficient("q", q, output)
        weight = coefficient("weight", weight, output)
    if x0 is None and not isinstance(p, Tensor) and p != 0.0:
        raise ValueError(f"x0 is None, which stands for p = 0, but p is {p}; pass the clean data as x0")
    if reduction not in ("mean", "none"):
        raise ValueError(f"reduction must be 'mean' or 'none', got {reduction!r}")
    context = CallContext.PLAIN if plain else call_context(output, x0, p, q, weight)
    noise = noise_offset(output, seed, stream, first_path, step, context is CallContext.PLAIN)
    if recording(p, q, weight):
        no_gradient("dsm_loss", "it is a given of the training step", p=p, q=q, weight=weight)
    record, mean = recording(output, x0), reduction == "mean"
    # A float16 gradient comes with a loss scale, as a rule: the one for an upstream of 1 would be thrown away.
    if record and mean and context is CallContext.PLAIN and output.dtype is not torch.float16:
        return cast(Tensor, _LossAndGradient.apply(output, x0, p, q, weight, mean, noise))
    return cast(Tensor, _loss_op.call(context, record, output, x0, p, q, weight, mean, noise))
