"""Posterior scores against exact ones: conditioned Gaussians and mixtures, and the cases in which a method is exact."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sdesolve_kernels import normal

import sdesolve as sds
from sdesolve.inverse import DPS, MMPS, PiGDM, Replacement
from sdesolve.inverse.covariance import conjugate_gradients
from sdesolve.inverse.operators import Blur, ChannelMixing, Mask, Masks, Matrix

seeds = st.integers(0, 1000)


def draws(seed: int, *shape: int) -> torch.Tensor:
    return normal(1, math.prod(shape), seed=seed, stream=211, dtype=torch.float64).reshape(shape)


def covariance(seed: int, d: int) -> torch.Tensor:
    a = draws(seed, d, d)
    return a @ a.mT / d + 0.1 * torch.eye(d, dtype=torch.float64)


def close(actual: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-9) -> None:
    assert float((actual - expected).norm()) <= tolerance * float(expected.norm().clamp_min(1e-6))


@given(seeds, st.integers(1, 4), st.sampled_from([0.05, 1.0]))
def test_conditioning_is_bayes_rule(seed, m, noise):
    """``log p(x | y) - log p(x) - log p(y | x)`` is the same at all ``x``, for Gaussians and mixtures."""
    d = 4
    A, y = Matrix(draws(seed, m, d), (2, 2)), draws(seed + 1, m)
    covs = torch.stack([covariance(seed + k, d) for k in (2, 3, 4)])
    laws = [
        sds.Gaussian(draws(seed + 5, 2, 2), covs[0]),
        sds.Gaussian(draws(seed + 5, 2, 2), draws(seed + 6, 2, 2).exp()),
        sds.Gaussian(draws(seed + 5, 2, 2), 0.4),
        sds.GaussianMixture(draws(seed + 5, 3, 2, 2), weights=draws(seed + 6, 3).exp(), covs=covs),
        sds.GaussianMixture(draws(seed + 5, 3, 2, 2), draws(seed + 6, 3).exp()),
    ]
    x = draws(seed + 7, 6, 2, 2)
    likelihood = -0.5 * ((y - A(x)) / noise).square().sum(1)
    for law in laws:
        posterior = law.condition(A, y, noise)
        assert type(posterior) is type(law)
        constant = posterior.log_prob(x) - law.log_prob(x) - likelihood
        scale = float(posterior.log_prob(x).abs().max() + likelihood.abs().max())
        assert float((constant - constant[0]).abs().max()) < 1e-9 * scale


def test_evidence_weights_components_as_their_integrals_do():
    """One dimension, by a sum over a fine grid."""
    law = sds.GaussianMixture(torch.tensor([-1.0, 2.0]), torch.tensor([0.5, 1.5]), torch.tensor([3.0, 1.0]))
    posterior = law.condition(Mask(torch.ones((), dtype=torch.bool)), torch.tensor([0.3], dtype=torch.float64), 0.7)
    x = torch.linspace(-15, 15, 30001, dtype=torch.float64)
    p = (law.log_prob(x) - 0.5 * ((0.3 - x) / 0.7).square()).exp()
    close(posterior.log_prob(x).exp(), p / (p.sum() * (x[1] - x[0])), 1e-9)


def test_conditioning_without_noise_leaves_nothing_to_vary():
    law = sds.Gaussian(draws(0, 4), covariance(1, 4))
    A, y = Matrix(draws(2, 2, 4)), draws(3, 2)
    posterior = law.condition(A, y, 0.0)
    M = A.matrix()
    assert not posterior.has_density
    close(M @ posterior.mean, y)
    assert float((M @ posterior.cov @ M.mT).abs().max()) < 1e-14
    close(posterior.cov, law.condition(A, y, 1e-5).cov, 1e-8)


def test_components_that_cannot_explain_are_left_out():
    law = sds.GaussianMixture(torch.tensor([[0.0, 0.0], [1e3, 0.0]]), 0.1)
    posterior = law.condition(torch.tensor([[1.0, 0.0]]), torch.tensor([0.1], dtype=torch.float64), 0.1)
    assert len(posterior.means) == 1
    close(posterior.means[0], torch.tensor([0.05, 0.0], dtype=torch.float64))


PROCESSES = {"vp": sds.VP(), "ve": sds.VE(0.01, 10.0), "edm": sds.EDM(sigma_max=10.0)}
processes = pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES)
OPERATORS = {
    "matrix": Matrix(draws(10, 3, 6), (3, 2)),
    "mask": Mask(torch.tensor([[1, 0], [0, 1], [1, 0]], dtype=torch.bool)),
    "mixing": ChannelMixing(draws(11, 1, 3), (3, 2)),
    "blur": Blur(torch.tensor([0.7, 0.3]), (3, 2)),
}
operators = pytest.mark.parametrize("A", OPERATORS.values(), ids=OPERATORS)
TIMES = torch.tensor([0.02, 0.3, 0.9], dtype=torch.float64)


@processes
@operators
@pytest.mark.parametrize("noise", [0.0, 0.2])
def test_mmps_is_exact_on_gaussians(process, A, noise):
    law = sds.Gaussian(draws(12, 3, 2), covariance(13, 6))
    y, x = A(law.sample(1, seed=0, dtype=torch.float64))[0], draws(14, 3, 3, 2)
    exact = law.condition(A, y, noise).score(process)
    score = MMPS(law.score(process), process, A, y, noise, iterations=2 * y.numel())
    close(score(x, TIMES), exact(x, TIMES), 1e-6)
    close(score(x, 0.3), exact(x, 0.3), 1e-6)


@processes
@operators
@pytest.mark.parametrize("noise", [0.0, 0.2])
def test_pigdm_is_exact_on_isotropic_gaussians(process, A, noise):
    law = sds.Gaussian(draws(12, 3, 2), 0.49)
    y, x = A(law.sample(1, seed=0, dtype=torch.float64))[0], draws(14, 3, 3, 2)
    exact = law.condition(A, y, noise).score(process)
    score = PiGDM(law.score(process), process, A, y, noise, prior_std=0.7)
    close(score(x, TIMES), exact(x, TIMES), 1e-8)
    close(score(x, 0.3), exact(x, 0.3), 1e-8)
    other = PiGDM(law.score(process), process, A, y, noise)(x, 0.3)
    assert float((other - exact(x, 0.3)).norm()) > 1e-3  # the prior's scale matters


@processes
def test_replacement_is_exact_where_the_observed_part_is_independent(process):
    law = sds.Gaussian(draws(12, 3, 2), draws(13, 3, 2).exp())
    A = OPERATORS["mask"]
    y, x = draws(15, 3), draws(14, 3, 3, 2)
    exact = law.condition(A, y, 0.0).score(process)
    score = Replacement(law.score(process), process, A, y, 0.0)
    close(score(x, TIMES), exact(x, TIMES), 1e-10)


@operators
@pytest.mark.parametrize("noise", [0.0, 0.2])
def test_replacement_in_and_out_of_the_observed_subspace(A, noise):
    process = sds.VP()
    law = sds.GaussianMixture(draws(12, 4, 3, 2), 0.3)
    y, x = draws(16, *A.observation_shape), draws(14, 3, 3, 2)
    prior = law.score(process)
    s, free = (f(x, TIMES).reshape(3, -1) for f in (Replacement(prior, process, A, y, noise), prior))
    M = A.matrix()
    P = torch.linalg.pinv(M) @ M
    rest = torch.eye(6, dtype=torch.float64) - P
    assert float(((s - free) @ rest).norm()) < 1e-12 * float(s.norm() + free.norm())
    for k, t in enumerate(TIMES):
        a, v = process.alpha(t), process.sigma(t).square()
        law_of_y = v * M @ M.mT + (a * noise) ** 2 * torch.eye(len(M), dtype=torch.float64)
        residual = a * y.reshape(-1) - M @ x[k].reshape(-1)
        close(s[k] @ P, M.mT @ torch.linalg.pinv(law_of_y) @ residual, 1e-8)


@operators
def test_dps_is_the_gradient_of_the_likelihood_of_the_denoised_state(A):
    process, noise = sds.VP(), 0.2
    law = sds.GaussianMixture(draws(12, 4, 3, 2), 0.3)
    prior = law.score(process)
    y, x = draws(16, *A.observation_shape), draws(14, 3, 3, 2).requires_grad_()
    residual = (y - A(prior.denoise(x, TIMES))).reshape(3, -1)
    (gradient,) = torch.autograd.grad(-0.5 * (residual / noise).square().sum(), x)
    for scale in (1.0, 0.3):
        s = DPS(prior, process, A, y, noise, scale=scale)(x.detach(), TIMES)
        close(s, prior(x.detach(), TIMES) + scale * gradient)


@settings(max_examples=20)
@given(seeds)
def test_all_agree_where_nothing_is_left_to_know(seed):
    """Point data: the denoised state is the datum, its covariance 0, and no observation adds anything."""
    law, process = sds.GaussianMixture(draws(seed, 1, 3), 0.0), sds.VP()
    A = Matrix(draws(seed + 1, 2, 3))
    y, x = draws(seed + 2, 2), draws(seed + 3, 4, 3)
    prior = law.score(process)
    for method in (DPS, MMPS):
        close(method(prior, process, A, y, 0.5)(x, 0.5), prior(x, 0.5), 1e-9)


@operators
@pytest.mark.parametrize("noise", [0.0, 0.2])
def test_both_gaussian_approximations_on_mixtures(A, noise):
    """Mean and covariance of ``x_0`` given ``x_t`` component by component, and all matrices written out."""
    process, x = sds.VP(), draws(14, 1, 3, 2)
    law = sds.GaussianMixture(draws(12, 3, 3, 2), torch.tensor([0.3, 0.5, 0.7]))
    prior, M, y = law.score(process), A.matrix(), draws(16, *A.observation_shape)
    for t in TIMES:
        alpha, sigma = process.alpha(t), process.sigma(t)
        everything = Matrix(alpha * torch.eye(6, dtype=torch.float64), (3, 2))
        given = law.condition(everything, x.reshape(6), float(sigma))
        means = given.means.reshape(-1, 6)
        mean = given.weights @ means
        V = torch.einsum("k,kij->ij", given.weights, given.covs + means[:, :, None] * means[:, None]) - mean.outer(mean)
        J, residual = alpha / sigma**2 * V, y.reshape(-1) - M @ mean
        r2 = sigma**2 / (sigma**2 + alpha**2)
        noises = noise**2 * torch.eye(len(M), dtype=torch.float64)
        for score, cov in (
            (MMPS(prior, process, A, y, noise, iterations=12), M @ V @ M.mT),
            (PiGDM(prior, process, A, y, noise), r2 * M @ M.mT),
        ):
            guidance = J @ M.mT @ torch.linalg.solve(cov + noises, residual)
            close((score(x, t) - prior(x, t)).reshape(6), guidance, 1e-6)


METHODS = {"replacement": Replacement, "dps": DPS, "pigdm": PiGDM, "mmps": MMPS}
methods = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)


@methods
def test_rows_are_independent_and_have_their_own_observations(method):
    law, process, A = sds.GaussianMixture(draws(12, 4, 3, 2), 0.3), sds.VP(), OPERATORS["matrix"]
    y, x = draws(16, 3, 3), draws(14, 3, 3, 2)
    together = method(law.score(process), process, A, y, 0.3)(x, TIMES)
    for k in range(3):
        alone = method(law.score(process), process, A, y[k], 0.3)(x[k : k + 1], TIMES[k])
        close(together[k : k + 1], alone, 1e-12)


@methods
@pytest.mark.parametrize(
    "solver", [sds.EulerMaruyama(), sds.Heun(), sds.SDEDPMSolverPP(), sds.DPMSolverPP(order=2), sds.DDIM(eta=1.0)]
)
def test_every_solver_takes_them(method, solver):
    """Independent coordinates of unit variance: each of the methods is unbiased in one that was not observed."""
    law, process = sds.Gaussian(torch.tensor([1.0, -1.0]), torch.tensor([1.0, 1.0])), sds.VP()
    score = method(law.score(process), process, Mask(torch.tensor([True, False])), torch.tensor([2.0]), 0.5)
    x = sds.sample(process, score, (2000, 2), solver=solver, steps=200, seed=0, backend="eager")
    assert x.dtype == torch.float32
    assert not x.requires_grad
    # 4.5 standard errors, of a mean 1/sqrt(n) and of a standard deviation 1/sqrt(2 n); 0.02 for 200 steps.
    assert abs(float(x[:, 1].mean()) + 1.0) < 4.5 / math.sqrt(2000) + 0.02
    assert abs(float(x[:, 1].std()) - 1.0) < 4.5 / math.sqrt(4000) + 0.02
    assert float(x[:, 0].mean()) > 1.5  # pulled from 1 towards 2; the exact mean is 1.8


def test_exact_methods_sample_the_exact_posterior():
    """Moments of the whole chain, without Monte Carlo: only the error of the steps remains."""
    law = sds.Gaussian(draws(12, 3), covariance(13, 3))
    process, A = sds.VP(), Matrix(draws(17, 1, 3))
    y, noise = torch.tensor([1.0], dtype=torch.float64), 0.3
    posterior = law.condition(A, y, noise)
    flow = process.probability_flow(MMPS(law.score(process), process, A, y, noise))
    # the prior at t_max stands for the noised posterior, which differs from it by exp(-integral of beta / 2)
    grid = process.time_grid(200)
    m = sds.oracle.chain_moments(flow, sds.Heun(), grid, torch.zeros(3), 1.0)
    exact = posterior.moments(process, float(grid[-1]))
    error = sds.metrics.bures_wasserstein(m.mean, m.cov, exact.mean, exact.cov)
    assert float(error) < 0.02
    prior_only = law.moments(process, float(grid[-1]))
    assert float(sds.metrics.bures_wasserstein(m.mean, m.cov, prior_only.mean, prior_only.cov)) > 0.3


def test_the_denoised_end_is_clean():
    """Inpainting must end with the observation itself and no noise anywhere; peers leave the last step's noise in."""
    points = draws(18, 1, 4)
    law, process = sds.GaussianMixture(points, 0.0), sds.VE(0.01, 10.0)
    mask = torch.tensor([True, True, False, False])
    y = points[0, :2]
    score = Replacement(law.score(process), process, Mask(mask), y, 0.0)
    x = sds.sample(process, score, (64, 4), steps=100, seed=0, dtype=torch.float64, backend="eager")
    assert float((x - points).abs().max()) < 1e-9
    raw = sds.sample(process, score, (64, 4), steps=100, seed=0, dtype=torch.float64, backend="eager", denoise=False)
    assert float((raw - points).abs().max()) > 1e-3


