"""Brownian paths: coordinates, coupling of resolutions, bridges. Known faults of other libraries among them."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sdesolve_kernels import Stream, normal

import sdesolve as sds
from sdesolve import LevyArea

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
@settings(max_examples=30)
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
def test_areas_are_independent_of_increments_with_their_variances(substeps):
    n, unit = 60_000, torch.tensor([0.0, 1.0])
    path = sds.BrownianPath(4, substeps=substeps)
    parts = [path.increments(unit, (n,), step=2, of=part, dtype=torch.float64)[0] for part in "WHK"]
    scaled = torch.stack([part * math.sqrt(v) for part, v in zip(parts, (1, 12, 720), strict=True)])
    # entries of a sample covariance of unit normals have sd sqrt(2 / n) at most
    assert (scaled @ scaled.T / n - torch.eye(3)).abs().max() < 5 * math.sqrt(2 / n)


def test_areas_are_integrals_of_the_path_less_its_chord():
    """``H`` and ``K`` of a coarse step from 4000 fine ones, whose own areas are negligible; and when time turns."""
    fine, shape = 4000, (5, 2)
    dW = sds.BrownianPath(9).increments(sds.grids.uniform(0, 2, fine), shape, dtype=torch.float64)
    W = torch.cat([torch.zeros(1, *shape, dtype=torch.float64), dW.cumsum(0)])
    u = torch.linspace(0, 1, fine + 1, dtype=torch.float64)[:, None, None]
    bridge = W - u * W[-1]
    H, K = torch.trapezoid(bridge, dx=1 / fine, dim=0), torch.trapezoid(bridge * (0.5 - u), dx=1 / fine, dim=0)
    coarse = sds.BrownianPath(9, substeps=fine)
    for ends in ((0.0, 2.0), (2.0, 0.0)):
        for part, integral in (("H", H), ("K", K)):
            made = coarse.increments(torch.tensor(ends), shape, of=part, dtype=torch.float64)[0]
            torch.testing.assert_close(made, integral, atol=5 * math.sqrt(2 / 12 / fine**2), rtol=0)


def outer(a, b):
    return a[:, :, None] * b[:, None, :] - a[:, None, :] * b[:, :, None]


@pytest.mark.parametrize("area", [LevyArea("foster"), LevyArea("mrongowius-roessler", 2)])
def test_coarse_parts_are_exact_combinations_of_finer_ones(area):
    """Six substeps at once, and two at a time, put together by Chen's relation for pieces of unequal lengths."""
    shape, grid = (4, 3), sds.grids.uniform(0, 1, 3)
    pairs, whole = (sds.BrownianPath(1, substeps=r) for r in (2, 6))
    W, H, K, A = (pairs.increments(grid, shape, of=part, dtype=torch.float64) for part in ("W", "H", "K", area))
    w, h, k, total, a, b = W[0], H[0], K[0], A[0], 1 / 3, 1 / 3
    for i in (1, 2):
        d, length = b * w - a * W[i], a + b
        total = total + A[i] + 0.5 * outer(w, W[i])
        k = (a**2 * k + b**2 * K[i] + a * b * (h - H[i]) / 2 + (b - a) * d / 12) / length**2
        w, h, a = w + W[i], (a * h + b * H[i] + d / 2) / length, length
    for part, expected in (("W", w), ("H", h), ("K", k), (area, total)):
        made = whole.increments(torch.tensor([0.0, 1.0]), shape, of=part, dtype=torch.float64)[0]
        torch.testing.assert_close(made, expected, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("substeps", [1, 2])
@pytest.mark.parametrize("area", [LevyArea("foster"), LevyArea("mrongowius-roessler", 8)])
def test_areas_have_their_law(area, substeps):
    """Variance and fourth moment, the characteristic function at 2 (1 / cosh 1), and the mean given ``W`` and ``H``.

    Over a step of length 2, so times 2 and its powers. Thresholds are 5 standard errors of each sample mean.
    """
    n, times = 100_000, torch.tensor([0.0, 2.0], dtype=torch.float64)
    path = sds.BrownianPath(3, substeps=substeps)
    W, H, A = (path.increments(times, (n, 2), of=part, dtype=torch.float64)[0] for part in ("W", "H", area))
    assert torch.equal(A, -A.mT)
    a, mean = A[:, 0, 1] / 2, (H[:, 0] * W[:, 1] - W[:, 0] * H[:, 1]) / 2
    for sample, expected in (
        (a, 0.0), (a**2, 1 / 4), (a**4, 5 / 16), (torch.cos(2 * a), 1 / math.cosh(1)),
        (a * W[:, 0] * W[:, 1], 0.0), (a**2 * W.square().sum(1) / 2, 10 / 12), (a * mean, mean.square().mean()),
    ):  # fmt: skip
        assert abs(float(sample.mean() - expected)) < 5 * float(sample.std()) / math.sqrt(n)


@pytest.mark.parametrize("substeps", [1, 3])
def test_a_bridge_is_that_of_the_areas_of_its_step(substeps):
    """Unconditionally the covariance of a Brownian bridge; the covariances with ``H`` and ``K`` of their integrals."""
    n = 10_000
    path = sds.BrownianPath(11, substeps=substeps)
    thetas = [0.1, 0.25, 1 / 3, 0.5, 0.50001, 0.9]
    b = torch.stack([path.bridge(2, s, (n,), dtype=torch.float64) for s in thetas])
    W, H, K = (path.increments(torch.tensor([0.0, 1.0]), (n,), step=2, of=o, dtype=torch.float64)[0] for o in "WHK")
    s = torch.tensor(thetas, dtype=torch.float64)
    expected = torch.minimum(s[:, None], s) - s[:, None] * s
    assert (b @ b.T / n - expected).abs().max() < 5 * math.sqrt(2) * 0.25 / math.sqrt(n)
    assert (b @ W / n).abs().max() < 5 * 0.5 / math.sqrt(n)
    v = s * (1 - s)
    assert (b @ H / n - v / 2).abs().max() < 5 * math.sqrt(2 * 0.25 / 12) / math.sqrt(n)
    assert (b @ K / n - v * (1 - 2 * s) / 12).abs().max() < 5 * math.sqrt(2 * 0.25 / 720) / math.sqrt(n)
    rest = b - 6 * v[:, None] * H
    assert (rest.square().mean(1) - v * (1 - 3 * v)).abs().max() < 5 * math.sqrt(2) * 0.25 / math.sqrt(n)


@pytest.mark.parametrize("gap", [1e-4, 1e-9, 1e-13])
def test_times_however_near_have_their_joint_law(gap):
    """Increments over two neighbouring gaps within a step: independent, each with its length for variance."""
    n, path = 20_000, sds.BrownianPath(8)
    a, b, c = (path.value(0.3 + i * gap, (n,)) for i in range(3))
    lengths = [(0.3 + gap) - 0.3, (0.3 + 2 * gap) - (0.3 + gap)]
    for difference, length in zip((b - a, c - b), lengths, strict=True):
        assert abs(float(difference.square().mean()) / length - 1) < 5 * math.sqrt(2 / n)
    assert abs(float(((b - a) * (c - b)).mean())) / gap < 5 / math.sqrt(n)


@pytest.mark.parametrize("times", [None, sds.grids.geometric(0.3, 2.0, 5), sds.grids.uniform(1.0, -1.0, 4)])
def test_values_at_any_time_are_those_of_the_increments(times):
    path, shape = sds.BrownianPath(5, substeps=2), (3, 2)
    grid = torch.arange(6.0, dtype=torch.float64) if times is None else times
    W = torch.stack([path.value(float(t), shape, times=times) for t in grid])
    steps = path.increments(grid, shape, dtype=torch.float64)
    torch.testing.assert_close(W.diff(dim=0), steps, rtol=1e-13, atol=1e-14)
    assert torch.equal(W[0], torch.zeros(shape, dtype=torch.float64))
    s, t = (float(grid[0] + u * (grid[-1] - grid[0])) for u in (0.13, 0.77))
    over = path.increment(s, t, shape, times=times)
    torch.testing.assert_close(over, path.value(t, shape, times=times) - path.value(s, shape, times=times))
    assert torch.equal(over, -path.increment(t, s, shape, times=times))
    assert torch.equal(over[1:], path.rows(1).increment(s, t, (2, 2), times=times))
    with pytest.raises(ValueError, match="no value at"):
        path.value(float(grid[0]) - 1e-3 * float(grid[-1] - grid[0]), shape, times=times)


@pytest.mark.uncompiled
def test_a_solution_is_that_of_the_path_whichever_part_its_solver_reads():
    """``X = W``, at grid points and between them, by solvers that read ``W``, and ``W`` and ``H``."""
    motion = sds.SDE(lambda x, t: torch.zeros_like(x), lambda x, t: 1.0, noise="additive")
    times, grid = [0.0, 0.3, 0.51, 1.0], sds.grids.uniform(0, 1, 4)
    options = {"seed": 4, "save_at": times}
    x0 = torch.zeros(5, 2, dtype=torch.float64)
    W = torch.stack([sds.BrownianPath(4).value(t, (5, 2), times=grid) for t in times])
    for solver in (sds.EulerMaruyama(), sds.ShARK()):
        for backend in ("eager", "fused"):
            x = sds.solve(motion, x0, 0.0, 1.0, 4, solver=solver, backend=backend, **options).xs
            torch.testing.assert_close(x, W, rtol=1e-13, atol=1e-14)


PARTS = ["W", "H", "K", LevyArea("foster"), LevyArea("mrongowius-roessler", 1)]


@pytest.mark.parametrize("part", PARTS, ids=str)
@pytest.mark.parametrize("substeps", [1, 2, 3])
def test_views_of_a_path(substeps, part):
    grid, shape, path = sds.grids.uniform(0, 1, 4), (5, 2), sds.BrownianPath(5, substeps=substeps)

    def of(view, rows=5):
        return view.increments(grid, (rows, 2), of=part, dtype=torch.float64)

    here, sign = of(path), 1.0 if isinstance(part, LevyArea) else -1.0
    assert torch.equal(of(path.antithetic()), sign * here)
    assert path.antithetic().antithetic() == path
    repeated = of(sds.BrownianPath(5, substeps=substeps, repeat=3))
    assert torch.equal(repeated, here[:, [0, 1, 2, 0, 1]])
    shard = sds.BrownianPath(5, substeps=substeps, repeat=3).rows(2)
    assert torch.equal(of(shard, 3), repeated[:, 2:])
    swapped = of(path.with_swapped_pairs())
    if substeps == 1:
        assert torch.equal(swapped, here[[1, 0, 3, 2]])
    fine = dataclasses.replace(path, substeps=1).with_swapped_pairs()
    if part == "W":
        fine = fine.increments(sds.grids.uniform(0, 1, 4 * substeps), shape, dtype=torch.float64)
        torch.testing.assert_close(swapped, fine.reshape(4, substeps, *shape).sum(1), rtol=1e-13, atol=1e-14)
    assert torch.equal(path.antithetic().bridge(1, 0.3, shape), -path.bridge(1, 0.3, shape))
    assert not torch.equal(path.with_swapped_pairs().bridge(1, 0.3, shape), path.bridge(1, 0.3, shape))


DIAGONAL = sds.SDE(lambda x, t: torch.sin(x) * t - x, lambda x, t: 0.4 * torch.cos(x + 2 * t), "diagonal")
VIEWS = [
    {"substeps": 3}, {"substeps": 2, "swapped": True}, {"mirrored": True}, {"repeat": 70},
    {"swapped": True, "first_step": 1}, {"swapped": True, "kind": "three-point"},
    {"repeat": 70, "first_row": 30, "substeps": 2, "mirrored": True}, {"substeps": 2, "kind": "three-point"},
]  # fmt: skip


@pytest.mark.parametrize("view", VIEWS, ids=str)
def test_views_are_fused(view):
    path = sds.BrownianPath(1, **view)
    x0 = torch.linspace(-1, 1, 200, dtype=torch.float64)[:, None]
    options = {"solver": sds.EulerMaruyama(), "noise": path}
    fused, eager = (sds.solve(DIAGONAL, x0, 0.0, 1.0, 6, backend=b, **options).x1 for b in ("fused", "eager"))
    torch.testing.assert_close(fused, eager, rtol=1e-13, atol=1e-14)
    if path.repeat:
        moments = sds.solve(DIAGONAL, x0, 0.0, 1.0, 6, backend="fused", reduce="moments", **options)
        torch.testing.assert_close(moments.variance[0], fused.var(0), rtol=1e-12, atol=1e-14)


def test_paths_of_other_streams_have_areas_of_their_own():
    a, b = (sds.BrownianPath(0, stream=s) for s in (Stream.DRIVING, 200))
    for part in PARTS[1:]:
        x, y = (path.increments(torch.tensor([0.0, 1.0]), (50, 2), of=part) for path in (a, b))
        assert not torch.isclose(x, y).any() or isinstance(part, LevyArea)
    assert not torch.isclose(a.bridge(0, 0.4, (50,)), b.bridge(0, 0.4, (50,))).any()


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
        ({"seed": 0, "repeat": 0}, ValueError, "repeat must be at least 1, got 0"),
    ],
)
def test_bad_coordinates_are_refused(arguments, error, message):
    with pytest.raises(error, match=message):
        sds.BrownianPath(**arguments)


