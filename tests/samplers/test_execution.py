"""How samplers run: by kernel as in torch, with a time per sample, captured, with evaluations counted."""

from __future__ import annotations

import pytest
import torch
from sdesolve_kernels import use_backend
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

import sdesolve as sds
from sdesolve.integrate.cuda_graph import StraightSampler
from sdesolve.sde import Noise
from sdesolve.solvers.tabulated import row_step

DATA = sds.Gaussian(torch.tensor([0.5, -0.5, 0.0]), torch.tensor([1.0, 0.3, 2.0]))
PROCESSES = [
    *(sds.VP(), sds.VE(), sds.SubVP(), sds.OU(), sds.EDM()),
    sds.LinearDiffusion(alpha=lambda t: 1 - t, sigma=lambda t: t, t_max=0.95),
]
SAMPLERS = [
    sds.ReverseDiffusion(),
    sds.Ancestral(),
    sds.Ancestral("forward"),
    sds.DDIM(),
    sds.DDIM(0.4),
    *(sds.DPMSolver(order) for order in (1, 2, 3)),
    *(sds.DPMSolverPP(order) for order in (1, 2, 3)),
    *(sds.SDEDPMSolverPP(order) for order in (1, 2, 3)),
    sds.DPMSolverPP2S(),
    sds.SDEDPMSolverPP2S(),
    sds.DEIS(3),
    sds.LinearMultistep(4),
    sds.UniPC(3),
    sds.UniPC(1, "bh1"),
    sds.SASolver(3, 3),
    sds.SASolver(1, 0),
    sds.EDMHeun(),
    sds.EDMHeun(churn=6.0, churn_range=(0.05, 20.0), churn_noise=1.01),
    sds.DPM2(),
    sds.DPM2(churn=6.0),
]
# Beside the state, per step: values kept, independent draws of noise.
CARRIED = {
    sds.DDIM(): (0, 0),
    sds.Ancestral(): (0, 1),
    sds.DPMSolver(3): (0, 0),
    sds.DPMSolverPP(3): (2, 0),
    sds.SDEDPMSolverPP(2): (1, 1),
    sds.SDEDPMSolverPP2S(): (0, 2),
    sds.DEIS(3): (2, 0),
    sds.UniPC(3): (3, 0),
    sds.SASolver(2, 2): (2, 1),
    sds.EDMHeun(): (0, 0),
    sds.DPM2(churn=1.0): (0, 1),
}


