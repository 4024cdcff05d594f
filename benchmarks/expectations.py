"""What expectations cost: multilevel Monte Carlo, antithetic twins and Sobol points, beside crude Monte Carlo.

``python -m benchmarks.expectations`` (three minutes on one core) prints three tables and writes
``benchmarks/results/expectations.json``. Work is counted in steps of paths, so that figures do not depend on the
machine; ``--quick`` leaves out the smallest errors.

1. Heston's call (spot, strike 1, rate 0.02, variance 0.04, reversion 2, volatility 0.3, correlation -0.7, one year;
   0.08686015399): the work of `multilevel` times ``rmse^2``, which stays level, and that of crude Monte Carlo at the
   step of its finest level.
2. Variances of corrections on a system whose noise does not commute, with twins and without: their rates in the step.
3. The arithmetic Asian call of 64 steps (spot, strike 100, rate 0.05, volatility 0.2, one year): standard deviations
   over 24 scramblings, and how many independent paths a Sobol path is worth, in bridge order and step by step.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.quasirandom import SobolEngine

import sdesolve as sds

RESULTS = Path(__file__).parent / "results" / "expectations.json"
CALL, STEPS, SCRAMBLINGS = 0.08686015399, 64, 24


def heston_call(x: Tensor) -> Tensor:
    return math.exp(-0.02) * (x[:, 0].exp() - 1.0).clamp(min=0.0)


def work(quick: bool) -> list[dict[str, float]]:
    """Of `multilevel` and of crude Monte Carlo with the finest level's steps, for Heston's call."""
    model, x0 = sds.Heston(2.0, 0.04, 0.3, -0.7, 0.02), torch.tensor([[0.0, 0.04]])
    rows = []
    for rmse in (2e-3, 1e-3, 5e-4, 2.5e-4) if quick else (2e-3, 1e-3, 5e-4, 2.5e-4, 1.25e-4, 6.25e-5):
        made = sds.multilevel(model, x0, 0.0, 1.0, heston_call, rmse=rmse, steps=4, seed=1)
        spread, steps = float(made.levels[0].variance), made.levels[-1].steps
        crude = spread / (0.75 * rmse**2) * steps
        rows.append(
            {
                "rmse": rmse, "error": float(made.estimate) - CALL, "work": made.work,
                "work x rmse^2": made.work * rmse**2, "crude work": crude, "gain": crude / made.work,
            }
        )  # fmt: skip
    return rows


def channels(x: Tensor, t: Tensor) -> Tensor:
    zero = torch.zeros_like(x[:, 0])
    return torch.stack([torch.stack([zero + 0.6, zero], 1), torch.stack([zero, 0.5 * x[:, 0]], 1)], 1)


def rates(quick: bool) -> list[dict[str, Any]]:
    """Rates of variances of corrections for ``dY1 = -Y1/2 dt + 0.6 dW1, dY2 = (Y1^2/2 - 0.8 Y2) dt + Y1/2 dW2``."""
    sde = sds.SDE(
        lambda x, t: torch.stack([-0.5 * x[:, 0], 0.5 * x[:, 0] ** 2 - 0.8 * x[:, 1]], 1), channels, "general"
    )
    x0 = torch.tensor([[1.0, 0.0]], dtype=torch.float64)
    rows = []
    for name, equation, antithetic in (
        ("Milstein without areas, twins", sde, True), ("Milstein without areas", sde, False),
        ("Heun, twins", sds.to_stratonovich(sde), True), ("Heun", sds.to_stratonovich(sde), False),
    ):  # fmt: skip
        made = sds.multilevel(
            equation, x0, 0.0, 1.0, lambda x: torch.stack([x[:, 1], x[:, 1] ** 2], 1), steps=4, seed=2,
            rmse=[3e-3, 2e-3] if quick else [1e-3, 8e-4], antithetic=antithetic,
        )  # fmt: skip
        rows.append(
            {
                "scheme": name, "rate": made.variance_rate.tolist(), "work": made.work,
                "variances": [level.variance.tolist() for level in made.levels[1:]],
            }
        )  # fmt: skip
    return rows


def asian() -> tuple[sds.SDE, Tensor, Any]:
    G = torch.tensor([[[0.2], [0.0]]], dtype=torch.float64)
    sde = sds.SDE(
        lambda x, t: torch.stack([torch.full_like(x[:, 0], 0.03), x[:, 0].exp()], 1), lambda x, t: G, "additive"
    )
    x0 = torch.tensor([[math.log(100.0), 0.0]], dtype=torch.float64)
    return sde, x0, lambda x: math.exp(-0.05) * (x[:, 1] - 100.0).clamp(min=0.0)


class InOrderOfTime(sds.AbstractNoise):
    """Sobol points of torch whose dimension ``k`` is the increment of step ``k``, for comparison."""

    def __init__(self, seed: int, paths: int) -> None:
        u = SobolEngine(STEPS, scramble=True, seed=seed).draw(paths, dtype=torch.float64)
        self._z = torch.special.ndtri(u.clamp(2.0**-31, 1.0 - 2.0**-31)).T[:, :, None]

    def increments(self, times: Tensor, shape: tuple[int, ...], *, step: int = 0, **_: Any) -> Tensor:
        return self._z[step : step + len(times) - 1] * times.diff().abs().sqrt()[:, None, None]


def points(quick: bool) -> list[dict[str, float]]:
    """Standard deviations of the Asian call by paths of three kinds."""
    sde, x0, call = asian()
    rows = []
    for paths in (1024, 4096) if quick else (1024, 4096, 16384):
        options: dict[str, Any] = {"steps": STEPS, "solver": sds.EulerMaruyama()}
        bridge = sds.quasi_monte_carlo(
            sde, x0, 0.0, 1.0, call, paths=paths, randomisations=SCRAMBLINGS, seed=1, **options
        )
        spread = float(bridge.estimates.std())
        crude = math.sqrt(float(bridge.gain)) * spread
        means = [
            call(sds.solve(sde, x0.repeat(paths, 1), 0.0, 1.0, noise=InOrderOfTime(seed, paths), **options).x1).mean()
            for seed in range(SCRAMBLINGS)
        ]
        in_time = float(torch.stack(means).std())
        rows.append(
            {
                "paths": paths, "independent": crude, "Sobol in time": in_time, "Sobol in bridge order": spread,
                "gain in time": (crude / in_time) ** 2, "gain in bridge order": (crude / spread) ** 2,
            }
        )  # fmt: skip
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="without the smallest errors, and nothing is written")
    quick = parser.parse_args().quick
    found = {"work": work(quick), "rates": rates(quick), "points": points(quick)}
    for title, rows in found.items():
        print(f"\n{title}")
        for row in rows:
            print("  " + ", ".join(f"{k}: {v:.4g}" if isinstance(v, float) else f"{k}: {v}" for k, v in row.items()
                                   if k != "variances"))  # fmt: skip
    if not quick:
        RESULTS.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
