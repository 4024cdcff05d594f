"""Expectations known in closed form, of noise whose channels do not commute."""

from __future__ import annotations

import math

import pytest
import torch

import sdesolve as sds

ROOT = math.sqrt(2.0)


def linear_drift(x, t):
    a, b = x[:, 0], x[:, 1]
    return torch.stack([-273 / 512 * a, -a / 160 + (785 / 512 - ROOT / 8) * b], 1)


def linear_channels(x, t):
    a, b = x[:, 0], x[:, 1]
    rows = [a / 4, a / 16], [(1 - 2 * ROOT) / 4 * a, a / 10 + b / 16]
    return torch.stack([torch.stack(row, 1) for row in rows], 1)


@pytest.mark.parametrize("solver", [sds.W2Ito1(), sds.RI6(), sds.DRI1(), sds.NON()], ids=repr)
def test_moments_by_schemes_of_weak_order_two(solver):
    """Debrabant and Roessler 2009, example 2: from the matrix exponential of the moment equations.

    Four standard errors, and half a percent for the order of the scheme (at twice these steps: a tenth).
    """
    sde, n = sds.SDE(linear_drift, linear_channels, "general"), 20_000
    sde = sds.to_stratonovich(sde) if isinstance(solver, sds.NON) else sde
    x0 = torch.ones(n, 2, dtype=torch.float64)
    options = {"solver": solver, "seed": 5, "increments": "three-point", "backend": "eager"}
    a, b = sds.solve(sde, x0, 0.0, 1.0, 16, **options).x1.unbind(1)
    moments = [0.5867226107, 3.871394637, math.exp(-1.0), 2.166731045, 16.00088111]
    for sample, expected in zip((a, b, a * a, a * b, b * b), moments, strict=True):
        assert abs(float(sample.mean()) - expected) < 4 * float(sample.std()) / math.sqrt(n) + 0.005 * expected


def rotations(x, t):
    zero, (a, b, c) = torch.zeros_like(x[:, 0]), x.unbind(1)
    rows = [zero, -c, b], [c, zero, -a], [-b, a, zero]
    return 0.7 * torch.stack([torch.stack(row, 1) for row in rows], 1)


@pytest.mark.parametrize("solver", [sds.LogODE(), sds.SRI2("mrongowius-roessler", 2), sds.Milstein("foster")], ids=repr)
def test_brownian_motion_on_the_sphere(solver):
    """``dX = 0.7 X x o dW`` keeps ``|X|``; ``E cos = exp(-0.49)``, ``E cos^2 = (1 + 2 exp(-1.47)) / 3`` of its angle.

    Four standard errors, and what a step of 1/32 of order 1 allows: ``|X|^2`` is off by 0.7 of it.
    """
    sde = sds.SDE(lambda x, t: torch.zeros_like(x), rotations, "general", "stratonovich")
    x0, n = torch.tensor([[0.0, 0.0, 1.0]], dtype=torch.float64), 10_000
    x = sds.solve(sde, x0.repeat(n, 1), 0.0, 1.0, 32, solver=solver, seed=5, backend="eager").x1
    c = x[:, 2]
    for sample, expected in ((c, math.exp(-0.49)), (c * c, (1 + 2 * math.exp(-1.47)) / 3), (x.square().sum(1), 1.0)):
        assert abs(float(sample.mean()) - expected) < 4 * float(sample.std()) / math.sqrt(n) + 1 / 32
