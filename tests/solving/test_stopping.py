"""Paths that stop at a boundary or are reflected by it: laws, executors, work, continuation, what is refused."""

import math

import pytest
import torch

import sdesolve as sds

SOLVER = sds.ShARK()
DRIFTING = sds.SDE(lambda x, t: 0.5 + 0.0 * x, lambda x, t: 1.0, noise="additive")
WELL = sds.SDE(lambda x, t: x - x**3, lambda x, t: 0.7, noise="additive")
GRID = sds.grids.uniform(0.0, 10.0, 200)
EXITS = [sds.Crossing(lambda x, t: x[:, 0]), sds.Crossing(lambda x, t: x[:, 0] + 1.8, -1)]


def first(x, t):
    return x[:, 0]


def start(batch, value=-1.0, dtype=torch.float64):
    return torch.full((batch, 1), value, dtype=dtype)


def shown(x, t, c):
    return torch.stack([x[:, 0], t, c], 1)


def run(backend, batch=600, x0=None, grid=GRID, **kwargs):
    if "start" not in kwargs:
        kwargs = {"x0": start(batch) if x0 is None else x0, "until": EXITS, "carry": sds.Integral(first), **kwargs}
        kwargs = kwargs if "noise" in kwargs else {"seed": 4, **kwargs}
    return sds.solve(WELL, grid=grid, solver=SOLVER, backend=backend, observable=shown, **kwargs)


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-11)


@pytest.mark.slow
def test_kernels_stop_paths_where_torch_does_and_take_steps_for_those_that_run():
    saves = [0.0, 1.0, 2.5, 7.0, 10.0]
    eager, fused = (run(backend, save_at=saves) for backend in ("eager", "fused"))
    for name in ("x1", "xs", "stop_time", "boundary", "stopped", "carry"):
        close(getattr(fused, name), getattr(eager, name))
    for sol in (eager, fused):
        lives = int(sol.stats.accepted.sum())
        assert lives <= sol.stats.work <= 1.3 * lives < 0.7 * 200 * 600
    # Each stands where it stopped, on the boundary, with what it carried.
    hit = eager.stopped
    assert {int(b) for b in eager.boundary} == {-1, 0, 1}
    close(eager.x1[hit, 0], torch.tensor([0.0, -1.8], dtype=torch.float64)[eager.boundary[hit]])
    close(eager.xs[-1, :, 0], eager.x1[:, 0])
    close(eager.xs[-1, hit, 1], eager.stop_time[hit])
    assert bool((eager.stop_time[~hit] == math.inf).all())
    before = eager.stop_time[None, :] <= torch.tensor(saves, dtype=torch.float64)[:, None]
    assert torch.equal(eager.xs[before], eager.xs[-1].expand(5, -1, -1)[before])
    both = {backend: run(backend, save_at=saves, reduce="moments") for backend in ("eager", "fused")}
    for sol in both.values():
        close(sol.mean, eager.xs.mean(1))
        close(sol.variance, eager.xs.var(1))


@pytest.mark.parametrize("backend", ["eager", "fused"])
def test_rows_keep_their_numbers_and_runs_go_on(backend):
    whole = run(backend)
    chosen = torch.tensor([7, 3, 500, 250, 251])
    some = run(backend, x0=start(5), noise=sds.BrownianRows(4, paths=chosen))
    part = run(backend, x0=start(100), noise=sds.BrownianPath(4).rows(40))
    half = run(backend, grid=GRID[:31])
    rest = run(backend, grid=GRID[30:], start=half.state)
    for name in ("x1", "stop_time", "boundary", "carry"):
        value = getattr(whole, name)
        assert torch.equal(getattr(part, name), value[40:140]), name
        assert torch.equal(getattr(some, name), value[chosen]), name
        assert torch.equal(getattr(rest, name), value), name
    assert torch.equal(half.stats.accepted + rest.stats.accepted, whole.stats.accepted)


def test_first_passage_of_brownian_motion_is_exact_at_any_step():
    """P20 of the study, and the inverse Gaussian law of the time; Kolmogorov's 1% point is ``1.628 / sqrt n``."""
    n, cdf = 40_000, torch.distributions.Normal(0.0, 1.0).cdf
    for steps in (1, 4):
        sol = sds.solve(
            DRIFTING, start(n, 0.0), 0.0, 1.0, steps, solver=sds.EulerMaruyama(), backend="eager", seed=5,
            until=sds.Crossing(lambda x, t: x[:, 0] - 1.0, 1),
        )  # fmt: skip
        assert abs(float(sol.stopped.double().mean()) - 0.4901383399) < 4 * 0.5 / math.sqrt(n)
        tau = sol.stop_time[sol.stopped].sort().values
        law = cdf((0.5 * tau - 1) / tau.sqrt()) + math.e * cdf((-0.5 * tau - 1) / tau.sqrt())
        assert float((law - (torch.arange(len(tau)) + 0.5) / n).abs().max()) < 1.628 / math.sqrt(n)
    plain = sds.solve(
        DRIFTING, start(n, 0.0), 0.0, 1.0, 4, solver=sds.EulerMaruyama(), backend="eager", seed=5,
        until=sds.Crossing(lambda x, t: x[:, 0] - 1.0, 1, bridge=False),
    )  # fmt: skip
    assert float(plain.stopped.double().mean()) < 0.40
    assert bool((plain.x1[plain.stopped] >= 1.0).all())


