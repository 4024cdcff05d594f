"""Likelihoods against Gaussian and mixture densities in closed form."""

import math

import pytest
import torch
from sdesolve_kernels import Stream, normal

import sdesolve as sds
from sdesolve.likelihood.likelihood import decode, encode, estimate_likelihood, log_likelihood
from sdesolve.likelihood.trace_estimators import ExactTrace, Hutchinson, HutchPP

D = 6
FACTOR = torch.randn(D, D, generator=torch.Generator().manual_seed(0), dtype=torch.float64) / math.sqrt(D)
# Centred, and on processes that end in nearly their prior, so that the model's density is the data's.
DATA = sds.Gaussian(torch.zeros(D), FACTOR @ FACTOR.T + 0.2 * torch.eye(D, dtype=torch.float64))
MIXTURE = sds.GaussianMixture(torch.tensor([[-1.0, 0.4], [1.0, -0.4]]), 0.3)
PROCESSES = {
    "vp": sds.VP(sds.LinearBeta(0.1, 40.0)),
    "usual vp": sds.VP(),
    "subvp": sds.SubVP(),
    "ve": sds.VE(sigma_max=1000.0),
    "edm": sds.EDM(sigma_min=1e-3, sigma_max=1000.0),
    "two functions": sds.LinearDiffusion(lambda t: (-9 * t * t).exp(), lambda t: (-torch.expm1(-18 * t * t)).sqrt()),
}
processes = pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES.keys())
X = DATA.sample(24, seed=1, dtype=torch.float64)
VP = PROCESSES["vp"]


@processes
def test_a_gaussian_has_its_log_likelihood(process):
    score = DATA.score(process)
    eps = 1e-5 if process.t_max == 1.0 else 1e-3
    noisy = estimate_likelihood(process, score, X, t_min=eps, ending="density")
    assert float((noisy.log_prob - score.log_prob(X, eps)).abs().max()) < 1e-4 * D
    assert float((log_likelihood(process, score, X, t_min=eps) - DATA.log_prob(X)).abs().max()) < 1e-4 * D
    assert noisy.exact
    assert float(noisy.standard_error.abs().max()) == 0.0


@pytest.mark.parametrize("divergence", [ExactTrace(), Hutchinson(2), HutchPP(1, 2)], ids=repr)
def test_inference_mode_changes_nothing(divergence):
    """Autograd records nothing there: every field had the divergence 0."""

    def found():
        score = DATA.score(VP)
        return estimate_likelihood(VP, score, X[:5], divergence=divergence, steps=5, seed=1).log_prob

    with torch.inference_mode():
        inside = found()
    assert torch.equal(inside, found())


def cosine(t):
    return torch.cos(1.5 * t)


@pytest.mark.parametrize(
    "process",
    [sds.VP(), sds.SubVP(), sds.VE(), sds.EDM(), sds.OU(), sds.LinearDiffusion(cosine, lambda t: torch.sin(1.5 * t))],
    ids=["vp", "subvp", "ve", "edm", "ou", "own"],
)
def test_with_the_law_of_its_end_any_process_gives_any_gaussian(process):
    """Far from centred, on processes that end far from their prior."""
    law = sds.Gaussian(torch.tensor([2.0, -1.0, 0.5]), torch.tensor([1.5, 0.4, 0.1]))
    x, score = law.sample(24, seed=3, dtype=torch.float64), law.score(process)
    eps = 1e-3 if isinstance(process, sds.EDM) else 1e-5
    bare, exact = (
        log_likelihood(process, score, x, t_min=eps, solver=sds.DormandPrince(1e-7, 1e-7), **options) - law.log_prob(x)
        for options in ({}, {"prior": lambda x: score.log_prob(x, process.t_max)})
    )
    assert float(exact.abs().max()) < 1e-4 * 3
    assert float(bare.abs().max()) > 5 * float(exact.abs().max())


@processes
def test_a_mixture_has_its_log_likelihood(process):
    x, score = MIXTURE.sample(12, seed=2, dtype=torch.float64), MIXTURE.score(process)
    ours = estimate_likelihood(process, score, x, ending="density", solver=sds.DormandPrince(1e-6, 1e-6))
    assert float((ours.log_prob - score.log_prob(x, process.t_min)).abs().max()) < 2e-4


