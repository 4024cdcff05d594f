"""Functionals that are carried along paths: laws, executors, gradients, continuation, what is refused."""

import itertools
import math

import pytest
import torch

import sdesolve as sds
from sdesolve.solvers.euler_maruyama import EulerMaruyama

SOLVER = EulerMaruyama()
WIENER = sds.SDE(lambda x, t: torch.zeros_like(x), lambda x, t: 1.0, noise="additive")
WELL = sds.SDE(lambda x, t: x - x**3, lambda x, t: 0.5 + 0.2 * x, noise="diagonal")


def first(x, t):
    return x[:, 0]


def start(batch, dtype=torch.float64):
    return torch.linspace(-1.0, 1.0, batch, dtype=dtype)[:, None]


def everything():
    return {
        "greatest": sds.RunningMaximum(first),
        "mean": sds.TimeAverage(lambda x, t: x * t),
        "above": sds.Occupation(first),
        "bins": sds.Histogram(first, [-0.5, 0.5]),
        "length": sds.Carry(0.0, lambda c, x, x_next, t, t_next: c + ((x_next - x) * (t_next - t)).abs().sum(1)),
        "noisy": sds.Carry(lambda x: 2.0 * x, lambda c, x, y, t, u, z: c + z[:, 1:], normals=2),
    }


def seen(x, t, c):
    return torch.stack([x[:, 0] * t, c["greatest"]], 1)


def run(backend, **kwargs):
    return sds.solve(
        WELL, start(200), 0.5, 1.5, 12, solver=SOLVER, seed=3, backend=backend, carry=everything(),
        save_at=[0.75, 1.5], observable=seen, **kwargs,
    )  # fmt: skip


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)


def test_kernels_carry_what_torch_carries_and_observe_it():
    eager, fused = run("eager"), run("fused")
    close(fused.xs, eager.xs)
    for name, value in eager.carry.items():
        close(fused.carry[name], value)
    close(eager.carry["bins"].sum(1), torch.ones(200, dtype=torch.float64))
    close(eager.xs[1], torch.stack([1.5 * eager.x1[:, 0], eager.carry["greatest"]], 1))
    assert bool((eager.carry["greatest"] >= torch.maximum(start(200)[:, 0], eager.x1[:, 0])).all())
    # The path is that of a run which carries nothing.
    alone = sds.solve(WELL, start(200), 0.5, 1.5, 12, solver=SOLVER, seed=3, backend="eager")
    assert torch.equal(alone.x1, eager.x1)


@pytest.mark.parametrize("backend", ["eager", "fused"])
def test_rows_are_those_of_any_batch_and_cut(backend):
    carry, end = everything(), {"solver": SOLVER, "backend": backend, "observable": seen}
    grid = sds.grids.uniform(0.5, 1.5, 12)
    whole = sds.solve(WELL, start(200), grid=grid, seed=3, carry=carry, **end)
    noise = sds.BrownianPath(3).rows(60)
    part = sds.solve(WELL, start(200)[60:130], grid=grid, noise=noise, carry=carry, **end)
    half = sds.solve(WELL, start(200), grid=grid[:6], seed=3, carry=carry, **end)
    rest = sds.solve(WELL, start=half.state, grid=grid[5:], **end)
    for name, value in whole.carry.items():
        assert torch.equal(part.carry[name], value[60:130]), name
        assert torch.equal(rest.carry[name], value), name
    assert torch.equal(rest.x1, whole.x1)
    with pytest.raises(ValueError, match="leave carry out"):
        sds.solve(WELL, start=half.state, grid=grid[5:], carry=carry, **end)


@pytest.mark.uncompiled
def test_the_maximum_of_brownian_motion_has_its_law_at_any_step():
    """``P(max < m) = erf(m / sqrt 2)``; Kolmogorov's 1% point is ``1.628 / sqrt n``."""
    n = 40_000
    for steps, reach in ((1, 1.628), (5, 1.628)):
        sol = sds.solve(
            WIENER, torch.zeros(n, 1), 0.0, 1.0, steps, solver=SOLVER, seed=11, carry=sds.RunningMaximum(first)
        )
        m = sol.carry.double().sort().values
        gap = (torch.erf(m / math.sqrt(2)) - (torch.arange(n) + 0.5) / n).abs().max()
        assert float(gap) < reach / math.sqrt(n)
    plain = sds.RunningMaximum(first, bridge=False)
    sol = sds.solve(WIENER, torch.zeros(n, 1), 0.0, 1.0, 5, solver=SOLVER, seed=11, carry=plain, backend="eager")
    m = sol.carry.double().sort().values
    assert float((torch.erf(m / math.sqrt(2)) - (torch.arange(n) + 0.5) / n).abs().max()) > 0.1


def test_discounting_and_quantiles_have_known_values():
    """P16 of the study: ``E exp(-int X)`` of a CIR process; the stationary law of an Ornstein-Uhlenbeck process."""
    cir = sds.SDE(lambda x, t: 2.0 * (0.04 - x), lambda x, t: 0.3 * x.clamp_min(0.0).sqrt(), noise="diagonal")
    n = 20_000
    x0 = torch.full((n, 1), 0.09, dtype=torch.float64)
    sol = sds.solve(cir, x0, 0.0, 1.0, 64, solver=SOLVER, seed=2, carry=sds.Discount(first), backend="eager")
    worth = sol.carry
    assert abs(float(worth.mean()) - 0.9405187689) < 4 * float(worth.std()) / math.sqrt(n) + 2e-5
    ou = sds.SDE(lambda x, t: -x, lambda x, t: math.sqrt(2.0), noise="additive")
    bins = sds.Histogram(first, torch.linspace(-3, 3, 25))
    x0 = torch.randn(4000, 1, generator=torch.Generator().manual_seed(0))
    sol = sds.solve(ou, x0, 0.0, 4.0, 200, solver=SOLVER, seed=2, carry=bins, backend="eager")
    levels = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
    wanted = math.sqrt(2) * torch.erfinv(2 * levels - 1)
    assert float((bins.quantiles(sol.carry.sum(0), levels) - wanted).abs().max()) < 0.05


