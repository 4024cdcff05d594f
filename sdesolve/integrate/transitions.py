"""The law of each step of a stochastic sampler, with gradients to the score: what policy gradients are made of."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import cast, final

import torch
from torch import Tensor

from sdesolve import grids
from sdesolve._internal.arguments import kind_of, short
from sdesolve.brownian import BrownianPath, Increment
from sdesolve.diffusions.base import AbstractDiffusion
from sdesolve.integrate.checks import check_pair, check_state
from sdesolve.integrate.executors import AbstractSteppedContext
from sdesolve.integrate.lowering import Lowered, lower
from sdesolve.integrate.problem import Problem, Watched
from sdesolve.integrate.save_at import SavePlan
from sdesolve.reverse import Score
from sdesolve.sde import AbstractSDE
from sdesolve.solvers.base import AbstractSolver, Span
from sdesolve.solvers.predictor_corrector import PredictorCorrector
from sdesolve.solvers.tabulated import Row, torch_row

Reach = Callable[[Tensor, Tensor], Tensor]
_TAKE = "take Ancestral, EulerMaruyama, ReverseDiffusion, DDIM(eta) or SDEDPMSolverPP"


@final
@dataclasses.dataclass(frozen=True)
class Transitions:
    """Steps of a sampler as conditional laws ``x_{k+1} | x_0 ... x_k ~ N(mean_k, std_k^2 I)``.

    Attributes:
        mean: ``(steps, batch, *state)``, with gradients to the score.
        std: ``(steps,)``, or ``(steps, batch)`` for times per sample; constants of the schedule.
    """

    mean: Tensor
    std: Tensor

    def __len__(self) -> int:
        return len(self.mean)

    def __getitem__(self, which: slice) -> Transitions:
        """Some of the steps."""
        if not isinstance(which, slice):
            raise TypeError(f"steps are taken by a slice, such as laws[:-1], got {short(which)}")
        return Transitions(self.mean[which], self.std[which])

    def log_prob(self, x: Tensor) -> Tensor:
        """Log density of the states that steps lead to, in nats, ``(steps, batch)``.

        Args:
            x: ``(steps, batch, *state)``; of a run ``sol.xs[1:]``.

        Raises:
            ValueError: another shape; a step without noise, which has no density.
        """
        if x.shape != self.mean.shape:
            raise ValueError(
                f"log_prob takes the states after the steps, {tuple(self.mean.shape)}, got {tuple(x.shape)}; of saved "
                "states these are xs[1:]"
            )
        std = self._std()
        z = (x - self.mean) / std
        return (-0.5 * z.square() - std.log() - 0.5 * math.log(2.0 * math.pi)).flatten(2).sum(2)

    def kl(self, other: Transitions) -> Tensor:
        """Kullback-Leibler divergence of ``other`` from these laws, step by step, in nats, ``(steps, batch)``.

        For the same sampler with another score it is ``|mean - mean'|^2 / 2 std^2``, and its sum over steps that of the
        laws of whole trajectories: the penalty that keeps a fine-tuned sampler near the one it came from.

        Args:
            other: of the same shapes.

        Raises:
            ValueError: other shapes; a step without noise.
        """
        if other.mean.shape != self.mean.shape:
            raise ValueError(
                f"both must have laws of as many steps and states, got {tuple(self.mean.shape)} and "
                f"{tuple(other.mean.shape)}"
            )
        p, q = self._std(), other._std()
        terms = 0.5 * ((p / q).square() - 1.0 + ((self.mean - other.mean) / q).square()) - (p / q).log()
        return terms.flatten(2).sum(2)

    def sample(self, z: Tensor) -> Tensor:
        """``mean + std z``, the states that standard normals ``z`` lead to, of the shape of ``mean``."""
        return self.mean + self._broadcast() * z

    def _broadcast(self) -> Tensor:
        return self.std.reshape(*self.std.shape, *(1,) * (self.mean.ndim - self.std.ndim))

    def _std(self) -> Tensor:
        still = (self.std == 0).reshape(len(self), -1).any(1)
        if bool(still.any()):
            k = int(still.nonzero()[0])
            raise ValueError(
                f"step {k} adds no noise, so that its state has no density: leave it out, laws[:{k}], or end the grid "
                "before noise does"
            )
        return self._broadcast()


def transitions(
    process: AbstractDiffusion,
    score: Score,
    xs: Tensor,
    ts: Tensor,
    *,
    solver: AbstractSolver,
    stochasticity: float | None = None,
) -> Transitions:
    """The laws of the steps that a sampler took along given states, as functions of the score.

    ``transitions(process, score, sol.xs, sol.ts, solver=solver)`` for a run ``sol = sample(..., solver=solver,
    save_at="grid")`` gives back the means that it added noise to, now with gradients to whatever the score is made of;
    with another score, the laws that this one has along the same states. So ``log_prob(sol.xs[1:])`` is the log
    likelihood of a policy's actions (Black et al. 2024, DDPO, eq. 7; Fan et al. 2023, DPOK), and its difference to that
    of the run the log of an importance weight.

    One evaluation of the score a step, or as many as the sampler makes. Multistep samplers remember along the states
    given, from the first of them on.

    Args:
        process: the forward diffusion.
        score: ``grad_x log p_t(x)``.
        xs: states ``(steps + 1, batch, *state)`` at
        ts: decreasing times ``(steps + 1,)``, or ``(steps + 1, batch)``, so that each row may be at a step of its own.
        solver: a sampler that adds noise once, after its last evaluation of the score; given what went before, its
            steps are Gaussian.
        stochasticity: as for `sample`.

    Raises:
        ValueError: the solver's steps are not Gaussian, or have no noise; states and times that are not as many.
        TypeError: no process, score, solver, or states that are no tensor.
    """
    check_gaussian_solver(process, solver, stochasticity)
    if not isinstance(xs, Tensor) or xs.ndim < 2 or len(xs) < 2:
        got = f"shape {tuple(xs.shape)}" if isinstance(xs, Tensor) else kind_of(xs)
        raise TypeError(f"xs must hold at least two states, (steps + 1, batch, *state), got {got}")
    check_state(xs.flatten(0, 1), "xs")
    times = grids.check_grid(grids.read_times(ts, "ts").values)
    if len(times) != len(xs) or (times.ndim == 2 and times.shape[1] != xs.shape[1]):
        raise ValueError(
            f"ts must hold a time for each of the {len(xs)} states, or one for each of their {xs.shape[1]} rows too, "
            f"got {tuple(times.shape)}"
        )
    laws = StepLaws(process, score, xs[0], times, solver, stochasticity)
    found = [laws.step(k, xs[k], lambda mean, std, to=xs[k + 1]: to) for k in range(len(times) - 1)]  # type: ignore[misc]
    return Transitions(torch.stack([mean for _, mean, _ in found]), torch.stack([std for _, _, std in found]))


@final
class StepLaws:
    """The laws of the steps of a sampler, one after another, for states that are chosen on the way.

    Args:
        process: the forward diffusion.
        score: ``grad_x log p_t(x)``.
        x: the first states, or others like them, ``(batch, *state)``.
        times: the grid, float64 on the host.
        solver: as for `transitions`.
        stochasticity: likewise.

    Raises:
        ValueError: as `transitions`.
        TypeError: as `transitions`.
    """

    def __init__(
        self,
        process: AbstractDiffusion,
        score: Score,
        x: Tensor,
        times: Tensor,
        solver: AbstractSolver,
        stochasticity: float | None,
    ) -> None:
        c = check_gaussian_solver(process, solver, stochasticity)
        sde = process.reverse(score, c).directed(-1.0)
        check_pair(solver, sde)
        self._problem = Problem(solver, sde, Watched(sde, times), BrownianPath(0), times, x, SavePlan(times, None))
        _check_gaussian(self._problem, type(solver).__name__)
        self._begin(lower(self._problem))

    @classmethod
    def _of(cls, problem: Problem, lowered: Lowered) -> StepLaws:
        laws = cls.__new__(cls)
        laws._problem = problem
        laws._begin(lowered)
        return laws

    def _begin(self, lowered: Lowered) -> None:
        x = self._problem.x0
        self._lowered, self._context, self._memory = lowered, _Laws(lowered, x), lowered.start(x)[1:]

    def step(self, k: int, x: Tensor, reach: Reach) -> tuple[Tensor, Tensor, Tensor]:
        """What step ``k`` from ``x`` leads to, made by ``reach`` of its mean and standard deviation, and these two."""
        self._context.begin(k, self._problem.spans(k, 1)[0])
        self._context.reach = reach
        states = self._lowered.step(self._context, (x, *self._memory))
        self._memory = states[1:]
        self._problem.watched.checking = False
        return states[0], *self._context.law(states[0])

    def select(self, rows: Tensor) -> None:
        """Goes on with what is remembered of these rows."""
        self._memory = tuple(m.index_select(0, rows) for m in self._memory)


def check_gaussian_solver(process: AbstractDiffusion, solver: AbstractSolver, stochasticity: float | None) -> float:
    """The stochasticity of a sampler, which is refused where its kind tells that its steps are not Gaussian."""
    if not isinstance(process, AbstractDiffusion):
        raise TypeError(f"process must be a linear diffusion such as VP(), got {kind_of(process)}")
    if not isinstance(solver, AbstractSolver):
        raise TypeError(f"solver must be a solver object such as Ancestral(), got {kind_of(solver)}")
    name = type(solver).__name__
    c = solver.sampling_stochasticity if stochasticity is None else stochasticity
    if c == 0:
        raise ValueError(f"{name} follows the probability flow, whose steps are functions and no laws: {_TAKE}")
    if isinstance(solver, PredictorCorrector) or solver.controller is not None:
        raise ValueError(f"the law of a whole step of {name} is not Gaussian: {_TAKE}")
    return c


def _check_gaussian(problem: Problem, name: str) -> None:
    """Takes a step of nothing, before the score is asked for anything."""

    def nothing(x: Tensor, t: Tensor) -> Tensor:
        return torch.zeros_like(x)

    times = problem.times[:2] if problem.times.ndim == 1 else problem.times[:2, :1]
    x = torch.zeros_like(problem.x0[:1])
    if not len(x):
        return
    sde: AbstractSDE = problem.equation.forward.reverse(nothing, problem.equation.stochasticity)  # type: ignore[attr-defined]
    sde = sde.directed(-1.0)
    bare = dataclasses.replace(
        problem, equation=sde, watched=Watched(sde, times), times=times, x0=x, save=SavePlan(times, None)
    )
    try:
        StepLaws._of(bare, _table_alone(bare)).step(0, x, lambda mean, std: x)
    except _NotGaussian:
        raise ValueError(
            f"the law of a step of {name} is not Gaussian: it takes noise before its last evaluation of the score, or "
            f"more than once; {_TAKE}"
        ) from None


def _table_alone(problem: Problem) -> Lowered:
    try:
        return lower(problem)
    except ValueError:  # of the score at pure noise: that of the problem itself says so again, or not
        middle = problem.times.flatten()[0] * 0.5
        times = torch.tensor([middle, 0.5 * middle], dtype=torch.float64, device="cpu")
        return lower(dataclasses.replace(problem, watched=Watched(problem.equation, times), times=times))


class _NotGaussian(Exception):
    """A step is no mean with noise added."""


@final
class _Laws(AbstractSteppedContext):
    """Steps whose noise is that which leads to a state of another's choice; keeps what it was added to."""

    def __init__(self, lowered: Lowered, like: Tensor) -> None:
        super().__init__(lowered, None if lowered.table is None else lowered.table.to(like))
        self._draws = sum(source.draws for source in lowered.driving)
        self._x, self._law = like, cast("tuple[Tensor, Tensor] | None", None)
        self.reach: Reach = lambda mean, std: mean

    def begin(self, k: int, span: Span) -> None:
        super().begin(k, span)
        self._law = None

    def row(self, columns: slice, draw: int | None) -> Row:
        numbers = self._numbers[self._k][columns]
        if draw is None:
            return torch_row(numbers, None)

        def reached(x: Tensor, *terms: Tensor) -> Tensor:
            self._law = torch_row(numbers, None)(x, *terms), numbers[-1]
            self._x = self.reach(*self._law)
            return self._x

        return reached

    def law(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the step that led to ``x``."""
        if self._law is None or x is not self._x or self._draws != 1:
            raise _NotGaussian
        return self._law

    def increment(self) -> Increment | None:
        raise _NotGaussian

    def within(self) -> Tensor:
        raise _NotGaussian
