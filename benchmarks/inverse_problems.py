"""How wrong each method for inverse problems is: ``PYTHONPATH=.:kernels python benchmarks/inverse_problems.py``.

On a Gaussian prior the reverse SDE and the flow of each method are affine, and the law that they end in is computed
exactly (`oracle.chain_moments`), unless conjugate gradients stop early; on a mixture it is sampled, and the sliced
distance between two exact samples of the same size stands beside it. The posterior itself is known in both cases.
Figures that do not exist, for steps that diverge or chains that are not affine, are left out.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from sdesolve_kernels import normal
from torch import Tensor

import sdesolve as sds
from sdesolve.inverse import DPS, MMPS, PiGDM, Replacement
from sdesolve.inverse.operators import AbstractOperator, Blur, ChannelMixing, Mask

TABLE = Path(__file__).parent / "results" / "inverse_problems.json"
PROCESS = sds.VP()
CHANNELS, PLACES = 2, 4
SHAPE = (CHANNELS, PLACES)
SAMPLES = 20_000
PARTICLES = 256  # of each run; runs are pooled
GUIDANCES = (1.0, 0.5)

Method = Callable[..., Any]
METHODS: dict[str, Method] = {
    "Replacement": Replacement,
    "DPS": DPS,
    "PiGDM": PiGDM,
    "MMPS, 1 iteration": lambda *a: MMPS(*a, iterations=1),
    "MMPS, 3 iterations": lambda *a: MMPS(*a, iterations=3),
    "MMPS, solved": lambda *a: MMPS(*a, iterations=math.prod(SHAPE) + 2),
}
AFFINE = ("exact score", "Replacement", "DPS", "PiGDM", "MMPS, solved")


def operators() -> dict[str, AbstractOperator]:
    seen = torch.zeros(SHAPE, dtype=torch.bool)
    seen[:, : PLACES // 2] = True
    return {
        "inpainting": Mask(seen),
        "channel mean": ChannelMixing(torch.full((1, CHANNELS), 1 / CHANNELS), SHAPE),
        "blur": Blur(torch.tensor([0.25, 0.5, 0.25]), SHAPE),
    }


def covariance() -> Tensor:
    """Unit variances; correlation 0.8 to the power of the distance between places, 0.5 between channels."""
    place = torch.arange(PLACES, dtype=torch.float64)
    along = 0.8 ** (place[:, None] - place).abs()
    across = torch.full((CHANNELS, CHANNELS), 0.5, dtype=torch.float64) + 0.5 * torch.eye(CHANNELS, dtype=torch.float64)
    return torch.kron(across, along)


def draws(seed: int, *shape: int) -> Tensor:
    return normal(1, math.prod(shape), seed=seed, stream=220, dtype=torch.float64).reshape(shape)


def gaussian_errors(noise_std: float, steps: int) -> dict[str, dict[str, dict[str, float | None]]]:
    """Wasserstein-2 distance to the posterior over the root of its trace, by operator, method and equation.

    ``score``: relative error of the posterior score, root mean square over noised posterior samples and times.
    """
    prior = sds.Gaussian(torch.zeros(SHAPE), covariance())
    found: dict[str, dict[str, dict[str, float | None]]] = {}
    for name, A in operators().items():
        truth = prior.sample(1, seed=1, dtype=torch.float64)
        y = (A(truth) + noise_std * draws(2, 1, *A.observation_shape))[0]
        posterior = prior.condition(A, y, noise_std)
        exact = posterior.score(PROCESS)
        scores = {"exact score": exact}
        scores |= {label: method(prior.score(PROCESS), PROCESS, A, y, noise_std) for label, method in METHODS.items()}
        found[name] = {}
        for label, score in scores.items():
            row = found[name][label] = {"score": score_error(score, posterior)}
            if label in AFFINE:
                row["reverse SDE"] = chain_error(PROCESS.reverse(score), sds.SDEDPMSolverPP(), posterior, steps)
                row["flow"] = chain_error(PROCESS.probability_flow(score), sds.Heun(), posterior, 6 * steps)
            print(f"{name:14s} {label:20s}", found[name][label], flush=True)
    return found


def score_error(score: Any, posterior: sds.Gaussian) -> float:
    exact = posterior.score(PROCESS)
    t = torch.linspace(0.02, 1.0, 50, dtype=torch.float64).repeat_interleave(20)
    x0 = posterior.sample(len(t), seed=3, dtype=torch.float64)
    x = PROCESS.alpha(t)[:, None, None] * x0 + PROCESS.sigma(t)[:, None, None] * draws(4, *x0.shape)
    weight = PROCESS.sigma(t)[:, None, None]  # of the noise that the score stands for
    s = exact(x, t)
    return float((weight * (score(x, t) - s)).norm() / (weight * s).norm())


def chain_error(sde: Any, solver: Any, posterior: sds.Gaussian, steps: int) -> float | None:
    grid = PROCESS.time_grid(steps)
    end = posterior.moments(PROCESS, float(grid[-1]))
    try:
        law = sds.oracle.chain_moments(sde, solver, grid, torch.zeros(SHAPE), 1.0)
    except (ValueError, sds.DivergenceError):
        return None
    distance = float(sds.metrics.bures_wasserstein(law.mean, law.cov, end.mean, end.cov))
    size = float(posterior.cov.diagonal().sum().sqrt())
    return distance / size if distance < 1e3 * size else None


def mixture_errors(noise_std: float, steps: int) -> dict[str, float | None]:
    """Sliced Wasserstein-1 distance to exact posterior samples, and between two sets of these.

    Particles, by Euler-Maruyama, are those of independent runs, drawn with equal weights: the larger distance of two
    seeds.
    """
    means = torch.tensor([[-2.0, 1.0], [0.0, -1.5], [2.0, 1.2], [2.2, -1.0]])
    prior = sds.GaussianMixture(means, torch.tensor([0.3, 0.4, 0.25, 0.5]))
    A = Mask(torch.tensor([False, True]))
    y = torch.tensor([0.9])
    posterior = prior.condition(A, y, noise_std)
    truth = posterior.sample(SAMPLES, seed=5, dtype=torch.float64)
    shape = (SAMPLES, 2)

    def distance(score: Any, solver: Any) -> float | None:
        try:
            x = sds.sample(PROCESS, score, shape, solver=solver, steps=steps, seed=6, dtype=torch.float64)
        except sds.DivergenceError:
            return None
        value = float(sds.metrics.sliced_wasserstein(x, truth, p=1.0))
        return value if value < 100 else None

    scores = {"exact score": posterior.score(PROCESS)}
    scores |= {
        label: method(prior.score(PROCESS), PROCESS, A, y, noise_std)
        for label, method in METHODS.items()
        if "iteration" not in label  # one number is observed, and one iteration solves for it
    }
    found: dict[str, float | None] = {
        "two exact samples": float(
            sds.metrics.sliced_wasserstein(posterior.sample(SAMPLES, seed=7, dtype=torch.float64), truth, p=1.0)
        )
    }
    print(f"mixture        two exact samples   {found}", flush=True)
    for label, score in scores.items():
        found[label] = distance(score, sds.SDEDPMSolverPP())
        print(f"mixture        {label:20s}", found[label], flush=True)
    potential = sds.inverse.ObservationPotential(PROCESS, A, y, noise_std)
    for guidance in GUIDANCES:
        label = f"particles, guidance {guidance:g}"
        found[label] = max(particle_error(prior, potential, truth, steps, guidance, seed) for seed in (6, 7))
        print(f"mixture        {label:20s}", found[label], flush=True)
    return found


def particle_error(prior: Any, potential: Any, truth: Tensor, steps: int, guidance: float, seed: int) -> float:
    shape = (math.ceil(SAMPLES / PARTICLES), 2)
    runs = sds.sequential_monte_carlo(
        PROCESS, prior.score(PROCESS), potential, shape, particles=PARTICLES, steps=steps, seed=seed,
        guidance=guidance, dtype=torch.float64,
    )  # fmt: skip
    return float(sds.metrics.sliced_wasserstein(runs.draw().flatten(0, 1)[:SAMPLES], truth, p=1.0))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--noise", type=float, nargs="+", default=[0.1, 0.5])
    arguments = parser.parse_args()
    result = {
        str(s): {"gaussian": gaussian_errors(s, arguments.steps), "mixture": mixture_errors(s, arguments.steps)}
        for s in arguments.noise
    }
    steps = {"reverse SDE": arguments.steps, "flow": 6 * arguments.steps, "mixture": arguments.steps}
    TABLE.write_text(json.dumps({"steps": steps, "noise_std": result}, indent=1) + "\n")
    print(f"written to {TABLE}")


if __name__ == "__main__":
    main()
