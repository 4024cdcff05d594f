"""Rounds shared by the contenders of a problem, and a table at the end where pytest-benchmark prints times."""

from __future__ import annotations

import importlib
import warnings
from typing import Any

import pytest

from benchmarks.compare import table
from benchmarks.figures import FIGURES
from benchmarks.registry import BASELINE, Outcome, Problem, compete, describe, use_one_core
from benchmarks.report import Report
from benchmarks.suite import problems
from benchmarks.timing import keep_memory

_ARENA = pytest.StashKey["Arena"]()


class Arena:
    """Outcomes by problem, found when the first of its contenders is asked for; and what could not run."""

    def __init__(self, config: pytest.Config) -> None:
        if config.getoption("--one-core"):
            use_one_core()
        self.pace: dict[str, float] = {}
        if config.getoption("--quick"):
            self.pace = {"rounds": 5, "seconds": 2.0, "precision": 0.03}
        if config.getoption("--hasty"):
            self.pace = {"rounds": 2, "most": 3, "seconds": 0.1}
        self.machine = {**describe(), "keeps_freed_memory": keep_memory()}
        self.missing: dict[str, str] = {}
        self.refused: list[dict[str, str]] = []
        self._found: dict[str, dict[str, Outcome]] = {}

    def __call__(self, problem: Problem, names: set[str]) -> dict[str, Outcome]:
        if problem.name not in self._found:
            found = self._found[problem.name] = compete(problem, names, **self.pace)
            for name, outcome in found.items():
                if outcome.missing:
                    self.missing[name] = outcome.missing
                if outcome.refused:
                    self.refused.append({"problem": problem.name, "contender": name, "why": outcome.refused})
        return self._found[problem.name]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--quick", action="store_true", help="the short version: ratios that have goals, and their like")
    parser.addoption("--one-core", action="store_true", help="no threads, on no other core; leaves out the goals")
    parser.addoption("--hasty", action="store_true", help="few rounds: to see that everything runs, not how fast")


def pytest_configure(config: pytest.Config) -> None:
    if not config.pluginmanager.hasplugin("benchmark"):
        raise pytest.UsageError("benchmarks need pytest-benchmark; pip install 'sdesolve[bench]' has it, and the peers")
    # `--benchmark-compare` warns of another machine, at this point; an error, as warnings are here, would end the run.
    category = importlib.import_module("pytest_benchmark.logger").PytestBenchmarkWarning
    warnings.filterwarnings("default", category=category)
    config.stash[_ARENA] = Arena(config)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--quick"):
        left_out = [item for item in items if not _quick(item)]
        items[:] = [item for item in items if item not in left_out]
        config.hook.pytest_deselected(items=left_out)


def _quick(item: pytest.Item) -> bool:
    parameters = getattr(item, "callspec", None)
    found = parameters.params if parameters is not None else {}
    if "problem" in found:
        quick = problems()[found["problem"]].quick
        return bool(quick) and found["contender"] in (BASELINE, *quick)
    return "figure" in found and FIGURES[found["figure"]].quick


@pytest.fixture
def outcomes(request: pytest.FixtureRequest, problem: str) -> dict[str, Outcome]:
    """Of all contenders that this session was asked for."""
    parameters = (getattr(item, "callspec", None) for item in request.session.items)
    chosen = {p.params["contender"] for p in parameters if p is not None and p.params.get("problem") == problem}
    return request.config.stash[_ARENA](problems()[problem], chosen)


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    machine_info |= config.stash[_ARENA].machine
    del machine_info["node"], machine_info["load_before"]  # or no two runs are of one machine


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_update_json(config: pytest.Config, benchmarks: Any, output_json: dict[str, Any]) -> None:
    arena = config.stash[_ARENA]
    output_json |= {
        "missing": arena.missing, "refused": arena.refused, "load_before": arena.machine["load_before"],
    }  # fmt: skip


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    session: Any = getattr(config, "_benchmarksession", None)
    infos = [b.extra_info for b in session.benchmarks] if session else []
    arena = config.stash[_ARENA]
    if infos:
        report = Report.of(infos, arena.machine, arena.missing, arena.refused)
        terminalreporter.section("how many times as long as sdesolve, medians of interleaved rounds")
        terminalreporter.write_line(table(report))
