"""Noise and step kernels against the torch code that each replaces, with the machine's limits beside them.

The ops and the eager code are those of `gpu_ops`, so that both machines time the same thing.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import sdesolve_kernels as k
import torch
from sdesolve_kernels import reference
from torch import Tensor

from benchmarks.gpu_checks import name_of, value_check
from benchmarks.gpu_ops import CASES, STREAM, Case, States, states
from benchmarks.registry import BASELINE, Build, Call, Limit, Problem, require
from benchmarks.timing import THREADED

__all__ = ["noise_problems", "same_law", "step_problems"]

_WHERE: dict[str, Any] = {"seed": 3, "stream": STREAM, "first_path": 0, "step": 5}
_LAYOUTS = {
    "1 x 4M": (1, 1 << 22), "4096 x 1024": (4096, 1024), "131072 x 3": (131072, 3), "65536 x 1": (65536, 1),
    "64 x 3072": (64, 3072), "1024 x 2": (1024, 2),
}  # fmt: skip
_LARGE, _SMALL = (64, 65536), (64, 16)
_NARROW = {"4M x 1": (1 << 22, 1), "2M x 2": (1 << 21, 2), "64k x 64": (1 << 16, 64)}
_TILE = 1 << 19  # normals that stay in a cache, enough of them for all threads


def _drawn(case: Case) -> Case:
    """`dsm_loss` where eager code has to draw the noise, as ours does."""
    given = case.eager(lambda f: f)

    def eager(wrap: Any) -> Callable[[States], Tensor]:
        del wrap
        return lambda s: given(replace(s, g=torch.randn_like(s.x)))

    return replace(case, name="dsm_loss/noise drawn", eager=eager)


def _in_place(case: Case) -> Case:
    """A step that overwrites its state; eager code tuned by hand."""

    def ours(s: States, **where: Any) -> Tensor:
        return k.euler_maruyama_step(s.x, s.f, s.g, -0.01, out=s.x, **where)

    def eager(wrap: Any) -> Callable[[States], Tensor]:
        del wrap
        return lambda s: s.x.add_(s.f, alpha=-0.01).addcmul_(s.g, torch.randn_like(s.x), value=0.1)

    return replace(case, name="euler_maruyama_step/in place", ours=ours, eager=eager)


STEPS: dict[str, Case] = {
    case.name: case
    for case in (
        *(c for c in CASES.values() if c.timed and not c.launcher and c.name not in ("normal", "dsm_loss/value")),
        _in_place(CASES["euler_maruyama_step/diagonal"]),
        _drawn(CASES["dsm_loss"]),
    )
}


def same_law(result: Tensor, ours: Tensor, other: Tensor, inputs: tuple[Tensor, ...]) -> str | None:
    """What tells `result` from one more draw of a step of which `ours` and `other` are two, by seeds of their own.

    The difference of two draws is noise alone: its mean and its correlation with every input are 0 and its variance is
    that of ``other - ours``, each within five standard errors, and what rounding makes of them.
    """
    if result.shape != ours.shape:
        return f"shape {tuple(result.shape)}, expected {tuple(ours.shape)}"
    d, v = ((a.double() - ours.double()).flatten() for a in (result, other))
    n, sd = d.numel(), float(v.std())
    rounding = torch.finfo(result.dtype).eps * float(result.double().square().mean().sqrt()) / sd
    shift = float(d.mean()) / sd
    if not abs(shift) <= 5 / n**0.5 + 0.05 * rounding:
        return f"the mean is {shift * n**0.5:.1f} standard errors off"
    for name, x in zip("xfg", inputs, strict=False):
        c = x.double().flatten()
        size = sd * float(c.square().mean().sqrt())
        # not 1 / sqrt(n): where the input scales the noise, as g does, the product has heavier tails
        correlation, error = float((d * c).mean()) / size, float((d * c).std()) / size / n**0.5
        if not abs(correlation) <= 5 * error + 2 * rounding:
            return f"the noise correlates with input {name}: {correlation / error:.1f} standard errors"
    spread = [float((e.square() - e.square().mean()).square().mean() / n) ** 0.5 / float(v.var()) for e in (d, v)]
    excess = float(d.var() / v.var()) - 1.0
    if not abs(excess) <= 5 * math.hypot(*spread) + 64 * rounding**2:
        return f"the variance is {excess / math.hypot(*spread):.1f} standard errors off"
    return None


def _steps(
    case: Case, label: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, threads: int | None,
    quick: tuple[str, ...],
) -> Problem:  # fmt: skip
    made = functools.cache(lambda: states(shape, dtype, device))
    elements = math.prod(shape)
    large = elements > 1 << 20

    def sdesolve() -> Call:
        s = made()
        return lambda: case.ours(s, **_WHERE)

    def torch_eager() -> Call:
        s, eager = made(), case.eager(lambda f: f)
        return lambda: eager(s)

    def compiled() -> Call:
        torch.compiler.reset()  # past eight shapes of one function, torch would quietly run it uncompiled
        s, call = made(), case.eager(lambda f: torch.compile(f, dynamic=False))
        return lambda: call(s)

    def copy() -> Call:
        x = made().x
        target = torch.empty_like(x)
        return lambda: target.copy_(x)

    def noise() -> Call:
        buffer = torch.empty(1, _TILE, device=device)

        def fill() -> None:
            for _ in range(elements // _TILE):
                k.normal(1, _TILE, seed=3, out=buffer)

        return fill

    def check(name: str, call: Call) -> str | None:
        if name == BASELINE:
            few = states((4, min(elements // shape[0], 4096)), dtype, device, seed=1)
            kept = few.rows(0, 4).to(dtype) if "in place" not in case.name else replace(few, x=few.x.clone())
            found = value_check(case, kept, _WHERE, case.ours(few, **_WHERE))
            if not found.ok:
                return f"off by {found.error:.3g} where {found.budget:.3g} is allowed"
        s = made()
        begin = s.x.clone()
        ours, other = (case.ours(replace(s, x=begin.clone()), **_WHERE | {"seed": seed}).detach() for seed in (4, 5))
        inputs = (begin, s.f) if case.kernel == "dsm_loss" else (begin, s.f, s.g)  # there g is the noise of eager code
        return same_law(call().detach(), ours, other, inputs)

    contenders: dict[str, Build] = {BASELINE: sdesolve, "torch": torch_eager}
    if threads is None and case.name not in ("euler_maruyama_step/in place", "dsm_loss/noise drawn"):
        contenders["torch.compile"] = compiled
    limits: dict[str, Limit] = {}
    if large and dtype is torch.float32 and threads is None:
        contenders |= {"limit: copy": copy, "limit: noise": noise}
        draws = 2 if case.name == "dsm_loss/training" else 1
        limits = {
            "limit: copy": Limit(case.passes / 2, case.passes * elements * dtype.itemsize, "B"),
            "limit: noise": Limit(draws, draws * elements, "normals"),
        }
    suffix = "" if threads is None else f", {threads} thread{'s' * (threads > 1)}"
    timing = {**THREADED, "rounds": 9, "seconds": 3.0} if large else {"rounds": 15, "seconds": 1.0}
    return Problem(
        f"{case.name}, {label} {name_of(dtype)}{suffix}", "steps", "element", elements, contenders, check, limits,
        threads, quick, timing, made.cache_clear,
    )  # fmt: skip


def step_problems(device: torch.device) -> Iterator[Problem]:
    """Every case in float32, large and small; some of them by dtype, by thread, with few elements a path."""
    told = ("torch", "limit: copy", "limit: noise")
    for name, case in STEPS.items():
        common = name not in ("langevin_step/sample", "langevin_step/dimension", "dsm_loss/per sample")
        yield _steps(case, "4M", _LARGE, torch.float32, device, None, told if common else ())
        yield _steps(case, "1k", _SMALL, torch.float32, device, None, ("torch",) if common else ())
        if device.type == "cpu" and common:
            yield _steps(case, "4M", _LARGE, torch.float32, device, 1, ())
    for name in ("euler_maruyama_step/diagonal", "dsm_loss"):
        for dtype in (torch.float64, torch.bfloat16, torch.float16):
            yield _steps(STEPS[name], "4M", _LARGE, dtype, device, None, ())
    for name in ("euler_maruyama_step/diagonal", "perturb", "langevin_step/batch"):
        for label, shape in _NARROW.items():
            yield _steps(STEPS[name], label, shape, torch.float32, device, None, ())


def _noise(
    label: str, shape: tuple[int, int], dtype: torch.dtype, device: torch.device, threads: int | None,
    quick: tuple[str, ...],
) -> Problem:  # fmt: skip
    count = math.prod(shape)

    def sdesolve() -> Call:
        return lambda: k.normal(*shape, seed=3, offset=6, dtype=dtype, device=device)

    def torch_randn() -> Call:
        return lambda: torch.randn(shape, dtype=dtype, device=device)

    def jax_normal() -> Call:
        require("jax")
        from benchmarks.jax_peers import normals

        return normals(shape, device)

    def fill() -> Call:
        target = torch.empty(shape, dtype=dtype, device=device)
        return lambda: target.fill_(1.5)

    def check(name: str, call: Call) -> str | None:
        z = torch.as_tensor(call()).double()
        if name == BASELINE:
            rows, columns = min(shape[0], 257), min(shape[1], 1031)
            exact = reference.normal(rows, columns, seed=3, stream=k.Stream.DRIVING, offset=6)
            error = float((z[:rows, :columns].cpu() - exact).abs().max())
            if not error <= 1e-5:
                return f"off by {error:.1e}"
        scores = [float(z.mean()) * count**0.5, (float(z.var()) - 1) * (count / 2) ** 0.5]
        return None if max(map(abs, scores)) < 5 else f"mean and variance are {scores} standard errors off"

    contenders: dict[str, Build] = {BASELINE: sdesolve, "torch": torch_randn}
    if dtype is torch.float32 and threads is None:
        contenders |= {"jax": jax_normal, "limit: write": fill}
    suffix = "" if threads is None else f", {threads} thread{'s' * (threads > 1)}"
    limits = {"limit: write": Limit(1.0, count * dtype.itemsize, "B")} if "limit: write" in contenders else {}
    timing = {**(THREADED if count > 1 << 18 else {}), "rounds": 9, "seconds": 2.0}
    return Problem(
        f"normal, {label} {name_of(dtype)}{suffix}", "noise", "normal", count, contenders, check, limits, threads,
        quick, timing,
    )  # fmt: skip


def noise_problems(device: torch.device) -> Iterator[Problem]:
    """Normals by layout, dtype and number of threads."""
    for label, shape in _LAYOUTS.items():
        told = ("torch", "jax", "limit: write") if label == "1 x 4M" else ()
        yield _noise(label, shape, torch.float32, device, None, told)
    yield _noise("1 x 4M", _LAYOUTS["1 x 4M"], torch.float64, device, None, ())
    if device.type == "cpu":
        yield _noise("1 x 4M", _LAYOUTS["1 x 4M"], torch.float32, device, 1, ())
