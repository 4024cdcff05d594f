"""Exact errors of samplers, from this library and from elsewhere, and the orders that they show."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

import sdesolve as sds
from sdesolve import grids, oracle

EDM = sds.EDM(sigma_max=20.0)
TWO_MODES = sds.GaussianMixture(torch.tensor([[-1.0], [1.0]]), 0.25, weights=torch.tensor([1.0, 2.0]))
ANGLES = 2 * math.pi / 3 * torch.arange(3)
THREE_MODES = sds.GaussianMixture(1.2 * torch.stack([ANGLES.cos(), ANGLES.sin()], 1), 0.4)
ONE_DRAW = [
    sds.EulerMaruyama(),
    sds.Ancestral(),
    sds.PredictorCorrector(sds.Ancestral(), sds.LangevinCorrector(0.16), 2),
]


def to(end: float):
    return lambda n: grids.karras(20.0, end, n)


def heun(process, score, x, grid, noise):
    """A deterministic sampler from elsewhere: Karras et al. 2022, algorithm 1, for ``sigma(t) = t``."""
    for t, u in itertools.pairwise(grid):
        d = -t * score(x, t)
        y = x + (u - t) * d
        x = x + (u - t) / 2 * (d - u * score(y, u))
    return x


def ancestral(process, score, x, grid, noise):
    """A stochastic one, likewise."""
    for t, u in itertools.pairwise(grid):
        down = u * u / t
        x = x + (t - down) * t * score(x, t) + (u * u - down * down).sqrt() * noise()
    return x


def exact_flow(process, score, x, grid, noise):
    flow = process.probability_flow(score)
    solver = sds.DormandPrince(1e-10, 1e-10)
    return sds.solve(flow, x, float(grid[0]), float(grid[-1]), solver=solver).x1


@pytest.mark.parametrize(("theirs", "ours"), [(heun, sds.EDMHeun()), (ancestral, sds.Ancestral())])
@pytest.mark.parametrize(
    "data",
    [
        sds.Gaussian(torch.tensor([1.0, -1.0]), torch.tensor([[1.0, 0.6], [0.6, 0.5]])),
        sds.Gaussian(torch.zeros(2, 3), torch.rand(2, 3, generator=torch.Generator().manual_seed(0))),
        TWO_MODES,
    ],
    ids=["covariance", "variances", "mixture"],
)
def test_a_sampler_from_elsewhere_is_measured_like_our_own(theirs, ours, data):
    for options in ({}, {"prior": True, "denoise": True}):
        error = oracle.error(theirs, EDM, data, to(0.05)(8), **options)
        assert error == pytest.approx(oracle.error(ours, EDM, data, to(0.05)(8), **options), rel=1e-9)
        assert error > 0.01


def test_the_error_on_a_gaussian_is_a_distance_to_what_should_be_drawn():
    """One DDIM step to the denoised mean: everything by hand, for each way to start and to end."""
    lam, t, u = torch.tensor([0.2, 3.0], dtype=torch.float64), 20.0, 0.5
    data, grid = sds.Gaussian(torch.zeros(2), lam), torch.tensor([t, u])
    shrink = 1 + (u - t) * t / (lam + t * t)
    for prior, denoise in itertools.product([False, True], repeat=2):
        std = shrink * (torch.full_like(lam, t) if prior else (lam + t * t).sqrt())
        truth = lam if denoise else lam + u * u
        if denoise:
            std = std * lam / (lam + u * u)
        expected = float((std - truth.sqrt()).norm() / truth.sum().sqrt())
        assert oracle.error(sds.DDIM(0.0), EDM, data, grid, prior=prior, denoise=denoise) == pytest.approx(
            expected, rel=1e-9
        )


@pytest.mark.parametrize("prior", [False, True])
@pytest.mark.parametrize(
    "cov", [torch.tensor([0.2, 3.0]), torch.tensor([[1.0, 0.6], [0.6, 0.5]])], ids=["diag", "full"]
)
def test_errors_at_every_step(cov, prior):
    data, grid, solver = sds.Gaussian(torch.tensor([1.0, 0.0]), cov), to(0.1)(6), sds.Ancestral()
    table = oracle.step_errors(solver, EDM, data, grid, prior=prior)
    assert table.wasserstein.shape == table.kl.shape == table.times.shape == (7,)
    assert (float(table.wasserstein[0]) < 1e-12) is not prior
    for k in (1, 6):
        assert float(table.wasserstein[k]) == pytest.approx(
            oracle.error(solver, EDM, data, grid[: k + 1], prior=prior), rel=1e-9
        )
    start = torch.tensor(400.0) if prior else data.moments(EDM, 20.0).cov
    mean0 = torch.zeros(2) if prior else data.mean
    law = oracle.chain_moments(EDM.reverse(data.score(EDM)), solver, grid, mean0, start)
    expected = sds.metrics.gaussian_kl(law.mean, law.cov, *data.moments(EDM, 0.1))
    assert float(table.kl[-1]) == pytest.approx(float(expected), rel=1e-9)


@pytest.mark.parametrize("solver", [sds.DPMSolverPP(2), *ONE_DRAW], ids=lambda s: type(s).__name__)
@pytest.mark.parametrize("options", [{}, {"prior": True, "denoise": True}], ids=["marginals", "as users do"])
def test_on_the_line_a_mixture_of_one_is_a_gaussian(solver, options):
    one, gaussian = sds.GaussianMixture(torch.tensor([[0.3]]), 0.5), sds.Gaussian(torch.tensor([0.3]), 0.25)
    error = oracle.error(solver, EDM, one, to(0.05)(12), **options)
    assert error == pytest.approx(oracle.error(solver, EDM, gaussian, to(0.05)(12), **options), rel=2e-6)


def test_meshes_are_fine_enough_where_steps_add_little_noise(monkeypatch):
    """Noise of 0.004 in states of spread 1: a finer mesh changes nothing."""
    grid = to(0.006)(20)
    error = oracle.error(sds.Ancestral(), EDM, TWO_MODES, grid)
    monkeypatch.setattr("sdesolve.oracle.transport._SPACING", 0.6)
    monkeypatch.setattr("sdesolve.oracle.transport._FEWEST", 2500)
    assert oracle.error(sds.Ancestral(), EDM, TWO_MODES, grid) == pytest.approx(error, rel=1e-7)


@pytest.mark.parametrize("solver", [sds.DPMSolverPP(2), *ONE_DRAW], ids=lambda s: type(s).__name__)
@pytest.mark.parametrize("prior", [False, True])
def test_in_the_plane_a_mixture_of_one_is_a_gaussian(solver, prior):
    """Total variation of isotropic normals: the difference of their masses inside the circle where densities agree."""
    one, gaussian, grid = sds.GaussianMixture(torch.zeros(1, 2), 0.5), sds.Gaussian(torch.zeros(2), 0.25), to(0.2)(8)
    start = EDM.prior.std**2 if prior else gaussian.moments(EDM, 20.0).cov

    def chain(x, noise):
        return oracle.as_sampler(solver)(EDM, gaussian.score(EDM), x, grid, noise)

    v, w = float(oracle.affine_moments(chain, torch.zeros(2), start, diagonal=True).cov[0]), 0.25 + 0.04
    r2 = 2 * math.log(w / v) / (1 / v - 1 / w)
    expected = abs(math.exp(-r2 / (2 * v)) - math.exp(-r2 / (2 * w)))
    assert oracle.error(solver, EDM, one, grid, prior=prior) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("data", [TWO_MODES, sds.Gaussian(torch.tensor([0.5]), 0.3)], ids=["mixture", "gaussian"])
def test_the_exact_flow_has_no_error(data):
    """Far below what samples could show: two million of them have a distance of some 1e-2 between their halves."""
    assert oracle.error(exact_flow, EDM, data, to(0.2)(1)) < 1e-6


@pytest.mark.slow
def test_a_flow_that_is_nearly_exact_has_nearly_no_error_in_the_plane():
    process = sds.EDM(sigma_min=0.3, sigma_max=5.0)
    coarse, fine = (oracle.error(sds.RK4(), process, THREE_MODES, grids.uniform_log_snr(process, n)) for n in (8, 16))
    assert fine < 1e-4
    assert coarse / fine == pytest.approx(16, rel=0.4)


def test_densities_followed_on_the_line_are_those_of_samples():
    """The quadrature against 2^17 samples of the same solver, through a distance that is large enough to be seen."""
    n, grid = 1 << 17, to(0.05)(8)
    x = EDM.sample_prior((n, 1), seed=0, dtype=torch.float64)
    x = sds.solve(EDM.reverse(TWO_MODES.score(EDM)), x, grid=grid, solver=sds.Ancestral(), seed=0, backend="eager").x1
    noised = sds.GaussianMixture(TWO_MODES.means, math.hypot(0.25, 0.05), TWO_MODES.weights)
    truth = noised.sample(n, seed=1, dtype=torch.float64)
    spread = float(noised.sample(n, seed=2, dtype=torch.float64).std())
    floor = float(sds.metrics.wasserstein_1d(truth[:, 0], noised.sample(n, seed=3, dtype=torch.float64)[:, 0])) / spread
    sampled = float(sds.metrics.wasserstein_1d(x[:, 0], truth[:, 0])) / spread
    error = oracle.error(sds.Ancestral(), EDM, TWO_MODES, grid, prior=True)
    assert abs(sampled - error) < 3 * floor
    assert error > 10 * floor


@pytest.mark.parametrize(
    ("sampler", "data", "order"),
    [
        (sds.DDIM(0.0), sds.Gaussian(torch.zeros(2), 0.3), 1),
        (heun, sds.Gaussian(torch.zeros(2), 0.3), 2),
        (sds.RK4(), sds.Gaussian(torch.zeros(2), 0.3), 4),
        (sds.Ancestral(), sds.Gaussian(torch.zeros(2), 0.3), 1),
        (sds.SDEDPMSolverPP(2), sds.Gaussian(torch.zeros(2), 0.3), 2),
        (sds.DDIM(0.0), TWO_MODES, 1),
        (sds.DPMSolverPP(2), TWO_MODES, 2),
        (sds.EulerMaruyama(), TWO_MODES, 1),
        pytest.param(sds.Ancestral(), THREE_MODES, 1, marks=pytest.mark.thorough),
    ],
    ids=lambda v: getattr(v, "__name__", type(v).__name__),
)
def test_fitted_orders(sampler, data, order):
    process = sds.EDM(sigma_min=0.3, sigma_max=5.0)
    nfes = {TWO_MODES: [32, 48, 64], THREE_MODES: [16, 24, 32]}.get(data, [64, 96, 128, 192])

    def grid(n):
        return grids.uniform_log_snr(process, n)

    table = oracle.convergence(sampler, process, data, nfes, grid=grid)
    assert table.order == pytest.approx(order, abs=0.15)
    assert max(table.nfes) <= nfes[-1]


def test_evaluations_are_counted_and_grids_are_as_long_as_they_allow():
    data = sds.Gaussian(torch.zeros(2), 0.3)
    for sampler, each, extra in (
        (sds.DPMSolverPP(3), 1, 0),
        (heun, 2, 0),
        (sds.RK4(), 4, 0),
        (sds.PredictorCorrector(sds.Ancestral(), sds.LangevinCorrector(0.1), 2), 3, 0),
    ):
        for denoise in (False, True):
            table = oracle.convergence(sampler, EDM, data, [20, 41], denoise=denoise, prior=denoise)
            assert table.steps == tuple((n - extra - denoise) // each for n in (20, 41))
            assert table.nfes == tuple(each * n + extra + denoise for n in table.steps)


def test_the_table_prints():
    table = oracle.Convergence("mine", (10, 20, 40), (10, 20, 40), (0.1, 0.025, 0.00625))
    assert table.order == pytest.approx(2.0)
    lines = str(table).splitlines()
    assert lines[0] == "mine"
    assert lines[3].split() == ["20", "20", "2.5000e-02", "2.00"]
    assert lines[-1] == "fitted order 2.00"
    assert math.isnan(oracle.Convergence("mine", (10,), (10,), (0.1,)).order)
    assert oracle.convergence(heun, EDM, sds.Gaussian(torch.zeros(1), 1.0), [8]).name == "heun"


def test_moments_of_any_affine_chain():
    def chain(x, noise):
        for _ in range(3):
            x = 0.5 * x + 2.0 * noise() + 1.0
        return x.flip(1) + noise()

    law = oracle.affine_moments(chain, torch.tensor([1.0, 3.0]), torch.tensor([4.0, 0.0]))
    torch.testing.assert_close(law.mean, torch.tensor([1.75 + 3 / 8, 1.75 + 1 / 8], dtype=torch.float64))
    noise = 4 * (1 + 0.25 + 0.0625) + 1
    torch.testing.assert_close(law.cov, torch.diag(torch.tensor([noise, noise + 4 / 64], dtype=torch.float64)))
    with pytest.raises(ValueError, match="not affine"):
        oracle.affine_moments(lambda x, noise: x * noise(), torch.ones(2), 1.0)
    with pytest.raises(ValueError, match=r"not affine.*diagonal=False"):
        oracle.affine_moments(chain, torch.ones(2), 1.0, diagonal=True)


def unused(process, score, x, grid, noise):
    return x - 20.0 * score(x, grid[0])


GAUSSIAN, FOUR = sds.Gaussian(torch.zeros(2), 1.0), sds.Gaussian(torch.zeros(4), 1.0)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: oracle.error(sds.Ancestral(), EDM, THREE_MODES, to(2e-3)(3)),
            ValueError,
            "End the grid at more noise",
        ),
        (lambda: oracle.error(sds.DDIM(0.0), EDM, THREE_MODES, to(0.1)(6), denoise=True), ValueError, "denoise=True"),
        (
            lambda: oracle.error(sds.DDIM(0.0), EDM, sds.GaussianMixture(torch.zeros(1, 3), 1.0), to(0.1)(6)),
            ValueError,
            "got dimension 3",
        ),
        (
            lambda: oracle.error(
                sds.PredictorCorrector(sds.Ancestral(), sds.LangevinCorrector(0.1, "batch")), EDM, FOUR, to(0.1)(6)
            ),
            ValueError,
            "not affine",
        ),
        (lambda: oracle.error(heun, EDM, EDM, to(0.1)(6)), TypeError, "data must be a Gaussian"),
        (lambda: oracle.as_sampler(sds.DormandPrince()), TypeError, "fixed-step solver"),
        (lambda: oracle.convergence(heun, EDM, GAUSSIAN, [10, 10]), ValueError, "increasing"),
        (lambda: oracle.convergence(heun, EDM, GAUSSIAN, [1]), ValueError, "too few for one step"),
        (lambda: oracle.convergence(unused, EDM, GAUSSIAN, [10]), ValueError, "does it use its grid"),
        (lambda: oracle.convergence(sds.DDIM(), EDM, 3, [10]), TypeError, "data must be a Gaussian or a Gaus.*got int"),
        (
            lambda: oracle.convergence(sds.DDIM(), EDM, GAUSSIAN, [10], grid=torch.tensor([1.0, 0.1])),
            TypeError,
            "grid must be a function from a number of steps to times.*got Tensor",
        ),
        (lambda: oracle.convergence(sds.DDIM, EDM, GAUSSIAN, [10]), TypeError, "got the class DDIM; did you mean"),
        (
            lambda: oracle.error(sds.DDIM, EDM, GAUSSIAN, EDM.time_grid(4)),
            TypeError,
            "got the class DDIM; did you mean",
        ),
        (lambda: oracle.error(3, EDM, GAUSSIAN, EDM.time_grid(4)), TypeError, "sampler must be a solver.*got int"),
        (
            lambda: oracle.step_errors(sds.DDIM(), EDM, TWO_MODES, EDM.time_grid(4)),
            TypeError,
            "known for Gaussian data",
        ),
    ],
)
def test_what_is_refused(call, error, message):
    with pytest.raises(error, match=message):
        call()
