"""Exact error of every sampler against score evaluations, on three targets; no Monte Carlo anywhere.

``python benchmarks/work_precision.py`` (some minutes on one core) writes the figure ``assets/work_precision.png``
and the tables ``benchmarks/results/work_precision.json`` and ``.md``. ``--quick`` leaves out the long grids.

1. A Gaussian in 256 dimensions with spectrum k^-2, as users sample it: EDM, Karras grid from 80 to 0.002, start from
   the prior, Tweedie's formula at the end. Relative Wasserstein distance to the data.
2. Two modes on the line, EDM from 20 to 0.02, from the true law at the start to that at the end. Relative Wasserstein
   distance.
3. Three modes in the plane, EDM from 20 to 0.2, likewise. Total variation distance.

Stochastic samplers that remember earlier steps, or draw more than once a step, have an exact law on the first alone.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

import sdesolve as sds
from sdesolve import grids, oracle
from sdesolve.solvers import AbstractSolver

ROOT = Path(__file__).parents[1]
DETERMINISTIC: dict[str, AbstractSolver] = {
    "DDIM": sds.DDIM(),
    "Heun (EDM)": sds.EDMHeun(),
    "DPM2, DPM-Solver 2S": sds.DPM2(),  # these and the next two are one method each where alpha = 1
    "LMS 3, DEIS 3": sds.LinearMultistep(3),
    "DPM-Solver 3S": sds.DPMSolver(3),
    "DPM++ 2S": sds.DPMSolverPP2S(),
    "DPM++ 2M": sds.DPMSolverPP(2),
    "DPM++ 3M": sds.DPMSolverPP(3),
    "UniPC 2": sds.UniPC(2),
    "UniPC 3": sds.UniPC(3),
    "RK4 in t": sds.RK4(),
}
STOCHASTIC: dict[str, AbstractSolver] = {
    "Euler-Maruyama in t": sds.EulerMaruyama(),
    "reverse diffusion": sds.ReverseDiffusion(),
    "ancestral": sds.Ancestral(),
    "PC, ancestral": sds.PredictorCorrector(sds.Ancestral(), sds.LangevinCorrector(0.16)),
    "EDM churn": sds.EDMHeun(churn=40.0, churn_range=(0.01, 50.0)),
    "SDE-DPM++ 2S": sds.SDEDPMSolverPP2S(),
    "SDE-DPM++ 2M": sds.SDEDPMSolverPP(2),
    "SDE-DPM++ 3M": sds.SDEDPMSolverPP(3),
    "SA-Solver 3, 3": sds.SASolver(3, 3),
}


class Target(NamedTuple):
    """What is sampled, and how."""

    title: str
    measure: str
    process: sds.EDM
    data: sds.Gaussian | sds.GaussianMixture
    nfes: tuple[int, ...]
    grid: Callable[[int], Tensor]
    as_users_do: bool


def targets(quick: bool) -> list[Target]:
    lam = torch.arange(1, 257, dtype=torch.float64) ** -2.0
    angles = 2 * math.pi / 3 * torch.arange(3)
    long = () if quick else (79, 159)
    edm, short = sds.EDM(), sds.EDM(sigma_max=20.0)
    return [
        Target(
            "256-d Gaussian, spectrum $k^{-2}$",
            "relative Wasserstein distance",
            edm,
            sds.Gaussian(torch.zeros(256), 0.25 * lam / lam.mean()),
            (5, 9, 19, 35, *long),
            edm.time_grid,
            True,
        ),
        Target(
            "two modes on the line",
            "relative Wasserstein distance",
            short,
            sds.GaussianMixture(torch.tensor([[-1.0], [1.0]]), 0.25, weights=torch.tensor([1.0, 2.0])),
            (9, 19, 35, *long),
            lambda n: grids.karras(20.0, 0.02, n),
            False,
        ),
        Target(
            "three modes in the plane",
            "total variation distance",
            short,
            sds.GaussianMixture(1.2 * torch.stack([angles.cos(), angles.sin()], 1), 0.3),
            (9, 19, 35),
            lambda n: grids.karras(20.0, 0.2, n),
            False,
        ),
    ]


def measured(target: Target, solver: AbstractSolver) -> dict[int, float]:
    """Errors by the evaluations allowed; without those that cannot be had."""
    errors = {}
    for nfe in target.nfes:
        try:
            table = oracle.convergence(
                solver,
                target.process,
                target.data,
                [nfe],
                grid=target.grid,
                prior=target.as_users_do,
                denoise=target.as_users_do,
            )
        except ValueError:
            continue  # too few evaluations for this sampler, or a law that is not known
        errors[nfe] = table.errors[0]
    return errors


def table_of(target: Target, rows: dict[str, dict[int, float]]) -> str:
    title = target.title.replace("$k^{-2}$", "k^-2")
    lines = [
        f"### {title}: {target.measure}",
        "",
        "| evaluations | " + " | ".join(map(str, target.nfes)) + " |",
        "|---|" + "---|" * len(target.nfes),
    ]
    for name, errors in rows.items():
        cells = [f"{errors[n]:.3e}" if n in errors else "" for n in target.nfes]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def figure(results: list[tuple[Target, dict[str, dict[int, float]]]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    plt.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False})
    canvas, axes = plt.subplots(2, 3, figsize=(13, 7.5), layout="constrained")
    for row, (kind, solvers) in enumerate((("deterministic", DETERMINISTIC), ("stochastic", STOCHASTIC))):
        colours = plt.get_cmap("tab20")
        for column, (target, errors) in enumerate(results):
            ax = axes[row, column]
            for k, name in enumerate(solvers):
                points = sorted(errors[name].items())
                if points:
                    x, y = zip(*points, strict=True)
                    ax.loglog(x, y, marker="o", markersize=3, linewidth=1.3, color=colours(k % 20), label=name)
            ax.set_title(f"{target.title}, {kind}", fontsize=9)
            ax.set_ylabel(target.measure)
            ax.set_xticks(target.nfes, [str(n) for n in target.nfes])
            ax.minorticks_off()
            ax.grid(alpha=0.25)
            if row:
                ax.set_xlabel("score evaluations")
        handles, labels = axes[row, 0].get_legend_handles_labels()
        axes[row, 2].legend(handles, labels, loc="center left", bbox_to_anchor=(1.02, 0.5), frameon=False)
    canvas.savefig(path, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="no grids of more than 35 evaluations; writes nothing")
    quick = parser.parse_args().quick
    results, start = [], time.perf_counter()
    for target in targets(quick):
        rows = {name: measured(target, solver) for name, solver in (DETERMINISTIC | STOCHASTIC).items()}
        results.append((target, rows))
        print(table_of(target, rows), flush=True)
        print(f"\n{time.perf_counter() - start:.0f} s\n", flush=True)
    if quick:
        return
    text = "\n\n".join(table_of(target, {k: v for k, v in rows.items() if v}) for target, rows in results)
    folder = ROOT / "benchmarks" / "results"
    (folder / "work_precision.md").write_text(
        f"# Exact error against score evaluations\n\nMade by `python benchmarks/work_precision.py`.\n\n{text}\n"
    )
    record = [{"target": t.title, "measure": t.measure, "errors": rows} for t, rows in results]
    (folder / "work_precision.json").write_text(json.dumps(record, indent=1) + "\n")
    figure(results, ROOT / "assets" / "work_precision.png")


if __name__ == "__main__":
    main()
