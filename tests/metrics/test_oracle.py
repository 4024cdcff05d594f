"""Exact chain moments against recursions worked out by hand, closed forms, and Monte Carlo."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sdesolve import grids
from sdesolve.brownian import BrownianPath
from sdesolve.diffusions import EDM, OU, VP
from sdesolve.integrate.solve import solve
from sdesolve.metrics import bures_wasserstein
from sdesolve.oracle import chain_moments
from sdesolve.scores import Gaussian
from sdesolve.sde import ODE, SDE
from sdesolve.solvers import RK4, EulerMaruyama, Heun

B = torch.tensor([[1.0, 0.5, -0.2], [0.0, 0.7, 0.3]], dtype=torch.float64)
A = torch.tensor([[-1.0, 0.4], [-0.3, -2.0]], dtype=torch.float64)


def normal_law() -> Gaussian:
    return Gaussian(torch.tensor([1.0, -0.5]), torch.tensor([[1.0, 0.6], [0.6, 0.5]]))


@given(st.floats(0.05, 1.5), st.integers(1, 30), st.floats(-2.0, 2.0), st.floats(0.0, 3.0), st.booleans())
@settings(max_examples=25)
def test_euler_maruyama_on_ou_is_a_geometric_recursion(gamma, steps, mean, variance, diagonal):
    """x' = (1 - g) x + sqrt(2 g) z, whose stationary variance is 1 / (1 - g / 2)."""
    grid = grids.uniform(0.0, gamma * steps, steps)
    chain = chain_moments(OU(), EulerMaruyama(), grid, mean, variance, diagonal=diagonal, every_step=True)
    k, a, limit = torch.arange(steps + 1, dtype=torch.float64), 1 - gamma, 1 / (1 - gamma / 2)
    torch.testing.assert_close(chain.mean, mean * a**k, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(chain.cov.reshape(-1), limit + (variance - limit) * a ** (2 * k), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("steps", [1, 7])
def test_coupled_components_and_matrix_noise(steps):
    sde = SDE(lambda x, t: x @ A.mT + t, lambda x, t: B.expand(len(x), 2, 3), noise="general")
    grid = grids.uniform(1.0, 2.0, steps)
    law = normal_law()
    mean, cov = law.mean, law.cov
    for k in range(steps):
        dt = grid[k + 1] - grid[k]
        M = torch.eye(2, dtype=torch.float64) + dt * A
        mean, cov = M @ mean + grid[k] * dt, M @ cov @ M.mT + dt * B @ B.mT
    chain = chain_moments(sde, EulerMaruyama(), grid, law.mean, law.cov)
    torch.testing.assert_close(chain.mean, mean)
    torch.testing.assert_close(chain.cov, cov)


def test_one_noise_for_all_components_correlates_them():
    g = torch.tensor([1.0, 2.0], dtype=torch.float64)
    sde = SDE(lambda x, t: 0 * x, lambda x, t: g.expand_as(x), noise="scalar")
    grid = grids.uniform(0.0, 3.0, 4)
    torch.testing.assert_close(
        chain_moments(sde, EulerMaruyama(), grid, torch.zeros(2), 0.0).cov, 3 * torch.outer(g, g)
    )
    variances = chain_moments(sde, EulerMaruyama(), grid, torch.zeros(2), 0.0, diagonal=True).cov
    torch.testing.assert_close(variances, 3 * g.square())


@pytest.mark.parametrize("make", [lambda p, s: p.reverse(s), lambda p, s: p.probability_flow(s)], ids=["sde", "flow"])
@pytest.mark.parametrize("process", [VP(), EDM(sigma_max=10.0)], ids=["vp", "edm"])
def test_elementwise_and_full_modes_agree(process, make):
    law = Gaussian(torch.tensor([[1.0, 0.0], [-2.0, 0.5]]), torch.tensor([[0.1, 1.0], [2.0, 0.0]]))
    sde, grid = make(process, law.score(process)), process.time_grid(20)
    start = law.moments(process, process.t_max)
    full = chain_moments(sde, Heun(), grid, *start, every_step=True)
    fast = chain_moments(sde, Heun(), grid, *start, every_step=True, diagonal=True)
    torch.testing.assert_close(full.mean, fast.mean, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(
        full.cov.diagonal(dim1=1, dim2=2).reshape(fast.cov.shape), fast.cov, rtol=1e-9, atol=1e-12
    )
    assert full.mean.shape == fast.cov.shape == (21, 2, 2)
    assert full.cov.shape == (21, 4, 4)


@pytest.mark.parametrize(
    ("solver", "order"), [(EulerMaruyama(), 1.0), (Heun(), 2.0), (RK4(), 4.0)], ids=["euler", "heun", "rk4"]
)
def test_the_flow_of_gaussian_data_converges_at_the_order_of_the_solver(solver, order):
    law, process = normal_law(), VP()
    flow = process.probability_flow(law.score(process))
    start, end = law.moments(process, 0.9), law.moments(process, 0.1)
    errors = [
        float(bures_wasserstein(*chain_moments(flow, solver, grids.uniform(0.9, 0.1, n), *start), *end))
        for n in (64, 128, 256)
    ]
    assert math.log2(errors[1] / errors[2]) == pytest.approx(order, abs=0.12)
    assert math.log2(errors[0] / errors[1]) == pytest.approx(order, abs=0.25)


def test_the_reverse_sde_converges_weakly_at_order_one():
    law, process = Gaussian(torch.tensor([1.0, -0.5]), torch.tensor([1.0, 0.2])), VP()
    sde = process.reverse(law.score(process))
    start, end = law.moments(process, 0.9), law.moments(process, 0.1)
    chains = [
        chain_moments(sde, EulerMaruyama(), grids.uniform(0.9, 0.1, n), *start, diagonal=True) for n in (100, 200)
    ]
    errors = [float(bures_wasserstein(*chain, *end)) for chain in chains]
    assert math.log2(errors[0] / errors[1]) == pytest.approx(1.0, abs=0.1)


def test_monte_carlo_agrees():
    """The oracle and the noise that users get drive one sampler: its moments must agree within sampling error."""
    law, process, n = normal_law(), VP(), 20_000
    sde, grid = process.reverse(law.score(process)), process.time_grid(25)
    mean, cov = chain_moments(sde, EulerMaruyama(), grid, torch.zeros(2), 1.0)
    x0 = process.sample_prior((n, 2), seed=0, dtype=torch.float64)
    x = solve(sde, x0, grid=grid, solver=EulerMaruyama(), noise=BrownianPath(0)).x1
    assert bool(((x.mean(0) - mean).abs() < 6 * (cov.diag() / n).sqrt()).all())
    variances = cov.diag()
    spread = ((variances[:, None] * variances + cov.square()) / n).sqrt()  # Isserlis' theorem
    assert bool(((x.mT.cov() - cov).abs() < 6 * spread).all())


def test_many_rows_go_through_in_blocks(monkeypatch):
    law, process = normal_law(), VP()
    sde, start = process.reverse(law.score(process)), law.moments(process, 1.0)
    one = chain_moments(sde, EulerMaruyama(), process.time_grid(15), *start)
    monkeypatch.setattr("sdesolve.oracle.moments._BLOCK_ELEMENTS", 10)
    many = chain_moments(sde, EulerMaruyama(), process.time_grid(15), *start)
    torch.testing.assert_close(one.cov, many.cov)
    torch.testing.assert_close(one.mean, many.mean)


def test_an_ode_and_a_point_have_no_variance():
    chain = chain_moments(ODE(lambda x, t: -x), RK4(), grids.uniform(0.0, 1.0, 50), torch.ones(3), 0.0)
    torch.testing.assert_close(chain.mean, torch.full((3,), math.exp(-1.0), dtype=torch.float64), rtol=1e-8, atol=0)
    assert float(chain.cov.abs().max()) == 0.0


@pytest.mark.parametrize(
    ("sde", "diagonal"),
    [
        (SDE(lambda x, t: -(x**3), lambda x, t: 1.0, noise="additive"), False),
        (SDE(lambda x, t: -(x**3), lambda x, t: 1.0, noise="additive"), True),
        (SDE(lambda x, t: -x, lambda x, t: 0.3 * x, noise="diagonal"), False),
        (SDE(lambda x, t: -x.abs(), lambda x, t: 1.0, noise="additive"), False),
        (SDE(lambda x, t: -x.flip(1), lambda x, t: 1.0, noise="additive"), True),
        (ODE(lambda x, t: x.sin()), False),
    ],
    ids=["cubic", "cubic, elementwise", "multiplicative", "absolute value", "interacting", "sine"],
)
def test_a_chain_that_is_not_affine_is_refused(sde, diagonal):
    with pytest.raises(ValueError, match="this chain is not affine" + (".*diagonal=False" if diagonal else "")):
        chain_moments(sde, EulerMaruyama(), grids.uniform(0.0, 1.0, 5), torch.ones(2), 1.0, diagonal=diagonal)


def test_bad_input():
    grid = grids.uniform(0.0, 1.0, 3)
    with pytest.raises(ValueError, match="one grid for all rows"):
        chain_moments(OU(), EulerMaruyama(), grid[:, None].expand(4, 2), torch.zeros(2), 1.0)
    with pytest.raises(ValueError, match="cov0 must be a number or variances"):
        chain_moments(OU(), EulerMaruyama(), grid, torch.zeros(2), torch.eye(2), diagonal=True)
    with pytest.raises(ValueError, match="cov0 must be positive semi-definite"):
        chain_moments(OU(), EulerMaruyama(), grid, torch.zeros(2), -torch.eye(2))
    with pytest.raises(ValueError, match="mean0 must be finite"):
        chain_moments(OU(), EulerMaruyama(), grid, torch.tensor([math.nan]), 1.0)
    mixing = SDE(lambda x, t: -x, lambda x, t: B.expand(len(x), 2, 3), noise="general")
    with pytest.raises(ValueError, match="diffusion is a matrix"):
        chain_moments(mixing, EulerMaruyama(), grid, torch.zeros(2), 1.0, diagonal=True)
