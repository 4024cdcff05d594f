"""The step ops: Euler-Maruyama, linear multistep, and the perturbation of training data."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, SupportsIndex

import torch
from torch import Tensor

from .backend import NoiseOffset
from .checks import (
    FLOATS,
    alike,
    check_output,
    coefficient,
    index,
    no_gradient,
    noise_offset,
    same_as_state,
    state,
)
from .dispatch import implementation
from .gradients import noise_product, reduced, root, scaled
from .library import NOISE, CallContext, call_context, define, define_out, keep, kept, read, recording, usual
from .streams import Stream

__all__ = ["empty_like", "euler_maruyama_step", "linear_step", "perturb"]

Index = SupportsIndex | Tensor
_NO_NOISE = NoiseOffset(0, 0, 0, 0)


def empty_like(x: Tensor, *_: Any) -> Tensor:
    """A contiguous tensor like `x`; also the fake of ops that return one."""
    # Naming the memory format costs 0.6 us, which a step on a thousand elements would notice.
    return torch.empty_like(x) if x.is_contiguous() else torch.empty_like(x, memory_format=torch.contiguous_format)


def _euler_into(out: Tensor, x: Tensor, f: Tensor, g: Any, dt: Any, noise: NoiseOffset) -> None:
    if out.numel():
        implementation("euler_maruyama_step", x.device)(x, f, g, dt, out=out, noise=noise)


def _euler(x: Tensor, *rest: Any) -> Tensor:
    out = empty_like(x)
    _euler_into(out, x, *rest)
    return out


def _euler_setup(ctx: Any, x: Tensor, f: Tensor, g: Any, dt: Any, noise: NoiseOffset) -> None:
    # Of g, shape and dtype are what counts; it is kept only where it is a handful of numbers.
    ctx.full = isinstance(g, Tensor) and g.dim() > 1
    keep(ctx, dt, None if ctx.full else g, noise)


def _euler_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    dt, g, noise = kept(ctx)
    _, wants_f, wants_g, *_ = ctx.needs_input_grad
    grad_f = scaled(grad, dt) if wants_f else None
    grad_g = noise_product(grad, root(dt, grad), noise) if wants_g else None
    if grad_g is not None and not ctx.full:
        grad_g = reduced(grad_g, g)
    return grad, grad_f, grad_g


_EULER = f"Tensor x, Tensor f, Tensor g, Tensor dt, {NOISE}"
_euler_op = define("euler_maruyama_step", f"({_EULER}) -> Tensor", _euler, empty_like, _euler_setup, _euler_backward)
_euler_out = define_out("euler_maruyama_step", f"(Tensor(a!) out, {_EULER}) -> ()", _euler_into)


def euler_maruyama_step(
    x: Tensor,
    f: Tensor,
    g: Tensor | float,
    dt: Tensor | float,
    *,
    seed: Index,
    stream: SupportsIndex = Stream.DRIVING,
    first_path: Index = 0,
    step: Index = 0,
    out: Tensor | None = None,
) -> Tensor:
    r"""One Euler-Maruyama step of $dX = f\,dt + g\,dW$ (Ito, diagonal noise): $x + f\,dt + g \sqrt{|dt|}\, z$.

    Element j of row i takes the normal $z = Z(seed, stream, first\_path + i, step \cdot m + j)$, m elements a path:
    the one that `normal` makes for ``offset = step * m``. Strong order 1/2, weak order 1. Time runs backwards for
    negative `dt`.

    Args:
        x: State, shape ``(batch, *state)``, float32, float64, bfloat16 or float16. 16-bit states are computed in
            float32 and rounded once, at the end.
        f: Drift at x, like `x`.
        g: Diffusion at x: a number, ``()``, ``(batch,)`` or like `x`.
        dt: Step in time: a number, ``()`` or ``(batch,)``.
        seed: In [0, 2^64); as are the next ones, an integer or a 0-d int64 tensor.
        stream: In [0, 256), an integer; see `Stream`.
        first_path: Index of the first row's path.
        step: Index of the step.
        out: Tensor to write into and return, of the shape and dtype of `x`, any strides; may be `x`, `f` or `g`
            itself. Not recorded by autograd.

    Returns:
        The new state, contiguous, or `out`. Differentiable in `x`, `f` and `g`; the noise is made again for it, not
        kept.

    Raises:
        TypeError: Something is not a tensor, number or integer, or not of a dtype that fits.
        ValueError: Shapes, devices or ranges do not fit; a gradient with respect to `dt`, or through `out`, is asked
            for; `use_backend` asked for a backend that does not run on the device.

    Source: Maruyama, 1955; Kloeden and Platen, 1992, section 10.2.
    """
    if type(dt) is float and usual(x, (f,) if type(g) is float else (f, g), (), out):
        context = CallContext.PLAIN
    else:
        state("x", x)
        same_as_state("f", f, x)
        if not alike(g, x):
            if isinstance(g, Tensor) and g.dim() > 1 and g.shape == x.shape:
                same_as_state("g", g, x)  # which says what does not fit
            g = coefficient("g", g, x, or_like="x")
        dt = coefficient("dt", dt, x)
        context = call_context(x, f, g, dt)
        if isinstance(dt, Tensor):
            no_gradient("euler_maruyama_step", "it is a number of the time grid", dt=dt)
        if out is not None:
            check_output(out, x)
    noise = noise_offset(x, seed, stream, first_path, step, context is CallContext.PLAIN)
    record = recording(x, f, g)
    if out is None:
        return _euler_op.call(context, record, x, f, g, dt, noise)
    if record:
        no_gradient("euler_maruyama_step with out=", "out is overwritten unseen by autograd", x=x, f=f, g=g)
    _euler_out(context, out, x, f, g, dt, noise)
    return out


def _linear_into(
    out: Tensor, x: Tensor, table: Tensor, row: int, row_at: Tensor | None, stochastic: bool, *rest: Any
) -> None:
    *history, noise = rest
    if out.numel():
        terms = [s for s in history if s is not None]
        at = row if row_at is None else read(row_at)
        run = implementation("linear_step", x.device)
        run(x, terms, table, at, stochastic=stochastic, out=out, noise=noise)


def _linear(x: Tensor, *rest: Any) -> Tensor:
    out = empty_like(x)
    _linear_into(out, x, *rest)
    return out


def _linear_setup(ctx: Any, x: Tensor, table: Tensor, row: int, row_at: Tensor | None, *rest: Any) -> None:
    ctx.row = row
    ctx.save_for_backward(table, row_at)


def _linear_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    table, row_at = ctx.saved_tensors
    entries = table[ctx.row] if row_at is None else table.index_select(0, row_at.reshape(1))[0]
    wants_x, _, _, _, _, *wants_terms = ctx.needs_input_grad
    x, *history = (scaled(grad, entries[k]) if want else None for k, want in enumerate((wants_x, *wants_terms[:4])))
    return x, None, None, None, None, *history


_LINEAR = (
    "Tensor x, Tensor table, SymInt row, Tensor? row_at, bool stochastic, "
    f"Tensor? s1, Tensor? s2, Tensor? s3, Tensor? s4, {NOISE}"
)
_linear_op = define("linear_step", f"({_LINEAR}) -> Tensor", _linear, empty_like, _linear_setup, _linear_backward)
_linear_out = define_out("linear_step", f"(Tensor(a!) out, {_LINEAR}) -> ()", _linear_into)


def _check_table(table: Tensor, x: Tensor, terms: int) -> None:
    if not isinstance(table, Tensor) or not table.is_floating_point():
        kind = table.dtype if isinstance(table, Tensor) else type(table).__name__
        raise TypeError(
            f"table must be a floating tensor of shape (rows, {terms + 2}) or with (batch,) added, got {kind}"
        )
    shape = table.shape
    if len(shape) not in (2, 3) or shape[1] != terms + 2 or (len(shape) == 3 and shape[2] != x.shape[0]):
        raise ValueError(
            f"table must have shape (rows, {terms + 2}) or (rows, {terms + 2}, {x.shape[0]}), for a, {terms} history "
            f"terms and c, got {tuple(shape)}"
        )
    if table.device != x.device:
        raise ValueError(f"table must be on {x.device} like x, got {table.device}; move it once, before the loop")


def _usual_table(table: Any, x: Tensor, terms: int, row: Any) -> bool:
    """Whether no check could refuse a table and a row of it."""
    if type(table) is not Tensor or table.dtype not in FLOATS or table.device != x.device or table.requires_grad:
        return False
    shape = table.shape
    return len(shape) == 2 and shape[1] == terms + 2 <= 6 and type(row) is int and 0 <= row < shape[0]


def linear_step(
    x: Tensor,
    history: Sequence[Tensor],
    table: Tensor,
    row: Index,
    *,
    stochastic: bool = True,
    seed: Index = 0,
    stream: SupportsIndex = Stream.DRIVING,
    first_path: Index = 0,
    step: Index = 0,
    out: Tensor | None = None,
) -> Tensor:
    r"""One row of a semilinear scheme: $a x + \sum_{i \le K} b_i s_i + c z$, $(a, b_1, \dots, b_K, c)$ from a table.

    Euler-Maruyama on a diffusion, reverse diffusion, ancestral sampling, DDIM, DPM-Solver++ and exponential multistep
    are such rows.

    Args:
        x: State, shape ``(batch, *state)``; dtypes as for `euler_maruyama_step`.
        history: The terms $s_i$, like `x`: at most four, possibly none.
        table: ``(rows, K + 2)``, or ``(rows, K + 2, batch)`` for coefficients per sample; any floating dtype,
            float64 as a rule, on the device of `x`.
        row: The row to take: an integer or a 0-d int64 tensor on the device of `x`.
        stochastic: If False, no noise is made and the last column is not read.
        seed, stream, first_path, step, out: As for `euler_maruyama_step`; `out` may also be a term of the history.

    Returns:
        The new state, contiguous, or `out`. Differentiable in `x` and the history.

    Raises:
        TypeError, ValueError: As for `euler_maruyama_step`; the table does not fit, or a gradient with respect to it
            is asked for.

    Source: the coefficients are what papers differ in; see the solvers that make the tables.
    """
    terms = len(history)
    if usual(x, history, (), out) and _usual_table(table, x, terms, row):
        context = CallContext.PLAIN
    else:
        state("x", x)
        if terms > 4:
            raise ValueError(f"history must have at most 4 terms, got {terms}; add two of them up first")
        for i, s in enumerate(history):
            same_as_state(f"history[{i}]", s, x)
        _check_table(table, x, terms)
        context = call_context(x, table, *history)
        row = index("row", row, table.shape[0], f"{table.shape[0]}", context is CallContext.PLAIN)
        if recording(table):
            no_gradient("linear_step", "it holds the numbers of a scheme", table=table)
        if out is not None:
            check_output(out, x)
    plain = context is CallContext.PLAIN
    noise = noise_offset(x, seed, stream, first_path, step, plain) if stochastic or not plain else _NO_NOISE
    record = recording(x, *history)
    if plain and not record and not isinstance(row, Tensor):
        if out is None:
            out = empty_like(x)
        else:
            torch.autograd.graph.increment_version(out)
        if x.numel():
            implementation("linear_step", x.device)(x, history, table, row, stochastic=stochastic, out=out, noise=noise)
        return out
    chosen = (0, row) if isinstance(row, Tensor) else (row, None)
    arguments = (x, table, *chosen, stochastic, *history, *(None,) * (4 - terms), noise)
    if out is None:
        return _linear_op.call(context, record, *arguments)
    if record:
        named = {f"history[{i}]": s for i, s in enumerate(history)}
        no_gradient("linear_step with out=", "out is overwritten unseen by autograd", x=x, **named)
    _linear_out(context, out, *arguments)
    return out


def _perturb_into(out: Tensor, x0: Tensor, alpha: Any, sigma: Any, noise: NoiseOffset) -> None:
    if out.numel():
        implementation("perturb", x0.device)(x0, alpha, sigma, out=out, noise=noise)


def _perturb(x0: Tensor, *rest: Any) -> Tensor:
    out = empty_like(x0)
    _perturb_into(out, x0, *rest)
    return out


def _perturb_setup(ctx: Any, x0: Tensor, alpha: Any, sigma: Any, noise: NoiseOffset) -> None:
    learned = isinstance(alpha, Tensor) and alpha.requires_grad
    keep(ctx, x0 if learned else None, alpha, sigma, noise)


def _perturb_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    x0, alpha, sigma, noise = kept(ctx)
    wants_x0, wants_alpha, wants_sigma, *_ = ctx.needs_input_grad
    grad_x0 = scaled(grad, alpha) if wants_x0 else None
    grad_alpha = reduced(grad * x0, alpha) if wants_alpha else None
    grad_sigma = reduced(noise_product(grad, 1.0, noise), sigma) if wants_sigma else None
    return grad_x0, grad_alpha, grad_sigma


_PERTURB = f"Tensor x0, Tensor alpha, Tensor sigma, {NOISE}"
_perturb_op = define("perturb", f"({_PERTURB}) -> Tensor", _perturb, empty_like, _perturb_setup, _perturb_backward)
_perturb_out = define_out("perturb", f"(Tensor(a!) out, {_PERTURB}) -> ()", _perturb_into)


def perturb(
    x0: Tensor,
    alpha: Tensor | float,
    sigma: Tensor | float,
    *,
    seed: Index,
    stream: SupportsIndex = Stream.PERTURBATION,
    first_path: Index = 0,
    step: Index = 0,
    out: Tensor | None = None,
) -> Tensor:
    r"""A diffusion's state at some time, $x_t = \alpha x_0 + \sigma z$; the noise is not kept.

    `dsm_loss` at the same place makes the same noise again.

    Args:
        x0: Clean data, shape ``(batch, *state)``; dtypes as for `euler_maruyama_step`.
        alpha: Signal scale: a number, ``()`` or ``(batch,)``.
        sigma: Noise scale, likewise.
        seed, stream, first_path, step, out: As for `euler_maruyama_step`; step counts training steps, and `out` may
            be `x0`.

    Returns:
        The perturbed data, contiguous, or `out`. Differentiable in `x0`, `alpha` and `sigma`.

    Raises:
        TypeError, ValueError: As for `euler_maruyama_step`.
    """
    if usual(x0, (), (alpha, sigma), out):
        context = CallContext.PLAIN
    else:
        state("x0", x0)
        alpha, sigma = coefficient("alpha", alpha, x0), coefficient("sigma", sigma, x0)
        context = call_context(x0, alpha, sigma)
        if out is not None:
            check_output(out, x0, "x0")
    noise = noise_offset(x0, seed, stream, first_path, step, context is CallContext.PLAIN)
    if out is None:
        return _perturb_op.call(context, recording(x0, alpha, sigma), x0, alpha, sigma, noise)
    no_gradient("perturb with out=", "out is overwritten unseen by autograd", x0=x0, alpha=alpha, sigma=sigma)
    _perturb_out(context, out, x0, alpha, sigma, noise)
    return out
