"""DDPM and SMLD against Bayes' rule, the processes they tend to, and the exact laws of their samples."""

import math

import pytest
import torch
from sdesolve_kernels import Stream, normal
from torch.distributions import Normal

import sdesolve as sds
from sdesolve.chains import DDPM, SMLD, ChainScore

CHAINS = {
    "linear": DDPM.linear(20, 0.1, 15.0),
    "cosine": DDPM.cosine(20),
    "smld": SMLD.geometric(20, 0.05, 20.0),
    "one-step": DDPM(torch.tensor([0.5])),
}
chains = pytest.mark.parametrize("chain", CHAINS.values(), ids=CHAINS.keys())
DATA = sds.GaussianMixture(torch.tensor([[-1.0, 0.5], [1.0, 0.0]]), 0.3)


@chains
def test_tables_are_those_of_the_recursion(chain):
    assert chain.steps == len(chain.alpha) - 1
    torch.testing.assert_close(chain.alpha[1:], chain.scale[1:] * chain.alpha[:-1])
    variance = chain.scale[1:] ** 2 * chain.sigma[:-1] ** 2 + chain.noise[1:] ** 2
    torch.testing.assert_close(chain.sigma[1:] ** 2, variance)
    if isinstance(chain, DDPM):
        torch.testing.assert_close(chain.alpha**2 + chain.sigma**2, torch.ones_like(chain.alpha))


@chains
def test_the_posterior_is_bayes_rule(chain):
    x0, before, x = torch.tensor([[0.3], [-1.2], [0.7]], dtype=torch.float64), 0.4, 0.9
    for k in range(2, chain.steps + 1):
        here = torch.full_like(x0, x)
        posterior = chain.posterior(x0, here, k)
        joint = Normal(*chain.marginal(x0, k - 1)).log_prob(torch.tensor(before).double()) + Normal(
            chain.scale[k] * before, chain.noise[k]
        ).log_prob(here)
        theirs = Normal(posterior.mean, posterior.variance.sqrt()).log_prob(torch.tensor(before).double())
        torch.testing.assert_close(theirs + Normal(*chain.marginal(x0, k)).log_prob(here), joint)
        # At the denoised state the posterior's mean is the reverse step's.
        s = torch.full_like(x0, -0.6)
        denoised = (here + chain.sigma[k] ** 2 * s) / chain.alpha[k]
        torch.testing.assert_close(chain.mean_before(s, here, k), chain.posterior(denoised, here, k).mean)
    first = chain.posterior(x0, torch.full_like(x0, x), 1)
    torch.testing.assert_close(first.mean, x0)
    assert float(first.variance.abs().max()) == 0.0


