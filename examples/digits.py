"""Handwritten digits, class by class: a U-Net learned from half of them, drawn with both kinds of guidance.

The network sees the training half of the 8x8 digits that ship with scikit-learn, with labels, of which some are dropped.
A guidance scale then trades likeness for variety: the table shows it against two numbers that a second network gives,
a classifier that learned from the other half: the Frechet distance between its features of samples and of real digits,
and the share of samples that it takes for the digit they were meant to be. Classifier guidance does the same with the
gradient of a classifier of noised digits.

    python examples/digits.py --out outputs     # about 15 minutes on 2 cores; stopped, it goes on where it was

`digits_inpainting.py` and `digits_likelihood.py` use the network that this leaves in the output folder.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, final

import torch
from quickstart import Classifier, train_classifier
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn

import sdesolve as sds
from sdesolve import plotting

STEPS = 9000
LEVELS = 17  # the digits have values 0 ... 16
PIXELS = sds.Quantisation(bits=5, low=-1.0, high=-1.0 + 2 * 32 / LEVELS)
PROCESS = sds.VP(sds.CosineBeta())
EVALUATIONS = 35
CFG_SCALES = (1.0, 1.1, 1.25, 1.5, 2.0, 3.0)
CLASSIFIER_SCALES = (0.0, 1.0, 2.0, 4.0)


class Half(NamedTuple):
    """Half of the digits: integers ``(samples, 8, 8)`` and their labels."""

    pixels: Tensor
    labels: Tensor

    @property
    def images(self) -> Tensor:
        """The middles of the bins, in [-1, 1]."""
        return centres(self.pixels)


def centres(pixels: Tensor) -> Tensor:
    return (PIXELS.low + PIXELS.width * (pixels + 0.5)).float()


def rounded(x: Tensor) -> Tensor:
    """Samples as what real digits are: 17 levels."""
    return centres(PIXELS.quantise(x.clamp(-1.0, 0.999)))


def halves() -> tuple[Half, Half]:
    """The half to learn from, and the half held out; every digit is in both equally often."""
    raw = load_digits()
    pixels, labels = torch.tensor(raw.images).long(), torch.tensor(raw.target)
    first, second = train_test_split(range(len(labels)), test_size=0.5, random_state=0, stratify=raw.target)
    return Half(pixels[first], labels[first]), Half(pixels[second], labels[second])


def dequantised(half: Half, times: int) -> tuple[Tensor, Tensor]:
    """Continuous data: each digit so many times, with fresh noise within its bins, and the labels."""
    n = len(half.pixels)
    x = [PIXELS.dequantise(half.pixels, seed=0, first_sample=k * n) for k in range(times)]
    return torch.cat(x), half.labels.repeat(times)


def learned_score(folder: Path, half: Half, steps: int = STEPS) -> sds.NetworkScore:
    """The score of all digits, ``score.given(labels)`` that of each class; from ``folder`` if it was learned before."""
    torch.manual_seed(0)
    net = sds.nn.UNet((8, 8), channels=32, multipliers=(1, 2), blocks=2, classes=10, dropout=0.1)
    x, labels = dequantised(half, 64)
    score = sds.NetworkScore(net, PROCESS, "edm", sigma_data=float(x.std()))
    loss = sds.DenoisingScoreMatching("simple", times="stratified")
    options = {"batch_size": 64, "lr": 2e-3, "decay": "cosine", "ema": 0.999, "label_dropout": 0.15}
    print(f"a network of {sum(p.numel() for p in net.parameters()):,} weights, {len(half.labels)} digits to learn from")
    run = sds.train(score, x, labels=labels, loss=loss, steps=steps, checkpoint=folder, **options)
    print(f"{run.steps - run.resumed_from} of {run.steps} steps now, in {run.seconds:.0f} s")
    return score


@final
class NoisedClassifier(nn.Module):
    """``p(label | x_t)``: the digits' classifier, told the noise level by a channel of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.time = nn.Sequential(nn.Linear(1, 32), nn.SiLU(), nn.Linear(32, 32))
        self.inlet = nn.Conv2d(1, 32, 3, padding=1)
        self.body = nn.Sequential(
            nn.SiLU(), nn.Conv2d(32, 64, 3, padding=1), nn.SiLU(), nn.AvgPool2d(2), nn.Conv2d(64, 64, 3, padding=1),
            nn.SiLU(), nn.Flatten(), nn.Dropout(0.2), nn.Linear(1024, 10),
        )  # fmt: skip

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        level = 0.25 * PROCESS.log_snr(t.double()).to(x)
        return self.body(self.inlet(x[:, None]) + self.time(level[:, None])[:, :, None, None])