def test_the_decoder_is_bayes_rule_written_out():
    # At a large epsilon, where the terms are far from cancelling.
    eps, score = 0.2, DATA.score(VP)
    alpha, sigma = float(VP.alpha(eps)), float(VP.sigma(eps))
    z = normal(24, D, seed=3, stream=Stream.PERTURBATION, dtype=torch.float64)
    x_eps = alpha * X + sigma * z
    posterior = torch.distributions.Normal(score.denoise(x_eps, eps), sigma / alpha).log_prob(X).sum(1)
    forward = torch.distributions.Normal(alpha * X, sigma).log_prob(x_eps).sum(1)
    expected = score.log_prob(x_eps, eps) + posterior - forward
    ours = log_likelihood(VP, score, X, t_min=eps, seed=3, solver=sds.DormandPrince(1e-8, 1e-8))
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-5)


def test_the_decoder_bounds_the_truth_and_the_bare_density_does_not():
    # Data in a plane within D dimensions, thinner than sigma(epsilon) across: a point without noise is denser in p_eps
    # than any draw from it, by half a nat for each dimension across; the decoder pays for that.
    thin, eps, n = 1e-3, 0.05, 400
    data = sds.Gaussian(torch.zeros(D), torch.tensor([1.0, 1.0] + [thin**2] * (D - 2), dtype=torch.float64))
    score, x = data.score(VP), data.sample(n, seed=4, dtype=torch.float64)
    exact = {"t_min": eps, "solver": sds.DormandPrince(1e-6, 1e-6)}
    with_decoder = log_likelihood(VP, score, x, **exact)
    bare = log_likelihood(VP, score, x, ending="density", **exact)
    typical = score.log_prob(VP.alpha(eps) * x + VP.sigma(eps) * torch.randn(n, D).double(), eps)
    assert float(bare.mean() - typical.mean()) == pytest.approx(0.5 * (D - 2), abs=0.3)
    difference = with_decoder - data.log_prob(x)
    assert float(difference.mean()) < 0


LEVELS = sds.Quantisation(levels=9, low=-2.7, high=2.7)


def masses(values, mean, std):
    """What a Gaussian has in the bin of each value, the outermost bins open, by its distribution function."""
    law = torch.distributions.Normal(mean, std)
    low, high = law.cdf(values - 0.5 * LEVELS.width), law.cdf(values + 0.5 * LEVELS.width)
    k = LEVELS.quantise(values)
    return high.where(k < LEVELS.levels - 1, 1.0) - low.where(k > 0, 0.0)


def test_the_discretised_decoder_is_bayes_rule_with_the_masses_of_bins():
    eps, score = 0.2, DATA.score(VP)
    x = LEVELS.value(LEVELS.quantise(X.clamp(-2.7, 2.7)), dtype=torch.float64)
    alpha, sigma = float(VP.alpha(eps)), float(VP.sigma(eps))
    x_eps = alpha * x + sigma * normal(24, D, seed=3, stream=Stream.PERTURBATION, dtype=torch.float64)
    decoder = masses(x, score.denoise(x_eps, eps), sigma / alpha).log().sum(1)
    forward = torch.distributions.Normal(alpha * x, sigma).log_prob(x_eps).sum(1)
    exact = {"t_min": eps, "seed": 3, "solver": sds.DormandPrince(1e-8, 1e-8)}
    ours = estimate_likelihood(VP, score, x, ending=LEVELS, **exact)
    torch.testing.assert_close(ours.log_prob, score.log_prob(x_eps, eps) + decoder - forward, rtol=0, atol=1e-5)
    torch.testing.assert_close(ours.bits_per_dimension(), -ours.log_prob / (D * math.log(2)))
    with pytest.raises(ValueError, match="one of integers already"):
        ours.bits_per_dimension(LEVELS)
    density = estimate_likelihood(VP, score, x, **exact)
    torch.testing.assert_close(density.bits_per_dimension(LEVELS), LEVELS.bits_per_dimension(density.log_prob, D))
    with pytest.raises(ValueError, match="say how the integers were dequantised"):
        density.bits_per_dimension()


