"""Steps that each path chooses by its own error, for any scheme."""

from __future__ import annotations

from typing import final

from torch import Tensor

from sdesolve._internal.arguments import flag, kind_of, short, whole_number
from sdesolve.brownian import Increment, named
from sdesolve.sde import AbstractODE, AbstractSDE, Noise
from sdesolve.solvers.base import (
    AbstractEstimating,
    AbstractOneStep,
    AbstractRemembering,
    AbstractSolver,
    Span,
    Supported,
)
from sdesolve.solvers.controller import StepController
from sdesolve.solvers.embedded import AbstractEmbedded, Attempt, Slope
from sdesolve.solvers.predictor_corrector import PredictorCorrector
from sdesolve.solvers.wrapping import AbstractWrapping


@final
class Adaptive(AbstractWrapping):
    """The steps of ``solver``, their lengths chosen for each path by its own error: `solve` without ``steps``.

    **With noise** a step is a cell of the dyadic tree over each of ``first_steps`` equal parts of ``[t0, t1]``. A cell
    whose error is too large is halved, and its first half is tried: every end of a step that was tried stays one, and
    the Brownian motion is that of `BrownianPath` whatever was tried before. So a path is a function of seed, path
    number and tolerances; and one that never rejects has the bits of ``steps=first_steps``. Steps grow by factors up to
    2, as far as cells allow.

    Such steps converge where the scheme agrees with Milstein's method without areas, to the Stratonovich solution, or
    to the Ito one that has the same limit; others are refused, Euler-Maruyama with multiplicative noise among them:
    there, steps that are chosen by looking at the increment leave an error that no tolerance removes. Gaines and Lyons
    1997, SIAM Journal on Applied Mathematics 57; Foster and Jelincic 2023, "On the convergence of adaptive
    approximations for SDEs".

    **Without noise** steps have any length.

    The error is the scheme's own estimate (`AbstractEstimating`: `SPaRK`, `ShARK`, `SlowRK`, `Heun`, `SRIW1` and
    others), or for the rest the difference of one step and two of half the length, of which the two are kept. A step
    is accepted if its root mean square over the state, in units of ``atol + rtol max(|x|, |x'|)``, is below 1. With
    noise the next length is ``0.9 e_n^(-0.4/k) e_(n-1)^(0.1/k)`` times this one, where ``k`` is the strong order plus
    1/2; without, ``0.9 e_n^(-1/k)`` times, as for `DormandPrince`.

    Functions get the time of each step in the dtype of the state, or in float64 where a grid of ``first_steps`` steps
    gets that. Where float32 rounds it so that a step changes by more than the tolerance, the run is refused; a kernel
    leaves runs whose steps come near that rounding, if the equation reads the time, to torch, which looks at each step.

    A state at a time of ``save_at`` inside a step is a step of its own from where that began, on the same path: asking
    for it changes nothing else. Where a carry is observed, or paths stop (``until``), and at changes (``at``), steps
    end at the times: with noise, each of the ``first_steps`` parts that holds one is cut there before it is halved,
    which makes it another Brownian path.

    Args:
        solver: a one-step solver of fixed steps, or an embedded one, whose tolerances these replace.
        rtol: relative tolerance of a step, at least 4 times the rounding error of the state's dtype.
        atol: absolute tolerance of a step.
        first_steps: how many equal parts no step goes beyond, with noise.
        max_level: how often such a part may be halved, at most 20.
        max_steps: attempts that a path may take before `solve` gives up.
        shared: with noise, whether all paths of a batch take the same steps, by the root mean square of their errors:
            for functions that take one time for all rows. What a path is then depends on the others; runs go in torch.

    Raises:
        TypeError: ``solver`` has no step of its own, or an argument is no number.
        ValueError: it reads what halves of a step cannot be given: Levy areas, two-point numbers, numbers of a grid,
            or memory; or an argument is out of range.

    Example:
        >>> sol = solve(sde, x0, 0.0, 1.0, solver=Adaptive(SPaRK(), rtol=1e-3, atol=1e-6), seed=0)
        >>> sol.stats.accepted, sol.stats.rejected  # for each path
    """

    stochasticity = None

    def __init__(
        self,
        solver: AbstractOneStep,
        rtol: float = 1e-3,
        atol: float = 1e-6,
        *,
        first_steps: int = 1,
        max_level: int = 20,
        max_steps: int = 100_000,
        shared: bool = False,
    ) -> None:
        _check(solver)
        StepController(rtol, atol, max_steps)
        self.solver, self.rtol, self.atol = solver, float(rtol), float(atol)
        self.first_steps, self.max_level = (
            whole_number(first_steps, "first_steps", 1),
            whole_number(max_level, "max_level", 1),
        )
        self.max_steps, self.shared = whole_number(max_steps, "max_steps", 1), flag(shared, "shared")
        if self.max_level > 20:
            raise ValueError(
                f"max_level must be at most 20, the depth of the tree under a step, got {short(max_level)}"
            )

    @property
    def supported(self) -> Supported:
        orders = self.solver.strong_orders
        return frozenset(
            (calculus, noise)
            for calculus, noise in self.solver.supported
            if noise in (Noise.NONE, Noise.ADDITIVE) or (orders[1] or 0.0) >= 1.0
        )

    @property
    def strong_orders(self) -> tuple[float | None, float | None, float | None]:
        return self.solver.strong_orders

    @property
    def evaluations(self) -> int:
        return self.solver.evaluations * (1 if self.estimates else 3)

    @property
    def diffusion_evaluations(self) -> int:
        return self.solver.diffusion_evaluations * (1 if self.estimates else 3)

    @property
    def controller(self) -> StepController:
        return StepController(self.rtol, self.atol, self.max_steps)

    @property
    def estimates(self) -> bool:
        """Whether the scheme has an estimate of its own."""
        return isinstance(self.solver, AbstractEstimating | AbstractEmbedded)

    def order(self, noise: Noise) -> float:
        """Of the error of one step: ``k`` above."""
        p = self.solver.strong_orders[{Noise.ADDITIVE: 0, Noise.GENERAL: 2}.get(noise, 1)]
        return (1.0 if p is None else p) + 0.5

    def pair(self) -> AbstractEmbedded:
        """What takes an ODE's steps."""
        if isinstance(self.solver, AbstractEmbedded):
            return type(self.solver)(self.rtol, self.atol, max_steps=self.max_steps)
        pair = OneStepPair(self.rtol, self.atol, max_steps=self.max_steps)
        pair.solver = self.solver
        return pair

    def step(self, sde: AbstractSDE, x: Tensor, span: Span, noise: Increment | None) -> Tensor:
        return self.solver.step(sde, x, span, noise)


