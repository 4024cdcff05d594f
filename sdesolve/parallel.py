"""Sampling in parallel over time: all steps at once, by Picard iteration."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sdesolve._internal.arguments import number, short, whole_number
from sdesolve.brownian import drawn_seed
from sdesolve.diffusions.base import AbstractDiffusion
from sdesolve.nn.labels import Given
from sdesolve.reverse import Score
from sdesolve.sampling import check_model, check_same_process, given_to, sample, tweedie
from sdesolve.scores.base import ExactScore
from sdesolve.scores.guidance import ClassifierFreeGuidance
from sdesolve.scores.network import NetworkScore
from sdesolve.scores.threshold import ThresholdedScore
from sdesolve.solvers.base import AbstractSolver


class ParallelSample(NamedTuple):
    """What `sample_in_parallel` made.

    Attributes:
        x: samples ``(batch, *state)``.
        calls: of the score, one after another, each of up to ``window batch`` rows.
        evaluations: that a run step by step makes, one after another.
    """

    x: Tensor
    calls: int
    evaluations: int


def sample_in_parallel(
    process: AbstractDiffusion,
    score: Score,
    shape: tuple[int, ...],
    *,
    solver: AbstractSolver,
    window: int | None = None,
    tolerance: float = 1e-3,
    seed: int | None = None,
    given: Mapping[str, Tensor | float] | None = None,
    **options: Any,
) -> ParallelSample:
    r"""The samples of `sample`, by fewer calls of the score in sequence, each of many times at once.

    The noise of every step is a function of its coordinates, so all of it is known before the first. A sweep evaluates
    the denoised state at all states of the last sweep's trajectory, within a window, by one call; the next trajectory
    is what ``solver`` makes of these values, on the same noise. That is Picard iteration; after ``k`` sweeps the first
    ``k`` evaluations are those of the run step by step, and most are much sooner. The window moves on over evaluations
    that change by no more than ``tolerance`` (Shih et al. 2023, ParaDiGMS, algorithm 1). With ``tolerance=0`` the
    result is that of `sample`, to rounding.

    Worth it where a call of ``window`` times as many rows takes about as long: on a device that a batch does not fill,
    or on several.

    Args:
        process: the forward diffusion.
        score: ``grad_x log p_t(x)``, called with rows of several times, and a time for each. Conditions of networks and
            scales of guidance go with their samples; what else a score holds for each sample does not.
        shape: of the samples, ``(batch, *state)``.
        solver: any of fixed steps.
        window: evaluations that a call has at most; all of them by default.
        tolerance: root mean square, over one sample's elements, of the change of a denoised state that is taken for
            none; the largest of all samples counts. In units of the data.
        seed: of start states and noise, as for `sample`.
        given: conditions of a `NetworkScore`, as for `sample`.
        **options: of `sample`: ``steps`` or ``grid``, ``stochasticity``, ``denoise``, ``dtype``, ``device``.

    Raises:
        TypeError: an option that needs states step by step, or what `sample` refuses.
        ValueError: a solver that chooses its own steps; a window below 1, a negative tolerance; what `sample` refuses.
    """
    unknown = sorted(options.keys() - _OPTIONS)
    if unknown:
        raise TypeError(f"sample_in_parallel takes no {', '.join(unknown)}; of sample's options it takes {_LISTED}")
    if getattr(solver, "controller", None) is not None:
        raise ValueError(f"{type(solver).__name__} chooses its own steps as it goes; take a solver of fixed steps")
    if window is not None:
        window = whole_number(window, "window", 1)
    if not number(tolerance, "tolerance") >= 0.0:
        raise ValueError(f"tolerance must not be negative, got {short(tolerance)}")
    score = score if given is None else given_to(score, given)
    check_model(process, score)
    seed = drawn_seed() if seed is None else seed
    replay = _Replay()
    own_clock = copy.copy(process)
    own_clock.data_at = 0  # the replay is told times of the process
    recorded = NetworkScore(replay, own_clock, "data")

    def trajectory() -> Tensor:
        replay.seen = []
        made: Tensor = sample(process, recorded, shape, solver=solver, seed=seed, backend="eager", **options)
        return made

    batch = len(trajectory())
    check_same_process(process, score, batch)
    denoised = _denoiser(process, score, batch)
    n, calls, done = len(replay.seen), 1, 1
    x, t = replay.seen[0]
    replay.values = [denoised(x, t)] * n
    while done < n:
        trajectory()
        end = n if window is None else min(done + window, n)
        states, times = zip(*replay.seen[done:end], strict=True)
        new = denoised(torch.cat(states), torch.cat(times)).tensor_split(end - done)
        calls += 1
        change = [_largest(a - b) for a, b in zip(new, replay.values[done:end], strict=True)]
        replay.values[done:] = [*new, *[new[-1]] * (n - end)]
        done += 1  # whose state was that of the run step by step
        for size in change[1:]:
            if size > tolerance:
                break
            done += 1
    return ParallelSample(trajectory(), calls, n)


def _largest(change: Tensor) -> float:
    """The root mean square over the elements of one sample, of the sample where it is largest."""
    return float(change.reshape(len(change), -1).square().mean(1).max().sqrt()) if change.numel() else 0.0


class _Replay:
    """A denoiser that gives values in order, and remembers what it was asked."""

    def __init__(self) -> None:
        self.values: list[Tensor] = []
        self.seen: list[tuple[Tensor, Tensor]] = []

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        self.seen.append((x, t))
        return self.values[len(self.seen) - 1] if self.values else torch.zeros_like(x)


def _denoiser(process: AbstractDiffusion, score: Score, batch: int) -> Callable[[Tensor, Tensor], Tensor]:
    """``E[x_0 | x_t]`` of rows that are ``batch`` samples several times over."""

    def denoised(x: Tensor, t: Tensor) -> Tensor:
        bound = _repeated(score, batch, len(x) // max(batch, 1))
        with torch.no_grad():
            if isinstance(bound, NetworkScore):
                return bound.data(x, t)
            if isinstance(bound, ExactScore):
                return bound.denoise(x, t)
            return tweedie(process, bound, x, t)

    return denoised


def _repeated(score: Score, batch: int, times: int) -> Score:
    """The score with what it has for each of ``batch`` samples repeated: conditions, and scales of guidance."""

    def rows(value: Any) -> Any:
        each = isinstance(value, Tensor) and value.ndim > 0 and len(value) == batch
        return torch.cat([value] * times) if each else value

    if times <= 1:
        return score
    if isinstance(score, ThresholdedScore):
        return ThresholdedScore(score.process, _repeated(score.score, batch, times), score.threshold)
    if isinstance(score, ClassifierFreeGuidance):
        parts = (_repeated(part, batch, times) for part in score.parts)
        return score.of(*parts, scales=[rows(scale) for scale in score.scales])
    if isinstance(score, NetworkScore) and isinstance(score.net, Given):
        return score.given(**{name: rows(value) for name, value in score.net.conditions.items()})
    return score


_OPTIONS = {"steps", "grid", "stochasticity", "denoise", "dtype", "device", "from_time"}
_LISTED = ", ".join(sorted(_OPTIONS))
