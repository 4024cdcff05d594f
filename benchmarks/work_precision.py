"""Exact error of every sampler against score evaluations, on three targets.

``python benchmarks/work_precision.py`` (ten minutes on one core) writes the figure ``assets/work_precision.png``
and the tables ``benchmarks/results/work_precision.json`` and ``.md``. ``--quick`` leaves out the long grids.

1. A Gaussian in 256 dimensions with spectrum k^-2, as users sample it: EDM, Karras grid from 80 to 0.002, start from
   the prior, Tweedie's formula at the end. Relative Wasserstein distance to the data.
2. Two modes on the line, EDM from 20 to 0.02, from the true law at the start to that at the end. Relative Wasserstein
   distance.
3. Three modes in the plane, EDM from 20 to 0.2, likewise. Total variation distance.

Errors are exact on the first, and by quadrature on the others but for few: third-order stochastic samplers on the line
in few steps, and stochastic samplers with memory in the plane, whose errors are estimates by randomised quasi-Monte
Carlo. Those have standard errors in the tables and bars in the figure.
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
FEW = 5  # evaluations, which do not do for every sampler
Row = dict[int, oracle.Measured]
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


COLOURS = [
    "#1f77b4",
    "#d62728",
    "#2ca02c",
    "#ff7f0e",
    "#9467bd",
    "#8c564b",
    "#e377c2",
    "#17becf",
    "#7f7f7f",
    "#bcbd22",
    "#222222",
]
MARKERS = "osD^v<>Pph*"


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


def measured(target: Target, solver: AbstractSolver) -> Row:
    """Errors by the evaluations allowed; without those that are too few."""
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
        except ValueError:  # an order above what so few steps allow
            if nfe > FEW:
                raise
            continue
        errors[nfe] = oracle.Measured(table.errors[0], table.standard_errors[0])
    return errors


def table_of(target: Target, rows: dict[str, Row]) -> str:
    title = target.title.replace("$k^{-2}$", "k^-2")
    lines = [
        f"### {title}: {target.measure}",
        "",
        "| evaluations | " + " | ".join(map(str, target.nfes)) + " |",
        "|---|" + "---|" * len(target.nfes),
    ]
    for name, errors in rows.items():
        cells = [_cell(errors[n]) if n in errors else "" for n in target.nfes]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cell(error: oracle.Measured) -> str:
    return f"{error.value:.3e}" + (f" ± {error.standard_error:.0e}" if error.standard_error else "")


def figure(results: list[tuple[Target, dict[str, Row]]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    plt.rcParams.update({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False})
    canvas, axes = plt.subplots(2, 3, figsize=(14, 9), layout="constrained")
    for row, (kind, solvers) in enumerate((("deterministic", DETERMINISTIC), ("stochastic", STOCHASTIC))):
        for column, (target, errors) in enumerate(results):
            ax = axes[row, column]
            for k, name in enumerate(solvers):
                points = sorted(errors[name].items())
                x, y = [nfe for nfe, _ in points], [error.value for _, error in points]
                bars = [2 * error.standard_error for _, error in points]
                style = {"color": COLOURS[k % len(COLOURS)], "marker": MARKERS[k], "label": name}
                ax.errorbar(x, y, yerr=bars, markersize=4.5, linewidth=1.5, elinewidth=1.0, capsize=2, **style)
            ax.set_xscale("log")
            ax.set_yscale("log")
            values = [error.value for row_ in errors.values() for error in row_.values()]
            ax.set_ylim(0.6 * min(values), min(3.0, 1.6 * max(values)))
            ax.set_title(f"{target.title}, {kind}", fontsize=10)
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
        rows = {}
        for name, solver in (DETERMINISTIC | STOCHASTIC).items():
            rows[name] = measured(target, solver)
            print(f"{time.process_time():5.0f} s  {name}", flush=True)
        results.append((target, rows))
        print(table_of(target, rows), flush=True)
        print(f"\n{time.perf_counter() - start:.0f} s\n", flush=True)
    if not quick:
        write(results)


def write(results: list[tuple[Target, dict[str, Row]]]) -> None:
    """Tables and figure."""
    text = "\n\n".join(table_of(target, {k: v for k, v in rows.items() if v}) for target, rows in results)
    folder = ROOT / "benchmarks" / "results"
    (folder / "work_precision.md").write_text(
        "# Exact error against score evaluations\n\nMade by `python benchmarks/work_precision.py`. Values with ± and a "
        f"standard error are estimates by randomised quasi-Monte Carlo.\n\n{text}\n"
    )
    record = [
        {
            "target": t.title,
            "measure": t.measure,
            "errors": {name: {n: e.value for n, e in row.items()} for name, row in rows.items()},
            "standard_errors": {
                name: errors
                for name, row in rows.items()
                if (errors := {n: e.standard_error for n, e in row.items() if e.standard_error})
            },
        }
        for t, rows in results
    ]
    (folder / "work_precision.json").write_text(json.dumps(record, indent=1) + "\n")
    figure(results, ROOT / "assets" / "work_precision.png")


if __name__ == "__main__":
    main()
