"""An SDE as a generator: trained against a critic until its paths cannot be told from those of the data.

The data are paths of dY = (4 sin(6 t) - 1.5 Y) dt + 1.2 dW from Y(0) ~ N(0, 0.6^2), seen at 17 times. The generator is
a neural SDE in three dimensions that starts at a network of normals and is read out linearly; its paths and their
gradients are one generated kernel and its reverse. The critic is a neural controlled differential equation,
dH = f(H, t) dt + g(H, t) dY, whose end scores a path (Kidger, Foster, Li and Lyons 2021). In place of clipped weights,
with which torchsde's example takes 10,000 steps, it is held by its gradient at the data (Mescheder, Geiger and Nowozin
2018); the generator that is judged is the average over the second half of training, as there. The law of the data is
normal and known: means, deviations, correlations and Kolmogorov-Smirnov distances are judged by it, those of an
untrained generator and of other data beside them. Takes about 60 s.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

import sdesolve as sds
from sdesolve import plotting
from sdesolve.metrics import energy_distance

PULL, NOISE, START, FORCE, RATE = 1.5, 1.2, 0.6, 4.0, 6.0
STEPS = 16  # from one time to the next of a path
DATA = sds.SDE(lambda x, t: FORCE * torch.sin(RATE * t) - PULL * x, lambda x, t: NOISE * torch.ones_like(x), "additive")
PENALTY, EVERY = 0.03, 4  # of the critic's gradient, and in which steps

Backend = Literal["auto", "eager"]


def network(inputs: int, width: int, outputs: int) -> torch.nn.Sequential:
    return torch.nn.Sequential(torch.nn.Linear(inputs, width), torch.nn.SiLU(), torch.nn.Linear(width, outputs))


def with_time(x: Tensor, t: Tensor) -> Tensor:
    return torch.cat([x, t.expand(len(x), 1)], 1)


class Generator(torch.nn.Module):
    """Paths of numbers, ``(STEPS + 1, batch)``, each from ``size`` normals and a Brownian motion of that dimension."""

    def __init__(self, size: int, width: int) -> None:
        super().__init__()
        self.size = size
        self.start, self.read = network(size, width, size), torch.nn.Linear(size, 1)
        self.f, self.g = network(size + 1, width, size), network(size + 1, width, size)

    def drift(self, x: Tensor, t: Tensor) -> Tensor:
        return 3.0 * torch.tanh(self.f(with_time(x, t)))

    def diffusion(self, x: Tensor, t: Tensor) -> Tensor:
        return 2.0 * torch.sigmoid(self.g(with_time(x, t)))

    def forward(self, batch: int, seed: int, backend: Backend) -> tuple[Tensor, sds.Stats]:
        z = torch.randn(batch, self.size, generator=torch.Generator().manual_seed(seed))
        sol = sds.solve(
            sds.SDE(self.drift, self.diffusion), self.start(z), 0.0, 1.0, STEPS, solver=sds.EulerMaruyama(),
            seed=seed, save_at="grid", backend=backend,
        )  # fmt: skip
        return self.read(sol.xs)[:, :, 0], sol.stats


class Critic(torch.nn.Module):
    """A score of each path."""

    def __init__(self, size: int, width: int) -> None:
        super().__init__()
        self.start, self.read = network(1, width, size), torch.nn.Linear(size, 1)
        self.field = network(size + 1, width, 2 * size)

    def forward(self, y: Tensor) -> Tensor:
        y = 3.0 * y
        h = self.start(y[0, :, None])
        for k, dy in enumerate(y.diff(dim=0)):
            f, g = torch.tanh(self.field(with_time(h, torch.tensor(k / STEPS)))).chunk(2, 1)
            h = h + f / STEPS + g * dy[:, None]
        return self.read(h)[:, 0]


def real(batch: int, seed: int, backend: Backend) -> Tensor:
    """Paths of the data, ``(STEPS + 1, batch)``, in four steps to each time."""
    x0 = START * torch.randn(batch, 1, generator=torch.Generator().manual_seed(seed))
    save_at = torch.linspace(0.0, 1.0, STEPS + 1, dtype=torch.float64)
    return sds.solve(
        DATA, x0, 0.0, 1.0, 4 * STEPS, solver=sds.EulerMaruyama(), seed=seed, save_at=save_at, backend=backend,
    ).xs[:, :, 0]  # fmt: skip


def exact(t: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and deviation of the data."""
    mean = FORCE * (PULL * torch.sin(RATE * t) - RATE * torch.cos(RATE * t) + RATE * torch.exp(-PULL * t))
    variance = START**2 * torch.exp(-2 * PULL * t) + NOISE**2 * (1 - torch.exp(-2 * PULL * t)) / (2 * PULL)
    return mean / (PULL**2 + RATE**2), variance.sqrt()


def distance(y: Tensor, mean: Tensor, std: Tensor) -> float:
    """Kolmogorov and Smirnov's, of a sample from a normal law."""
    F = torch.special.ndtr((y.sort().values - mean) / std)
    i = torch.arange(1, len(y) + 1) / len(y)
    return float(torch.maximum((i - F).abs(), (i - 1 / len(y) - F).abs()).max())


