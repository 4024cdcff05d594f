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
from digits import ANY, PIXELS, PROCESS, Half, set_up
from torch import Tensor

import sdesolve as sds

STEPS = 20  # of RK4; 40 change the mean by 0.003 bits per dimension
CHANGED = 300  # digits of each kind


def bits(score: sds.reverse.Score, pixels: Tensor, steps: int) -> Tensor:
    """Bits per dimension of each digit, ``(samples,)``."""
    x = PIXELS.dequantise(pixels, seed=1)
    found = sds.estimate_likelihood(
        PROCESS, score, x, divergence=sds.Hutchinson(probes=1), solver=sds.RK4(),
        grid=sds.grids.karras_sigma(PROCESS, steps), seed=0,
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
    """Digits made strange."""
    return {
        "turned by 90 degrees": pixels.rot90(1, (1, 2)),
        "upside down": pixels.rot90(2, (1, 2)),
        "mirrored": pixels.flip(2),
        "inverted": PIXELS.levels - 1 - pixels,
    }


def stranger(usual: Tensor, other: Tensor) -> float:
    """Probability that of two digits, one of each kind, the other needs more bits: the area under the ROC curve."""
    return float((other[:, None] > usual).float().mean() + 0.5 * (other[:, None] == usual).float().mean())


def main() -> None:
    out, quick, learned, held, network = set_up(__doc__)
    score, steps = network.given(ANY), 4 if quick else STEPS

    print(f"\nbits per dimension of {len(held.pixels)} held-out digits, 64 integers of {PIXELS.levels} levels")
    began = time.perf_counter()
    usual = bits(score, held.pixels, steps)
    rate = len(usual) / (time.perf_counter() - began)
    for name, b in {
        "uniform": torch.full((2,), math.log2(PIXELS.levels)),
        "independent pixels": independent_pixels(learned, held.pixels),
        "Gaussian": gaussian(learned, held.pixels),
        "learned score": usual,
        "learned score, digits it learned from": bits(score, learned.pixels, steps),
    }.items():
        print(f"{name:40s}{b.mean():8.3f} +- {b.std() / len(b) ** 0.5:.3f}")

    print(f"\n{'held-out digits, changed':40s}{'bits':>8s}{'':9s}{'told from others':>20s}")
    strange = {name: bits(score, pixels, steps) for name, pixels in changes(held.pixels[:CHANGED]).items()}
    for name, b in strange.items():
        print(f"{name:40s}{b.mean():8.3f} +- {b.std() / len(b) ** 0.5:.3f}{stranger(usual, b):20.1%}")
    print(
        "Told from others: probability that of a changed digit and another the changed one needs more bits; 50% is\n"
        f"chance. {rate:.0f} likelihoods a second, of {4 * steps + 1} evaluations each."
    )
    picture(out / "digits_likelihood.png", {"held-out digits": usual} | strange)


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
