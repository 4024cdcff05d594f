"""Feedback that comes late: how it oscillates, and how much noise it lets through.

``dX = -b X(t - 1) dt + s dW`` is the simplest regulator that acts on what it saw one unit of time ago. Without noise
its path is a polynomial between whole times, which Heun's method meets with an error of second order. With noise it has
a stationary law for b < pi / 2, a Gaussian whose variance is known (Kuechler and Mensch 1992), and which is least near
b = 0.7: stronger feedback corrects what is no longer there. Takes about 15 s.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import torch

import sdesolve as sds
from sdesolve import plotting

SPREAD, GAINS = 0.5, (0.2, 0.4, 0.6, 0.8, 1.0, 1.2)


def pieces(t: float) -> float:
    """The path of b = 1 from a past of 1, by the method of steps."""
    return sum((-1) ** k * (t - k + 1) ** k / math.factorial(k) for k in range(math.floor(t) + 2))


def variance(b: float) -> float:
    """Of the stationary law."""
    return SPREAD**2 * (1 + math.sin(b)) / (2 * b * math.cos(b))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer paths: seconds")
    parser.add_argument("--out", type=Path, default=Path("outputs"), help="where the picture goes")
    args = parser.parse_args()

    one = torch.ones(1, 1, dtype=torch.float64)
    feedback = sds.DelaySDE(lambda x, t, pasts: -pasts[0], lags=1.0)
    print(f"{'steps a unit of time':>22} {'largest error of Heun':>22}")
    for steps in (4, 8, 16, 32):
        sol = sds.solve(feedback, one, 0.0, 12.0, 12 * steps, solver=sds.Heun(), save_at="grid")
        error = max(abs(float(x) - pieces(float(t))) for t, x in zip(sol.ts, sol.xs[:, 0, 0], strict=True))
        print(f"{steps:22d} {error:22.1e}")

    paths, steps, until = (2000 if args.quick else 20_000), (16 if args.quick else 64), 40
    gains = torch.tensor(GAINS, dtype=torch.float64).repeat_interleave(paths)[:, None]
    noisy = sds.DelaySDE(
        lambda x, t, pasts: -gains * pasts[0], lambda x, t, pasts: torch.full_like(x, SPREAD), "additive", lags=1.0
    )
    start = torch.zeros(len(gains), 1, dtype=torch.float64)
    x = sds.solve(noisy, start, 0.0, until, until * steps, solver=sds.Heun(), seed=0).x1.reshape(len(GAINS), paths)
    print(f"\n{'gain':>8} {'variance':>10} {'error +-':>10} {'exact':>10}")
    for b, own in zip(GAINS, x, strict=True):
        v = float(own.square().mean())
        print(f"{b:8.1f} {v:10.4f} {v * math.sqrt(2 / paths):10.4f} {variance(b):10.4f}")

    figure, (left, right) = plotting.panels(2, titles=["Late feedback", "Stationary variance"], width=3.8, height=3.2)
    t = torch.linspace(0.0, 20.0, 641, dtype=torch.float64)
    for b, colour in zip((0.3, 1.0, 1.5), plotting.COLOURS, strict=False):
        late = sds.DelaySDE(lambda x, t, pasts, b: -b * pasts[0], lags=1.0)
        path = sds.solve(late, one, grid=t, solver=sds.Heun(), params=torch.tensor(b).double(), save_at="grid")
        left.plot(path.ts, path.xs[:, 0, 0], color=colour, label=f"b = {b}")
    left.set(xlabel="time", ylabel="x")
    left.legend(fontsize=8)
    fine = torch.linspace(0.15, 1.3, 100).tolist()
    right.plot(fine, [variance(b) for b in fine], color="0.3", label="exact")
    right.plot(GAINS, x.square().mean(1), "o", color=plotting.COLOURS[0], label=f"{paths} paths")
    right.set(xlabel="gain b", yscale="log")
    right.legend(fontsize=8)
    args.out.mkdir(parents=True, exist_ok=True)
    figure.savefig(args.out / "delays.png")
    print(f"picture: {args.out / 'delays.png'}")


if __name__ == "__main__":
    main()