@pytest.mark.uncompiled
def test_times_run_either_way_and_differ_by_row():
    carry = (sds.Integral(lambda x, t: t + 0.0 * x[:, 0]), sds.Carry(0.0, lambda c, x, y, t, u: c + (u - t)))
    ode = sds.ODE(lambda x, t: torch.ones_like(x))
    back = sds.solve(ode, start(5), 2.0, 1.0, 4, solver=sds.RK4(), carry=carry)
    close(back.carry[0], torch.full((5,), -1.5, dtype=torch.float64))
    ends = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0], dtype=torch.float64)
    rows = sds.solve(ode, start(5), 0.0, ends, 4, solver=sds.RK4(), carry=carry)
    close(rows.carry[0], ends**2 / 2)
    close(rows.carry[1], ends)


def test_other_dtypes_run_in_torch():
    carry = sds.Carry(torch.zeros(8, dtype=torch.int64), lambda c, x, y, t, u: c + (y[:, 0] > x[:, 0]))
    sol = sds.solve(WELL, start(8), 0.0, 1.0, 6, solver=SOLVER, seed=1, carry=carry)
    assert sol.carry.dtype == torch.int64
    assert 0 < int(sol.carry.sum()) < 48
    assert "carries one dtype" in sol.stats.reason


@pytest.mark.parametrize(
    ("carry", "error", "match"),
    [
        (sds.Carry(0.0, lambda c, x, y, t, u: c[:, None] + x), ValueError, "keep shapes and dtypes"),
        (sds.Carry(0.0, lambda c, x, y, t, u: (c + x[:, 0]).float()), ValueError, "keep shapes and dtypes"),
        (sds.Carry((0.0, 0.0), lambda c, x, y, t, u: c[0]), TypeError, "must return what it is given"),
        (sds.Carry(0.0, lambda c, x, y, t, u: c + x.mean()), ValueError, "couples the paths"),
        (sds.Carry(torch.zeros(3), lambda c, x, y, t, u: c), ValueError, "a row per path"),
        (sds.RunningMaximum(lambda x, t: x), ValueError, "a number for each path"),
        (lambda c: c, TypeError, "carry must be a functional"),
    ],
)
def test_what_cannot_be_carried_is_refused_before_any_step(carry, error, match):
    with pytest.raises(error, match=match):
        sds.solve(WELL, start(8), 0.0, 1.0, 6, solver=SOLVER, seed=1, carry=carry)


def test_observables_that_ask_for_what_is_not_there():
    with pytest.raises(TypeError, match="nothing is carried"):
        sds.solve(WELL, start(8), 0.0, 1.0, 6, solver=SOLVER, seed=1, observable=lambda x, t, c: x)
    with pytest.raises(ValueError, match="at grid points alone"):
        sds.solve(WELL, start(8), 0.0, 1.0, 6, solver=SOLVER, seed=1, observable=lambda x, t: x, save_at=[0.3])
    sol = sds.solve(
        WELL,
        start(8),
        0.0,
        1.0,
        6,
        solver=SOLVER,
        seed=1,
        observable=lambda x, t: x * t,
        save_at="grid",
        backend="eager",
    )
    close(sol.xs[-1], sol.x1)
    close(sol.xs[0], torch.zeros(8, 1, dtype=torch.float64))


def test_sums_add_up_to_the_same_bits_however_paths_are_split():
    options = {"solver": SOLVER, "backend": "eager", "reduce": "sums", "save_at": [1.0, 1.5]}
    x0, values = start(700), lambda x: torch.cat([x, x.exp() * 1e6], 1)
    whole = sds.solve(WELL, x0, 0.5, 1.5, 4, seed=3, observable=values, **options)
    cuts = [0, 1, 130, 131, 700]
    parts = [
        sds.solve(WELL, x0[a:b], 0.5, 1.5, 4, seed=3, paths=range(a, b), observable=values, **options).sums
        for a, b in itertools.pairwise(cuts)
    ]
    assert parts[2] + parts[0] + (parts[3] + parts[1]) == whole.sums
    plain = sds.solve(
        WELL, x0, 0.5, 1.5, 4, seed=3, solver=SOLVER, backend="eager", save_at=[1.0, 1.5], observable=values
    ).xs
    exact = [[math.fsum(plain[k, :, j].tolist()) for j in range(2)] for k in range(2)]
    assert whole.sums.total.tolist() == exact
    close(whole.sums.mean, plain.mean(1))
    close(whole.sums.variance, plain.var(1))
    assert whole.xs.shape == (0, 700, 1)
    with pytest.raises(ValueError, match="do not add up"):
        whole.sums + sds.Sums.of(plain[:1])
    with pytest.raises(ValueError, match="for 3 rows, and the batch has 700"):
        sds.solve(WELL, x0, 0.5, 1.5, 4, seed=3, paths=[1, 2, 3], solver=SOLVER)
