import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from sdesolve_kernels import Stream, normal

from sdesolve.diffusions import EDM, OU, VE, VP, CosineBeta, LinearDiffusion, SubVP
from sdesolve.scores.network import NetworkScore
from sdesolve.training.losses import DenoisingScoreMatching, LogNormalNoise, NoiseLadder, UniformTime

PROCESSES = {
    "vp-linear": VP(),
    "vp-cosine": VP(CosineBeta()),
    "ve": VE(sigma_max=10.0),
    "subvp": SubVP(),
    "ou": OU(),
    "edm": EDM(sigma_max=10.0),
    "straight": LinearDiffusion(alpha=lambda t: 1 - t, sigma=lambda t: t, t_max=0.99),
}
processes = pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES.keys())
SPREADS = ("uniform", "antithetic", "stratified")

MEAN = torch.tensor([0.5, -1.0, 0.0], dtype=torch.float64)
FACTOR = torch.tensor([[1.5, 0.0, 0.0], [0.8, 0.4, 0.0], [-0.3, 0.2, 0.7]], dtype=torch.float64)
COVARIANCE = FACTOR @ FACTOR.T
N = 20_000


def gaussian_data(n=N):
    z = torch.randn(n, 3, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    return MEAN + z @ FACTOR.T


def exact_score(process):
    values, vectors = torch.linalg.eigh(COVARIANCE)

    def score(x, t):
        alpha, sigma = (c.reshape(-1, 1) for c in (process.alpha(t), process.sigma(t)))
        y = (x - alpha * MEAN) @ vectors
        return -(y / (alpha**2 * values + sigma**2)) @ vectors.T

    return score


def posterior_variance(process, t):
    """Mean over dimensions of Var(z | x_t): what is left of the sigma2 loss at the exact score."""
    alpha2, sigma2 = process.alpha(t)[:, None] ** 2, process.sigma(t)[:, None] ** 2
    values = torch.linalg.eigvalsh(COVARIANCE)
    return (alpha2 * values / (alpha2 * values + sigma2)).mean(1)


def expectation(process, weight):
    """The mean of ``weight(t) Var(z | x_t)`` over uniform times: trapezia in log t, exact to about 1e-7."""
    t = torch.logspace(math.log10(process.t_min), math.log10(process.t_max), 20_001, dtype=torch.float64)
    value = torch.trapezoid(weight(t) * posterior_variance(process, t) * t, t.log())
    return float(value) / (process.t_max - process.t_min)


@processes
@pytest.mark.parametrize("times", SPREADS)
def test_exact_score_has_the_closed_form_sigma2_loss(process, times):
    loss = DenoisingScoreMatching("sigma2", times, process=process)
    each = loss.per_sample(exact_score(process), gaussian_data(), seed=1)
    expected = expectation(process, torch.ones_like)
    # Five standard errors as if samples were independent; spread times only lower the error here.
    assert abs(float(each.mean()) - expected) < 5 * float(each.std()) / math.sqrt(N)


@processes
def test_exact_score_has_the_closed_form_likelihood_loss(process):
    # From t_min = 0.02 on: below, g^2 / sigma^2 has so heavy a tail that a sample mean says little.
    t_min = 0.02
    process = LinearDiffusion(alpha=process.alpha, sigma=process.sigma, t_min=t_min, t_max=process.t_max)
    loss = DenoisingScoreMatching("likelihood", "stratified", process=process)
    each = loss.per_sample(exact_score(process), gaussian_data(), seed=2)

    def weight(t):
        return process.squared_diffusion(t) / process.sigma(t) ** 2

    assert abs(float(each.mean()) - expectation(process, weight)) < 5 * float(each.std()) / math.sqrt(N)


@processes
@pytest.mark.parametrize("predicts", ["noise", "data", "velocity", "edm"])
def test_simple_loss_of_the_exact_conditional_mean_is_the_variance_of_the_target(process, predicts):
    # The target is a(t) x_0 + b(t) z, and given x_t the data follow from the noise, x_0 = (x_t - sigma z) / alpha. So
    # its variance is that of z times (b - a sigma / alpha)^2, with a and b read off the target itself.
    exact = exact_score(process)
    predicts = "flow" if predicts == "velocity" and process is PROCESSES["straight"] else predicts
    plain = NetworkScore(lambda x, t: x, process, predicts, 0.7)

    class Perfect(torch.nn.Module):
        def forward(self, x, t):
            return self.best

    def weight(t):
        one, zero = torch.ones(len(t), 1, dtype=torch.float64), torch.zeros(len(t), 1, dtype=torch.float64)
        a, b = plain.target(one, zero, t).squeeze(1), plain.target(zero, one, t).squeeze(1)
        return (b - a * process.sigma(t) / process.alpha(t)) ** 2

    net = Perfect()
    score = NetworkScore(net, process, predicts, 0.7)
    x0, loss = gaussian_data(), DenoisingScoreMatching("simple", "stratified")
    # A recording pass finds x_t and t of every sample; then the network is given the conditional mean of its target.
    seen = []
    recorder = DenoisingScoreMatching("sigma2", "stratified", process=process)
    recorder.per_sample(lambda x, t: seen.append((x, t)) or x, x0, seed=3)
    x, t = seen[0]
    noise = -process.sigma(t)[:, None] * exact(x, t)
    data = (x - process.sigma(t)[:, None] * noise) / process.alpha(t)[:, None]
    net.best = score.target(data, noise, t)
    each = loss.per_sample(score, x0, seed=3)
    assert abs(float(each.mean()) - expectation(process, weight)) < 5 * float(each.std()) / math.sqrt(N)


@processes
@pytest.mark.parametrize("weighting", ["sigma2", "likelihood"])
def test_exact_score_is_the_minimum(process, weighting):
    exact, x0 = exact_score(process), gaussian_data(4000)
    loss = DenoisingScoreMatching(weighting, "stratified", process=process, t_min=0.05)
    best = float(loss(exact, x0, seed=4))
    for change in (lambda x, t: 1.2 * exact(x, t), lambda x, t: 0.8 * exact(x, t), lambda x, t: -exact(x, t)):
        assert float(loss(change, x0, seed=4)) > best
    shifted = float(loss(lambda x, t: exact(x, t) + 0.3, x0, seed=4))
    assert shifted > best


def test_excess_of_the_loss_is_the_squared_distance_to_the_exact_score():
    # E |sigma s + z|^2 - E |sigma s* + z|^2 = E sigma^2 |s - s*|^2: no factor 2, no sign, no missing sigma.
    process, x0 = VP(), gaussian_data()
    exact = exact_score(process)
    loss = DenoisingScoreMatching("sigma2", "stratified", process=process)
    each = loss.per_sample(lambda x, t: exact(x, t) + 2.0, x0, seed=6) - loss.per_sample(exact, x0, seed=6)
    t = loss.times(exact, x0, seed=6)
    excess = 4 * process.sigma(t).square()
    assert abs(float((each - excess).mean())) < 5 * float((each - excess).std()) / math.sqrt(N)


weightings = st.sampled_from(["sigma2", "likelihood", "simple"])


@settings(max_examples=60, deadline=None)
@given(
    weighting=weightings,
    times=st.sampled_from(SPREADS),
    sizes=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    state=st.sampled_from([(), (1,), (2, 3), (5,)]),
    first=st.one_of(st.integers(0, 100), st.integers(2**31 - 5, 2**31 + 5), st.integers(2**40, 2**40 + 9)),
    seed=st.integers(0, 2**63 - 1),
    antithetic=st.booleans(),
)
def test_a_batch_has_the_losses_of_its_parts(weighting, times, sizes, state, first, seed, antithetic):
    score = NetworkScore(lambda x, t: x.sin(), OU(), "velocity")
    loss = DenoisingScoreMatching(weighting, times, antithetic=antithetic)
    x0 = torch.linspace(-1, 1, sum(sizes) * math.prod(state), dtype=torch.float64).reshape(sum(sizes), *state)
    whole = loss.per_sample(score, x0, seed=seed, first_sample=first)
    parts = [
        loss.per_sample(score, x0[: sizes[0]], seed=seed, first_sample=first),
        loss.per_sample(score, x0[sizes[0] :], seed=seed, first_sample=first + sizes[0]),
    ]
    assert torch.equal(whole, torch.cat(parts))
    mean = loss(score, x0, seed=seed, first_sample=first)
    torch.testing.assert_close(mean, whole.mean())


@processes
@pytest.mark.parametrize("weighting", ["sigma2", "simple", "likelihood"])
@pytest.mark.parametrize("predicts", ["noise", "data", "edm"])
def test_antithetic_losses_are_means_over_both_signs_of_the_noise(process, weighting, predicts):
    score = NetworkScore(lambda x, t: (x + 0.3).sin(), process, predicts, 0.7)
    x0 = torch.randn(50, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    loss = DenoisingScoreMatching(weighting, antithetic=True)
    ours, t = (f(score, x0, seed=3, first_sample=7) for f in (loss.per_sample, loss.times))
    z = normal(50, 3, seed=3, stream=Stream.PERTURBATION, first_path=7, dtype=torch.float64)
    sigma, slope = process.sigma(t)[:, None], process.squared_diffusion(t) / process.sigma(t).square()
    expected = torch.zeros(50, dtype=torch.float64)
    for noise in (z, -z):
        x_t = process.alpha(t)[:, None] * x0 + sigma * noise
        if weighting == "simple":
            error = score.output(x_t, t) - score.target(x0, noise, t)
        else:
            error = sigma * score(x_t, t) + noise
        expected += 0.5 * error.square().mean(1) * (slope if weighting == "likelihood" else 1.0)
    torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(loss(score, x0, seed=3, first_sample=7), expected.mean(), rtol=1e-9, atol=1e-9)


def test_chance_in_the_gradient_cancels_between_the_signs_where_noise_is_low():
    # For score -a x at sigma << 1 the gradient in a is -2 sigma x z to first order: odd in z. What is left in a pair is
    # of order sigma^2, so that its variance falls by about sigma^2 = 1e-4 against one draw.
    x0, process, spread = gaussian_data(2000), EDM(), []
    a = torch.ones(2000, 1, dtype=torch.float64, requires_grad=True)  # one each, for a gradient of each loss
    for antithetic in (False, True):
        loss = DenoisingScoreMatching(law=NoiseLadder([0.01]), process=process, antithetic=antithetic)
        (gradient,) = torch.autograd.grad(loss.per_sample(lambda x, t: -a * x, x0, seed=0).sum(), a)
        spread.append(gradient.std())
    assert float(spread[1]) < 0.03 * float(spread[0])


def test_halves_average_to_the_whole_and_repeat_whatever_ran_between():
    score = NetworkScore(lambda x, t: x, VP())
    loss, x0 = DenoisingScoreMatching(times="stratified"), torch.randn(64, 3)
    whole = loss(score, x0, seed=1, first_sample=128)
    torch.randn(1000)
    loss(score, x0, seed=2)
    halves = [loss(score, x0[k : k + 32], seed=1, first_sample=128 + k) for k in (0, 32)]
    torch.testing.assert_close(sum(halves) / 2, whole)
    assert torch.equal(loss(score, x0, seed=1, first_sample=128), whole)
    assert not torch.equal(loss(score, x0, seed=2, first_sample=128), whole)
    assert not torch.equal(loss(score, x0, seed=1, first_sample=192), whole)


@pytest.mark.parametrize("times", SPREADS)
def test_times_are_uniform_on_the_training_interval(times):
    loss = DenoisingScoreMatching(times=times, t_min=0.1, t_max=0.7, process=VP())
    t = loss.times(lambda x, t: x, torch.zeros(20_001, 1, dtype=torch.float64), seed=3, first_sample=11)
    assert float(t.min()) >= 0.1
    assert float(t.max()) <= 0.7
    # 1.95 / sqrt(n): the Kolmogorov-Smirnov distance that one draw in a thousand exceeds.
    assert stats.kstest(t.numpy(), stats.uniform(0.1, 0.6).cdf).statistic < 1.95 / math.sqrt(20_001)


@pytest.mark.parametrize("times", SPREADS)
def test_each_single_sample_has_a_uniform_time_over_seeds(times):
    loss = DenoisingScoreMatching(times=times, t_min=1e-9, t_max=1.0, process=VP())
    one = torch.zeros(1, 1, dtype=torch.float64)
    t = [float(loss.times(lambda x, t: x, one, seed=seed, first_sample=5)) for seed in range(2000)]
    assert stats.kstest(t, "uniform").statistic < 1.95 / math.sqrt(2000)


@settings(max_examples=30, deadline=None)
@given(first=st.integers(0, 2**40), seed=st.integers(0, 2**32))
def test_antithetic_times_mirror_each_other_in_pairs(first, seed):
    loss = DenoisingScoreMatching(times="antithetic", t_min=0.2, t_max=0.8, process=VP())
    t = loss.times(lambda x, t: x, torch.zeros(7, 1, dtype=torch.float64), seed=seed, first_sample=2 * first)
    torch.testing.assert_close(t[0:6:2] + t[1:6:2], torch.ones(3, dtype=torch.float64))


@settings(max_examples=30, deadline=None)
@given(power=st.integers(0, 9), block=st.integers(0, 10**6), seed=st.integers(0, 2**32))
def test_stratified_times_are_equally_spaced_in_every_aligned_batch(power, block, seed):
    n = 2**power
    loss = DenoisingScoreMatching(times="stratified", t_min=1e-12, t_max=1.0, process=VP())
    t = loss.times(lambda x, t: x, torch.zeros(n, 1, dtype=torch.float64), seed=seed, first_sample=n * block)
    t = t.sort().values
    gaps = torch.diff(t, append=t[:1] + 1)
    torch.testing.assert_close(gaps, torch.full_like(gaps, 1 / n), rtol=0, atol=1e-9)


def test_spread_times_lower_the_error_of_a_batch():
    process, x0 = VP(), gaussian_data(64)
    exact = exact_score(process)
    spread = {}
    for times in ("uniform", "stratified"):
        loss = DenoisingScoreMatching("sigma2", times, process=process)
        batches = torch.stack([loss(exact, x0, seed=9, first_sample=64 * k) for k in range(200)])
        spread[times] = float(batches.std())
    # Over 200 batches a ratio of standard deviations is known to 10 % at two sigma; the gain is a factor 2.
    assert spread["stratified"] < 0.8 * spread["uniform"]


@processes
def test_log_normal_noise_levels_follow_their_truncated_law(process):
    law = LogNormalNoise(mean=-0.5, std=1.0)
    loss = DenoisingScoreMatching(law=law, process=process)
    t = loss.times(lambda x, t: x, torch.zeros(20_000, 1, dtype=torch.float64), seed=1)
    level = -0.5 * process.log_snr(t)
    low, high = (-0.5 * float(process.log_snr(s)) for s in (process.t_min, process.t_max))
    expected = stats.truncnorm((low + 0.5) / 1.0, (high + 0.5) / 1.0, loc=-0.5, scale=1.0)
    # The law's table of 1025 nodes is coarser where the level moves fast; 0.005 is what it may add.
    assert stats.kstest(level.numpy(), expected.cdf).statistic < 1.95 / math.sqrt(20_000) + 0.005


def test_float32_times_and_losses_agree_with_float64():
    score = NetworkScore(lambda x, t: x.sin(), VP(), "edm")
    x0 = gaussian_data(256)
    loss = DenoisingScoreMatching("sigma2", "stratified", t_min=0.01)
    wide, narrow = (loss.per_sample(score, x, seed=3) for x in (x0, x0.float()))
    assert narrow.dtype == torch.float32
    torch.testing.assert_close(narrow.double(), wide, rtol=2e-4, atol=2e-4)


def test_an_empty_batch_has_no_losses():
    loss = DenoisingScoreMatching(times="antithetic")
    assert loss.per_sample(NetworkScore(lambda x, t: x, VP()), torch.empty(0, 2), seed=0).shape == (0,)


def test_the_text_of_a_loss_tells_its_settings():
    text = repr(DenoisingScoreMatching("simple", "stratified", t_min=0.01, law=LogNormalNoise(-1.0, 2.0)))
    assert text == (
        "DenoisingScoreMatching(weighting='simple', times='stratified', t_min=0.01, t_max=None, "
        "law=LogNormalNoise(mean=-1.0, std=2.0))"
    )
    assert repr(DenoisingScoreMatching(antithetic=True)).endswith(", antithetic=True)")
    assert "law=UniformTime()" in repr(DenoisingScoreMatching(law=UniformTime()))


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (
            lambda: DenoisingScoreMatching("snr"),
            ValueError,
            "weighting='snr' is unknown; choose one of 'sigma2', 'like",
        ),
        (
            lambda: DenoisingScoreMatching(times="sobol"),
            ValueError,
            "times='sobol' is unknown; choose one of 'uniform'",
        ),
        (lambda: DenoisingScoreMatching(t_min=0.0), ValueError, "t_min must be positive and finite, got 0.0: at t = 0"),
        (lambda: DenoisingScoreMatching(t_max=math.inf), ValueError, "t_max must be positive and finite, got inf"),
        (lambda: DenoisingScoreMatching(law="uniform"), TypeError, "law must be a AbstractTimeLaw"),
        (lambda: DenoisingScoreMatching(process="vp"), TypeError, "process must be a diffusion such as VP"),
        (lambda: LogNormalNoise(std=0.0), ValueError, "std > 0, got mean=-1.2, std=0.0"),
        (lambda: LogNormalNoise(mean=math.nan), ValueError, "finite mean"),
    ],
)
def test_bad_settings_are_refused(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_the_process_of_a_score_may_be_said_again():
    score, x = NetworkScore(lambda x, t: x, VP()), torch.ones(4, 2)
    again = DenoisingScoreMatching(process=VP())
    torch.testing.assert_close(again(score, x, seed=0), DenoisingScoreMatching()(score, x, seed=0), rtol=0, atol=0)


NETWORK, PLAIN = NetworkScore(lambda x, t: x, VP()), DenoisingScoreMatching(process=VP())


@pytest.mark.parametrize(
    ("loss", "score", "x0", "error", "message"),
    [
        (DenoisingScoreMatching(), NETWORK, torch.ones(4, 2).long(), TypeError, "or float64, got torch.int64"),
        (DenoisingScoreMatching(), NETWORK, torch.ones(4, 2).half(), TypeError, "use torch.autocast"),
        (DenoisingScoreMatching(), NETWORK, torch.tensor(1.0), ValueError, "needs a batch axis"),
        (DenoisingScoreMatching(), lambda x, t: x, torch.ones(4, 2), TypeError, r"DenoisingScoreMatching\(process="),
        (DenoisingScoreMatching("simple", process=VP()), torch.sub, torch.ones(4, 2), TypeError, "wrap the network in"),
        (DenoisingScoreMatching(process=OU()), NETWORK, torch.ones(4, 2), ValueError, "made for another process"),
        (DenoisingScoreMatching(t_min=2.0), NETWORK, torch.ones(4, 2), ValueError, "interval is empty: t_min=2.0"),
        (PLAIN, lambda x, t: x[:, :1], torch.ones(4, 2), ValueError, r"the shape of the state, \(4, 2\), got \(4, 1\)"),
        (PLAIN, lambda x, t: x[:, None], torch.ones(4, 2), ValueError, r"\(4, 2\), got \(4, 1, 2\)"),
        (PLAIN, lambda x, t: x.double(), torch.ones(4, 2), TypeError, "score returned torch.float64, the state is"),
        (PLAIN, lambda x, t: None, torch.ones(4, 2), TypeError, "score must return a tensor"),
    ],
)  # fmt: skip
def test_bad_calls_are_refused(loss, score, x0, error, message):
    with pytest.raises(error, match=message):
        loss(score, x0, seed=0)


def test_a_sample_number_is_a_whole_number():
    with pytest.raises(TypeError, match=r"first_sample must be an integer, got 1.5"):
        DenoisingScoreMatching()(NETWORK, torch.ones(4, 2), seed=0, first_sample=1.5)
