"""Energy models against laws whose energy is known: quadratic ones and mixtures."""

from __future__ import annotations

import math

import pytest
import torch
from sdesolve_kernels import normal

import sdesolve as sds


def draws(seed: int, *shape: int) -> torch.Tensor:
    return normal(1, math.prod(shape), seed=seed, stream=213, dtype=torch.float64).reshape(shape)


PROCESS = sds.VP()
LAWS = {
    "quadratic": sds.Gaussian(draws(0, 2, 2), draws(1, 2, 2).exp()),
    "mixture": sds.GaussianMixture(draws(2, 3, 2, 2), 0.5),
}
TIMES = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)


@pytest.mark.parametrize("law", LAWS.values(), ids=LAWS)
@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_the_score_of_an_energy_is_that_of_its_law(law, mode):
    exact = law.score(PROCESS)
    score = sds.EnergyScore(lambda x, t: 7.0 - exact.log_prob(x, t))  # any normaliser
    x = draws(3, 3, 2, 2)
    with mode():
        s = score(x, TIMES)
        inside = score(x + 0.0, TIMES)  # made in the mode
    assert s.requires_grad == (mode is torch.enable_grad)
    torch.testing.assert_close(s.detach(), exact(x, TIMES), rtol=1e-10, atol=1e-12)
    assert torch.equal(inside.detach(), s.detach())


def test_samples_by_the_energy_are_those_by_the_score():
    exact = LAWS["mixture"].score(PROCESS)
    energy = sds.EnergyScore(lambda x, t: -exact.log_prob(x, t))
    runs = [
        sds.sample(PROCESS, s, (8, 2, 2), steps=20, seed=0, dtype=torch.float64, backend="eager")
        for s in (exact, energy)
    ]
    torch.testing.assert_close(runs[0], runs[1], rtol=1e-9, atol=1e-9)


class Quadratic(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.precision = torch.nn.Parameter(torch.tensor([1.0, 2.0], dtype=torch.float64))

    def forward(self, x, t):
        return 0.5 * (self.precision * x.square()).sum(1)


def test_gradients_of_a_loss_reach_the_energy():
    """``s = -p x``: the gradient of a squared error in ``p`` is known."""
    energy = Quadratic()
    x, target = draws(4, 5, 2), draws(5, 5, 2)
    loss = (sds.EnergyScore(energy)(x, TIMES[0]) - target).square().sum()
    loss.backward()
    expected = (2 * (energy.precision.detach() * x + target) * x).sum(0)
    torch.testing.assert_close(energy.precision.grad, expected)


def test_gradients_reach_the_state():
    exact = LAWS["mixture"].score(PROCESS)
    energy = sds.EnergyScore(lambda x, t: -exact.log_prob(x, t))
    x = draws(6, 3, 2, 2).requires_grad_()
    grads = [torch.autograd.grad(s(x, TIMES).square().sum(), x)[0] for s in (exact, energy)]
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-9, atol=1e-9)


class Noised(torch.nn.Module):
    """Energy of noised data ``N(0, diag(v))``, and its score in closed form."""

    def __init__(self) -> None:
        super().__init__()
        self.log_v = torch.nn.Parameter(torch.tensor([0.3, -0.2], dtype=torch.float64))

    def variance(self, t):
        return PROCESS.alpha(t).square()[:, None] * self.log_v.exp() + PROCESS.sigma(t).square()[:, None]

    def forward(self, x, t):
        return 0.5 * (x.square() / self.variance(t)).sum(1)

    def score(self, x, t):
        return -x / self.variance(t)


def test_training_an_energy_is_training_its_score():
    """Loss and gradient of denoising score matching, through the kernels, by the energy and by its known score."""
    energy, x0 = Noised(), draws(7, 64, 2)
    results = []
    for net in (sds.EnergyScore(energy), energy.score):
        loss = sds.DenoisingScoreMatching()(sds.NetworkScore(net, PROCESS, predicts="score"), x0, seed=0)
        results.append((loss.detach(), *torch.autograd.grad(loss, energy.log_v)))
    torch.testing.assert_close(results[0], results[1], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_langevin_of_a_quadratic_energy(temperature):
    """Euler's stationary variance is ``T / (p (1 - p h / 2))`` exactly, by the moments of the whole chain."""
    p, h = 2.0, 0.1
    well = sds.EnergyScore(lambda x, t: 0.5 * p * x.square())
    grid = sds.grids.uniform(0.0, 200 * h, 200)
    chain = sds.oracle.chain_moments(well.langevin(temperature), sds.EulerMaruyama(), grid, 3.0, 1.0)
    assert float(chain.mean) == pytest.approx(0.0, abs=1e-12)
    assert float(chain.cov) == pytest.approx(temperature / (p * (1 - p * h / 2)), rel=1e-12)


def test_langevin_of_a_mixture_energy():
    """A double well in one dimension: moments of the law, from 4000 chains of small steps."""
    law = sds.GaussianMixture(torch.tensor([[-1.0], [1.0]]), 0.6, torch.tensor([1.0, 3.0]))
    well = sds.EnergyScore(lambda x, t: -law.log_prob(x))
    x0 = torch.zeros(4000, 1, dtype=torch.float64)
    with torch.no_grad():
        x = sds.solve(well.langevin(), x0, 0.0, 20.0, 400, solver=sds.EulerMaruyama(), seed=0, backend="eager").x1
    # Mean 1/2 and variance 0.36 + 3/4; 4.5 standard errors of each, and 0.05 for steps of 0.05.
    assert abs(float(x.mean()) - 0.5) < 4.5 * math.sqrt(1.11 / 4000) + 0.05
    assert abs(float(x.var()) - 1.11) < 4.5 * 1.11 * math.sqrt(2 / 4000) + 0.05


@pytest.mark.parametrize("kernel", [sds.mcmc.MALA(0.3), sds.mcmc.BAOAB(0.3, friction=1.0)], ids=["mala", "baoab"])
def test_chains_take_energy_models(kernel):
    """Unbiased for a Gaussian: MALA by acceptance, BAOAB in positions by its splitting (Leimkuhler and Matthews)."""
    well = sds.EnergyScore(lambda x, t: 0.5 * (x / 0.8).square().sum(1))
    chain = sds.mcmc.run_chain(
        kernel,
        torch.zeros(2000, 2, dtype=torch.float64),
        60,
        score=lambda x: well(x, TIMES[0]),
        energy=lambda x: well.energy(x, TIMES[0]),
        seed=0,
    )
    assert abs(float(chain.x.var()) - 0.64) < 4.5 * 0.64 * math.sqrt(2 / 4000)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: sds.EnergyScore(3.0), TypeError, "energy must be a function"),
        (lambda: sds.EnergyScore(lambda x, t: x)(torch.ones(3, 2), TIMES[0]), ValueError, "one number per sample"),
        (lambda: sds.EnergyScore(lambda x, t: x)(torch.ones(3, 1), TIMES[0]), ValueError, r"squeeze\(-1\)"),
        (lambda: sds.EnergyScore(lambda x, t: 1.0)(torch.ones(3, 1), TIMES[0]), TypeError, "must return a tensor"),
        (
            lambda: sds.EnergyScore(lambda x, t: torch.ones(3))(torch.ones(3, 1), TIMES[0]),
            TypeError,
            "does not depend on x",
        ),
        (lambda: sds.EnergyScore(lambda x, t: x[:, 0]).langevin(0.0), ValueError, "temperature must be positive"),
    ],
)
def test_bad_input(make, error, message):
    with pytest.raises(error, match=message):
        make()
