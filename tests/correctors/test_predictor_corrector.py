"""Correctors between the steps of a sampler: the published figures, exact moments, and what norms do."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from sdesolve_kernels import Stream, langevin_step, use_backend

import sdesolve as sds
from sdesolve import grids, oracle
from sdesolve.brownian import AbstractNoise
from sdesolve.solvers import AbstractTabulated

PREDICTORS = [
    *(sds.EulerMaruyama(), sds.Ancestral(), sds.ReverseDiffusion(), sds.DDIM(0.0), sds.DPMSolverPP(2), sds.EDMHeun()),
    *(sds.SDEDPMSolverPP(2), sds.DPMSolver(3), sds.UniPC(), sds.SASolver(), sds.Heun(), sds.RK4()),
]
SIMPLE = sds.LangevinCorrector(snr=0.1)


def spectrum() -> torch.Tensor:
    lam = torch.arange(1, 257, dtype=torch.float64) ** -2.0
    return 0.25 * lam / lam.mean()


@pytest.mark.parametrize(
    ("nfe", "published"),
    [(5, 9.318e-1), (9, 5.831e-1), (19, 3.500e-1), (35, 2.119e-1), (79, 9.656e-2), (159, 4.432e-2), (319, 1.787e-2)],
)
def test_the_published_errors_of_predictor_corrector_sampling(nfe, published):
    """Relative Wasserstein errors on a 256-d Gaussian of spectrum k^-2 under EDM: ancestral steps, each with a Langevin
    step at SNR 0.16 that takes the root mean square of the chain's own scores for the norm.

    The published row counts two evaluations for each of its (nfe - 1) / 2 grid points and one for the end, so its grid
    has (nfe - 1) / 2 points before 0."""
    lam, snr = spectrum(), 0.16
    grid = grids.karras(80.0, 0.002, (nfe - 1) // 2 - 1)
    scale, variance = {}, torch.full((256,), 6400.0, dtype=torch.float64)
    for t, u in zip(grid[:-1].tolist(), grid[1:].tolist(), strict=True):  # the chain by hand, for the norms
        q = (u / t) ** 2
        variance = (1 - t**2 * (1 - q) / (lam + t**2)) ** 2 * variance + u**2 * (1 - q)
        scale[u] = 256 / float((variance / (lam + u**2) ** 2).sum())
        delta = 2 * snr**2 * scale[u]
        variance = (1 - delta / (lam + u**2)) ** 2 * variance + 2 * delta
    corrector = sds.LangevinCorrector(
        step_size=2 * snr**2, scale=lambda times: torch.tensor([scale[t] for t in times.tolist()], dtype=torch.float64)
    )
    solver = sds.PredictorCorrector(sds.Ancestral(), corrector)
    data = sds.Gaussian(torch.zeros(256), lam)
    error = oracle.error(solver, sds.EDM(), data, grid, prior=True, denoise=True)
    assert error == pytest.approx(published, rel=0.01)
    last = grid[-1] ** 2
    by_hand = (lam / (lam + last)).square() * variance
    assert error == pytest.approx(float((by_hand.sqrt() - lam.sqrt()).norm() / lam.sum().sqrt()), rel=1e-9)


@pytest.mark.parametrize("n", [1, 3])
def test_corrections_are_langevin_steps_at_the_time_reached(n):
    process = sds.VP()
    score, grid = sds.Gaussian(torch.tensor([1.0, -1.0]), 0.3).score(process), grids.uniform(1.0, 0.1, 4)
    x = x0 = process.sample_prior((5, 2), seed=0)
    solver = sds.PredictorCorrector(sds.Ancestral(), sds.LangevinCorrector(snr=0.2, norms="batch"), n)
    reverse, path = process.reverse(score), sds.BrownianPath(9, first_path=2)
    whole = sds.solve(reverse, x0, grid=grid, solver=solver, noise=path)
    for k in range(4):
        x = sds.solve(
            reverse, x, grid=grid[k : k + 2], solver=sds.Ancestral(), noise=path.after(k), backend="kernel"
        ).x1
        t = grid[k + 1].float()
        for i in range(n):
            x = langevin_step(
                x, score(x, t), mode="batch", size=0.2, seed=9, stream=Stream.CORRECTOR, first_path=2, step=k * n + i
            )
    torch.testing.assert_close(whole.x1, x, rtol=1e-5, atol=1e-5)
    assert whole.stats.nfe == 4 * (1 + n)
    parts = sds.solve(reverse, x0, grid=grid[:3], solver=solver, noise=path).x1
    parts = sds.solve(reverse, parts, grid=grid[2:], solver=solver, noise=path.after(2)).x1
    assert torch.equal(parts, whole.x1)


@pytest.mark.parametrize(
    ("corrector", "delta"),
    [
        (sds.LangevinCorrector(step_size=0.05), lambda t: 0.05),
        (sds.LangevinCorrector(step_size=0.05, scale=lambda t: t), lambda t: 0.05 * t),
        (sds.LangevinCorrector(snr=0.3), lambda t: 2 * 0.3**2 * t**2),
        (sds.LangevinCorrector(snr=0.3, norms="level", scale=lambda t: 0.5 / t), lambda t: 0.3**2 * t),
    ],
    ids=["fixed", "fixed, scaled", "level", "level, scaled"],
)
@pytest.mark.parametrize("stochasticity", [0, 1])
def test_moments_of_corrected_chains(corrector, delta, stochasticity):
    lam, process, grid = torch.tensor([0.2, 1.0], dtype=torch.float64), sds.EDM(), grids.karras(3.0, 0.3, 5)
    data = sds.Gaussian(torch.tensor([1.0, 0.0]), lam)
    variance, mean = lam + 9.0, torch.tensor([2.0, -1.0], dtype=torch.float64)
    for t, u in zip(grid[:-1].tolist(), grid[1:].tolist(), strict=True):
        q = (u / t) ** 2
        noise, pull = (u**2 * (1 - q), 1 - q) if stochasticity else (0.0, 1 - u / t)
        a = 1 - t**2 * pull / (lam + t**2)
        mean, variance = data.mean + a * (mean - data.mean), a**2 * variance + noise
        for _ in range(2):
            b = 1 - delta(u) / (lam + u**2)
            mean, variance = data.mean + b * (mean - data.mean), b**2 * variance + 2 * delta(u)
    predictor = sds.Ancestral() if stochasticity else sds.DDIM(0.0)
    score = data.score(process)
    sde = process.reverse(score) if stochasticity else process.probability_flow(score)
    solver = sds.PredictorCorrector(predictor, corrector, 2)
    law = oracle.chain_moments(sde, solver, grid, torch.tensor([2.0, -1.0]), lam + 9.0)
    torch.testing.assert_close(law.mean, mean, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(law.cov, torch.diag(variance), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("predictor", PREDICTORS, ids=lambda p: type(p).__name__)
def test_every_predictor_can_be_corrected(predictor):
    """On a grid that is too coarse for them, corrections at every step bring all closer to the law."""
    process, data = sds.EDM(sigma_max=10.0), sds.Gaussian(torch.tensor([0.5]), torch.tensor([0.5]))
    score, x0 = data.score(process), process.sample_prior((4, 1), seed=0)
    ode = (sds.sde.Calculus.ITO, sds.sde.Noise.ADDITIVE) not in predictor.supported or predictor.stochasticity == 0
    sde = process.probability_flow(score) if ode else process.reverse(score)
    solver = sds.PredictorCorrector(predictor, sds.LangevinCorrector(step_size=0.2), 20)
    grid = grids.karras(10.0, 0.5, 6)
    with use_backend("reference"):
        sol = sds.solve(sde, x0, grid=grid, solver=solver, seed=0)
    bare = sds.solve(sde, x0, grid=grid, solver=predictor, seed=0, backend="eager")
    assert sol.stats.nfe == bare.stats.nfe + 6 * 20
    assert solver.evaluations == predictor.evaluations + 20
    assert sol.stats.seed == 0
    # Twenty steps of delta / v = 0.27 forget the predictor: only the corrector's own error is left.
    law = oracle.chain_moments(sde, solver, grid, torch.zeros(1), 100.0)
    v = 0.75
    torch.testing.assert_close(
        law.cov, torch.tensor([[v / (1 - 0.2 / (2 * v))]], dtype=torch.float64), rtol=2e-2, atol=0
    )
    torch.testing.assert_close(law.mean, torch.tensor([0.5], dtype=torch.float64), rtol=0.05, atol=0)


def test_a_grid_that_ends_at_zero_noise_is_not_corrected_there():
    process, data = sds.EDM(sigma_max=10.0), sds.Gaussian(torch.tensor([0.5, 0.0]), 0.0)  # a point: no score at 0
    solver = sds.PredictorCorrector(sds.Ancestral(), SIMPLE, 2)
    x0 = process.sample_prior((4, 2), seed=0)
    sde, grid = process.reverse(data.score(process)), grids.karras(10.0, 0.0, 5)
    for backend, evaluations in {"kernel": 5 + 4 * 2, "fused": 5 + 5 * 2}.items():  # in one kernel all steps are alike
        sol = sds.solve(sde, x0, grid=grid, solver=solver, seed=0, backend=backend)
        torch.testing.assert_close(sol.x1, torch.tensor([[0.5, 0.0]]).expand(4, 2), rtol=0, atol=1e-5)
        assert sol.stats.nfe == evaluations


@pytest.mark.parametrize(
    ("norms", "alone"), [("level", True), ("sample", True), ("batch", False), ("dimension", False)]
)
def test_who_is_in_the_batch_matters_only_where_norms_are_averaged(norms, alone):
    """Norms of one sample are its own; means over the batch make a sample depend on its company."""
    process = sds.VP()
    data = sds.GaussianMixture(torch.tensor([[-2.0, 0.0, 1.0, 0.5], [2.0, 1.0, 0.0, 0.0]]), 0.3)
    solver = sds.PredictorCorrector(sds.Ancestral(), sds.LangevinCorrector(snr=0.16, norms=norms))
    with use_backend("reference"):
        batch = sds.sample(process, data.score(process), (6, 4), solver=solver, steps=5, seed=1)
        single = sds.sample(process, data.score(process), (1, 4), solver=solver, steps=5, seed=1)
    assert torch.allclose(single[0], batch[0], rtol=1e-6, atol=1e-6) is alone


def test_a_corrected_flow_is_random_and_says_its_seed():
    process, x0 = sds.VP(), torch.zeros(2, 3)
    flow = process.probability_flow(sds.Gaussian(torch.zeros(3), 1.0).score(process))
    solver = sds.PredictorCorrector(sds.DPMSolverPP(2), SIMPLE)
    one, other = (sds.solve(flow, x0, 1.0, 0.1, 5, solver=solver) for _ in range(2))
    assert one.stats.seed != other.stats.seed
    assert torch.equal(sds.solve(flow, x0, 1.0, 0.1, 5, solver=solver, seed=one.stats.seed).x1, one.x1)
    eager = sds.solve(flow, x0, 1.0, 0.1, 5, solver=solver, seed=one.stats.seed, backend="eager").x1
    torch.testing.assert_close(eager, one.x1, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("predictor", "n"), [(sds.EulerMaruyama(), 1), (sds.SDEDPMSolverPP(2), 2), (sds.EDMHeun(churn=2.0), 1)], ids=repr
)
def test_one_kernel_takes_the_same_steps(predictor, n):
    """Predictors with memory, and with several draws a step, beside the corrector's own stream."""
    process = sds.VP()
    data = sds.GaussianMixture(torch.tensor([[-2.0, 0.0], [2.0, 1.0]], dtype=torch.float64), 0.5)
    solver = sds.PredictorCorrector(predictor, sds.LangevinCorrector(snr=0.16), n)
    x0 = process.sample_prior((40, 2), seed=1, dtype=torch.float64)
    noise = sds.BrownianPath(3, first_path=7, first_step=5)
    fused, eager = (
        sds.solve(process.reverse(data.score(process)), x0, 1.0, 0.01, 12, solver=solver, noise=noise, backend=backend)
        for backend in ("fused", "eager")
    )
    torch.testing.assert_close(fused.x1, eager.x1, rtol=1e-9, atol=1e-9)
    assert fused.stats.nfe == eager.stats.nfe == 12 * solver.evaluations