def test_the_discretised_bound_is_below_the_probability_by_what_quadrature_says():
    # One dimension, at a coarse epsilon: P(k) is the integral of p_eps(y) P(k | y), and the bound one over q(y | x_k).
    eps, data, n = 0.1, sds.Gaussian(torch.tensor([0.3]), 0.5), 1000
    score, alpha, sigma = data.score(VP), float(VP.alpha(eps)), float(VP.sigma(eps))
    x = LEVELS.value(torch.arange(9), dtype=torch.float64)[:, None]
    y = torch.linspace(-12, 12, 24001, dtype=torch.float64)[:, None]  # the trapezoid rule converges geometrically here
    log_p, decoded = score.log_prob(y, eps), score.denoise(y, eps)[:, 0]
    mass = torch.stack([masses(value.expand(len(y)), decoded, sigma / alpha) for value in x])
    truth = torch.trapezoid(log_p.exp() * mass, y[:, 0]).log()
    assert float(truth.exp().sum()) == pytest.approx(1.0, abs=1e-9)
    q = torch.distributions.Normal(alpha * x, sigma).log_prob(y[:, 0])
    inside = (log_p + mass.clamp_min(1e-300).log() - q) * q.exp()
    bound = torch.trapezoid(inside, y[:, 0])
    ours = log_likelihood(VP, score, x.repeat(n, 1), t_min=eps, ending=LEVELS).reshape(n, 9)
    error = ours.std(0) / math.sqrt(n)
    assert bool(((ours.mean(0) - bound).abs() < 5 * error + 1e-4).all())
    assert bool((bound < truth).all())


def test_the_discretised_bound_is_the_probability_where_the_model_knows_the_levels():
    # A Gaussian rounded to levels in two dimensions, noised from its point masses: near t = 0 nothing is lost.
    values = LEVELS.value(torch.arange(9), dtype=torch.float64)
    weights = torch.outer(masses(values, 0.4, 1.0), masses(values, -0.2, 1.5)).flatten()
    points = torch.cartesian_prod(values, values)
    score = sds.GaussianMixture(points, 0.0, weights).score(VP)
    found = estimate_likelihood(VP, score, points, t_min=1e-3, ending=LEVELS)  # sigma / alpha is 0.02 of a bin
    assert float((found.log_prob - weights.log()).abs().max()) < 1e-3
    entropy = float((weights * found.bits_per_dimension()).sum())
    assert entropy == pytest.approx(float(-(weights * weights.log2()).sum()) / 2, abs=1e-3)


def test_intervals_of_hutchinson_cover_the_truth():
    # A thousand runs are a thousand rows: each has its own probes. The truth is that of noisy data, so that the
    # probes' is the only error; RK4's is far below it.
    score, truth = DATA.score(VP), float(DATA.score(VP).log_prob(X[:1], VP.t_min))
    for law in (Hutchinson(16), Hutchinson(16, "gaussian"), HutchPP(12, 2)):
        runs = estimate_likelihood(
            VP, score, X[:1].expand(1000, -1), divergence=law, ending="density", seed=5,
            grid=sds.grids.uniform_log_snr(VP, 24),
        )  # fmt: skip
        low, high = runs.interval(0.95)
        covered = int(((low <= truth) & (truth <= high)).sum())
        assert 930 <= covered <= 970, (law, covered)
        ratio = float(runs.standard_error.square().mean().sqrt() / runs.log_prob.std())
        assert ratio == pytest.approx(1.0, abs=0.12)  # five standard deviations of a standard deviation of 1000


@pytest.mark.parametrize(("solver", "order", "steps"), [(sds.Heun(), 2, 60), (sds.RK4(), 4, 40)], ids=["Heun", "RK4"])
def test_fixed_steps_converge_at_their_order(solver, order, steps):
    score, errors = DATA.score(VP), []
    truth = score.log_prob(X, 0.01)
    flat = VP.prior.log_prob(DATA.flow(VP)(X, 0.01, 1.0)) - score.log_prob(DATA.flow(VP)(X, 0.01, 1.0), 1.0)
    for n in (steps, 2 * steps, 4 * steps):
        grid = sds.grids.uniform(1.0, 0.01, n)
        ours = log_likelihood(VP, score, X, grid=grid, solver=solver, ending="density")
        errors.append(float((ours - truth - flat).abs().mean()))
    assert math.log2(errors[1] / errors[2]) == pytest.approx(order, abs=0.25), errors


