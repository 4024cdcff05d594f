"""The variational bound in closed form: on Gaussian data every expectation over the noise is one of a quadratic."""

import math

import pytest
import torch
from scipy import stats

import sdesolve as sds
from sdesolve.chains import DDPM, SMLD, variational_bound
from sdesolve.chains.bound import prior_term, step_term
from sdesolve.likelihood.quantisation import Quantisation, discretised_gaussian_log_prob

CHAINS = {"ddpm": DDPM.linear(12, 0.3, 9.0), "cosine": DDPM.cosine(12), "smld": SMLD.geometric(12, 0.1, 20.0)}
chains = pytest.mark.parametrize("chain", CHAINS.values(), ids=CHAINS.keys())
VARIANCES = {"small": "small", "large": "large", "learned": lambda x, k: 0.3 + 0.02 * k.to(x).reshape(-1, 1)}
variances = pytest.mark.parametrize("variance", VARIANCES.values(), ids=VARIANCES.keys())
X0 = torch.tensor([[-1.5], [0.2], [0.9]], dtype=torch.float64)


def expected_bound(chain, score, variance):
    """Mean of the bound over the noise: the terms are quadratic in ``z``, and +-1 integrate quadratics exactly."""
    total = prior_term(chain, X0)
    for k in range(1, chain.steps + 1):
        each = torch.full((len(X0),), k)
        mean, std = chain.marginal(X0, k)
        for z in (-1.0, 1.0):
            total = total + 0.5 * step_term(chain, score, X0, mean + z * std, each, variance=variance, bits=None)
    return total


def direct_bound(chain, score, variance):
    """``E_q[log q(x_1...x_N | x_0) - log p(x_0...x_N)]`` from the joint Gaussian law of the chain."""
    ends = torch.tensor([[0.0], [1.0]], dtype=torch.float64)
    a, b2, alpha, s2 = chain.scale, chain.noise**2, chain.alpha, chain.sigma**2
    total = torch.zeros(len(X0), dtype=torch.float64)
    for k in range(1, chain.steps + 1):
        each = torch.full((2,), k)
        low, high = chain.mean_before(score(ends, each), ends, each)[:, 0]
        c, v = high - low, chain.log_variance(ends, each, variance).reshape(-1)[0].exp()
        shift = (alpha[k - 1] - c * alpha[k]) * X0[:, 0] - low
        spread = s2[k - 1] - 2 * c * a[k] * s2[k - 1] + c**2 * s2[k]  # Cov(x_{k-1}, x_k) = a_k sigma_{k-1}^2
        total += 0.5 * ((2 * math.pi * v).log() + (shift**2 + spread) / v)
        total -= 0.5 * ((2 * math.pi * b2[k]).log() + 1.0)  # the entropy of q(x_k | x_{k-1})
    pi = chain.prior.std**2
    return total + 0.5 * (math.log(2 * math.pi * pi) + ((alpha[-1] * X0[:, 0]) ** 2 + s2[-1]) / pi)


def model_log_prob(chain, score, variance):
    """The exact density of the chain's own samples, whose last step has noise of the decoder's variance."""
    ends = torch.tensor([[0.0], [1.0]], dtype=torch.float64)
    mean, var = 0.0, chain.prior.std**2
    for k in range(chain.steps, 0, -1):
        each = torch.full((2,), k)
        low, high = chain.mean_before(score(ends, each), ends, each)[:, 0].tolist()
        mean = low + (high - low) * mean
        var = (high - low) ** 2 * var + float(chain.log_variance(ends, each, variance).reshape(-1)[0].exp())
    return torch.from_numpy(stats.norm(mean, math.sqrt(var)).logpdf(X0[:, 0].numpy()))


@chains
@variances
def test_the_terms_add_up_to_the_bound(chain, variance):
    score = chain.score_of(sds.Gaussian(torch.tensor([0.4]), 0.3))
    ours = expected_bound(chain, score, variance)
    torch.testing.assert_close(ours, direct_bound(chain, score, variance), rtol=1e-10, atol=1e-10)
    assert bool((ours >= -model_log_prob(chain, score, variance)).all())


def test_the_bound_is_the_log_likelihood_where_the_reversal_is_exact():
    # Data of unit variance stay N(0, 1) along a DDPM chain, whose reversal has the variance beta: nothing is lost.
    data, chain = sds.Gaussian(torch.tensor([0.0]), 1.0), CHAINS["ddpm"]
    ours = expected_bound(chain, chain.score_of(data), "large")
    torch.testing.assert_close(ours, -data.log_prob(X0), rtol=1e-12, atol=1e-12)
    assert float((expected_bound(chain, chain.score_of(data), "small") + data.log_prob(X0)).mean()) > 0.01


def test_more_steps_close_the_gap_to_the_truth():
    data, gaps = sds.Gaussian(torch.tensor([0.0]), 0.4), []
    for n in (50, 100, 200):
        chain = DDPM.linear(n, 0.1, 20.0)
        bound = expected_bound(chain, chain.score_of(data), "small")
        gaps.append(float((bound + data.log_prob(X0))[1]))
    assert gaps[0] > gaps[1] > gaps[2] > 0


