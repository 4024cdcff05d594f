"""Drifts that grow faster than the state: taming and truncation."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

import sdesolve as sds

F64 = torch.float64
# P19 of the study: E X(1) and E X(1)^2 from 1, to 5e-8.
GINZBURG_LANDAU = sds.SDE(lambda x, t: x - x**3, lambda x, t: 0.5 * x)
MOMENTS = (0.93373463, 0.9282337)
WRAPPERS = [
    (sds.Tamed(sds.EulerMaruyama()), 0.5),
    (sds.Tamed(sds.Milstein()), 1.0),
    (sds.Truncated(sds.EulerMaruyama()), 0.5),
]


@pytest.mark.parametrize(("solver", "order"), WRAPPERS, ids=repr)
def test_strong_order_and_moments(solver, order):
    """Root mean square of 500 paths against `SRIW1` on the same motion; moments of 50,000 in 4 standard errors.

    The slope's noise and curvature was 0.04 over two seeds. Weak order 1 allows an error of ``h`` in the moments, with
    ``h = 1/100``.
    """
    cubic = sds.SDE(
        lambda x, t: x - x**3 + torch.cos(2 * t), lambda x, t: 0.7 * (1 + 0.3 * torch.sin(3 * t)) * torch.cos(3 * x)
    )
    x0, steps = torch.ones(500, 1, dtype=F64), (64, 128, 256, 512)
    truth = sds.solve(cubic, x0, 0.0, 1.0, 2048, solver=sds.SRIW1(), seed=1).x1
    errors = []
    for n in steps:
        path = sds.BrownianPath(1, substeps=2048 // n)
        x = sds.solve(cubic, x0, 0.0, 1.0, n, solver=solver, noise=path, backend="eager").x1
        errors.append(float((x - truth).square().mean().sqrt()))
    assert abs(-np.polyfit(np.log(steps), np.log(errors), 1)[0] - order) < 0.1
    assert solver.strong_order == order
    sol = sds.solve(GINZBURG_LANDAU, torch.ones(50_000, 1, dtype=F64), 0.0, 1.0, 100, solver=solver, seed=2)
    assert sol.stats.execution == "fused"
    for power, truth in enumerate(MOMENTS, 1):
        values = sol.x1**power
        assert abs(float(values.mean()) - truth) < 4 * float(values.std()) / math.sqrt(len(values)) + 0.01


@pytest.mark.parametrize("solver", [w for w, _ in WRAPPERS], ids=repr)
def test_far_states_come_back(solver):
    """From 30 a plain Euler step of 1/16 overflows; the wrapped one goes down, in either direction of time."""
    x0 = torch.full((64, 2), 30.0, dtype=F64)
    with pytest.raises(sds.DivergenceError):
        sds.solve(GINZBURG_LANDAU, x0, 0.0, 4.0, 64, solver=sds.EulerMaruyama(), seed=0, backend="eager")
    backwards = sds.SDE(lambda x, t: x**3 - x, lambda x, t: 0.5 * x)
    for sde, span in ((GINZBURG_LANDAU, (0.0, 40.0)), (backwards, (40.0, 0.0))):
        x = sds.solve(sde, x0, *span, 640, solver=solver, seed=0, backend="eager").x1
        assert float(x.abs().max()) < 4.0


def test_the_norm_is_that_of_one_path():
    """``f / (1 + h |f|)`` and ``p(x)`` in numbers, for states of two axes; rows do not see each other."""
    A = torch.linspace(-1.0, 1.0, 24, dtype=F64).reshape(4, 2, 3)
    grow = sds.ODE(lambda x, t: 10.0 * x * x)
    f = 10.0 * A * A
    tamed = sds.solve(grow, A, 0.0, 0.5, 1, solver=sds.Tamed(sds.EulerMaruyama()), backend="eager").x1
    norm = f.flatten(1).norm(dim=1).reshape(4, 1, 1)
    torch.testing.assert_close(tamed, A + 0.5 * f / (1 + 0.5 * norm))
    size = A.flatten(1).norm(dim=1).reshape(4, 1, 1)
    radius = 0.9 * 0.5**-0.25
    assert bool((size > radius).any() and (size < radius).any())
    truncated = sds.solve(
        grow, A, 0.0, 0.5, 1, solver=sds.Truncated(sds.EulerMaruyama(), 0.9, 0.25), backend="eager"
    ).x1
    p = A * (radius / size).clamp(max=1.0)
    torch.testing.assert_close(truncated, A + 0.5 * 10.0 * p * p)


def test_a_gradient_at_a_zero_of_the_drift_is_finite():
    x0 = torch.zeros(3, 2, dtype=F64, requires_grad=True)
    for wrapper in (sds.Tamed, sds.Truncated):
        x = sds.solve(GINZBURG_LANDAU, x0, 0.0, 1.0, 4, solver=wrapper(sds.EulerMaruyama()), seed=0, backend="eager").x1
        (gradient,) = torch.autograd.grad(x.sum(), x0)
        assert bool(gradient.isfinite().all())


def test_wrappers_have_the_capabilities_of_what_they_wrap():
    solver = sds.Tamed(sds.SRIW1())
    assert (solver.needs, solver.strong_order, solver.ode_order) == (("W", "H"), 1.0, 1)
    assert solver == sds.Tamed(sds.SRIW1())
    assert solver != sds.Tamed(sds.SRIW2())
    coupled = sds.SDE(lambda x, t: -x, lambda x, t: x.flip(1))
    with pytest.raises(ValueError, match="depend on x_i alone"):
        sds.solve(coupled, torch.ones(3, 2), 0.0, 1.0, 4, solver=solver, seed=0, backend="eager")
    stratonovich = sds.SDE(lambda x, t: -x, lambda x, t: x, calculus="stratonovich")
    with pytest.raises(ValueError, match="does not converge to the stratonovich"):
        sds.solve(stratonovich, torch.ones(3, 2), 0.0, 1.0, 4, solver=solver, seed=0)
    well = sds.UnderdampedLangevin(lambda x, t: x**3)
    x = sds.solve(well, torch.full((5, 2), 20.0), 0.0, 1.0, 8, solver=sds.Tamed(sds.UBU()), seed=0, backend="eager").x1
    assert float(x.abs().max()) < 100.0
    for bad in (sds.DormandPrince(), sds.EulerMaruyama, 3):
        with pytest.raises(TypeError, match="Tamed takes a one-step solver of fixed steps"):
            sds.Tamed(bad)
    with pytest.raises(ValueError, match="radius must be positive"):
        sds.Truncated(sds.EulerMaruyama(), radius=-1.0)
