"""Derivatives of expectations, laws of one Euler step and pseudo-likelihoods, against closed forms."""

from __future__ import annotations

import math

import pytest
import torch

import sdesolve as sds

DOUBLE = torch.float64
EM = sds.EulerMaruyama()
RATE, VOLATILITY, PRICE, STRIKE = 0.03, 0.2, 100.0, 110.0
MATRIX = torch.tensor([[0.5, 0.2], [0.1, 0.6]], dtype=DOUBLE)
EAGER = {"solver": EM, "seed": 1, "backend": "eager"}


def leaf(value):
    return torch.tensor(value, dtype=DOUBLE, requires_grad=True)


def near(found, error, exact, bias=0.0):
    return abs(float(found) - exact) < 4.5 * float(error) + bias


@pytest.mark.uncompiled
def test_greeks_of_a_call_and_of_a_digital():
    """P23: price 5.2933981, delta .4103865, vega 38.8834612; digital delta .0176743, smoothed over the last step."""
    price, volatility, discount = leaf(PRICE), leaf(VOLATILITY), math.exp(-RATE)
    sde = sds.SDE(lambda x, t: RATE * x, lambda x, t: volatility * x)
    x0 = price.expand(4000, 1)
    call = sds.sensitivity(
        sde, x0, 0.0, 1.0, 25, payoff=lambda x: discount * torch.relu(x[:, 0] - STRIKE), wrt=(price, volatility),
        solver=EM, seed=1,
    )  # fmt: skip
    assert call.execution == "fused"
    for found, error, exact in zip(
        (call.value, *call.gradient), (call.value_error, *call.gradient_error),
        (5.293398058, 0.4103864882, 38.88346118), strict=True,
    ):  # fmt: skip
        assert near(found, error, exact, 0.01 * exact)  # Euler's bias at 25 steps
        assert float(error) < 0.1 * exact

    def digital(x):
        return discount * sds.euler_law(sde, x, 0.96, 1.0).above(STRIKE)[:, 0]

    delta = sds.sensitivity(sde, x0, 0.0, 0.96, 24, payoff=digital, wrt={"price": price}, **EAGER)
    assert near(delta.gradient["price"], delta.gradient_error["price"], 0.01767430054, 2e-4)
    assert float(delta.gradient_error["price"]) < 0.1 * 0.0177


def test_likelihood_ratio_of_a_payoff_that_jumps():
    """``d/d theta P(X > 1/2)`` of Euler's own chain, whose law is normal; pathwise agrees where there is no jump."""
    theta, n, T = leaf(0.8), 16, 1.5
    sde = sds.SDE(lambda x, t: -theta * x, lambda x, t: 0.5 * torch.ones_like(x), "additive")

    def exact(theta):
        h, mean, variance = T / n, torch.tensor(2.0, dtype=DOUBLE), 0.0
        for _ in range(n):
            mean, variance = (1 - theta * h) * mean, (1 - theta * h) ** 2 * variance + 0.25 * h
        return torch.special.ndtr((mean - 0.5) / variance**0.5), mean**2 + variance

    jump, square = exact(theta)
    x0, options = torch.full((8000, 1), 2.0, dtype=DOUBLE), {"wrt": theta, **EAGER}
    found = sds.sensitivity(
        sde, x0, 0.0, T, n, payoff=lambda x: (x[:, 0] > 0.5).double(), method="likelihood-ratio", **options
    )
    (slope,) = torch.autograd.grad(jump, theta, retain_graph=True)
    assert near(found.value, found.value_error, float(jump.detach()))
    assert near(found.gradient, found.gradient_error, float(slope))
    (slope,) = torch.autograd.grad(square, theta)
    for method in ("pathwise", "likelihood-ratio"):
        found = sds.sensitivity(sde, x0, 0.0, T, n, payoff=lambda x: x[:, 0] ** 2, method=method, **options)
        assert near(found.gradient, found.gradient_error, float(slope)), method
        assert float(found.gradient_error) < 0.1 * abs(float(slope))


def test_groups_share_paths_with_one_run_and_parameters_with_rows():
    rows = torch.linspace(0.5, 1.0, 40, dtype=DOUBLE)[:, None]
    common = leaf(0.7)
    sde = sds.SDE(lambda x, t, p: -p[0] * p[1] * x, lambda x, t, p: 0.3 * torch.ones_like(x))
    x0, params = torch.ones(40, 1, dtype=DOUBLE), (common, rows)
    found = sds.sensitivity(
        sde, x0, 0.0, 1.0, 5, payoff=lambda x: x[:, 0].sin(), wrt=common, params=params, groups=7, **EAGER
    )
    whole = sds.solve(sde, x0, 0.0, 1.0, 5, params=params, **EAGER).x1[:, 0].sin().mean()
    (gradient,) = torch.autograd.grad(whole, common)
    assert torch.allclose(found.value, whole.detach(), rtol=1e-12)
    assert torch.allclose(found.gradient, gradient, rtol=1e-12)


