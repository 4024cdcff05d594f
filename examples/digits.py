"""Handwritten digits, class by class: a U-Net learned from half of them, drawn with both kinds of guidance.

The network sees half of the 8x8 digits that ship with scikit-learn, and their labels, some of which are dropped. A
guidance scale then trades variety for likeness: the table shows it by two numbers from a classifier that learned from
the other half, the Frechet distance between its features of samples and of real digits, and the share of samples that
it takes for the digit they were meant to be. Classifier guidance does the same with the gradient of a classifier of
noised digits.

    python examples/digits.py --out outputs     # about 15 minutes on 2 cores; stopped, it goes on where it was

`digits_inpainting.py` and `digits_likelihood.py` use the network that this leaves in the output folder.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, final

import torch
from quickstart import train_classifier
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.nn import functional as F

import sdesolve as sds
from sdesolve import plotting

STEPS = 9000
PIXELS = sds.Quantisation(levels=17)  # the digits have values 0 ... 16, here on [-1, 1]
SIGMA_DATA = 0.7
ANY = 10  # the class of any digit
# Of warping: radians, log scale, shear, and two shifts in halves of the image.
LIMITS = torch.tensor([0.2, 0.12, 0.2, 0.2, 0.2])
PROCESS = sds.VP(sds.CosineBeta())
EVALUATIONS = 35
CFG_SCALES = (1.0, 1.1, 1.25, 1.5, 2.0, 3.0)
CLASSIFIER_SCALES = (1.0, 2.0, 4.0)


class Half(NamedTuple):
    """Half of the digits: integers ``(samples, 8, 8)`` and their labels."""

    pixels: Tensor
    labels: Tensor

    @property
    def images(self) -> Tensor:
        """The middles of the bins, in [-1, 1]."""
        return PIXELS.value(self.pixels)


def rounded(x: Tensor) -> Tensor:
    """Samples as what real digits are: 17 levels."""
    return PIXELS.value(PIXELS.quantise(x.clamp(-1.0, 1.0)))


def halves() -> tuple[Half, Half]:
    """The half to learn from, and the half held out; every digit is in both equally often."""
    raw = load_digits()
    pixels, labels = torch.tensor(raw.images).long(), torch.tensor(raw.target)
    first, second = train_test_split(range(len(labels)), test_size=0.5, random_state=0, stratify=raw.target)
    return Half(pixels[first], labels[first]), Half(pixels[second], labels[second])


def warped(pixels: Tensor, generator: torch.Generator) -> Tensor:
    """Each digit turned, sheared, scaled and moved a little, in 17 levels again."""
    a, scale, shear, across, down = (torch.rand(5, len(pixels), generator=generator) * 2 - 1) * LIMITS[:, None]
    rows = [scale.exp() * a.cos(), shear - a.sin(), across, a.sin(), scale.exp() * a.cos(), down]
    x = F.interpolate(F.pad(pixels[:, None].float(), (1, 1, 1, 1)), scale_factor=4, mode="bicubic")
    places = F.affine_grid(torch.stack(rows, 1).unflatten(1, (2, 3)), list(x.shape), align_corners=False)
    small = F.avg_pool2d(F.grid_sample(x, places, align_corners=False), 4)[:, 0, 1:-1, 1:-1]
    return small.round().clamp(0, PIXELS.levels - 1).long()


def training_data(half: Half, copies: int = 64) -> tuple[Tensor, Tensor]:
    """Each digit so many times with fresh noise within its bins, half of them warped; and the classes, 0 ... 20.

    Warped digits are not drawn like the others, and have classes of their own, so that they teach the network what they
    share without changing what it draws: 0 ... 9 is a digit as it was scanned, ANY = 10 any of these, 11 ... 20 warped.
    """
    n, generator = len(half.pixels), torch.Generator().manual_seed(0)
    turned = torch.cat([warped(half.pixels, generator) for _ in range(copies // 2)])
    plain = half.pixels.repeat(copies - copies // 2, 1, 1)
    x = PIXELS.dequantise(torch.cat([plain, turned]), seed=0)
    labels = sds.drop_labels(half.labels.repeat(len(plain) // n), 0.15, null_label=ANY, seed=0)
    return x, torch.cat([labels, half.labels.repeat(copies // 2) + ANY + 1])


def learned_score(folder: Path, half: Half, steps: int) -> sds.NetworkScore:
    """``score.given(k)`` is the score of digit ``k``, ``score.given(ANY)`` that of all; taken up from ``folder``."""
    torch.manual_seed(0)
    net = sds.nn.UNet((8, 8), channels=32, multipliers=(1, 2), blocks=2, classes=21, dropout=0.1)
    score = sds.NetworkScore(net, PROCESS, "edm", sigma_data=SIGMA_DATA)
    loss = sds.DenoisingScoreMatching("simple", times="stratified")
    options = {"batch_size": 64, "lr": 2e-3, "decay": "cosine", "ema": 0.999}
    x, labels = training_data(half)
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
    x, labels = PIXELS.dequantise(half.pixels.repeat(16, 1, 1), seed=1), half.labels.repeat(16)
    optimizer = torch.optim.AdamW(net.parameters(), 2e-3, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for k in range(steps):
        rows = torch.randint(len(x), (batch,))
        loss = sds.noised_cross_entropy(net, PROCESS, x[rows], labels[rows], seed=0, first_sample=k * batch).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return net.eval()


def draw(
    score: Callable[[Tensor, Tensor], Tensor], count: int, *, seed: int = 0, evaluations: int = EVALUATIONS
) -> Tensor:
    """Digits by the probability flow, rounded to 17 levels."""
    x = sds.sample(
        PROCESS, score, (count, 8, 8), solver=sds.DPMSolverPP(2), grid=sds.grids.karras_sigma(PROCESS, evaluations - 1),
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


def sweep(score: sds.NetworkScore, learned: Half, held: Half, quick: bool) -> dict[str, Tensor]:
    """The table, and a digit of each class for some of its rows."""
    judge, noised = Judge(learned, held), train_noised_classifier(learned, 10 if quick else 2000)
    # As many samples as held-out digits and of the same classes, unless a row says otherwise.
    labels, taken = held.labels, functools.partial(draw, evaluations=8 if quick else EVALUATIONS)
    again = torch.randint(len(learned.labels), (len(labels),), generator=torch.Generator().manual_seed(0))
    print(f"\n{'':44s}{'Frechet':>10s}{'over real':>12s}{'recognised':>14s}{'nearest':>12s}")
    print(judge.row("real: the half learned from", learned.images, learned.labels))
    print(judge.row("the same, drawn with replacement", learned.images[again], learned.labels[again]))
    rows = {f"classifier-free guidance, scale {w:g}": _free(score, labels, w) for w in CFG_SCALES[:: 4 if quick else 1]}
    rows |= {
        f"classifier guidance, scale {w:g}": sds.ClassifierGuidance(score.given(ANY), noised, labels, w)
        for w in CLASSIFIER_SCALES[:: 4 if quick else 1]
    }
    for name, guided in rows.items():
        print(judge.row(name, taken(guided, len(labels)), labels))
    many = labels.repeat(1 if quick else 4)
    print(judge.row("no guidance, four times as many samples", taken(score.given(many), len(many)), many))
    print(
        "Frechet: distance to the held-out digits; over real: its ratio to that of the half learned from. Digits\n"
        "drawn from that half with replacement are the same digits, and further off by chance alone. Recognised: by a\n"
        "classifier that learned from the held-out half. Nearest: mean distance to the closest digit learned from;\n"
        f"held-out digits have {judge.nearest(held.images):.2f}, and much less would be copying."
    )
    each = torch.arange(10)
    return {
        "real": torch.stack([held.images[held.labels == k][0] for k in each]),
        **{f"scale {w:g}": taken(_free(score, each, w), 10, seed=3) for w in (1.0, 1.5, 3.0)},
        "classifier, scale 2": taken(sds.ClassifierGuidance(score.given(ANY), noised, each, 2.0), 10, seed=3),
    }


def _free(score: sds.NetworkScore, labels: Tensor, scale: float) -> Callable[[Tensor, Tensor], Tensor]:
    return sds.ClassifierFreeGuidance(score.given(labels), score.given(ANY), scale=scale)


class Setting(NamedTuple):
    """What all three scripts start from."""

    out: Path
    quick: bool
    learned: Half
    held: Half
    score: sds.NetworkScore


def set_up(description: str | None) -> Setting:
    """Reads the arguments, and trains the network or finds it in the output folder."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("outputs"), help="folder for pictures and the network")
    parser.add_argument("--steps", type=int, default=STEPS, help="of training; a run of another length starts anew")
    parser.add_argument("--quick", action="store_true", help="80 digits and 20 steps of training: a few seconds")
    found = parser.parse_args()
    found.out.mkdir(parents=True, exist_ok=True)
    learned, held = halves()
    if found.quick:
        learned, held = (Half(half.pixels[:80], half.labels[:80]) for half in (learned, held))
    steps = min(found.steps, 20) if found.quick else found.steps
    return Setting(found.out, found.quick, learned, held, learned_score(found.out / f"digits-{steps}", learned, steps))


def main() -> None:
    out, quick, learned, held, score = set_up(__doc__)
    rows = sweep(score, learned, held, quick)
    figure = plotting.image_grid(
        torch.cat(list(rows.values())), columns=10, row_labels=list(rows), value_range=(-1, 1), title="Digits by class"
    )
    figure.savefig(out / "digits.png")
    print(f"picture: {out / 'digits.png'}")


if __name__ == "__main__":
    main()
