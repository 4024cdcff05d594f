"""Annealed importance sampling, against laws whose normaliser is known."""

import math

import pytest
import torch

import sdesolve as sds
from sdesolve.mcmc import BAOAB, MALA, Langevin

D, LOG_Z = 10, 3.7
PRIOR = sds.Gaussian(torch.zeros(D), 2.0)
MEANS = torch.stack([torch.full((D,), 0.8), torch.full((D,), -0.8)])
LAW = sds.GaussianMixture(MEANS, torch.tensor([0.6, 0.9]), torch.tensor([1.0, 2.0]))
PLANE = sds.Gaussian(torch.zeros(2), 1.0)


def log_density(x):
    return LAW.log_prob(x) + LOG_Z


def annealed(kernel, function=log_density, prior=PRIOR, runs=8, **options):
    options = {"particles": 128, "steps": 100, "seed": 3, "dtype": torch.float64} | options
    return sds.annealed_importance_sampling(kernel, function, prior, runs, **options)


@pytest.mark.parametrize("threshold", [0.0, 0.5])
@pytest.mark.parametrize("kernel", [MALA(0.15), Langevin(0.1)], ids=["mala", "langevin"])
def test_log_z_of_a_mixture_in_ten_dimensions(kernel, threshold):
    found = annealed(kernel, runs=16, particles=512, ess_threshold=threshold)
    log_z, error = found.log_normaliser()
    assert error < 0.025
    assert abs(log_z - LOG_Z) < 0.05
    assert bool(found.resampled.any()) == (threshold > 0)


@pytest.mark.parametrize("kernel", [MALA(0.9), Langevin(0.3)], ids=["mala", "langevin"])
def test_z_has_no_bias_at_steps_too_few_and_too_large(kernel):
    target = sds.Gaussian(torch.full((2,), 0.5), 0.8)
    found = annealed(kernel, target.log_prob, PLANE, runs=64, particles=256, steps=3)
    z = found.log_evidence.exp()
    assert abs(z.mean() - 1) < 4 * z.std() / 8
    assert z.std() / 8 < 0.02


def test_weighted_samples_are_of_the_target():
    found = annealed(MALA(0.15), runs=16)
    share = (found.log_weights.exp() * (found.x.sum(2) > 0)).sum(1)
    assert abs(share.mean() - 1 / 3) < 4 * share.std() / 4


def test_first_runs_of_many_are_the_runs_of_few():
    many, few = (annealed(Langevin(0.1), runs=n, particles=16, steps=8, ess_threshold=0.9) for n in (5, 2))
    assert bool(few.resampled.any())
    assert torch.equal(many.x[:2], few.x)
    assert torch.equal(many.log_evidence[:2], few.log_evidence)


def test_a_target_without_mass_everywhere():
    def half(x):
        return torch.where(x[:, 0] > 0, -0.5 * x.square().sum(1), -math.inf)

    for kernel in (MALA(0.2), Langevin(0.2)):
        found = annealed(kernel, half, PLANE, runs=16, steps=10)
        assert bool((found.x[found.log_weights.exp() > 0][:, 0] > 0).all())
        log_z, error = found.log_normaliser()
        assert abs(log_z - math.log(math.pi)) < 4 * error


def test_the_error_of_a_single_run_is_that_of_its_particles():
    one, several = annealed(MALA(0.15), runs=1, particles=2048, steps=50), annealed(MALA(0.15), particles=256, steps=50)
    assert one.log_normaliser()[1] == pytest.approx(several.log_normaliser()[1], rel=1.0)
    with pytest.raises(ValueError, match="at least 2 runs"):
        annealed(MALA(0.15), runs=1, ess_threshold=1.0, steps=5).log_normaliser()


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"kernel": BAOAB(0.1, 1.0)}, TypeError, "mcmc.MALA or mcmc.Langevin"),
        ({"prior": sds.Gaussian(torch.zeros(2), 0.0)}, ValueError, "must have a density"),
        ({"prior": "normal"}, TypeError, "prior must be a law"),
        ({"steps": 2, "betas": torch.tensor([0.0, 1.0])}, ValueError, "not both"),
        ({"steps": None, "betas": torch.tensor([0.0, 0.5])}, ValueError, "increase from 0 to 1"),
        ({"function": lambda x: x}, ValueError, "a real number for each state"),
        ({"function": lambda x: x.sum(1).detach()}, TypeError, "differentiable"),
        ({"function": lambda x: x.sum(1) * math.nan}, ValueError, "log_density is nan"),
        ({"function": lambda x: x.sum(1) * 0 - math.inf}, sds.DivergenceError, "vanish at beta = 0.5"),
        ({"ess_threshold": 2.0}, ValueError, "fraction"),
    ],
)
def test_bad_input_is_named(change, error, words):
    call = {"kernel": MALA(0.1), "function": PLANE.log_prob, "prior": PLANE, "runs": 2, "particles": 4, "steps": 2}
    with pytest.raises(error, match=words):
        annealed(**(call | change))
