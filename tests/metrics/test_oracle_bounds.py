"""Values of the oracle on laws that are hard to follow: right, with a bound that says how right, or refused."""

from __future__ import annotations

import math

import pytest
import torch

import sdesolve as sds
from sdesolve import grids, oracle
from sdesolve.oracle.bounds import check_sample
from sdesolve.oracle.transport import MixtureLaw

# Modes far apart, of small weights and other scales.
SEPARATED = sds.GaussianMixture(
    torch.tensor([[-8.0], [3.0], [20.0]]), torch.tensor([0.1, 1.0, 0.5]), weights=torch.tensor([0.9, 0.09, 0.01])
)
UNEVEN = sds.GaussianMixture(
    torch.tensor([[0.0], [12.0]]), torch.tensor([0.02, 0.3]), weights=torch.tensor([0.999, 0.001])
)


def sampled(solver, process, data, grid, n):
    """``W_2`` over the true law's deviation by stratified samples, and its standard error over eight of them."""
    found = []
    start, end = MixtureLaw(data, process, float(grid[0])), MixtureLaw(data, process, float(grid[-1]))
    strata = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    for seed in range(8):
        order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
        x = start.quantiles(strata)[order, None]
        stochasticity = solver.sampling_stochasticity
        score = data.score(process)
        sde = process.reverse(score, stochasticity) if stochasticity else process.probability_flow(score)
        x = sds.solve(sde, x, grid=grid, solver=solver, seed=seed, backend="eager").x1
        found.append(math.sqrt(float((x[:, 0].sort().values - end.quantiles(strata)).square().mean())) / end.std)
    values = torch.tensor(found, dtype=torch.float64)
    return float(values.mean()), float(values.std()) / math.sqrt(8)


@pytest.mark.parametrize(
    ("solver", "data"),
    [
        (sds.SDEDPMSolverPP2S(), SEPARATED),
        pytest.param(sds.Ancestral(), SEPARATED, marks=pytest.mark.thorough),
        pytest.param(sds.DPMSolverPP(2), SEPARATED, marks=pytest.mark.thorough),
        (sds.Ancestral(), UNEVEN),
    ],
    ids=["two stages", "ancestral", "deterministic", "ancestral, uneven"],
)
def test_modes_far_apart(solver, data):
    """Of SDE-DPM-Solver++(2S) in six steps on the first, the oracle said 2.1e33 with an error of 0."""
    process = sds.VP()
    grid = grids.uniform_log_snr(process, 6)
    found = oracle.measure(solver, process, data, grid)
    assert found.bound <= 2e-3 * found.value + 1e-6
    expected, deviation = sampled(solver, process, data, grid, 1 << 14)
    # A sample's own distance to its law adds some 1e-3.
    assert found.value == pytest.approx(expected, rel=4e-3, abs=5 * deviation + 5 * found.standard_error)


@pytest.mark.parametrize(
    ("solver", "value"), [(sds.SDEDPMSolverPP(), 0.55803), (sds.SASolver(2, 2), 0.53147)], ids=repr
)
def test_modes_far_apart_with_memory(solver, value, monkeypatch):
    """It said 2.91 and 61849. The values are those of two ways: joint densities, and two million paths."""
    monkeypatch.setattr("sdesolve.oracle.joint._MOST", 1 << 16)
    monkeypatch.setattr("sdesolve.oracle.joint._WIDEST", 1 << 23)
    monkeypatch.setattr("sdesolve.oracle.particles._COUNTS", {1: 1 << 15})
    found = oracle.measure(solver, sds.VP(), SEPARATED, grids.uniform_log_snr(sds.VP(), 6))
    assert 0.0 < found.standard_error < 0.01 * value
    assert found.value == pytest.approx(value, abs=5 * found.standard_error)


def test_in_the_plane_no_value_comes_from_lost_mass():
    """A mode of a hundredth lay outside of the box around the law."""
    process = sds.EDM(sigma_min=1.0, sigma_max=8.0)
    data = sds.GaussianMixture(torch.tensor([[0.0, 0.0], [6.0, 4.5]]), 0.5, weights=torch.tensor([0.99, 0.01]))
    found = oracle.measure(sds.Ancestral(), process, data, grids.karras(8.0, 1.0, 8))
    assert found.bound <= 2e-3 * found.value + 1e-6
    n = 1 << 16
    x = data.sample(n, seed=1, dtype=torch.float64)
    x = x + 8.0 * torch.randn(n, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    grid = grids.karras(8.0, 1.0, 8)
    x = sds.solve(process.reverse(data.score(process)), x, grid=grid, solver=sds.Ancestral(), seed=3).x1
    y = data.sample(n, seed=5, dtype=torch.float64)
    y = y + torch.randn(n, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(6))
    # Of the coarser events that cells of a mesh are, the distance is no larger: 12 x 12 cells of side 1.
    cells = [torch.histogramdd(v, bins=[12, 12], range=[-4.0, 8.0, -4.0, 8.0]).hist / n for v in (x, y)]
    coarse = 0.5 * float((cells[0] - cells[1]).abs().sum())
    noise = 0.5 * float((cells[0] + cells[1]).clamp(min=0).div(n).sqrt().sum())
    assert coarse - 3 * noise < found.value < 1.5 * coarse + 3 * noise


def test_what_no_mesh_resolves_is_refused():
    """Steps that add next to nothing, on a line and in the plane."""
    narrow = grids.karras(80.0, 1e-7, 8)
    with pytest.raises(ValueError, match=r"mesh|mass|resolves|points"):
        oracle.measure(sds.Ancestral(), sds.EDM(), SEPARATED, narrow)
    plane = sds.GaussianMixture(torch.tensor([[0.0, 0.0], [40.0, 0.0]]), 0.01)
    with pytest.raises(ValueError, match=r"mesh|mass|resolves"):
        oracle.measure(sds.Ancestral(), sds.EDM(), plane, grids.karras(80.0, 1e-3, 6))


def test_a_law_that_samples_do_not_have_is_refused():
    u = (torch.arange(4096, dtype=torch.float64) + 0.5) / 4096
    x, y = torch.special.ndtri(u), torch.randn(1 << 14, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    check_sample(x, u, y)
    for wrong in (x + 0.1, 1.1 * x, torch.where(u > 0.99, x + 0.5, x)):
        with pytest.raises(ValueError, match="not that of 16384 samples"):
            check_sample(wrong, u, y)
