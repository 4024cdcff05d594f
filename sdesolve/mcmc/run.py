"""`run_chain`: many chains side by side, each a function of the seed and its own row."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
from torch import Tensor

from sdesolve._internal.arguments import kind_of, whole_number
from sdesolve._internal.modes import in_evaluation
from sdesolve._internal.progress import progress_bar
from sdesolve._internal.transforms import refuse_transforms, runs_as_it_is
from sdesolve.brownian import BrownianPath, drawn_seed
from sdesolve.integrate.checks import check_state
from sdesolve.integrate.solution import DivergenceError
from sdesolve.mcmc.base import AbstractKernel, Function, Target, Walker


@dataclasses.dataclass(frozen=True)
class Chain:
    """What `run_chain` returns.

    Attributes:
        x: states after the last step, ``(batch, *state)``.
        xs: saved states, ``(saved, batch, *state)``; the last alone unless ``save_every`` was given.
        velocity: velocities after the last step, where the kernel has any.
        acceptance: share of proposals that each chain accepted, ``(batch,)``, where the kernel makes any.
        nfe: evaluations of the score.
        seed: of the noise.
    """

    x: Tensor
    xs: Tensor
    velocity: Tensor | None
    acceptance: Tensor | None
    nfe: int
    seed: int

    def to_xarray(self, name: str = "x", *, warmup: int = 0) -> Any:
        """Saved states as an ``xarray.Dataset`` ``name (chain, draw, ...)``, the form that ArviZ takes.

        ``arviz.rhat(chain.to_xarray())`` and ``arviz.ess(...)`` are of each number of the state, over all chains.

        Args:
            name: of the variable.
            warmup: saved states to leave out at the beginning.

        Raises:
            ImportError: there is no xarray.
            ValueError: no state is left; save them by ``save_every``.
        """
        if whole_number(warmup, "warmup", 0) >= len(self.xs):
            raise ValueError(
                f"of {len(self.xs)} saved states none is left after warmup={warmup}; run_chain(save_every=1) saves all"
            )
        try:
            import xarray
        except ImportError:
            raise ImportError("to_xarray needs xarray: pip install 'sdesolve[arrays]'") from None
        values = self.xs[warmup:].movedim(0, 1).cpu().numpy()
        dims = ("chain", "draw", *(f"{name}_dim_{k}" for k in range(values.ndim - 2)))
        known = {"seed": self.seed, "nfe": self.nfe, "created_by": "sdesolve"}
        if self.acceptance is not None:
            known["acceptance"] = self.acceptance.tolist()
        coordinates = {dim: range(size) for dim, size in zip(dims, values.shape, strict=True)}
        return xarray.Dataset({name: (dims, values)}, coords=coordinates, attrs=known)


@runs_as_it_is
@torch.no_grad()
@in_evaluation
def run_chain(
    kernel: AbstractKernel,
    x0: Tensor,
    steps: int,
    *,
    score: Function | None = None,
    energy: Function | None = None,
    velocity: Tensor | None = None,
    seed: int | None = None,
    noise: BrownianPath | None = None,
    save_every: int | None = None,
    progress: bool = False,
) -> Chain:
    r"""Runs a chain from every row of ``x0``, towards the law with this score or energy.

    Row ``i`` is a function of ``(seed, i)`` alone. Step ``k`` takes the normals of step ``k`` of the corrector stream;
    a chain goes on where another stopped with ``noise=BrownianPath(seed).after(steps)``, and its ``velocity`` if any.
    Nothing is recorded for gradients.

    Args:
        kernel: `Langevin`, `MALA` or `BAOAB`.
        x0: ``(batch, *state)``, float32 or float64.
        steps: number of steps, at least 1.
        score: ``grad log p(x)``; for a noised law at a time ``t``, ``lambda x: score(x, t)``.
        energy: ``-log p(x)`` up to a constant, ``(batch,)``; enough by itself, and needed where proposals are refused.
        velocity: start velocities, like ``x0``; drawn from ``N(0, I)`` by default.
        seed: of the noise; drawn from torch's default generator if not given.
        noise: paths instead of ``seed``.
        save_every: keep every so many states; the last one alone by default.
        progress: show a progress bar.

    Raises:
        ValueError: as `Target`; no energy for a kernel that needs one; a velocity for one that has none; bad shapes.
        TypeError: bad types or dtypes.
        DivergenceError: score or energy is not a number at the start, or a chain stopped being finite; says which chain
            and in which step.
    """
    if not isinstance(kernel, AbstractKernel):
        raise TypeError(f"kernel must be a step such as Langevin(0.1), got {kind_of(kernel)}")
    refuse_transforms("run_chain", "differentiate an expectation under the law instead, or integrate with solve")
    check_state(x0)
    steps = whole_number(steps, "steps", 1)
    every = steps if save_every is None else whole_number(save_every, "save_every", 1)
    target, path = Target(score, energy), _path(seed, noise)
    if kernel.needs_energy and not target.has_energy:
        raise ValueError(f"{type(kernel).__name__} compares densities: give energy=, -log p(x) up to a constant")
    _check_velocity(kernel, velocity, x0)
    walker = kernel.start(target, x0, velocity, path)
    _check_start(walker, path)
    saved = []
    with progress_bar(progress, total=steps, unit="step", leave=False) as bar:
        for k in range(steps):
            walker = kernel.step(target, walker, k, path)
            if (k + 1) % every == 0:
                saved.append(walker.x)
            bar.update()
    if not bool(walker.x.isfinite().all()):
        _report_divergence(kernel, target, x0, velocity, steps, path)
    return Chain(
        x=walker.x,
        xs=torch.stack(saved) if saved else x0.new_empty(0, *x0.shape),
        velocity=walker.velocity,
        acceptance=None if walker.accepted is None else walker.accepted / steps,
        nfe=target.evaluations,
        seed=path.seed,
    )


def _path(seed: int | None, noise: BrownianPath | None) -> BrownianPath:
    if seed is not None and noise is not None:
        raise ValueError("seed is short for noise=BrownianPath(seed); give one of them")
    if noise is None:
        noise = BrownianPath(drawn_seed() if seed is None else seed)
    if not isinstance(noise, BrownianPath):
        raise TypeError(f"noise must be a BrownianPath, got {type(noise).__name__}; a number goes to seed=")
    return noise.correctors(1)


def _check_velocity(kernel: AbstractKernel, velocity: Tensor | None, x0: Tensor) -> None:
    if velocity is None:
        return
    if not kernel.has_velocity:
        raise ValueError(f"{type(kernel).__name__} has no velocity; BAOAB does")
    check_state(velocity, "velocity")
    if velocity.shape != x0.shape or velocity.dtype != x0.dtype:
        raise ValueError(
            f"velocity must be like x0, {tuple(x0.shape)} of {x0.dtype}; got {tuple(velocity.shape)} of "
            f"{velocity.dtype}"
        )


def _check_start(walker: Walker, path: BrownianPath) -> None:
    """Refuses a start that nothing leads away from: `MALA` would refuse every proposal without a word."""
    n = len(walker.x)
    bad = {"score": ~walker.score.reshape(n, math.prod(walker.x.shape[1:])).isfinite().all(1)}
    if walker.log_density is not None:
        bad["energy"] = walker.log_density.isnan()
    for name, rows in bad.items():
        if bool(rows.any()):
            row = path.first_path + int(rows.nonzero()[0])
            raise DivergenceError(
                f"the {name} of chain {row} is not finite at its start, x0, and that of {int(rows.sum()) - 1} more: "
                f"start where the law has its mass, or mend the function",
                step=0,
                time=math.nan,
                path=row,
            )


def _report_divergence(
    kernel: AbstractKernel, target: Target, x0: Tensor, velocity: Tensor | None, steps: int, path: BrownianPath
) -> None:
    """Runs the chain again to find the first step and chain that are not finite."""
    walker = kernel.start(target, x0, velocity, path)
    for k in range(steps):
        walker = kernel.step(target, walker, k, path)
        bad = ~walker.x.reshape(len(x0), math.prod(x0.shape[1:])).isfinite().all(1)
        if bool(bad.any()):
            row = int(bad.nonzero()[0])
            raise DivergenceError(
                f"chain {path.first_path + row} stopped being finite in step {k} of {steps}, and {int(bad.sum()) - 1} "
                "more with it: take smaller steps, or start nearer to where the law has its mass",
                step=k,
                time=math.nan,
                path=path.first_path + row,
            )
