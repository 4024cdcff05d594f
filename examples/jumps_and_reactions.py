"""Prices that jump, and molecules that react one by one, beside what is known of both.

Above, Merton's model: a stock whose logarithm jumps at the points of a Poisson process. Steps end at the jumps, so four
steps a year are exact here, and calls of seven strikes agree with Merton's series; implied volatilities smile as those
of the market do, and those of Black and Scholes do not. Below, Schloegl's reactions, which have two stable states: the
law of the number of molecules is known, from the exponential of the generator of its master equation. `Gillespie`
simulates it exactly; `TauLeap` takes leaps over many reactions, with an error that falls with their length, and never
makes a count negative; the Langevin equation replaces reactions by Brownian noise. Takes about 40 s.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import torch
from torch import Tensor

import sdesolve as sds
from sdesolve import plotting

RATE, VOLATILITY, INTENSITY, MEAN, SPREAD, SPOT = 0.05, 0.2, 0.75, -0.1, 0.15, 100.0
STRIKES = (70.0, 80.0, 90.0, 100.0, 110.0, 120.0, 130.0)
MEAN_JUMP = math.expm1(MEAN + SPREAD**2 / 2)
LARGEST, UNTIL = 250, 4.0


def normal_cdf(x: float) -> float:
    return 0.5 * math.erfc(-x / math.sqrt(2.0))


def black_scholes(strike: float, rate: float, volatility: float) -> float:
    """A call of one year."""
    d = (math.log(SPOT / strike) + rate) / volatility + 0.5 * volatility
    return SPOT * normal_cdf(d) - strike * math.exp(-rate) * normal_cdf(d - volatility)


def series(strike: float) -> float:
    """Merton's formula: Black and Scholes', given the number of jumps."""
    total, intensity = 0.0, INTENSITY * (1 + MEAN_JUMP)
    for n in range(40):
        weight = math.exp(-intensity) * intensity**n / math.factorial(n)
        rate = RATE - INTENSITY * MEAN_JUMP + n * math.log1p(MEAN_JUMP)
        total += weight * black_scholes(strike, rate, math.sqrt(VOLATILITY**2 + n * SPREAD**2))
    return total


def implied(price: float, strike: float) -> float:
    """The volatility at which Black and Scholes have this price."""
    low, high = 0.01, 2.0
    for _ in range(60):
        middle = 0.5 * (low + high)
        low, high = (low, middle) if black_scholes(strike, RATE, middle) > price else (middle, high)
    return low


def merton() -> sds.JumpSDE:
    drift = RATE - 0.5 * VOLATILITY**2 - INTENSITY * MEAN_JUMP
    return sds.JumpSDE(
        lambda x, t: torch.full_like(x, drift), lambda x, t: torch.full_like(x, VOLATILITY), "additive",
        rate=INTENSITY, jump=lambda x, t, z: MEAN + SPREAD * z,
    )  # fmt: skip


def propensities(x: Tensor, t: Tensor) -> Tensor:
    """Of ``A + 2 X -> 3 X`` and back, ``B -> X`` and back, with A and B held."""
    n = x[:, 0]
    pairs = n * (n - 1)
    return torch.stack([0.06 * pairs, 16e-4 / 6 * pairs * (n - 2), torch.full_like(n, 50.0), 3.5 * n], 1)


SCHLOEGL = sds.Reactions([[1, -1, 1, -1]], propensities)


def master_equation(start: int) -> Tensor:
    """Chances of 0 ... LARGEST molecules at the end."""
    n = torch.arange(LARGEST + 1, dtype=torch.float64)
    a = propensities(n[:, None], torch.zeros(()))
    up, down = a[:-1, 0] + a[:-1, 2], a[1:, 1] + a[1:, 3]
    generator = torch.diag(up, 1) + torch.diag(down, -1)
    generator -= torch.diag(generator.sum(1))
    return torch.linalg.matrix_exp(UNTIL * generator)[start]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer paths: seconds")
    parser.add_argument("--out", type=Path, default=Path("outputs"), help="where the picture goes")
    args = parser.parse_args()

    paths = 20_000 if args.quick else 200_000
    x0 = torch.full((paths, 1), math.log(SPOT), dtype=torch.float64)
    sol = sds.solve(merton(), x0, 0.0, 1.0, 4, solver=sds.EulerMaruyama(), seed=0)
    print(f"Merton's model, {paths} paths, {float(sol.jumps.double().mean()):.4f} jumps a path ({INTENSITY} expected)")
    print(f"{'call of strike':>22} {'price':>9} {'error +-':>9} {'series':>9} {'implied':>9} {'series':>9}")
    smile, exact = [], []
    for strike in STRIKES:
        paid = math.exp(-RATE) * (sol.x1[:, 0].exp() - strike).clamp_min(0.0)
        price, error, truth = float(paid.mean()), float(paid.std()) / math.sqrt(paths), series(strike)
        smile.append(implied(price, strike))
        exact.append(implied(truth, strike))
        print(f"{strike:22.0f} {price:9.4f} {error:9.4f} {truth:9.4f} {smile[-1]:9.4f} {exact[-1]:9.4f}")

    start, molecules = 62, 400 if args.quick else 4000
    chances = master_equation(start)
    counts = torch.arange(LARGEST + 1, dtype=torch.float64)
    mean = float((chances * counts).sum())
    spread = float((chances * (counts - mean) ** 2).sum().sqrt())
    x0 = torch.full((molecules, 1), float(start), dtype=torch.float64)
    runs = {
        "Gillespie": (SCHLOEGL, sds.Gillespie(), 1),
        "TauLeap, 40 steps": (SCHLOEGL, sds.TauLeap(), 40),
        "TauLeap, 400 steps": (SCHLOEGL, sds.TauLeap(), 400),
        "TauLeap, midpoint, 80": (SCHLOEGL, sds.TauLeap(midpoint=True), 80),
        "Langevin, 400 steps": (SCHLOEGL.langevin(), sds.EulerMaruyama(), 400),
    }
    print(f"\nSchloegl's reactions from {start} molecules, {molecules} paths to t = {UNTIL:g}")
    print(f"{'':>22} {'mean +-':>16} {'deviation':>10} {'above 75':>10} {'reactions':>10}")
    above = float(chances[76:].sum())
    print(f"{'master equation':>22} {mean:10.2f} {0.0:5.2f} {spread:10.2f} {100 * above:9.2f}%")
    found = {}
    for name, (equation, solver, steps) in runs.items():
        done = sds.solve(equation, x0, 0.0, UNTIL, steps, solver=solver, seed=1)
        x = found[name] = done.x1[:, 0]
        fired = "" if done.jumps is None else f"{float(done.jumps.double().mean()):10.0f}"
        share, error = 100 * float((x > 75).double().mean()), float(x.std()) / math.sqrt(molecules)
        print(f"{name:>22} {float(x.mean()):10.2f} {error:5.2f} {float(x.std()):10.2f} {share:9.2f}% {fired}")

    few = torch.full((40, 1), float(start), dtype=torch.float64)
    ways = sds.solve(SCHLOEGL, few, 0.0, UNTIL, 200, solver=sds.Gillespie(), seed=2, save_at="grid")
    stocks = sds.solve(
        merton(), torch.full((12, 1), math.log(SPOT), dtype=torch.float64), 0.0, 1.0, 500,
        solver=sds.EulerMaruyama(), seed=4, save_at="grid",
    )  # fmt: skip

    titles = ["Stocks that jump", "Implied volatility", "Molecules, reaction by reaction", f"Law at t = {UNTIL:g}"]
    figure, (left, right, low_left, low_right) = plotting.panels(4, titles=titles, width=3.6, height=3.2)
    left.plot(stocks.ts, stocks.xs[..., 0].exp(), linewidth=0.8)
    left.set(xlabel="years", ylabel="price")
    right.plot(STRIKES, exact, color="0.3", label="Merton's series")
    right.plot(STRIKES, smile, "o", markersize=4, color=plotting.COLOURS[0], label=f"{paths} paths")
    right.set(xlabel="strike")
    right.legend(fontsize=8)
    low_left.plot(ways.ts, ways.xs[..., 0], linewidth=0.6, color=plotting.COLOURS[0], alpha=0.6)
    low_left.set(xlabel="time", ylabel="number")
    names = ("Gillespie", "TauLeap, 40 steps", "Langevin, 400 steps")
    for name, colour in zip(names, plotting.COLOURS, strict=False):
        low_right.hist(found[name].numpy(), range(0, 181, 6), density=True, histtype="step", color=colour, label=name)
    low_right.plot(counts, chances, color="0.2", label="master equation")
    low_right.set(xlabel="number", xlim=(0, 180))
    low_right.legend(fontsize=8)
    args.out.mkdir(parents=True, exist_ok=True)
    figure.savefig(args.out / "jumps_and_reactions.png")
    print(f"picture: {args.out / 'jumps_and_reactions.png'}")


if __name__ == "__main__":
    main()
