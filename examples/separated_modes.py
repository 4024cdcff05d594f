"""Why Langevin dynamics finds the modes and not their weights, and what repairs it.

The law of Song and Ermon 2019, figure 3: two Gaussians far apart with weights 0.8 and 0.2. Its score is exact here, so
whatever goes wrong is the sampler's doing. Near each mode the score does not depend on the weights, so chains that
cannot cross over (MALA, which is exact in the long run, waits exp(25) steps for it) stay in the mode whose basin they
started in. Langevin dynamics through decreasing noise levels, and the reverse SDE, decide between the modes while noise
still joins them.

Everything is judged against the same budgets of score evaluations. Takes about 20 s.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

import sdesolve as sds
from sdesolve import plotting

DATA = sds.GaussianMixture(torch.tensor([[5.0, 5.0], [-5.0, -5.0]]), 1.0, weights=torch.tensor([0.8, 0.2]))
PROCESS = sds.EDM(sigma_min=0.05, sigma_max=200.0)
SCORE = DATA.score(PROCESS)
WINDOW = (-9.0, 9.0, -9.0, 9.0)
Sampler = Callable[[int, int], Tensor]
"""From the number of samples and the budget, evaluations of the score for each of them, to samples."""


def anywhere(n: int) -> Tensor:
    """Starts of the chains, uniform on the window, as in the paper."""
    return 18.0 * torch.rand(n, 2, generator=torch.Generator().manual_seed(0)) - 9.0


def langevin(n: int, budget: int) -> Tensor:
    """Unadjusted, towards the law itself."""
    return sds.run_chain(sds.mcmc.Langevin(0.1), anywhere(n), budget - 1, score=lambda x: SCORE(x, 0.0), seed=1).x


def mala(n: int, budget: int) -> Tensor:
    """With proposals refused, so that the law itself is stationary."""
    kernel = sds.mcmc.MALA(0.5)
    energy = lambda x: -DATA.log_prob(x)  # noqa: E731
    return sds.run_chain(kernel, anywhere(n), budget - 1, score=lambda x: SCORE(x, 0.0), energy=energy, seed=1).x


def annealed(n: int, budget: int) -> Tensor:
    """Ten steps at each noise level, from 20 to 0.2 in equal ratios; steps of a tenth of each level's variance."""
    levels = sds.grids.geometric(20.0, 0.2, max(1, budget // 10 - 1))
    sampler = sds.AnnealedLangevin(levels, step_size=0.1 * 0.2**2, inner_steps=10, convention="full")
    return sampler(PROCESS, SCORE, anywhere(n), seed=1)


def reverse_sde(n: int, budget: int) -> Tensor:
    """Second order, on noise levels of equal ratios."""
    grid = sds.grids.uniform_log_snr(PROCESS, budget - 1)
    return sds.sample(PROCESS, SCORE, (n, 2), solver=sds.SDEDPMSolverPP(), grid=grid, seed=1)


def flow(n: int, budget: int) -> Tensor:
    """The probability flow, second order."""
    grid = sds.grids.uniform_log_snr(PROCESS, budget - 1)
    return sds.sample(PROCESS, SCORE, (n, 2), solver=sds.DPMSolverPP(), grid=grid, seed=1)


SAMPLERS: dict[str, Sampler] = {
    "Langevin": langevin,
    "MALA": mala,
    "annealed Langevin": annealed,
    "reverse SDE": reverse_sde,
    "probability flow": flow,
}


def share_of_small_mode(x: Tensor) -> float:
    """What falls on its side of the line halfway; the tails beyond it hold 1e-12."""
    return float((x.sum(1) < 0).double().mean())


def distance(x: Tensor, y: Tensor) -> Tensor:
    """Sliced 1-Wasserstein."""
    return sds.metrics.sliced_wasserstein(x, y, projections=64, p=1.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("outputs"), help="folder for the picture")
    parser.add_argument("--quick", action="store_true", help="fewer samples and budgets: a few seconds")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    n, budgets = (4_000, (20, 200)) if arguments.quick else (10_000, (20, 50, 100, 200, 500, 1000, 5000))

    exact = float(DATA.weights[1])
    chance = math.sqrt(exact * (1.0 - exact) / n)
    # A reference with its weights exact, and what samples without any error are from it
    modes = zip(DATA.means, DATA.weights, strict=True)
    truth = torch.cat([sds.Gaussian(mean, 1.0).sample(round(n * float(w)), seed=2) for mean, w in modes])
    perfect = torch.stack([distance(DATA.sample(n, seed=3 + k), truth) for k in range(10)])
    found = {name: [sampler(n, budget) for budget in budgets] for name, sampler in SAMPLERS.items()}

    print(f"Weight of the small mode, exactly {exact}; {n} samples: chance alone makes +- {2 * chance:.4f} of it")
    print(f"{'evaluations of the score':28s}" + "".join(f"{b:>9d}" for b in budgets))
    for name, runs in found.items():
        print(f"{name:28s}" + "".join(f"{share_of_small_mode(x):9.4f}" for x in runs))
    print(f"\nSliced Wasserstein distance to the law; its own samples: {perfect.mean():.3f} +- {perfect.std():.3f}")
    for name, runs in found.items():
        print(f"{name:28s}" + "".join(f"{float(distance(x, truth)):9.3f}" for x in runs))
    picture(found, budgets, exact, chance).savefig(arguments.out / "separated_modes.png")


def picture(found: dict[str, list[Tensor]], budgets: tuple[int, ...], exact: float, chance: float):
    shown = ("Langevin", "annealed Langevin", "reverse SDE")
    figure, axes = plotting.panels(5, titles=["Exact score", *shown, "Small mode's weight"], width=2.5, height=2.7)
    plotting.heatmap(axes[0], lambda x: DATA.log_prob(x).exp().sqrt(), WINDOW)
    plotting.arrows(axes[0], lambda x: SCORE(x, 0.0), WINDOW)
    for panel, name in zip(axes[1:4], shown, strict=True):
        x = found[name][-1]
        plotting.points(panel, x, WINDOW, most=2000)
        panel.set_xlabel(f"{1 - share_of_small_mode(x):.3f} and {share_of_small_mode(x):.3f}", fontsize=10)
    axes[0].set_xlabel(f"{1 - exact:.3f} and {exact:.3f}", fontsize=10)
    for i, (name, runs) in enumerate(found.items()):
        shares = [share_of_small_mode(x) for x in runs]
        style = {"color": plotting.COLOURS[i], "marker": "os^Dv"[i], "linestyle": ("-", ":")[i == 1]}
        axes[4].plot(budgets, shares, markersize=3.5, linewidth=1.4, label=name, **style)
    axes[4].axhspan(exact - 2 * chance, exact + 2 * chance, color="#cccccc", linewidth=0, zorder=0)
    axes[4].set(xscale="log", ylim=(0.0, 0.95), xlabel="evaluations of the score")
    axes[4].legend(frameon=False, fontsize=8, loc="upper right")
    return figure


if __name__ == "__main__":
    main()