def test_reflected_brownian_motion_and_a_barrier_option_have_their_laws():
    """P20c and P20b of the study: ``E |W|``, and a down-and-out call, the shifted barrier without the bridge too."""
    n = 40_000
    wiener = sds.SDE(lambda x, t: 0.0 * x, lambda x, t: 1.0, noise="additive")
    sol = sds.solve(
        wiener,
        start(n, 0.0),
        0.0,
        1.0,
        3,
        solver=sds.EulerMaruyama(),
        backend="eager",
        seed=5,
        until=sds.Reflection(first),
    )
    assert bool((sol.x1 >= 0).all())
    assert abs(float(sol.x1.mean()) - math.sqrt(2 / math.pi)) < 4 * 0.6028 / math.sqrt(n)

    def price(steps, barrier, bridge):
        log = sds.SDE(lambda x, t: 0.03 + 0.0 * x, lambda x, t: 0.2, noise="additive")
        out = sds.Crossing(lambda x, t: x[:, 0] - math.log(barrier), -1, bridge=bridge)
        x0 = start(n, math.log(100.0))
        sol = sds.solve(log, x0, 0.0, 1.0, steps, solver=sds.EulerMaruyama(), seed=3, until=out, backend="eager")
        payoff = math.exp(-0.05) * (sol.x1[:, 0].exp() - 100.0).clamp(min=0.0) * ~sol.stopped
        return float(payoff.mean()), float(payoff.std()) / math.sqrt(n)

    exact = 8.665471658
    mean, error = price(4, 90.0, True)
    assert abs(mean - exact) < 4 * error
    mean, error = price(4, 90.0, False)
    assert mean > exact + 4 * error
    # Broadie, Glasserman and Kou 1997: looked at now and then, a barrier acts as one 0.5826 sigma sqrt(dt) further off.
    mean, error = price(50, 90.0 * math.exp(0.5826 * 0.2 * math.sqrt(1 / 50)), False)
    assert abs(mean - exact) < 4 * error + 0.05


def test_the_mean_exit_time_of_the_double_well_needs_the_bridge():
    """``0.7^2 / 2 T'' + (x - x^3) T' = -1`` with ``T = 0`` at both exits, by quadrature."""
    y = torch.linspace(-1.8, 0.0, 18_001, dtype=torch.float64)
    scale = ((y**4 / 4 - y**2 / 2) * (2 / 0.49)).exp()
    inner, outer = (torch.cumulative_trapezoid(v, dx=1e-4) for v in (1 / scale, scale))
    free = torch.cumulative_trapezoid(scale[1:] * inner, dx=1e-4) * (2 / 0.49)
    exact = float((outer[1:] * free[-1] / outer[-1] - free)[7998])
    grid = sds.grids.uniform(0.0, 60.0, 1200)
    sol = run("fused", batch=150_000, grid=grid)
    assert float(sol.stopped.double().mean()) > 0.9999
    assert sol.stats.work < 1.3 * float(sol.stats.accepted.sum())
    assert abs(float(sol.stop_time.clamp(max=60.0).mean()) / exact - 1) < 0.005
    plain = [sds.Crossing(b.level, b.direction, bridge=False) for b in EXITS]
    sol = run("eager", batch=2_000, grid=grid, until=plain)
    assert float(sol.stop_time.clamp(max=60.0).mean()) / exact - 1 > 0.2


@pytest.mark.parametrize("backend", ["eager", "fused"])
def test_other_equations_solvers_and_directions(backend):
    # An ODE: interpolated.
    ode = sds.ODE(lambda x, t: torch.ones_like(x))
    sol = sds.solve(ode, start(3, 0.0), 0.0, 1.0, 7, solver=sds.RK4(), until=sds.Crossing(lambda x, t: x[:, 0] - 0.55),
                    backend=backend)  # fmt: skip
    close(sol.stop_time, torch.full((3,), 0.55, dtype=torch.float64))
    # A moving boundary, backwards in time.
    back = sds.solve(ode, start(3, 0.0), 1.0, 0.0, 7, solver=sds.RK4(), until=sds.Crossing(lambda x, t: x[:, 0] + t),
                     backend=backend)  # fmt: skip
    close(back.stop_time, torch.full((3,), 0.5, dtype=torch.float64))
    close(back.x1, start(3, -0.5))


