"""Any SDE, thousands of parameters at once: noise in gene expression, against its exact law.

A gene makes mRNA, mRNA makes protein, and both decay. The chemical Langevin equation of these four reactions (Gillespie
2000) is, for counts M and P,

    dM = (k - g M) dt + sqrt(k) dW1 - sqrt(g M) dW2,      dP = (b M - d P) dt + sqrt(b M) dW3 - sqrt(d P) dW4.

Its propensities are linear, so mean and covariance solve a linear equation and are known at every time; when all has
settled, variance over mean of P (the Fano factor) is 1 + b / (g + d) (Thattai and van Oudenaarden 2001). Every path has
parameters of its own, and all paths and steps are one generated kernel.

Then strong orders on geometric Brownian motion, whose solution along the very path that a solver took is known. Takes
about 10 s.
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import sdesolve as sds
from sdesolve import plotting

MAKE, DECAY_M, DECAY_P = 40.0, 1.0, 0.25
"""k, g and d; b is what is swept."""


def drift(x: Tensor, t: Tensor, p: Tensor) -> Tensor:
    M, P = x[:, 0], x[:, 1]
    return torch.stack([MAKE - DECAY_M * M, p[:, 0] * M - DECAY_P * P], dim=1)


def diffusion(x: Tensor, t: Tensor, p: Tensor) -> Tensor:
    """``(batch, 2, 4)``: one column for each reaction."""
    M, P = x.clamp(min=0.0).unbind(1)
    none = torch.zeros_like(M)
    m = torch.stack([none + math.sqrt(MAKE), -(DECAY_M * M).sqrt(), none, none], dim=1)
    p_row = torch.stack([none, none, (p[:, 0] * M).sqrt(), -(DECAY_P * P).sqrt()], dim=1)
    return torch.stack([m, p_row], dim=1)


def exact_moments(b: float, ts: Tensor) -> tuple[Tensor, Tensor]:
    """Of P at times ``ts`` from an empty cell: the linear equation of the vector (m_M, m_P, C_MM, C_MP, C_PP, 1)."""
    k, g, d = MAKE, DECAY_M, DECAY_P
    A = torch.tensor(
        [
            [-g, 0, 0, 0, 0, k],
            [b, -d, 0, 0, 0, 0],
            [g, 0, -2 * g, 0, 0, k],
            [0, 0, b, -(g + d), 0, 0],
            [b, d, 0, 2 * b, -2 * d, 0],
            [0, 0, 0, 0, 0, 0],
        ],
        dtype=torch.float64,
    )
    y = torch.matrix_exp(ts.double()[:, None, None] * A)[:, :, 5]
    return y[:, 1], y[:, 4]


def expression(out: dict[str, Any], quick: bool) -> None:
    """The sweep of b, and a look at one of its values over time."""
    cell = sds.SDE(drift, diffusion, noise="general")
    rates = torch.linspace(0.5, 8.0, 16)
    copies, steps, end = (500, 1000, 20.0) if quick else (4000, 4000, 40.0)
    p = rates.repeat_interleave(copies)[:, None]
    started = time.perf_counter()
    sol = sds.solve(cell, torch.zeros(len(p), 2), 0.0, end, steps, solver=sds.EulerMaruyama(), seed=0, params=p)
    first = time.perf_counter() - started
    started = time.perf_counter()
    sol = sds.solve(cell, torch.zeros(len(p), 2), 0.0, end, steps, solver=sds.EulerMaruyama(), seed=1, params=p)
    again = time.perf_counter() - started
    print(f"{len(p)} cells, {steps} steps, backend {sol.stats.backend}: {sol.stats.reason}")
    print(f"first call {first:.2f} s, next {again:.2f} s, {1e9 * again / len(p) / steps:.1f} ns a cell and step")
    P = sol.x1[:, 1].double().reshape(len(rates), copies)
    fano = P.var(1) / P.mean(1)
    error = fano * (2.0 / copies) ** 0.5
    exact = torch.stack([v[0] / m[0] for m, v in (exact_moments(float(b), torch.tensor([end])) for b in rates)])
    print(f"\n{'b':>6s}{'Fano factor of P':>20s}{'+-':>8s}{'exact':>10s}{'settled':>10s}")
    for i in range(0, len(rates), 3):
        b = float(rates[i])
        print(f"{b:6.1f}{float(fano[i]):20.3f}{float(error[i]):8.3f}{float(exact[i]):10.3f}"
              f"{1 + b / (DECAY_M + DECAY_P):10.3f}")  # fmt: skip
    print(f"largest deviation from the exact: {float(((fano - exact) / error).abs().max()):.1f} standard errors")

    # Dense output: any times, on or between the steps; or moments over the cells, without keeping a path.
    b, ts = torch.full((16 * copies, 1), 4.0), torch.linspace(0.0, 20.0, 81)[1:]
    options = {"solver": sds.EulerMaruyama(), "seed": 2, "save_at": ts.tolist()}
    few = sds.solve(cell, torch.zeros(20, 2), 0.0, 20.0, 500, params=b[:20], **options)
    mean, variance = exact_moments(4.0, ts)
    print(f"\nP over time, b = 4, {len(b)} cells from empty: largest error at {len(ts)} times, relative to the last")
    print(f"{'steps':>6s}{'mean':>10s}{'variance':>10s}")
    for n in (160, 320, 640, 1280, 2560):
        found = sds.solve(cell, torch.zeros(len(b), 2), 0.0, 20.0, n, params=b, reduce="moments", **options)
        worst = (found.mean[:, 1] - mean).abs().max() / mean[-1]
        worst_variance = (found.variance[:, 1] - variance).abs().max() / variance[-1]
        print(f"{n:6d}{float(worst):10.2%}{float(worst_variance):10.2%}")
    chance = (float(variance[-1] / len(b)) ** 0.5 / float(mean[-1]), (2 / len(b)) ** 0.5)
    print(f"chance{chance[0]:10.2%}{chance[1]:10.2%}   (one standard error)")
    out.update(few=few, ts=ts, mean=mean, std=variance.sqrt(), rates=rates, fano=fano, error=error, exact=exact)


def strong_orders(out: dict[str, Any], quick: bool) -> None:
    """Errors along one path, at several resolutions of it: ``substeps`` makes coarse increments sums of fine ones."""
    mu, sigma, finest, paths = 0.5, 0.8, 1024, 1000 if quick else 10_000
    gbm = sds.SDE(lambda x, t: mu * x, lambda x, t: sigma * x, noise="diagonal")
    x0 = torch.ones(paths, 1, dtype=torch.float64)
    dW = sds.BrownianPath(3, substeps=finest).increments(torch.tensor([0.0, 1.0]), (paths, 1), dtype=torch.float64)
    truth = ((mu - 0.5 * sigma**2) + sigma * dW[0]).exp()
    numbers = [16, 32, 64, 128, 256, 512, 1024]
    curves = {}
    print(f"\nStrong error E|X_1 - exact| of geometric Brownian motion, {paths} paths")
    print(f"{'steps':18s}" + "".join(f"{n:>9d}" for n in numbers) + f"{'order':>8s}")
    for solver in (sds.EulerMaruyama(), sds.Milstein()):
        errors = []
        for n in numbers:
            noise = sds.BrownianPath(3, substeps=finest // n)
            x = sds.solve(gbm, x0, 0.0, 1.0, n, solver=solver, noise=noise).x1
            errors.append(float((x - truth).abs().mean()))
        name = type(solver).__name__
        curves[name] = (numbers, errors)
        order = math.log(errors[0] / errors[-1]) / math.log(numbers[-1] / numbers[0])
        print(f"{name:18s}" + "".join(f"{e:9.1e}" for e in errors) + f"{order:8.2f}")
    out["orders"] = curves


def picture(found: dict[str, Any]) -> Any:
    titles = ["Protein in 20 cells, b = 4", "Noise in protein", "Strong error"]
    figure, (left, middle, right) = plotting.panels(3, titles=titles, width=3.7, height=3.4)
    blue, red = plotting.COLOURS[:2]
    ts, mean, std = found["ts"], found["mean"], found["std"]
    left.plot(ts, found["few"].xs[:, :, 1], color=blue, linewidth=0.5, alpha=0.5)
    left.fill_between(ts, mean - 2 * std, mean + 2 * std, color=red, alpha=0.15, linewidth=0)
    left.plot(ts, mean, color=red, linewidth=1.8, label="exact mean, 2 sd")
    left.set(xlabel="time", ylabel="copies of the protein")
    left.legend(frameon=False, fontsize=9, loc="lower right")
    middle.plot(found["rates"], found["exact"], color=red, linewidth=1.8, label="exact")
    middle.errorbar(found["rates"], found["fano"], 2 * found["error"], fmt="o", color=blue, markersize=3.5,
                    linewidth=1.0, label="found, 2 standard errors")  # fmt: skip
    middle.set(xlabel="proteins from one mRNA in unit time, b", ylabel="variance / mean")
    middle.legend(frameon=False, fontsize=9)
    plotting.error_curves(found["orders"], axes=right, orders=(0.5, 1), y_label="E|X - exact|")
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("outputs"), help="folder for the picture")
    parser.add_argument("--quick", action="store_true", help="fewer cells and paths: a few seconds")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    found: dict[str, Any] = {}
    expression(found, arguments.quick)
    strong_orders(found, arguments.quick)
    picture(found).savefig(arguments.out / "any_sde.png")


if __name__ == "__main__":
    main()
