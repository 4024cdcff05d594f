"""The denoising score-matching loss."""

from __future__ import annotations

import math
from typing import Any, SupportsIndex

from torch import Tensor

from .checks import coefficient, no_gradient, place, same_as_state, state
from .dispatch import step_function
from .gradients import scaled
from .library import PLACE, Route, define, launch_place, recording, route
from .reference_steps import compute_dtype
from .steps import Index, empty_like
from .streams import Stream

__all__ = ["dsm_loss"]


def _made(output: Tensor, mean: bool, keep: bool) -> tuple[Tensor, Tensor]:
    shape, wide = () if mean else output.shape[:1], compute_dtype(output.dtype)
    loss = output.new_empty(shape) if output.dtype is wide else output.new_empty(shape, dtype=wide)
    return loss, empty_like(output) if keep else output.new_empty(0)


def _loss(
    output: Tensor, x0: Tensor | None, p: Any, q: Any, weight: Any, mean: bool, keep: bool, *place: Any
) -> tuple[Tensor, Tensor]:
    loss, residual = _made(output, mean, keep)
    if output.numel():
        run = step_function("dsm_loss", output.device)
        kept = residual if keep else None
        run(output, x0, p, q, weight, mean=mean, out=loss, residual=kept, **launch_place(place))
    else:
        loss.fill_(math.nan)  # the mean of nothing, as torch has it
    return loss, residual


def _loss_fake(
    output: Tensor, x0: Any, p: Any, q: Any, weight: Any, mean: bool, keep: bool, *place: Any
) -> tuple[Tensor, Tensor]:
    return _made(output, mean, keep)


def _loss_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    _, _, p, _, weight, ctx.mean, ctx.keep, *_ = inputs
    ctx.set_materialize_grads(False)
    ctx.numbers = [None if isinstance(c, Tensor) else c for c in (p, weight)]
    # The residual stands for the gradient, which is 2 weight / m times it: that factor would take 16-bit gradients
    # below the range of float16 before a loss scale could lift them.
    ctx.save_for_backward(output[1], *(c if isinstance(c, Tensor) else None for c in (p, weight)))


def _loss_backward(ctx: Any, grad_loss: Tensor | None, grad_residual: Tensor | None) -> tuple[Any, ...]:
    residual, *kept = ctx.saved_tensors
    p, weight = (number if c is None else c for number, c in zip(ctx.numbers, kept, strict=True))
    grad = grad_residual  # not None in second derivatives alone
    if grad_loss is not None:
        if not ctx.keep:
            raise RuntimeError("sdesolve::dsm_loss was called with keep=False, which leaves nothing to differentiate")
        batch, m = residual.shape[0], math.prod(residual.shape[1:])
        per_entry = 2.0 / max(m * batch if ctx.mean else m, 1)
        if isinstance(weight, Tensor):
            weight = weight if weight.dtype is grad_loss.dtype else weight.to(grad_loss)
            grad_loss = grad_loss * per_entry
        else:
            weight *= per_entry
        share = scaled(residual, grad_loss * weight)
        grad = share if grad is None else grad + share
    wanted = ctx.needs_input_grad
    grad_x0 = scaled(-grad, p) if wanted[1] and grad is not None else None
    return grad if wanted[0] else None, grad_x0, *(None,) * 12


_loss_op = define(
    "dsm_loss",
    f"(Tensor output, Tensor? x0, Tensor p, Tensor q, Tensor weight, bool mean, bool keep, {PLACE}) "
    "-> (Tensor, Tensor)",
    _loss,
    _loss_fake,
    _loss_setup,
    _loss_backward,
)


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
        average. Differentiable in `output` and `x0`: one pass makes the loss and keeps one tensor like `output`, from
        which the gradient is a product.

    Raises:
        TypeError, ValueError: As for `euler_maruyama_step`; a gradient with respect to `p`, `q` or `weight` is asked
            for; x0 is None but p is not 0.

    Source: Vincent, 2011; Song et al., ICLR 2021, equation 7; Karras et al., NeurIPS 2022, appendix B.6.
    """
    state("output", output)
    if x0 is not None:
        same_as_state("x0", x0, output, "output")
    p, q = coefficient("p", p, output), coefficient("q", q, output)
    weight = coefficient("weight", weight, output)
    if x0 is None and not isinstance(p, Tensor) and p != 0.0:
        raise ValueError(f"x0 is None, which stands for p = 0, but p is {p}; pass the clean data as x0")
    if reduction not in ("mean", "none"):
        raise ValueError(f"reduction must be 'mean' or 'none', got {reduction!r}")
    way = route(output, x0, p, q, weight)
    where = place(output, seed, stream, first_path, step, way is Route.PLAIN)
    if recording(p, q, weight):
        no_gradient("dsm_loss", "it is a given of the training step", p=p, q=q, weight=weight)
    keep = recording(output, x0)
    arguments = (output, x0, p, q, weight, reduction == "mean", keep, *where)
    loss: Tensor = _loss_op.call(way, keep, *arguments)[0]
    return loss
