"""What is said when a state stops being finite: at which step and path, and by which function."""

from __future__ import annotations

import math

import torch
from sdesolve_kernels.transforms import plain
from torch import Tensor

from sdesolve.integrate.checks import all_finite, bad_rows
from sdesolve.integrate.problem import Problem
from sdesolve.integrate.solution import DivergenceError
from sdesolve.sde import Noise
from sdesolve.solvers.base import Span


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
