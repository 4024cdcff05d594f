"""Strong, weak and ODE orders, fitted; the same path at several resolutions."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

import sdesolve as sds

MU, SIGMA, T = 0.5, 0.8, 1.0


def geometric_brownian_motion(calculus="ito", noise="diagonal"):
    """``dX = mu X dt + sigma X dW``, whose solution is known along each path."""
    return sds.SDE(lambda x, t: MU * x, lambda x, t: SIGMA * x, noise=noise, calculus=calculus)


def exact(x0, W, calculus):
    rate = MU - 0.5 * SIGMA**2 if calculus == "ito" else MU
    return x0 * (rate * T + SIGMA * W).exp()


def fitted_slope(h, error):
    return np.polyfit(np.log2(h), np.log2(error), 1)[0]


@pytest.mark.parametrize("direction", [1, -1])
@pytest.mark.parametrize("noise", ["diagonal", "scalar"])
@pytest.mark.parametrize(
    ("solver", "calculus", "order"),
    [
        (sds.EulerMaruyama(), "ito", 0.5),
        (sds.Milstein(), "ito", 1.0),
        (sds.Milstein(), "stratonovich", 1.0),
        (sds.Heun(), "stratonovich", 1.0),
    ],
)
def test_strong_order_on_geometric_brownian_motion(solver, calculus, order, noise, direction):
    """``E|X_h(T) - X(T)|`` at steps 2^-4 to 2^-9 of the same 4000 paths.

    The noise of a fitted slope from 4000 paths is below 0.05 (twenty seeds: sd 0.02); 0.1 also covers the curvature.
    Backwards, the equation is that of a motion of its own over time ``T - t``: the drift's sign turns.
    """
    paths, finest = 4000, 512
    x0 = torch.full((paths, 1), 1.0, dtype=torch.float64)
    W = sds.BrownianPath(7).increments(sds.grids.uniform(0, T, finest), (paths, 1), dtype=torch.float64).sum(0)
    rate = direction * MU - (0.5 * SIGMA**2 if calculus == "ito" else 0.0)
    truth = x0 * (rate * T + SIGMA * W).exp()
    steps = [16, 32, 64, 128, 256, 512]
    sde = geometric_brownian_motion(calculus, noise)
    t0, t1 = (0.0, T) if direction == 1 else (T, 0.0)
    errors = [
        (sds.solve(sde, x0, t0, t1, n, solver=solver, noise=sds.BrownianPath(7, substeps=finest // n)).x1 - truth)
        .abs()
        .mean()
        .item()
        for n in steps
    ]
    assert abs(fitted_slope([T / n for n in steps], errors) - order) < 0.1


def test_weak_order_of_euler_maruyama():
    """``E[X_h^2] - E[X^2]`` for a million paths, measured against the exact solution on the same paths.

    Each error has a standard error from the sample; the slope's follows from those, and 4 of them are allowed on top of
    0.1 for the curvature of the error at these steps.
    """
    paths, steps = 250_000, [4, 8, 16, 32]
    sde = geometric_brownian_motion()
    errors, deviations = [], []
    for n in steps:
        differences = []
        for seed in range(4):
            x0 = torch.ones(paths, 1, dtype=torch.float64)
            path = sds.BrownianPath(seed, substeps=32 // n)
            x = sds.solve(sde, x0, 0.0, T, n, solver=sds.EulerMaruyama(), noise=path).x1
            W = path.increments(sds.grids.uniform(0, T, n), (paths, 1), dtype=torch.float64).sum(0)
            differences.append((x**2 - exact(x0, W, "ito") ** 2).flatten())
        d = torch.cat(differences)
        errors.append(abs(d.mean().item()))
        deviations.append(d.std().item() / math.sqrt(len(d)))
    log_h = np.log2([T / n for n in steps])
    weights = (log_h - log_h.mean()) / ((log_h - log_h.mean()) ** 2).sum()
    slope_sd = math.sqrt(
        sum((w * s / e / math.log(2)) ** 2 for w, s, e in zip(weights, deviations, errors, strict=True))
    )
    assert slope_sd < 0.05
    assert abs(fitted_slope([T / n for n in steps], errors) - 1.0) < 0.1 + 4 * slope_sd


@pytest.mark.parametrize(("t0", "t1"), [(0.0, 1.0), (1.0, 0.0)])
@pytest.mark.parametrize(
    ("solver", "order"), [(sds.EulerMaruyama(), 1), (sds.Milstein(), 1), (sds.Heun(), 2), (sds.RK4(), 4)]
)
def test_ode_order(solver, order, t0, t1):
    """A nonlinear, time-dependent equation with a known solution: ``x' = -2 t x^2``, ``x = 1 / (t^2 + c)``."""
    ode = sds.ODE(lambda x, t: -2.0 * t * x * x)
    c = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    steps = [8, 16, 32, 64]
    errors = [
        (sds.solve(ode, 1 / (t0**2 + c), t0, t1, n, solver=solver).x1 - 1 / (t1**2 + c)).abs().max().item()
        for n in steps
    ]
    assert abs(fitted_slope([1 / n for n in steps], errors) - order) < 0.1
    assert solver.ode_order == order


def test_states_of_an_ode_between_grid_points_keep_fourth_order():
    ode = sds.ODE(lambda x, t: -2.0 * t * x * x)
    inside = [0.111, 0.333, 0.777]
    errors = []
    for n in (8, 16, 32, 64):
        sol = sds.solve(ode, torch.ones(1, dtype=torch.float64), 0.0, 1.0, n, solver=sds.RK4(), save_at=inside)
        truth = 1 / (torch.tensor(inside, dtype=torch.float64) ** 2 + 1)
        errors.append((sol.xs[:, 0] - truth).abs().max().item())
    assert fitted_slope([1 / n for n in (8, 16, 32, 64)], errors) > 3.5
