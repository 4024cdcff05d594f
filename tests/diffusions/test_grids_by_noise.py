"""Grids by noise level, and the inverse of the log-SNR they are mapped to time with."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from sdesolve import grids
from sdesolve.diffusions import EDM, OU, VE, VP, CosineBeta, LinearBeta, LinearDiffusion, SubVP, inverse_log_snr

PROCESSES = [
    *(VP(), VP(CosineBeta()), VP(LinearBeta(3.0, 3.0)), SubVP(), SubVP(CosineBeta()), VE(), OU(), OU(0.3, 2.0), EDM()),
    LinearDiffusion(lambda t: 1 - t, lambda t: t, t_max=0.999),
]
processes = st.sampled_from(PROCESSES)
fractions = st.floats(1e-6, 1.0)


def level(process, t):
    """``sigma / alpha``."""
    return process.sigma(t) / process.alpha(t)


@pytest.mark.parametrize("process", PROCESSES, ids=[f"{type(p).__name__}{i}" for i, p in enumerate(PROCESSES)])
def test_the_inverse_of_the_log_snr(process):
    """Closed forms and bisection to the rounding of the log-SNR, whose condition number here is below 20."""
    t = process.t_max * torch.logspace(-8, 0, 200, dtype=torch.float64)
    for inverse in (process.time_at_log_snr, lambda v: inverse_log_snr(process, v)):
        torch.testing.assert_close(inverse(process.log_snr(t)), t, rtol=1e-14, atol=0)
        assert inverse(process.log_snr(t).float()).dtype == torch.float32
        assert float(inverse(math.inf)) == 0.0
        assert inverse(process.log_snr(process.t_max)).shape == ()


GRIDS = {
    "log_snr": (grids.uniform_log_snr, lambda p, t: p.log_snr(t)),
    "sigma": (grids.uniform_sigma, level),
    "karras": (grids.karras_sigma, lambda p, t: level(p, t) ** (1 / 7)),
}


@given(st.sampled_from(list(GRIDS)), processes, fractions, fractions, st.integers(1, 60))
def test_steps_are_equal_in_what_they_are_said_to_be(kind, process, u, w, steps):
    assume(max(u, w) > 1.01 * min(u, w))
    t0, t1 = u * process.t_max, w * process.t_max
    make, coordinate = GRIDS[kind]
    grid = make(process, steps, t0=t0, t1=t1)
    assert grid.dtype == torch.float64
    assert (float(grid[0]), float(grid[-1])) == (t0, t1)
    assert bool((grid.diff() * math.copysign(1.0, t1 - t0) > 0).all())
    y = coordinate(process, grid)
    torch.testing.assert_close(
        y.diff(), ((y[-1] - y[0]) / steps).expand(steps), rtol=1e-6, atol=1e-9 * float(y.abs().max())
    )


@settings(max_examples=20)
@given(st.sampled_from(list(GRIDS)), processes)
def test_by_default_a_grid_spans_the_working_interval_of_the_process(kind, process):
    grid = GRIDS[kind][0](process, 12)
    assert (float(grid[0]), float(grid[-1]), len(grid)) == (process.t_max, process.t_min, 13)


def test_on_edm_they_are_grids_in_time():
    process = EDM()
    for made, expected in (
        (grids.karras_sigma(process, 20), grids.karras(80.0, 0.002, 20)),
        (grids.karras_sigma(process, 20, t1=0.0, rho=3.0), grids.karras(80.0, 0.0, 20, rho=3.0)),
        (grids.uniform_sigma(process, 20), grids.uniform(80.0, 0.002, 20)),
        (grids.uniform_log_snr(process, 20), grids.geometric(80.0, 0.002, 20)),
    ):
        torch.testing.assert_close(made, expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("make", [grids.uniform_sigma, grids.karras_sigma])
def test_grids_in_sigma_may_end_at_zero_or_start_there(make):
    for process in PROCESSES:
        down = make(process, 9, t1=0.0)
        assert float(down[-1]) == 0.0
        torch.testing.assert_close(make(process, 9, t0=0.0, t1=process.t_max), down.flip(0), rtol=1e-9, atol=1e-14)


@given(st.floats(0.0, 5.0), st.floats(0.0, 5.0), st.integers(1, 50))
def test_quadratic_steps_are_equal_in_the_root(t0, t1, steps):
    assume(abs(t0 - t1) > 1e-3)
    grid = grids.quadratic(t0, t1, steps)
    assert (float(grid[0]), float(grid[-1])) == (t0, t1)
    k = torch.arange(steps + 1, dtype=torch.float64) / steps
    torch.testing.assert_close(grid, (math.sqrt(t0) + k * (math.sqrt(t1) - math.sqrt(t0))) ** 2)


def test_a_final_zero():
    grid = grids.karras(80.0, 0.002, 17)
    assert torch.equal(grids.with_zero(grid), torch.cat([grid, torch.zeros(1, dtype=torch.float64)]))
    rows = torch.tensor([[2.0, 3.0], [1.0, 2.5]])
    assert torch.equal(grids.with_zero(rows)[-1], torch.zeros(2, dtype=torch.float64))
    for bad in (grid.flip(0), torch.tensor([1.0, 0.0]), torch.tensor([1.0, -1.0])):
        with pytest.raises(ValueError, match="0 can end a grid of decreasing positive times"):
            grids.with_zero(bad)


FLAT = LinearDiffusion(torch.ones_like, lambda t: 0.1 + torch.where(t < 0.5, t, 0.5), t_min=0.1)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: grids.uniform_log_snr(VP(), 0), ValueError, "steps must be at least 1"),
        (lambda: grids.uniform_log_snr(VP(), 5, t1=0.0), ValueError, "above 0.*with_zero"),
        (lambda: grids.uniform_log_snr(VP(), 5, t0=1.5), ValueError, r"within \[0, t_max = 1.0\], got t0=1.5"),
        (lambda: grids.karras_sigma(EDM(), 5, t0=-1.0), ValueError, r"within \[0, t_max"),
        (lambda: grids.karras_sigma(EDM(), 5, t0=math.nan), ValueError, r"within \[0, t_max"),
        (lambda: grids.karras_sigma(EDM(), 5, rho=0.0), ValueError, "rho must be a positive number"),
        (lambda: grids.uniform_sigma(EDM(), 5, t0=1.0, t1=1.0), ValueError, "must differ"),
        (lambda: grids.uniform_sigma(EDM(), 5.0), TypeError, "steps must be an integer"),
        (lambda: grids.uniform_sigma(80.0, 5), TypeError, r"linear diffusion such as VP\(\)"),
        (lambda: grids.uniform_sigma(FLAT, 5, t0=0.9, t1=0.6), ValueError, "is the same at t0=0.9 and t1=0.6"),
        (lambda: grids.uniform_log_snr(FLAT, 5, t0=0.9, t1=0.6), ValueError, "does not match the process"),
        (lambda: grids.quadratic(-1.0, 1.0, 5), ValueError, "at least 0"),
    ],
)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()
