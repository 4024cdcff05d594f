"""A stochastic Lotka-Volterra model fitted to what was seen of it, with standard errors, and what it foresees.

Prey U and predators V, each with noise in proportion to its number,

    dU = (a U - b U V) dt + s U dW1,      dV = (c U V - d V) dt + r V dW2,

are observed at irregular times. The pseudo-likelihood takes Euler's normal law from each observation to the next; its
maximum and curvature give six parameters with standard errors, which are compared with those the data were made with.
The fitted model then foresees the end of each path from its last observation, and how the mean number of prey depends
on each parameter comes out of the same kernel and its reverse. Takes about 20 s.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import sdesolve as sds
from sdesolve import plotting

NAMES = ("a", "b", "c", "d", "s", "r")
TRUTH = torch.tensor([1.1, 0.4, 0.1, 0.4, 0.10, 0.12], dtype=torch.float64)
START = torch.tensor([10.0, 5.0], dtype=torch.float64)
AHEAD = 5.0


def drift(x: Tensor, t: Tensor, p: Tensor) -> Tensor:
    U, V = x.unbind(1)
    return torch.stack([p[0] * U - p[1] * U * V, p[2] * U * V - p[3] * V], 1)


def diffusion(x: Tensor, t: Tensor, p: Tensor) -> Tensor:
    return x * p[4:]


MODEL = sds.SDE(drift, diffusion)


def observed(paths: int, count: int, end: float, options: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Irregular times, and paths seen there, made in steps a tenth of those between observations."""
    generator = torch.Generator().manual_seed(1)
    inner = torch.rand(count - 1, generator=generator, dtype=torch.float64).sort().values * end
    times = torch.cat([torch.zeros(1, dtype=torch.float64), inner, torch.tensor([end], dtype=torch.float64)])
    x0 = START.expand(paths, 2)
    steps = 10 * count
    sol = sds.solve(MODEL, x0, 0.0, end, steps, params=TRUTH, save_at=times, **options)
    return times, sol.xs


def fitted(times: Tensor, paths: Tensor) -> tuple[Tensor, Tensor]:
    """The parameters of largest pseudo-likelihood, and their standard errors by its curvature."""

    def total(log_p: Tensor) -> Tensor:
        return sds.pseudo_log_likelihood(MODEL, times, paths, params=log_p.exp()).sum()

    log_p = torch.full((6,), -1.0, dtype=torch.float64, requires_grad=True)
    optimiser = torch.optim.LBFGS([log_p], max_iter=200, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimiser.zero_grad()
        value = -total(log_p)
        value.backward()
        return value

    optimiser.step(loss)
    curvature = -torch.autograd.functional.hessian(total, log_p.detach())
    p = log_p.detach().exp()
    return p, p * torch.linalg.inv(curvature).diagonal().sqrt()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("outputs"), help="folder for the picture")
    parser.add_argument("--quick", action="store_true", help="fewer observations: a few seconds")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    paths, count, ensemble, steps = (2, 150, 32, 10) if arguments.quick else (4, 2000, 8192, 500)
    end = 20.0

    backend = "eager" if arguments.quick else "auto"  # compiling takes longer than a few steps
    options: dict[str, Any] = {"solver": sds.EulerMaruyama(), "seed": 3, "backend": backend}
    times, seen = observed(paths, count, end, options)
    p, error = fitted(times, seen)
    print(f"{paths} paths of {count} observations each, at irregular times up to {end:g}")
    print(f"{'':4s}{'made with':>12s}{'found':>12s}{'+-':>10s}{'off by':>10s}")
    for name, made, found, e in zip(NAMES, TRUTH.tolist(), p.tolist(), error.tolist(), strict=True):
        print(f"{name:4s}{made:12.4f}{found:12.4f}{e:10.4f}{(found - made) / e:7.1f} se")
    print(f"largest deviation: {float(((p - TRUTH) / error).abs().max()):.1f} standard errors")

    ahead = torch.linspace(end, end + AHEAD, 101, dtype=torch.float64)[1:]
    last = seen[-1, 0].expand(ensemble, 2).contiguous()
    sol = sds.solve(MODEL, last, end, end + AHEAD, steps, params=p, save_at=ahead, **options)
    made = sds.solve(MODEL, last, end, end + AHEAD, steps, params=TRUTH, save_at=ahead, **options)
    print(f"\n{ensemble} paths of the fitted model from the last observation, {sol.stats.execution}")
    print(f"{'mean at t = ' + format(end + AHEAD, 'g'):16s}{'prey':>10s}{'predators':>12s}")
    for name, of in (("fitted", sol), ("made the data", made)):
        print(f"{name:16s}{of.x1[:, 0].mean():10.3f}{of.x1[:, 1].mean():12.3f}")

    leaf = p.clone().requires_grad_()
    found = sds.sensitivity(
        MODEL, last, end, end + AHEAD, steps, payoff=lambda x: x[:, 0], wrt=leaf, params=leaf, **options
    )
    small = 1e-4
    finite = []

    def prey(q: Tensor) -> Tensor:
        return sds.solve(MODEL, last, end, end + AHEAD, steps, params=q, **options).x1[:, 0].mean()

    for i in range(6):
        up, down = p.clone(), p.clone()
        up[i] += small
        down[i] -= small
        finite.append(float(prey(up) - prey(down)) / (2 * small))
    print(f"\nMean prey there, {float(found.value):.3f} +- {float(found.value_error):.3f}, and its derivatives")
    print(f"{'':4s}{'gradient':>12s}{'+-':>10s}{'differences':>14s}   ({found.execution}, same noise)")
    for name, d, e, other in zip(NAMES, found.gradient.tolist(), found.gradient_error.tolist(), finite, strict=True):
        print(f"{name:4s}{d:12.4f}{e:10.4f}{other:14.4f}")

    titles = ["Prey", "Predators", "Parameters: found over true"]
    figure, axes = plotting.panels(3, titles=titles, width=3.7, height=3.4)
    blue, red = plotting.COLOURS[:2]
    for i, axis in enumerate(axes[:2]):
        levels = torch.tensor([0.05, 0.5, 0.95], dtype=torch.float64)
        low, middle, high = sol.xs[:, :, i].quantile(levels, dim=1)
        axis.plot(times, seen[:, 0, i], ".", color=blue, markersize=1.5, label="observed")
        axis.fill_between(ahead, low, high, color=red, alpha=0.2, linewidth=0, label="foreseen, 90%")
        axis.plot(ahead, middle, color=red, linewidth=1.5)
        axis.set(xlabel="time")
    axes[0].legend(frameon=False, fontsize=9)
    axes[2].errorbar(range(6), p / TRUTH, 2 * error / TRUTH, fmt="o", color=blue, label="2 standard errors")
    axes[2].axhline(1.0, color=red, linewidth=1.0)
    axes[2].set_xticks(range(6), NAMES)
    axes[2].legend(frameon=False, fontsize=9, loc="lower right")
    figure.savefig(arguments.out / "lotka_volterra.png")


if __name__ == "__main__":
    main()
