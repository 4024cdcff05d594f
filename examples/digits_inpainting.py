"""Inpainting: the lower half of each digit is hidden, and drawn again by four methods from one learned score.

The observation is the upper half with a little noise. Each method draws several completions for held-out digits; a
method that samples the posterior gives completions among which the truth is nothing special, so its pixel lies within
the central 80% of draws 80% of the time. Too narrow draws show as less, too wide ones as more.

    python examples/digits_inpainting.py --out outputs     # after digits.py, or it trains the network first
"""

from __future__ import annotations

import time
from pathlib import Path

import torch
from digits import ANY, EVALUATIONS, PROCESS, Half, Judge, arguments, halves, learned_score
from torch import Tensor

import sdesolve as sds
from sdesolve import plotting

NOISE = 0.1  # about the width of a bin
DIGITS, DRAWS = 100, 16


def methods(score: sds.NetworkScore, A: sds.operators.Mask, y: Tensor, std: float) -> dict[str, sds.reverse.Score]:
    return {
        "Replacement": sds.inverse.Replacement(score, PROCESS, A, y, NOISE),
        "DPS": sds.inverse.DPS(score, PROCESS, A, y, NOISE),
        "PiGDM": sds.inverse.PiGDM(score, PROCESS, A, y, NOISE, prior_std=std),
        "MMPS": sds.inverse.MMPS(score, PROCESS, A, y, NOISE),
    }


def nearest(learned: Half, A: sds.operators.Mask, y: Tensor, count: int) -> Tensor:
    """What needs no model: the digits learned from whose upper halves are closest, ``(count, digits, 8, 8)``."""
    rows = torch.cdist(y, A(learned.images)).topk(count, largest=False).indices
    return learned.images[rows.T]


def judged(name: str, draws: Tensor, truth: Half, hidden: Tensor, judge: Judge, seconds: float) -> str:
    """A row of the table for ``draws: (draws, digits, 8, 8)``."""
    x, images = draws[..., hidden], truth.images[:, hidden]
    error = (x.mean(0) - images).square().mean().sqrt()
    low, high = x.quantile(torch.tensor([0.1, 0.9]), dim=0)
    inside = ((images >= low) & (images <= high)).float().mean()
    labels = truth.labels.repeat(len(draws))
    recognised = judge.recognised(draws.flatten(0, 1), labels)
    return (
        f"{name:24s}{error:12.3f}{x.std(0).square().mean().sqrt():12.3f}{inside:14.1%}{recognised:14.1%}{seconds:10.0f}"
    )


def main() -> None:
    chosen = arguments(__doc__)
    learned, held = halves()
    score = learned_score(chosen.out / f"digits-{chosen.steps}", learned, chosen.steps).given(ANY)
    judge, truth = Judge(learned, held), Half(held.pixels[:DIGITS], held.labels[:DIGITS])
    seen = torch.zeros(8, 8, dtype=torch.bool)
    seen[:4] = True
    A, hidden = sds.operators.Mask(seen), ~seen
    y = A(truth.images)
    y = y + NOISE * torch.randn(y.shape, generator=torch.Generator().manual_seed(0))
    each = y.repeat(DRAWS, 1)

    print(f"\n{DIGITS} held-out digits, lower half hidden, {DRAWS} draws each, {EVALUATIONS} evaluations")
    print(f"{'':24s}{'error':>12s}{'spread':>12s}{'within 80%':>14s}{'recognised':>14s}{'seconds':>10s}")
    drawn = {"nearest learned": nearest(learned, A, y, DRAWS)}
    print(judged("nearest learned", drawn["nearest learned"], truth, hidden, judge, 0.0))
    for name, posterior in methods(score, A, each, float(learned.images.std())).items():
        began = time.perf_counter()
        x = sds.sample(
            PROCESS, posterior, (len(each), 8, 8), solver=sds.SDEDPMSolverPP(2), seed=0,
            grid=sds.grids.karras_sigma(PROCESS, EVALUATIONS - 1),
        )  # fmt: skip
        drawn[name] = x.clamp(-1, 1).unflatten(0, (DRAWS, DIGITS))
        print(judged(name, drawn[name], truth, hidden, judge, time.perf_counter() - began))
    print(
        "Error: root mean square of what is hidden less the mean of the draws. Spread: standard deviation of the draws.\n"
        "Within 80%: how often the truth lies between the draws' 10% and 90% quantiles."
    )
    picture(chosen.out / "digits_inpainting.png", truth, seen, drawn)


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
