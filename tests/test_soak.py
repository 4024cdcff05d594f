"""A part of ``tools/soak.py``: random calls of the public API, valid and invalid."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

FILE = Path(__file__).parents[1] / "tools" / "soak.py"


@pytest.fixture(scope="module")
def soak():
    spec = importlib.util.spec_from_file_location("soak", FILE)
    module = sys.modules["soak"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    del sys.modules["soak"]


@pytest.mark.slow
def test_random_calls_return_or_say_why_not(soak):
    outcomes, faults = soak.soak(0, 200, auto=False)
    assert not faults, "\n".join(faults)
    returned = sum(count for name, count in outcomes.items() if name.endswith("returned"))
    assert 60 < returned < 160, outcomes


def test_a_fault_is_found(soak, monkeypatch):
    """Messages that are long, errors of torch's own, and ones that do not pickle."""

    class Stubborn(ValueError):
        def __init__(self, message, more):
            super().__init__(message)

    monkeypatch.setattr(soak, "_OURS", (__file__,))
    for error, fault in (
        (ValueError("x" * 1000), "1000 characters"), (KeyError("x"), "undocumented KeyError"),
        (Stubborn("x", 1), "does not pickle"), (ValueError("x"), None),
    ):  # fmt: skip
        try:
            raise error
        except Exception as met:
            found = soak._wrong_with(met)
        assert (found is None) == (fault is None)
        assert fault is None or fault in found
