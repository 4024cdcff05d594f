"""Stiff equations: orders, stability in mean square, linear systems, and implicit equations that have no solution."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

import sdesolve as sds
from sdesolve.brownian import AbstractNoise
from sdesolve.solvers import skencarp

F64 = torch.float64


def drift(x, t):
    return torch.sin(2 * x) + torch.cos(2 * t)


EQUATIONS = {
    "ode": (sds.ODE(drift), sds.RK4()),
    "additive": (sds.SDE(drift, lambda x, t: 0.3 + 0.15 * torch.sin(3 * t), noise="additive"), sds.SRA3()),
    "diagonal": (sds.SDE(drift, lambda x, t: (0.7 + 0.2 * torch.sin(3 * t)) * torch.cos(3 * x)), sds.SRIW2()),
}
ORDERS = [
    ("ode", sds.ImplicitEuler(), 1), ("ode", sds.ImplicitEuler(0.5), 2), ("ode", sds.SplitStepEuler(6), 1),
    ("ode", sds.SKenCarp(), 3), ("ode", sds.SKSROCK(5), 1),
    ("additive", sds.ImplicitEuler(0.3), 1), ("additive", sds.ImplicitEuler(1.0, 6), 1),
    ("additive", sds.SplitStepEuler(6), 1), ("additive", sds.SKSROCK(3), 1),
    ("diagonal", sds.ImplicitEuler(), 0.5), ("diagonal", sds.ImplicitEuler(0.5), 0.5),
    ("diagonal", sds.SKSROCK(7), 0.5),
]  # fmt: skip


def errors(kind, solver, steps, span, x0, finest=1024):
    """Root mean square against a solver of higher order with ``finest`` steps, on the same motion."""
    sde, reference = EQUATIONS[kind]
    noisy = kind != "ode"
    truth = sds.solve(sde, x0, *span, finest, solver=reference, seed=1, backend="fused").x1
    found = []
    for n in steps:
        noise = sds.BrownianPath(1, substeps=finest // n) if noisy else None
        x = sds.solve(sde, x0, *span, n, solver=solver, noise=noise, backend="eager").x1
        found.append(float((x - truth).square().mean().sqrt()))
    return found


def slope(steps, found):
    return -np.polyfit(np.log(steps), np.log(found), 1)[0]


@pytest.mark.parametrize(("kind", "solver", "order"), ORDERS, ids=str)
def test_orders_with_time_in_both_coefficients(kind, solver, order):
    """Fitted in both directions of time; 400 paths give slopes a noise of 0.03, and curvature is below 0.12."""
    noisy = kind == "diagonal"
    x0, steps = torch.full((400 if noisy else 200, 1), 0.5, dtype=F64), (16, 32, 64, 128) if noisy else (16, 32, 64)
    for span in ((0.0, 1.0), (1.0, 0.0)):
        assert abs(slope(steps, errors(kind, solver, steps, span, x0)) - order) < 0.15, span
    assert order == {"ode": solver.ode_order, "diagonal": solver.strong_order}.get(kind, 1)


def test_the_table_of_skencarp():
    """Roessler's conditions for strong order 3/2 with additive noise, and those of third order."""
    A = np.zeros((4, 4))
    for i, row in enumerate(skencarp._A, 1):
        A[i, :i], A[i, i] = row, skencarp._GAMMA
    B, alpha, e = np.array([0.0, *skencarp._B]), A[3], np.ones(4)
    np.testing.assert_allclose(A @ e, [0.0, *skencarp._C], atol=1e-13)
    conditions = [alpha @ e, alpha @ A @ e, alpha @ B, alpha @ B**2, alpha @ (A @ e) ** 2, alpha @ A @ A @ e]
    np.testing.assert_allclose(conditions, [1, 1 / 2, 1, 3 / 2, 1 / 3, 1 / 6], atol=1e-12)


class Signs(AbstractNoise):
    """``W = +-sqrt|dt|`` for the two rows: second moments of a step that is linear in ``W`` are exact."""

    def increments(self, times, shape, *, step=0, of="W", dtype=F64, device=None):
        signs = torch.tensor([1.0, -1.0], dtype=dtype).reshape(2, *(1,) * (len(shape) - 1))
        return (signs * times.diff().abs().sqrt().reshape(-1, *(1,) * len(shape))).expand(-1, *shape)


@pytest.mark.parametrize(
    ("solver", "expected"),
    [
        (sds.ImplicitEuler(), 101 / 101**2),
        (sds.ImplicitEuler(0.5), (49**2 + 100) / 51**2),
        (sds.SplitStepEuler(2), 101 / 101**2),
        (sds.SKSROCK(9), None),
        (sds.SKSROCK(spectral_radius=1000.0), None),
    ],
    ids=repr,
)
def test_stability_in_mean_square(solver, expected):
    """``dX = -1000 X dt + sqrt(1000) X dW``, ``h = 0.1``: ``E X'^2 / x^2`` below 1, where Euler-Maruyama has 9901."""
    sde = sds.SDE(lambda x, t: -1000.0 * x, lambda x, t: math.sqrt(1000.0) * x)
    x0 = torch.ones(2, 1, dtype=F64)
    options = {"noise": Signs(), "backend": "eager"}
    growth = float(sds.solve(sde, x0, 0.0, 0.1, 1, solver=solver, **options).x1.square().mean())
    assert growth < 1.0
    assert expected is None or growth == pytest.approx(expected, rel=1e-12)
    plain = sds.solve(sde, x0, 0.0, 0.1, 1, solver=sds.EulerMaruyama(), **options).x1
    assert float(plain.square().mean()) == pytest.approx(99.0**2 + 100.0)