def _check(solver: object) -> None:
    if not isinstance(solver, AbstractOneStep) or isinstance(solver, PredictorCorrector | Adaptive):
        got = repr(solver) if isinstance(solver, AbstractSolver) else kind_of(solver)
        raise TypeError(f"Adaptive takes a one-step solver of fixed steps such as SPaRK(), got {got}")
    name = type(solver).__name__
    inner = getattr(solver, "solver", solver)  # of a wrapper such as Tamed
    if isinstance(inner, AbstractRemembering):
        raise ValueError(f"{name} remembers earlier steps, and a step that is rejected has none; take Heun or SPaRK")
    if type(inner).numbers is not AbstractOneStep.numbers:
        raise ValueError(f"{name} has numbers of each step made from a grid beforehand, and here there is none")
    unfit = [named(part) for part in solver.needs if named(part) in ("A", "S")]
    if "A" in unfit:
        raise ValueError(
            f"{name} reads Levy areas, which halves of a step cannot be given: leave them out, area=None, where noise "
            "commutes, or take SPaRK for Stratonovich noise of any kind"
        )
    if unfit:
        raise ValueError(f"{name} is right in law alone, on any path of a grid, and has no error along one to go by")


@final
class OneStepPair(AbstractEmbedded):
    """A one-step scheme on an ODE, with its own estimate or that of two half steps."""

    supported = frozenset()
    strong_order = None
    weak_order = None
    solver: AbstractOneStep

    @property
    def ode_order(self) -> int:
        return self.solver.ode_order or 1

    @property
    def error_order(self) -> int:  # type: ignore[override]
        return max(self.ode_order, 2) if isinstance(self.solver, AbstractEstimating) else self.ode_order + 1

    @property
    def evaluations(self) -> int:
        return 1 + self.solver.evaluations * (1 if isinstance(self.solver, AbstractEstimating) else 3)

    def attempt(self, drift: Slope, x: Tensor, slope: Tensor, t: Tensor, dt: Tensor) -> Attempt:
        sde = _Drift(drift)

        def span(a: Tensor, length: Tensor) -> Span:
            h = length.to(x.dtype)
            return Span(a, a + length, h.reshape(-1, *(1,) * (x.ndim - 1)) if h.ndim else h)

        if isinstance(self.solver, AbstractEstimating):
            y, estimate = self.solver.attempt(sde, x, span(t, dt), None)
            return Attempt(y, estimate(), (slope, drift(y, t + dt)))
        half = 0.5 * dt
        whole = self.solver.step(sde, x, span(t, dt), None)
        middle = self.solver.step(sde, x, span(t, half), None)
        y = self.solver.step(sde, middle, span(t + half, dt - half), None)
        return Attempt(y, y - whole, (slope, drift(y, t + dt)))

    def between(self, x: Tensor, attempt: Attempt, dt: Tensor, theta: Tensor) -> Tensor:
        """The cubic through both states with both slopes."""
        h, u = (v.to(x.dtype).reshape(-1, *(1,) * (x.ndim - 1)) if v.ndim else v.to(x.dtype) for v in (dt, theta))
        first, last = attempt.slopes
        chord = x + u * u * (3 - 2 * u) * (attempt.x - x)
        return chord + h * u * (1 - u) * ((1 - u) * first - u * last)


@final
class _Drift(AbstractODE):
    def __init__(self, drift: Slope) -> None:
        self._drift = drift

    def drift(self, x: Tensor, t: Tensor) -> Tensor:
        return self._drift(x, t)
