"""What is printed of equations and solutions is short, whatever their size, and says what ran."""

from __future__ import annotations

import math
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


def test_notebooks_show_equations_processes_and_solvers_as_tables():
    for shown, parts in (
        (SDE, ("dX = f(X, t) dt + g(X, t) dW, a W for each component", "ito")),
        (sds.ODE(lambda x, t: x), ("dX = f(X, t) dt</td>",)),
        (sds.VP().reverse(lambda x, t: -x), ("g(t) dW", "additive")),
        (sds.VP(), ("alpha(t) x_0 + sigma(t) z", "at t = 1", "sigma 1")),
        (sds.SRIW1(), ("1.5, 1.5, - (additive, diagonal, general)", "diagonal (ito)")),
        (sds.EulerMaruyama(), ("1, 0.5, 0.5", "general (ito)")),
        (sds.RK4(), ("order without noise</th><td>4",)),
        (sds.Adaptive(sds.SPaRK()), ("SPaRK", "strong order")),
    ):
        text = shown._repr_html_()
        assert "<table>" in text
        assert len(text) < 2000
        for part in parts:
            assert part in text


@pytest.mark.parametrize(
    "solver", [sds.DDIM(), sds.DPMSolverPP(2), sds.Ancestral(), sds.DormandPrince(), sds.TauLeap()]
)
def test_any_solver_has_a_table(solver):
    assert "<table>" in solver._repr_html_()


OPTIONS = {"solver": sds.EulerMaruyama(), "seed": 3, "backend": "eager"}


@pytest.mark.parametrize("kind", [None, "paths", "fan", "density", "phase"])
def test_a_solution_is_drawn_in_one_call(kind):
    sol = sds.solve(SDE, torch.ones(40, 2), 1.0, 0.0, 6, save_at="grid", **OPTIONS)
    figure = sol.plot(kind, title="falling")
    axes = figure.axes[0]
    assert axes.get_title(loc="left") == "falling"
    if kind == "phase":
        assert (axes.get_xlabel(), axes.get_ylabel()) == ("x0", "x1")
        assert len(axes.get_lines()) == 24 + 1  # and their ends
    else:
        assert axes.get_xlim() == (1.0, 0.0)  # the direction of integration
    if kind == "fan":
        assert [t.get_text() for t in axes.get_legend().get_texts()][:3] == [
            "95% of paths",
            "80% of paths",
            "50% of paths",
        ]
        (median,) = axes.get_lines()
        torch.testing.assert_close(
            torch.as_tensor(median.get_ydata()).float(), sol.xs[..., 0].sort(1)[0][:, 19:21].mean(1)
        )
    if kind == "density":
        shown = torch.as_tensor(axes.collections[0].get_array().data).reshape(80, 7)
        assert (shown.max(0).values == 1).all()


def test_moments_are_drawn_as_a_band():
    sol = sds.solve(SDE, torch.ones(40, 2), 0.0, 1.0, 6, save_at="grid", reduce="moments", **OPTIONS)
    (axes,) = sol.plot(component=1).axes
    (mean,) = axes.get_lines()
    torch.testing.assert_close(torch.as_tensor(mean.get_ydata()), sol.mean[:, 1])
    top = axes.collections[0].get_paths()[0].vertices[:, 1].max()
    assert top == pytest.approx(float((sol.mean[:, 1] + 2 * sol.variance[:, 1].sqrt()).max()))


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("lines", {"save_at": "grid"}, "kind must be one of 'paths', 'fan', 'density', 'phase', 'band', got 'lines'"),
        (None, {}, "needs two times or more, and 1 were saved; solve with save_at='grid'"),
        ("band", {"save_at": "grid"}, "a band needs moments; solve with reduce='moments'"),
        ("fan", {"save_at": "grid", "reduce": "moments"}, "moments alone were kept"),
    ],
)
def test_what_cannot_be_drawn_is_said(kind, options, message):
    sol = sds.solve(SDE, torch.ones(4, 2), 0.0, 1.0, 4, **OPTIONS, **options)
    with pytest.raises(ValueError, match=re.escape(message)):
        sol.plot(kind)


def test_components_and_levels_that_are_none_are_named():
    sol = sds.solve(SDE, torch.ones(4, 2), 0.0, 1.0, 4, save_at="grid", **OPTIONS)
    for kind, options, message in (
        ("fan", {"component": 2}, r"component must be in \[0, 2\)"), ("fan", {"levels": (1.5,)}, "shares in"),
        ("density", {"bins": 1}, "bins"), ("phase", {"components": (0, 5)}, r"component must be in \[0, 2\)"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            sol.plot(kind, **options)


@pytest.mark.parametrize("kind", ["paths", "density"])
def test_states_that_are_not_finite_are_left_out(kind):
    odd = sds.ODE(lambda x, t: torch.where(x > 0, x / 0, -x))
    x0 = torch.tensor([[1.0], [-1.0], [-2.0]])
    options = {"solver": sds.RK4(), "check_finite": False, "backend": "eager", "save_at": "grid"}
    sol = sds.solve(odd, x0, 0.0, 1.0, 4, **options)
    assert not sol.x1.isfinite().all()
    assert sol.plot(kind).axes
    with pytest.raises(ValueError, match="density needs finite states"):
        sds.plotting.density(sol.ts, torch.full((5, 2, 1), math.nan))
