"""What is said when a state stops being finite: at which step and path, and by which function."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from sdesolve_kernels.transforms import plain
from torch import Tensor
from torch.utils._pytree import tree_leaves

from sdesolve.integrate.checks import all_finite, bad_rows
from sdesolve.integrate.problem import Problem
from sdesolve.integrate.save_at import SavePlan
from sdesolve.integrate.solution import DivergenceError, Saved
from sdesolve.sde import Noise
from sdesolve.solvers.base import Span

if TYPE_CHECKING:
    from sdesolve.integrate.executors import Stepwise


def refuse_nonfinite(problem: Problem, k: int, x_before: Tensor, x: Tensor, span: Span) -> None:
    """Refuses the state ``x`` after step ``k`` if it is not finite.

    Raises:
        DivergenceError: it is not.
    """
    if not all_finite(x):
        row = int(bad_rows(x).nonzero()[0])
        _refuse(problem, k, x, _culprit(problem, k, x_before, span, row))


def refuse_overflow(problem: Problem, k: int, x: Tensor) -> None:
    """Refuses the state ``x`` that a kernel makes of step ``k``, when the same step in torch gives one that is finite.

    Raises:
        DivergenceError: always.
    """
    culprit = (
        "the same step in torch, which rounds differently, gives a finite one, near an overflow; take smaller steps"
    )
    _refuse(problem, k, x, culprit)


def watch_loss(problem: Problem, saved: Saved, carry: Any, again: Callable[[SavePlan], Stepwise]) -> None:
    """Has ``backward`` refuse a loss that is made of values that are not finite, where the state itself is.

    An observable or a functional of the path may overflow or be nan, and torch's gradient of that is often finite. What
    the loss leaves out, so that its cotangent is 0, may be what it is.

    Args:
        problem: the integration.
        saved: what it left.
        carry: functionals along the paths.
        again: begins it once more, step by step, with such a plan.
    """
    save, moments = problem.save, saved.variances is not None
    what = "the state" if save.observable is None else "observable="

    def of_saves(run: Stepwise) -> list[Tensor]:
        return run.problem.save.kept

    seen = [saved.xs] if save.observable is not None or len(save.ts) > 1 else []
    seen += [saved.variances] if saved.variances is not None and len(problem.x0) > 1 else []
    for values in seen:
        _watch(values, functools.partial(_refuse_loss, problem, what, of_saves, again, None if moments else 1))
    for leaf in () if carry is None else tree_leaves(carry):
        _watch(leaf, functools.partial(_refuse_loss, problem, "carry=", _carried, again, 0))


def _watch(values: Tensor, refuse: Callable[[Tensor], None]) -> None:
    """Has `refuse` called with the places of those that are not finite and have a cotangent."""
    if not values.requires_grad or all_finite(values):
        return
    bad = ~values.detach().isfinite()

    def look(cotangent: Tensor) -> None:
        used = bad & (cotangent.detach() != 0)
        if bool(used.any()):
            refuse(used)

    values.register_hook(look)


def _carried(run: Stepwise) -> Sequence[Tensor]:
    following = run.problem.following
    return () if following is None else following.parts(run.states).carried


def _refuse_loss(
    problem: Problem,
    what: str,
    values: Callable[[Stepwise], Sequence[Tensor]],
    again: Callable[[SavePlan], Stepwise],
    axis: int | None,
    bad: Tensor,
) -> None:
    """Refuses a loss at the first step and path of those in question whose values are not finite."""
    batch = len(problem.x0)
    rows = torch.ones(batch, dtype=torch.bool) if axis is None else bad.movedim(axis, 0).reshape(batch, -1).any(1).cpu()
    with torch.no_grad():
        run = again(problem.save.every_path())
        while not bool((found := _bad(values(run), rows)).any()) and run.k < problem.steps:
            run.advance()
    k, row = max(run.k - 1, problem.first), int((found if bool(found.any()) else rows).nonzero()[0])
    time, path = float(problem.times[k].flatten()[row if problem.times.ndim == 2 else 0]), row + problem.first_path
    raise DivergenceError(
        f"the loss takes values of {what} that are not finite, first for path {path} in step {k} of {problem.steps}, "
        f"which starts at t = {time:.6g}, and has no gradient. Leave such paths out of the loss, or mend what is "
        "undefined or overflows there; check_finite=False lets it pass",
        step=k,
        time=time,
        path=path,
    )


def _bad(values: Sequence[Tensor], rows: Tensor) -> Tensor:
    """Which of some rows hold nan or inf."""
    return functools.reduce(torch.logical_or, (bad_rows(v).cpu() for v in values), torch.zeros_like(rows)) & rows


def _refuse(problem: Problem, k: int, x: Tensor, culprit: str) -> None:
    bad = bad_rows(x)
    row = int(bad.nonzero()[0])
    path, time = row + problem.first_path, float(problem.times[k].flatten()[row if problem.times.ndim == 2 else 0])
    message = (
        f"the state of path {path} stopped being finite in step {k} of {problem.steps}, which starts at "
        f"t = {time:.6g}: {culprit}. {int(bad.sum())} of {len(bad)} paths are affected by that step"
    )
    raise DivergenceError(message, step=k, time=time, path=path)


def _culprit(problem: Problem, k: int, x: Tensor, span: Span, row: int) -> str:
    size = f"{_largest(x[row]):.3g}"
    sde = problem.watched
    with torch.no_grad():
        values = {"drift": sde.drift(x, span.t0)}
        if not sde.has_diffusion:
            ones = torch.ones(len(x), *(sde.channels(x) or ()), dtype=x.dtype, device=x.device)
            values["diffusion"] = sde.diffusion_product(x, span.t0, ones)
        elif sde.noise is not Noise.NONE:
            values["diffusion"] = sde.diffusion(x, span.t0)
    for name, value in values.items():
        if bool(plain(value).isnan().any()):
            return f"the {name} returned nan for a state of size {size}"
    for name, value in values.items():
        if bool(plain(value).isinf().any()):
            return f"the {name} returned inf for a state of size {size}, which overflowed; take smaller steps"
    dt = _largest(span.dt)
    scales = {"drift": dt, "diffusion": math.sqrt(dt)}
    reach = sum(_largest(value) * scales[name] for name, value in values.items())
    if _largest(x) + reach < torch.finfo(x.dtype).max ** 0.25:
        if problem.changes is not None and k + 1 in problem.changes.points:
            return f"drift and diffusion are finite for a state of size {size}, and at= changes the end of this step"
        return problem.solver.failure or (
            f"drift and diffusion are finite for a state of size {size}, and far from an overflow; the solver uses "
            "them elsewhere in the step too, or (Milstein) the derivative of the diffusion, which have no value"
        )
    return f"the state, of size {size}, overflowed; take smaller steps"


def _largest(x: Tensor) -> float:
    """The largest absolute value; 0 of an empty tensor."""
    return float(plain(x.detach()).abs().max()) if x.numel() else 0.0
