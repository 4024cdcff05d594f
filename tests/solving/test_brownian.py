"""Brownian paths: coordinates, coupling of resolutions, bridges. Known faults of other libraries among them."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sdesolve_kernels import Stream, normal

import sdesolve as sds

seeds = st.integers(0, 2**64 - 1)
shapes = st.sampled_from([(5,), (5, 3), (5, 2, 3), (5, 1, 1, 2)])


@given(seed=seeds, shape=shapes, first_path=st.integers(0, 2**40), first_step=st.integers(0, 2**30))
def test_increments_are_the_stated_normals(seed, shape, first_path, first_step):
    grid = sds.grids.geometric(0.3, 2.0, 4)
    dW = sds.BrownianPath(seed, first_path, first_step).increments(grid, shape, dtype=torch.float64)
    m = math.prod(shape[1:])
    for k in range(4):
        z = normal(5, m, seed=seed, first_path=first_path, offset=(first_step + k) * m, dtype=torch.float64)
        torch.testing.assert_close(dW[k].reshape(5, m), z * (grid[k + 1] - grid[k]).sqrt(), rtol=1e-15, atol=0)


@given(
    seed=seeds,
    shape=shapes,
    row=st.integers(0, 4),
    step=st.integers(0, 3),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_rows_and_steps_of_a_path_are_those_of_the_batch_to_the_bit(seed, shape, row, step, dtype):
    grid = sds.grids.uniform(0, 1, 5)
    path = sds.BrownianPath(seed, first_path=7)
    whole = path.increments(grid, shape, dtype=dtype)
    part = path.rows(row).after(step).increments(grid[step:], (5 - row, *shape[1:]), dtype=dtype)
    assert torch.equal(whole[step:, row:], part)
    assert torch.equal(path.increments(grid[step:], shape, step=step, dtype=dtype), whole[step:])


@given(seed=seeds, substeps=st.integers(2, 9), shape=shapes)
def test_coarse_increments_are_sums_of_fine_ones(seed, substeps, shape):
    coarse = sds.BrownianPath(seed, first_step=3, substeps=substeps)
    fine = sds.BrownianPath(seed, first_step=3 * substeps)
    dW = coarse.increments(sds.grids.uniform(0, 1, 4), shape, dtype=torch.float64)
    dw = fine.increments(sds.grids.uniform(0, 1, 4 * substeps), shape, dtype=torch.float64)
    torch.testing.assert_close(dW, dw.reshape(4, substeps, *shape).sum(1), rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize("kind", [np.uint8, np.int64, torch.tensor])
def test_integers_of_other_libraries_are_the_same_coordinates(kind):
    """As they came, a uint8 wrapped at 256 and led to another path."""
    where = {"first_path": 250, "first_step": 200, "substeps": 3}
    path = sds.BrownianPath(kind(7), **{name: kind(value) for name, value in where.items()})
    assert path == sds.BrownianPath(7, **where)
    assert path.rows(kind(10)).first_path == 260
    grid = sds.grids.uniform(0, 1, 3)
    assert torch.equal(path.increments(grid, (2, 3)), sds.BrownianPath(7, **where).increments(grid, (2, 3)))


@pytest.mark.parametrize(
    ("name", "most"),
    [("seed", 2**64), ("first_path", 2**64), ("first_step", 2**58), ("substeps", 2**58), ("stream", 256)],
)
def test_coordinates_that_no_number_has_are_refused_at_once(name, most):
    sds.BrownianPath(**{"seed": 0, name: most - 1})
    with pytest.raises(ValueError, match=rf"{name} must be below 2\^{most.bit_length() - 1}, got {most}"):
        sds.BrownianPath(**{"seed": 0, name: most})


def test_the_sum_over_substeps_has_the_same_bits_for_every_batch():
    grid = sds.grids.uniform(0, 1, 300)
    path = sds.BrownianPath(1, substeps=64)
    whole = path.increments(grid, (1000, 1))
    assert torch.equal(whole[:, 999:], path.rows(999).increments(grid, (1, 1)))


def test_float32_and_float64_are_one_path():
    grid = sds.grids.uniform(0, 1, 8)
    a = sds.BrownianPath(0).increments(grid, (100, 3), dtype=torch.float32)
    b = sds.BrownianPath(0).increments(grid, (100, 3), dtype=torch.float64)
    torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-6)


def test_tiny_and_late_steps_get_their_own_increments():
    """Peers key noise on a float time: equal increments for neighbouring steps, or endless recursion."""
    grid = 1e6 + torch.arange(6, dtype=torch.float64) * 1e-9
    dW = sds.BrownianPath(0).increments(grid, (1000,), dtype=torch.float64)
    assert len(dW.unique()) == dW.numel()
    # chi-squared over the realised steps: 5000 degrees of freedom, 5 standard deviations
    scaled = (dW / grid.diff().sqrt()[:, None]).square().sum()
    assert abs(scaled - 5000) < 5 * math.sqrt(2 * 5000)


@given(seed=seeds, theta=st.floats(0, 1), substeps=st.integers(1, 4))
def test_bridge_vanishes_at_grid_points_and_is_repeatable(seed, theta, substeps):
    path = sds.BrownianPath(seed, substeps=substeps)
    kwargs = {"shape": (3, 2), "dtype": torch.float64}
    assert torch.equal(path.bridge(5, 0.0, **kwargs), torch.zeros(3, 2, dtype=torch.float64))
    torch.testing.assert_close(
        path.bridge(5, 1.0, **kwargs), torch.zeros(3, 2, dtype=torch.float64), atol=1e-14, rtol=0
    )
    value = path.bridge(5, theta, **kwargs)
    assert torch.equal(value, path.bridge(5, theta, **kwargs))
    assert torch.equal(value[1:], path.rows(1).bridge(5, theta, shape=(2, 2), dtype=torch.float64))


@pytest.mark.parametrize("substeps", [1, 3])
def test_bridge_has_the_covariance_of_a_brownian_bridge(substeps):
    n = 40_000
    path = sds.BrownianPath(11, substeps=substeps)
    thetas = [0.1, 0.25, 1 / 3, 0.5, 0.50001, 0.9]
    b = torch.stack([path.bridge(2, s, (n,), dtype=torch.float64) for s in thetas])
    dW = path.increments(torch.tensor([0.0, 1.0]), (n,), step=2, dtype=torch.float64)
    s = torch.tensor(thetas, dtype=torch.float64)
    expected = torch.minimum(s[:, None], s) - s[:, None] * s
    # sd of a sample covariance is at most sqrt(2) (largest variance 1/4) / sqrt(n)
    assert (b @ b.T / n - expected).abs().max() < 5 * math.sqrt(2) * 0.25 / math.sqrt(n)
    assert (b @ dW[0] / n).abs().max() < 5 * 0.5 / math.sqrt(n)


def test_a_dense_path_does_not_depend_on_the_resolution_it_is_asked_at():
    """The bridge under 4 substeps is the value of the path that 4 fine steps and their own bridges give."""
    coarse, fine = sds.BrownianPath(3, substeps=4), sds.BrownianPath(3)
    theta, shape, dtype = 0.6, (50, 2), torch.float64
    dw = fine.increments(sds.grids.uniform(0, 1, 4), shape, dtype=dtype)
    local = theta * 4 - 2
    w = dw[:2].sum(0) + local * dw[2] + math.sqrt(0.25) * fine.bridge(2, local, shape, dtype=dtype)
    torch.testing.assert_close(
        coarse.bridge(0, theta, shape, dtype=dtype) + theta * dw.sum(0), w, rtol=1e-12, atol=1e-13
    )


@pytest.mark.parametrize("substeps", [1, 3])
def test_areas_are_independent_of_increments_with_a_twelfth_of_their_variance(substeps):
    n, unit = 60_000, torch.tensor([0.0, 1.0])
    path = sds.BrownianPath(4, substeps=substeps)
    W, H = (path.increments(unit, (n,), step=2, of=part, dtype=torch.float64)[0] for part in ("W", "H"))
    assert abs(float(H.var()) * 12 - 1) < 5 * math.sqrt(2 / n)
    assert abs(float((W * H).mean())) < 5 * math.sqrt(1 / 12 / n)


def test_an_area_is_the_integral_of_the_path_less_its_chord():
    """``H`` of a coarse step from 4000 fine ones, whose own areas are negligible; and the sign when time turns."""
    fine, shape = 4000, (5, 2)
    dW = sds.BrownianPath(9).increments(sds.grids.uniform(0, 2, fine), shape, dtype=torch.float64)
    W = torch.cat([torch.zeros(1, *shape, dtype=torch.float64), dW.cumsum(0)])
    integral = (0.5 * (W[1:] + W[:-1])).mean(0) - 0.5 * W[-1]
    coarse = sds.BrownianPath(9, substeps=fine)
    for ends in ((0.0, 2.0), (2.0, 0.0)):
        H = coarse.increments(torch.tensor(ends), shape, of="H", dtype=torch.float64)[0]
        torch.testing.assert_close(H, integral, atol=5 * math.sqrt(2 / 12 / fine**2), rtol=0)


def test_coarse_areas_are_combinations_of_coarse_ones():
    """The same ``H`` through one level of coarsening and through two."""
    shape, grid = (4, 3), torch.tensor([0.0, 1.0])
    fine = sds.BrownianPath(1, substeps=2).increments(sds.grids.uniform(0, 1, 3), shape, of="H", dtype=torch.float64)
    W = sds.BrownianPath(1, substeps=2).increments(sds.grids.uniform(0, 1, 3), shape, dtype=torch.float64)
    starts = W.cumsum(0) - W
    expected = (starts + fine + 0.5 * W).mean(0) - 0.5 * W.sum(0)
    whole = sds.BrownianPath(1, substeps=6).increments(grid, shape, of="H", dtype=torch.float64)[0]
    torch.testing.assert_close(whole, expected, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("substeps", [1, 3])
def test_a_bridge_given_the_area_has_its_covariance(substeps):
    """Mean ``6 u (1 - u) H``; unconditionally the covariance of a bridge; the average over the step is ``H``."""
    n = 40_000
    path = sds.BrownianPath(11, substeps=substeps)
    thetas = [0.1, 0.25, 1 / 3, 0.5, 0.50001, 0.9]
    b = torch.stack([path.bridge(2, s, (n,), given=("W", "H"), dtype=torch.float64) for s in thetas])
    W, H = (path.increments(torch.tensor([0.0, 1.0]), (n,), step=2, of=o, dtype=torch.float64)[0] for o in "WH")
    s = torch.tensor(thetas, dtype=torch.float64)
    expected = torch.minimum(s[:, None], s) - s[:, None] * s
    assert (b @ b.T / n - expected).abs().max() < 5 * math.sqrt(2) * 0.25 / math.sqrt(n)
    assert (b @ W / n).abs().max() < 5 * 0.5 / math.sqrt(n)
    v = s * (1 - s)
    assert (b @ H / n - v / 2).abs().max() < 5 * math.sqrt(2 * 0.25 / 12) / math.sqrt(n)
    rest = b - 6 * v[:, None] * H
    assert (rest.square().mean(1) - v * (1 - 3 * v)).abs().max() < 5 * math.sqrt(2) * 0.25 / math.sqrt(n)


def test_saved_states_between_grid_points_have_the_right_variance():
    """Linear interpolation gives Var W(dt/2) = dt/4; it is dt/2."""
    n, dt = 50_000, 0.1
    motion = sds.SDE(lambda x, t: torch.zeros_like(x), lambda x, t: 1.0, noise="additive")
    sol = sds.solve(
        motion, torch.zeros(n), 0.0, dt, 1, solver=sds.EulerMaruyama(), seed=5, save_at=[dt / 4, dt / 2, dt]
    )
    for x, variance in zip(sol.xs, (dt / 4, dt / 2, dt), strict=True):
        assert abs(x.double().var() / variance - 1) < 5 * math.sqrt(2 / n)
    increments = sol.xs[1] - sol.xs[0]
    assert abs(torch.corrcoef(torch.stack([increments, sol.xs[0]]))[0, 1]) < 5 / math.sqrt(n)


def test_streams_are_told_apart():
    grid = sds.grids.uniform(0, 1, 2)
    a = sds.BrownianPath(0, stream=Stream.DRIVING).increments(grid, (100,))
    b = sds.BrownianPath(0, stream=Stream.CORRECTOR).increments(grid, (100,))
    assert not torch.isclose(a, b).any()


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"seed": -1}, ValueError, "seed must be at least 0, got -1"),
        ({"seed": 2**64}, ValueError, "seed must be below 2\\^64"),
        ({"seed": 1.5}, TypeError, "seed must be an integer, got 1.5"),
        ({"seed": True}, TypeError, "seed must be an integer, got True"),
        ({"seed": 0, "substeps": 0}, ValueError, "substeps must be at least 1"),
        ({"seed": 0, "first_path": -2}, ValueError, "first_path must be at least 0"),
    ],
)
def test_bad_coordinates_are_refused(arguments, error, message):
    with pytest.raises(error, match=message):
        sds.BrownianPath(**arguments)


def test_a_fraction_outside_the_step_is_refused():
    with pytest.raises(ValueError, match=r"theta is a fraction of a step, in \[0, 1\], got 1.5"):
        sds.BrownianPath(0).bridge(0, 1.5, (1,))
