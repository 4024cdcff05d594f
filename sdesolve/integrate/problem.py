"""One integration, prepared: everything that lowering and the executors need, made once."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, final

import torch
from sdesolve_kernels.transforms import is_transformed
from torch import Tensor

from sdesolve._internal.copies import remembered
from sdesolve.brownian import AbstractNoise, AbstractPath, BrownianPath
from sdesolve.integrate.checks import check_diffusion, check_drift, check_product, check_reading, unchanged
from sdesolve.integrate.clock import keeping_clock, time_dtype
from sdesolve.integrate.probing import ByRow, unnoticed
from sdesolve.integrate.save_at import SavePlan
from sdesolve.jumps import AbstractJumping
from sdesolve.sde import AbstractSDE, AbstractSemilinear, Field, Noise, is_matrix, noise_shape
from sdesolve.solvers.base import AbstractSolver, Span
from sdesolve.solvers.predictor_corrector import PredictorCorrector
from sdesolve.solvers.tabulated import AbstractTabulated

if TYPE_CHECKING:
    from sdesolve.integrate.changes import Changes
    from sdesolve.integrate.following import Following
    from sdesolve.integrate.hooks import Hook
    from sdesolve.integrate.plans import Call
    from sdesolve.integrate.solution import Continuation


@final
class Watched(AbstractSDE):
    """An SDE that counts its drift evaluations, and checks what its functions return until told to stop.

    Args:
        sde: the equation.
        times: that the run goes through, of any shape.
    """

    def __init__(self, sde: AbstractSDE, times: Tensor) -> None:
        self.noise, self.calculus, self._sde = sde.noise, sde.calculus, sde
        self.joint, self.has_diffusion = sde.joint, sde.has_diffusion
        self._drift, self._diffusion = ByRow(sde.drift, "drift", times), ByRow(sde.diffusion, "diffusion", times)
        self._joint = ByRow(sde.drift_and_diffusion, "drift and diffusion", times)
        self._product = ByRow(sde.diffusion_product, "diffusion_product", times)
        self._field = ByRow(sde.field, "score", times) if isinstance(sde, AbstractSemilinear) else None
        self.evaluations, self.checking = 0, True
        self._values: dict[tuple[str, int, int], tuple[Tensor, Tensor, Any]] | None = None
        self.narrows = False  # whether values at float64 times of rows are given back in the dtype of the state
        self.step = 0.0  # the shortest, where functions are given the time in float64 for its sake

    @property
    def equation(self) -> AbstractSDE:
        return self._sde

    def channels(self, x: Tensor) -> tuple[int, ...] | None:
        return self._sde.channels(x)

    @contextlib.contextmanager
    def remembering(self) -> Iterator[None]:
        """Inside the ``with`` block drift and diffusion are evaluated once for the same tensors."""
        self._values = {}
        try:
            yield
        finally:
            self._values = None

    def _once(self, what: str, function: Callable[[Tensor, Tensor], Any], x: Tensor, t: Tensor) -> Any:
        if self._values is None:
            return function(x, t)
        key = what, id(x), id(t)
        if key not in self._values:
            self._values[key] = x, t, function(x, t)
        return self._values[key][2]

    def drift(self, x: Tensor, t: Tensor) -> Tensor:
        f: Tensor = self._once("drift", self._drift_of, x, t)
        return f

    def _drift_of(self, x: Tensor, t: Tensor) -> Tensor:
        self.evaluations += 1
        if not self.checking:
            return self._narrowed(self._drift(x, t), x)
        f = self._checked(self._drift, x, t, "drift")
        check_drift(f, x, t)
        return f

    def drift_at(self, x: Tensor, t: Tensor) -> Tensor:
        """`drift` with nothing counted or checked, once that was called: for traces."""
        return self._drift.given(x, t)

    def field(self, x: Tensor, t: Tensor, of: Field | None = None) -> Tensor:
        """The score of a reverse SDE or probability flow, counted as one evaluation of the drift it makes.

        ``of`` is what to evaluate in its place.
        """
        field = of or self._field
        if field is None:
            raise TypeError(f"{type(self._sde).__name__} has no field")
        self.evaluations += 1
        if not self.checking:
            return field(x, t)
        s = self._checked(field, x, t, "score")
        check_drift(s, x, t, "score")
        return s

    def diffusion(self, x: Tensor, t: Tensor) -> Tensor:
        g: Tensor = self._once("diffusion", self._diffusion_of, x, t)
        return g

    def _diffusion_of(self, x: Tensor, t: Tensor) -> Tensor:
        if not self.checking:
            return self._narrowed(self._diffusion(x, t), x)
        return self._checked_diffusion(self._checked(self._diffusion, x, t, "diffusion"), x, t)

    def drift_and_diffusion(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        if not self.joint:
            return self.drift(x, t), self.diffusion(x, t)
        f, g = self._once("both", self._joint_of, x, t)
        return f, g

    def _joint_of(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        self.evaluations += 1
        if not self.checking:
            f, g = self._joint(x, t)
            return self._narrowed(f, x), self._narrowed(g, x)
        f, g = self._checked(self._joint, x, t, "drift and diffusion")
        check_drift(f, x, t)
        return f, self._checked_diffusion(g, x, t)

    def diffusion_product(self, x: Tensor, t: Tensor, dW: Tensor) -> Tensor:
        if self.has_diffusion:
            return super().diffusion_product(x, t, dW)
        if not self.checking:
            return self._narrowed(self._product(x, t, dW), x)
        product = self._checked(self._product, x, t, "diffusion_product", dW)
        check_product(self._product.given, product, x, t, dW)
        return product

    def _narrowed(self, value: Tensor, x: Tensor) -> Tensor:
        return value.to(x.dtype) if self.narrows else value

    def _checked_diffusion(self, g: Tensor, x: Tensor, t: Tensor) -> Tensor:
        check_diffusion(g, x, self.noise)
        if type(x) in (Tensor, torch.nn.Parameter):  # and no symbol of a trace
            check_reading(self._diffusion, g, x, t, self.noise)
        return g

    def _checked(self, function: Callable[..., Any], x: Tensor, t: Tensor, what: str, *others: Tensor) -> Any:
        if self.step and t.dtype != x.dtype and type(t) is Tensor and type(x) is Tensor and not is_transformed():
            return keeping_clock(functools.partial(unchanged, function, x, t, what, *others), x, t, self.step, what)
        return unchanged(function, x, t, what, *others)


class IncrementShape(NamedTuple):
    """Shape of a Brownian increment.

    Attributes:
        shape: ``(batch, *channels)``.
        elementwise: whether element ``j`` of it drives element ``j`` of the state alone. The shape does not tell: a
            square matrix diffusion has increments of the state's shape too.
    """

    shape: tuple[int, ...]
    elementwise: bool


Gradients = Literal["auto", "checkpoint", "reversible", "none"]


@remembered
def _padded(times: Tensor) -> bool:
    return bool((times[-1] == times[-2]).any())


def reads_noise(sde: AbstractSDE, solver: AbstractSolver) -> bool:
    """Whether an integration draws any numbers."""
    return sde.noise is not Noise.NONE or isinstance(sde, AbstractJumping) or isinstance(solver, PredictorCorrector)


@final
@dataclasses.dataclass(frozen=True)
class Problem:
    """An integration.

    Attributes:
        solver: the scheme.
        equation: what the user passed.
        watched: the same, counted and checked.
        noise: what drives it.
        times: the grid, ``(steps + 1,)`` or ``(steps + 1, batch)``, float64 on the host; the two ends for a solver that
            chooses its own steps.
        x0: ``(batch, *state)``.
        save: which states to keep.
        check_finite: raise `DivergenceError` when the state stops being finite.
        progress: show a progress bar.
        first: step to begin with; ``times``, and numbers of steps, are those of the whole integration that it goes on
            with (`Continuation`).
        memory: what the solver remembers before that step, and what follows paths; nothing at the start.
        following: what follows the paths.
        earlier: the run that it goes on with.
        gradients: how gradients of a run that goes step by step are made.
        prior: whose law the paths are compared with, if they are.
        other_diffusion: whether the prior came with a diffusion of its own.
        changes: of the state at grid points.
        call: the call that it is of, if later ones of its kind may be made by a plan.
        hook: what is called after each step.
    """

    solver: AbstractSolver
    equation: AbstractSDE
    watched: Watched
    noise: AbstractNoise
    times: Tensor
    x0: Tensor
    save: SavePlan
    check_finite: bool = True
    progress: bool = False
    first: int = 0
    memory: tuple[Tensor, ...] = ()
    following: Following | None = None
    earlier: Continuation | None = None
    gradients: Gradients = "auto"
    prior: AbstractSDE | None = None
    other_diffusion: bool = False
    changes: Changes | None = None
    call: Call | None = None
    hook: Hook | None = None

    @property
    def roots(self) -> tuple[object, ...]:
        """What a step calls besides solver, equation and prior."""
        following = () if self.following is None else self.following.roots
        return *following, *(() if self.changes is None else self.changes.maps)

    @property
    def delays(self) -> int:
        """How many earlier states a step reads."""
        return len(getattr(self.equation, "ring", ()))

    @property
    def taken(self) -> int:
        """Steps that this integration takes itself."""
        return self.steps - self.first

    @property
    def steps(self) -> int:
        return self.times.shape[0] - 1

    @property
    def random(self) -> bool:
        """Whether it reads any noise."""
        return reads_noise(self.equation, self.solver)

    @property
    def first_path(self) -> int:
        """Path index of row 0."""
        return self.noise.first_path if isinstance(self.noise, BrownianPath) else 0

    @functools.cached_property
    def time_dtype(self) -> torch.dtype:
        """Of the times that functions are given (`time_dtype`)."""
        return time_dtype(self.times, self.x0, self._takes_float64)

    def _takes_float64(self) -> bool:
        """Whether drift and diffusion are as they should be at a time in float64; the times of a table are not."""
        sde, x = self.equation, self.x0.detach()
        if isinstance(self.solver, AbstractTabulated) and isinstance(sde, AbstractSemilinear):
            return False
        try:
            with torch.no_grad(), unnoticed(sde):
                t = self.times[self.first].to(x.device)
                check_drift(sde.drift(x, t), x, t)
                if not sde.has_diffusion:
                    check_drift(sde.diffusion_product(x, t, x.new_zeros(len(x), *(sde.channels(x) or ()))), x, t)
                elif sde.noise is not Noise.NONE:
                    check_diffusion(sde.diffusion(x, t), x, sde.noise)
        except Exception:  # what a function raises that is not made for it; if for another reason, then again
            return False
        return True

    def clock(self, times: Tensor) -> Tensor:
        """Float64 times as functions are given them."""
        return times.to(dtype=self.time_dtype, device=self.x0.device)

    @property
    def padded(self) -> bool:
        """Whether a last time is repeated: a step of no length, which leaves its row alone."""
        return _padded(self.times)

    @functools.cached_property
    def increment(self) -> IncrementShape:
        """Shape of the Brownian increment. Evaluates the diffusion once where the noise type does not settle it."""
        sde, x0 = self.watched, self.x0
        t = self.clock(self.times[self.first])
        if (own := sde.channels(x0)) is not None:
            return IncrementShape((x0.shape[0], *own), elementwise=False)
        g = None
        if sde.noise in (Noise.ADDITIVE, Noise.GENERAL):
            with torch.no_grad():
                g = sde.diffusion(x0, t)
        elementwise = sde.noise in (Noise.ADDITIVE, Noise.DIAGONAL) and not (g is not None and is_matrix(g, x0))
        return IncrementShape((x0.shape[0], *noise_shape(sde.noise, x0, g)), elementwise)

    def between(self, k: int, theta: float, x: Tensor, x_next: Tensor, span: Span) -> Tensor:
        """The state at the fraction ``theta`` of step ``k``, which went from ``x`` to ``x_next`` (`SavePlan`)."""
        sde = self.watched
        if sde.noise is Noise.NONE:
            return _hermite(sde, x, x_next, span, theta)
        assert isinstance(self.noise, AbstractPath)  # or the plan would have been refused
        b = self.noise.bridge(k, theta, self.increment.shape, dtype=x.dtype, device=x.device)
        chord = x + theta * (x_next - x)
        return chord + sde.diffusion_product(x, span.t0, span.dt.abs().sqrt() * b)

    def spans(self, first: int, count: int) -> list[Span]:
        """Steps ``first ... first + count - 1``, rounded once from float64: lengths to the dtype of the state."""
        x, times = self.x0, self.times[first : first + count + 1]
        ts = self.clock(times)
        dts = times.diff(dim=0).to(dtype=x.dtype, device=x.device)
        if times.ndim == 2:
            dts = dts.reshape(*dts.shape, *(1,) * (x.ndim - 1))
        t, dt = ts.unbind(0), dts.unbind(0)
        return [Span(t[k], t[k + 1], dt[k]) for k in range(len(dt))]


def _hermite(sde: AbstractSDE, x: Tensor, x_next: Tensor, span: Span, theta: float) -> Tensor:
    """The cubic through both states with both slopes; the quadratic without the last one where there is none.

    A score that divides by the noise level has no value at the end of a grid that ends at clean data.
    """
    f0, f1 = sde.drift(x, span.t0), sde.drift(x_next, span.t1)
    a, b = theta * (1 - theta) ** 2, theta**2 * (theta - 1)
    h = theta**2 * (3 - 2 * theta)
    cubic = x + h * (x_next - x) + span.dt * (a * f0 + b * f1)
    return torch.where(cubic.isfinite(), cubic, x + theta**2 * (x_next - x) + theta * (1 - theta) * span.dt * f0)
