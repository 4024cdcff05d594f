"""Objectives against each other, by quadrature, and each against its formula with the noise made again."""

import functools
import math

import pytest
import torch
from sdesolve_kernels import Stream, normal

import sdesolve as sds
from sdesolve.chains.bound import prior_term, step_term
from sdesolve.likelihood.trace_estimators import ExactTrace, Hutchinson, HutchPP
from sdesolve.training.score_matching import parzen
from sdesolve.training.times import log_snr_slope

MIXTURE = sds.GaussianMixture(torch.tensor([[-1.0], [1.5]], dtype=torch.float64), 0.5, torch.tensor([0.3, 0.7]))
CENTRES = torch.tensor([[-1.2], [-0.3], [0.1], [0.9], [1.4]], dtype=torch.float64)
# Trapezia on a line that the laws leave at 10 standard deviations: exact to rounding for such smooth functions.
LINE = torch.linspace(-14.0, 14.0, 4001, dtype=torch.float64).unsqueeze(1)
STEP = 28.0 / 4000
SCORES = {
    "bent": lambda x, t: torch.tanh(1.3 * x) - 0.8 * x,
    "straight": lambda x, t: 0.4 - 0.6 * x,
    "wavy": lambda x, t: torch.sin(2.0 * x) - 0.3 * x,
}
FIRST, *OTHERS = SCORES.values()


def mean_over(density, values):
    return float((density * values.detach()).sum()) * STEP


def denoising(score, h):
    """Vincent's objective over all draws of centre and noise: what `DenoisingScoreMatching` samples."""
    total = 0.0
    for centre in CENTRES:
        z = (LINE - centre) / h
        kernel = (-0.5 * z**2).exp() / (h * math.sqrt(2 * math.pi))
        total += mean_over(kernel[:, 0], (score(LINE, None) + z / h)[:, 0] ** 2)
    return total / len(CENTRES)


@pytest.mark.parametrize("other", OTHERS)
def test_implicit_score_matching_is_explicit_up_to_a_constant(other):
    density = MIXTURE.log_prob(LINE).exp()
    truth = MIXTURE.noised_score(LINE, torch.tensor(1.0).double(), torch.tensor(0.0).double())
    for objective in (
        sds.ImplicitScoreMatching(),
        sds.ImplicitScoreMatching(Hutchinson(2)),  # on a line every probe of +-1 gives the derivative itself
        sds.SlicedScoreMatching(2, variance_reduced=False),
        sds.SlicedScoreMatching(2),
    ):
        implicit = [mean_over(density, objective.per_sample(s, LINE, seed=0)) for s in (FIRST, other)]
        explicit = [mean_over(density, (s(LINE, None) - truth)[:, 0] ** 2) for s in (FIRST, other)]
        assert implicit[0] - implicit[1] == pytest.approx(explicit[0] - explicit[1], abs=1e-10)
    constant = mean_over(density, truth[:, 0] ** 2)
    assert implicit[0] + constant == pytest.approx(explicit[0], abs=1e-10)


@pytest.mark.parametrize("h", [0.2, 0.7])
@pytest.mark.parametrize("other", OTHERS)
def test_denoising_is_explicit_and_implicit_up_to_a_constant(other, h):
    kernel = parzen(LINE, CENTRES, 1.0, h)
    density = kernel.log_prob.exp()
    assert float(density.sum()) * STEP == pytest.approx(1.0, abs=1e-12)
    explicit = [mean_over(density, (s(LINE, None) - kernel.score)[:, 0] ** 2) for s in (FIRST, other)]
    implicit = [mean_over(density, sds.ImplicitScoreMatching().per_sample(s, LINE, seed=0)) for s in (FIRST, other)]
    vincent = [denoising(s, h) for s in (FIRST, other)]
    assert vincent[0] - vincent[1] == pytest.approx(explicit[0] - explicit[1], abs=1e-10)
    assert vincent[0] - vincent[1] == pytest.approx(implicit[0] - implicit[1], abs=1e-10)
    assert vincent[0] - explicit[0] > 0.1  # what is left of the noise given the point


