"""Whole trajectories in one kernel, through public `solve`, against peers and against the same steps in eager torch.

``python -m pytest benchmarks/test_trajectories.py``; ratios are medians over interleaved rounds. A contender is timed
only if the mean of its final states is right.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import sdesolve as sds
from benchmarks.interleave import interleave
from benchmarks.models import MODELS
from benchmarks.peers import LINEAR

ROOT = Path(__file__).parents[1]
STEPS = 256


def _report(benchmark: Any, text: str, **figures: float) -> None:
    benchmark.extra_info |= {k: float(f"{v:.4g}") for k, v in figures.items()}
    print(f"\n{benchmark.name}: {text}")


@pytest.mark.parametrize("paths", [8192, 131_072])
def test_linear_sde_against_peers(benchmark: Any, paths: int) -> None:
    """The figures are speedups of ``sdesolve`` over each."""
    made = {name: make(paths, STEPS) for name, make in LINEAR.items()}
    missing = [name for name, run in made.items() if run is None]
    contenders = {name: run for name, run in made.items() if run is not None}
    expected = 0.1 * (1 + 1.5 / STEPS) ** STEPS
    for name, run in contenders.items():
        x1 = torch.from_numpy(np.array(run().__array__()))
        error = abs(float(x1.double().mean()) - expected) / (0.01 * expected / x1.numel() ** 0.5)
        assert error < 5, f"{name}: the mean of X(1) is {error:.1f} standard errors off"
    timings = interleave(contenders, baseline="sdesolve", rounds=5, min_seconds=0.0, settle=0.02)
    ours = timings["sdesolve"]
    ratios = {name: 1.0 / t.speedup for name, t in timings.items() if name != "sdesolve"}
    per = ours.median / (paths * 3 * STEPS) * 1e9
    text = ", ".join(f"{ratio:.1f} x {name}" for name, ratio in ratios.items())
    text += f"; missing: {', '.join(missing)}" if missing else ""
    _report(benchmark, f"{per:.3f} ns per component-step, {text}", ns_per_component_step=per, **ratios)
    benchmark.pedantic(contenders["sdesolve"], rounds=3)


@pytest.mark.parametrize("name", ["stress", "heston", "lotka-volterra", "lorenz", "mixture"])
def test_models_against_the_eager_loop(benchmark: Any, name: str) -> None:
    """6720 paths (the whole sweep, for the stress response), the same number of steps and step size for both."""
    model = MODELS[name]
    steps = 50
    end = model.span[0] + (model.span[1] - model.span[0]) * (steps / model.steps if name == "stress" else 1.0)
    sde, x0, solver = model.sde(torch.device("cpu")), model.start(6720, torch.device("cpu")), model.solver()
    options = {} if model.params is None else {"params": model.params(6720, torch.device("cpu"))}
    steps_of = {"fused": 2000 if name == "stress" else 500, "eager": steps}

    def run(backend: str) -> torch.Tensor:
        n = steps_of[backend]
        t1 = model.span[0] + (model.span[1] - model.span[0]) * n / model.steps if name == "stress" else model.span[1]
        return sds.solve(sde, x0, model.span[0], t1, n, solver=solver, seed=0, backend=backend, **options).x1

    def same(backend: str) -> torch.Tensor:
        first = sds.solve(sde, x0, model.span[0], end, steps, solver=solver, seed=0, backend=backend, **options)
        return first.x1

    if name not in ("lotka-volterra", "lorenz"):  # those are unstable or chaotic at this step size
        torch.testing.assert_close(same("fused"), same("eager"), rtol=2e-3, atol=2e-3)
    else:
        steps_of["eager"] = 500
    timings = interleave(
        {b: lambda b=b: run(b) for b in ("fused", "eager")}, baseline="eager", rounds=3, min_seconds=0.0, settle=0.02
    )
    per = {b: t.median / (6720 * steps_of[b]) * 1e9 for b, t in timings.items()}
    ratio = per["eager"] / per["fused"]
    _report(
        benchmark,
        f"{per['fused']:.2f} ns per path-step, {ratio:.1f} x the eager loop",
        ns_per_path_step=per["fused"],
        eager=ratio,
    )
    benchmark.pedantic(lambda: run("fused"), rounds=3)


def test_the_whole_stress_response_sweep(benchmark: Any) -> None:
    """6720 trajectories of 10^4 steps."""
    MODELS["stress"].solve(6720, backend="fused")
    benchmark.pedantic(lambda: MODELS["stress"].solve(6720, backend="fused"), rounds=3)


def test_few_paths(benchmark: Any) -> None:
    """16 paths, 256 steps, everything that a call does after the first."""
    run = LINEAR["sdesolve"](16, STEPS)
    assert run is not None
    timings = interleave({"ours": run, "again": run}, baseline="ours", rounds=20)
    per = timings["ours"].median / STEPS * 1e6
    _report(benchmark, f"{per:.2f} us per step", us_per_step=per)
    benchmark.pedantic(run, rounds=20)


def test_solve_beside_its_kernel(benchmark: Any) -> None:
    """`solve`, tensors in and out, over the kernel alone, at 2^20 paths."""
    from sdesolve_kernels.trajectory import launch

    run = LINEAR["sdesolve"](1 << 20, STEPS)
    assert run is not None
    inside: list[float] = []
    original = launch.split

    def timed(*args: Any) -> None:
        start = time.perf_counter()
        original(*args)
        inside.append(time.perf_counter() - start)

    launch.split = timed
    try:
        ratios = []
        for _ in range(7):
            start = time.perf_counter()
            run()
            ratios.append((time.perf_counter() - start) / inside[-1])
    finally:
        launch.split = original
    ratio = sorted(ratios[1:])[3]
    _report(benchmark, f"{ratio:.3f} x the kernel", over_kernel=ratio)
    benchmark.pedantic(run, rounds=3)


_FIRST = """
import time, torch, sdesolve as sds
def drift(x, t):
    a, b, c, d = x.unbind(1)
    return torch.stack([b - a, a * (2.0 - c) - b, a * b - c * d, torch.sin(a) - d], 1)
