"""An energy model: learn -log p up to its constant, without ever computing the constant.

A network u gives one number for each state; its gradient, by autograd, is trained as a score by denoising score
matching, so that the normaliser drops out. As the network of a `NetworkScore` with ``predicts="edm"`` the whole is the
gradient of a known energy,

    E(x, sigma) = |x|^2 / (2 S^2) + (s / sigma) u(x / S, log(sigma) / 4),    S^2 = sigma^2 + s^2,  s the data's std,

which can be read off, drawn, and given to chains that refuse proposals, as no plain score can. The data are a mixture
whose density is known, so energies are compared with the exact -log p, and samplers with its weights.

What is learned worst is how deep one mode lies against another at low noise, for hardly any data lie between them.
Langevin chains are wrong by more than that, as they stay where they start; samplers that come down from high noise,
where the modes are one, are right all the same.

Takes about a minute.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import sdesolve as sds
from sdesolve import plotting

DATA = sds.GaussianMixture(
    torch.tensor([[-0.9, -0.5], [0.9, -0.6], [0.1, 0.9]]),
    weights=torch.tensor([0.5, 0.3, 0.2]),
    covs=torch.tensor([[[0.08, 0.05], [0.05, 0.12]], [[0.10, -0.05], [-0.05, 0.06]], [[0.16, 0.0], [0.0, 0.03]]]),
)
PROCESS = sds.EDM(sigma_min=0.08, sigma_max=20.0)
EXACT = DATA.score(PROCESS)
WINDOW = (-2.2, 2.2, -1.9, 1.9)
STD = 1.0


class Potential(nn.Module):
    """``u(x, t) = <x, net(x, t)>``: one number for each state, smooth in it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.net = sds.nn.MLP(2, width=width, depth=2)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return (x * self.net(x, t)).sum(1)


def make_score(width: int) -> sds.NetworkScore:
    return sds.NetworkScore(sds.EnergyScore(Potential(width)), PROCESS, "edm", sigma_data=STD)


def energy_of(score: sds.NetworkScore, x: Tensor, sigma: float) -> Tensor:
    """``E(x, sigma)`` as above, whose negative gradient ``score`` is."""
    S = math.hypot(sigma, STD)
    u = score.net.energy(x / S, torch.full((len(x),), 0.25 * math.log(sigma)))
    return 0.5 * (x / S).square().sum(1) + STD / sigma * u


def energy_error(score: sds.NetworkScore, sigma: float, n: int = 20_000) -> float:
    """Standard deviation of ``E + log p`` under ``p``, in nats: 0 if the energy is right up to a constant."""
    x = DATA.sample(n, seed=5)
    x = x + sigma * torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return float((energy_of(score, x, sigma) + EXACT.log_prob(x, sigma)).std())


def weights_of(x: Tensor) -> list[float]:
    """Shares of samples by their nearest mode."""
    nearest = torch.cdist(x.double(), DATA.means).argmin(1)
    return [float((nearest == k).double().mean()) for k in range(3)]


def weights_by_quadrature(log_density: Callable[[Tensor], Tensor], points: int = 200) -> list[float]:
    """Shares of a law by nearest mode, its normaliser found on a lattice: in two dimensions, and for judging only."""
    side = torch.linspace(-3.0, 3.0, points)
    x = torch.cartesian_prod(side, side)
    with torch.no_grad():
        p = log_density(x).double().softmax(0)
    nearest = torch.cdist(x.double(), DATA.means).argmin(1)
    return [float(p[nearest == k].sum()) for k in range(3)]


