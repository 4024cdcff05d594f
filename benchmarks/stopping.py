"""What stopping costs: mean exit times from the double well ``dX = (X - X^3) dt + 0.7 dW``, from -1 to 0 or -1.8.

``python -m benchmarks.stopping`` (two minutes on one core) prints two tables and writes
``benchmarks/results/stopping.json``.

1. The error of the mean exit time, its standard error, and the work (steps of paths, over those of the paths' own
   lives) by step and scheme, with the Brownian bridge and at grid points alone. Exact: 5.081373, by quadrature.
2. Time per step of a path's life in one process, the fastest of several turns taken in turn: with the bridge, at grid
   points alone, without any boundary; a loop over steps in torch with a mask; diffrax with an ``Event`` on each path of
   a vmapped, jitted solve (``--no-peers`` leaves it out), at grid points alone as both peers know no bridge.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import sdesolve as sds

RESULTS = Path(__file__).parent / "results" / "stopping.json"
EXACT, LOW, END = 5.081372836, -1.8, 60.0
WELL = sds.SDE(lambda x, t: x - x**3, lambda x, t: 0.7, noise="additive")


def exits(bridge: bool) -> list[sds.Crossing]:
    return [
        sds.Crossing(lambda x, t: x[:, 0], 1, bridge=bridge),
        sds.Crossing(lambda x, t: x[:, 0] - LOW, -1, bridge=bridge),
    ]


def run(paths: int, steps: int, solver: Any, *, until: Any, seed: int = 9) -> sds.Solution:
    return sds.solve(WELL, torch.full((paths, 1), -1.0), 0.0, END, steps, solver=solver, seed=seed, until=until)


def errors(quick: bool) -> list[dict[str, Any]]:
    rows = []
    for solver in (sds.EulerMaruyama(), sds.ShARK()):
        for h in (0.1, 0.05) if quick else (0.1, 0.05, 0.02, 0.01):
            for bridge in (True, False):
                sol = run(20_000 if quick else 400_000, round(END / h), solver, until=exits(bridge))
                tau = sol.stop_time.clamp(max=END)
                rows.append(
                    {
                        "scheme": type(solver).__name__, "step": h, "bridge": bridge,
                        "error": float(tau.mean()) / EXACT - 1,
                        "standard error": float(tau.std()) / EXACT / len(tau) ** 0.5,
                        "work over lives": sol.stats.work / int(sol.stats.accepted.sum()),
                    }
                )  # fmt: skip
    return rows


def in_torch(paths: int, steps: int) -> float:
    """A loop over steps with a mask, until all have stopped; gives the sum of lives."""
    h, x, lives = END / steps, torch.full((paths, 1), -1.0), torch.zeros(paths)
    running = torch.ones(paths, dtype=torch.bool)
    for _ in range(steps):
        moved = x + (x - x**3) * h + 0.7 * math.sqrt(h) * torch.randn_like(x)
        x = torch.where(running[:, None], moved, x)
        lives += running
        running = running & (x[:, 0] < 0.0) & (x[:, 0] > LOW)
        if not bool(running.any()):
            break
    return float(lives.sum())


def in_diffrax(paths: int, steps: int) -> Callable[[], float]:
    import diffrax
    import jax
    import jax.numpy as jnp

    h = END / steps

    def one(key: Any) -> Any:
        path = diffrax.UnsafeBrownianPath((), key)
        terms = diffrax.MultiTerm(
            diffrax.ODETerm(lambda t, y, p: y - y**3), diffrax.ControlTerm(lambda t, y, p: 0.7, path)
        )
        event = diffrax.Event(lambda t, y, args, **_: (y >= 0.0) | (y <= LOW))
        made = diffrax.diffeqsolve(
            terms, diffrax.Euler(), 0.0, END, h, -1.0, event=event, max_steps=steps + 1,
            adjoint=diffrax.DirectAdjoint(), saveat=diffrax.SaveAt(t1=True),
        )  # fmt: skip
        return made.ts[0]

    solve = jax.jit(jax.vmap(one))
    keys = jax.random.split(jax.random.PRNGKey(0), paths)
    return lambda: float(jnp.sum(solve(keys).block_until_ready())) / h


def speeds(quick: bool, peers: bool) -> list[dict[str, Any]]:
    paths, steps = (1024, 600) if quick else (4096, 1200)
    solver = sds.EulerMaruyama()

    def ours(bridge: bool) -> float:
        return float(run(paths, steps, solver, until=exits(bridge)).stats.accepted.sum())

    def free() -> float:
        run(paths, steps, solver, until=None)
        return float(paths * steps)

    cases: dict[str, Callable[[], float]] = {
        "with the bridge": lambda: ours(True), "grid points alone": lambda: ours(False),
        "no boundary, all steps": free, "torch, a loop with a mask": lambda: in_torch(paths, steps),
    }  # fmt: skip
    if peers:
        cases["diffrax, Event"] = in_diffrax(paths, steps)
    best = dict.fromkeys(cases, math.inf)
    for name, case in cases.items():
        case()
        best[name] = math.inf
    for _ in range(3 if quick else 7):
        for name, case in cases.items():
            begin = time.perf_counter()
            lives = case()
            best[name] = min(best[name], (time.perf_counter() - begin) * 1e9 / lives)
    base = best["with the bridge"]
    return [{"case": name, "ns a step of a life": ns, "over ours": ns / base} for name, ns in best.items()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer paths, and nothing is written")
    parser.add_argument("--no-peers", action="store_true", help="without diffrax")
    given = parser.parse_args()
    found = {"speeds": speeds(given.quick, not given.no_peers), "errors": errors(given.quick)}
    for title, rows in found.items():
        print(f"\n{title}")
        for row in rows:
            print("  " + ", ".join(f"{k}: {v:.4g}" if isinstance(v, float) else f"{k}: {v}" for k, v in row.items()))
    if not given.quick:
        RESULTS.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
