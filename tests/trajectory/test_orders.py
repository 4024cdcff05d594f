"""Orders of convergence through fused runs; every outcome of a few steps with two-point increments."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

import sdesolve as sds

MU, SIGMA = 0.5, 0.8


def test_every_outcome_of_a_few_two_point_steps():
    """Four steps have 16 outcomes, and the fused run has each of them, as often as it should be within 5 deviations."""
    sde = sds.SDE(lambda x, t: MU * x, lambda x, t: SIGMA * x, noise="diagonal")
    paths = 40_000
    x = sds.solve(sde, torch.ones(paths, 1, dtype=torch.float64), 0.0, 1.0, 4, solver=sds.EulerMaruyama(), seed=3,
                  increments="two-point", backend="fused").x1  # fmt: skip
    for ups in range(5):
        a, b = 1 + MU / 4 + SIGMA / 2, 1 + MU / 4 - SIGMA / 2
        share = ((x - a**ups * b ** (4 - ups)).abs() < 1e-12).double().mean().item()
        chance = math.comb(4, ups) / 16
        assert abs(share - chance) < 5 * math.sqrt(chance * (1 - chance) / paths)


def test_strong_order_backwards_against_the_exact_solution():
    """Other schemes: solving/test_orders.py, in torch, and equal when fused. 4000 paths fix the slope to 0.05."""
    paths, steps, errors = 4000, [16, 32, 64, 128, 256, 512], []
    sde = sds.SDE(lambda x, t: MU * x, lambda x, t: SIGMA * x, noise="diagonal")
    for n in steps:
        path = sds.BrownianPath(7)
        W = path.increments(sds.grids.uniform(0, 1, n), (paths, 1), dtype=torch.float64).sum(0)
        x0 = torch.ones(paths, 1, dtype=torch.float64)
        x = sds.solve(sde, x0, 1.0, 0.0, n, solver=sds.Milstein(), noise=path, backend="fused").x1
        errors.append((x - torch.exp(-MU - 0.5 * SIGMA**2 + SIGMA * W)).abs().mean().item())
    assert abs(np.polyfit(np.log2([1 / n for n in steps]), np.log2(errors), 1)[0] - 1.0) < 0.1


@pytest.mark.parametrize("backend", ["fused", "eager", "auto"])
@pytest.mark.parametrize("kind", ["two-point", "three-point"])
def test_weak_increments_have_no_values_between_grid_points(kind, backend, interpreted, normals):
    sde = sds.SDE(lambda x, t: -x, lambda x, t: 0.1 * x)
    options = {"solver": sds.EulerMaruyama(), "seed": 1, "increments": kind, "save_at": [0.3], "backend": backend}
    with pytest.raises(ValueError, match="no values between grid points"):
        sds.solve(sde, normals(3, 1), 0.0, 1.0, 2, **options)
