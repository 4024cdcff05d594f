"""What the compiler of trajectories takes of a solver: its step, the numbers and the noise that the step reads.

The step is the same pure function that runs in torch, `AbstractOneStep.step` or `row_step`; no solver is written
a second time.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import final

import torch
from sdesolve_kernels.trajectory import Inputs, Signature, traced_shape
from torch import Tensor

from sdesolve.brownian import AbstractNoise, BrownianPath
from sdesolve.integrate.integration import Watched
from sdesolve.integrate.save_at import SavePlan
from sdesolve.sde import AbstractSDE, AbstractSemilinear, Noise, noise_shape
from sdesolve.solvers.base import AbstractOneStep, AbstractSolver, Span
from sdesolve.solvers.milstein import check_own_component
from sdesolve.solvers.predictor_corrector import PredictorCorrector, reversed_diffusion
from sdesolve.solvers.tabulated import AbstractTabulated, Table, row_step


@final
@dataclasses.dataclass(frozen=True)
class Task:
    """An integration that might be fused.

    Attributes:
        solver: the scheme.
        equation: what the user passed.
        watched: the same, counted and checked.
        noise: the driving noise.
        times: the grid, float64.
        x0: the start.
        plan: what to save.
    """

    solver: AbstractSolver
    equation: AbstractSDE
    watched: Watched
    noise: AbstractNoise
    times: Tensor
    x0: Tensor
    plan: SavePlan


@final
@dataclasses.dataclass(frozen=True)
class Recipe:
    """A solver's step as the compiler takes it.

    Attributes:
        step: pure function of a path's state, numbers and normals.
        memory: tensors carried beside the state.
        noises: shapes of the normals of each source; called when a kernel is made.
        numbers: what the step reads of its row, ``(steps, columns)``, float64; ``None`` if nothing.
        sources: of noise: path, and how many of its steps one step here takes.
    """

    step: Callable[[Inputs], Sequence[Tensor]]
    memory: int
    noises: Callable[[], tuple[tuple[int, ...], ...]]
    numbers: Tensor | None
    sources: tuple[tuple[BrownianPath, int], ...]

    @property
    def columns(self) -> int:
        return 0 if self.numbers is None else self.numbers.shape[1]


def recipe_for(task: Task, solver: AbstractSolver) -> Recipe | str:
    """The step of a solver, whatever kind it is."""
    path = task.noise if isinstance(task.noise, BrownianPath) else BrownianPath(0)
    if isinstance(solver, PredictorCorrector):
        if not solver.corrector.affine:
            return "the corrector's step size depends on the state: norms='level' and a fixed step_size= do not"
        predictor = recipe_for(task, solver.predictor)
        return predictor if isinstance(predictor, str) else _corrected(task, solver, predictor, path)
    if isinstance(solver, AbstractTabulated) and isinstance(task.equation, AbstractSemilinear):
        table = solver.table(task.equation, task.times)
        if table is not None:
            return _tabulated(task, solver, table, path)
    if not isinstance(solver, AbstractOneStep):
        return f"{type(solver).__name__} has no step for {type(task.equation).__name__}"

    def step(inputs: Inputs) -> Sequence[Tensor]:
        dW = inputs.noises[0] * inputs.scale if inputs.noises else None
        return (solver.step(task.watched, inputs.states[0], Span(inputs.t0, inputs.t1, inputs.dt), dW),)

    sources = () if task.watched.noise is Noise.NONE else ((path, 1),)
    return Recipe(step, 0, lambda: increment_shapes(task), None, sources)


def _tabulated(task: Task, solver: AbstractTabulated, table: Table, path: BrownianPath) -> Recipe:
    evaluations, widths = table.times.shape[1], [r.shape[1] for r in table.rows]
    state = tuple(task.x0.shape[1:])

    def step(inputs: Inputs) -> Sequence[Tensor]:
        times = inputs.row[:evaluations].unbind(0)
        rows = inputs.row[evaluations:].split(widths)
        normals = iter(inputs.noises[0].unbind(1) if table.draws else ())
        x, *memory = inputs.states
        x, after = row_step(
            solver,
            task.watched.field,
            times,
            rows,
            [next(normals) if n else None for n in table.noisy],
            x,
            tuple(memory),
        )
        return (x, *after)

    noises = ((table.draws, *state),) if table.draws else ()
    sources = ((path, table.draws),) if table.draws else ()
    return Recipe(step, solver.memory, lambda: noises, torch.cat([table.times, *table.rows], dim=1), sources)


def _corrected(task: Task, solver: PredictorCorrector, predictor: Recipe, path: BrownianPath) -> Recipe:
    """Steps of a predictor, each followed by those of a corrector.

    Where a grid ends at zero noise no correction follows: its scale there is 0, at the time of the step before.
    """
    process, corrector, n = reversed_diffusion(task.equation), solver.corrector, solver.n
    corrector.check(task.x0)
    ends = task.times[1:]
    noisy = process.sigma(ends) > 0
    times = torch.where(noisy, ends, task.times[:-1])
    scales = torch.where(noisy, corrector.scales(process, times), 0.0)
    numbers = torch.stack([times, scales], dim=1)
    columns, sources = predictor.columns, len(predictor.sources)

    def step(inputs: Inputs) -> Sequence[Tensor]:
        ours = dataclasses.replace(inputs, noises=inputs.noises[:sources], row=inputs.row[:columns])
        x, *memory = predictor.step(ours)
        t, scale = inputs.row[columns:].unbind(0)
        for i in range(n):
            x = corrector.correct(task.watched.field, x, t, scale, _Given(inputs.noises[sources][:, i]), i)
        return (x, *memory)

    return Recipe(
        step,
        predictor.memory,
        lambda: (*predictor.noises(), (n, *task.x0.shape[1:])),
        numbers if predictor.numbers is None else torch.cat([predictor.numbers, numbers], dim=1),
        (*predictor.sources, (path.correctors(n), n)),
    )


@final
class _Given(AbstractNoise):
    """Normals that are there already."""

    def __init__(self, z: Tensor) -> None:
        self._z = z

    def increments(
        self,
        times: Tensor,
        shape: tuple[int, ...],
        *,
        step: int = 0,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> Tensor:
        return self._z[None]

    def bridge(
        self,
        step: int,
        theta: float,
        shape: tuple[int, ...],
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> Tensor:
        raise NotImplementedError("these normals belong to no path")


def increment_shapes(task: Task) -> tuple[tuple[int, ...], ...]:
    """Shape of the Brownian increment for one path, found without evaluating the diffusion on the whole batch."""
    sde, x0 = task.watched, task.x0
    state = tuple(x0.shape[1:])
    if sde.noise is Noise.NONE:
        return ()
    t = task.times[0].to(x0)
    if task.solver.own_component_diffusion and sde.noise is Noise.DIAGONAL:
        with torch.no_grad():
            check_own_component(sde, x0.detach(), t)
    if sde.noise not in (Noise.ADDITIVE, Noise.GENERAL):
        return (noise_shape(sde.noise, x0),)
    signature = Signature(x0.dtype, x0.device, (state,), (), 0, len(x0))
    g = traced_shape(lambda inputs: sde.diffusion(inputs.states[0], inputs.t0), signature)
    return ((g[-1],) if len(g) == x0.ndim + 1 else state,)