@pytest.mark.parametrize("law", [ExactTrace(), Hutchinson(3), HutchPP(3, 2)], ids=repr)
@pytest.mark.parametrize("steps", [None, 20])
def test_rows_do_not_depend_on_their_batch(law, steps):
    score = DATA.score(VP)
    whole = estimate_likelihood(VP, score, X, divergence=law, steps=steps, seed=6)
    part = estimate_likelihood(VP, score, X[5:8], divergence=law, steps=steps, seed=6, first_sample=5)
    torch.testing.assert_close(part.log_prob, whole.log_prob[5:8])
    torch.testing.assert_close(part.standard_error, whole.standard_error[5:8])
    other = estimate_likelihood(VP, score, X, divergence=law, steps=steps, seed=7)
    assert not torch.equal(other.log_prob, whole.log_prob)


@pytest.mark.parametrize("law", [ExactTrace(), Hutchinson(3), HutchPP(3, 2)], ids=repr)
def test_probes_go_with_their_samples_when_others_have_arrived(law):
    """Samples that have arrived stand still, and others go on with their own probes."""
    score, x = DATA.score(VP), torch.cat([X, 30 * X[:8]])
    how = {"divergence": law, "seed": 6, "ending": "density"}
    ours = estimate_likelihood(VP, score, x, solver=sds.DormandPrince(1e-7, 1e-7), t_min=1e-2, **how)
    grid = sds.grids.uniform_log_snr(VP, 200, t1=1e-2)
    fixed = estimate_likelihood(VP, score, x, solver=sds.RK4(), grid=grid, **how)
    torch.testing.assert_close(ours.log_prob, fixed.log_prob, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(ours.standard_error, fixed.standard_error, rtol=1e-4, atol=1e-4)


@processes
def test_latents_lead_back_to_the_data(process):
    score, tight = DATA.score(process), sds.DormandPrince(1e-8, 1e-8)
    latent = encode(process, score, X, solver=tight)
    torch.testing.assert_close(latent, DATA.flow(process)(X, process.t_min, process.t_max), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(decode(process, score, latent, solver=tight), X, rtol=1e-5, atol=1e-5)
    estimated = estimate_likelihood(process, score, X, solver=tight, ending="density").latent
    torch.testing.assert_close(estimated, latent, rtol=1e-5, atol=1e-5)


@pytest.mark.uncompiled
def test_a_corrected_flow_draws_its_noise_from_torchs_generator():
    solver = sds.PredictorCorrector(sds.Heun(), sds.LangevinCorrector(snr=0.1))

    def decoded(seed):
        torch.manual_seed(seed)
        return sds.decode(VP, SCORE, X, solver=solver, steps=3)

    assert torch.equal(decoded(0), decoded(0))
    assert not torch.isclose(decoded(0), decoded(1)).any()


def test_networks_images_and_float32():
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(100, 100), torch.nn.Unflatten(1, (1, 10, 10)))
    score = sds.NetworkScore(lambda x, t: net(x) * t[:, None, None, None], sds.VP())
    x = torch.randn(4, 1, 10, 10)
    ours = estimate_likelihood(score.process, score, x, steps=10)
    assert ours.estimates == 8  # above 64 dimensions: Hutchinson
    assert ours.log_prob.dtype is torch.float32
    assert ours.latent.shape == x.shape
    assert ours.nfe == 41
    exact = estimate_likelihood(score.process, score, x, steps=10, divergence=ExactTrace())
    assert bool(((ours.log_prob - exact.log_prob).abs() < 6 * ours.standard_error).all())


SCORE = DATA.score(VP)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"ending": "none"}, ValueError, "ending='none' is unknown; choose one of 'decoder', 'density'"),
        ({"ending": LEVELS}, ValueError, r"on the 9 levels from -2.4 to 2.4 .* -2.4 \+ k \* 4.8 / 8"),
        ({"ending": LEVELS, "x": torch.full((2, D), 3.0)}, ValueError, "between them or outside"),
        ({"ending": 8}, ValueError, "ending=8 is unknown"),
        ({"divergence": "exact"}, TypeError, r"divergence must be ExactTrace\(\)"),
        ({"steps": 10, "solver": sds.DormandPrince()}, ValueError, "chooses its own steps"),
        ({"solver": sds.RK4()}, ValueError, "RK4 needs steps= or grid="),
        ({"steps": 10, "solver": sds.EulerMaruyama()}, None, ""),
        ({"steps": 10, "solver": 5}, TypeError, "solver must be a solver object.*got int"),
        ({"steps": 10, "solver": sds.RK4}, TypeError, "solver must be a solver object.*RK4"),
        ({"steps": 10, "solver": sds.DDIM()}, ValueError, "DDIM integrates the reverse SDE or probability flow"),
        ({"t_min": 0.0}, ValueError, r"t_min must lie in \(0, t_max = 1.0\), got 0.0"),
        ({"steps": 10, "t_min": 0.1}, ValueError, "give grid= explicit times"),
        ({"grid": torch.tensor([0.0, 1.0])}, ValueError, "between some epsilon > 0 and t_max"),
        ({"grid": torch.tensor([0.1, 0.9])}, ValueError, "between some epsilon > 0 and t_max"),
        ({"grid": torch.tensor([0.1, 1.0]), "t_min": 0.1}, ValueError, "give t_min or grid"),
        ({"grid": torch.tensor([0.1, 1.0]), "steps": 3}, ValueError, "not both"),
        ({"x": torch.ones(2, D).long()}, TypeError, "float32 or float64"),
        ({"x": torch.full((2, D), math.nan)}, ValueError, "x must be finite"),
        ({"prior": sds.Gaussian(torch.zeros(D), 1.0)}, TypeError, "prior must be a function of x_T.*got Gaussian"),
        ({"prior": torch.distributions.Normal(0.0, 1.0).log_prob}, ValueError, r"\(24,\), got \(24, 6\); is it summed"),
        ({"process": "vp"}, TypeError, "process must be a linear diffusion"),
        ({"score": lambda x, t: x[:, :1]}, ValueError, "score must return the shape of the state"),
    ],
)
def test_bad_input_is_refused(arguments, error, message):
    arguments = {"process": VP, "score": SCORE, "x": X} | arguments
    if error is None:
        assert log_likelihood(**arguments).shape == (24,)
        return
    with pytest.raises(error, match=message):
        log_likelihood(**arguments)


