"""Flows and bridges between laws that are known, so that everything learned can be judged by what is exact.

A network learns the velocity from noise to a mixture by flow matching, and samples by it are compared with those by the
exact velocity. From it a flow map is distilled, which draws by one call, and is judged by the exact flow from the same
noise; the flow itself is also run in parallel over time. Two networks learn the Schroedinger bridge between two
Gaussians, whose closed form says how its ends belong together. Takes about a minute.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor, nn

import sdesolve as sds
from sdesolve import plotting

TARGET = sds.GaussianMixture(
    torch.tensor([[2.0, 1.0], [0.5, -1.5], [-1.5, 1.0]]),
    torch.tensor([0.4, 0.25, 0.3]),
    weights=torch.tensor([0.3, 0.4, 0.3]),
)
PROCESS = sds.Rectified(data_at=1)  # the network's time goes from noise to data
EXACT = TARGET.score(PROCESS)
LEFT = sds.Gaussian(torch.tensor([-1.5, 0.0]), torch.tensor([[0.6, 0.3], [0.3, 0.5]]))
RIGHT = sds.Gaussian(torch.tensor([1.5, 0.5]), torch.tensor([[0.3, -0.15], [-0.15, 0.4]]))
NOISE = 0.7
WINDOW = (-3.5, 3.5, -3.0, 3.0)
FLOW = {"solver": sds.DPMSolverPP(2), "steps": 40, "backend": "eager"}


class Denoiser(nn.Module):
    """``D(x, s, t)`` of a flow map: sees the state at unit scale, and both levels of noise."""

    def __init__(self, width: int = 96) -> None:
        super().__init__()
        layers = [
            nn.Linear(8, width),
            nn.SiLU(),
            nn.Linear(width, width),
            nn.SiLU(),
            nn.Linear(width, width),
            nn.SiLU(),
        ]
        self.net = nn.Sequential(*layers, nn.Linear(width, 2))

    def forward(self, x: Tensor, s: Tensor, t: Tensor) -> Tensor:
        scale = (PROCESS.sigma(s) ** 2 + PROCESS.alpha(s) ** 2).sqrt()[:, None]
        a, b = (0.1 * PROCESS.log_snr(u.clamp_min(PROCESS.t_min))[:, None] for u in (s, t))
        return self.net(torch.cat([x / scale, a, b, (2 * a).sin(), (2 * b).sin(), (4 * a).cos(), (4 * b).cos()], 1))


def distance(x: Tensor) -> float:
    """Sliced Wasserstein distance to the target, the mean over five samples of it."""
    return sum(float(sds.metrics.sliced_wasserstein(x, TARGET.sample(len(x), seed=50 + k))) for k in range(5)) / 5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("outputs"), help="folder for the picture")
    parser.add_argument("--quick", action="store_true", help="shorter training, fewer samples: some seconds")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    n, part = (2000, 0.1) if arguments.quick else (10_000, 1.0)
    options = {"batch_size": 256, "lr": 2e-3, "decay": "cosine", "ema": 0.998, "progress": False}

    score = sds.NetworkScore(sds.nn.MLP(2, width=96, depth=2), PROCESS, "flow")
    data = TARGET.sample(50_000, seed=0)
    sds.train(score, data, loss=sds.FlowMatching(times="stratified"), steps=int(2400 * part), **options)
    flow_map = sds.FlowMap(Denoiser(), PROCESS)
    sds.train(flow_map, data, loss=sds.FlowMapDistillation(score, 40), steps=int(900 * part), **options)
    noise = PROCESS.prior.sample((n, 2), seed=9)
    exact = sds.sample(PROCESS, EXACT, x0=noise, **FLOW)
    learned = sds.sample(PROCESS, score, x0=noise, **FLOW)
    with torch.no_grad():
        one = flow_map(noise, PROCESS.t_max)
    print(f"Sliced Wasserstein distance to the mixture, {n} samples")
    for name, x in {
        "samples of the law itself": TARGET.sample(n, seed=99),
        "exact flow, 40 steps": exact,
        "learned flow, 40 steps": learned,
        "distilled map, one call": one,
        "distilled map, three calls": flow_map.sample(
            (n, 2), seed=9, grid=torch.tensor([PROCESS.t_max, 0.7, 0.4, 0.0])
        ),
        "exact flow, one step": sds.sample(PROCESS, EXACT, x0=noise, solver=sds.DDIM(), steps=1),
    }.items():
        off = float((x - exact).square().sum(1).mean().sqrt())
        print(f"{name:28s}{distance(x):9.4f}" + (f"   from the exact flow {off:.3f}" if "law" not in name else ""))

    print(f"learned over exact: {distance(learned) / distance(exact):.2f}")

    run = {"solver": sds.SDEDPMSolverPP(2), "steps": 100, "seed": 3}
    together = sds.sample_in_parallel(PROCESS, score, (500, 2), **run)
    off = float((together.x - sds.sample(PROCESS, score, (500, 2), backend="eager", **run)).square().mean().sqrt())
    print(f"\nIn parallel: {together.calls} calls in place of {together.evaluations}, samples off by {off:.1e}")

    model = sds.FlowModel(
        sds.nn.MLP(2, width=32, depth=1), sds.StochasticInterpolant(NOISE), sds.nn.MLP(2, width=32, depth=1)
    )
    bridge = sds.gaussian_bridge(LEFT, RIGHT, NOISE)
    a, b = LEFT.sample(5000, seed=1), RIGHT.sample(5000, seed=2)
    sds.fit_bridge(model, a, b, rounds=3, steps=int(300 * max(part, 0.6)), solver_steps=30, **options)
    with torch.no_grad():
        sde, start = sds.FlowSDE(model, NOISE), LEFT.sample(n, seed=5)
        paths = sds.solve(sde, start, 0.0, 1.0, steps=40, solver=sds.Heun(), seed=6, save_at="grid", backend="eager")
    ends = torch.cat([paths.xs[0], paths.x1], 1).T
    print(f"\nSchroedinger bridge: covariance of its ends, and of where it arrives ({n} paths)")
    for name, found, true in (
        ("ends, xx", torch.cov(ends)[0, 2], bridge.cross[0, 0]),
        ("ends, yx", torch.cov(ends)[1, 2], bridge.cross[1, 0]),
        ("ends, yy", torch.cov(ends)[1, 3], bridge.cross[1, 1]),
        ("arrival, xx", torch.cov(ends)[2, 2], RIGHT.cov[0, 0]),
        ("arrival, xy", torch.cov(ends)[2, 3], RIGHT.cov[0, 1]),
    ):
        print(f"{name:28s}{float(found):9.3f}   exactly {float(true):.3f}")
    picture(learned, one, paths.xs, noise, score).savefig(arguments.out / "flows.png")


def picture(learned: Tensor, one: Tensor, paths: Tensor, noise: Tensor, score: sds.NetworkScore):
    titles = ["Learned flow", "Its samples", "One call", "Schroedinger bridge"]
    figure, axes = plotting.panels(4, titles=titles, width=2.8, height=2.6)
    flow = sds.sample(PROCESS, score, x0=noise[:60], save_at="grid", **FLOW)
    for panel, xs in ((axes[0], flow.xs), (axes[3], paths[:, :40])):
        panel.plot(xs[:, :, 0].detach(), xs[:, :, 1].detach(), color=plotting.COLOURS[0], linewidth=0.6, alpha=0.7)
        panel.plot(xs[-1, :, 0].detach(), xs[-1, :, 1].detach(), ".", color=plotting.COLOURS[1], markersize=4)
        panel.set(xlim=WINDOW[:2], ylim=WINDOW[2:], xticks=[], yticks=[])
    for panel, x in ((axes[1], learned), (axes[2], one)):
        plotting.points(panel, x, WINDOW, most=2000)
    return figure


if __name__ == "__main__":
    main()
