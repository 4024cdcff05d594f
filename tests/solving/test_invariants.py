"""Invariants of `solve`, to the bit. Known faults of other libraries among them."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import sdesolve as sds

MATRIX = torch.linspace(-1, 1, 6, dtype=torch.float64).reshape(2, 3)


def matrix_diffusion(x, t):
    return x.unsqueeze(-1) * MATRIX.to(x.dtype) + t.reshape(-1, 1, 1)


PROBLEMS = {
    "additive": sds.SDE(lambda x, t: -x * x, lambda x, t: 0.3 + 0.1 * t, noise="additive"),
    "diagonal": sds.SDE(lambda x, t: 1.0 - x, lambda x, t: 0.2 * x, noise="diagonal"),
    "scalar": sds.SDE(lambda x, t: 1.0 - x, lambda x, t: 0.2 * x, noise="scalar"),
    "general": sds.SDE(lambda x, t: 1.0 - x, matrix_diffusion, noise="general"),
    "stratonovich": sds.SDE(lambda x, t: 1.0 - x, lambda x, t: 0.2 * x, calculus="stratonovich"),
    "ode": sds.ODE(lambda x, t: -x * x),
    "langevin": sds.UnderdampedLangevin(lambda x, t: x**3 - t, mass=2.0, friction=1.5, temperature=0.7),
}
PAIRS = [
    ("additive", sds.EulerMaruyama()),
    ("diagonal", sds.EulerMaruyama()),
    ("scalar", sds.EulerMaruyama()),
    ("general", sds.EulerMaruyama()),
    ("diagonal", sds.Milstein()),
    ("scalar", sds.Milstein()),
    ("stratonovich", sds.Heun()),
    ("additive", sds.Heun()),
    ("additive", sds.ShARK()),
    ("diagonal", sds.SRIW1()),
    ("stratonovich", sds.SPaRK()),
    ("general", sds.Milstein("foster")),
    ("general", sds.W2Ito1()),
    ("ode", sds.RK4()),
    ("ode", sds.Heun()),
    ("langevin", sds.ALIGN()),
    ("langevin", sds.UBU()),
]
pairs = st.sampled_from(PAIRS)
seeds = st.integers(0, 2**64 - 1)
dtypes = st.sampled_from([torch.float32, torch.float64])
grids = st.lists(st.floats(-3, 3, width=32), min_size=3, max_size=12, unique=True).map(
    lambda ts: torch.tensor(sorted(ts), dtype=torch.float64)
)


def start(batch, dtype):
    return torch.linspace(0.5, 1.5, 2 * batch, dtype=dtype).reshape(batch, 2)


@pytest.mark.uncompiled
@given(pair=pairs, seed=seeds, dtype=dtypes, grid=grids, backwards=st.booleans(), data=st.data())
@settings(max_examples=7)
def test_splitting_at_a_grid_point_changes_nothing(pair, seed, dtype, grid, backwards, data):
    name, solver = pair
    grid = grid.flip(0) if backwards else grid
    k = data.draw(st.integers(1, len(grid) - 2))
    x0, path = start(3, dtype), sds.BrownianPath(seed)
    options = {"solver": solver, "check_finite": False}
    whole = sds.solve(PROBLEMS[name], x0, grid=grid, noise=path, **options).x1
    half = sds.solve(PROBLEMS[name], x0, grid=grid[: k + 1], noise=path, **options).x1
    if not bool(half.isfinite().all()):
        return  # a state that is not finite is refused as a start
    rest = sds.solve(PROBLEMS[name], half, grid=grid[k:], noise=path.after(k), **options).x1
    assert torch.equal(whole, rest) or not bool(whole.isfinite().all())


@pytest.mark.uncompiled
@given(pair=pairs, seed=seeds, dtype=dtypes, order=st.permutations(range(5)))
@settings(max_examples=4)
def test_a_permuted_or_split_batch_gives_the_permuted_or_split_result(pair, seed, dtype, order):
    name, solver = pair
    x0, path = start(5, dtype), sds.BrownianPath(seed)
    whole = sds.solve(PROBLEMS[name], x0, 0.0, 1.0, 7, solver=solver, noise=path).x1
    for i in order:  # one row at a time, in any order, on its own path
        alone = sds.solve(PROBLEMS[name], x0[i : i + 1], 0.0, 1.0, 7, solver=solver, noise=path.rows(i)).x1
        assert torch.equal(whole[i : i + 1], alone)
    halves = [
        sds.solve(PROBLEMS[name], x0[a:b], 0.0, 1.0, 7, solver=solver, noise=path.rows(a)).x1
        for a, b in ((0, 2), (2, 5))
    ]
    assert torch.equal(whole, torch.cat(halves))


@pytest.mark.uncompiled
@given(pair=pairs, seed=seeds, steps=st.integers(1, 9), data=st.data())
@settings(max_examples=7)
def test_saving_changes_nothing_else(pair, seed, steps, data):
    name, solver = pair
    x0 = start(3, torch.float64)
    times = data.draw(st.lists(st.floats(0, 1), min_size=1, max_size=5, unique_by=lambda s: round(s, 3)).map(sorted))
    options = {"solver": solver, "seed": seed}
    plain = sds.solve(PROBLEMS[name], x0, 0.0, 1.0, steps, **options)
    dense = sds.solve(PROBLEMS[name], x0, 0.0, 1.0, steps, save_at=times, **options)
    every = sds.solve(PROBLEMS[name], x0, 0.0, 1.0, steps, save_at="grid", **options)
    assert torch.equal(plain.x1, dense.x1)
    assert torch.equal(plain.x1, every.x1)
    assert torch.equal(every.xs[-1], plain.x1)
    assert torch.equal(every.xs[0], x0)
    assert dense.xs.shape == (len(times), *x0.shape)
    assert every.xs.shape == (steps + 1, *x0.shape)
    assert plain.ts.tolist() == [1.0]


@pytest.mark.uncompiled
@given(pair=pairs, seed=seeds)
@settings(max_examples=7)
def test_a_time_per_sample_is_as_solving_each_sample_alone(pair, seed):
    name, solver = pair
    x0, path = start(4, torch.float64), sds.BrownianPath(seed)
    t0 = torch.tensor([0.0, 0.5, 1.0, 0.2], dtype=torch.float64)
    t1 = torch.tensor([1.0, 0.0, 2.0, 0.1], dtype=torch.float64)
    together = sds.solve(PROBLEMS[name], x0, t0, t1, 6, solver=solver, noise=path, save_at="grid")
    for i in range(4):
        alone = sds.solve(
            PROBLEMS[name], x0[i : i + 1], float(t0[i]), float(t1[i]), 6, solver=solver, noise=path.rows(i)
        )
        torch.testing.assert_close(together.x1[i : i + 1], alone.x1, rtol=1e-13, atol=1e-14)
    assert together.ts.shape == (7, 4)
    assert torch.equal(together.ts[-1], t1)


@pytest.mark.parametrize("rank", [0, 1, 2, 3])
def test_states_of_any_rank_are_the_flat_state(rank):
    shape = (4, *(1, 2, 3)[:rank])
    x0 = torch.linspace(0.5, 1.5, 4 * max(1, [1, 1, 2, 6][rank])).reshape(shape)
    flat = x0.reshape(4, -1)
    sde = PROBLEMS["diagonal"]
    a = sds.solve(sde, x0, 0.0, 1.0, 5, solver=sds.EulerMaruyama(), seed=3).x1
    b = sds.solve(sde, flat, 0.0, 1.0, 5, solver=sds.EulerMaruyama(), seed=3).x1
    assert a.shape == x0.shape
    assert torch.equal(a.reshape(4, -1), b)


@pytest.mark.uncompiled
def test_backwards_on_the_mirrored_equation_is_forwards():
    """``dX = f dt + g dW`` from 1 to 0 is ``dX = -f(X, 1 - s) ds + g(X, 1 - s) dW`` from 0 to 1."""
    forwards = sds.SDE(lambda x, t: -(1.0 - x) * (1 - t), lambda x, t: 0.2 * x * (1 + (1 - t)))
    backwards = sds.SDE(lambda x, t: (1.0 - x) * t, lambda x, t: 0.2 * x * (1 + t))
    x0 = start(50, torch.float64)
    for solver in (sds.EulerMaruyama(), sds.Milstein()):
        a = sds.solve(forwards, x0, 0.0, 1.0, 64, solver=solver, seed=1).x1
        b = sds.solve(backwards, x0, 1.0, 0.0, 64, solver=solver, seed=1).x1
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("t1", "steps"), [(1.0, 1000), (0.001, 1000), (-1.0, 1000), (1.0, 10), (1e5, 100_000)])
def test_the_number_of_steps_is_the_number_asked_for(t1, steps):
    """Accumulating dt in float32 gives 1001 or 999 steps of 1e-3, and 11 of 0.1 in float64."""
    seen = []

    def drift(x, t):
        seen.append(t)
        return torch.ones_like(x)

    sol = sds.solve(
        sds.ODE(drift), torch.zeros(1), 0.0, t1, steps, solver=sds.EulerMaruyama(), save_at="grid", backend="eager"
    )
    assert len(seen) == steps == sol.stats.steps == sol.stats.nfe
    assert sol.ts[0] == 0.0
    assert sol.ts[-1] == t1
    assert seen[0] == 0.0
    dt = sol.ts.diff()
    assert (dt / dt.mean() - 1).abs().max() < 1e-9
    assert float(seen[-1]) == pytest.approx(float(sol.ts[-2]), rel=1e-7)
    # dt itself is rounded once, so unit drift arrives at t1 but for the rounding of the sum
    assert float(sol.x1) == pytest.approx(t1, rel=steps * 6e-8)


def test_stats_say_what_ran():
    x0 = start(2, torch.float64)
    sol = sds.solve(PROBLEMS["ode"], x0, 0.0, 1.0, 3, solver=sds.RK4())
    assert (sol.stats.solver, sol.stats.steps, sol.stats.nfe, sol.stats.backend, sol.stats.seed) == (
        "RK4",
        3,
        12,
        "fused",
        None,
    )
    assert sol.stats.reason
    assert sds.solve(PROBLEMS["diagonal"], x0, 0.0, 1.0, 3, solver=sds.EulerMaruyama(), seed=5).stats.seed == 5


def test_without_a_seed_torch_s_generator_decides_and_the_run_can_be_repeated():
    x0 = start(2, torch.float64)

    def run(**options):
        return sds.solve(PROBLEMS["diagonal"], x0, 0.0, 1.0, 3, solver=sds.EulerMaruyama(), **options)

    torch.manual_seed(1)
    first, second = run(), run()
    torch.manual_seed(1)
    assert torch.equal(run().x1, first.x1)
    assert not torch.equal(first.x1, second.x1)
    assert torch.equal(run(seed=second.stats.seed).x1, second.x1)


@pytest.mark.uncompiled
def test_gradients_flow_through_the_steps():
    rate = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    x0 = torch.ones(3, 2, dtype=torch.float64, requires_grad=True)
    sde = sds.SDE(lambda x, t: rate * x, lambda x, t: 0.1 * rate * x)
    for solver in (sds.EulerMaruyama(), sds.Milstein()):
        assert torch.autograd.gradcheck(
            lambda x0, r: sds.solve(sde, x0, 0.0, 1.0, 5, solver=solver, seed=0, save_at=[0.35, 1.0]).xs,  # noqa: B023
            (x0, rate),
        )


def test_an_empty_batch_gives_an_empty_result():
    sol = sds.solve(PROBLEMS["general"], torch.zeros(0, 2), 0.0, 1.0, 4, solver=sds.EulerMaruyama(), save_at="grid")
    assert sol.x1.shape == (0, 2)
    assert sol.xs.shape == (5, 0, 2)


def test_the_progress_bar_shows_and_counts(capsys):
    sds.solve(PROBLEMS["ode"], torch.ones(1, 2), 0.0, 1.0, 4, solver=sds.RK4(), progress=True)
    assert "4" in capsys.readouterr().err
