"""Times as people have them: in any precision and container, far from 0, padded, in either direction."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from sdesolve_kernels.dispatch import use_backend

import sdesolve as sds
from sdesolve.integrate.save_at import SavePlan

EM = sds.EulerMaruyama()
CONTAINERS = {
    "float32": lambda a, b: torch.linspace(a, b, 31),
    "float16": lambda a, b: torch.linspace(a, b, 31, dtype=torch.float16),
    "list": lambda a, b: torch.linspace(a, b, 31).tolist(),
    "scalars": lambda a, b: [np.float32(a + (b - a) * k / 30) for k in range(31)],
    "tensors": lambda a, b: list(torch.linspace(a, b, 31)),
    "generator": lambda a, b: (a + (b - a) * k / 30 for k in range(31)),
    "set": lambda a, b: {a + (b - a) * k / 30 for k in range(31)},
    "array": lambda a, b: np.linspace(b, a, 31, dtype=np.float32)[::-1],
    "sums": lambda a, b: [a, *(a + np.cumsum(np.full(30, (b - a) / 30)))],
}


@pytest.mark.parametrize("times", CONTAINERS.values(), ids=CONTAINERS)
def test_grid_points_are_known_in_every_precision_and_container(times):
    """Of 100 round end times, 42 were refused in float32; the rest counted as times between grid points."""
    for end in [k / 10 for k in range(1, 101)]:
        for a, b in ((0.0, end), (end, 0.0), *(((-end, end), (100.0 + end, 100.0)) if end % 1 == 0.0 else ())):
            if times is CONTAINERS["float16"] and a > 100:
                continue  # 31 times are fewer in float16
            grid = sds.grids.uniform(a, b, 30)
            plan = SavePlan(grid, times(a, b))
            assert plan.on_grid == {k: [k] for k in range(31)}
            assert not plan.inside
            assert torch.equal(plan.ts, grid)


@pytest.mark.parametrize("ends", [(0.0, 0.3), (0.3, 0.0), (-0.1, 0.7)])
def test_saved_at_float32_times_are_the_states_of_the_grid(ends):
    sde = sds.SDE(lambda x, t: -x, lambda x, t: 0.1 * x)
    options = {"steps": 30, "solver": EM, "seed": 0, "backend": "eager"}
    whole = sds.solve(sde, torch.ones(3, 2), *ends, save_at="grid", **options)
    for t1 in (ends[1], torch.tensor(ends[1]), np.float32(ends[1])):
        sol = sds.solve(sde, torch.ones(3, 2), ends[0], t1, save_at=torch.linspace(*ends, 31), **options)
        torch.testing.assert_close(sol.xs, whole.xs, rtol=1e-6, atol=0)
    grid = torch.linspace(*ends, 31)  # the grid may be the one that was rounded
    times = [ends[0] + (ends[1] - ends[0]) * k / 30 for k in range(31)]
    sol = sds.solve(sde, torch.ones(3, 2), grid=grid, solver=EM, seed=0, save_at=times, backend="eager")
    torch.testing.assert_close(sol.xs, whole.xs, rtol=1e-6, atol=0)
    assert torch.equal(sol.ts, grid.double())


def test_a_time_of_its_own_is_no_grid_point():
    """What a precision resolves is kept apart: a float32 time a thousandth of a step away, a float64 one 1e-9."""
    cases = (torch.tensor([0.5, 0.5001]), 1e-3), ([0.5, 0.5 + 1e-9], 1e-8), (np.array([0.3, 0.5999]), 0.999)
    for times, theta in cases:
        plan = SavePlan(sds.grids.uniform(0.0, 1.0, 10), times)
        assert dict(plan.inside) == {5: [(1, pytest.approx(theta, rel=1e-3))]}


@pytest.mark.uncompiled
def test_neighbouring_saved_times_have_their_joint_law():
    n, dt = 20_000, 0.1
    motion = sds.SDE(lambda x, t: 0 * x, lambda x, t: 1.0, noise="additive")
    for apart in (2.0**-19 * dt, 2.0**-15 * dt):
        times = [0.05, 0.05 + apart, dt]
        sol = sds.solve(motion, torch.zeros(n).double(), 0.0, dt, 1, solver=EM, seed=3, save_at=times)
        assert abs(float((sol.xs[1] - sol.xs[0]).var()) / apart - 1) < 5 * math.sqrt(2 / n)
    near = sds.solve(motion, torch.zeros(n).double(), 0.0, dt, 1, solver=EM, seed=3, save_at=[1e-9, dt])
    assert abs(float(near.xs[0].var()) / 1e-9 - 1) < 5 * math.sqrt(2 / n)


@pytest.mark.parametrize("solver", [EM, sds.Milstein(), sds.Heun(), sds.RK4()], ids=repr)
def test_rows_are_padded_by_their_last_time(solver):
    """A step of no length is the identity, also where the functions have no value at the end of a row."""
    calculus = "stratonovich" if solver == sds.Heun() else "ito"
    end = 2.0 if solver in (EM, sds.Milstein()) else 2.5  # the others look at the functions there themselves
    bridge = sds.SDE(lambda x, t: -x / (end - t[..., None]), lambda x, t: 0.3 * x, calculus=calculus)
    if solver == sds.RK4():
        bridge = sds.ODE(lambda x, t: -x / (end - t[..., None]))
    long, short = sds.grids.uniform(0.0, 1.5, 6), sds.grids.uniform(0.5, 2.0, 3)
    grid = torch.stack([long, torch.cat([short, short[-1:].expand(3)])], dim=1)
    x0 = torch.tensor([[1.0, 2.0], [3.0, 4.0]], dtype=torch.float64)
    padded = sds.solve(bridge, x0, grid=grid, solver=solver, seed=1, save_at="grid")
    assert torch.equal(padded.xs[3, 1], padded.xs[6, 1])
    assert not torch.equal(padded.xs[3, 0], padded.xs[6, 0])
    for row, times in enumerate((long, short)):
        alone = sds.solve(
            bridge, x0[row : row + 1], grid=times[:, None], solver=solver, noise=sds.BrownianPath(1, first_path=row)
        )
        torch.testing.assert_close(padded.x1[row : row + 1], alone.x1, rtol=1e-12, atol=1e-12)
    shared = torch.cat([long, long[-1:], long[-1:]])
    sol = sds.solve(bridge, x0, grid=shared[:, None].expand(-1, 2), solver=solver, seed=1)
    assert torch.equal(sol.x1[0], sds.solve(bridge, x0, grid=long[:, None].expand(-1, 2), solver=solver, seed=1).x1[0])


DRIVE = sds.ODE(lambda x, t: 100.0 * torch.sin(2 * math.pi * 50.0 * t) - x)
FAR = [10.0, 86_400.0, -86_400.0, 1.7e9]


@pytest.mark.parametrize("t0", FAR)
@pytest.mark.parametrize("backend", ["eager", "fused", "kernel"])
def test_functions_get_the_time_with_the_digits_that_the_steps_have(t0, backend):
    """A 50 Hz drive a day after the origin, with a float32 state, was off by 0.17 of the amplitude, or 1.3."""
    for steps, sign in ((100, 1), (90, -1)):  # one kernel for all
        options = {"steps": steps, "solver": EM if backend == "kernel" else sds.RK4()}
        sde = DRIVE
        if backend == "kernel":
            sde = sds.SDE(lambda x, t: 100.0 * torch.sin(2 * math.pi * 50.0 * t) - x, lambda x, t: 0.0 * x)
            options["seed"] = 0
        single = sds.solve(sde, torch.ones(2, 1), t0, t0 + sign * 0.0125, backend=backend, **options)
        double = sds.solve(sde, torch.ones(2, 1).double(), t0, t0 + sign * 0.0125, backend="eager", **options)
        assert single.stats.execution == backend
        torch.testing.assert_close(single.x1, double.x1.float(), rtol=1e-5, atol=1e-6)


@pytest.mark.uncompiled
@pytest.mark.parametrize("t0", [0.0, 86_400.0, 1.7e9])
@pytest.mark.parametrize("backend", ["eager", "fused"])
def test_a_bridge_arrives_wherever_the_origin_of_time_is(t0, backend):
    """From 1.7e9 on it "diverged"; times between its steps follow from exact differences."""
    times = [t0 + 0.25, t0 + 0.999755859375, t0 + 1.0]  # no grid points but the last
    bridge = sds.SDE(lambda x, t: (1.0 - x) / (t0 + 1.0 - t), lambda x, t: 1.0, noise="additive")
    with use_backend("reference"):
        sol = sds.solve(bridge, torch.zeros(3, 2), t0, t0 + 1.0, 50, solver=EM, seed=0, save_at=times, backend=backend)
    near = sds.SDE(lambda x, t: (1.0 - x) / (1.0 - t), lambda x, t: 1.0, noise="additive")
    ref = sds.solve(near, torch.zeros(3, 2), 0.0, 1.0, 50, solver=EM, seed=0, save_at=[t - t0 for t in times])
    torch.testing.assert_close(sol.xs, ref.xs, rtol=1e-5, atol=2e-5 if t0 > 1e9 else 1e-5)


def rate(x):
    return torch.full((len(x), 1), 50.0, dtype=x.dtype)


@pytest.mark.parametrize(
    ("drift", "message"),
    [
        (lambda x, t: torch.sin(rate(x) * t) - x, "drift rounds t = 86400 to torch.float32"),
        (lambda x, t: torch.sin(rate(x) * (2.0 * t + 1.0)) - x, r"take off an origin.*\(t - t0\) \* w"),
        (lambda x, t: x - t, r"or integrate in float64, x0.double\(\)"),
        (
            lambda x, t: torch.nn.functional.linear(torch.cat([x, t.expand(len(x), 1)], 1), torch.ones(2, 3)),
            "drift fails on a",
        ),
    ],
)
def test_functions_that_round_the_time_are_refused(drift, message):
    for backend in ("eager", "auto"):
        with pytest.raises(ValueError, match=message):
            sds.solve(sds.ODE(drift), torch.ones(3, 2), 86_400.0, 86_400.01, 100, solver=EM, backend=backend)
    sds.solve(sds.ODE(drift), torch.ones(3, 2), 0.0, 0.01, 100, solver=EM, backend="eager")


def test_where_float32_will_do_functions_that_do_not_take_float64_get_it():
    """With steps of a thousand roundings: better in float64, but networks are not made for it."""
    weight, seen = torch.ones(2, 3), []

    def network(x, t):
        seen.append(t.dtype)
        return -0.1 * torch.nn.functional.linear(torch.cat([x, t.expand(len(x), 1)], 1), weight)

    for drift, dtype in ((network, torch.float32), (lambda x, t: (seen.append(t.dtype), -x)[1], torch.float64)):
        seen.clear()
        sds.solve(sds.ODE(drift), torch.ones(3, 2), 100.0, 100.02, 10, solver=EM, backend="eager")
        assert seen[-10:] == [dtype] * 10
        seen.clear()
        sds.solve(sds.ODE(drift), torch.ones(3, 2), 0.0, 0.02, 10, solver=EM, backend="eager")
        assert seen == [torch.float32] * 10


def test_functions_that_keep_the_time_are_not():
    """The advice of the refusals, and what has no dependence on time, runs; values are those of float64."""
    drifts = [
        lambda x, t: torch.sin(rate(x) * (t - 86_400.0)) - x,
        lambda x, t: x * torch.sin(50.0 * t),
        lambda x, t: -x,
        lambda x, t: torch.where(t > 86_400.005, x, -x),
    ]
    for drift in drifts:
        options = {"solver": sds.RK4(), "backend": "eager"}
        single = sds.solve(sds.ODE(drift), torch.ones(3, 2), 86_400.0, 86_400.01, 100, **options)
        double = sds.solve(sds.ODE(drift), torch.ones(3, 2).double(), 86_400.0, 86_400.01, 100, **options)
        torch.testing.assert_close(single.x1, double.x1.float(), rtol=2e-6, atol=2e-6)


def test_times_that_a_dtype_cannot_hold_are_refused_where_they_are_tensors():
    x0, drive = torch.ones(3, 2), sds.ODE(lambda x, t: torch.sin(50.0 * t)[:, None] - x)
    with pytest.raises(ValueError, match=r"float32 does not tell the times of this grid apart.*x0.double\(\)"):
        sds.solve(drive, x0, torch.full((3,), 86_400.0), 86_400.01, 100, solver=EM)
    sds.solve(drive, x0.double(), torch.full((3,), 86_400.0).double(), 86_400.01, 100, solver=EM)
    sds.solve(drive, x0, torch.full((3,), 86_400.0), 86_450.0, 100, solver=EM)
    flow = sds.LinearDiffusion(lambda t: torch.exp(-t / 1e6), lambda t: (t / 1e6).sqrt(), t_min=1.0, t_max=1e6)
    grid = 9e5 - torch.arange(11, dtype=torch.float64) * 1e-2
    with pytest.raises(ValueError, match="does not tell the times of this grid apart"):
        sds.solve(flow.probability_flow(lambda x, t: -x), x0, grid=grid, solver=sds.DDIM())


def test_steps_of_their_own_know_when_the_time_is_too_coarse():
    """A drift that does not depend on time, or slowly, goes on; another names the precision that would do."""
    x0, t0, options = torch.ones(3, 1), 86_400.0, {"solver": sds.DormandPrince()}
    fast = sds.ODE(lambda x, t: 100.0 * torch.sin(2 * math.pi * 50.0 * t.reshape(-1, 1)) - x)
    with pytest.raises(ValueError, match=r"float32 holds t = 86400 to 0.01.*float64, x0.double\(\)"):
        sds.solve(fast, x0, t0, t0 + 0.1, **options)
    sds.solve(fast, x0.double(), t0, t0 + 0.1, **options)
    for rate in (0.0, 1e-5):
        slow = sds.ODE(lambda x, t, rate=rate: -x * (1.0 + torch.sin(rate * t.reshape(-1, 1))))
        single, double = (sds.solve(slow, x, t0, t0 + 2.0, **options).x1 for x in (x0, x0.double()))
        torch.testing.assert_close(single, double.float(), rtol=3e-5, atol=0)


def driven(rate):
    def drift(x, t):
        return torch.sin(rate * (t.reshape(-1, 1) if t.ndim else t)) - x

    return sds.SDE(drift, lambda x, t: 0.1 * torch.ones_like(x), "additive")


@pytest.mark.slow
def test_cells_of_a_step_know_when_the_time_is_too_coarse():
    """Of the grid that cells lie in float32 holds every time, and of the cells not."""
    solver, x0, t0 = sds.Adaptive(sds.ShARK(), 1e-2, 2e-3), torch.ones(2, 1), 2.0**16
    t1 = t0 + 20.0
    options = {"solver": solver, "seed": 1, "save_at": [t0, t0 + 5.0, t1]}
    for backend in ("auto", "eager"):
        with pytest.raises(ValueError, match=r"float32 holds t = 655.* to 0.0078, by which the equation changes"):
            sds.solve(driven(300.0), x0, t0, t1, backend=backend, **options)
    with pytest.raises(ValueError, match=r"cannot be fused.*float32, which holds t = 655.*x0.double\(\)"):
        sds.solve(driven(300.0), x0, t0, t1, backend="fused", **options)
    # A slow drive goes on in torch, which sees at every step that it does no harm; one without time in a kernel.
    slow = sds.solve(driven(1e-4), x0, t0, t1, **options)
    assert slow.stats.execution == "eager"
    assert "which holds t = 655" in slow.stats.reason
    double = sds.solve(driven(1e-4), x0.double(), t0, t1, backend="eager", **options)
    torch.testing.assert_close(slow.xs, double.xs.float(), rtol=0, atol=5e-3)
    free = sds.SDE(lambda x, t: -x, lambda x, t: 0.1 * torch.ones_like(x), "additive")
    assert sds.solve(free, x0, t0, t1, **options).stats.execution == "fused"


@pytest.mark.parametrize("backend", ["eager", "fused"])
def test_a_time_with_more_digits_leaves_the_state_as_it_was(backend):
    """Functions that take a time of float64 get it; what they return at times of rows is of that dtype."""
    options = {"solver": sds.Adaptive(sds.ShARK(), 1e-2, 1e-3), "seed": 1, "backend": backend}
    found = [
        sds.solve(driven(314.0), x, 86_400.0, 86_400.1, **options)
        for x in (torch.ones(2, 1), torch.ones(2, 1).double())
    ]
    assert [sol.x1.dtype for sol in found] == [torch.float32, torch.float64]
    torch.testing.assert_close(found[0].x1.double(), found[1].x1, rtol=0, atol=1e-5)


@pytest.mark.slow
def test_fused_steps_of_any_length_know_it_too():
    """In the kernel a path ends where its steps come near the rounding of a time that its drift reads."""
    x0, t0, solver = torch.ones(3, 1), 86_400.0, sds.DormandPrince()
    fast = sds.ODE(lambda x, t: 100.0 * torch.sin(314.0 * (t.reshape(-1, 1) - t0)) - x)
    with pytest.raises(ValueError, match=r"cannot be fused.*holds t = 86400 to 0.01"):
        sds.solve(fast, x0, t0, t0 + 0.1, solver=solver, backend="fused")
    free = sds.solve(sds.ODE(lambda x, t: -x), x0, t0, t0 + 2.0, solver=solver, backend="fused")
    torch.testing.assert_close(free.x1, math.exp(-2) * x0, rtol=1e-2, atol=0)
