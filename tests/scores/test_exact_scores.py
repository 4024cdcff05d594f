"""Exact scores against automatic differentiation of the log density, and what follows from them."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sdesolve_kernels import normal

from sdesolve._internal.copies import Copies
from sdesolve.diffusions import EDM, OU, VE, VP, CosineBeta, LinearDiffusion, SubVP
from sdesolve.scores import Gaussian, GaussianMixture
from sdesolve.scores.components import Components, converted

PROCESSES = {
    "vp": VP(),
    "cosine": VP(CosineBeta()),
    "subvp": SubVP(),
    "ve": VE(0.01, 10.0),
    "ou": OU(),
    "edm": EDM(sigma_max=10.0),
    "linear": LinearDiffusion(lambda t: 1 - t, lambda t: t, t_max=0.99),
}
processes = st.sampled_from(list(PROCESSES.values()))
shapes = st.lists(st.integers(1, 3), min_size=0, max_size=3).map(tuple)
seeds = st.integers(0, 1000)
forms = st.sampled_from(["isotropic", "diagonal", "full", "singular"])


def draws(seed: int, *shape: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return normal(1, math.prod(shape), seed=seed, stream=200, dtype=dtype).reshape(shape)


def covariance(form: str, shape: tuple[int, ...], seed: int) -> torch.Tensor | float:
    d = math.prod(shape)
    if form == "isotropic":
        return 0.7
    if form == "diagonal":
        return draws(seed, *shape).exp()
    a = draws(seed, d, d if form == "full" else max(1, d - 1))
    return a @ a.mT


def gaussian(form: str, shape: tuple[int, ...], seed: int) -> Gaussian:
    return Gaussian(draws(seed + 1, *shape), covariance(form, shape, seed))


def mixture(form: str, shape: tuple[int, ...], K: int, seed: int) -> GaussianMixture:
    means, weights = 2 * draws(seed + 1, K, *shape), draws(seed + 2, K).exp()
    if form == "isotropic":
        return GaussianMixture(means, draws(seed, K).exp(), weights)
    if form == "diagonal":
        return GaussianMixture(means, draws(seed, K, *shape).exp(), weights)
    covs = torch.stack([torch.as_tensor(covariance(form, shape, seed + 10 * k)) for k in range(K)])
    return GaussianMixture(means, weights=weights, covs=covs)


laws = st.builds(gaussian, forms, shapes, seeds) | st.builds(mixture, forms, shapes, st.integers(1, 4), seeds)
# t per sample or one for all; float32 is exact here, so both dtypes mean the same time.
times = st.lists(st.sampled_from([0.0625, 0.25, 0.5, 0.75, 0.9375]), min_size=1, max_size=1) | st.just(
    [0.125, 0.5, 0.875]
)


def time_tensor(times: list[float], dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.tensor(times[0] if len(times) == 1 else times, dtype=dtype)


def relative_error(actual: torch.Tensor, exact: torch.Tensor) -> float:
    return float((actual.double() - exact).norm() / exact.norm().clamp_min(1e-300))


@given(laws, processes, times, seeds)
def test_the_score_is_the_gradient_of_the_log_density(law, process, times, seed):
    score, t = law.score(process), time_tensor(times)
    x = (2 * draws(seed, 3, *law.state_shape)).requires_grad_()
    (gradient,) = torch.autograd.grad(score.log_prob(x, t).sum(), x)
    s = score(x.detach(), t)
    assert s.shape == x.shape
    torch.testing.assert_close(s, gradient, rtol=1e-9, atol=1e-11 * float(gradient.abs().max()))


@given(laws, processes, times, seeds)
def test_the_denoiser_is_tweedies(law, process, times, seed):
    score, t = law.score(process), time_tensor(times)
    x = 2 * draws(seed, 3, *law.state_shape)
    alpha, sigma = (c.reshape(-1, *(1,) * len(law.state_shape)) for c in (process.alpha(t), process.sigma(t)))
    tweedie = (x + sigma.square() * score(x, t)) / alpha
    # Tweedie's difference loses what 1 / alpha makes of the rounding of x.
    torch.testing.assert_close(score.denoise(x, t), tweedie, rtol=1e-9, atol=1e-13 / float(alpha.min()))


@given(laws, processes, times, seeds)
def test_float32_is_accurate_and_stays_float32(law, process, times, seed):
    score = law.score(process)
    x = 2 * draws(seed, 3, *law.state_shape, dtype=torch.float32)
    t64, t32 = time_tensor(times), time_tensor(times, torch.float32)
    for method in (score, score.denoise):
        exact, actual = method(x.double(), t64), method(x, t32)
        assert actual.dtype == torch.float32
        # States of size 10 and variances down to sigma^2 = 1e-3 make the logits of a mixture as large as 1e4, and
        # responsibilities as wrong as the rounding of those.
        assert relative_error(actual, exact) < 2e-3
        assert method(x, t64).dtype == torch.float32
    exact, actual = score.log_prob(x.double(), t64), score.log_prob(x, t32)
    assert relative_error(actual, exact) < 1e-4


@given(st.builds(gaussian, forms, shapes, seeds), processes, times, seeds)
def test_a_gaussian_in_float32_is_accurate_to_rounding(law, process, times, seed):
    score, t = law.score(process), time_tensor(times, torch.float32)
    x = 2 * draws(seed, 3, *law.state_shape, dtype=torch.float32)
    assert relative_error(score(x, t), score(x.double(), t.double())) < 2e-5
    assert relative_error(score.denoise(x, t), score.denoise(x.double(), t.double())) < 2e-5


@given(forms, shapes, processes, times, seeds)
def test_one_component_is_a_gaussian(form, shape, process, times, seed):
    law = gaussian(form, shape, seed)
    if form in ("isotropic", "diagonal"):
        std = torch.as_tensor(covariance(form, shape, seed), dtype=torch.float64).sqrt()
        one = GaussianMixture(law.mean[None], std if std.ndim == 0 else std[None])
    else:
        one = GaussianMixture(law.mean[None], covs=torch.as_tensor(covariance(form, shape, seed))[None])
    a, b, t = law.score(process), one.score(process), time_tensor(times)
    x = draws(seed, 3, *shape)
    torch.testing.assert_close(a(x, t), b(x, t))
    torch.testing.assert_close(a.log_prob(x, t), b.log_prob(x, t))
    torch.testing.assert_close(a.denoise(x, t), b.denoise(x, t))


@given(laws, processes, seeds)
def test_a_batch_of_times_is_a_loop_over_times(law, process, seed):
    score, x = law.score(process), draws(seed, 3, *law.state_shape)
    t = torch.tensor([0.125, 0.5, 0.75], dtype=torch.float64)
    for method in (score, score.denoise, score.log_prob):
        rows = torch.cat([method(x[i : i + 1], t[i]) for i in range(3)])
        torch.testing.assert_close(method(x, t), rows, rtol=1e-12, atol=1e-13)


def matrix(form: str, shape: tuple[int, ...], seed: int) -> torch.Tensor:
    """The covariance of any form, written out."""
    d, cov = math.prod(shape), torch.as_tensor(covariance(form, shape, seed), dtype=torch.float64)
    return cov if form in ("full", "singular") else torch.diag(cov.reshape(-1).expand(d))


@given(forms, shapes, processes, times, seeds)
def test_the_density_of_a_gaussian_agrees_with_an_independent_formula(form, shape, process, times, seed):
    d, law, t = math.prod(shape), gaussian(form, shape, seed), time_tensor(times)
    x, cov, eye = draws(seed, 3, *shape), matrix(form, shape, seed), torch.eye(d, dtype=torch.float64)
    alpha, sigma = process.alpha(t).reshape(-1, 1), process.sigma(t).reshape(-1, 1)
    noised = alpha.square()[:, :, None] * cov + sigma.square()[:, :, None] * eye
    expected = torch.distributions.MultivariateNormal(alpha * law.mean.reshape(d), noised).log_prob(x.reshape(3, d))
    torch.testing.assert_close(law.score(process).log_prob(x, t), expected, rtol=1e-8, atol=1e-8)
    if form != "singular":
        clean = torch.distributions.MultivariateNormal(law.mean.reshape(d), cov)
        torch.testing.assert_close(law.log_prob(x), clean.log_prob(x.reshape(3, d)), rtol=1e-6, atol=1e-6)


@given(forms, shapes, st.integers(1, 4), processes, st.floats(0.05, 0.95), seeds)
def test_the_density_of_a_mixture_agrees_with_an_independent_formula(form, shape, K, process, t, seed):
    d, law = math.prod(shape), mixture(form, shape, K, seed)
    x, alpha, sigma = draws(seed, 5, *shape), process.alpha(t), process.sigma(t)
    if form in ("isotropic", "diagonal"):
        stds = draws(seed, K).exp() if form == "isotropic" else draws(seed, K, *shape).exp()
        covs = torch.diag_embed(stds.reshape(K, -1).expand(K, d).square())
    else:
        covs = torch.stack([matrix(form, shape, seed + 10 * k) for k in range(K)])
    components = torch.distributions.MultivariateNormal(
        alpha * (2 * draws(seed + 1, K, *shape)).reshape(K, d),
        alpha**2 * covs + sigma**2 * torch.eye(d, dtype=torch.float64),
    )
    weights = torch.distributions.Categorical(probs=draws(seed + 2, K).exp())
    expected = torch.distributions.MixtureSameFamily(weights, components).log_prob(x.reshape(5, d))
    torch.testing.assert_close(law.score(process).log_prob(x, t), expected, rtol=1e-8, atol=1e-8)


@given(
    forms.filter(lambda form: form != "singular"), shapes, processes, seeds, st.floats(0.05, 0.9), st.floats(0.05, 0.9)
)
def test_the_gaussian_flow_solves_the_probability_flow(form, shape, process, seed, s, t):
    law = gaussian(form, shape, seed)
    flow, ode = law.flow(process), process.probability_flow(law.score(process))
    x = draws(seed, 3, *shape)
    moved = flow(x, s, t)
    torch.testing.assert_close(flow(moved, t, s), x, rtol=1e-9, atol=1e-9)
    time = torch.tensor(t, dtype=torch.float64)
    velocity = torch.func.jvp(lambda u: flow(x, s, u), (time,), (torch.ones_like(time),))[1]
    drift = ode.drift(moved, time)
    torch.testing.assert_close(velocity, drift, rtol=1e-8, atol=1e-9 * float(drift.abs().max()))


@given(forms, shapes, processes, seeds, st.floats(0.0, 0.9))
def test_moments_of_a_gaussian(form, shape, process, seed, t):
    law, d = gaussian(form, shape, seed), math.prod(shape)
    mean, cov = law.moments(process, t)
    alpha, sigma = process.alpha(t), process.sigma(t)
    torch.testing.assert_close(mean, alpha * law.mean)
    clean = torch.as_tensor(covariance(form, shape, seed), dtype=torch.float64)
    assert cov.shape == clean.shape
    noise = torch.eye(d, dtype=torch.float64) if clean.shape == (d, d) and form in ("full", "singular") else 1.0
    torch.testing.assert_close(cov, alpha**2 * clean + sigma**2 * noise, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("form", ["isotropic", "diagonal", "full"])
def test_far_from_all_modes(form, dtype):
    """1e3 standard deviations away densities underflow; their logarithms, scores and denoisers are plain numbers."""
    law = mixture(form, (2,), 3, seed=4)
    score, t = law.score(VP()), torch.tensor(0.01, dtype=dtype)
    x = torch.tensor([[5e3, 0.0], [0.0, -5e3], [-4e3, 4e3]], dtype=dtype)
    for value in (score(x, t), score.log_prob(x, t), score.denoise(x, t)):
        assert bool(value.isfinite().all())
    exact = score(x.double(), t.double())
    torch.testing.assert_close(score(x, t).double(), exact, rtol=1e-3, atol=0)
    # The widest component in that direction answers for everything: a score linear in x, pointing home.
    assert bool(((score(x, t) * x).sum(1) < 0).all())


def test_point_masses_and_singular_covariances_have_scores_once_noised():
    points = GaussianMixture(torch.tensor([[-1.0, 0.0], [1.0, 0.0]]), 0.0)
    score = points.score(VP())
    x = torch.tensor([[0.9, 0.1]], dtype=torch.float64)
    torch.testing.assert_close(score.denoise(x, 1e-3), torch.tensor([[1.0, 0.0]], dtype=torch.float64))
    flat = Gaussian(torch.zeros(2), torch.tensor([[1.0, 1.0], [1.0, 1.0]]))
    # At t = 0 the denoiser projects on the support.
    torch.testing.assert_close(flat.score(VP()).denoise(x, 0.0), x.mean(1, keepdim=True).expand(1, 2))
    torch.testing.assert_close(points.sample(5, seed=0).abs().sum(1), torch.ones(5))


def test_large_batches_go_through_in_blocks_with_the_same_result():
    law = GaussianMixture(draws(0, 64, 128), 0.5)  # 2^13 elements a row, so 2^7 rows a block
    score, x = law.score(VP()), draws(1, 150, 128)
    t = torch.linspace(0.1, 0.9, 150, dtype=torch.float64)
    for method in (score, score.denoise, score.log_prob):
        torch.testing.assert_close(method(x, t), torch.cat([method(x[k::3], t[k::3]) for k in range(3)])[_thirds(150)])
        torch.testing.assert_close(method(x, t[0]), torch.cat([method(x[k::3], t[0]) for k in range(3)])[_thirds(150)])


def _thirds(n: int) -> torch.Tensor:
    return torch.cat([torch.arange(n)[k::3] for k in range(3)]).argsort()


@pytest.mark.parametrize(
    "law", [gaussian("full", (2, 2), 0), mixture("diagonal", (2, 2), 3, 0)], ids=["gaussian", "mixture"]
)
def test_transforms_and_modes_leave_nothing_behind(law):
    """A constant cached inside a transform, a trace or inference mode would break the calls after it."""
    score, t = law.score(VP()), torch.tensor(0.5)
    x = draws(0, 3, 2, 2, dtype=torch.float32)
    with torch.inference_mode():
        expected = score(x, t)
    jacobian = torch.func.vmap(torch.func.jacrev(lambda row: score(row[None], t)[0]))(x)
    assert jacobian.shape == (3, 2, 2, 2, 2)
    torch.func.jvp(lambda x: score(x, t), (x,), (x,))
    x.requires_grad_()
    (hessian_row,) = torch.autograd.grad(score(x, t)[:, 0, 0].sum(), x)
    torch.testing.assert_close(hessian_row, jacobian[:, 0, 0])
    torch.testing.assert_close(score(x, t).detach(), expected.clone())


def test_constants_copied_inside_a_transform_are_not_kept():
    """Copies for the host exist from the start; those for other devices and dtypes are made where first needed."""
    parts = Components(*(torch.ones(1, 2, dtype=torch.float64) for _ in range(2)), None, torch.zeros(()).double())
    constants, x = Copies(parts, converted), torch.zeros(1, 2, dtype=torch.float16)
    torch.func.grad(lambda x: (constants.like(x).mean * x).sum())(x)
    kept = constants.like(x)
    assert torch.equal(kept.mean, torch.ones(1, 2, dtype=torch.float16))
    assert not torch._C._functorch.is_functorch_wrapped_tensor(kept.mean)
    assert constants.like(x).mean is kept.mean


@given(laws)
@settings(max_examples=20)
def test_an_empty_batch_gives_an_empty_result(law):
    x, score = torch.zeros(0, *law.state_shape), law.score(VP())
    assert score(x, 0.5).shape == x.shape
    assert score.denoise(x, torch.zeros(0)).shape == x.shape
    assert score.log_prob(x, 0.5).shape == (0,)
    assert law.sample(0, seed=0).shape == x.shape
