"""Markov chains on laws whose stationary moments, discretised, are known: exactly where a chain is affine."""

from __future__ import annotations

import functools
import importlib.util
import math

import pytest
import torch
from sdesolve_kernels import Stream, normal, uniform

from sdesolve import (
    ODE,
    BrownianPath,
    DivergenceError,
    DormandPrince,
    Gaussian,
    GaussianMixture,
    mcmc,
    run_chain,
    solve,
)
from sdesolve.diffusions import EDM, VE, VP
from sdesolve.oracle import affine_moments

V = torch.tensor([0.5, 1.0, 4.0], dtype=torch.float64)  # variances of a Gaussian target
MIXTURE = GaussianMixture(torch.tensor([[-1.5], [1.0]]), torch.tensor([0.5, 0.8]), torch.tensor([1.0, 2.0]))


def energy(x: torch.Tensor) -> torch.Tensor:
    return -MIXTURE.log_prob(x)


def run(kernel: mcmc.AbstractKernel, steps: int):
    """``steps`` steps on ``N(0, diag(V))``, as a function of start and noise."""

    def chain(x, noise):
        target = mcmc.Target(lambda y: -y / V)
        walker = kernel.start(target, x, None, noise.correctors(1))
        for k in range(steps):
            walker = kernel.step(target, walker, k, noise.correctors(1))
        return walker.x

    return chain


