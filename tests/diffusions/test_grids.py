"""Time grids: exact ends, exact counts, one direction."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from sdesolve import grids

positive = st.floats(1e-4, 100.0)
steps = st.integers(1, 300)


def build(kind: str, t0: float, t1: float, n: int) -> torch.Tensor:
    return {
        "uniform": grids.uniform,
        "karras": grids.karras,
        "geometric": grids.geometric,
        "linear_steps": grids.linear_steps,
        "exponential_steps": grids.exponential_steps,
    }[kind](t0, t1, n)


kinds = st.sampled_from(["uniform", "karras", "geometric", "linear_steps", "exponential_steps"])


@given(kinds, positive, positive, steps)
def test_ends_are_exact_and_times_run_one_way(kind, t0, t1, n):
    assume(abs(t0 - t1) > 1e-3 * max(t0, t1))
    grid = build(kind, t0, t1, n)
    assert grid.dtype == torch.float64
    assert grid.shape == (n + 1,)
    assert float(grid[0]) == t0
    assert float(grid[-1]) == t1
    assert bool((grid.diff() * math.copysign(1.0, t1 - t0) > 0).all())
    torch.testing.assert_close(grids.check_grid(grid), grid, rtol=0, atol=0)


@given(kinds, positive, positive, steps)
def test_the_grid_backwards_is_the_grid_reversed(kind, t0, t1, n):
    assume(abs(t0 - t1) > 1e-3 * max(t0, t1))
    if kind == "karras":  # concave in one direction, convex in the other: the exponent acts on the end points
        torch.testing.assert_close(build(kind, t1, t0, n).flip(0), build(kind, t0, t1, n), rtol=1e-12, atol=1e-15)
    else:
        torch.testing.assert_close(build(kind, t1, t0, n).flip(0), build(kind, t0, t1, n), rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("n", [10, 100, 1000, 4096])
def test_step_counts_survive_rounding(n):
    """Adding up float32 steps of 1e-3 takes 1001 of them to reach 1, flooring T / dt gives 999."""
    grid = grids.uniform(0.0, 1.0, n)
    assert len(grid) == n + 1
    torch.testing.assert_close(grid, torch.arange(n + 1, dtype=torch.float64) / n, rtol=0, atol=0)
    in_float32 = grid.float()
    assert bool((in_float32.diff() > 0).all())
    assert float(in_float32[-1]) == 1.0
    # Steps add up to the whole range: spacing (T - eps) / (N - 1) with dt = 1 / N would overshoot the end by a step.
    down = grids.uniform(1.0, 1e-3, n)
    assert float(down.diff().sum()) == pytest.approx(1e-3 - 1.0, abs=1e-14)
    torch.testing.assert_close(down.diff(), torch.full((n,), (1e-3 - 1.0) / n, dtype=torch.float64), rtol=1e-9, atol=0)


@given(positive, positive, st.integers(2, 100))
def test_geometric_ratios_are_equal(t0, t1, n):
    assume(abs(t0 - t1) > 1e-3 * max(t0, t1))
    ratios = grids.geometric(t0, t1, n)[1:] / grids.geometric(t0, t1, n)[:-1]
    torch.testing.assert_close(ratios, torch.full_like(ratios, (t1 / t0) ** (1 / n)), rtol=1e-9, atol=0)


@given(st.floats(1.0, 9.0), st.integers(2, 100))
def test_karras_is_uniform_in_the_root(rho, n):
    root = grids.karras(80.0, 0.002, n, rho) ** (1 / rho)
    torch.testing.assert_close(root.diff(), root.diff().mean().expand(n), rtol=1e-9, atol=1e-12)


@given(st.floats(0.01, 1.0), st.integers(2, 100))
def test_linear_steps_grow_linearly_to_the_ratio(ratio, n):
    gamma = grids.linear_steps(0.0, 3.0, n, ratio).diff()
    assert float(gamma[0] / gamma[-1]) == pytest.approx(ratio, rel=1e-9)
    torch.testing.assert_close(gamma.diff(), gamma.diff().mean().expand(n - 1), rtol=1e-6, atol=1e-12)


def test_exponential_steps_are_in_proportion_to_time_below_one():
    grid = grids.exponential_steps(5.0, 1e-3, 400)
    gamma, t = -grid.diff(), grid[:-1]
    kappa = (4.0 + math.log(1e3)) / 400
    torch.testing.assert_close(gamma[t > 1 + kappa], torch.full_like(gamma[t > 1 + kappa], kappa), rtol=1e-9, atol=0)
    below = t <= 1
    torch.testing.assert_close(
        gamma[below] / t[below], torch.full_like(t[below], 1 - math.exp(-kappa)), rtol=1e-9, atol=0
    )


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: grids.uniform(0.0, 1.0, 0), ValueError, "steps must be at least 1, got 0"),
        (lambda: grids.uniform(0.0, 1.0, -3), ValueError, "steps must be at least 1, got -3"),
        (lambda: grids.uniform(0.0, 1.0, 2.5), TypeError, "steps must be an integer, got 2.5"),
        (lambda: grids.uniform(0.0, 1.0, True), TypeError, "steps must be an integer, got True"),
        (lambda: grids.uniform(1.0, 1.0, 5), ValueError, "t0 and t1 must differ, both are 1.0"),
        (lambda: grids.uniform(0.0, float("nan"), 5), ValueError, "times must be finite"),
        (lambda: grids.karras(-1.0, 1.0, 5), ValueError, "at least 0"),
        (lambda: grids.karras(0.0, 1.0, 5, rho=0.0), ValueError, "rho > 0"),
        (lambda: grids.geometric(0.0, 1.0, 5), ValueError, "positive times"),
        (lambda: grids.linear_steps(0.0, 1.0, 5, ratio=0.0), ValueError, r"in \(0, 1\]"),
        (lambda: grids.exponential_steps(0.0, 1.0, 5), ValueError, "positive times"),
        (lambda: grids.check_grid(torch.tensor([0.0])), ValueError, "at least two times"),
        (lambda: grids.check_grid(torch.zeros(2, 2, 2)), ValueError, "at least two times"),
        (lambda: grids.check_grid(torch.tensor([0.0, float("inf")])), ValueError, "finite times"),
        (lambda: grids.check_grid(torch.tensor([0.0, 1.0, 0.5])), ValueError, "step 1 goes from 1.0 to 0.5"),
        (lambda: grids.check_grid(torch.tensor([0.0, 1.0, 1.0])), ValueError, "drop repeated times"),
        (lambda: grids.check_grid(torch.tensor([[0.0, 0.0], [1.0, 1.0], [2.0, 0.0]])), ValueError, "step 1"),
    ],
)
def test_bad_grids(call, error, message):
    with pytest.raises(error, match=message):
        call()
