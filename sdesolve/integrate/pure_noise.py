"""Grids that start where nothing is left of the data: zero terminal signal-to-noise ratio."""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from sdesolve.diffusions.base import AbstractDiffusion
from sdesolve.integrate.hooks import RecordedScore
from sdesolve.integrate.problem import Problem
from sdesolve.reverse import ProbabilityFlow, ReverseSDE, Score
from sdesolve.scores.base import ExactScore
from sdesolve.scores.guidance import ClassifierFreeGuidance
from sdesolve.scores.network import NetworkScore
from sdesolve.scores.threshold import ThresholdedScore
from sdesolve.sde import Field
from sdesolve.solvers.tabulated import AbstractTabulated

_LOST = 2.0**-6  # of the data's scale: an error of the first step
_WEAKEST = 1e-3  # alpha / sigma that any sampler can start from


def denoiser(problem: Problem) -> Field | None:
    """``E[x_0 | x_t]`` for a grid that starts at pure noise; ``None`` for another, whose steps go by the score.

    Raises:
        ValueError: the solver does not step in it, or the score has none there.
    """
    process = _at_pure_noise(problem)
    if process is None:
        return None
    solver, score = problem.solver, problem.equation.score  # type: ignore[attr-defined]  # a reversal has one
    able = isinstance(solver, AbstractTabulated) and type(solver).denoised_table is not AbstractTabulated.denoised_table
    denoise = _denoiser_of(score) if able else None
    if denoise is not None:
        return denoise
    t, alpha = float(problem.times[0].max()), float(process.alpha(problem.times[0]).min())
    later = float(process.time_at_log_snr(2.0 * math.log(_WEAKEST)))
    what = "its score says" if able else f"{type(solver).__name__} steps in the score, which says"
    raise ValueError(
        f"{type(process).__name__} has alpha = {alpha:.2g} at t = {t:.6g}, too little of the data for "
        f"{problem.x0.dtype}, and {what} nothing of them there: start at t = {later:.6g} or before, or take DDIM, "
        "DPMSolverPP, SDEDPMSolverPP, UniPC or SASolver with a NetworkScore that predicts data, velocity or flow"
    )


def refuse(problem: Problem) -> None:
    """Refuses pure noise at the start for solvers that no table is made of, and anywhere else for all.

    Raises:
        ValueError: it is there.
    """
    if not isinstance(problem.solver, AbstractTabulated):
        denoiser(problem)


def _at_pure_noise(problem: Problem) -> AbstractDiffusion | None:
    """The process of which a first step, down from its start, would lose the data to rounding."""
    sde, times = problem.equation, problem.times
    if not isinstance(sde, ReverseSDE | ProbabilityFlow) or not isinstance(sde.forward, AbstractDiffusion):
        return None
    process = sde.forward
    start, following = (process.log_alpha(times[k]) for k in (0, 1))
    if problem.solver.controller is not None or bool((following <= start).all()):
        following, eps = torch.zeros_like(start), torch.finfo(torch.float64).eps
    else:
        eps = torch.finfo(problem.x0.dtype).eps
    # The denoised state is (x + sigma^2 s) / alpha, off by eps / alpha, and counts alpha' at the end of the step.
    lost = 0.5 * eps * (following - start).clamp(max=700.0).exp()
    return process if bool((lost > _LOST).any()) else None


def _changed(score: ThresholdedScore, denoise: Field, x: Tensor, t: Tensor) -> Tensor:
    return score.changed(denoise(x, t))


def _denoiser_of(score: Score) -> Field | None:
    if isinstance(score, ExactScore):
        return score.denoise
    if isinstance(score, NetworkScore):
        return score.data if score.predicts in ("data", "velocity", "flow") else None
    if isinstance(score, ThresholdedScore):
        of_prior = _denoiser_of(score.score)
        return None if of_prior is None else functools.partial(_changed, score, of_prior)
    if isinstance(score, RecordedScore):
        inner = _denoiser_of(score.score)
        return None if inner is None else score.by(inner)
    if isinstance(score, ClassifierFreeGuidance):
        parts = [part for part in map(_denoiser_of, score.parts) if part is not None]
        if len(parts) == len(score.parts):
            return score.of(*parts)  # affine in each
    return None
