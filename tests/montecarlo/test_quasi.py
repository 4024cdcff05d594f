"""Sobol points as Brownian paths: their balance, their addresses, their law, and what they are worth."""

from __future__ import annotations

import math

import pytest
import torch

import sdesolve as sds

EULER, STEPS = sds.EulerMaruyama(), 64
UNIT = torch.arange(3.0, dtype=torch.float64)
GEOMETRIC = sds.GeometricBrownianMotion(0.03, 0.2)
SOBOL = sds.BrownianPath(3, kind="sobol")


def uniforms(W):
    return 0.5 * torch.erfc(-W / math.sqrt(2.0))


@pytest.mark.parametrize(("first", "rows"), [(0, 64), (192, 64), (1024, 256)])
def test_blocks_are_balanced(first, rows):
    """In two channels of one step: one point in each of ``2^k`` boxes, of every shape. Sobol 1967."""
    u = uniforms(sds.BrownianPath(7, first, kind="sobol", horizon=1).increments(UNIT[:2], (rows, 2), dtype=UNIT.dtype))
    u, k = u[0], rows.bit_length() - 1
    for across in range(k + 1):
        sides = torch.tensor([2.0**across, 2.0 ** (k - across)], dtype=u.dtype)
        boxes = (u * sides).long()
        assert len((boxes[:, 0] * 2 ** (k - across) + boxes[:, 1]).unique()) == rows


def test_the_end_of_a_path_comes_first_and_then_its_middle():
    """64 ends lie one in each 64th of their law; so do the middles, given both ends; increments do not."""
    dW = sds.BrownianPath(1, kind="sobol", horizon=6).increments(sds.grids.uniform(0, 6, 6), (64,), dtype=UNIT.dtype)
    W = dW.cumsum(0)
    middle = (W[2] - 0.5 * W[5]) / math.sqrt(1.5)
    for values in (W[5] / math.sqrt(6.0), middle):
        assert len((64 * uniforms(values)).long().unique()) == 64
    assert all(len((64 * uniforms(step)).long().unique()) < 64 for step in dW)


@pytest.mark.parametrize(("horizon", "m", "substeps"), [(1, 1, 1), (7, 2, 1), (5, 3, 4)])
def test_paths_are_addressed_by_coordinates(horizon, m, substeps):
    """Rows, steps and views to the bit; coarse increments are the sums of fine ones."""
    path = sds.BrownianPath(5, 37, kind="sobol", substeps=substeps, horizon=horizon)
    grid, dtype = sds.grids.uniform(0, 1, horizon), torch.float64
    whole = path.increments(grid, (100, m), dtype=dtype)
    for k in range(horizon):
        assert torch.equal(path.rows(7).increments(grid[k : k + 2], (50, m), step=k, dtype=dtype)[0], whole[k, 7:57])
        assert torch.equal(path.after(k).increments(grid[k:], (100, m), dtype=dtype), whole[k:])
    fine = sds.BrownianPath(5, 37, kind="sobol", horizon=horizon * substeps)
    dw = fine.increments(sds.grids.uniform(0, 1, horizon * substeps), (100, m), dtype=dtype)
    torch.testing.assert_close(whole, dw.reshape(horizon, substeps, 100, m).sum(1), rtol=1e-12, atol=1e-13)
    assert torch.equal(path.antithetic().increments(grid, (100, m), dtype=dtype), -whole)


def test_each_path_is_brownian_over_scramblings():
    """Means and covariances of path 9 over 300 seeds: entries have sd ``sqrt(2 / 300)`` at most."""
    n, grid = 300, torch.tensor([0.0, 0.5, 2.0, 2.25])
    paths = (sds.BrownianPath(seed, 9, kind="sobol", horizon=3) for seed in range(n))
    z = torch.stack([p.increments(grid, (1, 2), dtype=torch.float64) for p in paths]).reshape(n, 3, 2)
    z = (z / grid.double().diff().sqrt()[:, None]).flatten(1)
    assert float(z.mean(0).abs().max()) < 5 / math.sqrt(n)
    assert float((z.T @ z / n - torch.eye(6)).abs().max()) < 5 * math.sqrt(2 / n)


def test_beyond_the_table_are_ordinary_normals():
    """12,000 steps of two channels: the last 2,799 dimensions of 24,000, all of them on the finest level."""
    horizon, n = 12_000, 16
    path, grid = SOBOL.over(horizon), sds.grids.uniform(0, horizon, horizon)
    dW = path.increments(grid, (n, 2), dtype=torch.float64)
    assert abs(float(dW.square().mean()) - 1.0) < 5 * math.sqrt(2 / dW.numel())
    assert torch.equal(path.increments(grid[11_990:11_996], (n, 2), step=11_990, dtype=dW.dtype), dW[11_990:11_995])
    assert len(dW[-100:].unique()) == dW[-100:].numel()


