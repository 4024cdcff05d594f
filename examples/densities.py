"""Two densities of the plane, learned: a spiral whose score is known exactly, and a checkerboard of known entropy.

The spiral is a mixture of 40 narrow Gaussians along two arms, so the learned score can be compared with the exact one
at every time. Samples come from the reverse SDE and from the probability flow, log-likelihoods from the flow, and each
number stands beside what is exact or what chance allows. Takes about two minutes.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import sdesolve as sds
from sdesolve import plotting

PROCESS = sds.VP(sds.CosineBeta())
WINDOW = (-2.4, 2.4, -2.4, 2.4)


def spiral() -> sds.GaussianMixture:
    """Two arms of 20 Gaussians, each drawn out along its arm."""
    angle = torch.linspace(0.9, 3.2 * math.pi / 2, 20)
    radius = 0.42 * angle
    means, covs = [], []
    for turn in (0.0, math.pi):
        direction = torch.stack([(angle + turn).cos(), (angle + turn).sin()], dim=1)
        tangent = 0.42 * direction + radius[:, None] * torch.stack([-direction[:, 1], direction[:, 0]], dim=1)
        tangent = tangent / tangent.norm(dim=1, keepdim=True)
        means.append(radius[:, None] * direction)
        covs.append(0.06**2 * torch.eye(2) + 0.18**2 * tangent[:, :, None] * tangent[:, None, :])
    return sds.GaussianMixture(torch.cat(means), covs=torch.cat(covs))


def checkerboard(n: int, seed: int) -> Tensor:
    """Uniform on 8 of the 16 unit squares of [-2, 2]^2, so that its entropy is log 8."""
    draw = torch.Generator().manual_seed(seed)
    column, row = torch.randint(4, (n,), generator=draw), torch.randint(2, (n,), generator=draw)
    corner = torch.stack([column - 2, 2 * row + column % 2 - 2], dim=1)
    return corner + torch.rand(n, 2, generator=draw)


def learn(data: Tensor, steps: int, width: int) -> sds.NetworkScore:
    torch.manual_seed(0)
    score = sds.NetworkScore(sds.nn.MLP(2, width=width, depth=3), PROCESS, "edm", sigma_data=float(data.std()))
    loss = sds.DenoisingScoreMatching("edm", "stratified", law=sds.LogNormalNoise(-1.0, 1.5))
    options = {"batch_size": 256, "lr": 3e-3, "decay": "cosine", "ema": 0.995, "progress": False}
    run = sds.train(score, data, loss=loss, steps=steps, **options)
    print(f"  {run.steps} steps of training in {run.seconds:.0f} s")
    return score


def fisher_error(score: sds.NetworkScore, data: sds.GaussianMixture, n: int = 2000) -> list[tuple[float, float]]:
    """``E|s - s*|^2 / E|s*|^2`` under ``p_t`` at times of equal ratios of the noise level."""
    exact, found = data.score(PROCESS), []
    for k, t in enumerate(sds.grids.uniform_log_snr(PROCESS, 6, t0=0.02, t1=0.9)):
        mean, std = PROCESS.marginal(data.sample(n, seed=10 + k), t.float())
        x = mean + std * torch.randn(n, 2, generator=torch.Generator().manual_seed(k))
        with torch.no_grad():
            s, truth = score(x, t), exact(x, t)
        found.append((float(t), float((s - truth).square().sum() / truth.square().sum())))
    return found


class Found(NamedTuple):
    """What is drawn of one data set."""

    data: Tensor
    score: sds.NetworkScore
    drawn: Tensor
    sde: Tensor
    flow: Tensor


def examine(score: sds.NetworkScore, held: Tensor, log_p: Tensor, quick: bool) -> Found:
    """Samples beside data, likelihoods beside the entropy."""
    n = len(held) // 2
    distance = sds.metrics.sliced_wasserstein
    floor = sds.metrics.sample_floor(distance, held, rounds=5 if quick else 20)
    steps = 50 if quick else 200
    # A network can be compiled into the sampler, which takes longer (10 s) than samples as few as these
    shape, options = (n, 2), {"seed": 1, "backend": "eager"}
    flow_grid = sds.grids.uniform_log_snr(PROCESS, 30)
    samples = {
        f"reverse SDE, {steps} steps": sds.sample(PROCESS, score, shape, steps=steps, **options),
        "probability flow, 30 steps": sds.sample(
            PROCESS, score, shape, solver=sds.DPMSolverPP(), grid=flow_grid, **options
        ),
    }
    print(f"  sliced Wasserstein distance of {n} samples; two true ones: {floor.mean:.3f} +- {floor.std:.3f}")
    for how, x in samples.items():
        print(f"    {how:28s}{float(distance(x, held[:n])):8.3f}")

    count = 200 if quick else 2000
    grid = sds.grids.uniform_log_snr(PROCESS, 10 if quick else 60)
    found = sds.log_likelihood(PROCESS, score, held[:count], solver=sds.RK4(), grid=grid)
    gap = log_p[:count] - found
    error = float(gap.std()) / count**0.5
    entropy = -float(log_p[:count].mean())
    print(f"  negative log-likelihood in nats: {-float(found.mean()):.4f}; under the true law {entropy:.4f}")
    print(f"    the difference, an estimate of KL(data | model): {float(gap.mean()):.4f} +- {error:.4f}")

    start, grid = PROCESS.sample_prior((60, 2), seed=5), PROCESS.time_grid(200)
    with torch.no_grad():
        options = {"grid": grid, "save_at": "grid", "backend": "eager"}
        sde = sds.solve(PROCESS.reverse(score), start[:4], solver=sds.EulerMaruyama(), seed=6, **options)
        flow = sds.solve(PROCESS.probability_flow(score), start, solver=sds.Heun(), **options)
    return Found(held, score, next(iter(samples.values())), sde.xs, flow.xs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("outputs"), help="folder for the picture")
    parser.add_argument("--quick", action="store_true", help="less training, fewer samples: a few seconds")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    quick = arguments.quick
    training, width, n = (60, 32, 1000) if quick else (5000, 96, 10_000)

    data = spiral()
    print("spiral")
    score = learn(data.sample(100_000, seed=0), training, width)
    errors = fisher_error(score, data)
    print("  time                    " + "".join(f"{t:8.3f}" for t, _ in errors))
    print("  relative Fisher error   " + "".join(f"{e:8.2%}" for _, e in errors))
    held = data.sample(n, seed=1)
    first = examine(score, held, data.log_prob(held), quick)

    print("checkerboard")
    held = checkerboard(n, seed=1)
    score = learn(checkerboard(100_000, seed=0), training, width)
    second = examine(score, held, torch.full((n,), -math.log(8.0)), quick)
    picture([first, second], 16 if quick else 90).savefig(arguments.out / "densities.png")


def picture(rows: list[Found], resolution: int) -> Any:
    titles = ["Data", "Score at t = 0.1", "Reverse SDE", "Probability flow", "Samples", "Flow's likelihood"]
    figure, axes = plotting.panels(6, 2, titles=titles, width=2.0, height=2.15)
    likelihood_grid = sds.grids.uniform_log_snr(PROCESS, 20)
    for k, found in enumerate(rows):
        data, field, sde, flow, samples, model = axes[6 * k : 6 * k + 6]

        def density(x: Tensor, found: Found = found) -> Tensor:
            log_p = [
                sds.log_likelihood(PROCESS, found.score, part, solver=sds.RK4(), grid=likelihood_grid, ending="density")
                for part in x.split(2000)
            ]
            return torch.cat(log_p).exp()

        plotting.points(data, found.data, WINDOW)
        t = torch.tensor(0.1)
        noised = PROCESS.alpha(t) * found.data + PROCESS.sigma(t) * torch.randn(found.data.shape)
        plotting.points(field, noised, WINDOW, colour="#b8d4e8")
        plotting.arrows(field, lambda x, score=found.score: score(x, torch.tensor(0.1)), WINDOW)
        plotting.points(sde, found.data, WINDOW, colour="#b8d4e8")
        plotting.trails(sde, found.sde, WINDOW)
        plotting.points(flow, found.data, WINDOW, colour="#b8d4e8")
        plotting.trails(flow, found.flow, WINDOW)
        plotting.points(samples, found.drawn, WINDOW)
        plotting.heatmap(model, density, WINDOW, resolution=resolution)
    return figure


if __name__ == "__main__":
    main()
