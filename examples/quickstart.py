"""The main job, in one run: exact errors of every solver, then handwritten digits learned and drawn.

Part 1 solves the reverse SDE and the probability flow of a 64-dimensional Gaussian with spectrum k^-2 and compares the
exact law of each discretised chain with the exact law of the process: no samples, so no Monte Carlo error.

Part 2 trains a score network on half of the 8x8 digits that ship with scikit-learn, draws new ones with the reverse SDE
and with the probability flow, and judges them in the feature space of a classifier trained on the same half.

Run it with `make demo`. Pictures go to the folder given by --out (default: outputs).
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn

import sdesolve as sds
from sdesolve import plotting

STEPS = (16, 32, 64, 128, 256, 512)


def exact_errors(out: Path) -> None:
    """Exact relative Wasserstein distance of each solver's law at the end of the grid, for several numbers of steps."""
    spectrum = torch.arange(1, 65, dtype=torch.float64) ** -2.0
    data = sds.Gaussian(torch.zeros(64), spectrum)
    process = sds.EDM()
    score = data.score(process)
    target = data.moments(process, process.t_min)
    scale = target.cov.sum().sqrt()
    chains = {
        "Euler-Maruyama, reverse SDE": (process.reverse(score), sds.EulerMaruyama()),
        "Heun, reverse SDE": (process.reverse(score), sds.Heun()),
        "Euler, probability flow": (process.probability_flow(score), sds.EulerMaruyama()),
        "Heun, probability flow": (process.probability_flow(score), sds.Heun()),
        "RK4, probability flow": (process.probability_flow(score), sds.RK4()),
    }
    print(
        "\nExact 2-Wasserstein distance to the data's law at t_min, relative to its size (64-d Gaussian, EDM process)"
    )
    print(f"{'steps':32s}" + "".join(f"{n:>10d}" for n in STEPS))
    curves = {}
    for name, (sde, solver) in chains.items():
        errors = []
        for n in STEPS:
            law = sds.oracle.chain_moments(
                sde, solver, process.time_grid(n), torch.zeros(64), process.prior.std**2, diagonal=True
            )
            errors.append(float(sds.metrics.bures_wasserstein(law.mean, law.cov, target.mean, target.cov) / scale))
        curves[name] = (STEPS, errors)
        print(f"{name:32s}" + "".join(f"{e:10.1e}" for e in errors))
    start = data.moments(process, process.t_max)
    floor = data.flow(process)  # exact flow of the prior's law: what is left when the solver makes no error
    spread = floor(torch.full((1, 64), process.prior.std, dtype=torch.float64), process.t_max, process.t_min)[0]
    prior_error = float(sds.metrics.bures_wasserstein(0 * start.mean, spread**2, target.mean, target.cov) / scale)
    print(f"starting from the prior instead of the process's own law costs {prior_error:.1e}, whatever the solver")
    figure = plotting.error_curves(
        curves,
        x_label="steps",
        y_label="relative Wasserstein distance",
        title="Exact error of the sampled law",
        orders=(1, 2),
        floor=("prior", prior_error),
    )
    figure.savefig(out / "solver_errors.png")


class Classifier(nn.Module):
    """A small convolutional classifier; its last hidden layer is the feature space of the Frechet distance."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Unflatten(1, (1, 8)),
            nn.Conv2d(1, 16, 3, padding=1),
            nn.SiLU(),
            nn.Conv2d(16, 32, 3, padding=1),
            nn.SiLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Dropout(0.3),
            nn.Linear(512, 32),
            nn.SiLU(),
        )
        self.head = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x))


def train_classifier(x: Tensor, y: Tensor, epochs: int = 60) -> Classifier:
    torch.manual_seed(0)
    net = Classifier().train()
    steps = epochs * (len(x) // 64)
    optimizer = torch.optim.AdamW(net.parameters(), 3e-3, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda k: 0.5 * (1 + math.cos(math.pi * k / steps)))
    for _ in range(epochs):
        for rows in torch.randperm(len(x)).split(64)[: len(x) // 64]:
            loss = nn.functional.cross_entropy(net(x[rows]), y[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return net.eval()


def digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Two stratified halves of the digits, pixel values in [-1, 1]: training images and labels, held-out ones."""
    raw = load_digits()
    images = torch.tensor(raw.images, dtype=torch.float32) / 8 - 1
    labels = torch.tensor(raw.target)
    first, second = train_test_split(range(len(labels)), test_size=0.5, random_state=0, stratify=raw.target)
    return images[first], labels[first], images[second], labels[second]


