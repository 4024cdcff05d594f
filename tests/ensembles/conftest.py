from __future__ import annotations

import pytest
import torch

import sdesolve as sds

PULL = torch.tensor(0.7)


def drift(x, t):
    return -PULL * x


def diffusion(x, t):
    return 0.2 * torch.ones_like(x)


SDE = sds.SDE(drift, diffusion, noise="diagonal")
X0 = torch.linspace(-1.0, 1.0, 46).reshape(23, 2)


def make(**options):
    given = {"solver": sds.EulerMaruyama(), "seed": 3, "block": 10} | options
    return sds.ensemble(SDE, given.pop("x0", X0), 0.0, 1.0, 8, **given)


@pytest.fixture(scope="session")
def whole():
    return sds.solve(SDE, X0, 0.0, 1.0, 8, solver=sds.EulerMaruyama(), seed=3, save_at=[0.3, 1.0])