def test_a_corrector_with_a_step_size_of_its_own_is_not_fused():
    process = sds.VP()
    flow = process.reverse(sds.Gaussian(torch.zeros(3), 1.0).score(process))
    solver = sds.PredictorCorrector(sds.EulerMaruyama(), sds.LangevinCorrector(snr=0.16, norms="batch"))
    with pytest.raises(ValueError, match="cannot be fused: the corrector's step size depends on the state"):
        sds.solve(flow, torch.zeros(2, 3), 1.0, 0.1, 5, solver=solver, seed=0, backend="fused")


def test_time_may_differ_between_samples():
    process = sds.VP()
    score, x0 = sds.Gaussian(torch.zeros(2), 0.5).score(process), process.sample_prior((3, 2), seed=0)
    solver = sds.PredictorCorrector(sds.Ancestral(), sds.LangevinCorrector(snr=0.16))
    ends = torch.tensor([0.1, 0.2, 0.3])
    rows = sds.solve(process.reverse(score), x0, 1.0, ends, 5, solver=solver, seed=4).x1
    for i in range(3):
        path = sds.BrownianPath(4, first_path=i)
        one = sds.solve(process.reverse(score), x0[i : i + 1], 1.0, float(ends[i]), 5, solver=solver, noise=path).x1
        torch.testing.assert_close(one[0], rows[i], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("norms", "shape", "message"),
    [
        ("sample", (100, 1), "diverges. norms='level', or a fixed step_size="),
        ("sample", (100, 2), "on states of dimension 2.*diverges"),
        ("batch", (1, 1), "the chain diverges"),
        ("batch", (100, 1), "dimension 1.*norms='level'"),
        ("dimension", (100, 1), "dimension 1.*norms='level'"),
    ],
)
def test_norms_of_single_numbers_are_warned_of(norms, shape, message):
    process = sds.VP()
    score = sds.Gaussian(torch.zeros(shape[1:]), 1.0).score(process)
    solver = sds.PredictorCorrector(sds.Ancestral(), sds.LangevinCorrector(0.16, norms))
    with pytest.warns(UserWarning, match=message):
        sds.sample(process, score, shape, solver=solver, steps=2, seed=0)


