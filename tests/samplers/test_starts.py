"""Where `sample` starts: at a given state and time, from the law at its first time, or where a run stopped."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

import sdesolve as sds

DATA = sds.Gaussian(torch.tensor([0.5, -0.5]), torch.tensor([1.0, 0.3]))
PROCESSES = [sds.VP(), sds.VP(sds.CosineBeta()), sds.SubVP(), sds.VE(), sds.OU(), sds.EDM()]
PROCESSES.append(sds.LinearDiffusion(lambda t: 1 - t, lambda t: t, t_max=0.99))


def test_a_grid_starts_from_the_law_at_its_first_time():
    """From N(0, 80^2) at a time of 10 samples had a standard deviation of 2.4."""
    process, seen = sds.EDM(), []
    score = DATA.score(process)

    def watched(x, t):
        seen.append((float(t), float(x.std())))
        return score(x, t)

    options = {"solver": sds.EDMHeun(), "seed": 0, "backend": "eager"}
    x = sds.sample(process, watched, (4000, 2), grid=sds.grids.karras(10.0, 0.002, 40), **options)
    t, std = seen[0]
    assert t == 10.0
    assert abs(std / 10.0 - 1) < 5 / math.sqrt(2 * 8000)
    assert (x.var(0) - torch.tensor([1.0, 0.3])).abs().max() < 0.02 + 5 * math.sqrt(2 / 4000)  # prior of variance 100


@pytest.mark.parametrize("process", PROCESSES, ids=lambda p: type(p).__name__)
def test_the_prior_at_a_time_leads_to_the_prior(process):
    """Noised on to ``t_max`` it is the prior, where the process has one for some variance of the data."""
    assert process.prior_at(process.t_max) == process.prior
    for share in (0.9, 0.5, 0.2):
        t = share * process.t_max
        scale, std = process.transition(t, process.t_max)
        later = float((scale * process.prior_at(t).std) ** 2 + std**2) ** 0.5
        assert later == pytest.approx(process.prior.std, rel=0.05 if isinstance(process, sds.SubVP) else 1e-6)
        assert process.prior_at(t).std >= float(process.sigma(t)) * (1 - 1e-12)


@pytest.mark.parametrize("process", PROCESSES, ids=lambda p: type(p).__name__)
@pytest.mark.parametrize("solver", [sds.EulerMaruyama(), sds.DPMSolverPP(2), sds.DormandPrince()], ids=repr)
def test_samples_go_on_from_a_given_state_and_time(process, solver):
    """Image to image: states of the true law at a time end in the law of the data."""
    t, n, z = 0.4 * process.t_max, 4000, torch.randn(4000, 2, generator=torch.Generator().manual_seed(0))
    m = process.marginal(DATA.sample(n, seed=1), t)
    steps = {} if isinstance(solver, sds.DormandPrince) else {"steps": 120}
    options = {"x0": m.mean + m.std * z, "from_time": t, "solver": solver, "seed": 2, "backend": "eager"}
    x = sds.sample(process, DATA.score(process), **options, **steps)
    assert x.shape == (n, 2)
    assert (x.mean(0) - DATA.mean).abs().max() < 5 / math.sqrt(n) + 0.03
    assert (x.var(0) - torch.tensor([1.0, 0.3])).abs().max() < 5 * math.sqrt(2 / n) + 0.05


@pytest.mark.parametrize("process", PROCESSES, ids=lambda p: type(p).__name__)
@pytest.mark.parametrize("steps", [1, 7, 100])
def test_steps_from_a_time_are_those_that_the_process_takes_there(process, steps):
    seen = []

    def score(x, t):
        seen.append(float(t))
        return 0 * x

    first = 0.3 * process.t_max + 0.7 * process.t_min
    sds.sample(process, score, (1, 1), from_time=first, steps=steps, solver=sds.DDIM(), seed=0, backend="eager")
    assert seen[0] == pytest.approx(first, rel=1e-6)
    assert len(seen) == steps + 1
    assert seen[-1] == pytest.approx(process.t_min, rel=1e-6)
    assert all(a > b for a, b in itertools.pairwise(seen))
    seen.clear()
    sds.sample(process, score, (1, 1), from_time=process.t_max, steps=steps, solver=sds.DDIM(), seed=0, backend="eager")
    assert seen == pytest.approx(process.time_grid(steps).tolist(), rel=1e-6)


@pytest.mark.parametrize("solver", [sds.UniPC(2), sds.SDEDPMSolverPP(2), sds.SDEDPMSolverPP2S()], ids=repr)
def test_sampling_goes_on_where_a_run_stopped(solver):
    process = sds.VP()
    score, grid, options = DATA.score(process), process.time_grid(9), {"solver": solver, "backend": "eager"}
    whole = sds.sample(process, score, (5, 2), grid=grid, seed=3, **options)
    backward = process.probability_flow(score) if solver.weak_order is None else process.reverse(score)
    x0 = process.sample_prior((5, 2), seed=3)
    first = sds.solve(backward, x0, grid=grid[:4], noise=sds.BrownianPath(3), **options)
    assert torch.equal(sds.sample(process, score, start=first.state, grid=grid[3:], **options), whole)
    assert sds.sample(process, score, start=first.state, steps=5, **options).shape == (5, 2)


X0 = torch.zeros(4, 2)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({}, TypeError, r"give the shape of the result, \(batch, \*state\), or x0"),
        ({"x0": X0, "shape": (3, 2)}, ValueError, r"shape of the samples is that of x0, \(4, 2\), got \(3, 2\)"),
        ({"x0": X0, "dtype": torch.float64}, ValueError, "dtype of the samples is that of x0, torch.float32"),
        ({"x0": X0.half()}, TypeError, "x0 must be float32 or float64"),
        ({"x0": X0, "device": "meta"}, ValueError, "samples are made where x0 is, on cpu, got device='meta'"),
        ({"x0": X0, "from_time": 0.0}, ValueError, r"from_time must lie in \(t_min, t_max\] = \(0.001, 1.0\], got 0.0"),
        ({"x0": X0, "from_time": 1.5}, ValueError, "from_time must lie in"),
        ({"x0": X0, "from_time": "half"}, TypeError, "from_time must be a number, got 'half'"),
        ({"x0": X0, "from_time": 0.5, "steps": None, "grid": [0.5, 0.1]}, ValueError, "a grid begins at its own first"),
        ({"x0": X0, "from_time": 0.001 + 1e-12}, ValueError, "too near t_min = 0.001 for 3 steps"),
        ({"x0": X0, "cuda_graph": True}, ValueError, "starts from the prior; leave out cuda_graph, or x0 and start"),
        ({"start": X0}, TypeError, "start must be the state of a Solution"),
    ],
)
def test_starts_that_are_none(options, error, message):
    process = sds.VP()
    with pytest.raises(error, match=message):
        sds.sample(process, DATA.score(process), **{"steps": 3, "seed": 0, **options})


@pytest.mark.parametrize("process", PROCESSES, ids=lambda p: type(p).__name__)
def test_the_first_step_from_a_time_is_none_of_rounding(process):
    """From t = 0.1009 on VP the first of 20 steps was 4e-6 long, and DPMSolverPP(2) went to 9e4 in float32."""
    for share in torch.linspace(0.02, 0.98, 25, dtype=torch.float64).tolist():
        first = process.t_min + share * (process.t_max - process.t_min)
        seen = []

        def score(x, t, seen=seen):
            seen.append(float(t))
            return 0 * x

        sds.sample(process, score, (1, 1), from_time=first, steps=20, solver=sds.DDIM(), seed=0, backend="eager")
        lengths = [a - b for a, b in itertools.pairwise(seen)]
        assert len(lengths) == 20
        assert 0.3 < lengths[0] / lengths[1] < 6.0
