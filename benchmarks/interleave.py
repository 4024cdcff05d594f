"""Timing several callables in turn, so that whatever disturbs the machine disturbs them alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

__all__ = ["Timing", "interleave"]


@dataclass(frozen=True)
class Timing:
    """Seconds per call over the rounds, and the time of the baseline over this one in each same round."""

    median: float
    lower: float  # first quartile
    upper: float  # third quartile
    speedup: float  # median over rounds of baseline / this; 1 for the baseline
    speedup_lower: float
    speedup_upper: float
    rounds: int

    def summary(self) -> dict[str, float | list[float]]:
        """For pytest-benchmark's ``extra_info``: three figures each, and what they mean."""
        return {
            "median_us": float(f"{self.median * 1e6:.4g}"),
            "quartiles_us": [float(f"{t * 1e6:.4g}") for t in (self.lower, self.upper)],
            "speedup": float(f"{self.speedup:.3g}"),
            "speedup_quartiles": [float(f"{s:.3g}") for s in (self.speedup_lower, self.speedup_upper)],
            "rounds": self.rounds,
        }


def _quartiles(values: list[float]) -> tuple[float, float, float]:
    lower, median, upper = statistics.quantiles(values, n=4, method="inclusive")
    return lower, median, upper


def interleave(
    callables: Mapping[str, Callable[[], object]],
    *,
    baseline: str,
    rounds: int = 30,
    min_seconds: float = 1e-3,
    synchronize: Callable[[], object] | None = None,
    settle: float = 0.0,
) -> dict[str, Timing]:
    """Time each callable once a round, in an order that rotates from round to round.

    Args:
        callables: What to time, by name.
        baseline: Name of the one that speedups are relative to.
        rounds: Number of rounds, at least 2.
        min_seconds: A callable quicker than this is called several times a round, and the mean is taken.
        synchronize: Called before each reading of the clock, for work that a device finishes later.
        settle: Seconds to sleep before each timing. OpenMP's threads spin for some milliseconds after their last piece
            of work, on the cores of whoever is timed next.

    Raises:
        ValueError: `baseline` is not among the callables, or there are fewer than two rounds.
    """
    if baseline not in callables:
        raise ValueError(f"baseline {baseline!r} is not among {', '.join(map(repr, callables))}")
    if rounds < 2:
        raise ValueError(f"rounds must be at least 2, got {rounds}")
    wait = synchronize or (lambda: None)

    def seconds(call: Callable[[], object], repeats: int) -> float:
        time.sleep(settle)
        wait()
        start = time.perf_counter()
        for _ in range(repeats):
            call()
        wait()
        return (time.perf_counter() - start) / repeats

    repeats = {}
    for name, call in callables.items():
        call()  # compilation and first touches
        repeats[name] = max(1, round(min_seconds / max(seconds(call, 3), 1e-9)))
    times: dict[str, list[float]] = {name: [] for name in callables}
    names = list(callables)
    for turn in range(rounds):
        shift = turn % len(names)
        for name in names[shift:] + names[:shift]:
            times[name].append(seconds(callables[name], repeats[name]))

    timings = {}
    for name, values in times.items():
        lower, median, upper = _quartiles(values)
        ratios = [b / t for b, t in zip(times[baseline], values, strict=True)]
        slow, middle, fast = _quartiles(ratios)
        timings[name] = Timing(median, lower, upper, middle, slow, fast, rounds)
    return timings