def draw(score: sds.NetworkScore, n: int, quick: bool) -> dict[str, Tensor]:
    """Samples of four kinds; chains at the lowest noise level start from one point each of a wide Gaussian."""
    steps, sigma = (100, PROCESS.t_min) if quick else (300, PROCESS.t_min)
    wide, step = PROCESS.sample_prior((n, 2), seed=1), 0.3 * sigma**2

    def at_low(x: Tensor) -> Tensor:
        return score(x, torch.tensor(sigma))

    def energy(x: Tensor) -> Tensor:
        return energy_of(score, x, sigma)

    levels = sds.grids.geometric(PROCESS.t_max, sigma, steps // 5 - 1)
    annealed = sds.AnnealedLangevin(levels, step_size=step, inner_steps=5, convention="full")
    kinds = {"Langevin": sds.mcmc.Langevin(step), "MALA": sds.mcmc.MALA(step)}
    found = {name: sds.run_chain(kernel, wide / 10.0, steps, score=at_low, energy=energy, seed=2).x
             for name, kernel in kinds.items()}  # fmt: skip
    found["annealed Langevin"] = annealed(PROCESS, score, wide, seed=2)
    # A network can be compiled into the sampler, which takes longer than samples as few as these
    found["reverse SDE"] = sds.sample(PROCESS, score, (n, 2), steps=steps // 3, seed=2, denoise=False, backend="eager")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("outputs"), help="folder for the picture")
    parser.add_argument("--quick", action="store_true", help="less training, fewer samples: a few seconds")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    quick = arguments.quick

    torch.manual_seed(0)
    score = make_score(32 if quick else 64)
    loss = sds.DenoisingScoreMatching("edm", "stratified", law=sds.LogNormalNoise(-0.8, 1.4))
    options = {"lr": 3e-3, "decay": "cosine", "ema": 0.99, "progress": False}
    run = sds.train(score, DATA.sample(50_000, seed=0), loss=loss, steps=100 if quick else 3000, **options)
    print(f"{run.steps} steps of training in {run.seconds:.0f} s")

    levels = (PROCESS.t_min, 0.2, 0.5, 1.0, 2.0)
    print(f"\n{'':34s}" + "".join(f"{s:>9.2f}" for s in levels) + "   = sigma")
    print(f"{'error of the energy, nats':34s}" + "".join(f"{energy_error(score, s):9.3f}" for s in levels))

    sigma, n = PROCESS.t_min, 1000 if quick else 4000
    found = draw(score, n, quick)
    truth = DATA.sample(n, seed=7)
    truth = truth + sigma * torch.randn(truth.shape, generator=torch.Generator().manual_seed(1))
    weights = {
        "exact law": weights_by_quadrature(lambda x: EXACT.log_prob(x, sigma)),
        "exp(-E), by quadrature": weights_by_quadrature(lambda x: -energy_of(score, x, sigma)),
    }
    chance = max(math.sqrt(w * (1.0 - w) / n) for w in weights["exact law"])
    print(
        f"\nShares of the modes at sigma = {sigma}; chance with {n} samples: +- {2 * chance:.3f}; energy distance, 95%"
    )
    for name, shares in weights.items():
        print(f"{name:34s}" + "".join(f"{w:9.3f}" for w in shares))
    for name, x in found.items():
        e = sds.metrics.energy_distance(x, truth)
        row = "".join(f"{w:9.3f}" for w in weights_of(x))
        print(f"{name:34s}{row}{float(e.value):14.4f} +- {float(e.high - e.value):.4f}")
    picture(score, found, weights).savefig(arguments.out / "energy_model.png")


def picture(score: sds.NetworkScore, found: dict[str, Tensor], weights: dict[str, list[float]]) -> Any:
    sigma = PROCESS.t_min
    titles = ["Exact -log p", "Learned energy", "Langevin", "annealed Langevin", "reverse SDE"]
    figure, axes = plotting.panels(5, titles=titles, width=2.5, height=2.6)
    lowest = float(EXACT.log_prob(DATA.means.float(), sigma).max())
    # The constant of an energy is anyone's choice: here that both lows are 0
    with torch.no_grad():
        offset = float(energy_of(score, DATA.means.float(), sigma).min())
    shades = {"value_range": (-9.0, 0.0), "contours": 8}
    plotting.heatmap(axes[0], lambda x: EXACT.log_prob(x, sigma) - lowest, WINDOW, **shades)
    plotting.heatmap(axes[1], lambda x: offset - energy_of(score, x, sigma), WINDOW, **shades)
    for panel, name in zip(axes[2:], titles[2:], strict=True):
        plotting.points(panel, found[name], WINDOW, most=2000)
        panel.set_xlabel(", ".join(f"{w:.3f}" for w in weights_of(found[name])), fontsize=10)
    for panel, shares in zip(axes, weights.values(), strict=False):
        panel.set_xlabel(", ".join(f"{w:.3f}" for w in shares), fontsize=10)
    return figure


if __name__ == "__main__":
    main()
