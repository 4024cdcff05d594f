"""How samplers run: by kernel as in torch, with a time per sample, captured, with evaluations counted."""

from __future__ import annotations

import pytest
import torch

import sdesolve as sds
from sdesolve.graphs import StraightSampler

DATA = sds.Gaussian(torch.tensor([0.5, -0.5, 0.0]), torch.tensor([1.0, 0.3, 2.0]))
PROCESSES = [
    *(sds.VP(), sds.VE(), sds.SubVP(), sds.OU(), sds.EDM()),
    sds.LinearDiffusion(alpha=lambda t: 1 - t, sigma=lambda t: t, t_max=0.999),
]
SAMPLERS = [
    sds.DPMSolverPP(1),
    sds.DPMSolverPP(2),
    sds.DPMSolverPP(3),
    sds.SDEDPMSolverPP(1),
    sds.SDEDPMSolverPP(2),
    sds.SDEDPMSolverPP(3),
]


def equation(process, solver):
    score = DATA.score(process)
    return process.reverse(score) if solver.weak_order else process.probability_flow(score)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("process", PROCESSES, ids=lambda p: type(p).__name__)
@pytest.mark.parametrize("solver", SAMPLERS, ids=repr)
def test_rows_by_kernel_are_rows_in_torch(solver, process, dtype):
    sde, grid = equation(process, solver), process.time_grid(12)
    x0 = process.sample_prior((5, 3), seed=1, dtype=dtype)
    a = sds.solve(sde, x0, grid=grid, solver=solver, seed=0)
    b = sds.solve(sde, x0, grid=grid, solver=solver, seed=0, backend="eager")
    assert (a.stats.backend, b.stats.backend) == ("kernel", "eager")
    assert a.stats.nfe == b.stats.nfe == 12 * solver.evaluations
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(a.x1, b.x1, rtol=0, atol=200 * eps)


@pytest.mark.parametrize("process", PROCESSES, ids=lambda p: type(p).__name__)
@pytest.mark.parametrize("solver", SAMPLERS, ids=repr)
@pytest.mark.parametrize("backend", ["auto", "eager"])
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
    x = sds.sample(process, DATA.score(process), (4, 3), grid=times, seed=5, solver=solver, **kind)
    torch.testing.assert_close(straight(seed=5), x, rtol=1e-10, atol=1e-10)
