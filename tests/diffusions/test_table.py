"""Schedules by a table of alphas_cumprod: DDIM on them is the published recursion, for every spacing of steps."""

import math

import numpy as np
import pytest
import torch

import sdesolve as sds
from sdesolve import grids

BETAS = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64).square()
TABLE = (1.0 - BETAS).cumprod(0)
GENERATOR = torch.Generator().manual_seed(0)
FIRST, SECOND = (torch.randn(*s, dtype=torch.float64, generator=GENERATOR) / 3 for s in ((5, 16), (16, 4)))
X = torch.randn(8, 4, dtype=torch.float64, generator=GENERATOR)


def network(x, k):
    """Some function of a state and a step counted from 0."""
    return torch.tanh(torch.cat([x, k[:, None] / 1000], 1) @ FIRST) @ SECOND


def ddim(x, steps, table, predicts):
    """Song, Meng and Ermon 2021, eq. 12 with eta = 0, from step to step of the table; after the last, to clean data."""
    levels = [table[k] for k in steps] + [torch.ones((), dtype=torch.float64)]
    for k, a, b in zip(steps, levels, levels[1:], strict=False):
        F = network(x, torch.full((len(x),), float(k), dtype=torch.float64))
        if predicts == "noise":
            z, x0 = F, (x - (1 - a).sqrt() * F) / a.sqrt()
        else:
            z, x0 = a.sqrt() * F + (1 - a).sqrt() * x, a.sqrt() * x - (1 - a).sqrt() * F
        x = b.sqrt() * x0 + (1 - b).sqrt() * z
    return x


