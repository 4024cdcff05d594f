"""What is printed of equations and solutions is short, whatever their size, and says what ran."""

from __future__ import annotations

import re

import pytest
import torch

import sdesolve as sds

SDE = sds.SDE(lambda x, t: -x, lambda x, t: 0.1 * x)


@pytest.mark.uncompiled
@pytest.mark.parametrize("batch", [0, 1, 5000])
def test_a_solution_is_told_in_a_few_lines(batch):
    options = {"solver": sds.EulerMaruyama(), "seed": 3, "save_at": "grid"}
    sol = sds.solve(SDE, torch.ones(batch, 2), 0.0, 0.5, 8, carry=sds.Integral(lambda x, t: x[:, 0]), **options)
    text = repr(sol)
    assert len(text) < 600
    for part in (f"{batch} of shape (2,), float32", "9 times, 0 to 0.5", "EulerMaruyama, 8 steps, seed 3", "carry"):
        assert part in text
    assert f"{sol.stats.execution}: " in text
    assert len(repr(sol.stats)) < 400
    shown = sol._repr_html_()
    lines = re.findall(r'<polyline points="([^"]+)"', shown)
    assert len(lines) == min(batch, 12)
    assert all(len(points.split()) == 9 for points in lines)
    if batch:  # falling lines: an SVG's axis points downwards
        assert lines[0].startswith("0.0,0.0 ")


def test_solutions_without_times_or_numbers_are_told():
    options = {"solver": sds.EulerMaruyama(), "seed": 3}
    moments = sds.solve(SDE, torch.ones(8, 2), 0.0, 0.5, 4, reduce="moments", **options)
    assert "mean, variance" in repr(moments)
    assert "<svg" not in moments._repr_html_()
    last = sds.solve(SDE, torch.ones(8, 2), 0.0, 0.5, 4, **options)
    assert "1 time, 0.5" in repr(last)
    each = sds.solve(SDE, torch.ones(2, 1), torch.tensor([0.0, 1.0]), 2.0, 4, save_at="grid", **options)
    assert "5 times, 0 to 2" in repr(each)
    assert "<table>" in each._repr_html_()
    odd = sds.ODE(lambda x, t: x / 0 * 0)
    hidden = sds.solve(odd, torch.ones(2, 1), 0.0, 1.0, 4, save_at="grid", solver=sds.RK4(), check_finite=False)
    assert "<svg" in hidden._repr_html_()


def test_equations_say_their_noise_and_calculus():
    assert repr(SDE) == "SDE(noise='diagonal', calculus='ito')"
    assert repr(sds.to_stratonovich(SDE)).endswith("(noise='diagonal', calculus='stratonovich')")
    assert repr(sds.ODE(lambda x, t: x)).startswith("ODE(noise='none'")
    assert repr(sds.VP().reverse(lambda x, t: -x)).startswith("ReverseSDE(noise='additive'")
