"""What generated trajectory kernels compile to, on any machine.

From the repository's root: ``PYTHONPATH=.:kernels python benchmarks/trajectory_report.py``.

The models of `models` go through the public `solve`, which launches on a recorder instead of a device; what it recorded
is compiled ahead of time and counted as in `sdesolve_kernels.report`. ``per_element`` is instructions per path-step.
A gradient takes the forward run, its steps once more, and the way back, which is what is counted as "gradient"; "jvp"
carries one tangent, "jacfwd" four.
"""

from __future__ import annotations

import argparse
import contextlib
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from sdesolve_kernels import register_backend, use_backend
from sdesolve_kernels._triton.arguments import Launch, recording
from sdesolve_kernels._triton.backend import TritonBackend
from sdesolve_kernels.report import Found, add_options, figures, finish
from torch.func import jacfwd, jvp

import sdesolve as sds
from benchmarks.gradients import HESTON, LOTKA_VOLTERRA, equation
from benchmarks.models import MODELS
from benchmarks.schemes import CASES, T1, WIDTH

__all__ = ["TABLE", "launches", "on_the_host", "report"]

TABLE = Path(__file__).parent / "results" / "trajectory_report.json"
_MANY, _FEW = 1 << 16, 1024


class _OnTheHost(TritonBackend):
    name = "triton on the host"
    devices = frozenset({"cpu"})
    priority = -1
    compared = False


@contextlib.contextmanager
def on_the_host() -> Iterator[None]:
    """Runs fused integrations of tensors in host memory on the Triton back end: recorded, or interpreted."""
    register_backend(_OnTheHost(), replace=True)
    with use_backend(_OnTheHost.name):
        yield


def launches() -> dict[str, tuple[int, Launch]]:
    """Bytes of an element and launch, by name: every model on many paths, and some in other ways."""
    cases: dict[str, tuple[str, int, dict[str, Any]]] = {name: (name, _MANY, {}) for name in MODELS}
    cases["geometric few paths"] = ("geometric", _FEW, {})
    cases["linear few paths"] = ("linear", _FEW, {})
    cases["linear two-point"] = ("linear", _MANY, {"increments": "two-point"})
    cases["linear moments"] = ("linear", _MANY, {"save_at": [0.5, 1.0], "reduce": "moments"})
    cases["linear uneven"] = ("linear", _MANY, {"grid": torch.linspace(0, 1, 9, dtype=torch.float64) ** 2})
    found = {}
    for label, (name, paths, options) in cases.items():
        with on_the_host(), recording() as made:
            MODELS[name].solve(paths, 8, backend="fused", check_finite=False, **options)
        (launch,) = made
        found[f"{label} float32"] = 4, launch
    for scheme in ("SRIW1", "ShARK", "SPaRK"):
        case, x0 = CASES[scheme], torch.full((_MANY, WIDTH), CASES[scheme].x0)
        with on_the_host(), recording() as made:
            sds.solve(case.sde, x0, 0.0, T1, 8, solver=case.solver, seed=0, backend="fused", check_finite=False)
        found[f"{scheme} float32"] = 4, made[0]
    for label, (sde, x0) in _fitted().items():
        with on_the_host(), recording() as made:
            sol = sds.solve(
                sde, x0, 0.0, 1.0, 8, solver=sds.EulerMaruyama(), seed=0, backend="fused", check_finite=False
            )
            sol.x1.sum().backward()
        found[f"{label} gradient float32"] = 4, next(item for item in made if "cotangents" in item.arguments)
    p, x0 = torch.tensor(LOTKA_VOLTERRA.values), torch.tensor(LOTKA_VOLTERRA.start).repeat(_MANY, 1)
    options: dict[str, Any] = {
        "steps": 8,
        "solver": sds.EulerMaruyama(),
        "seed": 0,
        "backend": "fused",
        "check_finite": False,
    }

    def end(p: torch.Tensor) -> torch.Tensor:
        return sds.solve(equation(LOTKA_VOLTERRA, p), x0, 0.0, 1.0, **options).x1

    rates, noise = p[:4], p[4:]
    ways = {"jvp": lambda: jvp(end, (p,), (p,)), "jacfwd": lambda: jacfwd(lambda r: end(torch.cat([r, noise])))(rates)}
    for label, differentiate in ways.items():
        with on_the_host(), recording() as made:
            differentiate()
        found[f"lotka-volterra {label} float32"] = 4, made[0]
    return found


def adaptive() -> dict[str, tuple[int, Launch]]:
    """Likewise, of kernels whose lanes choose their steps; they take the longest to compile."""

    def wells(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return 4 * (x - x**3) + t

    def lorenz(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        a, b, c = x.unbind(1)
        return torch.stack([10 * (b - a), a * (28 - c) - b, a * b - 8 / 3 * c], 1)

    def noisy(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return 0.3 * x

    cases: dict[str, tuple[Any, int, Any]] = {
        "Dormand-Prince 3": (sds.ODE(lorenz), 3, sds.DormandPrince()),
        "SPaRK 2": (sds.SDE(wells, lambda x, t: 0.5 * torch.ones_like(x), "additive", "stratonovich"), 2, sds.SPaRK()),
        "SPaRK 3": (sds.SDE(lorenz, noisy, "diagonal", "stratonovich"), 3, sds.SPaRK()),
        "Milstein 4": (sds.SDE(wells, noisy, "diagonal"), 4, sds.Milstein()),
    }
    found = {}
    for label, (sde, d, scheme) in cases.items():
        with on_the_host(), recording() as made, contextlib.suppress(sds.StepLimitError):  # nothing runs
            sds.solve(sde, torch.ones(64, d), 0.0, 1.0, solver=sds.Adaptive(scheme), seed=0, backend="fused")
        found[f"adaptive {label} float32"] = 4, made[-1]
    return found


def _fitted() -> dict[str, tuple[sds.SDE, torch.Tensor]]:
    """Equations whose parameters get gradients, and where their paths start."""
    found = {}
    for label, model in (("lotka-volterra", LOTKA_VOLTERRA), ("heston", HESTON)):
        sde = equation(model, torch.tensor(model.values, requires_grad=True))
        found[label] = sde, torch.tensor(model.start).repeat(_MANY, 1)
    a = torch.eye(3).requires_grad_()
    found["linear"] = sds.SDE(lambda x, t: x @ a, lambda x, t: 0.3 * x, noise="diagonal"), torch.ones(_MANY, 3)
    return found


def report(architectures: list[int], only: str = "") -> Found:
    """Figures by architecture and case."""
    made = {} if only.startswith("adaptive") else launches()
    chosen = {label: case for label, case in {**made, **adaptive()}.items() if re.search(only, label)}
    return {
        f"sm_{a}": {label: figures(launch, a, itemsize) for label, (itemsize, launch) in chosen.items()}
        for a in architectures
    }


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split(":")[0])
    add_options(parser)
    parser.add_argument("--only", default="", help="regular expression: cases in whose name it is found")
    options = parser.parse_args()
    return finish(report(options.arch, options.only), options, TABLE)


if __name__ == "__main__":
    sys.exit(main())