def trained(generator: Generator, iterations: int, batch: int, backend: Backend) -> torch.nn.Module:
    """The average of the generator over the second half of a game with a critic."""
    critic = Critic(size=16, width=32)
    ours = torch.optim.Adam(generator.parameters(), lr=2e-3, betas=(0.5, 0.9))
    theirs = torch.optim.Adam(critic.parameters(), lr=4e-3, betas=(0.5, 0.9))
    schedules = [
        torch.optim.lr_scheduler.LambdaLR(o, lambda i: min(1.0, 2.1 - 2 * i / iterations)) for o in (ours, theirs)
    ]
    average = torch.optim.swa_utils.AveragedModel(generator)
    softplus = torch.nn.functional.softplus
    for i in range(iterations):
        fake, _ = generator(batch, i, backend)
        data = real(batch, seed=1_000_000 + i, backend=backend).requires_grad_(i % EVERY == 0)
        of_data, of_fake = critic(torch.cat([data, fake.detach()], 1)).chunk(2)
        loss = softplus(-of_data).mean() + softplus(of_fake).mean()
        if data.requires_grad:
            (slope,) = torch.autograd.grad(of_data.sum(), data, create_graph=True)
            loss = loss + 0.5 * PENALTY * EVERY * slope.square().sum(0).mean()
        theirs.zero_grad()
        loss.backward()
        theirs.step()

        ours.zero_grad()
        softplus(-critic(fake)).mean().backward()
        ours.step()
        for schedule in schedules:
            schedule.step()
        if i >= iterations // 2:
            average.update_parameters(generator)
    return average.module


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("outputs"), help="folder for the picture")
    parser.add_argument("--quick", action="store_true", help="few steps of training: a few seconds")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    iterations, batch, many = (50, 64, 2000) if arguments.quick else (1000, 256, 20_000)
    backend: Backend = "eager" if arguments.quick else "auto"  # compiling takes longer than a few steps

    torch.manual_seed(0)
    generator = Generator(size=3, width=24)
    with torch.no_grad():
        before, _ = generator(many, 5_000_000, backend)
    average = trained(generator, iterations, batch, backend)
    with torch.no_grad():
        made, stats = average(many, 5_000_000, backend)
        data, other = (real(many, seed, backend) for seed in (6_000_000, 7_000_000))
    ts = torch.linspace(0.0, 1.0, STEPS + 1)
    mean, std = exact(ts)
    print(f"{iterations} steps of training; the generator ran {stats.execution}: {stats.reason.split(';')[0]}")
    print(f"\n{many} paths{'mean':>10s}{'exact':>9s}{'deviation':>12s}{'exact':>9s}")
    for k in range(0, STEPS + 1, 4):
        row = float(made[k].mean()), float(mean[k]), float(made[k].std()), float(std[k])
        print(f"t = {float(ts[k]):4.2f}  {row[0]:12.3f}{row[1]:9.3f}{row[2]:12.3f}{row[3]:9.3f}")
    half = STEPS // 2
    law = math.exp(-PULL * 0.5) * float(std[half] / std[-1])
    print(f"\n{'':22s}{'correlation':>12s}{'KS distance':>13s}{'energy distance':>17s}")
    print(f"{'':22s}{'of 1/2 and 1':>12s}{'over times':>13s}{'of paths':>17s}")
    for name, y in (("untrained generator", before), ("generator", made), ("other paths of data", other)):
        correlation = float(torch.corrcoef(torch.stack([y[half], y[-1]]))[0, 1])
        ks = sum(map(distance, y, mean, std)) / len(y)
        energy = energy_distance(y[:, :2000].T, data[:, :2000].T)
        print(f"{name:22s}{correlation:12.3f}{ks:13.3f}{float(energy.value):17.4f}")
    print(f"{'exact':22s}{law:12.3f}")

    figure, (left, right) = plotting.panels(2, titles=["Paths", "At t = 1/2"], width=4.6, height=3.4)
    blue, red = plotting.COLOURS[:2]
    left.plot(ts, made[:, :40], color=blue, linewidth=0.5, alpha=0.6)
    left.fill_between(ts, mean - 2 * std, mean + 2 * std, color=red, alpha=0.15, linewidth=0)
    left.plot(ts, mean, color=red, linewidth=1.6, label="data: exact mean, 2 deviations")
    left.plot(ts, made.mean(1), color=blue, linewidth=1.6, label="generator: paths, mean")
    left.plot(ts, before.mean(1), color="0.5", linewidth=1.2, linestyle="--", label="untrained: mean")
    left.set(xlabel="time", ylim=(-3.2, 2.8))
    left.legend(frameon=False, fontsize=8)
    for y, colour, name in ((before, "0.5", "untrained"), (made, blue, "generator")):
        right.hist(y[half].numpy(), bins=60, density=True, color=colour, alpha=0.5, label=name)
    x = torch.linspace(float(mean[half] - 4 * std[half]), float(mean[half] + 4 * std[half]), 200)
    density = torch.exp(-0.5 * ((x - mean[half]) / std[half]).square()) / (std[half] * math.sqrt(2 * math.pi))
    right.plot(x, density, color=red, linewidth=1.6, label="data, exact")
    right.legend(frameon=False, fontsize=8)
    figure.savefig(arguments.out / "sde_gan.png")


if __name__ == "__main__":
    main()