@pytest.mark.slow
@chains
def test_one_jump_is_replayable_and_has_the_marginal(chain):
    x0 = torch.randn(6, 2, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    k = torch.tensor([1, chain.steps, 1, chain.steps, 1, 1])
    z = normal(6, 6, seed=3, stream=Stream.PERTURBATION, first_path=10, offset=12, dtype=torch.float64).reshape(6, 2, 3)
    mean, std = chain.marginal(x0, k)
    torch.testing.assert_close(chain.perturb(x0, k, seed=3, first_sample=10, draw=2), mean + std * z)


@chains
def test_the_simulated_chain_has_the_marginals_and_independent_steps(chain):
    n = 4000
    xs = chain.simulate(torch.full((n, 2), 0.8, dtype=torch.float64), seed=1)
    assert xs.shape == (chain.steps + 1, n, 2)
    z = (xs[1:] - chain.scale[1:, None, None] * xs[:-1]) / chain.noise[1:, None, None]
    z = z.movedim(2, 0).flatten(0, 1)  # all steps of the first component, then of the second
    gram = z @ z.T / n - torch.eye(len(z), dtype=torch.float64)
    # Five standard deviations of a mean of n products of normals (of squares on the diagonal).
    assert float(gram.abs().max()) < 5 * math.sqrt(2 / n)
    last = xs[-1].std()
    assert abs(float(last / chain.sigma[-1]) - 1) < 5 / math.sqrt(4 * n)
    torch.testing.assert_close(
        chain.simulate(xs[0, :5], seed=1, first_path=2), chain.simulate(xs[0, :7], seed=1)[:, 2:]
    )


def chain_law(chain, data_variance, data_mean, variance):
    """Exact mean and variance of ancestral samples of Gaussian data on the line: each reverse step is affine."""
    score = chain.score_of(sds.Gaussian(torch.tensor([data_mean]), data_variance))
    ends = torch.tensor([[0.0], [1.0]], dtype=torch.float64)
    mean, var = 0.0, chain.prior.std**2
    for k in range(chain.steps, 0, -1):
        each = torch.full((2,), k)
        low, high = chain.mean_before(score(ends, each), ends, each)[:, 0].tolist()
        mean, var = low + (high - low) * mean, (high - low) ** 2 * var
        if k > 1:
            var += math.exp(float(chain.log_variance(ends, each, variance)[0]))
    return mean, var


@chains
@pytest.mark.parametrize("variance", ["small", "large"])
def test_ancestral_samples_have_the_exact_law(chain, variance):
    n = 20_000
    data = sds.Gaussian(torch.tensor([0.4]), 0.3)
    x = chain.sample(chain.score_of(data), (n, 1), variance=variance, seed=5, dtype=torch.float64)
    mean, var = chain_law(chain, 0.3, 0.4, variance)
    assert abs(float(x.mean()) - mean) < 5 * math.sqrt(var / n)
    assert abs(float(x.var()) / var - 1) < 5 * math.sqrt(2 / n)
    shard = chain.sample(chain.score_of(data), (3, 1), variance=variance, seed=5, first_path=7, dtype=torch.float64)
    torch.testing.assert_close(shard, x[7:10])


def test_fixed_variances_are_right_for_the_data_they_are_made_for():
    # Ho et al. 2020, section 3.2: "large" reproduces data of unit variance exactly but for the last, noiseless step;
    # "small" reproduces a point.
    chain = DDPM.linear(40, 0.1, 15.0)
    _, var = chain_law(chain, 1.0, 0.0, "large")
    assert var == pytest.approx(1.0 - float(chain.noise[1]) ** 2, rel=1e-12)
    mean, var = chain_law(chain, 0.0, 0.75, "small")
    assert mean == pytest.approx(0.75, abs=1e-12)
    assert var < 1e-20


def test_the_first_reverse_step_takes_the_small_variance_of_the_second():
    x = torch.zeros(2, 1, dtype=torch.float64)
    for chain in (DDPM.linear(20, 0.1, 15.0), SMLD.geometric(20, 0.05, 20.0)):
        one, two = chain.log_variance(x, torch.tensor([1, 2]), "small").exp()
        assert float(one) == float(two)
        assert float(two) == pytest.approx(float(chain.posterior(x, x, 2).variance), rel=1e-12)
        large = chain.log_variance(x, torch.tensor([1, 2]), "large").exp()[:, 0]
        torch.testing.assert_close(large, chain.noise[1:3] ** 2)
        half = chain.log_variance(x, torch.tensor([2, 2]), lambda x, k: torch.full_like(x, 0.5)).exp()
        torch.testing.assert_close(half[0, 0] ** 2, two[0] * large[1])


def rate(counts, errors):
    x, y = torch.tensor(counts, dtype=torch.float64).log(), torch.tensor(errors, dtype=torch.float64).log()
    return float(((x - x.mean()) * (y - y.mean())).sum() / ((x - x.mean()) ** 2).sum())


@pytest.mark.parametrize("kind", ["linear", "cosine"])
def test_ddpm_tends_to_the_vp_process(kind):
    counts, errors = [100, 200, 400, 800, 1600], []
    for n in counts:
        chain = getattr(DDPM, kind)(n)
        process = sds.VP() if kind == "linear" else sds.VP(sds.CosineBeta())
        # Away from the pole of the cosine rate, where the clip acts.
        k = torch.arange(1, int(0.98 * n) + 1)
        beta = chain.noise[k] ** 2 * n
        alpha = (chain.alpha[k] - process.alpha(k / n)).abs().max()
        errors.append(float(alpha if kind == "linear" else (beta / process.squared_diffusion(k / n) - 1)[n // 2]))
    slope = rate(counts, [abs(e) for e in errors])
    assert -1.1 < slope < -0.9, (slope, errors)


def test_smld_is_the_ve_process_started_from_slightly_noisy_data():
    chain, process = SMLD.geometric(50, 0.02, 30.0), sds.VE(0.02, 30.0)
    t = torch.arange(50, dtype=torch.float64) / 49
    torch.testing.assert_close(
        (chain.sigma[1:] ** 2 - chain.sigma[1] ** 2)[1:], process.sigma(t)[1:] ** 2, rtol=1e-12, atol=0
    )


@pytest.mark.parametrize("variance", ["small", "large"])
@pytest.mark.parametrize("kind", ["ddpm", "smld"])
def test_ancestral_sampling_tends_to_the_data_at_rate_one(kind, variance):
    counts, errors = [100, 200, 400, 800], []
    for n in counts:
        # SMLD sees data blurred by sigma_min; against that the law is compared. DDPM's end is its prior's.
        chain = DDPM.linear(n, 0.1, 30.0) if kind == "ddpm" else SMLD.geometric(n, 1e-3, 200.0)
        errors.append(abs(chain_law(chain, 0.5, 0.0, variance)[1] - 0.5))
    assert -1.1 < rate(counts, errors) < -0.9, errors


@pytest.mark.parametrize(
    "process",
    [sds.VP(), sds.SubVP(), sds.VE(sigma_max=100.0), sds.EDM(sigma_max=100.0)],
    ids=lambda p: type(p).__name__,
)
def test_a_continuous_score_serves_any_chain(process):
    for chain in (DDPM.linear(10, 0.1, 8.0), SMLD.geometric(10, 0.05, 50.0)):
        x = 2.0 * torch.randn(10, 2, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
        k = torch.arange(1, 11)
        ours = chain.score_from(process, DATA.score(process))(x, k)
        torch.testing.assert_close(ours, chain.score_of(DATA)(x, k), rtol=1e-6, atol=1e-7)


def test_the_usual_chain_takes_the_usual_process():
    chain, process = DDPM.linear(1000), sds.VP()
    x = torch.randn(1000, 2, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    k = torch.arange(1, 1001)
    ours = chain.score_from(process, DATA.score(process))(x, k)
    # Beyond t_max, at log-SNR -10, the score of unit noise is wrong by the share of data that is left, exp(-5).
    torch.testing.assert_close(ours, chain.score_of(DATA)(x, k), rtol=0, atol=1e-3)
    assert DDPM.cosine(1000).score_from(sds.VP(sds.CosineBeta()), DATA.score(process)) is not None


def test_a_network_of_noise_is_a_score():
    chain = DDPM.linear(30)
    score = ChainScore(lambda x, k: k[:, None] * x, chain)
    x, k = torch.ones(3, 2), torch.tensor([1, 15, 30])
    torch.testing.assert_close(score(x, k), -k[:, None] * x / chain.sigma[k][:, None].float())


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: DDPM(torch.tensor([0.1, 1.0])), ValueError, r"within \(0, 1\), got shape \(2,\) from 0.1 to 1"),
        (lambda: DDPM(torch.zeros(0)), ValueError, r"got shape \(0,\)"),
        (lambda: DDPM.linear(10), ValueError, "10 steps are too few for rates up to 20.0"),
        (lambda: DDPM.linear(10.0), TypeError, "steps must be an integer"),
        (lambda: DDPM.cosine(10, largest=1.0), ValueError, "largest must be within"),
        (lambda: SMLD(torch.tensor([2.0, 1.0])), ValueError, "from the lowest to the highest"),
        (lambda: SMLD(torch.tensor([0.0, 1.0])), ValueError, "positive noise levels"),
        (lambda: ChainScore(3, DDPM.linear(30)), TypeError, "net must be a function"),
        (lambda: ChainScore(torch.sin, sds.VP()), TypeError, "chain must be a DDPM or SMLD"),
        (lambda: DDPM.linear(30).sample(lambda x, k: x, (2, 1), variance="tiny", seed=0), ValueError, "'small', 'larg"),
        (lambda: DDPM.linear(30).sample(lambda x, k: x[:1], (2, 1), seed=0), ValueError, r"got torch.float32 \(1, 1\)"),
        (lambda: DDPM.linear(30).perturb(torch.ones(2, 1).long(), 3, seed=0), TypeError, "float32 or float64"),
        (lambda: DDPM.linear(30).perturb(torch.ones(2, 1), -1, seed=0), ValueError, "run from 0 to 30, got -1"),
        (lambda: DDPM.linear(30).marginal(torch.ones(2, 1), torch.tensor([1, 31])), ValueError, "0 to 30, got 31"),
        (lambda: DDPM.linear(30).posterior(torch.ones(2, 1), torch.ones(2, 1), 0), ValueError, "1 to 30, got 0"),
        (
            lambda: DDPM.linear(30).sample(sds.Gaussian(torch.zeros(1), 1.0).score(sds.VP()), (2, 1), seed=0),
            TypeError,
            r"times of samples must be a floating-point tensor, got torch.int64: are they steps of a chain\?",
        ),
        (
            lambda: ChainScore(torch.mul, DDPM.linear(30))(torch.ones(2, 1), torch.tensor([0.1, 0.2])),
            TypeError,
            "takes steps of its chain, whole numbers from 1 to 30, got a tensor of torch.float32",
        ),
        (
            lambda: DDPM.linear(30).sample(sds.NetworkScore(lambda x, t: x, sds.VP()), (2, 1), seed=0),
            TypeError,
            r"needs times as a floating.*got a tensor of torch.int64. Steps of a chain are for a ChainScore",
        ),
        (
            lambda: SMLD.geometric(9, 0.1, 50.0).score_from(sds.EDM(sigma_max=10.0), torch.sub),
            ValueError,
            "give the process a later end",
        ),
    ],
)  # fmt: skip
def test_bad_input_is_refused(make, error, message):
    with pytest.raises(error, match=message):
        make()
