"""Every problem by every contender: ``pytest benchmarks/test_suite.py``, ``--quick`` for the short version.

The contenders of a problem are checked, then timed in the same rounds; pytest-benchmark is told the times afterwards.
"""

from __future__ import annotations

import time
from collections import deque
from typing import Any

import pytest

from benchmarks.figures import FIGURES
from benchmarks.registry import Outcome, row
from benchmarks.suite import problems

_PAIRS = [(p.name, contender) for p in problems().values() for contender in p.contenders]
_CLOCK: deque[float] = deque()

pytestmark = pytest.mark.filterwarnings("default")  # those of peers are not ours to mend


def replayed() -> float:
    """The clock of a run that has been timed already."""
    return _CLOCK.popleft()


def _replay(benchmark: Any, seconds: list[float]) -> None:
    _CLOCK.clear()
    for duration in seconds:
        _CLOCK.extend((0.0, duration))
    benchmark.pedantic(lambda: None, rounds=len(seconds))


@pytest.mark.benchmark(timer=replayed)
@pytest.mark.parametrize(("problem", "contender"), _PAIRS, ids=[": ".join(pair) for pair in _PAIRS])
def test_problem(problem: str, contender: str, outcomes: dict[str, Outcome], benchmark: Any) -> None:
    outcome = outcomes[contender]
    if outcome.missing is not None:
        pytest.skip(outcome.missing)
    if outcome.timing is None:
        pytest.fail(f"not timed: {outcome.refused}", pytrace=False)
    benchmark.group = problem
    benchmark.extra_info["row"] = row(problems()[problem], contender, outcome.timing)
    _replay(benchmark, outcome.timing.seconds)


@pytest.mark.benchmark(timer=replayed)
@pytest.mark.parametrize("figure", FIGURES)
def test_figure(figure: str, benchmark: Any) -> None:
    start = time.perf_counter()
    found = FIGURES[figure].measure()
    benchmark.group = figure
    benchmark.extra_info["figure"] = {
        "name": figure, "unit": FIGURES[figure].unit, "values": {who: float(f"{v:.4g}") for who, v in found.items()},
    }  # fmt: skip
    _replay(benchmark, [time.perf_counter() - start])
