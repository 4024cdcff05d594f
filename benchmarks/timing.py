"""Timing several callables in turn, so that whatever disturbs the machine disturbs them alike."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

__all__ = ["THREADED", "FailedCall", "Quartiles", "Timing", "interleave", "keep_memory", "quartiles"]

Quartiles = tuple[float, float, float]

#: Options of `interleave` for contenders with threads of their own.
THREADED = {"settle": 0.02, "lead": 0.01, "min_seconds": 0.03}


@dataclass(frozen=True)
class Timing:
    """Seconds per call in each round, and that time over the baseline's in the same round."""

    seconds: list[float]
    over_baseline: list[float]

    @property
    def median(self) -> float:
        """Of the seconds per call."""
        return statistics.median(self.seconds)

    @property
    def ratio(self) -> float:
        """Median over the rounds of this over the baseline."""
        return statistics.median(self.over_baseline)

    def ratio_error(self) -> float:
        """Relative standard error of `ratio`, from the quartiles: 1.25 sd / sqrt(rounds), sd = (q3 - q1) / 1.35."""
        low, middle, high = quartiles(self.over_baseline)
        return 0.93 * (high - low) / (middle * math.sqrt(len(self.over_baseline)))


class FailedCall(Exception):
    """What a callable raised in its turn, and whose."""

    def __init__(self, name: str, error: Exception) -> None:
        super().__init__(f"{name}: {error}")
        self.name, self.error = name, error


def quartiles(values: list[float]) -> Quartiles:
    """Lower quartile, median, upper quartile."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high


def keep_memory() -> bool:
    """Have glibc keep what is freed, for the rest of the process; returns whether it does.

    By default the heap's end goes back to the system and comes again page by page. Whether a tensor of 16 MB is served
    so depends on what was freed before it: eager torch takes one time for a step of 4M elements, or 2.5 times that.
    Kept, it is the lower one, in every process.
    """
    if not sys.platform.startswith("linux") or not hasattr(library := ctypes.CDLL(None), "mallopt"):
        return False
    trim_threshold, mmap_threshold = -1, -3  # numbers of malloc.h
    return all((library.mallopt(trim_threshold, (1 << 31) - 1), library.mallopt(mmap_threshold, 32 << 20)))


def interleave(
    callables: Mapping[str, Callable[[], object]],
    *,
    baseline: str,
    rounds: int = 7,
    most: int = 60,
    seconds: float = 5.0,
    precision: float = 0.02,
    min_seconds: float = 5e-3,
    share: float = 0.05,
    settle: float = 0.0,
    lead: float = 0.0,
    warm: bool = False,
    synchronize: Callable[[], object] = lambda: None,
) -> dict[str, Timing]:
    """Time each callable once a round, in an order that rotates from round to round.

    Args:
        callables: What to time, by name.
        baseline: Name of the one that ratios are relative to.
        rounds: Least number of rounds, at least 2.
        most: Greatest number of rounds.
        seconds: After the least number of rounds, no further round begins that late.
        precision: Rounds also end when no ratio has a greater relative standard error.
        min_seconds: A callable quicker than this is called several times a round, and the mean is taken.
        share: Likewise one quicker than this share of the slowest: what disturbs for a moment would else weigh on the
            quick alone.
        settle: Seconds to sleep before each timing. OpenMP's threads spin for some milliseconds after their last piece
            of work, on the cores of whoever is timed next.
        lead: Before each timing a callable is called, untimed, for this long: after a sleep a core runs slowly and
            threads wake late, which weighs on the quick alone. One that takes longer than ten times this is not.
        warm: Everything has been called before, so that the first call is like later ones.
        synchronize: Called before each reading of the clock, for work that a device finishes later.

    Raises:
        FailedCall: a callable raised.
        ValueError: `baseline` is not among the callables, or there are fewer than two rounds.
    """
    if baseline not in callables:
        raise ValueError(f"baseline {baseline!r} is not among {', '.join(map(repr, callables))}")
    if not 2 <= rounds <= most:
        raise ValueError(f"rounds must be at least 2 and at most most={most}, got {rounds}")

    def once(name: str, repeats: int, leading: int) -> float:
        call = callables[name]
        gc.collect()  # what the one before left in cycles
        time.sleep(settle)
        try:
            for _ in range(leading):
                call()
            synchronize()
            start = time.perf_counter()
            for _ in range(repeats):
                call()
            synchronize()
            return (time.perf_counter() - start) / repeats
        except Exception as error:
            raise FailedCall(name, error) from error

    for call in () if warm else callables.values():
        call()  # compilation and first touches
    times: dict[str, list[float]] = {name: [] for name in callables}
    names = list(callables)
    found: dict[str, Timing] = {}
    with _frozen():
        first = {name: once(name, 1, 1 if lead else 0) for name in names}
        least = max(min_seconds, share * max(first.values()))
        repeats = {name: max(1, math.ceil(least / max(t, 1e-9))) for name, t in first.items()}
        leading = {name: 0 if t > 10 * lead else math.ceil(lead / max(t, 1e-9)) for name, t in first.items()}
        start = time.perf_counter()
        for turn in range(most):
            shift = turn % len(names)
            for name in names[shift:] + names[:shift]:
                times[name].append(once(name, repeats[name], leading[name]))
            if turn + 1 >= rounds:
                found = {name: Timing(v, _over(v, times[baseline])) for name, v in times.items()}
                precise = all(t.ratio_error() <= precision for t in found.values())
                if precise or time.perf_counter() - start > seconds:
                    break
    return found


@contextlib.contextmanager
def _frozen() -> Iterator[None]:
    """A full collection would go through torch's two hundred thousand objects, in whoever's turn it is."""
    already = gc.get_freeze_count()
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        if not already:  # what the caller froze would be looked through again, here and ever after
            gc.unfreeze()


def _over(values: list[float], baseline: list[float]) -> list[float]:
    return [t / b for t, b in zip(values, baseline, strict=True)]
