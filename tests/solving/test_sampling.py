"""`sample` and Tweedie's formula. Known faults of other libraries, and what bad input is told."""

from __future__ import annotations

import math

import pytest
import torch

import sdesolve as sds
from sdesolve.scores.gaussian import Gaussian

PROCESSES = [sds.VP(), sds.VP(sds.CosineBeta()), sds.VE(), sds.SubVP(), sds.OU(), sds.EDM()]
DATA = Gaussian(torch.tensor([0.5, -0.5]), torch.tensor([[1.0, 0.6], [0.6, 1.0]]))


def ids(process):
    return type(process).__name__


LAWS = [
    (sds.EulerMaruyama(), None, 400),
    (sds.EulerMaruyama(), 0, 400),
    (sds.Heun(), None, 200),
    (sds.RK4(), None, 100),
]


@pytest.mark.parametrize(
    ("solver", "stochasticity", "steps", "process"),
    [
        pytest.param(*law, process, marks=[pytest.mark.thorough] if (i + j) % 2 else [])
        for i, law in enumerate(LAWS)
        for j, process in enumerate(PROCESSES)
    ],
    ids=ids,
)
def test_samples_have_the_law_of_the_data(process, solver, stochasticity, steps):
    """Any solver on the reverse SDE or the flow (peers crash on Euler-Maruyama with the flow)."""
    n = 4000
    x = sds.sample(
        process,
        DATA.score(process),
        (n, 2),
        solver=solver,
        steps=steps,
        seed=0,
        stochasticity=stochasticity,
        dtype=torch.float64,
    )
    # five standard deviations of a mean and of a covariance entry, and a bias of the discretisation of at most 0.05
    assert (x.mean(0) - DATA.mean).abs().max() < 5 / math.sqrt(n) + 0.05
    assert (torch.cov(x.T) - DATA.cov).abs().max() < 5 * math.sqrt(2 / n) + 0.05


@pytest.mark.parametrize("process", PROCESSES, ids=ids)
def test_a_sample_is_a_function_of_its_own_index(process):
    score = DATA.score(process)
    many = sds.sample(process, score, (50, 2), steps=6, seed=3, dtype=torch.float64)
    few = sds.sample(process, score, (8, 2), steps=6, seed=3, dtype=torch.float64)
    torch.testing.assert_close(many[:8], few, rtol=1e-12, atol=1e-12)
    shard = sds.sample(process, score, (5, 2), steps=6, noise=sds.BrownianPath(3, first_path=20), dtype=torch.float64)
    torch.testing.assert_close(many[20:25], shard, rtol=1e-12, atol=1e-12)
    assert not torch.isclose(many, sds.sample(process, score, (50, 2), steps=6, seed=4, dtype=torch.float64)).any()


def test_start_and_driving_noise_are_independent_streams():
    process = sds.VP()
    start = process.sample_prior((1000, 2), seed=0)
    dW = sds.BrownianPath(0).increments(torch.tensor([0.0, 1.0]), (1000, 2))[0]
    assert abs(float(torch.corrcoef(torch.stack([start.flatten(), dW.flatten()]))[0, 1])) < 5 / math.sqrt(2000)


def test_the_prior_has_its_log_density():
    prior = sds.VE().prior
    x = torch.randn(3, 2, 2, generator=torch.Generator().manual_seed(0)).double() * 30
    expected = torch.distributions.Normal(0.0, prior.std).log_prob(x).flatten(1).sum(1)
    torch.testing.assert_close(prior.log_prob(x), expected)


@pytest.mark.parametrize("process", PROCESSES, ids=ids)
def test_tweedie_is_the_posterior_mean(process):
    x = torch.randn(6, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    score = DATA.score(process)
    for t in (torch.tensor(0.3, dtype=torch.float64), torch.linspace(0.01, 0.9, 6, dtype=torch.float64)):
        torch.testing.assert_close(sds.tweedie(process, score, x, t), score.denoise(x, t), rtol=1e-9, atol=1e-9)


@pytest.mark.uncompiled
def test_denoising_takes_the_last_noise_away():
    process = sds.EDM(sigma_min=0.5)
    sharp = Gaussian(torch.zeros(2), torch.tensor(1e-4))
    options = {"steps": 200, "seed": 0, "solver": sds.Heun(), "dtype": torch.float64}
    noisy = sds.sample(process, sharp.score(process), (2000, 2), denoise=False, **options)
    clean = sds.sample(process, sharp.score(process), (2000, 2), **options)
    assert noisy.std() > 0.3
    assert clean.std() < 0.02


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({}, ValueError, "give steps.*or grid"),
        ({"steps": 3, "grid": torch.tensor([1.0, 0.1])}, ValueError, "give steps.*or grid"),
        ({"steps": 0}, ValueError, "steps must be at least 1, got 0"),
        ({"steps": 2.0}, TypeError, "steps must be an integer"),
        ({"grid": torch.tensor([0.1, 1.0])}, ValueError, r"decreases within \(0, t_max = 1.0\]"),
        ({"grid": torch.tensor([1.5, 0.1])}, ValueError, r"decreases within \(0, t_max = 1.0\].*from 1.5 to 0.1"),
        ({"grid": torch.tensor([1.0, 0.0])}, ValueError, r"decreases within \(0, t_max = 1.0\]"),
        ({"steps": 3, "stochasticity": 1.0, "solver": sds.RK4()}, ValueError, "RK4 integrates ODEs.*stochasticity=0"),
        ({"steps": 3, "stochasticity": -1.0}, ValueError, "stochasticity must be a positive number"),
        ({"steps": 3, "seed": 0, "noise": sds.BrownianPath(0)}, ValueError, "give one of them"),
        ({"steps": 3, "noise": 5}, TypeError, "noise must be a BrownianPath, got int; a number goes to seed="),
        ({"steps": 3, "backend": "gpu"}, ValueError, "backend must be one of 'auto', 'fused', 'kernel', 'eager', got"),
        ({"stochasticity": 0, "solver": sds.DormandPrince(), "backend": "kernel"}, ValueError, "runs eagerly"),
        ({"steps": 3, "dtype": torch.float16}, TypeError, "must be torch.float32 or torch.float64, got torch.float16"),
        ({"steps": 3, "shape": 4}, TypeError, r"shape must be \(batch, \*state\), such as \(64, 2\), got 4"),
        ({"steps": 3, "shape": (4.0, 2)}, TypeError, "each entry of shape must be an integer, got 4.0.*write 4"),
        ({"steps": 3, "stochasticity": "ode"}, TypeError, "stochasticity must be a number, got 'ode'"),
        ({"steps": 3, "solver": sds.DPMSolverPP}, TypeError, r"did you mean DPMSolverPP\(...\)"),
        ({"steps": 3, "shape": (4, 3)}, ValueError, r"x must have shape \(batch, 2\)"),
    ],
)
def test_bad_requests(options, error, message):
    process = sds.VP()
    options = {"shape": (4, 2), **options}
    with pytest.raises(error, match=message):
        sds.sample(process, DATA.score(process), options.pop("shape"), **options)