class NoReads(TorchDispatchMode):
    """Fails where a tensor's value would have to come to the host."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default):
            raise AssertionError(f"{func} waits for the device")
        return func(*args, **(kwargs or {}))


def equation(process, solver):
    score = DATA.score(process)
    if solver.weak_order is None:
        return process.probability_flow(score)
    return process.reverse(score, solver.stochasticity or 1.0)


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.float64, marks=pytest.mark.thorough)])
@pytest.mark.parametrize("process", PROCESSES, ids=lambda p: type(p).__name__)
@pytest.mark.parametrize("solver", SAMPLERS, ids=repr)
def test_rows_by_kernel_are_rows_in_torch(solver, process, dtype):
    sde, grid = equation(process, solver), process.time_grid(12)
    x0 = process.sample_prior((5, 3), seed=1, dtype=dtype)
    a = sds.solve(sde, x0, grid=grid, solver=solver, seed=0, backend="kernel")
    b = sds.solve(sde, x0, grid=grid, solver=solver, seed=0, backend="eager")
    assert (a.stats.backend, b.stats.backend) == ("kernel", "eager")
    assert a.stats.nfe == b.stats.nfe == 12 * solver.evaluations
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(a.x1, b.x1, rtol=0, atol=400 * eps)


@pytest.mark.parametrize("solver", [sds.SDEDPMSolverPP(3), sds.SDEDPMSolverPP2S(), sds.DPM2(churn=6.0)], ids=repr)
def test_a_whole_trajectory_in_one_kernel(solver):
    """Traced from the same lines, memory, several draws and a step to zero noise included."""
    process = sds.EDM()
    sde = equation(process, solver)
    grid = torch.cat([process.time_grid(6), torch.zeros(1, dtype=torch.float64)])
    x0 = process.sample_prior((5, 3), seed=1, dtype=torch.float64)
    a = sds.solve(sde, x0, grid=grid, solver=solver, seed=0, backend="fused")
    b = sds.solve(sde, x0, grid=grid, solver=solver, seed=0, backend="eager")
    torch.testing.assert_close(a.x1, b.x1, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("solver", [*SAMPLERS, sds.EulerMaruyama(), sds.Heun()], ids=repr)
def test_a_kernel_is_found_again(solver, monkeypatch):
    """For an equation made anew, and another seed: to trace it once more would take longer than many a run."""
    process = sds.VP()

    def run(seed):
        sde = equation(process, solver)
        return sds.solve(sde, torch.ones(2, 3), grid=process.time_grid(4), solver=solver, seed=seed, backend="fused")

    with use_backend("reference"):
        first = run(0)
        monkeypatch.setattr("sdesolve.integrate.fused._build", lambda *_: pytest.fail("the kernel is made again"))
        assert torch.equal(run(0).x1, first.x1)
        assert torch.equal(run(1).x1, first.x1) is (equation(process, solver).noise is Noise.NONE)


@pytest.mark.parametrize("process", PROCESSES[-4:], ids=lambda p: type(p).__name__)
@pytest.mark.parametrize("solver", SAMPLERS, ids=repr)
@pytest.mark.parametrize("backend", ["kernel", "eager"])
def test_a_time_per_sample_is_each_sample_alone(solver, process, backend):
    sde = equation(process, solver)
    ends = torch.linspace(1.0, 0.7, 3, dtype=torch.float64) * process.t_max
    grid = torch.stack([sds.grids.karras(float(t), process.t_min, 8) for t in ends], dim=1)
    x0 = process.sample_prior((3, 3), seed=1, dtype=torch.float64)
    together = sds.solve(sde, x0, grid=grid, solver=solver, seed=0, backend=backend).x1
    for i in range(3):
        noise = sds.BrownianPath(0, first_path=i)
        alone = sds.solve(sde, x0[i : i + 1], grid=grid[:, i], solver=solver, noise=noise, backend=backend).x1
        torch.testing.assert_close(together[i : i + 1], alone, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("solver", SAMPLERS, ids=repr)
def test_a_straight_sampler_is_the_sampler(solver):
    process = sds.VP()
    sde, times = equation(process, solver), process.time_grid(9)
    device = torch.device("cpu")
    kind = {"denoise": True, "dtype": torch.float64}
    straight = StraightSampler(process, DATA.score(process), sde, solver, times, (4, 3), device=device, **kind)
    with NoReads():
        x = straight(seed=5, first_path=2)
    noise = sds.BrownianPath(5, first_path=2)
    stochasticity = None if solver.weak_order is None else solver.stochasticity or 1.0
    options = {"grid": times, "noise": noise, "solver": solver, "stochasticity": stochasticity, **kind}
    y = sds.sample(process, DATA.score(process), (4, 3), backend="kernel", **options)
    torch.testing.assert_close(x, y, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("solver", SAMPLERS, ids=repr)
def test_a_sample_is_a_function_of_its_own_index(solver):
    process = sds.VP()
    options = {"steps": 5, "solver": solver, "dtype": torch.float64, "backend": "kernel"}
    many = sds.sample(process, DATA.score(process), (20, 3), seed=3, **options)
    shard = sds.sample(process, DATA.score(process), (4, 3), noise=sds.BrownianPath(3, first_path=9), **options)
    torch.testing.assert_close(many[9:13], shard, rtol=1e-11, atol=1e-12)
    other = sds.sample(process, DATA.score(process), (20, 3), seed=4, **options)
    assert not torch.isclose(many, other).any()


@pytest.mark.parametrize("solver", SAMPLERS, ids=repr)
def test_a_step_can_be_traced(solver):
    """One row-driven step, every number an input: the graph of one step does for all of them."""
    process = sds.VP()
    sde, times = equation(process, solver), process.time_grid(4)
    table = solver.table(sde, times)
    x = process.sample_prior((4, 3), seed=1, dtype=torch.float64)
    memory = tuple(torch.full_like(x, 0.1 * (i + 1)) for i in range(solver.memory))
    normals = [torch.full_like(x, 0.3) if noisy else None for noisy in table.noisy]

    def step(x, memory, t, rows, normals):
        return row_step(solver, sde.field, t.unbind(0), rows, normals, x, memory)

    def numbers(k):
        return table.times[k], [rows[k] for rows in table.rows]

    graph = make_fx(step)(x, memory, *numbers(0), normals)
    for k in (0, 2, 3):
        torch.testing.assert_close(
            graph(x, memory, *numbers(k), normals), step(x, memory, *numbers(k), normals), rtol=1e-14, atol=1e-14
        )


@pytest.mark.parametrize(("solver", "carried"), CARRIED.items(), ids=repr)
def test_what_a_step_carries_and_draws(solver, carried):
    table = solver.table(equation(sds.VP(), solver), sds.VP().time_grid(6))
    assert (solver.memory, table.draws) == carried
    assert table.times.shape == (6, solver.evaluations)
    assert all(2 <= rows.shape[1] <= 6 for rows in table.rows)  # linear_step takes four terms beside the state


@pytest.mark.parametrize("draws", [1, 2])
def test_draws_are_taken_in_order_from_the_driving_noise(draws):
    """Draw ``j`` of step ``k`` is number ``k draws + j`` of each path's sequence."""
    solver = {1: sds.SDEDPMSolverPP(1), 2: sds.SDEDPMSolverPP2S()}[draws]
    process = sds.EDM()
    # Without data the chain adds up its noise, with coefficients of the table alone.
    sde = process.reverse(lambda x, t: torch.zeros_like(x))
    times = process.time_grid(3)
    table = solver.table(sde, times)
    x0 = torch.zeros(2, 3, dtype=torch.float64)
    z = sds.BrownianPath(7).increments(torch.arange(3 * draws + 1.0), (2, 3), dtype=torch.float64)
    x = x0
    for k in range(3):
        normals = [z[k * draws + j] for j in range(draws)]
        rows = [rows[k] for rows in table.rows]
        noise = [None] * (len(rows) - draws) + normals
        x, _ = row_step(solver, lambda x, t: torch.zeros_like(x), table.times[k].unbind(0), rows, noise, x, ())
    for backend in ("kernel", "eager"):
        got = sds.solve(sde, x0, grid=times, solver=solver, seed=7, backend=backend).x1
        torch.testing.assert_close(got, x, rtol=1e-11, atol=1e-11)