def test_what_has_no_derivative_is_refused():
    theta, scale = leaf(0.8), leaf(0.5)
    sde = sds.SDE(lambda x, t: -theta * x, lambda x, t: scale * torch.ones_like(x), "additive")
    x0 = torch.ones(64, 1, dtype=DOUBLE)

    def sensitivity(wrt, payoff=lambda x: x[:, 0], x0=x0, **options):
        return sds.sensitivity(sde, x0, 0.0, 1.0, 4, payoff=payoff, wrt=wrt, **{**EAGER, **options})

    with pytest.raises(ValueError, match=r"no derivative in wrt: where it jumps, take sds\.euler_law"):
        sensitivity(theta, lambda x: (x[:, 0] > 0).double())
    with pytest.raises(ValueError, match="the diffusion depends on wrt, and a likelihood ratio is of the drift alone"):
        sensitivity((theta, scale), method="likelihood-ratio")
    with pytest.raises(ValueError, match="x0 depends on wrt"):
        sensitivity(theta, x0=theta * x0, method="likelihood-ratio")
    with pytest.raises(ValueError, match=r"a number for each path, \(4,\), got shape \(4, 1\)"):
        sensitivity(theta, lambda x: x)
    with pytest.raises(TypeError, match="each needs requires_grad=True"):
        sensitivity(x0)
    with pytest.raises(ValueError, match="3 rows, too few for 16 groups"):
        sensitivity(theta, x0=x0[:3])
    with pytest.raises(ValueError, match="method must be 'pathwise'"):
        sensitivity(theta, method="vibrato")


def test_the_law_of_a_step():
    """Against quadrature, in both directions of time, with noise that is zero, and in Stratonovich calculus."""
    sde = sds.SDE(lambda x, t: torch.sin(x) + t, lambda x, t: 0.3 * x)
    x = torch.tensor([[1.0], [-0.5], [0.0]], dtype=DOUBLE)
    law = sds.euler_law(sde, x, 0.5, 0.25)
    assert torch.allclose(law.mean, x - 0.25 * (torch.sin(x) + 0.5))
    assert torch.allclose(law.std, 0.15 * x.abs())
    level = law.mean[1].item() + 0.01
    z = torch.linspace(-8, 8, 40001, dtype=DOUBLE)
    draws, weight = law.mean + law.std * z, torch.exp(-0.5 * z.square()) * float(z[1] - z[0]) / math.sqrt(2 * math.pi)
    assert torch.allclose(law.above(level)[:, 0], ((draws > level) * weight).sum(1), atol=2e-4)
    assert torch.allclose(law.excess(level)[:, 0], (torch.relu(draws - level) * weight).sum(1), atol=1e-7)
    assert torch.allclose(law.expectation(torch.sin), law.mean.sin() * torch.exp(-0.5 * law.std.square()), rtol=1e-12)
    other = sds.SDE(lambda x, t: torch.sin(x) + t, lambda x, t: 0.3 * x, calculus="stratonovich")
    assert torch.allclose(sds.euler_law(other, x, 0.5, 0.75).mean, x + 0.25 * (torch.sin(x) + 0.5 + 0.045 * x))
    general = sds.SDE(lambda x, t: 0 * x, lambda x, t: MATRIX[None], "general")
    assert torch.allclose(sds.euler_law(general, torch.zeros(3, 2, dtype=DOUBLE), 0.0, 4.0).std,
                          2 * MATRIX.square().sum(1).sqrt().expand(3, 2))  # fmt: skip


def irregular(count):
    gaps = torch.rand(count - 1, generator=torch.Generator().manual_seed(0), dtype=DOUBLE) * 0.05 + 0.005
    return torch.cat([torch.zeros(1, dtype=DOUBLE), gaps.cumsum(0)])


REVERTING = sds.SDE(lambda x, t, p: p[0] * (p[1] - x), lambda x, t, p: p[2] * torch.ones_like(x))


