"""Relative Wasserstein distances on a Gaussian with a decaying spectrum, worked out independently of this library.

EDM with data ``N(0, diag(lam))``, ``lam_k = c k^-2`` for k = 1 ... 256 with mean 1/4; a Karras grid of n points from 80
to 0.002, then 0, where the last step is the denoiser's output; start ``N(0, 80^2 I)``. The figures come from the
recursion of Pierret and Galerne (ICML 2025), written scheme by scheme. They are to be met within 1%.
"""

from __future__ import annotations

import pytest
import torch

import sdesolve as sds
from sdesolve.sde import Noise

LAM = torch.arange(1, 257, dtype=torch.float64) ** -2
LAM = LAM * 0.25 / LAM.mean()
PROCESS = sds.EDM()
SCORE = sds.Gaussian(torch.zeros(256, dtype=torch.float64), LAM).score(PROCESS)
EVALUATIONS = (5, 9, 19, 35, 79, 159, 319)
TABLE = [
    (sds.DDIM(), (4.214e-1, 2.391e-1, 1.156e-1, 6.386e-2, 2.941e-2, 1.561e-2, 8.801e-3)),
    (sds.EDMHeun(), (4.951e0, 8.161e-1, 1.315e-1, 3.241e-2, 4.814e-3, 1.786e-3, 2.171e-3)),
    (sds.DPM2(), (2.402e0, 4.423e-1, 7.335e-2, 1.800e-2, 2.620e-3, 1.932e-3, 2.258e-3)),
    (sds.LinearMultistep(3), (3.799e-1, 1.485e-1, 3.130e-2, 7.975e-3, 2.818e-3, 2.439e-3, 2.395e-3)),
    (sds.DPMSolverPP(2), (1.690e-1, 1.510e-1, 3.119e-2, 7.143e-3, 1.787e-3, 2.167e-3, 2.332e-3)),
    (sds.DPMSolverPP(3), (7.721e-1, 1.934e-1, 8.765e-3, 1.783e-3, 2.191e-3, 2.333e-3, 2.375e-3)),
    (sds.ReverseDiffusion(), (2.365e0, 7.681e-1, 2.692e-1, 1.307e-1, 5.399e-2, 2.609e-2, 1.282e-2)),
    (sds.Ancestral(), (5.332e-1, 3.644e-1, 2.062e-1, 1.212e-1, 5.674e-2, 2.884e-2, 1.455e-2)),
    (sds.SDEDPMSolverPP(2), (1.111e-1, 2.119e-1, 7.882e-2, 2.241e-2, 4.032e-3, 9.374e-4, 2.225e-4)),
    (
        sds.EDMHeun(churn=40.0, churn_range=(0.01, 50.0)),
        (5.222e0, 1.169e0, 2.456e-1, 8.487e-2, 2.683e-2, 1.177e-2, 3.649e-3),
    ),
]


def relative_w2(solver, evaluations):
    points = (evaluations + solver.evaluations - 1) // solver.evaluations
    grid = torch.cat([sds.grids.karras(80.0, 0.002, points - 1), torch.zeros(1, dtype=torch.float64)])
    stochastic = any(noise is not Noise.NONE for _, noise in solver.supported)
    sde = PROCESS.reverse(SCORE) if stochastic else PROCESS.probability_flow(SCORE)
    start = torch.zeros(256, dtype=torch.float64)
    var = sds.oracle.chain_moments(sde, solver, grid, start, 80.0**2, diagonal=True).cov
    return float(((var.sqrt() - LAM.sqrt()).square().sum() / LAM.sum()).sqrt())


@pytest.mark.parametrize(("solver", "figures"), TABLE, ids=lambda v: repr(v) if not isinstance(v, tuple) else "")
def test_known_figures_are_reproduced(solver, figures):
    for evaluations, figure in zip(EVALUATIONS, figures, strict=True):
        assert relative_w2(solver, evaluations) == pytest.approx(figure, rel=0.01)


def test_better_members_of_the_families():
    assert relative_w2(sds.DPMSolverPP(3), 35) <= 0.002
    assert relative_w2(sds.SDEDPMSolverPP(3), 35) <= 0.009
    assert relative_w2(sds.SASolver(3, 3), 35) <= 0.0025
    assert relative_w2(sds.SDEDPMSolverPP(3), 79) <= 0.002
    assert relative_w2(sds.SASolver(3, 0), 79) <= 0.0005