def draw_digits(out: Path, training_steps: int) -> None:
    """Trains on one half, draws, and compares with the other half."""
    x_train, y_train, x_held, y_held = digits()
    classifier = train_classifier(x_train, y_train)
    accuracy = (classifier(x_held).argmax(1) == y_held).float().mean()
    print(f"\nclassifier trained on {len(x_train)} digits: {accuracy:.1%} of {len(x_held)} held-out digits right")

    torch.manual_seed(0)
    process = sds.VP(sds.CosineBeta())
    score = sds.NetworkScore(sds.nn.ConvNet((8, 8)), process, predicts="edm", sigma_data=float(x_train.std()))
    loss = sds.DenoisingScoreMatching("simple", times="stratified")
    print(
        f"training a network of {sum(p.numel() for p in score.parameters()):,} weights on those {len(x_train)} digits"
    )
    options = {"batch_size": 64, "lr": 2e-3, "decay": "cosine", "ema": 0.995}
    run = sds.train(score, x_train, loss=loss, steps=training_steps, **options)
    print(f"{run.steps} steps in {run.seconds:.0f} s, loss {run.losses[-200:].mean():.3f}")

    # Four times as many as the held-out half: with equal numbers, chance in how often each digit comes up would count
    # for more in the distance than what is wrong with the digits.
    shape = (4 * len(x_held), 8, 8)
    karras = sds.grids.karras(process.t_max, process.t_min, 20)
    drawn = {
        "reverse SDE, Euler-Maruyama, 100 steps": sds.sample(process, score, shape, steps=100, seed=1),
        "probability flow, Heun, 20 steps": sds.sample(
            process, score, shape, grid=karras, seed=1, solver=sds.Heun(), stochasticity=0
        ),
    }
    judge(classifier, x_train, x_held, drawn)
    pictures(out, x_held, drawn, score)


def judge(classifier: Classifier, x_train: Tensor, x_held: Tensor, drawn: dict[str, Tensor]) -> None:
    """The second table: distances in feature space, confidence, and how near samples are to what was learned from."""
    rows = {"held-out digits (the floor)": x_train} | drawn
    with torch.no_grad():
        held = classifier.features(x_held)
        print(f"\n{'':40s}{'Frechet distance':>18s}{'confident > 0.9':>18s}{'nearest training':>18s}")
        for name, x in rows.items():
            shown = x_held if x is x_train else x
            distance = float(sds.metrics.frechet_distance(classifier.features(x), held))
            confident = float((classifier(shown).softmax(1).amax(1) > 0.9).float().mean())
            nearest = float(torch.cdist(shown.flatten(1), x_train.flatten(1)).amin(1).mean())
            print(f"{name:40s}{distance:18.2f}{confident:18.1%}{nearest:18.2f}")
    print(
        "Frechet distance: to the held-out half, in the classifier's last hidden layer; floor: the training half's.\n"
        "Nearest training: mean Euclidean distance to the closest training digit; far below the floor would be copying."
    )


def pictures(out: Path, x_held: Tensor, drawn: dict[str, Tensor], score: sds.NetworkScore) -> None:
    """Samples beside real digits, and one batch on its way from noise to digits."""
    process = score.process
    images = torch.cat([x_held[:16], *(x[:16].clamp(-1, 1) for x in drawn.values())])
    labels = ["real", "reverse SDE", "flow"]
    plotting.image_grid(images, columns=16, row_labels=labels, value_range=(-1, 1), title="Digits").savefig(
        out / "quickstart_digits.png"
    )
    grid = process.time_grid(200)
    start = process.sample_prior((8, 8, 8), seed=1)
    kept = [0, 80, 120, 150, 170, 185, 193, 200]
    with torch.no_grad():
        sol = sds.solve(
            process.reverse(score), start, grid=grid, solver=sds.EulerMaruyama(), seed=1, save_at=grid[kept]
        )
    frames = torch.cat([sol.xs, sds.tweedie(process, score, sol.x1, grid[-1].float())[None]])
    names = [f"t = {t:.2f}" for t in sol.ts] + ["denoised"]
    plotting.image_grid(
        frames.flatten(0, 1).clamp(-1, 1),
        columns=8,
        row_labels=names,
        value_range=(-1, 1),
        title="From noise to digits",
    ).savefig(out / "denoising.png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("outputs"), help="folder for the pictures")
    parser.add_argument("--training-steps", type=int, default=4000, help="of the score network")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    began = time.perf_counter()
    exact_errors(arguments.out)
    draw_digits(arguments.out, arguments.training_steps)
    print(f"\npictures in {arguments.out}; all done in {time.perf_counter() - began:.0f} s")


if __name__ == "__main__":
    main()
