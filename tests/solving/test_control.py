"""Equations driven by data: exact answers, orders, areas and gradients; what does not fit is named."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

import sdesolve as sds

T = torch.tensor([0.0, 0.1, 0.25, 0.3, 0.7, 1.0], dtype=torch.float64)
DATA = torch.stack([torch.sin(3 * T), T.square()], -1)
A = torch.tensor([[[0.3, -0.5], [0.4, 0.1]], [[0.2, 0.6], [-0.1, 0.5]]], dtype=torch.float64)


def field(x, t):
    return torch.einsum("kij,bj->bik", A, torch.sin(x) + x)


CDE = sds.SDE(lambda x, t: -0.3 * x, field, noise="general", calculus="stratonovich")
X0 = torch.tensor([[1.0, 0.5], [0.2, -0.3]], dtype=torch.float64)


def fined(steps):
    """The times of the data, with ``steps`` steps between two of them."""
    return torch.cat([T[:1], *(torch.linspace(a, b, steps + 1, dtype=T.dtype)[1:] for a, b in itertools.pairwise(T))])


def run(solver, steps, values=DATA, **options):
    return sds.solve(CDE, X0, grid=fined(steps), solver=solver, noise=sds.ControlPath(values, T, **options))


@pytest.mark.parametrize("interpolation", ["linear", "hermite"])
@pytest.mark.parametrize(("solver", "order"), [(sds.Heun(), 2), (sds.Midpoint(), 2), (sds.ReversibleHeun(), 2)])
def test_order_is_that_of_ordinary_equations(solver, order, interpolation):
    exact = run(sds.Midpoint(), 128, interpolation=interpolation).x1
    coarse, fine = (float((run(solver, n, interpolation=interpolation).x1 - exact).abs().max()) for n in (4, 8))
    assert abs(math.log2(coarse / fine) - order) < 0.35


def test_a_linear_equation_of_one_channel_has_its_exponential():
    sde = sds.SDE(lambda x, t: torch.zeros_like(x), lambda x, t: x, noise="diagonal", calculus="stratonovich")
    y = torch.stack([DATA, 2 * DATA])  # a path for each row
    grid = torch.linspace(0.0, 1.0, 2001, dtype=torch.float64)
    for back in (False, True):
        found = sds.solve(sde, X0, grid=grid.flip(0) if back else grid, solver=sds.Heun(), noise=sds.ControlPath(y, T))
        exact = X0 * (y[:, -1] - y[:, 0]).mul(-1 if back else 1).exp()
        torch.testing.assert_close(found.x1, exact, rtol=2e-6, atol=0)
    assert found.stats.execution == "eager"
    assert found.stats.seed is None


@pytest.mark.parametrize("interpolation", ["linear", "hermite"])
@pytest.mark.parametrize("sign", [1, -1])
def test_increments_and_areas_are_exact(interpolation, sign):
    control = sds.ControlPath(DATA, T, interpolation=interpolation)
    times = torch.tensor([0.05, 0.28, 0.9], dtype=torch.float64)
    times = times if sign > 0 else times.flip(0)
    W, H = (control.increments(times, (1, 2), of=of, dtype=torch.float64) for of in ("W", "H"))
    for k in range(2):
        fine = torch.linspace(float(times[k]), float(times[k + 1]), 20_001, dtype=torch.float64)
        y = control.increments(fine, (1, 2), dtype=torch.float64)[:, 0].cumsum(0)
        y = torch.cat([torch.zeros_like(y[:1]), y])
        torch.testing.assert_close(W[k, 0], y[-1], rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(H[k, 0], (0.5 * (y[1:] + y[:-1])).mean(0) - 0.5 * y[-1], rtol=1e-6, atol=1e-8)
    at_knots = control.increments(T, (1, 2), dtype=torch.float64)[:, 0].cumsum(0)
    torch.testing.assert_close(at_knots, DATA[1:] - DATA[0], rtol=1e-12, atol=1e-14)


def test_hermite_paths_know_nothing_of_the_future():
    other = DATA.clone()
    other[-1] += 5.0
    times = torch.linspace(0.0, 0.7, 9, dtype=torch.float64)
    a, b = (sds.ControlPath(v, T, interpolation="hermite").increments(times, (1, 2)) for v in (DATA, other))
    assert torch.equal(a, b)


def test_hermite_paths_have_no_kinks():
    def bends(interpolation):
        control, h = sds.ControlPath(DATA, T, interpolation=interpolation), 1e-6
        slopes = [
            control.increments(torch.stack([t, t + h]), (1, 2), dtype=torch.float64)[0, 0] / h
            for knot in T[1:-1]
            for t in (knot - h, knot)
        ]
        return torch.stack(slopes).reshape(-1, 2, 2).diff(dim=1).abs().max()

    assert bends("hermite") < 1e-3
    assert bends("linear") > 0.1
    at_knots = sds.ControlPath(DATA, T, interpolation="hermite").increments(T, (1, 2), dtype=torch.float64)[:, 0]
    torch.testing.assert_close(at_knots, DATA.diff(dim=0), rtol=1e-12, atol=1e-14)


def test_euler_has_order_one():
    ito = sds.SDE(lambda x, t: -0.3 * x, field, noise="general")
    exact, control = run(sds.Midpoint(), 128).x1, sds.ControlPath(DATA, T)
    coarse, fine = (
        sds.solve(ito, X0, grid=fined(n), solver=sds.EulerMaruyama(), noise=control).x1 - exact for n in (16, 32)
    )
    assert abs(math.log2(float(coarse.abs().max() / fine.abs().max())) - 1) < 0.15


def test_gradients_reach_the_data():
    values = DATA.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda v: run(sds.Heun(), 2, values=v).x1, (values,), atol=1e-7)


def test_schemes_that_ask_for_areas_get_those_of_the_data():
    sde = sds.SDE(lambda x, t: torch.sin(x), lambda x, t: torch.ones_like(x), noise="additive")
    y = torch.sin(2 * torch.linspace(0, 1, 2001, dtype=torch.float64))[:, None]
    control = sds.ControlPath(y, torch.linspace(0, 1, 2001, dtype=torch.float64))
    x0 = torch.full((1, 1), 0.4, dtype=torch.float64)
    exact = sds.solve(sde, x0, 0.0, 1.0, 2000, solver=sds.Heun(), noise=control).x1
    with_areas = [
        float((sds.solve(sde, x0, 0.0, 1.0, n, solver=sds.ShARK(), noise=control).x1 - exact).abs()) for n in (5, 10)
    ]
    plain = float((sds.solve(sde, x0, 0.0, 1.0, 10, solver=sds.EulerMaruyama(), noise=control).x1 - exact).abs())
    assert with_areas[1] < 0.1 * plain
    assert with_areas[0] / with_areas[1] > 3.5, "order 2, where increments alone leave order 1"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: sds.ControlPath(DATA, T.flip(0)), "times must be .* increase"),
        (lambda: sds.ControlPath(DATA[:-1], T), "with 6 times, got shape"),
        (lambda: sds.ControlPath(DATA / 0.0, T), "values must be finite"),
        (lambda: sds.ControlPath(DATA.long(), T), "floating-point"),
        (lambda: sds.ControlPath(DATA, T, interpolation="spline"), "'linear' or 'hermite'"),
        (lambda: run(sds.Heun(), 1, values=DATA[:, :1]), r"has channels \(2,\)"),
        (lambda: run(sds.Heun(), 1, values=DATA.expand(3, 6, 2)), "values has 3 rows, and x0 has 2"),
        (
            lambda: sds.solve(CDE, X0, 0.0, 2.0, 4, solver=sds.Heun(), noise=sds.ControlPath(DATA, T)),
            "from 0 to 1, and the",
        ),
        (
            lambda: sds.solve(CDE, X0, 0.0, 1.0, solver=sds.Adaptive(sds.SPaRK()), noise=sds.ControlPath(DATA, T)),
            "BrownianPath",
        ),
        (
            lambda: sds.solve(CDE, X0, 0.0, 1.0, 4, solver=sds.Heun(), noise=sds.ControlPath(DATA, T), backend="fused"),
            "not fused|cannot|another class",
        ),
    ],
)
def test_what_does_not_fit_is_named(make, message):
    with pytest.raises((TypeError, ValueError), match=message):
        make()
