"""Steps that each path chooses: a double well in nested cells of a tree, and Lorenz' equations for many parameters.

Laws, or states, are held against known values before anything is timed.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

import sdesolve as sds
from benchmarks.ensembles import tensor_of
from benchmarks.registry import BASELINE, Call, Problem, require
from benchmarks.timing import THREADED

__all__ = ["adaptive"]

_PATHS, _PARAMETERS, _END, _TOLERANCE = 4096, 2048, 5.0, 1e-6
_MEAN, _SQUARE = 0.586954, 0.717432  # of the double well from 0.5 at t = 1
_PEERS = {**THREADED, "rounds": 5, "seconds": 4.0}


def adaptive(device: torch.device) -> list[Problem]:
    """All of them; on a CPU."""
    return [_well(rtol) for rtol in (1e-2, 1e-3)] + [_lorenz()] if device.type == "cpu" else []


def _drift(x: Tensor, t: Tensor) -> Tensor:
    return x - x**3


def _diffusion(x: Tensor, t: Tensor) -> Tensor:
    return 0.7 * torch.ones_like(x)


def _well(rtol: float) -> Problem:
    sde, x0 = sds.SDE(_drift, _diffusion, "additive", "stratonovich"), torch.full((_PATHS, 1), 0.5)
    solver = sds.Adaptive(sds.SPaRK(), rtol, rtol)

    def solved(seed: int = 0) -> sds.Solution:
        return sds.solve(sde, x0, 0.0, 1.0, solver=solver, seed=seed, backend="fused")

    def ours() -> Call:
        return lambda: solved().x1

    def diffrax() -> Call:
        require("diffrax", "jax")
        from benchmarks.jax_peers import diffrax_adaptive_well

        return diffrax_adaptive_well(x0, rtol)

    def check(name: str, call: Call) -> str | None:
        x = tensor_of(call())
        for power, mean in ((x, _MEAN), (x.square(), _SQUARE)):
            off = float((power.mean() - mean).abs() / (power.std() / len(x) ** 0.5))
            if off > 5.0:
                return f"a moment is {off:.1f} standard errors off"
        return None

    return Problem(
        f"adaptive SPaRK, double well, {_PATHS} paths, rtol {rtol:g}", "adaptive steps", "path", _PATHS,
        {BASELINE: ours, "diffrax": diffrax}, check, {}, None, ("diffrax",), _PEERS,
    )  # fmt: skip


def _lorenz_drift(x: Tensor, t: Tensor, rho: Tensor) -> Tensor:
    a, b, c = x.unbind(-1)
    return torch.stack([10 * (b - a), a * (rho[:, 0] - c) - b, a * b - 8 / 3 * c], -1)


def _lorenz() -> Problem:
    rho = torch.linspace(0, 21, _PARAMETERS, dtype=torch.float64)[:, None]
    x0 = torch.tensor([[1.0, 0.0, 0.0]], dtype=torch.float64).repeat(_PARAMETERS, 1)
    ode = sds.ODE(_lorenz_drift)  # type: ignore[arg-type]

    def solved(tolerance: float = _TOLERANCE) -> sds.Solution:
        solver = sds.DormandPrince(tolerance, tolerance)
        return sds.solve(ode, x0, 0.0, _END, solver=solver, params=rho, backend="fused")

    def ours() -> Call:
        return lambda: solved().x1

    def torchdiffeq() -> Call:
        require("torchdiffeq")
        from torchdiffeq import odeint

        times = torch.tensor([0.0, _END], dtype=torch.float64)

        def run() -> Any:
            options = {"rtol": _TOLERANCE, "atol": _TOLERANCE, "method": "dopri5"}
            return odeint(lambda t, x: _lorenz_drift(x, t, rho), x0, times, **options)[-1]

        return run

    def diffrax() -> Call:
        require("diffrax", "jax")
        from benchmarks.jax_peers import diffrax_lorenz

        return diffrax_lorenz(x0, rho, _END, _TOLERANCE)

    @functools.cache
    def truth() -> Tensor:
        return solved(1e-11).x1

    def check(name: str, call: Call) -> str | None:
        off = float((tensor_of(call()) - truth()).abs().max())
        return None if off < 0.2 else f"a state is off by {off:.2g}"

    return Problem(
        f"adaptive Dormand-Prince, Lorenz, {_PARAMETERS} parameters", "adaptive steps", "path",
        _PARAMETERS, {BASELINE: ours, "torchdiffeq": torchdiffeq, "diffrax": diffrax},
        check, {}, None, ("diffrax",), _PEERS, truth.cache_clear,
    )  # fmt: skip