sde = sds.SDE(drift, lambda x, t: 0.1 * torch.tanh(x), noise="diagonal")
x0 = torch.ones(64, 4)
start = time.perf_counter()
sds.solve(sde, x0, 0.0, 1.0, 100, solver=sds.EulerMaruyama(), seed=0, backend="fused")
print(time.perf_counter() - start)
"""


def test_first_call(benchmark: Any) -> None:
    """Seconds to the first result of a 4-dimensional system, in a new process: compiled, and found on disk."""

    def seconds(cache: str) -> float:
        path = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
        environment = os.environ | {"PYTHONPATH": path, "SDESOLVE_CACHE": cache}
        done = subprocess.run(
            [sys.executable, "-c", _FIRST], capture_output=True, text=True, check=True, env=environment
        )
        return float(done.stdout)

    with tempfile.TemporaryDirectory() as cache:
        compiled = seconds(cache)
        found = min(seconds(cache) for _ in range(3))
    _report(benchmark, f"{compiled:.2f} s, {found:.3f} s from disk", compiled=compiled, from_disk=found)
    benchmark.pedantic(lambda: None, rounds=1)


_PEAK = """
import sys, torch, sdesolve as sds
def kib(field):
    return int(next(l.split()[1] for l in open("/proc/self/status") if l.startswith(field)))
sde = sds.SDE(lambda x, t: 1.5 * x, lambda x, t: 0.01 * x)
solve = lambda x, n: sds.solve(sde, x, 0.0, 1.0, n, solver=sds.EulerMaruyama(), seed=0, backend="fused").x1
solve(torch.full((1000, 3), 0.1), 4)
x0 = torch.full((1 << 23, 3), 0.1)
before = kib("VmRSS")
open("/proc/self/clear_refs", "w").write("5")
x1 = solve(x0, int(sys.argv[1]))
print(1 + (kib("VmHWM") - before) * 1024 / (4 * x0.numel()))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_memory(benchmark: Any) -> None:
    """Peak of a final-state run, start included, in tensors of the start's size, for few steps and for many."""

    def tensors(steps: int) -> float:
        environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])}
        command = [sys.executable, "-c", _PEAK, str(steps)]
        return float(subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout)

    few, many = tensors(4), tensors(64)
    _report(benchmark, f"{few:.2f} tensors for 4 steps, {many:.2f} for 64", few=few, many=many)
    assert max(few, many) < 3
    benchmark.pedantic(lambda: None, rounds=1)


@pytest.mark.parametrize("kind", ["normal", "three-point", "two-point"])
def test_increments(benchmark: Any, kind: Any) -> None:
    """Weak increments beside normals: 65,536 paths of a scalar equation."""
    sde = sds.SDE(lambda x, t: 1.5 * x, lambda x, t: 0.01 * x)
    x0 = torch.full((65_536, 1), 0.1)

    def run(kind: Any) -> torch.Tensor:
        return sds.solve(
            sde, x0, 0.0, 1.0, STEPS, solver=sds.EulerMaruyama(), seed=0, increments=kind, backend="fused"
        ).x1

    timings = interleave({k: lambda k=k: run(k) for k in {"normal", kind}}, baseline="normal", rounds=7)
    t = timings[kind]
    per = t.median / (65_536 * STEPS) * 1e9
    _report(
        benchmark, f"{per:.3f} ns per path-step, {t.speedup:.2f} x normals", ns_per_path_step=per, normals=t.speedup
    )
    benchmark.pedantic(lambda: run(kind), rounds=3)
