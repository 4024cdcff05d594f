"""DDPM and SMLD are discretisations of the VP and VE SDEs: how fast the chains tend to them, exactly.

Part 1: ancestral sampling in N steps on a Gaussian with spectrum k^-2, with its exact score. The law that comes out is
computed, not sampled (`oracle.affine_moments`), so its distance to the data has no Monte Carlo error.

Part 2: one trained network, used as an SDE, as an ODE and as chains of any number of steps, without training again. The
chains' variational bound on the negative log-likelihood comes down to what the probability flow says of the same
network (or a little less: with an inexact score chain and flow are different models), and the terms of the bound become
a function of time.

Takes a minute or two.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import sdesolve as sds
from sdesolve import oracle, plotting

# Near the data b_k^2 is the variance of a reverse step, and sigma_k^2 grows as k. The small variance is
# b_k^2 (k - 1) / k, and b_1^2 / 2 at k = 1; the divergence that this costs, (r - 1 - log r) / 2 a dimension, stays
# however many the steps.
EULER_GAMMA = 0.57721566
SMALL_VARIANCE_LIMIT = 2 * (EULER_GAMMA + 1.0 - math.log(2.0)) / 2


def reverse_chain(chain: Any, score: Any, variance: str) -> Any:
    """Ancestral sampling as a function of the start and of unit noises, which is what the oracle takes."""

    def run(x: Tensor, noise: oracle.OracleNoise) -> Tensor:
        for k in range(chain.steps, 0, -1):
            step = torch.full((len(x),), k)
            x = chain.mean_before(score(x, step), x, step)
            if k > 1:
                x = x + (0.5 * chain.log_variance(x, k, variance)).exp() * noise()
        return x

    return run


def laws(numbers: list[int]) -> dict[str, tuple[list[int], list[float]]]:
    """Distance of each sampled law to the data's, relative to the data's size, for each number of steps."""
    spectrum = torch.arange(1, 17, dtype=torch.float64) ** -2.0
    data, zero, scale = sds.Gaussian(torch.zeros(16), spectrum), torch.zeros(16), spectrum.sum().sqrt()
    curves: dict[str, tuple[list[int], list[float]]] = {}

    def add(name: str, n: int, law: oracle.ChainMoments) -> None:
        costs, errors = curves.setdefault(name, ([], []))
        costs.append(n)
        errors.append(float(sds.metrics.bures_wasserstein(law.mean, law.cov, data.mean, data.cov) / scale))

    vp = sds.VP()
    for n in numbers:
        chains = {
            "DDPM, small variance": (sds.DDPM.linear(n), "small"),
            "DDPM, large variance": (sds.DDPM.linear(n), "large"),
            "SMLD, small variance": (sds.SMLD.geometric(n, 1e-3, 50.0), "small"),
        }
        for name, (chain, variance) in chains.items():
            run = reverse_chain(chain, chain.score_of(data), variance)
            add(name, n, oracle.affine_moments(run, zero, chain.prior.std**2, diagonal=True))
        grid = sds.grids.uniform(vp.t_max, 1e-9, n)
        reverse = vp.reverse(data.score(vp))
        law = oracle.chain_moments(reverse, sds.EulerMaruyama(), grid, zero, vp.prior.std**2, diagonal=True)
        add("VP SDE, Euler-Maruyama", n, law)
    return curves


def print_laws(curves: dict[str, tuple[list[int], list[float]]], numbers: list[int]) -> None:
    print("Exact relative Wasserstein distance to the data's law (16-d Gaussian, spectrum k^-2)")
    print(f"{'steps':26s}" + "".join(f"{n:>10d}" for n in numbers) + f"{'order':>8s}")
    for name, (_, errors) in curves.items():
        order = math.log2(errors[-2] / errors[-1])
        print(f"{name:26s}" + "".join(f"{e:10.1e}" for e in errors) + f"{order:8.2f}")


def bounds(data: sds.GaussianMixture, score: sds.NetworkScore, chains: list[sds.DDPM], n: int) -> tuple[Any, Any]:
    """The bounds less the flow's likelihood with two standard errors, and their terms, in nats."""
    x = data.sample(n, seed=1)
    flow = -sds.log_likelihood(score.process, score, x, solver=sds.RK4(), steps=50)
    print(
        f"\nNegative log-likelihood of {n} points in nats: {-float(data.log_prob(x).mean()):.4f} under their true law"
    )
    print(f"{'the network as':36s}{'all':>9s}{'L_T':>9s}{'L_k':>9s}{'L_0':>9s}{'above the flow':>22s}")
    print(f"{'probability flow':36s}{float(flow.mean()):9.4f}")
    gaps: dict[str, list[tuple[float, float]]] = {"large": [], "small": []}
    terms_of: dict[int, Tensor] = {}
    for name, found in gaps.items():
        for chain in chains:
            steps_score = chain.score_from(score.process, score)
            terms = sds.variational_bound(chain, steps_score, x, variance=name)
            gap = terms.total - flow
            found.append((float(gap.mean()), 2 * float(gap.std()) / n**0.5))
            terms_of.setdefault(chain.steps, terms.steps.mean(1))
            parts = (terms.total, terms.prior, terms.steps.sum(0), terms.decoder)
            row = f"{f'DDPM of {chain.steps} steps, {name} variance':36s}" + "".join(
                f"{float(v.mean()):9.4f}" for v in parts
            )
            print(f"{row}{found[-1][0]:14.4f} +- {0.5 * found[-1][1]:.4f}")
    print(f"the limit with small variance is {SMALL_VARIANCE_LIMIT:.3f}, with large variance 0")
    return gaps, terms_of


