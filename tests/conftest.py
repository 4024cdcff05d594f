from __future__ import annotations

import os

import pytest
import torch
from hypothesis import HealthCheck, settings

# Derandomised: a failure seen once is seen by everybody. No deadline: no test asserts a time.
settings.register_profile(
    "sdesolve", derandomize=True, deadline=None, print_blob=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.register_profile("thorough", parent=settings.get_profile("sdesolve"), derandomize=False, max_examples=1000)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "sdesolve"))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", default="cpu", help="device that tensors of the tests live on: cpu or cuda")


@pytest.fixture
def device(request: pytest.FixtureRequest) -> torch.device:
    return torch.device(request.config.getoption("--device"))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if config.getoption("--device") == "cpu":
        terminalreporter.write_line("not run: the same tests on a GPU (--device cuda on a machine that has one)")