@chains
def test_draws_average_to_the_expectation(chain):
    data, n = sds.Gaussian(torch.tensor([0.4]), 0.3), 2000
    score = chain.score_of(data)
    terms = variational_bound(chain, score, X0[1:2].expand(n, 1), variance="large", seed=4)
    expected = float(expected_bound(chain, score, "large")[1])
    assert abs(float(terms.total.mean()) - expected) < 5 * float(terms.total.std()) / math.sqrt(n)
    assert terms.steps.shape == (chain.steps - 1, n)
    part = variational_bound(chain, score, X0[1:2].expand(2, 1), variance="large", seed=4, first_sample=9)
    torch.testing.assert_close(part.total, terms.total[9:11])


def test_every_term_has_a_draw_of_its_own():
    chain = CHAINS["ddpm"]
    terms = variational_bound(chain, lambda x, k: -x, X0, seed=4)
    for k in (1, 2, 12):
        each = torch.full((3,), k)
        x = chain.perturb(X0, each, seed=4, draw=k - 1)
        term = step_term(chain, lambda x, k: -x, X0, x, each, variance="small", bits=None)
        torch.testing.assert_close(terms.decoder if k == 1 else terms.steps[k - 2], term)


def test_bits_per_dimension_count_every_dimension():
    x0 = torch.tensor([[3.0, 200.0]], dtype=torch.float64) * 2 / 255 - 1
    terms = variational_bound(CHAINS["ddpm"], lambda x, k: -x, x0, bits=8)
    torch.testing.assert_close(terms.bits_per_dimension, terms.total / (2 * math.log(2)))
    one = [variational_bound(CHAINS["ddpm"], lambda x, k: -x, x0[:, j : j + 1], bits=8) for j in (0, 1)]
    torch.testing.assert_close(terms.prior, one[0].prior + one[1].prior)
    assert bool((terms.decoder > 0).all())  # minus the log of a probability


def test_the_decoder_takes_any_number_of_levels():
    x0 = torch.tensor([[1.0], [-1.0]], dtype=torch.float64)

    def decoder(bits):
        return variational_bound(CHAINS["ddpm"], lambda x, k: -x, x0, bits=bits).decoder

    torch.testing.assert_close(decoder(Quantisation.inclusive(16)), decoder(4))
    assert bool((decoder(Quantisation.inclusive(17)) > decoder(4)).all())  # finer, so less likely
    with pytest.raises(ValueError, match=r"17 levels from -1.0 to 1.0"):
        variational_bound(CHAINS["ddpm"], lambda x, k: -x, x0 / 3, bits=Quantisation.inclusive(17))


@pytest.mark.parametrize("bits", [1, 4, 8])
@pytest.mark.parametrize(("mean", "std"), [(0.1, 0.3), (-1.0, 0.001), (3.0, 0.5), (0.0, 50.0)])
def test_the_discretised_gaussian_is_a_probability(bits, mean, std):
    n = 2**bits
    levels = torch.arange(n, dtype=torch.float64) * 2 / (n - 1) - 1
    log_p = discretised_gaussian_log_prob(levels, torch.tensor(mean), torch.tensor(std), bits=bits)
    assert float(log_p.exp().sum()) == pytest.approx(1.0, abs=1e-9)
    edges = torch.cat([torch.tensor([-math.inf]), (levels[1:] + levels[:-1]) / 2, torch.tensor([math.inf])])
    masses = stats.norm(mean, std).cdf(edges[1:]) - stats.norm(mean, std).cdf(edges[:-1])
    torch.testing.assert_close(log_p.exp(), torch.from_numpy(masses), rtol=1e-6, atol=1e-12)


def test_the_discretised_gaussian_is_exact_far_out():
    x = torch.tensor([1.0, -1.0, 1.0 - 4 / 255], dtype=torch.float64)
    for sign in (1, -1):
        mean, std = (torch.tensor(v, dtype=torch.float64) for v in (-sign, 0.02))
        log_p = discretised_gaussian_log_prob(sign * x, mean, std)
        tail = stats.norm.logsf((2.0 - 1 / 255) / 0.02)
        assert float(log_p[0]) == pytest.approx(tail, rel=1e-9)
        low, high = (2.0 - 5 / 255) / 0.02, (2.0 - 3 / 255) / 0.02
        inner = stats.norm.logsf(low) + math.log1p(-math.exp(stats.norm.logsf(high) - stats.norm.logsf(low)))
        assert float(log_p[2]) == pytest.approx(inner, rel=1e-9)
    narrow = discretised_gaussian_log_prob(x.float(), torch.zeros(3), torch.full((3,), 1e-3))
    assert bool(narrow.isfinite().all())


@pytest.mark.parametrize("k", [1, 2, 12])
@pytest.mark.parametrize("bits", [None, 8])
def test_gradients_reach_the_score_at_every_step(k, bits):
    scale = torch.tensor(-0.7, dtype=torch.float64, requires_grad=True)
    x0, each = torch.tensor([[-1.0], [1.0]], dtype=torch.float64), torch.full((2,), k)
    loss = step_term(CHAINS["ddpm"], lambda x, k: scale * x, x0, 0.3 + x0, each, variance="small", bits=bits)
    (gradient,) = torch.autograd.grad(loss.sum(), scale)
    assert math.isfinite(float(gradient))
    assert float(gradient) != 0.0


@pytest.mark.parametrize("x0", [torch.tensor([[0.0]]), torch.tensor([[1.01]]), torch.tensor([[257 * 2 / 255 - 1]])])
def test_data_off_the_levels_is_refused(x0):
    with pytest.raises(ValueError, match=r"takes data on the 256 levels from -1.0 to 1.0"):
        variational_bound(CHAINS["ddpm"], lambda x, k: -x, x0, bits=8)
