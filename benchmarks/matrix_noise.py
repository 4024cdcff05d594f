"""Matrices of general noise: one step, and the product in it, against torch's matrix products in the same rounds."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import sdesolve_kernels as k
import torch
from sdesolve_kernels import reference_steps
from torch import Tensor

from benchmarks.registry import BASELINE, Build, Call, Problem

__all__ = ["matrix_problems"]

_WHERE: dict[str, Any] = {"seed": 3, "stream": 0, "first_path": 0, "step": 5}
_DT = 0.01
_SIZES = ((65536, 2, 2), (65536, 4, 8), (16384, 16, 16), (16384, 32, 32), (1024, 128, 128), (64, 512, 512))
_TOLERANCE = 1e-4  # in float32, of sums over at most 512 channels


def _inputs(rows: int, d: int, m: int, one: bool, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x, f = (torch.randn(rows, d, generator=generator).to(device) for _ in range(2))
    g = torch.randn(1 if one else rows, d, m, generator=generator).to(device) / m**0.5
    return x, f, g


def _problem(rows: int, d: int, m: int, one: bool, device: torch.device, quick: tuple[str, ...]) -> Problem:
    made = functools.cache(lambda: _inputs(rows, d, m, one, device))

    def normals() -> Tensor:
        return k.normal(rows, m, seed=3, offset=_WHERE["step"] * m, device=device)

    def sdesolve() -> Call:
        x, f, g = made()
        return lambda: k.matrix_step(x, f, g, _DT, **_WHERE)

    def batched() -> Call:
        x, f, g = made()
        each = g.expand(rows, d, m)
        return lambda: x + f * _DT + _DT**0.5 * torch.bmm(each, normals().unsqueeze(-1)).squeeze(-1)

    def shared() -> Call:
        x, f, g = made()
        return lambda: x + f * _DT + _DT**0.5 * (normals() @ g[0].T)

    def summed() -> Call:
        x, f, g = made()
        return lambda: x + f * _DT + _DT**0.5 * (g * normals().unsqueeze(1)).sum(-1)

    def check(name: str, call: Call) -> str | None:
        x, f, g = (t[:64] for t in made())
        dt = torch.tensor(_DT, dtype=torch.float64)
        exact = reference_steps.matrix_step(x.double(), f.double(), g.double(), dt, **_WHERE)
        error = float((call()[:64].double() - exact).abs().max())
        return None if error <= _TOLERANCE else f"off by {error:.1e} where {_TOLERANCE:.0e} is allowed"

    contenders: dict[str, Build] = {BASELINE: sdesolve, "bmm": batched, "sum of products": summed}
    if one:
        contenders["matmul"] = shared
    kind = "one matrix" if one else "a matrix each"
    return Problem(
        f"general noise, {kind}, {rows} x {d} x {m}", "steps", "multiply-add", rows * d * m, contenders, check, {}, 1,
        quick, {"rounds": 9, "seconds": 2.0}, made.cache_clear,
    )  # fmt: skip


def matrix_problems(device: torch.device) -> Iterator[Problem]:
    """Steps with a matrix for each row and with one for all; torch has our normals, and its own products."""
    for one in (False, True):
        for size in _SIZES:
            told = ("bmm", *(("matmul",) if one else ())) if size == (16384, 32, 32) else ()
            yield _problem(*size, one, device, told)