def samples(data: sds.GaussianMixture, score: sds.NetworkScore, chains: list[sds.DDPM], n: int) -> None:
    """The same network's samples, by chains, SDE and ODE."""
    process, shape, drawn = score.process, (n, 2), {}
    for chain in chains:
        steps_score = chain.score_from(process, score)
        drawn[f"DDPM of {chain.steps} steps, large variance"] = chain.sample(
            steps_score, shape, variance="large", seed=4
        )
    # A network can be compiled into the sampler, which takes longer than samples as few as these
    drawn["reverse SDE, 100 steps"] = sds.sample(process, score, shape, steps=100, seed=4, backend="eager")
    grid = sds.grids.uniform_log_snr(process, 20)
    drawn["probability flow, 20 steps"] = sds.sample(
        process, score, shape, solver=sds.DPMSolverPP(), grid=grid, seed=4, backend="eager"
    )
    distance, truth = sds.metrics.sliced_wasserstein, data.sample(n, seed=2)
    floor = sds.metrics.sample_floor(distance, data.sample(2 * n, seed=3), rounds=20)
    print(f"\nSliced Wasserstein distance of {n} samples; two true ones: {floor.mean:.3f} +- {floor.std:.3f}")
    for name, y in drawn.items():
        print(f"{name:36s}{float(distance(y, truth)):9.3f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("outputs"), help="folder for the picture")
    parser.add_argument("--quick", action="store_true", help="less training, fewer steps: a few seconds")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    quick = arguments.quick
    numbers = [32, 64, 128] if quick else [32, 64, 128, 256, 512, 1024]
    curves = laws(numbers)
    print_laws(curves, numbers)

    data = sds.GaussianMixture(torch.tensor([[-1.0, -0.6], [1.1, -0.4], [0.0, 1.1]]), 0.35)
    torch.manual_seed(0)
    score = sds.NetworkScore(sds.nn.MLP(2, width=64, depth=2), sds.VP(), predicts="edm", sigma_data=0.9)
    loss = sds.DenoisingScoreMatching("likelihood", "stratified", law=sds.UniformLogSNR(), importance=True)
    options = {"batch_size": 256, "lr": 3e-3, "decay": "cosine", "ema": 0.99, "progress": False}
    sds.train(score, data.sample(20_000, seed=0), loss=loss, steps=100 if quick else 3000, **options)
    chains = [sds.DDPM.linear(n) for n in ([30, 100] if quick else [30, 100, 300, 1000])]
    gaps, terms_of = bounds(data, score, chains, 500 if quick else 4000)
    samples(data, score, chains[:3], 1000 if quick else 10_000)
    picture(curves, [chain.steps for chain in chains], gaps, terms_of).savefig(arguments.out / "chains_to_sdes.png")


def picture(
    curves: Any, lengths: list[int], gaps: dict[str, list[tuple[float, float]]], terms_of: dict[int, Tensor]
) -> Any:
    titles = ["Distance of the sampled law, exact", "Bound less the flow's likelihood", "Terms of the bound"]
    figure, (left, middle, right) = plotting.panels(3, titles=titles, width=3.7, height=3.6)
    plotting.error_curves(curves, axes=left, orders=(1,), y_label="relative Wasserstein distance")
    for (name, found), colour, marker in zip(gaps.items(), plotting.COLOURS, "os", strict=False):
        values, errors = zip(*found, strict=True)
        middle.errorbar(
            lengths, values, errors, color=colour, marker=marker, markersize=5, linewidth=1.6, label=f"{name} variance"
        )
    for limit in (0.0, SMALL_VARIANCE_LIMIT):
        middle.axhline(limit, color="#9a9a9a", linewidth=1.0, linestyle=(0, (4, 3)), zorder=0)
    middle.set_xscale("log")
    middle.set_xticks(lengths, labels=[str(n) for n in lengths])
    middle.minorticks_off()
    middle.set(xlabel="steps", ylabel="nats")
    middle.legend(frameon=False, fontsize=9, title="dashed: limits", title_fontsize=9)
    for (n, values), colour in zip(terms_of.items(), plotting.COLOURS, strict=False):
        right.plot(torch.arange(2, n + 1) / n, n * values, color=colour, linewidth=1.2, label=f"N = {n}")
    right.set(yscale="log", xlabel="t = k / N", ylabel="N times term k, in nats")
    right.legend(frameon=False, fontsize=9)
    return figure


if __name__ == "__main__":
    main()
