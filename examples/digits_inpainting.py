"""Inpainting: the lower half of each digit is hidden, and drawn again by four methods from one learned score.

The observation is the upper half with a little noise. Each method draws several completions for held-out digits. A
method that samples the posterior has the least continuous ranked probability score (Gneiting and Raftery 2007, eq. 21),
and its draws are spread about their mean as far as the truth is from it.

    python examples/digits_inpainting.py --out outputs     # after digits.py, or it trains the network first
"""

from __future__ import annotations

import time
from pathlib import Path

import torch
from digits import ANY, EVALUATIONS, PROCESS, Half, Judge, set_up
from torch import Tensor

import sdesolve as sds
from sdesolve import plotting

NOISE = 0.1  # about the width of a bin
DIGITS, DRAWS = 100, 16


def methods(score: sds.NetworkScore, A: sds.operators.Mask, y: Tensor, std: float) -> dict[str, sds.reverse.Score]:
    return {
        "Replacement": sds.inverse.Replacement(score, PROCESS, A, y, NOISE),
        "DPS, scale 0.1": sds.inverse.DPS(score, PROCESS, A, y, NOISE, scale=0.1),  # at 1 so few steps diverge
        "PiGDM": sds.inverse.PiGDM(score, PROCESS, A, y, NOISE, prior_std=std),
        "MMPS": sds.inverse.MMPS(score, PROCESS, A, y, NOISE),
    }


def nearest(learned: Half, A: sds.operators.Mask, y: Tensor, count: int) -> Tensor:
    """What needs no model: the digits learned from whose upper halves are closest, ``(count, digits, 8, 8)``."""
    rows = torch.cdist(y, A(learned.images)).topk(count, largest=False).indices
    return learned.images[rows.T]


def judged(name: str, draws: Tensor, truth: Half, hidden: Tensor, judge: Judge, seconds: float) -> str:
    """A row of the table for ``draws: (draws, digits, 8, 8)``."""
    x, y = draws[..., hidden], truth.images[:, hidden]
    m = len(x)
    error = (x.mean(0) - y).square().mean().mul(m / (m + 1)).sqrt()
    between = (x[:, None] - x).abs().mean((2, 3)).sum() / (m * (m - 1))  # of different draws
    score, spread = (x - y).abs().mean() - 0.5 * between, x.var(0).mean().sqrt()
    recognised = judge.recognised(draws.flatten(0, 1), truth.labels.repeat(m))
    return f"{name:24s}{score:10.4f}{error:10.3f}{spread:10.3f}{recognised:14.1%}{seconds:10.0f}"


def main() -> None:
    out, quick, learned, held, network = set_up(__doc__)
    digits, draws, score = 12 if quick else DIGITS, 2 if quick else DRAWS, network.given(ANY)
    judge, truth = Judge(learned, held), Half(held.pixels[:digits], held.labels[:digits])
    seen = torch.zeros(8, 8, dtype=torch.bool)
    seen[:4] = True
    A, hidden = sds.operators.Mask(seen), ~seen
    y = A(truth.images)
    y = y + NOISE * torch.randn(y.shape, generator=torch.Generator().manual_seed(0))
    each = y.repeat(draws, 1)

    print(f"\n{digits} held-out digits, lower half hidden, {draws} draws each, {EVALUATIONS} evaluations")
    print(f"{'':24s}{'CRPS':>10s}{'error':>10s}{'spread':>10s}{'recognised':>14s}{'seconds':>10s}")
    drawn = {"nearest learned": nearest(learned, A, y, draws)}
    print(judged("nearest learned", drawn["nearest learned"], truth, hidden, judge, 0.0))
    for name, posterior in methods(score, A, each, float(learned.images.std())).items():
        began = time.perf_counter()
        x = sds.sample(
            PROCESS, posterior, (len(each), 8, 8), solver=sds.SDEDPMSolverPP(2), seed=0,
            grid=sds.grids.karras_sigma(PROCESS, EVALUATIONS - 1),
        )  # fmt: skip
        drawn[name] = x.clamp(-1, 1).unflatten(0, (draws, digits))
        print(judged(name, drawn[name], truth, hidden, judge, time.perf_counter() - began))
    print(
        "CRPS: the score, of hidden pixels; least for draws of the posterior. Error: root mean square of what is\n"
        "hidden less the mean of the draws, made unbiased; equal to the spread for draws of the posterior."
    )
    picture(out / "digits_inpainting.png", truth, seen, drawn)


def picture(path: Path, truth: Half, seen: Tensor, drawn: dict[str, Tensor], columns: int = 12) -> None:
    rows = {"truth": truth.images[:columns], "seen": truth.images[:columns].where(seen, 0.0)}
    for name, x in drawn.items():
        rows |= {name: x[0, :columns], f"{name}, again": x[1, :columns]}
    figure = plotting.image_grid(
        torch.cat(list(rows.values())), columns=columns, row_labels=list(rows), value_range=(-1, 1),
        title="The lower half drawn again",
    )  # fmt: skip
    figure.savefig(path)
    print(f"picture: {path}")


if __name__ == "__main__":
    main()
