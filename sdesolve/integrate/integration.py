"""An integration carried out step by step, and what is done when it stops being finite."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import final

import torch
from torch import Tensor

from sdesolve.brownian import AbstractNoise, BrownianPath
from sdesolve.integrate.checks import check_diffusion, check_drift, unchanged
from sdesolve.integrate.solution import DivergenceError
from sdesolve.integrate.stepping import AbstractStepper, choose_stepper
from sdesolve.sde import AbstractSDE, AbstractSemilinear, Noise, is_matrix, noise_shape
from sdesolve.solvers.base import AbstractSolver, Span
from sdesolve.solvers.milstein import check_own_component

# Increments are drawn for several steps at once: with few channels, a call a step would spend four words on each normal
# it keeps. At least this many normals a path, and no more than this many in all unless one step needs them.
_CHUNK_NORMALS = 64
_CHUNK_ELEMENTS = 1 << 20


def stepwise(
    solver: AbstractSolver,
    sde: AbstractSDE,
    watched: Watched,
    noise: AbstractNoise,
    times: Tensor,
    x0: Tensor,
    check_finite: bool,
    *,
    eager: bool,
) -> Integration:
    """The integration step by step: by the solver's own torch code if ``eager``, else by a kernel where one fits."""
    shape, elementwise = _increment_shape(watched, solver, x0, times)
    stepper = choose_stepper(
        solver,
        watched,
        watched.field,
        sde,
        noise,
        times,
        x0,
        shape,
        elementwise=elementwise,
        eager=eager,
    )
    return Integration(watched, stepper, times, noise, x0, shape, check_finite)


@final
class Watched(AbstractSDE):
    """An SDE that counts its drift evaluations, and checks what its functions return until told to stop."""

    def __init__(self, sde: AbstractSDE) -> None:
        self.noise, self.calculus, self._sde = sde.noise, sde.calculus, sde
        self.evaluations, self.checking = 0, True

    def drift(self, x: Tensor, t: Tensor) -> Tensor:
        self.evaluations += 1
        if not self.checking:
            return self._sde.drift(x, t)
        f = unchanged(self._sde.drift, x, t, "drift")
        check_drift(f, x, t)
        return f

    def field(self, x: Tensor, t: Tensor) -> Tensor:
        """The score of a reverse SDE or probability flow, counted as one evaluation of the drift it makes."""
        if not isinstance(self._sde, AbstractSemilinear):
            raise TypeError(f"{type(self._sde).__name__} has no field")
        self.evaluations += 1
        if not self.checking:
            return self._sde.field(x, t)
        s = unchanged(self._sde.field, x, t, "score")
        check_drift(s, x, t, "score")
        return s

    def diffusion(self, x: Tensor, t: Tensor) -> Tensor:
        if not self.checking:
            return self._sde.diffusion(x, t)
        g = unchanged(self._sde.diffusion, x, t, "diffusion")
        check_diffusion(g, x, self.noise)
        return g