def test_a_fit_finds_the_parameters_within_its_standard_errors():
    truth, times = torch.tensor([1.2, 0.4, 0.5], dtype=DOUBLE), irregular(401)
    x0 = torch.zeros(8, 1, dtype=DOUBLE)
    paths = sds.solve(REVERTING, x0, grid=times, params=truth, save_at="grid", **EAGER).xs

    def total(p):
        return sds.pseudo_log_likelihood(REVERTING, times, paths, params=p).sum()

    p = torch.tensor([0.5, 0.0, 1.0], dtype=DOUBLE, requires_grad=True)
    optimiser = torch.optim.LBFGS([p], max_iter=60, line_search_fn="strong_wolfe")

    def loss():
        optimiser.zero_grad()
        value = -total(p)
        value.backward()
        return value

    optimiser.step(loss)
    information = -torch.autograd.functional.hessian(total, p.detach())
    errors = torch.linalg.inv(information).diagonal().sqrt()
    assert ((p.detach() - truth).abs() < 4 * errors).all()
    assert (errors < torch.tensor([0.3, 0.15, 0.02])).all()


def test_pseudo_likelihoods_of_every_noise_and_of_paths_with_times_of_their_own():
    times = irregular(20)
    general = sds.SDE(lambda x, t: -x * t, lambda x, t: MATRIX[None] * (1 + 0.1 * x.sin()).unsqueeze(-1), "general")
    y = sds.solve(general, torch.zeros(5, 2, dtype=DOUBLE), grid=times, save_at="grid", **EAGER).xs
    found, by_hand = sds.pseudo_log_likelihood(general, times, y), torch.zeros(5, dtype=DOUBLE)
    for x, x_next, t, h in zip(y[:-1], y[1:], times[:-1], times.diff(), strict=True):
        g = MATRIX * (1 + 0.1 * x.sin()).unsqueeze(-1)
        by_hand += torch.distributions.MultivariateNormal(x - x * t * h, g @ g.mT * h).log_prob(x_next)
    assert torch.allclose(found, by_hand, rtol=1e-12)
    assert torch.allclose(sds.pseudo_log_likelihood(general, times.flip(0), y.flip(0)).exp(), torch.tensor(
        [math.exp(float(sds.pseudo_log_likelihood(general, times.flip(0), y.flip(0)[:, i : i + 1]))) for i in range(5)],
        dtype=DOUBLE))  # fmt: skip
    own = torch.stack([times, times + 0.1], 1)
    own[15:, 1] = own[15, 1]
    two = y[:, :2].clone()
    two[15:, 1] = two[15, 1]
    both = sds.pseudo_log_likelihood(general, own, two)
    assert torch.allclose(both[:1], found[:1], rtol=1e-12)
    assert torch.allclose(both[1:], sds.pseudo_log_likelihood(general, own[:16, 1], two[:16, 1:]), rtol=1e-12)
    rows = torch.tensor([[1.0], [2.0]], dtype=DOUBLE)
    scaled = sds.SDE(lambda x, t, p: -p * x, lambda x, t, p: p * torch.ones_like(x))
    one = sds.SDE(lambda x, t: -2.0 * x, lambda x, t: 2.0)
    each = sds.pseudo_log_likelihood(scaled, times, y[:, :2, :1], params=rows)
    assert torch.allclose(each[1:], sds.pseudo_log_likelihood(one, times, y[:, 1:2, :1]), rtol=1e-12)


def test_paths_without_a_density_are_refused():
    times, y = irregular(4), torch.ones(4, 3, 2, dtype=DOUBLE)
    for diffusion, noise in ((lambda x, t: MATRIX[None, :, :1], "general"), (lambda x, t: 0.1 * x, "scalar")):
        with pytest.raises(ValueError, match="fewer Brownian motions than the 2 entries"):
            sds.pseudo_log_likelihood(sds.SDE(lambda x, t: -x, diffusion, noise), times, y)
    singular = sds.SDE(lambda x, t: -x, lambda x, t: torch.ones_like(MATRIX)[None], "general")
    for sde in (singular, sds.SDE(lambda x, t: -x, lambda x, t: x - 1.0)):
        with pytest.raises(ValueError, match="transition of path 0 from t = 0 has no density"):
            sds.pseudo_log_likelihood(sde, times, y)
    with pytest.raises(ValueError, match=r"got \(4,\) and \(3, 3, 2\)"):
        sds.pseudo_log_likelihood(singular, times, y[:3])
    with pytest.raises(ValueError, match="an Euler step has a law where there is a diffusion"):
        sds.euler_law(sds.ODE(lambda x, t: -x), y[0], 0.0, 1.0)