@pytest.mark.uncompiled
def test_stability_functions_on_an_ode():
    """``T_s(w0 + w1 z) / T_s(w0)`` of SK-SROCK by NumPy's Chebyshev polynomials; L-stability of the implicit ones."""
    z = -torch.tensor([[0.1], [1.0], [30.0], [100.0], [1e6]], dtype=F64)
    for s in (1, 2, 5, 12):
        T = np.polynomial.chebyshev.Chebyshev.basis(s)
        w0 = 1 + 0.05 / s**2
        expected = torch.as_tensor(T(w0 + T(w0) / T.deriv()(w0) * z[:3].numpy()) / T(w0))
        x = sds.solve(
            sds.ODE(lambda x, t: z[:3] * x), torch.ones(3, 1, dtype=F64), 0.0, 1.0, 1, solver=sds.SKSROCK(s)
        ).x1
        torch.testing.assert_close(x, expected, rtol=1e-10, atol=1e-12)
    for solver in (sds.ImplicitEuler(), sds.SplitStepEuler(2), sds.SKenCarp(2)):
        x = sds.solve(sds.ODE(lambda x, t: z * x), torch.ones(5, 1, dtype=F64), 0.0, 1.0, 1, solver=solver).x1
        assert bool((x.abs() < 1.0).all())
        assert float(x[-1].abs()) < 1e-5


def test_times_of_stages_are_those_of_one_more_component():
    """SK-SROCK on ``f(x, t)`` is SK-SROCK on the autonomous equation of ``(x, t)``."""
    with_time = sds.ODE(
        lambda z, t: torch.stack([torch.sin(z[:, 0]) + torch.cos(5 * z[:, 1]), torch.ones_like(z[:, 0])], 1)
    )
    plain = sds.ODE(lambda x, t: torch.sin(x) + torch.cos(5 * t))
    options = {"solver": sds.SKSROCK(6), "backend": "eager"}
    z = sds.solve(with_time, torch.tensor([[0.3, 0.2]], dtype=F64), 0.2, 1.0, 1, **options).x1
    x = sds.solve(plain, torch.tensor([[0.3]], dtype=F64), 0.2, 1.0, 1, **options).x1
    torch.testing.assert_close(z, torch.tensor([[float(x), 1.0]], dtype=F64), rtol=1e-13, atol=0.0)


