"""Reactions beside loops that one writes by hand: NumPy's Poisson numbers in leaps, and Gillespie's method in Numba.

``python -m benchmarks.reactions`` prints processor times of immigration and death, medians of interleaved rounds on one
thread. Ours are functions of coordinates, and theirs are not. Single reactions are one kernel; leaps go step by step in
torch.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import numba
import numpy as np
import torch

import sdesolve as sds

BIRTHS, START, UNTIL, PATHS, STEPS = 100.0, 100.0, 1.0, 20_000, 50


def reactions() -> sds.Reactions:
    return sds.Reactions([[1, -1]], lambda x, t: torch.stack([torch.full_like(x[:, 0], BIRTHS), x[:, 0]], 1))


def ours(solver: sds.TauLeap | sds.Gillespie, paths: int, steps: int) -> np.ndarray:
    x0 = torch.full((paths, 1), START, dtype=torch.float64)
    return sds.solve(reactions(), x0, 0.0, UNTIL, steps, solver=solver, seed=0).x1[:, 0].numpy()


def numpy_leaps(paths: int, steps: int) -> np.ndarray:
    generator, x, h = np.random.default_rng(0), np.full(paths, START), UNTIL / steps
    for _ in range(steps):
        x = np.maximum(x + generator.poisson(BIRTHS * h, paths) - generator.poisson(x * h), 0.0)
    return x


@numba.njit
def _one_by_one(paths: int, generator: np.random.Generator) -> np.ndarray:
    out = np.empty(paths)
    for i in range(paths):
        x, t = START, 0.0
        while True:
            total = BIRTHS + x
            t += generator.standard_exponential() / total
            if t >= UNTIL:
                break
            x += 1.0 if generator.random() * total < BIRTHS else -1.0
        out[i] = x
    return out


def measured(runs: dict[str, Callable[[], np.ndarray]], rounds: int = 5) -> dict[str, tuple[float, np.ndarray]]:
    """Median processor time of each, and what it made."""
    made = {name: run() for name, run in runs.items()}
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            start = time.process_time()
            run()
            times[name].append(time.process_time() - start)
    return {name: (statistics.median(times[name]), made[name]) for name in runs}


def main() -> None:
    torch.set_num_threads(1)
    leaps = {"TauLeap": lambda: ours(sds.TauLeap(), PATHS, STEPS), "NumPy": lambda: numpy_leaps(PATHS, STEPS)}
    single = {
        "Gillespie": lambda: ours(sds.Gillespie(), PATHS, 1),
        "Numba": lambda: _one_by_one(PATHS, np.random.default_rng(0)),
    }
    for what, runs, units in (("leap", leaps, PATHS * STEPS), ("reaction", single, PATHS * 200)):
        found = measured(runs)
        for name, (seconds, x) in found.items():
            mean, error = float(x.mean()), float(x.std()) / PATHS**0.5
            print(f"{name:>10}: {1e9 * seconds / units:8.1f} ns a {what}, mean {mean:.3f} +- {error:.3f} (100)")
        (own, _), (peer, _) = found.values()
        print(f"{'':>10}  ours over theirs: {own / peer:.2f}")


if __name__ == "__main__":
    main()
