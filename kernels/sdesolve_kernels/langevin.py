"""The Langevin corrector."""

from __future__ import annotations

from typing import Any, SupportsIndex

from torch import Tensor

from .backend import NoiseOffset
from .checks import check_output, coefficient, no_gradient, noise_offset, same_as_state, state
from .dispatch import implementation
from .gradients import noise_product, reduced, scaled
from .library import NOISE, CallContext, call_context, define, define_out, keep, kept, recording, usual
from .reference_steps import compute_dtype
from .steps import Index, empty_like
from .streams import Stream

__all__ = ["langevin_step"]

MODES = ("fixed", "batch", "sample", "dimension")


def _into(out: Tensor, x: Tensor, score: Tensor, mode: str, size: Any, alpha: Any, noise: NoiseOffset) -> None:
    if out.numel():
        run = implementation("langevin_step", x.device)
        run(x, score, mode=mode, size=size, alpha=alpha, out=out, noise=noise)


def _step(x: Tensor, *rest: Any) -> Tensor:
    out = empty_like(x)
    _into(out, x, *rest)
    return out


def _setup(ctx: Any, x: Tensor, score: Tensor, mode: str, size: Any, alpha: Any, noise: NoiseOffset) -> None:
    ctx.mode = mode
    learned = any(isinstance(c, Tensor) and c.requires_grad for c in (size, alpha))
    keep(ctx, score if learned else None, size, alpha, noise)


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    if ctx.mode != "fixed":
        raise RuntimeError(f"sdesolve::langevin_step has no gradient in mode {ctx.mode!r}")
    score, given_size, given_alpha, offset = kept(ctx)
    _, wants_score, _, wants_size, wants_alpha, *_ = ctx.needs_input_grad
    wide = compute_dtype(grad.dtype)
    # Numbers stay numbers: as tensors they would have to be copied to the device, which waits for it.
    size, alpha = (
        c.to(device=grad.device, dtype=wide) if isinstance(c, Tensor) else c for c in (given_size, given_alpha)
    )
    delta = alpha * size
    grad_score = scaled(grad, delta) if wants_score else None
    grad_size = grad_alpha = None
    if wants_size or wants_alpha:
        noise = noise_product(grad, 1.0, offset)
        # d/d delta of delta s + sqrt(2 delta) z, contracted with grad: to (batch,), then to what each factor has
        each = reduced(grad * score, grad.new_empty(grad.shape[0], dtype=wide))
        each = each + reduced(noise, each) / (2.0 * delta).sqrt()
        if wants_size:
            grad_size = reduced(each * alpha, given_size)
        if wants_alpha:
            grad_alpha = reduced(each * size, given_alpha)
    return grad, grad_score, None, grad_size, grad_alpha


# "kind" because torch has arguments of its own named "mode" on the way.
_SCHEMA = f"Tensor x, Tensor score, str kind, Tensor size, Tensor alpha, {NOISE}"
_op = define("langevin_step", f"({_SCHEMA}) -> Tensor", _step, empty_like, _setup, _backward)
_out = define_out("langevin_step", f"(Tensor(a!) out, {_SCHEMA}) -> ()", _into)


def langevin_step(
    x: Tensor,
    score: Tensor,
    *,
    mode: str = "fixed",
    size: Tensor | float,
    alpha: Tensor | float = 1.0,
    seed: Index,
    stream: SupportsIndex = Stream.CORRECTOR,
    first_path: Index = 0,
    step: Index = 0,
    out: Tensor | None = None,
) -> Tensor:
    r"""One step of Langevin dynamics, $x + \delta s + \sqrt{2 \delta}\, z$ with $s = \nabla \log p(x)$.

    The step size $\delta$ is $\alpha \cdot size$ in mode "fixed". In the others `size` is a signal-to-noise ratio r and
    $\delta = 2 \alpha (r\, n / \|s\|)^2$:

    =============  ============================  ==========================
    mode           norm n of the noise           norm of the score
    =============  ============================  ==========================
    ``batch``      mean of |z_i| over the batch  mean of |s_i|
    ``sample``     |z_i|, each sample's own      |s_i|
    ``dimension``  its expectation, E|z|         mean of |s_i|
    =============  ============================  ==========================

    "batch" is what the paper's code does: one sample with a large score then shrinks the steps of all, and a result
    depends on who is in the batch. "sample" has neither fault but diverges in low dimensions, where |s_i| comes near 0.

    Args:
        x: State, shape ``(batch, *state)``; dtypes as for `euler_maruyama_step`.
        score: Score at x, like `x`.
        mode: "fixed", "batch", "sample" or "dimension".
        size: Step size, a number, ``()`` or ``(batch,)``, in mode "fixed"; else the signal-to-noise ratio, a number or
            ``()``.
        alpha: Factor of the step size: a number, ``()`` or ``(batch,)``. 1 - beta of the step for VP in the paper.
        seed, stream, first_path, step, out: As for `euler_maruyama_step`; `out` may be `x` or `score`.

    Returns:
        The new state, contiguous, or `out`. Differentiable in mode "fixed", in `x`, `score`, `size` and `alpha`.

    Raises:
        TypeError, ValueError: As for `euler_maruyama_step`; the mode is unknown; a step size or ratio is negative; a
            gradient through another mode is asked for.

    Source: Song et al., ICLR 2021, algorithms 4 and 5.
    """
    plain = usual(x, (score,), (size, alpha), out)
    if not plain:
        state("x", x)
        same_as_state("score", score, x)
    if mode not in MODES:
        raise ValueError(f"mode must be one of {', '.join(map(repr, MODES))}, got {mode!r}")
    if not plain:
        size, alpha = coefficient("size", size, x), coefficient("alpha", alpha, x)
    for name, c in (("size", size), ("alpha", alpha)):
        if not isinstance(c, Tensor) and c < 0.0:
            raise ValueError(f"{name} must not be negative, got {c}: noise of variance 2 delta has no real scale then")
    if mode != "fixed":
        if isinstance(size, Tensor) and size.dim() > 0:
            raise ValueError(
                f"size is a signal-to-noise ratio in mode {mode!r}, a number or a tensor of shape (); "
                f"got {tuple(size.shape)}; put what differs by sample into alpha"
            )
        why = f"its step size in mode {mode!r} depends on norms; use mode='fixed'"
        no_gradient("langevin_step", why, x=x, score=score, size=size, alpha=alpha)
    context = CallContext.PLAIN if plain else call_context(x, score, size, alpha)
    noise = noise_offset(x, seed, stream, first_path, step, context is CallContext.PLAIN)
    if out is None:
        return _op.call(context, recording(x, score, size, alpha), x, score, mode, size, alpha, noise)
    if not plain:
        check_output(out, x)
    no_gradient(
        "langevin_step with out=", "out is overwritten unseen by autograd", x=x, score=score, size=size, alpha=alpha
    )
    _out(context, out, x, score, mode, size, alpha, noise)
    return out
