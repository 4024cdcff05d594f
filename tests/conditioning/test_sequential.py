"""Sequential Monte Carlo along samplers' steps: unbiased evidence, exact posteriors, resampling, bad input."""

from __future__ import annotations

import math

import pytest
import torch

import sdesolve as sds
from sdesolve.inverse import ObservationPotential
from sdesolve.inverse.operators import Mask, Masks, Matrix
from sdesolve.montecarlo.sequential import _uniforms, systematic

VP = sds.VP()
LAW = sds.Gaussian(torch.tensor([0.5, -0.3]), torch.tensor([[1.0, 0.6], [0.6, 0.8]]))
SCORE = LAW.score(VP)
A, Y, NOISE = Matrix(torch.tensor([[1.0, 0.5]])), torch.tensor([1.2]), 0.4
POTENTIAL = ObservationPotential(VP, A, Y, NOISE)
STEPS = 8
FLOAT64 = {"steps": STEPS, "dtype": torch.float64}


def sampled_law(solver, stochasticity=None):
    """The law that `sample` draws from: `Gaussian`, because the chain and its denoising are affine."""
    c = solver.sampling_stochasticity if stochasticity is None else stochasticity
    grid = VP.time_grid(STEPS)
    end = sds.oracle.chain_moments(VP.reverse(SCORE, c), solver, grid, torch.zeros(2), 1.0)
    rows = torch.cat([end.mean[None], end.mean + torch.eye(2, dtype=torch.float64)])
    clean = sds.tweedie(VP, SCORE, rows, grid[-1])
    J = (clean[1:] - clean[0]).mT
    return sds.Gaussian(clean[0], J @ end.cov @ J.mT)


def log_evidence(law):
    M = A.matrix()
    S = M @ law.cov @ M.mT + NOISE**2 * torch.eye(1, dtype=torch.float64)
    return float(torch.distributions.MultivariateNormal(M @ law.mean, S).log_prob(Y.double()))


@pytest.mark.parametrize(
    ("solver", "options"),
    [
        (sds.EulerMaruyama(), {}),
        (sds.EulerMaruyama(), {"stochasticity": 0.7, "guidance": 0.5, "ess_threshold": 0.9}),
        (sds.Ancestral(), {"ess_threshold": 1.0}),
        (sds.SDEDPMSolverPP(2), {"ess_threshold": 0.9}),  # remembers the step before, and resamples that too
        (sds.DDIM(0.8), {"guidance": 0.0}),
    ],
)
def test_evidence_and_posterior_are_those_of_the_samplers_own_law(solver, options):
    """``E Z_hat = Z`` and ``E[Z_hat E_hat f] = Z E[f | y]`` for the very steps, with no error of discretisation."""
    law = sampled_law(solver, options.get("stochasticity"))
    exact = law.condition(A, Y, NOISE)
    found = sds.sequential_monte_carlo(VP, SCORE, POTENTIAL, (400, 2), particles=32, solver=solver, seed=1,
                                       **FLOAT64, **options)  # fmt: skip
    assert bool(found.resampled.any())
    assert not bool(found.resampled[-1].any())
    ratio = (found.log_evidence - log_evidence(law)).exp()
    weights = found.log_weights.exp()[..., None]
    centred = found.x - exact.mean
    values = {
        "evidence": (ratio, 1.0),
        "mean": (ratio[:, None] * (weights * centred).sum(1), 0.0),
        "covariance": (
            ratio[:, None] * (weights * centred[..., [0, 0, 1]] * centred[..., [0, 1, 1]]).sum(1),
            exact.cov[[0, 0, 1], [0, 1, 1]],
        ),
    }
    for name, (value, expected) in values.items():
        z = (value.mean(0) - expected) / (value.std(0) / math.sqrt(len(value)))
        assert float(z.abs().max()) < 4.0, (name, z)


def test_it_weighs_separated_modes_right_which_posterior_scores_do_not():
    """Chances of the left modes, .60: 4 standard errors of 24 runs, and .03 for the bias of 40 steps."""
    means = torch.tensor([[-2.0, 1.0], [0.0, -1.5], [2.0, 1.2], [2.2, -1.0]])
    prior = sds.GaussianMixture(means, torch.tensor([0.3, 0.4, 0.25, 0.5]))
    seen, y = Mask(torch.tensor([False, True])), torch.tensor([0.9])
    exact = prior.condition(seen, y, 0.1).sample(40_000, seed=1, dtype=torch.float64)
    left, score = float((exact[:, 0] < 0).double().mean()), prior.score(VP)
    potential = ObservationPotential(VP, seen, y, 0.1)
    found = sds.sequential_monte_carlo(VP, score, potential, (24, 2), seed=0, steps=40, dtype=torch.float64)
    chances = (found.log_weights.exp() * (found.x[..., 0] < 0)).sum(1)
    assert abs(float(chances.mean()) - left) < 4.0 * float(chances.std()) / math.sqrt(24) + 0.03
    assert float(chances.std()) / math.sqrt(24) < 0.03
    guided = sds.sample(VP, sds.inverse.PiGDM(score, VP, seen, y, 0.1), (2000, 2), steps=40, seed=0, backend="eager",
                        solver=sds.SDEDPMSolverPP())  # fmt: skip
    assert abs(float((guided[:, 0] < 0).double().mean()) - left) > 0.1


