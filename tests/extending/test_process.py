"""A process of your own, in one file: variance exploding with ``sigma(t) = t^p``.

A forward process is one subclass of `AbstractDiffusion`: ``log alpha``, ``sigma``, both rates, the inverse of its
log-SNR, where sampling starts, and a grid. Reversal, samplers, training and likelihoods then work as they are.
"""

import math
from typing import final

import pytest
import torch

import sdesolve as sds
from sdesolve.diffusions import Prior


@final
class PowerVE(sds.AbstractDiffusion):
    """``dX = sqrt(2 p t^(2 p - 1)) dW``: ``alpha = 1``, ``sigma = t^p``."""

    def __init__(self, p=1.5, t_max=8.0, t_min=1e-2):
        self.p, self.t_max, self.t_min = p, t_max, t_min

    def log_alpha(self, t):
        return torch.zeros_like(torch.as_tensor(t, dtype=None if isinstance(t, torch.Tensor) else torch.float64))

    def sigma(self, t):
        return (self.log_alpha(t) + t) ** self.p

    def drift_rate(self, t):
        return self.log_alpha(t)

    def squared_diffusion(self, t):
        return 2 * self.p * (self.log_alpha(t) + t) ** (2 * self.p - 1)

    def time_at_log_snr(self, log_snr):
        return (-0.5 / self.p * (self.log_alpha(log_snr) + log_snr)).exp()

    @property
    def prior(self):
        return Prior(self.t_max**self.p)

    def time_grid(self, steps):
        return sds.grids.karras(self.t_max, self.t_min, steps)


PROCESS = PowerVE()
GAUSSIAN = sds.Gaussian(torch.tensor([0.5, -1.0]), torch.tensor([0.3, 0.8]))
DATA = sds.GaussianMixture(torch.tensor([[-2.0], [1.0]]), torch.tensor([0.3, 0.5]))


def test_its_forward_law_is_that_of_its_sde():
    """Mean and variance after 4000 paths of Euler-Maruyama; 4 standard errors and the scheme's own bias of h."""
    sol = sds.solve(PROCESS, torch.full((4000, 1), 1.5), 0.0, 2.0, 400, solver=sds.EulerMaruyama(), seed=0)
    sigma = 2.0**1.5
    assert abs(float(sol.x1.mean()) - 1.5) < 4 * sigma / math.sqrt(4000)
    assert abs(float(sol.x1.var()) / sigma**2 - 1) < 4 * math.sqrt(2 / 4000) + 0.01


@pytest.mark.parametrize("solver", [sds.EulerMaruyama(), sds.DPMSolverPP(2), sds.EDMHeun()], ids=repr)
def test_samplers_bring_it_back_to_the_data(solver):
    """The oracle follows densities without chance: the sampler's distance to the data falls with its steps."""
    few, many = (sds.oracle.measure(solver, PROCESS, GAUSSIAN, PROCESS.time_grid(n)).value for n in (20, 80))
    assert many < 0.5 * few


def test_likelihoods_are_those_of_the_data():
    x = torch.tensor([[-2.0], [0.0], [1.2]], dtype=torch.float64)
    score = DATA.score(PROCESS)
    got = sds.log_likelihood(PROCESS, score, x, t_min=1e-3, prior=lambda x: score.log_prob(x, 8.0))
    torch.testing.assert_close(got, DATA.log_prob(x), atol=2e-3, rtol=0)
