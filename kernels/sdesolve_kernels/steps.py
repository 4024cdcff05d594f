"""The step ops: Euler-Maruyama, linear multistep, and the perturbation of training data."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, SupportsIndex

import torch
from torch import Tensor

from .checks import alike, check_output, coefficient, index, no_gradient, place, same_as_state, state
from .dispatch import step_function
from .gradients import noise_product, reduced, root, scaled
from .library import PLACE, Route, define, define_out, launch_place, read, recording, route
from .streams import Stream

__all__ = ["empty_like", "euler_maruyama_step", "linear_step", "perturb"]

Index = SupportsIndex | Tensor


def empty_like(x: Tensor, *_: Any) -> Tensor:
    """A contiguous tensor like `x`; also the fake of ops that return one."""
    # Naming the memory format costs 0.6 us, which a step on a thousand elements would notice.
    return torch.empty_like(x) if x.is_contiguous() else torch.empty_like(x, memory_format=torch.contiguous_format)


# Euler-Maruyama ----------------------------------------------------------------------------------------------------


def _euler_into(out: Tensor, x: Tensor, f: Tensor, g: Any, dt: Any, *place: Any) -> None:
    if out.numel():
        step_function("euler_maruyama_step", x.device)(x, f, g, dt, out=out, **launch_place(place))


def _euler(x: Tensor, *rest: Any) -> Tensor:
    out = empty_like(x)
    _euler_into(out, x, *rest)
    return out


def _euler_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, _, g, dt, *place = inputs
    ctx.dt, ctx.where = None if isinstance(dt, Tensor) else dt, place[:4]
    # Of g, shape and dtype are what counts; it is kept only where it is a handful of numbers.
    ctx.full = isinstance(g, Tensor) and g.dim() > 1
    small = g if isinstance(g, Tensor) and not ctx.full else None
    ctx.save_for_backward(dt if isinstance(dt, Tensor) else None, small, *place[4:])


def _euler_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    kept, g, *at = ctx.saved_tensors
    dt = ctx.dt if kept is None else kept
    grad_f = scaled(grad, dt) if ctx.needs_input_grad[1] else None
    grad_g = None
    if ctx.needs_input_grad[2]:
        grad_g = noise_product(grad, root(dt, grad), *ctx.where, *at)
        if not ctx.full:
            grad_g = reduced(grad_g, g)
    return grad, grad_f, grad_g, *(None,) * 8


_EULER = f"Tensor x, Tensor f, Tensor g, Tensor dt, {PLACE}"
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
    state("x", x)
    same_as_state("f", f, x)
    if not alike(g, x):
        if isinstance(g, Tensor) and g.dim() > 1 and g.shape == x.shape:
            same_as_state("g", g, x)  # which says what does not fit
        g = coefficient("g", g, x, or_like="x")
    dt = coefficient("dt", dt, x)
    way = route(x, f, g, dt)
    where = place(x, seed, stream, first_path, step, way is Route.PLAIN)
    if isinstance(dt, Tensor):
        no_gradient("euler_maruyama_step", "it is a number of the time grid", dt=dt)
    if out is None:
        return _euler_op.call(way, recording(x, f, g), x, f, g, dt, *where)
    check_output(out, x)
    if recording(x, f, g):
        no_gradient("euler_maruyama_step with out=", "out is overwritten unseen by autograd", x=x, f=f, g=g)
    _euler_out(way, out, x, f, g, dt, *where)
    return out


# Linear multistep --------------------------------------------------------------------------------------------------


def _linear_into(
    out: Tensor, x: Tensor, table: Tensor, row: int, row_at: Tensor | None, stochastic: bool, *rest: Any
) -> None:
    if out.numel():
        history = [s for s in rest[:4] if s is not None]
        at = row if row_at is None else read(row_at)
        run = step_function("linear_step", x.device)
        run(x, history, table, at, stochastic=stochastic, out=out, **launch_place(rest[4:]))


def _linear(x: Tensor, *rest: Any) -> Tensor:
    out = empty_like(x)
    _linear_into(out, x, *rest)
    return out


def _linear_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, table, ctx.row, row_at, *_ = inputs
    ctx.save_for_backward(table, row_at)


def _linear_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    table, row_at = ctx.saved_tensors
    entries = table[ctx.row] if row_at is None else table.index_select(0, row_at.reshape(1))[0]
    wanted = (ctx.needs_input_grad[0], *ctx.needs_input_grad[5:9])
    x, *history = (scaled(grad, entries[k]) if want else None for k, want in enumerate(wanted))
    return x, None, None, None, None, *history, *(None,) * 7


_LINEAR = (
    "Tensor x, Tensor table, SymInt row, Tensor? row_at, bool stochastic, "
    f"Tensor? s1, Tensor? s2, Tensor? s3, Tensor? s4, {PLACE}"
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
    state("x", x)
    terms = len(history)
    if terms > 4:
        raise ValueError(f"history must have at most 4 terms, got {terms}; add two of them up first")
    for i, s in enumerate(history):
        same_as_state(f"history[{i}]", s, x)
    _check_table(table, x, terms)
    way = route(x, table, *history)
    where = place(x, seed, stream, first_path, step, way is Route.PLAIN)
    at = index("row", row, table.shape[0], f"{table.shape[0]}", way is Route.PLAIN)
    chosen = (0, at) if isinstance(at, Tensor) else (at, None)
    if recording(table):
        no_gradient("linear_step", "it holds the numbers of a scheme", table=table)
    arguments = (x, table, *chosen, stochastic, *history, *(None,) * (4 - terms), *where)
    if out is None:
        return _linear_op.call(way, recording(x, *history), *arguments)
    check_output(out, x)
    if recording(x, *history):
        named = {f"history[{i}]": s for i, s in enumerate(history)}
        no_gradient("linear_step with out=", "out is overwritten unseen by autograd", x=x, **named)
    _linear_out(way, out, *arguments)
    return out


# Perturbation ------------------------------------------------------------------------------------------------------


def _perturb_into(out: Tensor, x0: Tensor, alpha: Any, sigma: Any, *place: Any) -> None:
    if out.numel():
        step_function("perturb", x0.device)(x0, alpha, sigma, out=out, **launch_place(place))


def _perturb(x0: Tensor, *rest: Any) -> Tensor:
    out = empty_like(x0)
    _perturb_into(out, x0, *rest)
    return out


def _perturb_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x0, alpha, sigma, *place = inputs
    ctx.alpha, ctx.where = None if isinstance(alpha, Tensor) else alpha, place[:4]
    learned = isinstance(alpha, Tensor) and alpha.requires_grad
    tensors = (c if isinstance(c, Tensor) else None for c in (alpha, sigma))
    ctx.save_for_backward(x0 if learned else None, *tensors, *place[4:])


def _perturb_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    x0, alpha, sigma, *at = ctx.saved_tensors
    wanted = ctx.needs_input_grad
    grad_x0 = scaled(grad, ctx.alpha if alpha is None else alpha) if wanted[0] else None
    grad_alpha = reduced(grad * x0, alpha) if wanted[1] else None
    grad_sigma = reduced(noise_product(grad, 1.0, *ctx.where, *at), sigma) if wanted[2] else None
    return grad_x0, grad_alpha, grad_sigma, *(None,) * 7


_PERTURB = f"Tensor x0, Tensor alpha, Tensor sigma, {PLACE}"
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
    state("x0", x0)
    alpha, sigma = coefficient("alpha", alpha, x0), coefficient("sigma", sigma, x0)
    way = route(x0, alpha, sigma)
    where = place(x0, seed, stream, first_path, step, way is Route.PLAIN)
    if out is None:
        return _perturb_op.call(way, recording(x0, alpha, sigma), x0, alpha, sigma, *where)
    check_output(out, x0, "x0")
    no_gradient("perturb with out=", "out is overwritten unseen by autograd", x0=x0, alpha=alpha, sigma=sigma)
    _perturb_out(way, out, x0, alpha, sigma, *where)
    return out