def train_noised_classifier(half: Half, steps: int) -> NoisedClassifier:
    torch.manual_seed(0)
    net, batch = NoisedClassifier().train(), 128
    x, labels = dequantised(half, 16)
    optimizer = torch.optim.AdamW(net.parameters(), 2e-3, weight_decay=1e-2)
    for k in range(steps):
        rows = torch.randint(len(x), (batch,))
        loss = sds.noised_cross_entropy(net, PROCESS, x[rows], labels[rows], seed=0, first_sample=k * batch).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return net.eval()


def draw(score: Callable[[Tensor, Tensor], Tensor], count: int, *, seed: int = 0) -> Tensor:
    """Digits by the probability flow, rounded to 17 levels."""
    x = sds.sample(
        PROCESS, score, (count, 8, 8), solver=sds.DPMSolverPP(2), grid=sds.grids.karras_sigma(PROCESS, EVALUATIONS - 1),
        stochasticity=0, seed=seed,
    )  # fmt: skip
    return rounded(x)


class Judge:
    """A classifier that learned from the held-out half alone."""

    def __init__(self, learned: Half, held: Half) -> None:
        self.net = train_classifier(held.images, held.labels)
        self.real, self.known = self._features(held.images), learned.images
        self.floor = self.distance(learned.images)

    @torch.no_grad()
    def _features(self, images: Tensor) -> Tensor:
        return self.net.features(images)

    def distance(self, images: Tensor) -> float:
        """Frechet distance to the held-out digits in the space of the classifier's last hidden layer."""
        return float(sds.metrics.frechet_distance(self._features(images), self.real))

    @torch.no_grad()
    def recognised(self, images: Tensor, labels: Tensor) -> float:
        """Share of images taken for their digit."""
        return float((self.net(images).argmax(1) == labels).float().mean())

    def nearest(self, images: Tensor) -> float:
        """Mean Euclidean distance to the closest digit that the network learned from."""
        return float(torch.cdist(images.flatten(1), self.known.flatten(1)).amin(1).mean())

    def row(self, name: str, images: Tensor, labels: Tensor) -> str:
        d = self.distance(images)
        shares = f"{self.recognised(images, labels):14.1%}{self.nearest(images):12.2f}"
        return f"{name:44s}{d:10.2f}{d / self.floor:12.2f}{shares}"


def sweep(score: sds.NetworkScore, learned: Half, held: Half, classifier_steps: int) -> dict[str, Tensor]:
    """The table, and ten digits of each class for some of its rows."""
    judge, noised = Judge(learned, held), train_noised_classifier(learned, classifier_steps)
    # As many samples as held-out digits, and of the same classes: what is compared then is how they are drawn.
    labels = held.labels
    print(f"\n{'':44s}{'Frechet':>10s}{'over real':>12s}{'recognised':>14s}{'nearest':>12s}")
    print(judge.row("real: the learned half against the other", learned.images, learned.labels))
    rows = {f"classifier-free guidance, scale {w:g}": _free(score, labels, w) for w in CFG_SCALES}
    rows |= {
        f"classifier guidance, scale {w:g}": sds.ClassifierGuidance(score, noised, labels, w) for w in CLASSIFIER_SCALES
    }
    for name, guided in rows.items():
        print(judge.row(name, draw(guided, len(labels)), labels))
    print(
        "Frechet: distance to the held-out digits. Over real: its ratio to that of the learned half. Recognised: by a\n"
        "classifier that learned from the held-out half. Nearest: mean distance to the closest digit learned from; held-out\n"
        f"digits have {judge.nearest(held.images):.2f}, and much less would be copying."
    )
    each = torch.arange(10)
    return {
        "real": torch.stack([held.images[held.labels == k][0] for k in each]),
        **{f"scale {w:g}": draw(_free(score, each, w), 10, seed=3) for w in (1.0, 1.5, 3.0)},
        "classifier, scale 2": draw(sds.ClassifierGuidance(score, noised, each, 2.0), 10, seed=3),
    }


def _free(score: sds.NetworkScore, labels: Tensor, scale: float) -> Callable[[Tensor, Tensor], Tensor]:
    return sds.ClassifierFreeGuidance(score.given(labels), score, scale=scale)


def arguments(description: str | None) -> argparse.Namespace:
    """What all three scripts take."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("outputs"), help="folder for pictures and the network")
    parser.add_argument("--steps", type=int, default=STEPS, help="of training; a run of another length starts anew")
    found = parser.parse_args()
    found.out.mkdir(parents=True, exist_ok=True)
    return found


def main() -> None:
    chosen = arguments(__doc__)
    learned, held = halves()
    score = learned_score(chosen.out / f"digits-{chosen.steps}", learned, chosen.steps)
    rows = sweep(score, learned, held, min(1500, chosen.steps))
    figure = plotting.image_grid(
        torch.cat(list(rows.values())), columns=10, row_labels=list(rows), value_range=(-1, 1), title="Digits by class"
    )
    figure.savefig(chosen.out / "digits_by_class.png")
    print(f"picture: {chosen.out / 'digits_by_class.png'}")


if __name__ == "__main__":
    main()