def test_the_whole_trajectory_can_be_one_kernel():
    """Backward passes and conjugate gradients included, for one observation; with one each it runs step by step."""
    law, process = sds.Gaussian(torch.tensor([0.3, 1.0]), torch.tensor([1.0, 0.5])), sds.VP()
    x, grid, A = draws(19, 3, 2), process.time_grid(10), Matrix(torch.tensor([[1.0, 0.5]]))
    for y, backend in ((torch.tensor([2.0]), "fused"), (torch.tensor([[2.0], [1.0], [0.0]]), "kernel")):
        reverse = process.reverse(MMPS(law.score(process), process, A, y, 0.5, iterations=1))
        one, other = (
            sds.solve(reverse, x, grid=grid, solver=sds.EulerMaruyama(), seed=1, backend=b) for b in ("auto", "eager")
        )
        assert one.stats.backend == backend
        close(one.x1, other.x1, 1e-12)


def test_inference_mode():
    law, process = sds.Gaussian(draws(12, 3), 1.0), sds.VP()
    score = MMPS(law.score(process), process, Mask(torch.tensor([True, False, True])), draws(19, 2), 0.3)
    with torch.inference_mode():
        inside = sds.sample(process, score, (5, 3), steps=5, seed=3, backend="eager")
    assert torch.equal(inside, sds.sample(process, score, (5, 3), steps=5, seed=3, backend="eager"))


