"""Discretised chains and reverse processes against laws known in closed form."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import sdesolve as sds
from sdesolve.brownian import AbstractNoise
from sdesolve.scores.gaussian import Gaussian

PROCESSES = {
    "vp": sds.VP(),
    "cosine": sds.VP(sds.CosineBeta()),
    "ve": sds.VE(0.02, 20.0, t_min=1e-3),
    "subvp": sds.SubVP(),
    "ou": sds.OU(t_min=0.01),
    "edm": sds.EDM(),
    "straight": sds.LinearDiffusion(alpha=lambda t: 1 - t, sigma=lambda t: t, t_min=0.01, t_max=0.99),
}


class UnitNoise(AbstractNoise):
    """Row ``k + 1`` gets one standard deviation of noise in step ``k``, none elsewhere: transfer coefficients."""

    def increments(self, times, shape, *, step=0, dtype=torch.float64, device=None):
        dW = torch.zeros(len(times) - 1, *shape, dtype=dtype)
        for k, dt in enumerate(times.diff().abs()):
            dW[k, step + k + 1] = dt.sqrt()
        return dW

    def bridge(self, step, theta, shape, *, dtype=torch.float64, device=None):
        raise AssertionError("nothing is saved between grid points here")


def chain_variance(sde, solver, grid, variance):
    """Exact variances of a scalar-linear chain: squares of its responses to unit start and unit noises."""
    n = len(grid) - 1
    noises = torch.zeros(n + 1, len(variance), dtype=torch.float64)
    response = sds.solve(sde, noises, grid=grid, solver=solver, noise=UnitNoise()).x1
    origin = response[:1] * 0
    started = sds.solve(sde, torch.ones_like(noises), grid=grid, solver=solver, noise=UnitNoise()).x1[:1] - response[:1]
    assert torch.equal(response[:1], origin)
    return started[0].square() * variance + response[1:].square().sum(0)


@given(gamma=st.floats(0.01, 1.2), n=st.integers(1, 60))
def test_euler_maruyama_on_ou_has_the_exact_chain_variance(gamma, n):
    """From ``v_0``: ``v_n = v + (1 - gamma)^(2n) (v_0 - v)`` with ``v = 1 / (1 - gamma / 2)``."""
    ou = sds.OU(t_max=1000.0)
    grid = torch.arange(n + 1, dtype=torch.float64) * gamma
    v0 = torch.tensor([0.0, 1.0, 5.0], dtype=torch.float64)
    v = 1 / (1 - gamma / 2)
    expected = v + (1 - gamma) ** (2 * n) * (v0 - v)
    torch.testing.assert_close(chain_variance(ou, sds.EulerMaruyama(), grid, v0), expected, rtol=1e-9, atol=1e-12)


def test_euler_maruyama_on_ou_samples_its_stationary_law():
    """Samples are ``N(0, I / (1 - gamma / 2))``, which at gamma = 0.4 is 25% from the SDE's own variance."""
    gamma, n = 0.4, 100_000
    x0 = torch.zeros(n, 2, dtype=torch.float64)
    x = sds.solve(sds.OU(), x0, 0.0, 60 * gamma, 60, solver=sds.EulerMaruyama(), seed=3).x1
    v = 1 / (1 - gamma / 2)
    assert x.mean(0).abs().max() < 5 * math.sqrt(v / n)
    assert (x.var(0) / v - 1).abs().max() < 5 * math.sqrt(2 / n)
    assert abs(torch.corrcoef(x.T)[0, 1]) < 5 / math.sqrt(n)
    kurtosis = (x**4).mean(0) / (x**2).mean(0) ** 2
    assert (kurtosis - 3).abs().max() < 5 * math.sqrt(24 / n)


@pytest.mark.parametrize("name", PROCESSES)
def test_the_gaussian_probability_flow_is_the_closed_form(name):
    """Fourth order on a grid that suits the process; both ways round the exact map is reached."""
    process = PROCESSES[name]
    data = Gaussian(torch.tensor([1.0, -2.0, 0.5]), torch.tensor([1.0, 0.25, 4.0]))
    flow, ode = data.flow(process), process.probability_flow(data.score(process))
    x = torch.randn(5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * process.prior.std
    errors = []
    for n in (100, 200, 400):
        grid = (
            process.time_grid(n)
            if name in ("edm", "ve", "ou")
            else sds.grids.karras(process.t_max, process.t_min, n, 3)
        )
        exact = flow(x, float(grid[0]), float(grid[-1]))
        y = sds.solve(ode, x, grid=grid, solver=sds.RK4()).x1
        errors.append((y - exact).abs().max().item())
        back = sds.solve(ode, y, grid=grid.flip(0), solver=sds.RK4()).x1
        assert (back - x).abs().max() / process.prior.std < max(1e-8, 100 * errors[-1])
    slope = -np.polyfit([0, 1, 2], np.log2(errors), 1)[0]
    assert errors[-1] < 1e-3
    assert slope > 3.5 or errors[-1] < 1e-11


@pytest.mark.parametrize("stochasticity", [1.0, 0.5, 1.5])
@pytest.mark.parametrize("name", ["vp", "cosine", "subvp", "ou", "straight"])
def test_reverse_sdes_carry_the_exact_marginals(name, stochasticity):
    """From the exact marginal at the top, the chain's variance at the bottom tends to the exact one, order 1."""
    process = PROCESSES[name]
    lam = torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64)
    data = Gaussian(torch.zeros(3), lam)
    sde = process.reverse(data.score(process), stochasticity)
    top, bottom = 0.6 * process.t_max, 0.2 * process.t_max
    start, end = data.moments(process, top).cov, data.moments(process, bottom).cov
    errors = []
    for n in (50, 100, 200):
        v = chain_variance(sde, sds.EulerMaruyama(), sds.grids.uniform(top, bottom, n), start)
        errors.append((v / end - 1).abs().max().item())
    slope = -np.polyfit([0, 1, 2], np.log2(errors), 1)[0]
    assert errors[-1] < 0.02
    assert abs(slope - 1) < 0.15


def test_reversal_with_a_matrix_diffusion():
    """``dX = G dW`` with correlated noise: from the marginal ``C + t G G^T`` back to ``C``; the flow agrees too."""
    G = torch.tensor([[1.0, 0.5, 0.0], [0.2, -0.3, 0.7]], dtype=torch.float64)
    C = torch.tensor([[1.0, 0.3], [0.3, 0.5]], dtype=torch.float64)
    forward = sds.SDE(lambda x, t: torch.zeros_like(x), lambda x, t: G.expand(len(x), 2, 3), noise="additive")

    def score(x, t):
        return -torch.linalg.solve(C + t * G @ G.T, x.T).T

    n, top = 40_000, 1.0
    L = torch.linalg.cholesky(C + top * G @ G.T)
    z = sds.BrownianPath(0, stream=1).increments(sds.grids.uniform(0, 1, 1), (n, 2), dtype=torch.float64)[0]
    x0 = z @ L.T
    for backward, solver, steps in (
        (sds.ReverseSDE(forward, score), sds.EulerMaruyama(), 200),
        (sds.ReverseSDE(forward, score), sds.Heun(), 50),
        (sds.ProbabilityFlow(forward, score), sds.RK4(), 20),
    ):
        x = sds.solve(backward, x0, top, 0.0, steps, solver=solver, seed=4).x1
        # entries of a sample covariance have sd below sqrt(2) max variance / sqrt(n); 0.02 is the step-size bias
        assert (x.T @ x / n - C).abs().max() < 5 * math.sqrt(2 / n) + 0.02