@pytest.mark.parametrize("shape", [(), (1,), (2,), (3,), (2, 2), (2, 3)], ids=str)
def test_linear_systems_are_solved(shape):
    """One step is ``(I - h A)^-1 (x + W)``, for matrices that need pivots too; each row of a batch has its own."""
    n, rows, h = math.prod(shape), 7, 0.5
    A = torch.randn(rows, n, n, dtype=F64, generator=torch.Generator().manual_seed(n))
    if n > 1:
        A[0] = (torch.eye(n, dtype=F64) - torch.eye(n, dtype=F64).roll(1, 0)) / h  # I - h A is a permutation
    x0 = torch.linspace(-1.0, 1.0, rows * n, dtype=F64).reshape(rows, *shape)

    def linear(x, t):
        return (A @ x.reshape(rows, n, 1)).reshape(x.shape)

    sde, noise = sds.SDE(linear, lambda x, t: 1.0, noise="additive"), sds.BrownianPath(3)
    W = noise.increments(torch.tensor([0.0, h], dtype=F64), (rows, *shape), dtype=F64)[0]
    right = (x0 + W).reshape(rows, n, 1)
    expected = torch.linalg.solve(torch.eye(n, dtype=F64) - h * A, right).reshape(x0.shape)
    sol = sds.solve(sde, x0, 0.0, h, 1, solver=sds.ImplicitEuler(), noise=noise, backend="eager")
    torch.testing.assert_close(sol.x1, expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("backend", ["eager", "fused"])
def test_an_implicit_equation_without_a_solution_is_an_error(backend):
    """``y = x + h (1 + y^2)`` has no real root where ``4 h (x + h) > 1``: path 1 gets there in its second step."""
    sde = sds.SDE(lambda x, t: 1.0 + x * x, lambda x, t: 0.0 * x)
    x0 = torch.tensor([[-3.0], [0.8]], dtype=F64)
    with pytest.raises(sds.DivergenceError, match=r"did not converge in 8 iterations of Newton's method") as error:
        sds.solve(sde, x0, 0.0, 0.6, 3, solver=sds.SplitStepEuler(), seed=0, backend=backend)
    assert (error.value.path, error.value.step) == (1, 1)
    assert error.value.time == pytest.approx(0.2)
    assert bool(sds.solve(sde, x0[:1], 0.0, 0.6, 3, solver=sds.SplitStepEuler(), seed=0, backend=backend).x1.isfinite())


@pytest.mark.parametrize(
    "solver", [sds.ImplicitEuler(0.5), sds.SplitStepEuler(4), sds.SKSROCK(spectral_radius=3.0)], ids=repr
)
def test_whole_trajectories_are_fused(solver):
    sde = sds.SDE(
        lambda x, t: torch.stack([torch.cos(t) - x[:, 1], x[:, 0] - x[:, 1] ** 3], 1), lambda x, t: 0.3 * torch.cos(x)
    )
    x0 = torch.linspace(-1.0, 1.0, 14, dtype=F64).reshape(7, 2)
    fused = sds.solve(sde, x0, 0.0, 1.0, 8, solver=solver, seed=1)
    eager = sds.solve(sde, x0, 0.0, 1.0, 8, solver=solver, seed=1, backend="eager")
    assert fused.stats.execution == "fused"
    assert fused.stats.nfe == eager.stats.nfe
    torch.testing.assert_close(fused.x1, eager.x1, rtol=1e-12, atol=1e-13)


def test_superlinear_and_stiff_quadratic():
    """P19 by `SplitStepEuler`, and P8 with a rate of 40: all paths end at -1, with steps of 1/10 too."""
    x = sds.solve(
        sds.SDE(lambda x, t: x - x**3, lambda x, t: 0.5 * x), torch.ones(20_000, 1, dtype=F64), 0.0, 1.0, 50,
        solver=sds.SplitStepEuler(5), seed=2, backend="eager",
    ).x1  # fmt: skip
    for power, truth in ((1, 0.93373463), (2, 0.9282337)):
        values = x**power
        assert abs(float(values.mean()) - truth) < 4 * float(values.std()) / math.sqrt(len(values)) + 1 / 50
    quadratic = sds.SDE(lambda x, t: -(20.0 + x) * (1.0 - x * x), lambda x, t: 1.0 - x * x)
    x0 = torch.full((500, 1), -0.2, dtype=F64)
    for solver, allowed in ((sds.ImplicitEuler(), 1e-6), (sds.SKSROCK(4), 0.2)):  # the latter damps by a few percent
        x = sds.solve(quadratic, x0, 0.0, 3.0, 30, solver=solver, seed=1, backend="eager").x1
        assert float((x + 1.0).abs().max()) < allowed, solver
    with pytest.raises(sds.DivergenceError):
        sds.solve(quadratic, x0, 0.0, 3.0, 30, solver=sds.EulerMaruyama(), seed=1, backend="eager")


@pytest.mark.uncompiled
def test_gradients_go_through_an_implicit_step():
    x0 = torch.tensor([[0.4, -0.3]], dtype=F64, requires_grad=True)
    sde = sds.SDE(lambda x, t: -x * x.flip(1) - x**3, lambda x, t: 0.2 * x)

    def end(x):
        return sds.solve(sde, x, 0.0, 1.0, 2, solver=sds.ImplicitEuler(0.5, 6), seed=0).x1

    assert torch.autograd.gradcheck(end, (x0,))


def test_what_is_refused():
    stratonovich = sds.SDE(drift, lambda x, t: x, calculus="stratonovich")
    x0 = torch.ones(3, 1)
    for solver in (sds.ImplicitEuler(), sds.SplitStepEuler(), sds.SKSROCK(3), sds.SKenCarp()):
        with pytest.raises(ValueError, match="does not converge to the stratonovich"):
            sds.solve(stratonovich, x0, 0.0, 1.0, 4, solver=solver, seed=0)
    with pytest.raises(ValueError, match="does not converge to the ito solution of an SDE with diagonal noise"):
        sds.solve(EQUATIONS["diagonal"][0], x0, 0.0, 1.0, 4, solver=sds.SKenCarp(), seed=0)
    with pytest.raises(ValueError, match=r"h rho = 1e\+06 needs 721 stages, more than 500; take shorter steps"):
        sds.solve(sds.ODE(drift), x0, 0.0, 1.0, 1, solver=sds.SKSROCK(spectral_radius=1e6))
    for make in (
        lambda: sds.ImplicitEuler(1.5), lambda: sds.ImplicitEuler(iterations=0), lambda: sds.SplitStepEuler(1),
        lambda: sds.SKenCarp(1), lambda: sds.SKSROCK(0), lambda: sds.SKSROCK(501), lambda: sds.SKSROCK(),
        lambda: sds.SKSROCK(3, spectral_radius=1.0), lambda: sds.SKSROCK(spectral_radius=-1.0),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=r"must be|give either"):
            make()
    with pytest.raises(TypeError, match="theta must be a number"):
        sds.ImplicitEuler("implicit")
