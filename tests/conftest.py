from __future__ import annotations

import gc
import inspect
import os
import types

import pytest
import torch
from hypothesis import HealthCheck, settings
from sdesolve_kernels import use_backend

# Derandomised: a failure seen once is seen by everybody. No deadline: no test asserts a time.
settings.register_profile(
    "sdesolve", derandomize=True, deadline=None, print_blob=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.register_profile("thorough", parent=settings.get_profile("sdesolve"), derandomize=False, max_examples=1000)
NOT_RUN = pytest.StashKey[list[str]]()

settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "sdesolve"))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", default="cpu", help="device that tensors of the tests live on: cpu or cuda")
    parser.addoption("--fast", action="store_true", help="the first case of each test, if it starts no process")


@pytest.fixture
def device(request: pytest.FixtureRequest) -> torch.device:
    return torch.device(request.config.getoption("--device"))


def starts_programs(item: pytest.Item) -> bool:
    """Whether a test starts a process or runs a script: itself, in what it calls of its module, or in a fixture."""
    fixtures = item._fixtureinfo.name2fixturedefs.values()
    waiting, seen = [item.function, *(found[-1].func for found in fixtures)], set()
    while waiting:
        function = inspect.unwrap(waiting.pop())
        codes = [function.__code__]
        for code in codes:
            codes += [inner for inner in code.co_consts if isinstance(inner, types.CodeType)]
            if {"subprocess", "runpy"} & {*code.co_names}:
                return True
            called = (function.__globals__.get(name) for name in code.co_names)
            for other in called:
                if getattr(other, "__globals__", None) is function.__globals__ and other.__code__ not in seen:
                    seen.add(other.__code__)
                    waiting.append(other)
    return False


def is_about_the_library(module: types.ModuleType) -> bool:
    """Rather than about what measures and releases it."""
    names = [getattr(value, "__module__", None) or getattr(value, "__name__", "") for value in vars(module).values()]
    return not any(str(name).partition(".")[0] in ("benchmarks", "tools") for name in names)


def keep_fast(config: pytest.Config, items: list[pytest.Item]) -> None:
    core = [item for item in items if is_about_the_library(item.module) and not item.get_closest_marker("slow")]
    first = {item.nodeid.partition("[")[0]: item for item in reversed(core)}
    kept = [item for item in reversed(first.values()) if not starts_programs(item)]
    chosen = {id(item) for item in kept}
    config.hook.pytest_deselected(items=[item for item in items if id(item) not in chosen])
    items[:] = kept


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if os.environ.get("HYPOTHESIS_PROFILE") != "thorough":
        longer = [item for item in items if item.get_closest_marker("thorough")]
        items[:] = [item for item in items if item not in longer]
        config.hook.pytest_deselected(items=longer)
    if config.getoption("--fast"):
        keep_fast(config, items)
    if config.getoption("--device") != "cpu":
        return
    left_out = [item for item in items if item.get_closest_marker("gpu")]
    items[:] = [item for item in items if item not in left_out]
    config.hook.pytest_deselected(items=left_out)
    config.stash[NOT_RUN] = [item.name for item in left_out]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item):
    if item.get_closest_marker("uncompiled") is None or os.environ.get("HYPOTHESIS_PROFILE") == "thorough":
        return (yield)
    with use_backend("reference"):
        return (yield)


def pytest_collection_finish() -> None:
    """A full collection of garbage goes through what is imported and collected by now, and takes half a second."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000)  # torch makes so many objects that 700 are there many times a test


@pytest.fixture(autouse=True, scope="module")
def garbage_of_other_modules() -> None:
    """What was there before stays: to look through it takes half a second, and some tests collect often."""
    gc.freeze()


def pytest_sessionfinish(session: pytest.Session) -> None:
    gc.unfreeze()  # or what Triton holds is still there when the process ends, and it says so
    output = getattr(session.config, "workeroutput", None)  # where this is a worker of pytest-xdist
    if output is not None:
        output["not_run"] = session.config.stash.get(NOT_RUN, [])


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node, error) -> None:
    """A worker of pytest-xdist is done. Each of them collects everything, so that any one knows what was left out."""
    if error is None:
        node.config.stash[NOT_RUN] = node.workeroutput["not_run"]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    for report in terminalreporter.getreports("passed"):
        for name, value in report.user_properties:
            if name == "summary":  # what a test found that depends on the machine
                terminalreporter.write_line(value)
    skipped = {report.longrepr[2] for report in terminalreporter.getreports("skipped")}
    for reason in sorted(skipped):
        terminalreporter.write_line(reason)
    if os.environ.get("HYPOTHESIS_PROFILE") != "thorough":
        if config.getoption("--fast"):
            terminalreporter.write_line(
                "left for make test: all cases but first ones, what starts processes, slow tests"
            )
        terminalreporter.write_line("left for HYPOTHESIS_PROFILE=thorough: tests marked so, and most random programs")
    if config.getoption("--device") == "cpu":
        names = ", ".join(config.stash.get(NOT_RUN, [])) or "none of those chosen"
        terminalreporter.write_line(f"not run, as they need a GPU (--device cuda): {names}")
        terminalreporter.write_line(
            "kernels on a GPU are checked by benchmarks/gpu.py, which this run did not start on one"
        )