def test_a_grid_of_the_process_that_is_none_is_refused(monkeypatch):
    process = sds.VP()
    monkeypatch.setattr(sds.VP, "time_grid", lambda self, steps: torch.tensor([1.0, 0.2, 0.5, 0.1]))
    with pytest.raises(ValueError, match="grid must"):
        sds.sample(process, DATA.score(process), (4, 2), steps=3)


@pytest.mark.uncompiled
def test_a_score_of_the_wrong_shape_or_that_fails_is_named():
    process = sds.VP()
    with pytest.raises(ValueError, match=r"score must return the shape of the state, \(4, 2\), got \(4, 1\)"):
        sds.sample(process, lambda x, t: x[:, :1], (4, 2), steps=3, seed=0)
    with pytest.raises(sds.DivergenceError, match=r"step 0 of 3, which starts at t = 1: the drift returned nan"):
        sds.sample(process, lambda x, t: x * math.nan, (4, 2), steps=3, seed=0)
    with pytest.raises(TypeError, match=r"process must be a linear diffusion such as VP\(\), got SDE"):
        sds.sample(sds.SDE(lambda x, t: x, lambda x, t: x), DATA.score(process), (4, 2), steps=3)


@pytest.mark.uncompiled
def test_process_and_score_that_do_not_go_together():
    process, other = sds.VP(), sds.VP(sds.CosineBeta())
    network = sds.NetworkScore(sds.nn.MLP((2,), width=4, depth=0), other)
    exact, A = DATA.score(other), sds.operators.Matrix(torch.ones(1, 2))
    wrapped = [
        sds.ClassifierFreeGuidance(DATA.score(process), exact, scale=2.0),
        sds.ClassifierGuidance(exact, lambda x, t: x, 1),
        sds.inverse.MMPS(exact, process, A, torch.ones(1), 0.1),
        sds.inverse.PiGDM(DATA.score(process), other, A, torch.ones(1), 0.1),
        sds.inverse.DPS(sds.ClassifierFreeGuidance(network, network, scale=2.0), process, A, torch.ones(1), 0.1),
    ]
    for score in (exact, network, *wrapped):
        with pytest.raises(
            ValueError, match=r"score was made for VP\(schedule=CosineBeta\(s=0.008, .* sigma .* Give score.process"
        ):
            sds.sample(process, score, (4, 2), steps=3, seed=0)
        with pytest.raises(ValueError, match=r"Give score\.process"):
            sds.log_likelihood(process, score, torch.zeros(2, 2))
    # one law, two objects, two working intervals
    again = DATA.score(sds.VP(sds.LinearBeta(t_min=1e-4)))
    assert torch.equal(
        sds.sample(process, again, (4, 2), steps=3, seed=0),
        sds.sample(process, DATA.score(process), (4, 2), steps=3, seed=0),
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((sds.VP, DATA.score(sds.VP())), r"got the class VP; did you mean VP\(...\)\?"),
        ((DATA.score(sds.VP()), sds.VP()), "got ExactScore; the process comes first, then the score"),
        ((sds.VP().reverse(lambda x, t: -x), lambda x, t: -x), "got ReverseSDE; give the forward process"),
        ((sds.VP(), DATA), r"got the law Gaussian; give its .score\(process\)"),
    ],
)
def test_process_and_score_of_the_wrong_kind(arguments, message):
    with pytest.raises(TypeError, match=message):
        sds.sample(*arguments, (4, 2), steps=3)


def test_a_network_in_another_precision_or_place_is_told_from_a_wrong_one():
    process = sds.VP()
    for kind, error, message in (
        (torch.float64, TypeError, r"weights are torch.float64, the state is torch.float32.*dtype=torch.float64"),
        ("meta", ValueError, "weights are on meta, the state is on cpu"),
    ):
        score = sds.NetworkScore(torch.nn.Sequential(torch.nn.Linear(2, 2)).to(kind), process)
        score.net.forward = lambda x, t, first=score.net[0]: first(x)
        with pytest.raises(error, match=message):
            sds.sample(process, score, (4, 2), steps=3, seed=0, backend="eager")