def test_conjugate_gradients_stop_at_what_is_not_positive():
    b = draws(20, 3, 4)
    S = covariance(21, 4)
    close(conjugate_gradients(lambda v: v @ S, b, 8), b @ torch.linalg.inv(S), 1e-10)
    assert bool((conjugate_gradients(lambda v: -v, b, 4) == 0).all())
    assert bool((conjugate_gradients(lambda v: v @ S, torch.zeros(2, 4, dtype=torch.float64), 4) == 0).all())


LAW, VP = sds.Gaussian(torch.zeros(3), 1.0), sds.VP()
SCORE, MASK = LAW.score(VP), Mask(torch.tensor([True, False, True]))


def test_noise_may_be_a_number_of_numpy():
    x, y = torch.ones(5, 3), torch.ones(2)
    ours, theirs = (PiGDM(SCORE, VP, MASK, y, noise)(x, 0.5) for noise in (0.25, np.float32(0.25)))
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("method", [DPS, MMPS, PiGDM, Replacement])
@pytest.mark.parametrize(
    ("score", "error", "message"),
    [
        (lambda x, t: x[:, :1], ValueError, r"float32 \(5, 3\), got torch.float32 \(5, 1\)"),
        (lambda x, t: x.double(), TypeError, r"float32 \(5, 3\), got torch.float64 \(5, 3\)"),
        (lambda x, t: None, TypeError, "got NoneType"),
    ],
)
def test_a_score_that_is_not_like_the_state_is_refused(method, score, error, message):
    with pytest.raises(error, match=message):
        method(score, VP, MASK, torch.ones(2), 0.1)(torch.ones(5, 3), 0.5)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: MMPS(1.0, VP, MASK, torch.ones(2), 0.1), TypeError, "score must be a function"),
        (lambda: MMPS(SCORE, "vp", MASK, torch.ones(2), 0.1), TypeError, "process must be a diffusion"),
        (lambda: MMPS(SCORE, VP, torch.eye(3), torch.ones(3), 0.1), TypeError, r"operators\.Matrix"),
        (lambda: MMPS(SCORE, VP, MASK, torch.ones(3), 0.1), ValueError, "to fit the operator"),
        (lambda: MMPS(SCORE, VP, MASK, torch.full((2,), math.nan), 0.1), ValueError, "y must be finite"),
        (lambda: MMPS(SCORE, VP, MASK, torch.ones(2), -0.1), ValueError, "not negative; got -0.1"),
        (lambda: MMPS(SCORE, VP, MASK, torch.ones(2), math.inf), ValueError, "finite and not negative"),
        (lambda: MMPS(SCORE, VP, MASK, torch.ones(2), "0.1"), TypeError, "must be a number"),
        (lambda: MMPS(SCORE, VP, MASK, torch.ones(2), 0.1, iterations=0), ValueError, "iterations must be at least 1"),
        (lambda: DPS(SCORE, VP, MASK, torch.ones(2), 0.0), ValueError, "noise_std cannot be 0"),
        (lambda: DPS(SCORE, VP, MASK, torch.ones(2), 0.1, scale=-1.0), ValueError, "scale must be"),
        (lambda: PiGDM(SCORE, VP, MASK, torch.ones(2), 0.1, prior_std=0.0), ValueError, "prior_std must be positive"),
        (lambda: DPS(SCORE, VP, MASK, torch.ones(2), 0.1)(torch.ones(5, 4), 0.5), ValueError, "takes states of shape"),
        (
            lambda: DPS(SCORE, VP, MASK, torch.ones(4, 2), 0.1)(torch.ones(5, 3), 0.5),
            ValueError,
            "4 observations and 5",
        ),
        (
            lambda: DPS(lambda x, t: SCORE(x, t).detach(), VP, MASK, torch.ones(2), 0.1)(torch.ones(5, 3), 0.5),
            TypeError,
            "no gradient flows",
        ),
        (lambda: LAW.condition(MASK, torch.ones(1, 2), 0.1), ValueError, "to fit the operator"),
        (lambda: LAW.condition(torch.ones(2, 4), torch.ones(2), 0.1), ValueError, "4 columns"),
        (lambda: LAW.condition("mask", torch.ones(2), 0.1), TypeError, "sdesolve.operators or a matrix"),
        (lambda: LAW.condition(Matrix(torch.ones(2, 4)), torch.ones(2), 0.1), ValueError, r"states of shape \(4,\)"),
        (lambda: LAW.condition(MASK, torch.ones(2), -1.0), ValueError, "not negative"),
        (
            lambda: LAW.condition(torch.ones(2, 3), torch.tensor([1.0, 2.0]), 0.0),
            ValueError,
            "observation is impossible",
        ),
        (
            lambda: sds.GaussianMixture(torch.zeros(2, 3), torch.tensor([1.0, 0.0])).condition(
                MASK, torch.zeros(2), 0.0
            ),
            ValueError,
            "component 1 does not give",
        ),
    ],
)
def test_bad_input(make, error, message):
    with pytest.raises(error, match=message):
        make()


@pytest.mark.parametrize("method", [PiGDM, MMPS, Replacement], ids=lambda m: m.__name__)
def test_a_mask_for_each_state(method):
    """Each row is what it is alone with a mask of its own; what is not observed does not matter."""
    process, law = VP, sds.Gaussian(torch.zeros(3), torch.eye(3) + 0.5)
    masks = torch.tensor([[True, False, True], [False, True, False]])
    x, y, t = draws(30, 2, 3), draws(31, 2, 3), torch.tensor(0.4, dtype=torch.float64)
    together = method(law.score(process), process, Masks(masks), y, 0.1)(x, t)
    elsewhere = method(law.score(process), process, Masks(masks), torch.where(masks, y, 7.0), 0.1)(x, t)
    torch.testing.assert_close(elsewhere, together)
    for i in range(2):
        alone = method(law.score(process), process, Mask(masks[i]), y[i, masks[i]], 0.1)(x[i : i + 1], t)
        torch.testing.assert_close(together[i], alone[0], rtol=1e-6, atol=1e-8)
    with pytest.raises(ValueError, match="a map for each of 2 states, and there are 4 states"):
        method(law.score(process), process, Masks(masks), y[:1].expand(2, 3), 0.1)(draws(32, 4, 3), t)