@pytest.mark.parametrize("law", [ExactTrace(), Hutchinson(3), HutchPP(3, 2)], ids=repr)
def test_a_state_without_numbers_has_probability_one(law):
    found = estimate_likelihood(VP, lambda x, t: -x, torch.ones(3, 0), divergence=law, steps=2)
    assert found.log_prob.tolist() == [0.0, 0.0, 0.0]
    empty = estimate_likelihood(VP, SCORE, X[:0], divergence=law, steps=2)
    assert empty.log_prob.shape == empty.standard_error.shape == (0,)


def test_one_probe_tells_no_error():
    one = estimate_likelihood(VP, SCORE, X, divergence=Hutchinson(1), steps=5)
    assert bool(one.standard_error.isnan().all())
    with pytest.raises(ValueError, match="ask for two or more probes"):
        one.interval()
    with pytest.raises(ValueError, match=r"level must be within \(0, 1\), got 95"):
        one.interval(95)
    exact = estimate_likelihood(VP, SCORE, X, steps=5)
    assert torch.equal(exact.interval()[0], exact.log_prob)


@pytest.mark.parametrize("n", [2, 5])
def test_a_score_that_broadcasts_its_time_is_right_for_every_batch(n):
    """Samples have times of their own under the adaptive solver; on as many as columns they were those of columns."""
    x = torch.randn(n, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def score(x, t):
        return -x / (1 + t)

    ours = log_likelihood(VP, score, x, ending="density", solver=sds.DormandPrince(1e-8, 1e-8))
    fixed = log_likelihood(VP, score, x, ending="density", solver=sds.RK4(), steps=200)
    torch.testing.assert_close(ours, fixed, rtol=1e-6, atol=1e-6)


def test_errors_of_encoding_speak_of_it():
    score, grid = DATA.score(VP), torch.tensor([0.5, 0.1])
    for call, name, word in ((encode, "x", "encode"), (decode, "latent", "decode")):
        with pytest.raises(ValueError, match=f"the grid of {word} is"):
            call(VP, score, X, grid=grid)
        with pytest.raises(TypeError, match=f"{name} must be float32 or float64"):
            call(VP, score, X.half())