def test_a_fraction_outside_the_step_is_refused():
    with pytest.raises(ValueError, match=r"theta is a fraction of a step, in \[0, 1\], got 1.5"):
        sds.BrownianPath(0).bridge(0, 1.5, (1,))


@pytest.mark.parametrize("solver", [sds.EulerMaruyama(), sds.ShARK()], ids=repr)
def test_rows_have_seeds_and_paths_of_their_own(solver):
    sde, numbers = sds.SDE(lambda x, t: -x, lambda x, t: 0.3 + 0 * t, noise="additive"), [7, 2, 3, 4, 2**40]
    options = {"solver": solver, "backend": "eager", "save_at": [0.3, 1.0]}
    x0 = torch.linspace(0, 1, 10).reshape(5, 2)
    chosen = sds.solve(sde, x0, 0.0, 1.0, 4, noise=sds.BrownianRows(9, torch.tensor(numbers)), **options)
    seeded = sds.solve(sde, x0, 0.0, 1.0, 4, noise=sds.BrownianRows(numbers), **options)
    for i, n in enumerate(numbers):
        for made, path in ((chosen, sds.BrownianPath(9, first_path=n)), (seeded, sds.BrownianPath(n))):
            alone = sds.solve(sde, x0[i : i + 1], 0.0, 1.0, 4, noise=path, **options)
            assert torch.equal(made.xs[:, i : i + 1], alone.xs)
    first = sds.solve(sde, x0, 0.0, 0.5, 2, noise=sds.BrownianRows(numbers), solver=solver, backend="eager")
    rest = sds.solve(sde, start=first.state, t1=1.0, steps=2, solver=solver, backend="eager")
    torch.testing.assert_close(rest.x1, seeded.x1)
    assert chosen.stats.execution == "eager"