def test_without_a_potential_it_is_the_sampler():
    for solver in (sds.Ancestral(), sds.SDEDPMSolverPP(2)):
        found = sds.sequential_monte_carlo(VP, SCORE, lambda x0: x0.new_zeros(len(x0)), (2, 2), particles=3,
                                           solver=solver, seed=5, **FLOAT64)  # fmt: skip
        x = sds.sample(VP, SCORE, (6, 2), solver=solver, seed=5, backend="eager", **FLOAT64)
        torch.testing.assert_close(found.x.flatten(0, 1), x, rtol=1e-8, atol=1e-8)
        assert float(found.log_evidence.abs().max()) < 1e-12
        torch.testing.assert_close(found.ess, torch.full_like(found.ess, 3.0))
    zero = sds.sequential_monte_carlo(VP, SCORE, lambda x0: -x0.square().sum(1), (1, 2), particles=4, seed=5,
                                      grid=[1.0, 0.4, 0.1, 0.0], solver=sds.SDEDPMSolverPP(1))  # fmt: skip
    assert bool(zero.x.isfinite().all())  # the last step adds no noise, and is the sampler's own


def test_weights_are_the_public_laws_of_the_steps():
    """One run without resampling: its log weights by `transitions` at the states that it went through."""
    states = []

    def score(x, t):
        states.append(x.detach().clone())
        return SCORE(x, t)

    solver = sds.EulerMaruyama()
    found = sds.sequential_monte_carlo(VP, score, POTENTIAL, (1, 2), particles=5, seed=3, ess_threshold=0.0,
                                       solver=solver, **FLOAT64)  # fmt: skip
    assert len(states) == STEPS + 1  # one evaluation a step, and one to denoise
    xs, ts = torch.stack(states), VP.time_grid(STEPS)
    guided = sds.inverse.PiGDM(SCORE, VP, A, Y, NOISE)  # whose guidance is the gradient of this potential
    p, q = (sds.transitions(VP, s, xs, ts, solver=solver).log_prob(xs[1:]) for s in (SCORE, guided))
    assert float((p - q).abs().max()) > 0.1
    last = POTENTIAL(sds.tweedie(VP, SCORE, xs[-1], ts[-1]), 0.0)
    total = (p - q).sum(0) + last
    torch.testing.assert_close(found.log_weights[0], total.log_softmax(0))
    torch.testing.assert_close(found.log_evidence[0], total.logsumexp(0) - math.log(5))


