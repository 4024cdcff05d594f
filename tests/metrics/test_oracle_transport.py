"""Wasserstein distances on the line against integrals done otherwise, and laws followed in two ways."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import integrate, optimize, special

import sdesolve as sds
from sdesolve import grids, oracle
from sdesolve.oracle.joint import law_at_last_noise
from sdesolve.oracle.recursion import recursion
from sdesolve.oracle.transport import MixtureLaw

EDM = sds.EDM(sigma_max=20.0)
TWO_MODES = sds.GaussianMixture(torch.tensor([[-1.0], [1.0]]), 0.25, weights=torch.tensor([1.0, 2.0]))
CHURN = sds.EDMHeun(churn=40.0, churn_range=(0.01, 50.0))
GRID = grids.karras(20.0, 0.02, 39)


def distribution(x, sigma):
    z = (x - np.array([-1.0, 1.0])) / math.hypot(0.25, sigma)
    return float(special.ndtr(z) @ np.array([1.0, 2.0]) / 3.0)


def quantile(u, sigma):
    return optimize.brentq(lambda x: distribution(x, sigma) - u, -150.0, 150.0, xtol=1e-13)


def shrunk(process, score, x, grid, noise):
    return 0.06 * x


def turned(process, score, x, grid, noise):
    return -0.06 * x


def folded(process, score, x, grid, noise):
    """Two starts to each end."""
    return 0.06 * x.abs()


def half_quantile(u):
    """Of ``|x|`` at the start."""
    return optimize.brentq(lambda r: distribution(r, 20.0) - distribution(-r, 20.0) - u, 0.0, 200.0, xtol=1e-13)


@pytest.mark.parametrize(
    ("sampler", "drawn"),
    [
        (shrunk, lambda u: 0.06 * quantile(u, 20.0)),
        (turned, lambda u: -0.06 * quantile(1.0 - u, 20.0)),
        (folded, lambda u: 0.06 * half_quantile(u)),
    ],
    ids=lambda v: v.__name__,
)
def test_distances_of_known_laws(sampler, drawn):
    """Against adaptive quadrature, which finds the few states of the truth between its modes."""

    def integrand(x):
        density = (distribution(x + 1e-5, 0.02) - distribution(x - 1e-5, 0.02)) / 2e-5
        return (drawn(distribution(x, 0.02)) - x) ** 2 * density

    square = integrate.quad(integrand, -2.6, 2.6, limit=200, epsabs=1e-9, epsrel=1e-7, points=[-1.0, 0.0, 1.0])[0]
    spread = math.sqrt(0.25**2 + 0.02**2 + 8 / 9)
    assert oracle.error(sampler, EDM, TWO_MODES, torch.tensor([20.0, 0.02])) == pytest.approx(
        math.sqrt(square) / spread, rel=1e-5
    )


def test_both_ways_to_follow_a_law_agree_between_modes():
    """Churn remembers nothing, so that its joint density is that of one state. Errors on the ridge between modes grow
    from step to step and move mass from one to the other: 7e-6 of it with meshes that suffice for straight lines.
    """
    chain, start = recursion(oracle.as_sampler(CHURN), EDM, TWO_MODES, GRID), MixtureLaw(TWO_MODES, EDM, 20.0)
    joint = law_at_last_noise(chain, start.density, start.quantiles, (-1, 1))
    low, high, count = -180.0, 180.0, 12000
    nodes = torch.linspace(low, high, count + 1, dtype=torch.float64)
    mass = start.density(nodes) * (nodes[1] - nodes[0])
    looks = chain.looks()[: len(chain.random)]
    for k, look in enumerate(looks):
        mean, std = look(nodes[:, None])
        mean = mean[:, 0]
        if k + 1 == len(looks):
            break
        low, high = float(mean[mass > 1e-18].min()) - 9 * std, float(mean[mass > 1e-18].max()) + 9 * std
        reached = torch.linspace(low, high, 1 + int((high - low) / (0.2 * std)), dtype=torch.float64)
        z = (reached[:, None] - mean[mass > 1e-18]) / std
        mass = (-0.5 * z.square()).exp() @ mass[mass > 1e-18] * (reached[1] - reached[0]) / std / math.sqrt(2 * math.pi)
        nodes = reached
    y = torch.linspace(-1.0, 1.0, 9, dtype=torch.float64)
    brute = torch.special.ndtr((y[:, None] - mean) / std) @ mass
    followed = torch.special.ndtr((y[:, None] - joint.mean) / joint.std) @ joint.mass
    assert float((followed - brute).abs().max()) < 2e-6
