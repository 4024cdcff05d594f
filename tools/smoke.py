"""A small check of an installed sdesolve: ``python tools/smoke.py``. `tools/wheel_smoke.py` runs it on a wheel.

One call each of what the package is for, with an answer that is known; then one Triton kernel, compiled ahead of time.
"""

from __future__ import annotations

import importlib.util
import math
import sys
from importlib.metadata import version
from pathlib import Path

import torch

import sdesolve as sds


def solve() -> str:
    """Geometric Brownian motion, fused and eagerly: the same paths to rounding, and the mean that is known."""
    sde = sds.SDE(lambda x, t: 0.5 * x, lambda x, t: 0.2 * x)
    x0 = torch.ones(16_384, 1)
    options = {"steps": 64, "solver": sds.EulerMaruyama(), "seed": 0}
    fused = sds.solve(sde, x0, 0.0, 1.0, backend="fused", **options)
    eager = sds.solve(sde, x0, 0.0, 1.0, backend="eager", **options)
    torch.testing.assert_close(fused.x1, eager.x1, rtol=1e-4, atol=0)
    exact = (1 + 0.5 / 64) ** 64
    deviation = exact * math.sqrt((math.exp(0.2**2) - 1) / len(x0))
    error = abs(fused.x1.mean().item() - exact)
    assert error < 5 * deviation, (error, deviation)
    return f"{fused.stats.backend}, mean off by {error / deviation:.1f} standard deviations"


def sample() -> str:
    """A mixture by its exact score: the shares of its modes, 2048 samples."""
    data = sds.GaussianMixture(torch.tensor([[-2.0, 0.0], [2.0, 1.0]]), 0.3)
    process = sds.VP()
    x = sds.sample(process, data.score(process), (2048, 2), solver=sds.EulerMaruyama(), steps=200, seed=0)
    share = (x[:, 0] > 0).float().mean().item()
    near = ((x - torch.where(x[:, :1] > 0, 1.0, -1.0) * 2)[:, 0].abs() < 1.5).float().mean().item()
    assert abs(share - 0.5) < 5 * 0.5 / math.sqrt(2048), share
    assert near > 0.99, near
    return f"{100 * share:.1f}% in one of two equal modes"


def train() -> str:
    """A small network learns the score of a Gaussian, and samples by it have its scale."""
    data = 0.5 * torch.randn(4096, 2, generator=torch.Generator().manual_seed(0))
    score = sds.NetworkScore(sds.nn.MLP(shape=(2,), width=32, depth=2), sds.VP(), predicts="edm")
    options = {"loss": sds.DenoisingScoreMatching(), "steps": 400, "ema": 0.98, "progress": False, "seed": 0}
    sds.train(score, data, batch_size=256, lr=3e-3, **options)
    x = sds.sample(score.process, score, (2048, 2), solver=sds.Heun(), steps=32, stochasticity=0, seed=0)
    scale = x.std().item()
    assert 0.4 < scale < 0.6, scale
    return f"standard deviation of samples {scale:.2f}, of data 0.50"


def likelihood() -> str:
    """Of a Gaussian, by the probability flow of its exact score."""
    data = sds.Gaussian(torch.zeros(4), 0.25)
    process = sds.VP()
    x = data.sample(64, seed=0)
    found = sds.estimate_likelihood(process, data.score(process), x, seed=0)
    exact = torch.distributions.Normal(0.0, 0.5).log_prob(x).sum(1)
    error = (found.log_prob - exact).abs().max().item() / 4
    assert error < 2e-3, error
    return f"off by at most {error:.0e} nats a dimension"


def triton() -> str:
    """A kernel compiled for sm_90, without a GPU."""
    if importlib.util.find_spec("triton") is None:
        return "not installed on this platform"
    from sdesolve_kernels.report import report

    row = report([90], "^euler_maruyama_step image float32", jobs=1)["sm_90"]["euler_maruyama_step image float32"]
    assert (row["spills"], row["local"], row["load_bits"]) == (0, 0, 128), row
    return f"{version('triton')}, {row['per_element']} instructions an element"


def main() -> None:
    """Runs all of them; the first that fails ends the run."""
    torch.set_num_threads(1)  # tensors this small gain nothing from more, and wait where cores are busy
    print(f"sdesolve {version('sdesolve')} in {Path(sds.__file__).parent}; Python {sys.version.split()[0]}, ", end="")
    print(f"torch {torch.__version__}, numpy {version('numpy')}, numba {version('numba')}")
    for check in (solve, sample, train, likelihood, triton):
        print(f"{check.__name__}: {check()}", flush=True)


if __name__ == "__main__":
    main()
