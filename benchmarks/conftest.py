"""Prints what the benchmarks are for, ratios to peers timed in the same rounds, where pytest-benchmark prints times."""

from __future__ import annotations

from typing import Any

import pytest


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    session: Any = getattr(config, "_benchmarksession", None)
    rows = [b for b in session.benchmarks if "speedup" in b.extra_info] if session else []
    if not rows:
        return
    terminalreporter.section("speedup over the eager torch that each replaces, medians of interleaved rounds")
    for b in rows:
        low, high = b.extra_info["speedup_quartiles"]
        speedup, median = b.extra_info["speedup"], b.extra_info["median_us"]
        terminalreporter.write_line(f"{b.name:72s} {median:10.1f} us {speedup:6.2f} x  ({low:.2f} to {high:.2f})")