@dataclasses.dataclass(frozen=True)
class Integration:
    """Everything one pass over the grid needs; can be gone through again, because noise can."""

    sde: Watched
    stepper: AbstractStepper
    times: Tensor
    noise: AbstractNoise
    x0: Tensor
    shape: tuple[int, ...]
    check_finite: bool

    @property
    def steps(self) -> int:
        return len(self.times) - 1

    def states(self, x: Tensor) -> Iterator[tuple[Tensor, Tensor, Span]]:
        """State before, state after, and span of each step in turn."""
        chunk = _chunk_steps(self.shape)
        self.sde.checking = True
        for first in range(0, self.steps, chunk):
            times = self.times[first : first + chunk + 1]
            self.stepper.begin(first, times)
            for k, span in enumerate(_spans(times, x), first):
                x_before = x
                x = self.stepper.advance(k, x, span)
                if self.sde.checking and self.check_finite and x.device.type == "cpu":  # elsewhere, wait for no device
                    self._refuse_nonfinite(k, x_before, x, span)
                self.sde.checking = False
                yield x_before, x, span

    def report_divergence(self, x0: Tensor) -> None:
        """Goes through the integration again to find the first step and path that are not finite."""
        with torch.no_grad():
            for k, (x_before, x, span) in enumerate(self.states(x0)):
                self._refuse_nonfinite(k, x_before, x, span)

    def report_end(self, x: Tensor) -> None:
        """Refuses a final state that is not finite, when no step in torch shows why."""
        row = int((~x.isfinite()).reshape(len(x), -1).any(1).nonzero()[0])
        path = row + (self.noise.first_path if isinstance(self.noise, BrownianPath) else 0)
        time = float(self.times[-2].flatten()[0])
        message = (
            f"the state of path {path} is not finite at the end, though the same steps in torch, which round "
            "differently, end in a finite one; it must have come near to an overflow: take smaller steps"
        )
        raise DivergenceError(message, step=self.steps - 1, time=time, path=path)

    def _refuse_nonfinite(self, k: int, x_before: Tensor, x: Tensor, span: Span) -> None:
        bad = ~x.detach().flatten(1).isfinite().all(1) if x.ndim > 1 else ~x.detach().isfinite()
        if not bool(bad.any()):
            return
        row = int(bad.nonzero()[0])
        path = row + (self.noise.first_path if isinstance(self.noise, BrownianPath) else 0)
        time = float(self.times[k].flatten()[row if self.times.ndim == 2 else 0])
        message = (
            f"the state of path {path} stopped being finite in step {k} of {self.steps}, which starts at "
            f"t = {time:.6g}: {self._culprit(x_before, span, row)}. {int(bad.sum())} of {len(bad)} paths are "
            "affected by that step"
        )
        raise DivergenceError(message, step=k, time=time, path=path)

    def _culprit(self, x: Tensor, span: Span, row: int) -> str:
        size = f"{float(x[row].abs().max()):.3g}" if x[row].numel() else "0"
        with torch.no_grad():
            values = {"drift": self.sde.drift(x, span.t0)}
            if self.sde.noise is not Noise.NONE:
                values["diffusion"] = self.sde.diffusion(x, span.t0)
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


def _increment_shape(sde: Watched, solver: AbstractSolver, x0: Tensor, times: Tensor) -> tuple[tuple[int, ...], bool]:
    """Shape of ``dW``, batch included, and whether element ``j`` of it drives element ``j`` of the state alone.

    Evaluates the diffusion once where the noise type does not settle it.
    """
    t = times[0].to(dtype=x0.dtype, device=x0.device)
    g = None
    if sde.noise in (Noise.ADDITIVE, Noise.GENERAL):
        with torch.no_grad():
            g = sde.diffusion(x0, t)
    if solver.own_component_diffusion and sde.noise is Noise.DIAGONAL and x0.numel():
        with torch.no_grad():
            check_own_component(sde, x0.detach(), t)
    elementwise = sde.noise in (Noise.ADDITIVE, Noise.DIAGONAL) and not (g is not None and is_matrix(g, x0))
    return (x0.shape[0], *noise_shape(sde.noise, x0, g)), elementwise


def _chunk_steps(shape: tuple[int, ...]) -> int:
    m, total = math.prod(shape[1:]), math.prod(shape)
    return max(1, min(_CHUNK_NORMALS // max(m, 1), _CHUNK_ELEMENTS // max(total, 1)))


def _spans(times: Tensor, x: Tensor) -> list[Span]:
    """The steps between consecutive times, rounded once from float64 to the dtype of the state."""
    ts = times.to(dtype=x.dtype, device=x.device)
    dts = times.diff(dim=0).to(dtype=x.dtype, device=x.device)
    if times.ndim == 2:
        dts = dts.reshape(*dts.shape, *(1,) * (x.ndim - 1))
    t, dt = ts.unbind(0), dts.unbind(0)
    return [Span(t[k], t[k + 1], dt[k]) for k in range(len(dt))]