def spaced(n, spacing):
    """Steps of a chain of 1000 from 0 to 999, last first, in the code of diffusers."""
    if spacing == "leading":
        return [int(k) for k in (np.arange(0, n) * (1000 // n)).round()[::-1]]
    if spacing == "trailing":
        return [int(k) for k in np.round(np.arange(1000, 0, -1000 / n)) - 1]
    return [int(k) for k in np.linspace(0, 999, n).round()[::-1]]


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("n", [2, 7, 50])
@pytest.mark.parametrize(("predicts", "zero"), [("noise", False), ("velocity", False), ("velocity", True)])
def test_ddim_on_a_table_is_the_published_recursion(spacing, n, predicts, zero):
    process = sds.VP(sds.TableBeta(TABLE, zero_terminal_snr=zero))
    table = process.alpha(torch.arange(1, 1001, dtype=torch.float64)).square()
    if not zero:
        torch.testing.assert_close(table, TABLE, rtol=1e-14, atol=0)
    score = sds.NetworkScore(lambda x, t: network(x, t - 1), process, predicts)
    grid = grids.timesteps(1000, n, spacing)
    assert [int(t) - 1 for t in grid] == [*spaced(n, spacing), -1]
    flow = process.probability_flow(score)
    x = sds.solve(flow, X, grid=grid, solver=sds.DDIM(), backend="eager").x1
    expected = ddim(X, spaced(n, spacing), table, predicts)
    torch.testing.assert_close(x, expected, rtol=1e-9, atol=1e-9)


def test_zero_terminal_snr_is_rescaled_as_published_and_refused_to_noise():
    process = sds.VP(sds.TableBeta(TABLE, zero_terminal_snr=True))
    alpha = TABLE.sqrt()
    by_hand = (alpha - alpha[-1]) * alpha[0] / (alpha[0] - alpha[-1])  # Lin et al. 2024, algorithm 1
    torch.testing.assert_close(process.alpha(torch.arange(1, 1001, dtype=torch.float64)), by_hand, rtol=1e-12, atol=0)
    assert float(process.alpha(1000.0)) == 0.0
    noise = sds.NetworkScore(lambda x, t: network(x, t - 1), process, "noise")
    grid = grids.timesteps(1000, 10, "trailing")
    with pytest.raises(ValueError, match=r"VP has alpha = 0 at t = 1000, .* predicts data, velocity or flow"):
        sds.solve(process.probability_flow(noise), X, grid=grid, solver=sds.DDIM())


@pytest.mark.parametrize("zero", [False, True])
def test_between_its_steps_a_table_is_a_process_like_others(zero):
    process = sds.VP(sds.TableBeta(TABLE, zero_terminal_snr=zero))
    t = torch.linspace(0.01, 999.9, 777, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(process.schedule.integral(t).sum(), t)
    torch.testing.assert_close(slope, process.squared_diffusion(t.detach()), rtol=1e-9, atol=0)
    t = t.detach()
    torch.testing.assert_close(process.time_at_log_snr(process.log_snr(t)), t, rtol=0, atol=1e-9)
    assert bool((process.log_snr(t).diff() < 0).all())
    exact = process.alpha(t)
    torch.testing.assert_close(process.alpha(t.float()), exact.float(), rtol=2e-5, atol=1e-7)
    whole = torch.arange(1, 1001)
    rate = process.squared_diffusion(torch.tensor(7.0, dtype=torch.float64))  # at a step, that of the interval before
    levels = process.alpha(torch.tensor([6.0, 7.0], dtype=torch.float64)).square().log()
    torch.testing.assert_close(rate, levels[0] - levels[1])
    torch.testing.assert_close(process.alpha(whole.float()), process.alpha(whole.double()).float(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("solver", [sds.DPMSolverPP(2), sds.EulerMaruyama(), sds.DDIM()])
def test_samples_by_a_table_are_data(solver):
    process, n = sds.VP(sds.TableBeta(TABLE)), 4000
    score = sds.Gaussian(torch.tensor([1.0, -1.0]), 0.25).score(process)
    x = sds.sample(process, score, (n, 2), solver=solver, steps=250, seed=0, backend="eager")
    # 4.5 standard errors; 0.07 of the mean is left at the end, and shrinks as the samples do
    assert float((x.mean(0) - torch.tensor([1.0, -1.0])).abs().max()) < 4.5 * 0.5 / math.sqrt(n) + 0.03
    assert float((x.std(0) - 0.5).abs().max()) < 4.5 * 0.5 / math.sqrt(2 * n) + 0.02


def test_grids_of_a_table_are_whole_steps():
    process = sds.VP(sds.TableBeta(TABLE))
    grid = process.time_grid(7)
    assert torch.equal(grid, grid.round())
    assert (float(grid[0]), float(grid[-1]), len(grid)) == (1000.0, 1.0, 8)
    assert grids.timesteps(1000, 4, offset=1, to_zero=False).tolist() == [752.0, 502.0, 252.0, 2.0, 1.0]
    assert grids.timesteps(1000, 4, to_zero=False).tolist() == [751.0, 501.0, 251.0, 1.0]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: sds.TableBeta(BETAS), r"must decrease .* entry 1 is .*betas are made one by \(1 - betas\).cumprod"),
        (lambda: sds.TableBeta(TABLE.flip(0)), "must decrease from below 1 to at least 0, and entry 1 is"),
        (lambda: sds.TableBeta(torch.tensor([1.0, 0.5])), "entry 0 is 1 after 1"),
        (lambda: sds.TableBeta(torch.tensor([0.5, -0.1])), "entry 1 is -0.1 after 0.5"),
        (lambda: sds.TableBeta(TABLE[None]), r"must be \(steps,\) .* got shape \(1, 1000\)"),
        (lambda: grids.timesteps(10, 11), "a chain of 10 steps has no 11 of them"),
        (lambda: grids.timesteps(10, 5, "even"), "spacing='even' is unknown"),
        (lambda: grids.timesteps(10, 10, offset=1), r"leads to step 10, and the chain has 0 ... 9"),
        (lambda: sds.VP(sds.TableBeta(TABLE)).time_grid(1000), "has at most 999 between its ends, got 1000"),
    ],
)
def test_bad_input(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_the_integral_at_one_time_has_the_bits_of_that_at_many():
    table = sds.TableBeta((1 - torch.linspace(1e-4, 0.05, 40)).cumprod(0))
    ending = sds.TableBeta(torch.tensor([0.9, 0.5, 0.0]))
    for schedule in (table, ending):
        for dtype in (torch.float64, torch.float32):
            times = torch.cat([torch.linspace(0, schedule.t_max, 41), torch.arange(schedule.t_max + 1)]).to(dtype)
            many = schedule.integral(times)
            assert all(torch.equal(schedule.integral(t), b) for t, b in zip(times, many, strict=True))
    t = torch.tensor(7.25, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(table.integral(t), t)
    torch.testing.assert_close(slope, table.beta(t.detach()))
    rows = torch.func.vmap(table.integral)(torch.tensor([1.5, 2.5]).double())
    assert torch.equal(rows, table.integral(torch.tensor([1.5, 2.5]).double()))
