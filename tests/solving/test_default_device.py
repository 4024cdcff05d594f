"""Torch's default device is for the user's tensors: tables and grids stay on the host, states where they are.

On the meta device nothing can be read, so that a table that strays there is an error, or the address 0 in a kernel.
"""

from __future__ import annotations

import pytest
import torch
from sdesolve_kernels import langevin_step, normal, perturb

import sdesolve as sds

X0 = torch.linspace(-1.0, 1.0, 12, device="cpu").reshape(6, 2)
MIXTURE = sds.GaussianMixture(torch.tensor([[-2.0, 0.0], [2.0, 1.0]], device="cpu"), 0.3)
PROCESS = sds.VP()
SCORE = MIXTURE.score(PROCESS)


def solved(backend, **options):
    sde = sds.SDE(lambda x, t: -x, lambda x, t: 0.1 * torch.cos(x))
    return sds.solve(sde, X0, 0.0, 1.0, 4, solver=sds.EulerMaruyama(), backend=backend, **({"seed": 1} | options))


def sampled(solver):
    return sds.sample(PROCESS, SCORE, (6, 2), solver=solver, steps=5, seed=1, device="cpu")


CASES = {
    "fused": lambda: solved("fused").x1,
    "kernel": lambda: solved("kernel").x1,
    "eager": lambda: solved("eager", save_at=[0.1, 0.5, 1.0]).xs,
    "saved": lambda: solved("fused", save_at=[0.1, 0.5, 1.0]).xs,
    "moments": lambda: solved("fused", reduce="moments").variance,
    "two-point": lambda: solved("fused", increments="two-point").x1,
    "coarse": lambda: solved("auto", seed=None, noise=sds.BrownianPath(1, substeps=3)).x1,
    "per sample": lambda: (
        sds.solve(sds.ODE(lambda x, t: -x), X0, 0.0, X0[:, 0].abs(), 3, solver=sds.Heun(), backend="eager").x1
    ),
    "adaptive": lambda: sds.solve(sds.ODE(lambda x, t: -x), X0, 0.0, 1.0, solver=sds.DormandPrince()).x1,
    "likelihood": lambda: sds.log_likelihood(PROCESS, SCORE, X0, steps=5),
    "multistep": lambda: sampled(sds.DPMSolverPP(3)),
    "Adams": lambda: sampled(sds.SASolver(3, 2)),
    "two stages": lambda: sampled(sds.SDEDPMSolverPP2S()),
    "corrected": lambda: sampled(sds.PredictorCorrector(sds.Ancestral(), sds.LangevinCorrector(snr=0.16), 1)),
    "Langevin step": lambda: langevin_step(X0, -X0, mode="batch", size=0.1, alpha=X0[:, 0].abs(), seed=1),
    "16 bits": lambda: normal(3, 5, seed=1, dtype=torch.bfloat16, device="cpu"),
    "perturb": lambda: perturb(X0, 0.5, X0[:, 0].abs(), seed=1),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_the_default_device_changes_nothing(case):
    alone = case()
    with torch.device("meta"):
        inside = case()
    assert inside.device == torch.device("cpu")
    assert torch.equal(inside, alone)