def asian():
    """Log-price, and the integral of the price, of Black and Scholes's model at volatility 0.2 and rate 0.05."""
    drift = lambda x, t: torch.stack([torch.full_like(x[:, 0], 0.03), x[:, 0].exp()], 1)  # noqa: E731
    G = torch.tensor([[[0.2], [0.0]]], dtype=torch.float64)
    x0 = torch.tensor([[math.log(100.0), 0.0]], dtype=torch.float64)
    return sds.SDE(drift, lambda x, t: G, "additive"), x0, lambda x: math.exp(-0.05) * (x[:, 1] - 100.0).clamp(min=0)


def test_an_asian_call_takes_thirty_times_fewer_paths():
    """Of 64 steps; 550 times are measured at 1024 paths. The value is that of as many steps by ordinary paths."""
    sde, x0, call = asian()
    price = sds.quasi_monte_carlo(sde, x0, 0.0, 1.0, call, steps=STEPS, solver=EULER, paths=1024, seed=1)
    assert float(price.gain) > 30
    assert price.estimates.shape == (16,)
    plain = call(sds.solve(sde, x0.repeat(50_000, 1), 0.0, 1.0, STEPS, solver=EULER, seed=2, backend="eager").x1)
    error = math.hypot(float(plain.std()) / math.sqrt(len(plain)), float(price.standard_error))
    assert abs(float(price.estimate) - float(plain.mean())) < 4 * error


def test_standard_errors_and_intervals():
    """``E X`` of Euler's scheme is ``(1 + 0.03 / 8)^8``, for each start; of 20 intervals at 80%, 16 and 5 sd of 1.8."""
    x0, inside = torch.tensor([[1.0], [2.0]], dtype=torch.float64), 0
    exact = x0[:, 0] * (1.0 + 0.03 / 8) ** 8
    for seed in range(20):
        made = sds.quasi_monte_carlo(
            GEOMETRIC, x0, 0.0, 1.0, lambda x: x[:, 0], steps=8, solver=EULER, paths=64, randomisations=8, seed=seed
        )
        low, high = made.interval(0.8)
        assert bool(((made.estimate - exact).abs() < 8 * made.standard_error).all())
        inside += int(((low < exact) & (exact < high))[0])
    assert made.estimate.shape == (2,)
    assert 16 - 5 * 1.8 < inside <= 20


def test_solve_lays_paths_over_its_grid():
    x0, options = torch.ones(64, 2, dtype=torch.float64), {"solver": EULER}
    whole = sds.solve(GEOMETRIC, x0, 0.0, 1.0, 8, noise=SOBOL, **options)
    assert whole.stats.execution == "eager"
    assert "Sobol points" in whole.stats.reason
    assert torch.equal(whole.x1, sds.solve(GEOMETRIC, x0, 0.0, 1.0, 8, seed=3, increments="sobol", **options).x1)
    first = sds.solve(GEOMETRIC, x0, 0.0, 0.5, 4, noise=sds.BrownianPath(3, kind="sobol", horizon=8), **options)
    assert torch.equal(sds.solve(GEOMETRIC, start=first.state, t1=1.0, steps=4, **options).x1, whole.x1)
    short = sds.solve(GEOMETRIC, x0, 0.0, 0.5, 4, noise=SOBOL, **options)
    with pytest.raises(ValueError, match="has horizon=4 steps in all, and this run ends at step 8; give"):
        sds.solve(GEOMETRIC, start=short.state, t1=1.0, steps=4, **options)
    rows = sds.solve(GEOMETRIC, x0[:2], 0.0, 1.0, 8, noise=sds.BrownianRows(3, [5, 60], kind="sobol"), **options)
    assert torch.equal(rows.x1, whole.x1[[5, 60]])
    between = sds.solve(GEOMETRIC, x0, 0.0, 1.0, 8, noise=SOBOL, save_at=[0.3, 1.0], **options)
    assert torch.equal(between.xs[1], whole.x1)


def test_what_sobol_paths_cannot_do():
    with pytest.raises(ValueError, match="has no horizon and was asked for step 1; give BrownianPath"):
        SOBOL.increments(UNIT, (4, 1))
    with pytest.raises(ValueError, match=r"a Sobol sequence has 2\^30 points"):
        sds.BrownianPath(0, 2**30 - 2, kind="sobol", horizon=2).increments(UNIT, (4, 1))
    arguments = {"steps": 2, "solver": EULER, "payoff": lambda x: x[:, 0]}
    for changed, message in (
        ({"paths": 1000}, "a power of 2, .* got 1000; take 1024"),
        ({"randomisations": 1}, "randomisations must be at least 2"),
        ({"payoff": lambda x: x.mean()}, "must have a row for each"),
    ):
        with pytest.raises(ValueError, match=message):
            sds.quasi_monte_carlo(GEOMETRIC, torch.ones(1, 1), 0.0, 1.0, **{**arguments, **changed})