def test_norms_that_are_safe_are_not_warned_of_and_do_not_diverge():
    process = sds.VP()
    score = sds.Gaussian(torch.zeros(1), 1.0).score(process)
    grid, x0 = grids.uniform(0.5, 0.49, 400), process.sample_prior((4000, 1), seed=0)
    variances = {}
    for norms in ("level", "sample"):
        solver = sds.PredictorCorrector(sds.DDIM(0.0), sds.LangevinCorrector(0.16, norms))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore" if norms == "sample" else "error")
            x = sds.solve(process.probability_flow(score), x0, grid=grid, solver=solver, seed=0).x1
        variances[norms] = float(x.var())
    assert variances["level"] == pytest.approx(1.02, abs=5 * math.sqrt(2 / 4000))
    assert variances["sample"] > 100


class Deaf(AbstractNoise):
    def increments(self, times, shape, *, step=0, dtype=torch.float32, device=None):
        return torch.zeros(len(times) - 1, *shape, dtype=dtype, device=device)

    def bridge(self, step, theta, shape, *, dtype=torch.float32, device=None):
        raise NotImplementedError


PROCESS = sds.VP()
SCORE = sds.Gaussian(torch.zeros(2), 1.0).score(PROCESS)
X = torch.zeros(3, 2)


def corrected(**options):
    solver = options.pop("solver", sds.PredictorCorrector(sds.Ancestral(), SIMPLE))
    return sds.solve(options.pop("sde", PROCESS.reverse(SCORE)), X, 1.0, 0.1, 4, solver=solver, **options)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: sds.LangevinCorrector(), ValueError, "give snr.*or step_size"),
        (lambda: sds.LangevinCorrector(0.1, step_size=0.1), ValueError, "not both"),
        (lambda: sds.LangevinCorrector(step_size=0.1, norms="batch"), ValueError, "compares no norms"),
        (lambda: sds.LangevinCorrector(-0.1), ValueError, "snr must be a positive number"),
        (
            lambda: sds.LangevinCorrector(0.1, "batches"),
            ValueError,
            "norms='batches' is unknown; choose one of 'level'",
        ),
        (lambda: sds.PredictorCorrector(sds.Ancestral, SIMPLE), TypeError, "predictor must be a fixed-step solver"),
        (
            lambda: sds.PredictorCorrector(sds.DormandPrince(), SIMPLE),
            TypeError,
            "predictor must be a fixed-step solver",
        ),
        (lambda: sds.PredictorCorrector(sds.Ancestral(), 0.16), TypeError, "corrector must be one such as"),
        (lambda: sds.PredictorCorrector(sds.Ancestral(), SIMPLE, 0), ValueError, "n must be at least 1"),
        (lambda: corrected(sde=PROCESS), ValueError, "reverse SDE or probability flow"),
        (lambda: corrected(noise=Deaf()), TypeError, "correctors take noise from a BrownianPath"),
        (lambda: corrected(save_at=[0.77]), ValueError, "states at grid points alone"),
        (
            lambda: corrected(
                solver=sds.PredictorCorrector(sds.Ancestral(), sds.LangevinCorrector(0.1, scale=lambda t: t - 0.5))
            ),
            ValueError,
            "scale must give one finite number that is not negative",
        ),
    ],
)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_predictors_cover_the_kinds_of_solver():
    tabulated = [p for p in PREDICTORS if isinstance(p, AbstractTabulated)]
    assert {p.memory > 0 for p in tabulated} == {True, False}


def test_correctors_and_samplers_with_the_same_settings_are_equal():
    """A captured sampler is found again by its solver."""
    make = sds.LangevinCorrector
    assert repr(make(0.16)) == "LangevinCorrector(snr=0.16, norms='level')"
    assert repr(make(step_size=0.1)) == "LangevinCorrector(step_size=0.1)"
    assert make(0.16) == make(0.16, "level") != make(0.16, "batch")
    assert make(step_size=0.1) != make(step_size=0.2)
    assert make(0.16, scale=torch.sin) != make(0.16)
    one, other = (sds.PredictorCorrector(sds.Ancestral(), make(0.16), 2) for _ in range(2))
    assert one == other
    assert len({one, other}) == 1
