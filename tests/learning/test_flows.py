"""Flows and bridges between two laws: closed forms, equations, pairs, objectives, and Schroedinger bridges."""

from __future__ import annotations

import functools
import itertools
import math

import pytest
import sdesolve_kernels
import torch

import sdesolve as sds
from sdesolve.flows.pairing import entropic_plan, optimal

A = sds.GaussianMixture([[-2.0, 0.0], [0.0, 2.0]], [0.3, 0.6], weights=[0.3, 0.7])
B = sds.GaussianMixture(
    torch.tensor([[2.0, 1.0], [1.0, -2.0]]), covs=torch.tensor([[[0.5, 0.3], [0.3, 0.4]], [[0.2, 0.0], [0.0, 0.1]]])
)


def double(*values):
    return torch.tensor(values, dtype=torch.float64)


def sine(t):
    return (math.pi * t).sin()


INTERPOLANTS = {
    "bridge": sds.StochasticInterpolant(0.8),
    "no noise": sds.StochasticInterpolant(0.0),
    "curved": sds.StochasticInterpolant(
        alpha=lambda t: (0.5 * math.pi * t).cos(),
        beta=lambda t: (0.5 * math.pi * t).sin(),
        gamma=lambda t: sine(t) ** 2,
    ),
}
X = torch.randn(9, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize("kind", INTERPOLANTS)
def test_closed_forms_between_mixtures(kind):
    exact = sds.ExactInterpolant(INTERPOLANTS[kind], A, B)
    for law, end in ((A, 0.0), (B, 1.0)):
        torch.testing.assert_close(exact.log_prob(X, end), law.log_prob(X))
    for t, h in itertools.product((0.2, 0.7), (1e-5,)):
        x = X.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(exact.log_prob(x, t).sum(), x)
        torch.testing.assert_close(exact.score(X, t), gradient)
        # The continuity equation: d log p / dt = -div b - b . score.
        b = torch.autograd.functional.jacobian(lambda y, t=t: exact.velocity(y, t).sum(0), X)
        rate = (exact.log_prob(X, t + h) - exact.log_prob(X, t - h)) / (2 * h)
        flux = b[0, :, 0] + b[1, :, 1] + (exact.velocity(X, t) * exact.score(X, t)).sum(1)
        torch.testing.assert_close(rate, -flux, rtol=1e-5, atol=1e-6)
    each = torch.linspace(0.1, 0.9, 9, dtype=torch.float64)
    rows = [exact.velocity(X[i : i + 1], float(each[i])) for i in range(9)]
    torch.testing.assert_close(exact.velocity(X, each), torch.cat(rows))
    assert exact.score(X.float(), 0.5).dtype is torch.float32


def test_a_source_of_normal_noise_is_the_rectified_process():
    normal, process = sds.Gaussian(torch.zeros(2), 1.0), sds.Rectified(data_at=1)
    exact = sds.ExactInterpolant(INTERPOLANTS["no noise"], normal, B)
    score, t = sds.NetworkScore(exact.velocity, process, "flow"), double(0.3)[0]
    torch.testing.assert_close(score(X, t), B.score(process)(X, t))
    torch.testing.assert_close(score(X, t), exact.score(X, 1 - t))
    torch.testing.assert_close(exact.ends(X, 1 - t)[1], B.score(process).denoise(X, t))


N = 2000


@pytest.mark.parametrize("direction", [1, -1])
@pytest.mark.parametrize("eps", [0.6, lambda t: 1.5 * sine(t)], ids=["constant", "of time"])
def test_sdes_of_any_stochasticity_have_the_marginals(eps, direction):
    """Of the flow between two Gaussians: the chain is affine, so that its moments are exact."""
    a, b = sds.Gaussian(double(0.5, -1.0), double(1.0, 0.2)), sds.Gaussian(double(-1.0, 2.0), double(0.3, 0.8))
    exact = sds.ExactInterpolant(sds.StochasticInterpolant(0.7), a, b)
    start, end = (a, b) if direction > 0 else (b, a)
    times = torch.linspace(0, 1, 51, dtype=torch.float64)
    sde, grid = sds.FlowSDE(exact, eps), times if direction > 0 else times.flip(0)
    chain = sds.oracle.chain_moments(sde, sds.Heun(), grid, start.mean, torch.diag(start.cov))
    torch.testing.assert_close(chain.mean, end.mean, rtol=0, atol=4e-3)
    torch.testing.assert_close(chain.cov, torch.diag(end.cov), rtol=0, atol=6e-3)


def test_solve_knows_the_direction_and_a_run_may_start_in_noise():
    exact = sds.ExactInterpolant(INTERPOLANTS["bridge"], A, B)
    there = sds.solve(sds.FlowSDE(exact, 1.0), A.sample(N, seed=0), 0.0, 1.0, steps=30, solver=sds.Heun(), seed=1).x1
    back = sds.solve(sds.FlowSDE(exact, 1.0), B.sample(N, seed=0), 1.0, 0.0, steps=30, solver=sds.Heun(), seed=2).x1
    for made, law in ((there, B), (back, A)):
        spread = law.sample(N, seed=7).std(0) / N**0.5
        assert float(((made.mean(0) - law.weights.float() @ law.means.float()) / spread).abs().max()) < 4.5
    process = sds.Rectified(t_max=1.0)  # where the rates of the reverse SDE have no bound
    velocity = sds.ExactInterpolant(INTERPOLANTS["no noise"], sds.Gaussian(torch.zeros(2), 1.0), B).velocity
    score = sds.NetworkScore(lambda x, t: -velocity(x, 1 - t), process, "flow")
    z = torch.randn(N, 2, generator=torch.Generator().manual_seed(3))
    x = sds.solve(sds.FlowSDE(score, lambda t: t), z, 1.0, 0.0, steps=40, solver=sds.EulerMaruyama(), seed=4).x1
    spread = B.sample(N, seed=7).std(0) / N**0.5
    assert float(((x.mean(0) - B.means.float().mean(0)) / spread).abs().max()) < 4.5 + 20 / 40


def test_gaussian_bridges():
    a, b = (
        sds.Gaussian(double(-1.0, 0.0), double(1.0, 0.4)),
        sds.Gaussian(double(1.0, 2.0), torch.tensor([[0.3, -0.1], [-0.1, 0.2]])),
    )
    bridge = sds.gaussian_bridge(a, b, 0.8)
    # The entropic plan is normal, with density proportional to f(x) g(y) exp(x . y / noise^2): that is its precision.
    cov = torch.cat([torch.cat([torch.diag(a.cov), bridge.cross], 1), torch.cat([bridge.cross.mT, b.cov], 1)])
    torch.testing.assert_close(torch.linalg.inv(cov)[:2, 2:], -torch.eye(2, dtype=torch.float64) / 0.8**2)
    # It is Markov: what the SDE makes of the source has that very covariance with where it began.
    start = torch.stack([a.mean, a.mean + double(1.0, 0.0)])
    quiet = sds.FlowSDE(bridge, lambda t: torch.full_like(t, 0.8))
    ends = sds.solve(sds.ODE(quiet.drift), start, 0.0, 1.0, steps=200, solver=sds.Heun()).x1  # affine: the mean
    torch.testing.assert_close(ends[1] - ends[0], bridge.cross[0] / a.cov[0], rtol=0, atol=2e-3)


def test_pairs():
    g = torch.Generator().manual_seed(0)
    x0, x1 = torch.randn(7, 2, generator=g), torch.randn(7, 2, generator=g) + 3
    cost = torch.cdist(x1, x0).square()
    best = min(sum(float(cost[i, p[i]]) for i in range(7)) for p in itertools.permutations(range(7)))
    assert float(cost[torch.arange(7), optimal(x0, x1)].sum()) == pytest.approx(best, rel=1e-6)
    plan = entropic_plan(x0, x1, 1.5)
    torch.testing.assert_close(plan.sum(1), torch.full((7,), 1 / 7, dtype=torch.float64), rtol=1e-3, atol=0)
    torch.testing.assert_close(plan.sum(0), torch.full((7,), 1 / 7, dtype=torch.float64))
    scaled = plan.log() + torch.cdist(x0.double(), x1.double()).square() / (2 * 1.5**2)  # f_i + g_j
    torch.testing.assert_close(scaled - scaled[:1] - scaled[:, :1] + scaled[0, 0], torch.zeros_like(scaled))


def nets(x, t):
    return 0.3 * x + t[:, None], -0.2 * x


@pytest.mark.parametrize("pairing", ["independent", "optimal", "entropic", "given"])
def test_the_objective_is_the_regression(pairing):
    model = sds.FlowModel(lambda x, t: nets(x, t)[0], INTERPOLANTS["bridge"], lambda x, t: nets(x, t)[1])
    source, target = A.sample(50, seed=0), B.sample(40, seed=0)
    data = torch.stack([source[:40], target], 1) if pairing == "given" else target
    loss = sds.FlowMatching(None if pairing == "given" else source, pairing)
    values = loss.per_sample(model, data, seed=3, first_sample=5)
    t = loss.times(model, data, seed=3, first_sample=5)
    z = sdesolve_kernels.normal(40, 2, seed=3, stream=sdesolve_kernels.Stream.PERTURBATION, first_path=5)
    # Which source went with each target is told by the loss: exactly one row, a row of the source, explains it.
    c = INTERPOLANTS["bridge"].coefficients(t)
    alpha, beta, gamma = (k[:, None] for k in c[:3])
    explained = []
    for row in source:
        v, e = nets(alpha * row + beta * target + gamma * z, t)
        by_hand = (v - (target - row)).square().mean(1) + (e - z).square().mean(1)
        explained.append((by_hand - values).abs() < 1e-5 * by_hand)
    found = torch.stack(explained)
    assert bool(found.any(0).all())
    rows = found.int().argmax(0)
    if pairing == "given":
        assert torch.equal(rows, torch.arange(40))
    if pairing == "independent":  # a function of the sample's number alone
        torch.testing.assert_close(loss.per_sample(model, target[10:], seed=3, first_sample=15), values[10:])
    distances = {p: _cost(p, model, source, target) for p in ("independent", "optimal", "entropic")}
    assert distances["optimal"] < distances["entropic"] < distances["independent"]


@functools.cache
def _cost(pairing, model, source, target):
    start, end = sds.FlowMatching(source, pairing)._ends(model, target, 3, 5)
    return float((end - start).square().sum())


def test_flow_matching_of_noise_is_that_of_the_score():
    net = torch.nn.Linear(2, 2)
    score = sds.NetworkScore(lambda x, t: net(x), sds.Rectified(data_at=1), "flow")
    x = B.sample(30, seed=0)
    expected = sds.DenoisingScoreMatching("simple").per_sample(score, x, seed=2)
    assert torch.equal(sds.FlowMatching().per_sample(score, x, seed=2), expected)


class Affine(torch.nn.Module):
    """``(p(t) + q(t) x) r(t)`` for polynomials ``p`` and ``q``; of latent noise with ``r = sqrt(t (1 - t))``."""

    def __init__(self, *, latent, degree=4):
        super().__init__()
        self.c, self.latent = torch.nn.Parameter(torch.zeros(2, degree + 1)), latent

    def forward(self, x, t):
        powers = torch.special.chebyshev_polynomial_t(2 * t - 1, torch.arange(self.c.shape[1])[:, None])
        p, q = self.c @ powers * ((t * (1 - t)).sqrt() if self.latent else 1.0)
        return p[:, None] + q[:, None] * x


def test_a_trained_bridge_is_the_schroedinger_bridge(tmp_path):
    a, b, noise = sds.Gaussian(double(-1.0), double(1.0)), sds.Gaussian(double(1.0), double(0.25)), 0.7
    model = sds.FlowModel(Affine(latent=False), sds.StochasticInterpolant(noise), Affine(latent=True))
    options = {"steps": 150, "batch_size": 1000, "lr": 0.2, "decay": "cosine", "warmup": 10, "ema": 0.9}
    results = sds.fit_bridge(model, a.sample(2000, seed=0), b.sample(2000, seed=1), rounds=4, solver_steps=16,
                             progress=False, seed=2, **options)  # fmt: skip
    assert len(results) == 4
    with torch.no_grad():
        ends = sds.solve(
            sds.FlowSDE(model, noise), a.sample(N, seed=5), 0.0, 1.0, steps=20, solver=sds.Heun(), seed=1
        ).x1
    exact = sds.gaussian_bridge(a, b, noise)
    pairs = torch.cat([a.sample(N, seed=5), ends], 1)
    # Independent ends have covariance 0, and sqrt((c^2 + 0.25) / N) = 0.013 is chance.
    assert float(torch.cov(pairs.T)[0, 1]) == pytest.approx(float(exact.cross), abs=4 * 0.013)
    assert float(exact.cross) > 0.25
    sds.save(model, tmp_path / "bridge.safetensors")
    other = sds.FlowModel(Affine(latent=False), sds.StochasticInterpolant(0.5), Affine(latent=True))
    with pytest.raises(ValueError, match="interpolant"):
        sds.load(other, tmp_path / "bridge.safetensors")


def plain(x, t):
    return x


FLOW = sds.FlowModel(plain, sds.StochasticInterpolant(0.0))
NOISY = sds.FlowModel(plain, sds.StochasticInterpolant(0.5), plain)
REFUSED = {
    "exchanged ends": (
        lambda: sds.StochasticInterpolant(alpha=lambda t: t, beta=lambda t: 1 - t),
        ValueError,
        "exchanged",
    ),
    "open end": (
        lambda: sds.StochasticInterpolant(gamma=lambda t: t),
        ValueError,
        "gamma must go from 0 .* to 0 at t = 1, got 0 and 1",
    ),
    "vanishing": (lambda: sds.StochasticInterpolant(gamma=lambda t: 0 * t), ValueError, "gamma must be positive"),
    "both": (lambda: sds.StochasticInterpolant(1.0, gamma=sine), ValueError, "give it or gamma"),
    "negative": (lambda: sds.StochasticInterpolant(-1.0), ValueError, "not negative"),
    "shape": (lambda: sds.StochasticInterpolant(alpha=lambda t: 1.0), TypeError, "tensor of the shape of t"),
    "t_min": (lambda: sds.StochasticInterpolant(t_min=0.5), ValueError, r"\(0, 1/2\)"),
    "no network of noise": (
        lambda: sds.FlowModel(plain, sds.StochasticInterpolant()),
        ValueError,
        "needs a network of it",
    ),
    "network of noise": (
        lambda: sds.FlowModel(plain, sds.StochasticInterpolant(0.0), plain),
        ValueError,
        "leave out noise=",
    ),
    "process": (lambda: sds.FlowModel(plain, sds.Rectified()), TypeError, "NetworkScore.*'flow'"),
    "model as a score": (lambda: NOISY(X, double(0.5)), TypeError, "is no score"),
    "sample": (lambda: sds.sample(sds.Rectified(), NOISY, (3, 2), steps=2, seed=0), TypeError, "is no score"),
    "denoising": (lambda: sds.DenoisingScoreMatching(process=sds.VP())(NOISY, X, seed=0), TypeError, "is no score"),
    "score of a flow": (
        lambda: sds.solve(sds.FlowSDE(FLOW, 1.0), X, 0.0, 1.0, steps=2, solver=sds.Heun()),
        ValueError,
        "has a flow and no score",
    ),
    "sde of a function": (lambda: sds.FlowSDE(plain, 1.0), TypeError, "flow_and_score"),
    "no stochasticity": (lambda: sds.FlowSDE(NOISY, 0.0), ValueError, "integrate the flow, an ODE"),
    "no source": (lambda: sds.FlowMatching()(NOISY, X, seed=0), ValueError, "needs the source"),
    "another state": (
        lambda: sds.FlowMatching(torch.ones(3, 5))(NOISY, X, seed=0),
        ValueError,
        r"one shape, got \(5,\) and \(2,\)",
    ),
    "empty": (lambda: sds.FlowMatching(torch.ones(0, 2)), ValueError, "no samples"),
    "not finite": (lambda: sds.FlowMatching(X / 0), ValueError, "source holds nan or inf"),
    "list": (lambda: sds.FlowMatching([1.0]), TypeError, "source must be"),
    "no pairs": (lambda: sds.FlowMatching(pairing="given")(NOISY, X[:, :1], seed=0), ValueError, r"pairs \(batch, 2"),
    "source of pairs": (lambda: sds.FlowMatching(X, "given"), ValueError, "leave out source"),
    "pairing": (lambda: sds.FlowMatching(X, "best"), ValueError, "choose one of 'independent', 'optimal'"),
    "entropic flow": (lambda: sds.FlowMatching(X, "entropic")(FLOW, X, seed=0), ValueError, "Brownian bridges"),
    "far": (
        lambda: sds.FlowMatching(X, "entropic")(
            sds.FlowModel(plain, sds.StochasticInterpolant(1e-3), plain), X + 9, seed=0
        ),
        ValueError,
        "did not converge",
    ),
    "noise as flow": (
        lambda: sds.FlowMatching()(sds.NetworkScore(plain, sds.VP()), X, seed=0),
        TypeError,
        "predicts='noise'",
    ),
    "paired noise": (
        lambda: sds.FlowMatching(X, "optimal")(sds.NetworkScore(plain, sds.Rectified(), "flow"), X, seed=0),
        ValueError,
        "StochasticInterpolant",
    ),
    "function": (lambda: sds.FlowMatching(X)(plain, X, seed=0), TypeError, "trains a FlowModel"),
    "law": (lambda: sds.ExactInterpolant(sds.StochasticInterpolant(), A, X), TypeError, "target must be a Gaussian"),
    "laws": (
        lambda: sds.ExactInterpolant(sds.StochasticInterpolant(), A, sds.Gaussian(double(0.0), 1.0)),
        ValueError,
        "states of one shape",
    ),
    "cross": (
        lambda: sds.ExactInterpolant(
            sds.StochasticInterpolant(),
            sds.Gaussian(double(0.0), 1.0),
            sds.Gaussian(double(0.0), 1.0),
            cross=double([2.0]),
        ),
        ValueError,
        "no pair",
    ),
    "bridge of mixtures": (lambda: sds.gaussian_bridge(A, B, 1.0), TypeError, "has no closed form"),
    "singular": (
        lambda: sds.gaussian_bridge(sds.Gaussian(double(0.0), 0.0), sds.Gaussian(double(0.0), 1.0), 1.0),
        ValueError,
        "singular",
    ),
    "rounds": (lambda: sds.fit_bridge(FLOW, X, X, rounds=1, steps=1), ValueError, "Brownian bridges"),
    "first pairs": (
        lambda: sds.fit_bridge(NOISY, X, X, rounds=1, steps=1, pairing="optimal"),
        ValueError,
        "rounds make the other",
    ),
}


def test_a_bridge_takes_its_source_in_the_precision_of_the_target():
    ends = []
    for dtype in (torch.float32, torch.float64):
        torch.manual_seed(0)
        net, noise = sds.nn.MLP(2, width=4, depth=1), sds.nn.MLP(2, width=4, depth=1)
        model = sds.FlowModel(net, sds.StochasticInterpolant(), noise)
        options = {"rounds": 2, "steps": 1, "solver_steps": 2, "batch_size": 4, "progress": False}
        sds.fit_bridge(model, torch.ones(8, 2, dtype=dtype), torch.zeros(8, 2), **options)
        ends.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert torch.equal(*ends)


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused(case):
    call, error, message = REFUSED[case]
    with pytest.raises(error, match=message):
        call()