def test_coarse_increments_drive_samplers():
    """Sums of fine ones, fused and in torch; a kernel of one row makes plain normals alone."""
    process = sds.VP()
    sde, noise = process.reverse(DATA.score(process)), sds.BrownianPath(0, substeps=4)
    x0 = process.sample_prior((4, 3), seed=1, dtype=torch.float64)
    options = {"grid": process.time_grid(5), "solver": sds.SDEDPMSolverPP(2), "noise": noise}
    fused, eager = (sds.solve(sde, x0, **options, backend=backend) for backend in ("auto", "eager"))
    assert fused.stats.execution == "fused", fused.stats.reason
    torch.testing.assert_close(fused.x1, eager.x1, rtol=1e-11, atol=1e-11)
    with pytest.raises(ValueError, match="coarse or weak increments"):
        sds.solve(sde, x0, **options, backend="kernel")


@pytest.mark.parametrize("solver", [sds.DPMSolverPP(3), sds.SASolver(2, 2), sds.EDMHeun()], ids=repr)
def test_gradients_flow_through_rows(solver):
    process = sds.VP()
    sde, grid = equation(process, solver), process.time_grid(6)
    grads = []
    for backend in ("kernel", "eager"):
        x0 = process.sample_prior((2, 3), seed=1, dtype=torch.float64).requires_grad_()
        sds.solve(sde, x0, grid=grid, solver=solver, seed=0, backend=backend).x1.square().sum().backward()
        grads.append(x0.grad)
    assert grads[0].abs().max() > 0
    torch.testing.assert_close(*grads, rtol=1e-10, atol=1e-12)


def test_a_second_pass_starts_without_memory():
    """`solve` goes through an integration again to report where it diverged; memory must not leak from the first."""
    process = sds.VP()
    calls = []

    def score(x, t):
        calls.append(t)
        return x * (float("nan") if t < 0.5 else -1.0)

    with pytest.raises(sds.DivergenceError, match=r"step 6 of 10, which starts at t = 0\.4006.*drift returned nan"):
        sds.sample(process, score, (2, 3), steps=10, solver=sds.DPMSolverPP(3), seed=0, backend="kernel")


@pytest.mark.parametrize("backend", ["fused", "kernel", "eager"])
def test_states_are_saved_on_and_between_grid_points(backend):
    process = sds.EDM()
    flow, exact = process.probability_flow(DATA.score(process)), DATA.flow(process)
    grid = sds.grids.geometric(20.0, 0.5, 60)
    x0 = process.sample_prior((4, 3), seed=1, dtype=torch.float64)
    saved = [float(grid[10]), 3.0, 1.1, 0.5]
    options = {"grid": grid, "solver": sds.UniPC(2), "backend": backend}
    sol = sds.solve(flow, x0, save_at=saved, **options)
    for t, x in zip(saved, sol.xs, strict=True):
        torch.testing.assert_close(x, exact(x0, 20.0, t), rtol=2e-3, atol=2e-3)
    assert torch.equal(sol.x1, sds.solve(flow, x0, **options).x1)


def test_samplers_with_the_same_settings_are_equal():
    assert sds.DPMSolverPP(2) == sds.DPMSolverPP(order=2) != sds.DPMSolverPP(3)
    assert hash(sds.EDMHeun(churn=2.0)) == hash(sds.EDMHeun(churn=2.0))
    assert sds.DPM2() != sds.EDMHeun()
    assert repr(sds.SASolver(3, 1)) == "SASolver(predictor=3, corrector=1)"
    assert repr(sds.Heun()) == "Heun()"
    assert len({sds.EulerMaruyama(), sds.EulerMaruyama(), sds.DDIM(), sds.DDIM(0.5)}) == 3