@pytest.mark.parametrize("corrected", [False, True])
def test_samples_have_seeds_of_their_own(corrected):
    process, solver = sds.VP(), sds.SDEDPMSolverPP2S()
    solver = sds.PredictorCorrector(solver, sds.LangevinCorrector(snr=0.1)) if corrected else solver
    options = {"solver": solver, "steps": 4, "backend": "eager"}
    many = sds.sample(process, lambda x, t: -x, (3, 2), noise=sds.BrownianRows([5, 1, 5], [0, 0, 8]), **options)
    for i, path in enumerate((sds.BrownianPath(5), sds.BrownianPath(1), sds.BrownianPath(5, first_path=8))):
        torch.testing.assert_close(
            many[i : i + 1], sds.sample(process, lambda x, t: -x, (1, 2), noise=path, **options), rtol=1e-6, atol=1e-6
        )


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((3,), ValueError, r"one seed for all is BrownianPath\(seed\)"),
        (([],), ValueError, "a seed and a path number each, got 0 and 0"),
        (([1, 2], [3]), ValueError, "got 2 and 1"),
        (([1, 2.5],), TypeError, "seed must be an integer"),
        ((3, [1, -2]), ValueError, "each of paths must be at least 0"),
    ],
)
def test_rows_that_are_none(arguments, error, message):
    with pytest.raises(error, match=message):
        sds.BrownianRows(*arguments)
    with pytest.raises(ValueError, match="for 2 rows, and the batch has 3"):
        sds.BrownianRows([1, 2]).increments(torch.tensor([0.0, 1.0]), (3,))
