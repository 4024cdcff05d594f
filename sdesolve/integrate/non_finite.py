"""What is said when a state stops being finite: at which step and path, and by which function."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sdesolve.integrate.problem import Problem
from sdesolve.integrate.solution import DivergenceError
from sdesolve.sde import Noise
from sdesolve.solvers.base import Span


def refuse_nonfinite(problem: Problem, k: int, x_before: Tensor, x: Tensor, span: Span) -> None:
    """Refuses the state ``x`` after step ``k`` if it is not finite.

    Raises:
        DivergenceError: it is not.
    """
    bad = ~x.detach().flatten(1).isfinite().all(1) if x.ndim > 1 else ~x.detach().isfinite()
    if not bool(bad.any()):
        return
    row = int(bad.nonzero()[0])
    path = row + problem.first_path
    time = float(problem.times[k].flatten()[row if problem.times.ndim == 2 else 0])
    message = (
        f"the state of path {path} stopped being finite in step {k} of {problem.steps}, which starts at "
        f"t = {time:.6g}: {_culprit(problem, x_before, span, row)}. {int(bad.sum())} of {len(bad)} paths are "
        "affected by that step"
    )
    raise DivergenceError(message, step=k, time=time, path=path)


def refuse_end(problem: Problem, x: Tensor) -> None:
    """Refuses a final state that is not finite, when no step in torch shows why.

    Raises:
        DivergenceError: always.
    """
    row = int((~x.isfinite()).reshape(len(x), -1).any(1).nonzero()[0])
    path = row + problem.first_path
    message = (
        f"the state of path {path} is not finite at the end, though the same steps in torch, which round "
        "differently, end in a finite one; it must have come near to an overflow: take smaller steps"
    )
    raise DivergenceError(message, step=problem.steps - 1, time=float(problem.times[-2].flatten()[0]), path=path)


def _culprit(problem: Problem, x: Tensor, span: Span, row: int) -> str:
    size = f"{float(x[row].abs().max()):.3g}" if x[row].numel() else "0"
    sde = problem.watched
    with torch.no_grad():
        values = {"drift": sde.drift(x, span.t0)}
        if sde.noise is not Noise.NONE:
            values["diffusion"] = sde.diffusion(x, span.t0)
    for name, value in values.items():
        if bool(value.isnan().any()):
            return f"the {name} returned nan for a state of size {size}"
    for name, value in values.items():
        if bool(value.isinf().any()):
            return f"the {name} returned inf for a state of size {size}, which overflowed; take smaller steps"
    dt = float(span.dt.abs().max())
    scales = {"drift": dt, "diffusion": math.sqrt(dt)}
    reach = sum(float(value.abs().max()) * scales[name] for name, value in values.items() if value.numel())
    if float(x.abs().max()) + reach < torch.finfo(x.dtype).max ** 0.25:
        return (
            f"drift and diffusion are finite for a state of size {size}, and far from an overflow; the solver uses "
            "them elsewhere in the step too, or (Milstein) the derivative of the diffusion, which have no value"
        )
    return f"the state, of size {size}, overflowed; take smaller steps"