def test_the_kernel_density_is_the_mixture_of_its_kernels():
    data = torch.randn(7, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x = torch.randn(5, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64).requires_grad_()
    scale, h = torch.linspace(0.5, 1.0, 5, dtype=torch.float64), torch.linspace(0.1, 0.9, 5, dtype=torch.float64)
    ours = parzen(x, data, scale, h)
    each = torch.distributions.Normal(scale[:, None, None] * data, h[:, None, None]).log_prob(x[:, None]).sum(2)
    torch.testing.assert_close(ours.log_prob, each.logsumexp(1) - math.log(7))
    torch.testing.assert_close(ours.score, torch.autograd.grad(ours.log_prob.sum(), x)[0])


# Each objective against its formula, with the noise made again ------------------------------------------------------

PROCESS = sds.VP()
X0 = torch.randn(32, 3, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
W = torch.randn(3, 3, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


def score_3d(x, t):
    return torch.sin(x @ W.T) * (1.0 + t.reshape(-1, 1)) - x


def drawn(objective, process=PROCESS, first=7):
    """Times, noise and state that the objective must have used."""
    t = objective.times(score_3d, X0, seed=5, first_sample=first)
    z = normal(32, 3, seed=5, stream=Stream.PERTURBATION, first_path=first, dtype=torch.float64)
    alpha, sigma = process.alpha(t)[:, None], process.sigma(t)[:, None]
    return t, z, alpha * X0 + sigma * z, sigma[:, 0]


def own(t):
    return 1.0 + t**2


WEIGHTS = {
    "sigma2": (sds.DenoisingScoreMatching("sigma2", process=PROCESS), lambda t, sigma: sigma**2),
    "own": (sds.DenoisingScoreMatching(own, process=PROCESS), lambda t, sigma: own(t)),
    "edm": (
        sds.DenoisingScoreMatching("edm", process=PROCESS, sigma_data=0.7),
        lambda t, sigma: sigma**2 * (1 + (sigma / PROCESS.alpha(t) / 0.7) ** 2),
    ),
    "ladder": (
        sds.DenoisingScoreMatching(own, law=sds.NoiseLadder([0.7, 0.2, 0.4]), process=PROCESS),
        lambda t, sigma: own(t),
    ),
    "importance": (
        sds.DenoisingScoreMatching("likelihood", law=sds.LogNormalNoise(), importance=True, process=PROCESS),
        lambda t, sigma: (
            PROCESS.squared_diffusion(t)
            / (PROCESS.t_max - PROCESS.t_min)
            / sds.LogNormalNoise().density(t, PROCESS, PROCESS.t_min, PROCESS.t_max)
        ),
    ),
}


@pytest.mark.parametrize(("objective", "weight"), WEIGHTS.values(), ids=WEIGHTS.keys())
def test_denoising_is_its_formula(objective, weight):
    t, z, x, sigma = drawn(objective)
    expected = weight(t, sigma) * (score_3d(x, t) + z / sigma[:, None]).square().mean(1)
    torch.testing.assert_close(objective.per_sample(score_3d, X0, seed=5, first_sample=7), expected)


def test_edm_weighting_is_the_unit_weight_of_the_edm_network():
    score = sds.NetworkScore(lambda x, t: torch.sin(x), PROCESS, "edm", 0.6)
    simple, edm = (sds.DenoisingScoreMatching(w).per_sample(score, X0, seed=1) for w in ("simple", "edm"))
    torch.testing.assert_close(edm, simple)


@pytest.mark.parametrize("process", [sds.VP(), sds.VE(), sds.EDM(), sds.SubVP()], ids=lambda p: type(p).__name__)
@pytest.mark.parametrize("law", [sds.UniformTime(), sds.LogNormalNoise(0.3, 1.1), sds.UniformLogSNR()], ids=repr)
def test_densities_are_those_of_the_quantiles(law, process):
    u = torch.linspace(0.05, 0.95, 19, dtype=torch.float64)
    t_min, t_max, step = 0.02, 0.9 * process.t_max, 1e-2
    low, high = (law.quantile(u + e, process, t_min, t_max) for e in (-step, step))
    # The mass between two quantiles, by Simpson's rule over 200 pieces.
    s = torch.linspace(0, 1, 401, dtype=torch.float64)[:, None]
    weights = torch.tensor([1.0] + [4.0, 2.0] * 199 + [4.0, 1.0], dtype=torch.float64)[:, None] / 1200
    mass = (weights * law.density(low + (high - low) * s, process, t_min, t_max)).sum(0) * (high - low)
    # `LogNormalNoise` inverts its law from a table of 1025 nodes.
    torch.testing.assert_close(mass, torch.full_like(u, 2 * step), rtol=2e-3, atol=0)


def test_importance_sampling_makes_the_likelihood_weight_constant():
    arguments = {"process": PROCESS, "law": sds.UniformLogSNR()}
    plain = sds.DenoisingScoreMatching("sigma2", **arguments).per_sample(score_3d, X0, seed=5)
    ours = sds.DenoisingScoreMatching("likelihood", importance=True, **arguments).per_sample(score_3d, X0, seed=5)
    span = float(PROCESS.log_snr(PROCESS.t_min) - PROCESS.log_snr(PROCESS.t_max))
    torch.testing.assert_close(ours / plain, torch.full_like(plain, span / (PROCESS.t_max - PROCESS.t_min)))


def test_a_ladder_takes_all_its_levels_alike():
    levels = [0.7, 0.1, 0.4, 0.2]
    loss = sds.DenoisingScoreMatching(law=sds.NoiseLadder(levels), times="stratified", process=PROCESS)
    t = loss.times(score_3d, torch.zeros(64, 1, dtype=torch.float64), seed=0)
    assert t.sort().values.tolist() == sorted(levels * 16)


NOISE = sds.TrainingTimes(PROCESS, t_min=0.1)


@pytest.mark.parametrize("weight", [None, own])
@pytest.mark.parametrize("noise", [None, NOISE], ids=["clean", "noised"])
@pytest.mark.parametrize("law", [ExactTrace(), Hutchinson(3, "gaussian"), HutchPP(2, 1)], ids=repr)
def test_implicit_and_sliced_are_their_formulas(law, noise, weight):
    if noise is None and weight is not None:
        with pytest.raises(ValueError, match="give noise=TrainingTimes"):
            sds.ImplicitScoreMatching(law, weight=weight)
        return
    objective = sds.ImplicitScoreMatching(law, noise=noise, weight=weight)
    t, _, x, sigma = drawn(objective)
    x, scale = (X0, torch.ones_like(t)) if noise is None else (x, sigma**2 if weight is None else own(t))
    x = x.clone().requires_grad_()
    s, v = score_3d(x, t), law.probes(X0, seed=5, first_path=7)
    div = law(s, x, v).mean(1)
    ours = objective.per_sample(score_3d, X0, seed=5, first_sample=7)
    torch.testing.assert_close(ours, scale * (s.square().sum(1) + 2 * div) / 3)
    if isinstance(law, Hutchinson):
        reduced, plain = (
            sds.SlicedScoreMatching(3, "gaussian", variance_reduced=r, noise=noise, weight=weight).per_sample(
                score_3d, X0, seed=5, first_sample=7
            )
            for r in (True, False)
        )
        torch.testing.assert_close(reduced, ours)
        torch.testing.assert_close(plain, scale * ((v * s).sum(2).square().mean(0) + 2 * div) / 3)


def test_explicit_is_its_formula():
    objective = sds.ExplicitScoreMatching(X0, NOISE)
    t, _, x, sigma = drawn(objective)
    target = parzen(x, X0, PROCESS.alpha(t), sigma).score
    expected = sigma**2 * (score_3d(x, t) - target).square().mean(1)
    torch.testing.assert_close(objective.per_sample(score_3d, X0, seed=5, first_sample=7), expected)


CHAIN = sds.DDPM.linear(16, 0.3, 9.0)


def test_chain_objectives_are_their_formulas():
    net = torch.nn.Linear(3, 3).double()
    score = sds.ChainScore(lambda x, k: net(x) + k[:, None], CHAIN)
    simple, bound = sds.SimpleChainLoss(CHAIN, "stratified"), sds.ChainBound(CHAIN, "large")
    k = simple.times(score, X0, seed=5, first_sample=32)
    assert sorted(k.tolist()) == sorted([*range(1, 17)] * 2)  # stratified: every step as often
    assert torch.equal(bound.times(score, X0, seed=5, first_sample=32), k)
    z = normal(32, 3, seed=5, stream=Stream.PERTURBATION, first_path=32, dtype=torch.float64)
    mean, std = CHAIN.marginal(X0, k.long())
    x = mean + std * z
    expected = (net(x) + k[:, None] - z).square().mean(1)
    torch.testing.assert_close(simple.per_sample(score, X0, seed=5, first_sample=32), expected)
    terms = step_term(CHAIN, score, X0, x, k.long(), variance="large", bits=None)
    expected = (16 * terms + prior_term(CHAIN, X0)) / 3
    torch.testing.assert_close(bound.per_sample(score, X0, seed=5, first_sample=32), expected)


def objectives():
    return [
        sds.DenoisingScoreMatching("likelihood", "stratified", process=PROCESS),
        sds.DenoisingScoreMatching("edm", law=sds.UniformLogSNR(), importance=True, process=PROCESS),
        sds.ImplicitScoreMatching(),
        sds.ImplicitScoreMatching(Hutchinson(2), noise=NOISE),
        sds.SlicedScoreMatching(2, variance_reduced=False),
        sds.ExplicitScoreMatching(X0, NOISE),
        sds.SimpleChainLoss(CHAIN),
        sds.ChainBound(CHAIN),
    ]


class Trained(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3)).double()

    def forward(self, x, t):
        return self.net(x) - x


@pytest.mark.parametrize("objective", objectives(), ids=lambda o: type(o).__name__)
def test_the_mean_and_its_gradient_are_those_of_the_samples(objective):
    score, gradients = Trained(), []
    for loss in (objective(score, X0, seed=3), objective.per_sample(score, X0, seed=3).mean()):
        gradients.append((loss, *torch.autograd.grad(loss, list(score.parameters()), materialize_grads=True)))
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)
    assert sum(float(g.abs().max()) > 0 for g in gradients[0][1:]) >= 3  # a divergence does not see the last bias
    halves = [objective(score, X0[k : k + 16], seed=3, first_sample=k) for k in (0, 16)]
    torch.testing.assert_close(sum(halves) / 2, gradients[0][0])
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            torch.testing.assert_close(objective(score, X0, seed=3), gradients[0][0].detach())


@pytest.mark.parametrize("objective", objectives(), ids=lambda o: type(o).__name__)
def test_training_lowers_every_objective(objective):
    score = Trained()
    before = float(objective(score, X0, seed=11).detach())
    result = sds.train(
        score, X0, loss=objective, steps=60, batch_size=32, lr=1e-2, warmup=0, ema=0.0, clip=None, progress=False
    )
    assert bool(result.losses.isfinite().all())
    assert float(objective(score, X0, seed=11).detach()) < before
    assert "0x" not in repr(objective)  # a checkpoint is resumed under the same text


class Power:
    def __call__(self, t, power=1.0):
        return t**power


@pytest.mark.parametrize(
    "make",
    [
        lambda weight: sds.DenoisingScoreMatching(weight, process=PROCESS),
        lambda weight: sds.ImplicitScoreMatching(noise=NOISE, weight=weight),
        lambda weight: sds.ChainBound(CHAIN, variance=weight),
    ],
)
def test_the_text_of_an_objective_is_the_same_in_every_process(make):
    for weight in (Power(), functools.partial(Power(), power=2.0)):
        assert repr(make(weight)).count("Power") == 1
        assert "0x" not in repr(make(weight))
    assert repr(make(functools.partial(Power(), power=2.0))) != repr(make(functools.partial(Power(), power=3.0)))


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (sds.SimpleChainLoss(sds.DDPM.linear(100)), sds.SimpleChainLoss(sds.DDPM.cosine(100))),
        (sds.ChainBound(sds.SMLD.geometric(20)), sds.ChainBound(sds.SMLD.geometric(20, sigma_max=30.0))),
        (sds.DenoisingScoreMatching(process=sds.VP()), sds.DenoisingScoreMatching(process=sds.VP(sds.CosineBeta()))),
        (
            sds.SlicedScoreMatching(noise=sds.TrainingTimes(sds.EDM())),
            sds.SlicedScoreMatching(noise=sds.TrainingTimes(sds.EDM(sigma_max=10.0))),
        ),
    ],
)
def test_the_text_of_an_objective_tells_schedules_apart(one, other):
    assert repr(one) != repr(other)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: sds.SimpleChainLoss(CHAIN)(sds.NetworkScore(lambda x, t: x, sds.VP()), X0, seed=0),
            TypeError,
            "Steps of a chain are for a ChainScore",
        ),
        (lambda: sds.NoiseLadder([]), ValueError, "a ladder needs positive finite times"),
        (lambda: sds.NoiseLadder([0.1, -1.0]), ValueError, "a ladder needs positive finite times"),
        (lambda: sds.DenoisingScoreMatching(law=sds.NoiseLadder([2.0]), process=PROCESS)(score_3d, X0, seed=0),
         ValueError, "the ladder goes up to t = 2.0 and VP ends at 1.0"),
        (lambda: sds.DenoisingScoreMatching(law=sds.NoiseLadder([0.2]), importance=True, process=PROCESS)(
            score_3d, X0, seed=0), ValueError, "a ladder of times has no density"),
        (lambda: sds.DenoisingScoreMatching("edm", sigma_data=0.0), ValueError, "sigma_data must be positive"),
        (lambda: sds.DenoisingScoreMatching(lambda t: 1.0, process=PROCESS)(score_3d, X0, seed=0),
         ValueError, "one weight for each time"),
        (lambda: sds.ImplicitScoreMatching("exact"), TypeError, "divergence must be ExactTrace"),
        (lambda: sds.ImplicitScoreMatching(noise=PROCESS), TypeError, "noise must be TrainingTimes"),
        (lambda: sds.ImplicitScoreMatching()(lambda x, t: x[:, :1], X0, seed=0), ValueError, "shape of the state"),
        (lambda: sds.ImplicitScoreMatching()(score_3d, X0.long(), seed=0), TypeError, "float32 or float64"),
        (lambda: sds.SlicedScoreMatching(0), ValueError, "probes must be at least 1"),
        (lambda: sds.ExplicitScoreMatching(X0[:0], NOISE), ValueError, "at least one sample"),
        (lambda: sds.ExplicitScoreMatching(X0, None), TypeError, "which says how wide the kernels are"),
        (lambda: sds.ExplicitScoreMatching(X0, NOISE)(lambda x, t: x, X0[:, :1], seed=0), ValueError, "not from data"),
        (lambda: sds.PlainScore(3), TypeError, "net must be a function"),
        (lambda: sds.SimpleChainLoss(PROCESS), TypeError, "chain must be a DDPM or SMLD"),
        (lambda: sds.ChainBound(CHAIN, times="sobol"), ValueError, "times='sobol' is unknown"),
    ],
)  # fmt: skip
def test_bad_input_is_refused(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_the_slope_of_the_log_snr_is_its_derivative():
    t = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(PROCESS.log_snr(t).sum(), t)
    torch.testing.assert_close(log_snr_slope(PROCESS, t.detach()), -slope)


def test_a_plain_score_does_not_look_at_the_time():
    score = sds.PlainScore(lambda x: 2 * x)
    assert torch.equal(score(X0, torch.zeros(32)), 2 * X0)