@pytest.mark.parametrize(("convention", "factor"), [("full", 1.0), ("half", 0.5)])
def test_unadjusted_langevin_on_a_gaussian(convention, factor):
    """``x' = (1 - delta/v) x + sqrt(2 delta) z``: variance ``v / (1 - delta / (2 v))`` in the limit."""
    eps, steps = 0.3, 12
    delta = factor * eps
    start, mean = (
        torch.tensor([2.0, 0.3, 1.0], dtype=torch.float64),
        torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64),
    )
    law = affine_moments(run(mcmc.Langevin(eps, convention=convention), steps), mean, start, diagonal=True)
    shrink, limit = (1 - delta / V) ** steps, V / (1 - delta / (2 * V))
    torch.testing.assert_close(law.mean, shrink * mean, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(law.cov, limit + (start - limit) * shrink**2, rtol=1e-12, atol=0)


@pytest.mark.parametrize(("h", "friction"), [(0.1, 1.0), (1.0, 0.5), (1.3, 3.0)])
def test_baoab_has_the_exact_law_of_positions_on_a_gaussian(h, friction):
    """Positions have the target's variance at any stable step; velocities have ``1 - h^2 / (4 v)``."""

    def chain(x, noise, steps=3):
        target, kernel = mcmc.Target(lambda y: -y / V), mcmc.BAOAB(h, friction)
        walker = kernel.start(target, x[:, 0], x[:, 1], noise.correctors(1))
        for k in range(steps):
            walker = kernel.step(target, walker, k, noise.correctors(1))
        return torch.stack([walker.x, walker.velocity], 1)

    exact = torch.diag(torch.cat([V, 1 - h**2 / (4 * V)]))
    for steps in (1, 5):  # stationary from the first step on
        law = affine_moments(functools.partial(chain, steps=steps), torch.zeros(2, 3), exact)
        torch.testing.assert_close(law.cov, exact, rtol=1e-12, atol=1e-12)
    other = affine_moments(chain, torch.zeros(2, 3), 1.0)  # and not by standing still
    assert float((other.cov - exact).abs().max()) > 0.01
    assert float((other.cov - torch.eye(6)).abs().max()) > 0.01


def test_baoab_without_friction_is_a_second_order_method_for_hamiltons_equations():
    """``x'' = -sin x``: with hardly any friction there is hardly any noise; errors fall by 4 with half the step."""
    x0 = torch.tensor([0.3, 1.0, 2.0], dtype=torch.float64)
    pendulum = ODE(lambda y, t: torch.stack([y[:, 1], -y[:, 0].sin()], 1))
    start = torch.stack([x0, 0.5 * torch.ones_like(x0)], 1)
    exact = solve(pendulum, start, 0.0, 2.0, solver=DormandPrince(1e-12, 1e-12)).x1
    errors = []
    for steps in (20, 40):
        kernel = mcmc.BAOAB(2.0 / steps, friction=1e-30)
        end = run_chain(kernel, x0, steps, score=lambda x: -x.sin(), velocity=start[:, 1], seed=0)
        errors.append(float((torch.stack([end.x, end.velocity], 1) - exact).norm()))
    assert math.log2(errors[0] / errors[1]) == pytest.approx(2.0, abs=0.05)


def test_a_proposal_is_accepted_by_the_rule_of_metropolis_and_hastings():
    """Decisions worked out here from densities and transition densities, with the numbers that the step must use."""
    delta, n = 0.4, 2000
    x = MIXTURE.sample(n, seed=0, dtype=torch.float64) * 1.5
    path = BrownianPath(5, first_path=3)
    moved = run_chain(mcmc.MALA(delta), x, 1, energy=energy, noise=path)

    def score(y):
        y = y.clone().requires_grad_()
        return torch.autograd.grad(MIXTURE.log_prob(y).sum(), y)[0]

    z = normal(n, 1, seed=5, stream=Stream.CORRECTOR, first_path=3, dtype=torch.float64)
    u = uniform(n, 1, seed=5, stream=Stream.ACCEPTANCE, first_path=3, dtype=torch.float64)[:, 0]
    y = x + delta * score(x) + math.sqrt(2 * delta) * z

    def log_q(to, at):
        return torch.distributions.Normal(at + delta * score(at), math.sqrt(2 * delta)).log_prob(to)[:, 0]

    ratio = (MIXTURE.log_prob(y) + log_q(x, y) - MIXTURE.log_prob(x) - log_q(y, x)).exp()
    accept = u < ratio
    torch.testing.assert_close(moved.x, torch.where(accept[:, None], y, x), rtol=1e-12, atol=1e-12)
    assert torch.equal(moved.acceptance, accept.float())
    assert 0.3 < float(accept.double().mean()) < 0.95


@pytest.mark.parametrize("score", [None, lambda x: -0.3 * x], ids=["own score", "another law's score"])
def test_metropolis_keeps_the_law_at_a_step_size_that_ruins_the_unadjusted_chain(score):
    n = 40_000
    x0 = MIXTURE.sample(n, seed=0, dtype=torch.float64)

    def distance(x):
        """Kolmogorov-Smirnov."""
        x = x[:, 0].sort().values
        z = (x[:, None] - MIXTURE.means[:, 0]) / torch.tensor([0.5, 0.8], dtype=torch.float64)
        F = (MIXTURE.weights * torch.special.ndtr(z)).sum(1)
        k = torch.arange(n, dtype=torch.float64)
        return float(torch.maximum(F - k / n, (k + 1) / n - F).max())

    critical = 1.95 / math.sqrt(n)  # exceeded once in a thousand seeds
    adjusted = run_chain(mcmc.MALA(0.3), x0, 10, energy=energy, score=score, seed=3)
    assert distance(adjusted.x) < critical
    unadjusted = run_chain(mcmc.Langevin(0.3), x0, 10, energy=energy, score=score, seed=3)
    assert distance(unadjusted.x) > 3 * critical
    # In equilibrium a transition and its reverse happen equally often: detailed balance.
    one = run_chain(mcmc.MALA(0.3), adjusted.x, 1, energy=energy, score=score, seed=4).x
    there, back = ((adjusted.x < 0) & (one > 0)).sum(), ((adjusted.x > 0) & (one < 0)).sum()
    assert abs(int(there - back)) < 5 * math.sqrt(int(there + back))
    assert int(there) > 100


def test_the_score_comes_from_the_energy_if_it_is_not_given():
    x0 = torch.linspace(-2, 2, 9, dtype=torch.float64)[:, None]
    law = Gaussian(torch.tensor([0.5]), 2.0)
    by_energy = run_chain(mcmc.Langevin(0.1), x0, 5, energy=lambda x: -law.log_prob(x), seed=0)
    by_score = run_chain(mcmc.Langevin(0.1), x0, 5, score=lambda x: (0.5 - x) / 2, seed=0)
    torch.testing.assert_close(by_energy.x, by_score.x, rtol=1e-12, atol=1e-12)
    assert by_energy.nfe == by_score.nfe == 6
    with torch.inference_mode():
        assert torch.equal(
            run_chain(mcmc.Langevin(0.1), x0, 5, energy=lambda x: -law.log_prob(x), seed=0).x, by_energy.x
        )


@pytest.mark.parametrize(
    "kernel", [mcmc.Langevin(0.2), mcmc.MALA(0.5), mcmc.BAOAB(0.4)], ids=lambda k: type(k).__name__
)
def test_chains_are_functions_of_seed_and_row(kernel):
    x0 = MIXTURE.sample(20, seed=0)
    whole = run_chain(kernel, x0, 9, energy=energy, seed=7, save_every=3)
    shard = run_chain(kernel, x0[12:], 9, energy=energy, noise=BrownianPath(7, first_path=12))
    assert torch.equal(whole.x[12:], shard.x)
    assert whole.xs.shape == (3, 20, 1)
    assert torch.equal(whole.xs[-1], whole.x)
    first = run_chain(kernel, x0, 3, energy=energy, seed=7)
    assert torch.equal(first.x, whole.xs[0])
    rest = run_chain(kernel, first.x, 6, energy=energy, noise=BrownianPath(7).after(3), velocity=first.velocity)
    torch.testing.assert_close(rest.x, whole.x, rtol=1e-6, atol=1e-6)
    assert not torch.equal(run_chain(kernel, x0, 9, energy=energy, seed=8).x, whole.x)


def test_velocities_at_the_start_are_independent_of_start_states():
    x0 = VP().sample_prior((20_000, 1), seed=0, dtype=torch.float64)
    v = mcmc.BAOAB(0.1).start(mcmc.Target(lambda x: -x), x0, None, BrownianPath(0)).velocity
    assert abs(float((x0 * v).mean())) < 5 / math.sqrt(20_000)
    assert abs(float(v.var()) - 1) < 5 * math.sqrt(2 / 20_000)


@pytest.mark.parametrize(("convention", "factor"), [("half", 0.5), ("full", 1.0)])
@pytest.mark.parametrize("process", [VE(), EDM()], ids=["ve", "edm"])
def test_annealed_langevin_is_its_recursion(process, convention, factor):
    """Algorithm 1 on Gaussian data of variances ``V``, level by level, with the exact variances of the chain."""
    sigmas, step, inner = [3.0, 1.0, 0.4], 0.02, 4
    sampler = mcmc.AnnealedLangevin(sigmas, step, inner, convention=convention)
    data = Gaussian(torch.zeros(3), V)
    variance = torch.full((3,), 9.0, dtype=torch.float64)
    for sigma in sigmas:
        delta, v = factor * step * sigma**2 / sigmas[-1] ** 2, V + sigma**2
        for _ in range(inner):
            variance = (1 - delta / v) ** 2 * variance + 2 * delta

    def chain(x, noise, denoise=False):
        return sampler(process, data.score(process), x, noise=noise, denoise=denoise)

    torch.testing.assert_close(
        affine_moments(chain, torch.zeros(3), 9.0, diagonal=True).cov, variance, rtol=1e-9, atol=0
    )
    denoised = affine_moments(lambda x, noise: chain(x, noise, True), torch.zeros(3), 9.0, diagonal=True).cov
    torch.testing.assert_close(denoised, variance * (V / (V + 0.16)) ** 2, rtol=1e-9, atol=0)
    x0 = process.sample_prior((6, 3), seed=0)
    drawn = sampler(process, data.score(process), x0, seed=2)
    assert torch.equal(sampler(process, data.score(process), x0[2:], noise=BrownianPath(2, first_path=2)), drawn[2:])
    torch.testing.assert_close(sampler.step_sizes, step * torch.tensor(sigmas, dtype=torch.float64).square() / 0.16)


def test_a_chain_that_diverges_says_where():
    x0 = torch.tensor([[0.0], [3.0]])
    with pytest.raises(DivergenceError, match=r"chain 5 stopped being finite in step \d") as caught:
        run_chain(mcmc.Langevin(0.5), x0, 30, score=lambda x: -(x**3), noise=BrownianPath(0, first_path=4))
    assert caught.value.path == 5
    x = run_chain(
        mcmc.Langevin(0.5), x0, caught.value.step, score=lambda x: -(x**3), noise=BrownianPath(0, first_path=4)
    ).x
    assert bool(x.isfinite().all())
    with pytest.raises(DivergenceError, match="noise level of t = "):
        mcmc.AnnealedLangevin([1.0, 0.1], 5.0, 50)(EDM(), lambda x, t: -(x**3), x0, seed=0)


def test_a_start_without_score_or_energy_is_named():
    x0 = torch.tensor([[1.0], [2.0]])

    def lacking(x):
        return torch.where(x > 1.5, math.nan, -x)

    for kernel in (mcmc.Langevin(0.1), mcmc.BAOAB(0.1)):
        with pytest.raises(DivergenceError, match="the score of chain 5 is not finite at its start") as caught:
            run_chain(kernel, x0, 3, score=lacking, noise=BrownianPath(0, first_path=4))
        assert (caught.value.path, caught.value.step) == (5, 0)
    with pytest.raises(DivergenceError, match=r"the energy of chain 1 is not finite at its start.*of 0 more"):
        run_chain(mcmc.MALA(0.1), x0, 3, score=lambda x: -x, energy=lambda x: lacking(x)[:, 0], seed=0)
    with pytest.raises(DivergenceError, match="the score is not finite at the start, t = 1, for sample 1") as caught:
        mcmc.AnnealedLangevin([1.0, 0.1], 1e-3, 2)(EDM(), lambda x, t: lacking(x), x0, seed=0)
    assert (caught.value.path, caught.value.time) == (1, 1.0)


X = torch.zeros(3, 1)
ANNEALED = mcmc.AnnealedLangevin([1.0, 0.1], 1e-3, 2)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: run_chain(mcmc.Langevin(0.1), X, 5), ValueError, "give the score.*or the energy"),
        (
            lambda: run_chain(mcmc.MALA(0.1), X, 5, score=lambda x: -x),
            ValueError,
            "MALA compares densities: give energy=",
        ),
        (lambda: run_chain(mcmc.Langevin(0.1), X, 5, score=lambda x: -x, velocity=X), ValueError, "has no velocity"),
        (lambda: run_chain(mcmc.BAOAB(0.1), X, 5, score=lambda x: -x, velocity=X[:2]), ValueError, "must be like x0"),
        (lambda: run_chain(mcmc.Langevin(0.1), X, 0, score=lambda x: -x), ValueError, "steps must be at least 1"),
        (lambda: run_chain(mcmc.Langevin, X, 5, score=lambda x: -x), TypeError, "kernel must be a step"),
        (
            lambda: run_chain(mcmc.Langevin(0.1), X, 5, score=lambda x: -x[:1]),
            ValueError,
            "score must return the shape",
        ),
        (lambda: run_chain(mcmc.MALA(0.1), X, 5, energy=lambda x: x), ValueError, "one number per sample"),
        (lambda: run_chain(mcmc.Langevin(0.1), X, 5, score=3.0), TypeError, "must be a function of x"),
        (
            lambda: run_chain(mcmc.Langevin(0.1), X, 5, score=lambda x: -x, seed=1, noise=BrownianPath(1)),
            ValueError,
            "one",
        ),
        (lambda: mcmc.Langevin(0.0), ValueError, "step_size must be a positive number"),
        (lambda: mcmc.Langevin(0.1, convention="double"), ValueError, "convention='double' is unknown; choose 'full'"),
        (lambda: mcmc.BAOAB(0.1, friction=-1.0), ValueError, "friction must be a positive"),
        (lambda: mcmc.AnnealedLangevin([0.1, 1.0], 1e-3, 5), ValueError, "sigmas must decrease"),
        (lambda: mcmc.AnnealedLangevin([1.0, 0.0], 1e-3, 5), ValueError, "positive numbers"),
        (lambda: mcmc.AnnealedLangevin([1.0], 1e-3, 0), ValueError, "inner_steps must be at least 1"),
        (lambda: ANNEALED(VP(), lambda x, t: -x, X), ValueError, "leaves data unscaled"),
        (lambda: ANNEALED(VE(sigma_max=0.5), lambda x, t: -x, X), ValueError, "has noise levels up to 0.49"),
        (lambda: ANNEALED(EDM, lambda x, t: -x, X), TypeError, r"a diffusion such as VE\(\)"),
    ],
)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_chains_have_the_form_of_arviz():
    """Dimensions chain and draw first; where ArviZ is installed, it reads them."""
    options = {"energy": lambda x: x.square().flatten(1).sum(1) / 2, "seed": 0, "save_every": 2}
    run = run_chain(mcmc.MALA(0.8), torch.zeros(4, 2, 3, dtype=torch.float64), 60, **options)
    data = run.to_xarray("theta", warmup=5)
    assert data["theta"].dims == ("chain", "draw", "theta_dim_0", "theta_dim_1")
    assert data["theta"].shape == (4, 25, 2, 3)
    assert data["theta"].values[1, 3].tolist() == run.xs[8, 1].tolist()
    assert data.attrs["acceptance"] == run.acceptance.tolist()
    assert data["draw"].values.tolist() == list(range(25))
    with pytest.raises(ValueError, match="of 30 saved states none is left after warmup=30"):
        run.to_xarray(warmup=30)
    if importlib.util.find_spec("arviz_stats"):
        import arviz_stats

        assert arviz_stats.rhat(data)["theta"].shape == (2, 3)
