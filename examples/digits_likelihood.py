"""Likelihood: how many bits the learned model needs for a digit, and for digits that are turned or inverted.

Log-likelihoods come from the probability flow by Hutchinson's estimate of the divergence. Digits are 64 integers of 17
levels; bits per dimension are of those integers, by uniform dequantisation (a bound from above), with the standard
error of the mean over digits. Models that know less are there to compare with.

    python examples/digits_likelihood.py --out outputs     # after digits.py, or it trains the network first
"""

from __future__ import annotations

import math
import time
from pathlib import Path

import torch
from digits import ANY, PIXELS, PROCESS, Half, arguments, halves, learned_score
from torch import Tensor

import sdesolve as sds

STEPS = 40
PROBES = 2


def bits(score: sds.reverse.Score, pixels: Tensor) -> Tensor:
    """Bits per dimension of each digit, ``(samples,)``."""
    x = PIXELS.dequantise(pixels, seed=1)
    found = sds.estimate_likelihood(
        PROCESS, score, x, divergence=sds.Hutchinson(probes=PROBES), solver=sds.Heun(),
        grid=sds.grids.karras_sigma(PROCESS, STEPS), seed=0,
    )  # fmt: skip
    return found.bits_per_dimension(PIXELS)


def independent_pixels(learned: Half, pixels: Tensor) -> Tensor:
    """Bits per dimension by the frequencies of each pixel's levels, one added to each count."""
    counts = torch.nn.functional.one_hot(learned.pixels, PIXELS.levels).sum(0) + 1.0
    p = (counts / counts.sum(-1, keepdim=True)).expand(len(pixels), 8, 8, -1)
    return -p.gather(-1, pixels[..., None]).log2().mean((1, 2, 3))


def gaussian(learned: Half, pixels: Tensor) -> Tensor:
    """Bits per dimension by a Gaussian with the mean and the covariance of dequantised digits."""
    x = PIXELS.dequantise(learned.pixels, seed=2).flatten(1).double()
    law = sds.Gaussian(x.mean(0), x.T.cov())
    log_prob = law.log_prob(PIXELS.dequantise(pixels, seed=1).flatten(1).double())
    return PIXELS.bits_per_dimension(log_prob, 64)


def changes(pixels: Tensor) -> dict[str, Tensor]:
    """The same digits, made strange."""
    return {
        "held-out digits": pixels,
        "turned by 90 degrees": pixels.rot90(1, (1, 2)),
        "upside down": pixels.rot90(2, (1, 2)),
        "mirrored": pixels.flip(2),
        "inverted": PIXELS.levels - 1 - pixels,
    }


def stranger(usual: Tensor, other: Tensor) -> float:
    """Probability that of two digits, one of each kind, the other needs more bits: the area under the ROC curve."""
    return float((other[:, None] > usual).float().mean() + 0.5 * (other[:, None] == usual).float().mean())


def main() -> None:
    chosen = arguments(__doc__)
    learned, held = halves()
    score = learned_score(chosen.out / f"digits-{chosen.steps}", learned, chosen.steps).given(ANY)

    print(f"\nbits per dimension of {len(held.pixels)} held-out digits, 64 integers of {PIXELS.levels} levels")
    began = time.perf_counter()
    found = {name: bits(score, pixels) for name, pixels in changes(held.pixels).items()}
    seconds = time.perf_counter() - began
    usual = found["held-out digits"]
    for name, b in {
        "uniform": torch.full((2,), math.log2(PIXELS.levels)),
        "independent pixels": independent_pixels(learned, held.pixels),
        "Gaussian": gaussian(learned, held.pixels),
        "learned score": usual,
        "learned score, digits it learned from": bits(score, learned.pixels),
    }.items():
        print(f"{name:40s}{b.mean():8.3f} +- {b.std() / len(b) ** 0.5:.3f}")

    print(f"\n{'':40s}{'bits':>8s}{'':9s}{'told from held-out':>20s}")
    for name, b in found.items():
        area = "" if b is usual else f"{stranger(usual, b):20.1%}"
        print(f"{name:40s}{b.mean():8.3f} +- {b.std() / len(b) ** 0.5:.3f}{area}")
    print(
        "Told from held-out: probability that the changed one of two digits needs more bits; 50% is chance.\n"
        f"{len(found) * len(held.pixels) / seconds:.0f} likelihoods a second"
    )
    picture(chosen.out / "digits_likelihood.png", found)


def picture(path: Path, found: dict[str, Tensor]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(6.5, 3.2), layout="constrained")
    every = torch.cat(list(found.values()))
    edges = torch.linspace(float(every.quantile(0.001)), float(every.quantile(0.999)), 80)
    for (name, b), colour in zip(found.items(), ("#222222", "#0072b2", "#d55e00", "#009e73", "#cc79a7"), strict=True):
        axes.hist(b.numpy(), edges.numpy(), density=True, histtype="step", color=colour, label=name, linewidth=1.4)
    axes.set(xlabel="bits per dimension", ylabel="density of digits", title="What the model finds strange")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)
    print(f"picture: {path}")


if __name__ == "__main__":
    main()