def test_noise_of_all_kinds_meets_a_sphere():
    """The exit of a Brownian motion from the unit ball in three dimensions takes 1/3 on average."""
    n, x0 = 6_000, torch.zeros(6_000, 3, dtype=torch.float64) + 1e-3
    eye = torch.eye(3, dtype=torch.float64)
    sphere = sds.Crossing(lambda x, t: x.norm(dim=1) - 1.0)
    equations = {
        "additive": sds.SDE(lambda x, t: 0.0 * x, lambda x, t: 1.0, noise="additive"),
        "general": sds.SDE(lambda x, t: 0.0 * x, lambda x, t: eye[None], noise="general"),
        "product": sds.SDE(lambda x, t: 0.0 * x, diffusion_product=lambda x, t, v: v, channels=3),
    }
    found = {}
    for name, sde in equations.items():
        sol = sds.solve(
            sde,
            x0 if name == "additive" else x0[:40],
            0.0,
            3.0,
            120,
            solver=sds.EulerMaruyama(),
            seed=8,
            until=sphere,
            backend="eager",
        )
        found[name] = sol.stop_time.clamp(max=3.0)
        assert float((sol.x1[sol.stopped].norm(dim=1) - 1).abs().max()) < 0.1
    close(found["general"], found["additive"][:40])
    close(found["product"], found["additive"][:40])
    error = float(found["additive"].std()) / math.sqrt(n)
    assert abs(float(found["additive"].mean()) - 1 / 3) < 4 * error + 0.01


@pytest.mark.slow
def test_gradients_go_along_paths_to_where_they_stop():
    """Those of kernels are those of torch, through extremes and their bridges too; when a path stops has none."""
    found = {}
    for backend in ("eager", "fused"):
        x0 = torch.linspace(-1.2, -0.8, 64, dtype=torch.float64)[:, None].requires_grad_()
        scale = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
        sde = sds.SDE(lambda x, t: x - x**3, lambda x, t, s=scale: s + 0.0 * x, noise="diagonal")
        sol = sds.solve(
            sde, x0, grid=GRID[:21], solver=sds.EulerMaruyama(), seed=4, backend=backend, until=EXITS[0],
            carry=sds.RunningMaximum(lambda x, t: x[:, 0] * (1.0 + t)),
        )  # fmt: skip
        assert sol.stats.execution == backend
        assert not sol.stop_time.requires_grad
        found[backend] = torch.autograd.grad((sol.carry + sol.x1[:, 0]).sin().sum(), [x0, scale])
    for a, b in zip(found["fused"], found["eager"], strict=True):
        close(a, b)
        assert float(a.abs().sum()) > 1


def test_rows_that_are_not_alike_stay_in_the_batch():
    """A drift that reads a tensor with a row for each path, or other rows, is given all of them whoever has stopped."""
    pull = torch.linspace(0.5, 1.5, 64, dtype=torch.float64)[:, None]
    for drift in (lambda x, t: pull * (x - x**3), lambda x, t: x.mean() - x):
        sde = sds.SDE(drift, lambda x, t: 0.7, noise="additive")
        sol = sds.solve(sde, start(64), grid=GRID[:81], solver=SOLVER, seed=2, until=EXITS, backend="eager")
        assert float(sol.stats.accepted.double().mean()) < 60
        assert sol.stats.work >= 64 * int(sol.stats.accepted.max())


@pytest.mark.parametrize(
    ("until", "error", "match"),
    [
        (
            sds.Crossing(first, -1),
            ValueError,
            "the level is -1 for path 100 at the start, t = 0, and",
        ),
        (sds.Crossing(lambda x, t: x[:, 0] + 1.0), ValueError, "start away from 0"),
        (sds.Reflection(first), ValueError, "at 0 or above"),
        (sds.Crossing(lambda x, t: x), ValueError, r"a number for each path, \(8,\)"),
        (sds.Crossing(lambda x, t: x[:, 0] * math.nan), ValueError, "the level is nan for path 100"),
        (lambda x, t: x[:, 0], TypeError, "until must be"),
        ([sds.Crossing(first), sds.Crossing(first, -1)], ValueError, "level of boundary 1"),
    ],
)
def test_boundaries_that_do_not_fit_are_refused_before_any_step(until, error, match):
    with pytest.raises(error, match=match):
        sds.solve(WELL, start(8), 0.0, 1.0, 4, solver=SOLVER, noise=sds.BrownianPath(1, 100), until=until)


def test_a_level_that_becomes_nan_is_named():
    until = sds.Crossing(lambda x, t: (x[:, 0] + 1.3).sqrt() - 1.9, 1)
    with pytest.raises(sds.DivergenceError, match=r"became nan for path \d+ in step \d+ of 200"):
        sds.solve(WELL, start(50), grid=GRID, solver=SOLVER, seed=1, until=until, backend="eager")
    with pytest.raises(ValueError, match="at grid points alone"):
        sds.solve(WELL, start(8), 0.0, 1.0, 4, solver=SOLVER, seed=1, until=EXITS, save_at=[0.3])
    with pytest.raises(ValueError, match="direction must be"):
        sds.Crossing(first, 2)
