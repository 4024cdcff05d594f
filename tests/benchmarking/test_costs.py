"""What runs are predicted to cost: operations counted, prices fitted, and the table that is shown."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import sdesolve as sds
from benchmarks import costs

ROOT = Path(__file__).parents[2]


def test_operations_of_a_step_are_counted():
    a = torch.ones(3, 5)
    sde = sds.SDE(
        lambda x, t: torch.tanh(x @ a) @ a.T - x**2 / 2.0,
        lambda x, t: torch.ones(len(x), 3, 4) * x[:, :, None] ** 0.5,
        noise="general",
    )
    found = costs.count(sde, torch.ones(2, 3))
    assert found == {
        "multiply-add": 15 + 15 + 12, "exponential": 5, "division": 3, "power": 3, "normal": 4, "state": 3,
        "arithmetic": 3 + 3 + 12 + 2 * 3,
    }  # fmt: skip


def test_prices_are_found_again():
    prices = {"call": 1e-4, "normal": 1e-9, "division": 1e-10}
    rows = [{"call": 1.0, "normal": n, "division": d} for n, d in ((10.0, 0.0), (1e6, 0.0), (1e6, 1e8))]
    measured = [{"features": row, "seconds": sum(prices[n] * v for n, v in row.items())} for row in rows]
    assert costs.priced(measured) == pytest.approx(prices)


def test_the_page_shows_the_file_and_predicts_within_thirty_per_cent():
    found = json.loads((ROOT / "benchmarks" / "results" / "costs.json").read_text())
    shown = (ROOT / "docs" / "cost.md").read_text().split("<!-- costs.json -->\n")[1].split("\n<!-- /costs.json -->")[0]
    assert shown == costs.markdown(found).strip()
    assert len(found["runs"]) > 20
    for run in found["runs"]:
        guess = sum(found["prices"].get(name, 0.0) * times for name, times in run["features"].items())
        assert 0.7 <= guess / run["seconds"] <= 1.3, run["run"]


def test_every_kind_of_run_is_measured(monkeypatch):
    made = next(costs.yardsticks())
    (found,) = costs.measure([made._replace(steps=2)], seconds=0.0)
    assert found["seconds"] > 0
    assert found["features"]["normal"] == 16 * 2 * 2
