"""A latent SDE learned from an electroencephalogram, half of whose samples are hidden, beside the exact answer.

The signal is a noisy look at a latent process: an Ornstein-Uhlenbeck prior dX = -theta X dt + sigma dW, and a posterior
of the same diffusion whose drift is a network of the state and of time. The bound of the evidence,

    E sum_i log p(y_i | X(t_i)) - KL(X(0)) - KL(path),

takes the divergence of the two laws on paths from ``solve(..., kl_to=prior)``; network and prior are trained together
by it, each step one generated kernel and its reverse (Li, Wong, Chen and Duvenaud 2020). With this prior the exact
posterior is Gaussian, so all is judged by it: the bound by the evidence, the learned prior by that of largest evidence,
the filled-in samples by the exact ones. The data come with matplotlib (an EEG of 4 channels). Takes about 50 s.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from matplotlib import cbook
from torch import Tensor

import sdesolve as sds
from sdesolve import plotting

Backend = Literal["auto", "eager"]
RATE = 80.0  # samples a second
SUBSTEPS = 2  # of the solver, to a sample
TAU = 0.25  # deviation of a sample from the latent state


class Data(NamedTuple):
    """Times in seconds, the signal in units of its deviation, and which samples are seen."""

    ts: Tensor
    y: Tensor
    seen: Tensor


def electroencephalogram(count: int) -> Data:
    with cbook.get_sample_data("eeg.dat") as file:
        values = np.frombuffer(file.read(), dtype=float).reshape(800, 4)[:count, 0]
    y = torch.tensor((values - values.mean()) / values.std(), dtype=torch.float32)
    seen = torch.rand(count, generator=torch.Generator().manual_seed(0)) < 0.5
    seen[0] = seen[-1] = True
    return Data(torch.arange(count, dtype=torch.float64) / RATE, y, seen)


class Latent(torch.nn.Module):
    """Prior and posterior of a latent state of one dimension.

    Args:
        end: the last time.
        harmonics: of time, that the posterior's drift sees.
        width: of its network.
    """

    def __init__(self, end: float, harmonics: int, width: int) -> None:
        super().__init__()
        self.frequencies = torch.nn.Buffer(math.pi / end * torch.arange(1, harmonics + 1))
        self.of_time = torch.nn.Linear(2 * harmonics, width)
        self.of_state = torch.nn.Linear(1, width, bias=False)
        self.out = torch.nn.Linear(width, 1)
        self.log_theta, self.log_sigma, self.log_std = (
            torch.nn.Parameter(torch.tensor(math.log(v))) for v in (10.0, 4.0, 0.3)
        )
        self.mean = torch.nn.Parameter(torch.tensor(0.0))

    def prior(self, x: Tensor, t: Tensor) -> Tensor:
        return -self.log_theta.exp() * x

    def drift(self, x: Tensor, t: Tensor) -> Tensor:
        phase = self.frequencies * t  # of time alone: a kernel has it from a table
        hidden = torch.tanh(self.of_time(torch.cat([phase.sin(), phase.cos()])) + self.of_state(x))
        return 10.0 * self.out(hidden) - 5.0 * x

    def diffusion(self, x: Tensor, t: Tensor) -> Tensor:
        return self.log_sigma.exp() * torch.ones_like(x)

    def bound(self, data: Data, paths: int, seed: int, backend: Backend) -> tuple[Tensor, sds.Solution]:
        """The bound along each path, and the paths."""
        z = torch.randn(paths, 1, generator=torch.Generator().manual_seed(seed))
        x0 = self.mean + self.log_std.exp() * z
        steps = (len(data.ts) - 1) * SUBSTEPS
        sol = sds.solve(
            sds.SDE(self.drift, self.diffusion, noise="additive"), x0, 0.0, float(data.ts[-1]), steps,
            solver=sds.EulerMaruyama(), seed=seed, save_at=data.ts, kl_to=self.prior,
            backend=backend,
        )  # fmt: skip
        misfit = (data.y[:, None] - sol.xs[:, :, 0])[data.seen] / TAU
        log_likelihood = -(0.5 * misfit.square() + math.log(TAU * math.sqrt(2 * math.pi))).sum(0)
        std, spread = self.log_std.exp(), self.log_sigma.exp() / torch.sqrt(2 * self.log_theta.exp())
        start = 0.5 * ((std / spread).square() + (self.mean / spread).square() - 1) + torch.log(spread / std)
        return log_likelihood - start - sol.kl, sol


def exact(theta: Tensor, sigma: Tensor, data: Data) -> tuple[Tensor, Tensor, Tensor]:
    """Log evidence, and the posterior's mean and deviation at all samples, of the prior in the solver's own steps."""
    h = 1.0 / RATE / SUBSTEPS
    a = 1 - theta * h
    grid = torch.arange((len(data.ts) - 1) * SUBSTEPS + 1)
    powers = a.double() ** (2 * grid)
    variance = powers * sigma**2 / (2 * theta) + sigma**2 * h * (1 - powers) / (1 - a**2)
    at = grid[::SUBSTEPS]
    first = torch.minimum(at[:, None], at)
    K = variance[first] * a.double() ** ((at[:, None] - at).abs())
    S = K[data.seen][:, data.seen] + TAU**2 * torch.eye(int(data.seen.sum()), dtype=torch.float64)
    L = torch.linalg.cholesky(S)
    y = data.y[data.seen].double()
    z = torch.linalg.solve_triangular(L, y[:, None], upper=False)
    evidence = -0.5 * z.square().sum() - L.diagonal().log().sum() - 0.5 * len(y) * math.log(2 * math.pi)
    half = torch.linalg.solve_triangular(L, K[data.seen], upper=False)
    return evidence, (half.mT @ z)[:, 0], (K.diagonal() - half.square().sum(0)).sqrt()


def of_largest_evidence(data: Data) -> Tensor:
    """theta, sigma."""
    logs = torch.tensor([math.log(10.0), math.log(4.0)], dtype=torch.float64, requires_grad=True)
    optimiser = torch.optim.LBFGS([logs], max_iter=100, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimiser.zero_grad()
        value = -exact(*logs.exp(), data)[0]
        value.backward()
        return value

    optimiser.step(loss)
    return logs.detach().exp()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("outputs"), help="folder for the picture")
    parser.add_argument("--quick", action="store_true", help="fewer steps of training: a few seconds")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    count, iterations, paths, many = (16, 8, 8, 256) if arguments.quick else (96, 1500, 32, 8192)

    backend: Backend = "eager" if arguments.quick else "auto"  # compiling takes longer than a few steps

    data = electroencephalogram(count)
    hidden = ~data.seen
    torch.manual_seed(0)
    model = Latent(float(data.ts[-1]), harmonics=count // 2, width=64)
    optimiser = torch.optim.Adam(model.parameters(), lr=0.01)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, iterations)
    curve = []
    for i in range(iterations):
        optimiser.zero_grad()
        bounds, _ = model.bound(data, paths, i, backend)
        (-bounds.mean()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 100.0)
        optimiser.step()
        schedule.step()
        curve.append(float(bounds.detach().mean()))

    with torch.no_grad():
        bounds, sol = model.bound(data, many, 10_000_000, backend)
        learned = torch.stack([model.log_theta, model.log_sigma]).exp()
        evidence, mean, std = exact(*learned, data)
        weights = sol.log_weight + (bounds + sol.kl)  # of the joint law with the data over the posterior's
        tight = torch.logsumexp(weights.double(), 0) - math.log(many)
    best = of_largest_evidence(data)
    error = float(bounds.std()) / many**0.5
    print(f"{int(data.seen.sum())} samples of {count} seen; {iterations} steps of training, {sol.stats.execution}: "
          f"{sol.stats.reason.split(';')[0]}")  # fmt: skip
    print(f"\n{'log evidence, of the learned prior:':44s}{float(evidence):10.2f}")
    print(f"{'its bound, by paths of the posterior:':44s}{float(bounds.mean()):10.2f} +- {error:.2f}")
    print(f"{'the same paths under their weights:':44s}{float(tight):10.2f}")
    print(f"{'log evidence, of the best prior:':44s}{float(exact(*best, data)[0]):10.2f}")
    print(f"\n{'prior':14s}{'theta':>10s}{'sigma':>10s}")
    for name, values in (("learned", learned), ("best", best)):
        print(f"{name:14s}" + "".join(f"{v:10.3f}" for v in values.tolist()))

    found, spread = sol.xs[:, :, 0].mean(1), sol.xs[:, :, 0].std(1)
    straight = torch.tensor(np.interp(data.ts, data.ts[data.seen], data.y[data.seen]))
    total = (spread.square() + TAU**2).sqrt()
    within = ((data.y - found).abs() < 1.645 * total)[hidden].float().mean()
    print(f"\n{int(hidden.sum())} hidden samples: root mean square error")
    for name, guess in (("latent SDE", found), ("exact posterior", mean), ("straight lines", straight)):
        print(f"{name:18s}{float((guess - data.y)[hidden].square().mean().sqrt()):8.3f}")
    off = ((found - mean).square().mean() / std.square().mean()).sqrt()
    print(f"{float(within):.0%} of them within the band that holds 90%; the mean is {float(off):.2f} deviations of the "
          f"exact posterior from its own, deviations are {float(spread.mean() / std.mean()):.2f} of its")  # fmt: skip

    figure, (left, right) = plotting.panels(2, titles=["EEG, half of it hidden", "Training"], width=5.2, height=3.4)
    blue, red = plotting.COLOURS[:2]
    left.fill_between(data.ts, found - 1.645 * total, found + 1.645 * total, color=blue, alpha=0.25, linewidth=0)
    left.plot(data.ts, found, color=blue, linewidth=1.4, label="latent SDE, 90%")
    left.plot(data.ts, mean, color=red, linewidth=0.9, linestyle="--", label="exact posterior")
    left.plot(data.ts[data.seen], data.y[data.seen], "k.", markersize=4, label="seen")
    left.plot(data.ts[hidden], data.y[hidden], ".", color="0.6", markersize=4, label="hidden")
    left.set(xlabel="seconds", ylabel="signal, in deviations")
    left.legend(frameon=False, fontsize=8, ncols=2)
    right.plot(curve, color=blue, linewidth=0.7, label="bound, a step")
    right.axhline(float(evidence), color=red, linewidth=1.0, label="log evidence at the end")
    right.set(xlabel="step", ylabel="nats", ylim=(float(evidence) - 80, float(evidence) + 15))
    right.legend(frameon=False, fontsize=9)
    figure.savefig(arguments.out / "latent_sde.png")


if __name__ == "__main__":
    main()