def test_systematic_resampling_takes_floor_or_ceiling_of_the_expected_count():
    weights = torch.tensor([[0.0, 0.3, 0.05, 0.65, 0.0], [1.0, 0.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.1, 0.9]]).double()
    for u in (1e-10, 0.2, 0.5, 1.0 - 2.0**-33):
        for n in (1, 5, 64):
            index = systematic(weights, n, torch.full((3,), u, dtype=torch.float64))
            counts = torch.stack([row.bincount(minlength=5) for row in index])
            assert float((counts - n * weights).abs().max()) < 1.0
            assert bool((counts[weights == 0] == 0).all())
    u = (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000
    mean = systematic(weights[:1].expand(1000, 5), 7, u).flatten().bincount(minlength=5) / 1000
    torch.testing.assert_close(mean.double(), 7 * weights[0], atol=2e-3, rtol=0.0)


def test_bits_are_a_function_of_seed_run_and_step():
    options = {"particles": 8, "seed": 2**63 + 1, "steps": STEPS, "ess_threshold": 1.0}
    ys = torch.tensor([[1.2], [-0.5], [2.0]])
    whole = sds.sequential_monte_carlo(VP, SCORE, ObservationPotential(VP, A, ys, NOISE), (3, 2), **options)
    torch.manual_seed(7)
    torch.rand(3)
    again = sds.sequential_monte_carlo(VP, SCORE, ObservationPotential(VP, A, ys, NOISE), (3, 2), **options)
    first = sds.sequential_monte_carlo(VP, SCORE, ObservationPotential(VP, A, ys[0], NOISE), (1, 2), **options)
    for name in ("x", "log_weights", "log_evidence", "ess", "resampled"):
        assert torch.equal(getattr(whole, name), getattr(again, name))
    torch.testing.assert_close(whole.x[:1], first.x)
    torch.testing.assert_close(whole.log_evidence[:1], first.log_evidence)
    assert whole.x.dtype == torch.float32
    assert whole.draw(3).shape == (3, 3, 2)
    assert torch.equal(whole.draw(), again.draw())
    other = sds.sequential_monte_carlo(VP, SCORE, ObservationPotential(VP, A, ys, NOISE), (3, 2),
                                       **{**options, "seed": 1})  # fmt: skip
    assert not torch.equal(whole.x, other.x)
    uniforms = torch.stack([_uniforms(3, k, seed, torch.device("cpu")) for k in (0, 1, 4) for seed in (0, 1)])
    assert len(uniforms.unique()) == 18  # of each run, step and seed its own
    assert torch.equal(_uniforms(2, 4, 1, torch.device("cpu")), uniforms[-1, :2])
    assert repr(whole).startswith("Particles(runs=3, particles=8, log_evidence=")


def test_particles_that_are_ruled_out_stay_out():
    """Minus infinity, without resampling: the target is the sampler's law cut off, and gradients of ``log`` are nan."""

    def half(x0):
        return torch.where(x0[:, 0] > 0, torch.log(x0[:, 0].clamp_min(0.0)), -math.inf)

    for threshold in (0.0, 0.5):
        found = sds.sequential_monte_carlo(VP, SCORE, half, (2, 2), particles=64, seed=0, ess_threshold=threshold,
                                           **FLOAT64)  # fmt: skip
        weights = found.log_weights.exp()
        assert bool((weights[found.x[..., 0] <= 0] == 0).all())
        assert bool((found.draw()[..., 0] > 0).all())
        torch.testing.assert_close(weights.sum(1), torch.ones(2, dtype=torch.float64))


def test_weights_that_all_vanish_are_named_with_the_time():
    def late(x0, t):
        alive = torch.zeros_like(x0[:, 0])
        alive[8:] = -math.inf if float(t) < 0.5 else 0.0
        return alive

    with pytest.raises(sds.DivergenceError, match=r"all 8 weights of run 1 vanish at t = 0\.[0-4]") as caught:
        sds.sequential_monte_carlo(VP, SCORE, late, (2, 2), particles=8, steps=6, seed=0)
    assert caught.value.path == 8
    assert caught.value.time == pytest.approx(float(next(t for t in VP.time_grid(6) if t < 0.5)))


def run(potential=POTENTIAL, shape=(1, 2), process=VP, score=SCORE, **options):
    return sds.sequential_monte_carlo(process, score, potential, shape, **{"steps": 4, "particles": 4, **options})


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: run(potential=3.0), TypeError, "log_potential must be a function of x_0, got float"),
        (lambda: run(lambda x0: x0), ValueError, r"a real number for each state, \(4,\), got torch.float32 \(4, 2\)"),
        (lambda: run(lambda x0: 0.0), ValueError, r"for each state, \(4,\), got float"),
        (lambda: run(lambda x0: x0[:, 0] * math.nan), ValueError, "log_potential is nan at t = 1 for row 0 of 4"),
        (lambda: run(lambda x0: x0[:, 0] + math.inf), ValueError, "log_potential is inf at t = 1"),
        (lambda: run(particles=0), ValueError, "particles must be at least 1"),
        (lambda: run(ess_threshold=1.5), ValueError, r"in \[0, 1\], got 1.5"),
        (lambda: run(ess_threshold=math.nan), ValueError, r"in \[0, 1\]"),
        (lambda: run(guidance=math.inf), ValueError, "guidance must be finite"),
        (lambda: run(dtype=torch.float16), TypeError, "dtype must be torch.float32"),
        (lambda: run(solver=sds.DDIM()), ValueError, "follows the probability flow"),
        (lambda: run(solver=sds.SDEDPMSolverPP2S()), ValueError, "not Gaussian"),
        (lambda: run(process="vp"), TypeError, "process must be a linear diffusion"),
        (lambda: run(shape=4), TypeError, "shape must be"),
        (lambda: run(grid=[0.5, 0.6], steps=None), ValueError, "decrease"),
        (lambda: run(score=lambda x, t: SCORE(x, t).detach()), TypeError, "take guidance=0"),
        (lambda: run(ObservationPotential(VP, A, torch.ones(3, 1), 0.1)), ValueError, "3 observations and 4 states"),
        (lambda: run(shape=(1, 3)), ValueError, r"shape \(batch, 2\)|2"),
        (lambda: ObservationPotential(VP, A, Y, 0.0), ValueError, "noise_std must be positive and finite, got 0.0"),
        (lambda: ObservationPotential(VP, A, Y, 0.1, prior_std=0.0), ValueError, "prior_std must be positive"),
        (lambda: ObservationPotential("vp", A, Y, 0.1), TypeError, "process must be a diffusion"),
        (lambda: ObservationPotential(VP, torch.eye(2), Y, 0.1), TypeError, r"operators\.Matrix"),
        (
            lambda: ObservationPotential(VP, Masks(torch.ones(3, 2, dtype=torch.bool)), torch.ones(3, 2), 0.1),
            ValueError,
            "a map for each of 3 states",
        ),
    ],
)
def test_bad_input(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_advice_works():
    found = run(score=lambda x, t: SCORE(x, t).detach(), guidance=0.0, seed=0)
    assert bool(found.x.isfinite().all())
    with torch.inference_mode():
        assert torch.equal(run(seed=0).x, run(seed=0).x)
