"""Figures that are not the ratio of two timings: memory, first calls, imports, and what a call adds to its kernel."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import sdesolve as sds

__all__ = ["FIGURES", "SAMPLERS_BESIDE_A_NETWORK", "Figure", "peak_of"]

ROOT = Path(__file__).parents[1]


class Figure(NamedTuple):
    """A number of a kind, for each contender that has one; smaller is better."""

    unit: str
    measure: Callable[[], Mapping[str, float]]
    quick: bool = True


def _output(code: str, *arguments: str, **environment: str) -> float:
    """The last word that a process of its own prints."""
    path = os.pathsep.join(filter(None, [str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")]))
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True,
        env=os.environ | {"PYTHONPATH": path} | environment,
    )  # fmt: skip
    return float(done.stdout.split()[-1])


# The peak of resident memory while `call` runs, in bytes above what was there before; Linux only.
_PEAK = """
import pathlib, sys
def kib(field):
    return int(pathlib.Path("/proc/self/status").read_text().split(field + ":")[1].split()[0])
def peak(call):
    before = kib("VmRSS")
    pathlib.Path("/proc/self/clear_refs").write_text("5")
    kept = call()
    return (kib("VmHWM") - before) * 1024
"""
_LOSS = (
    _PEAK
    + """
import torch, sdesolve_kernels as k
output = torch.ones(64, 1 << 18, requires_grad=True)
def sdesolve(output):
    k.dsm_loss(output, None, 0.0, 1.0, 1.0, seed=0).backward()
def eager(output):
    z = torch.randn_like(output)  # made for the perturbed data, so it is there until the loss is known
    (output - z).square().flatten(1).mean(1).mean().backward()
call = {"sdesolve": sdesolve, "torch": eager}[sys.argv[1]]
call(torch.zeros(600, 600, requires_grad=True))
print(peak(lambda: call(output)) / (4 * output.numel()))
"""
)
_RUN = (
    _PEAK
    + """
import torch, sdesolve as sds
paths, width, steps, runs = map(int, sys.argv[1:5])
sde = sds.SDE(lambda x, t: 1.5 * x, lambda x, t: 0.01 * x)
solve = lambda x, n: sds.solve(sde, x, 0.0, 1.0, n, solver=sds.EulerMaruyama(), seed=0, backend=sys.argv[5]).x1
solve(torch.full((1000, width), 0.1), 4)
x0 = torch.full((paths, width), 0.1)
for _ in range(runs):
    held = x0.numel() * 4 + peak(lambda: solve(x0, steps))
print(held)
"""
)
_FIRST = """
import sys, time, torch, sdesolve as sds
def drift(x, t):
    a, b, c, d = x.unbind(1)
    return torch.stack([b - a, a * (2.0 - c) - b, a * b - c * d, torch.sin(a) - d], 1)
sde = sds.SDE(drift, lambda x, t: 0.1 * torch.tanh(x), noise="diagonal")
x0 = torch.ones(64, 4)
start = time.process_time()
sds.solve(sde, x0, 0.0, 1.0, 100, solver=getattr(sds, sys.argv[1])(), seed=0, backend="fused")
print(time.process_time() - start)
"""
_IMPORT = "import time; start = time.perf_counter(); import {}; print(time.perf_counter() - start)"


def peak_of(paths: int, width: int, steps: int, runs: int = 2, backend: str = "fused") -> float:
    """Bytes that the last of some runs to the last state holds at its peak, the start among them.

    The first run of a batch of new size does a step in torch as well, on all rows, to compare the kernel with.
    """
    return _output(_RUN, str(paths), str(width), str(steps), str(runs), backend)


def _loss() -> dict[str, float]:
    return {who: _output(_LOSS, who) for who in ("sdesolve", "torch")}


def _first_call() -> dict[str, float]:
    """Of the process's own time: a compiler has one thread, and nothing to wait for."""
    found = {}
    for who, solver in (("sdesolve", "EulerMaruyama"), ("SRIW1", "SRIW1")):
        with tempfile.TemporaryDirectory() as cache:
            found[who] = _output(_FIRST, solver, SDESOLVE_CACHE=cache)
            later = [_output(_FIRST, solver, SDESOLVE_CACHE=cache) for _ in range(3)]
        found[f"{who}, kernel on disk"] = statistics.median(later)
    return found


def _import() -> dict[str, float]:
    """Interleaved; the first of each fills the caches of files and bytecode."""
    ratios = []
    for turn in range(6):
        torch_alone, ours = (_output(_IMPORT.format(name)) for name in ("torch", "sdesolve"))
        if turn:
            ratios.append(ours / torch_alone)
    return {"sdesolve": statistics.median(ratios)}


def _linear(paths: int, steps: int = 256) -> Callable[[], Any]:
    sde = sds.SDE(lambda x, t: 1.5 * x, lambda x, t: 0.01 * x, noise="diagonal")
    x0 = torch.full((paths, 3), 0.1)
    return lambda: sds.solve(sde, x0, 0.0, 1.0, steps, solver=sds.EulerMaruyama(), seed=0, backend="fused").x1


def _few_paths() -> dict[str, float]:
    run, times = _linear(16), []
    for _ in range(60):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return {"sdesolve": statistics.median(times[10:]) / 256 * 1e6}


def _over_kernel() -> dict[str, float]:
    from sdesolve_kernels.trajectory import numba_launch as launch

    run, inside, ratios = _linear(1 << 20), [0.0], []
    original = launch.split

    def timed(*args: Any) -> None:
        start = time.perf_counter()
        original(*args)
        inside[0] = time.perf_counter() - start

    launch.split = timed
    try:
        for _ in range(9):
            time.sleep(0.02)
            start = time.perf_counter()
            run()
            ratios.append((time.perf_counter() - start) / inside[0])
    finally:
        launch.split = original
    return {"sdesolve": statistics.median(ratios[1:])}


def _sweep() -> dict[str, float]:
    from benchmarks.models import MODELS

    times = []
    for _ in range(4):
        start = time.perf_counter()
        MODELS["stress"].solve(6720, backend="fused")
        times.append(time.perf_counter() - start)
    return {"sdesolve": statistics.median(times[1:])}


def _increments() -> dict[str, float]:
    """Over the time with normals: 65,536 paths of a scalar equation."""
    sde = sds.SDE(lambda x, t: 1.5 * x, lambda x, t: 0.01 * x)
    x0 = torch.full((65_536, 1), 0.1)

    def run(kind: Any) -> float:
        start = time.perf_counter()
        sds.solve(sde, x0, 0.0, 1.0, 256, solver=sds.EulerMaruyama(), seed=0, increments=kind, backend="fused")
        return time.perf_counter() - start

    rounds = [{kind: run(kind) for kind in ("normal", "two-point", "three-point")} for _ in range(12)][1:]
    return {kind: statistics.median(r[kind] / r["normal"] for r in rounds) for kind in ("two-point", "three-point")}


_IMAGES = (64, 3, 32, 32)
SAMPLERS_BESIDE_A_NETWORK = {
    "DDIM": sds.DDIM(), "DPM-Solver++ 2M": sds.DPMSolverPP(2), "SA-Solver (3, 3)": sds.SASolver(3, 3),
    "EDM Heun": sds.EDMHeun(),
}  # fmt: skip


class _Timed(nn.Module):
    """A network that adds up the time spent in it."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net, self.seconds = net, 0.0

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        start = time.perf_counter()
        y: Tensor = self.net(x, t)
        self.seconds += time.perf_counter() - start
        return y


def _beside_a_network() -> dict[str, float]:
    """A whole call of `sample` over the time that it spends in its network."""
    torch.manual_seed(0)
    process, net = sds.VP(), _Timed(sds.nn.ConvNet(_IMAGES[1:], channels=32, depth=4))
    score, found = sds.NetworkScore(net, process), {}
    for name, solver in SAMPLERS_BESIDE_A_NETWORK.items():
        ratios = []
        for _ in range(4):
            net.seconds, start = 0.0, time.perf_counter()
            sds.sample(process, score, _IMAGES, steps=4, solver=solver, seed=0)
            ratios.append((time.perf_counter() - start) / net.seconds)
        found[name] = statistics.median(ratios[1:])
    return found


FIGURES: dict[str, Figure] = {
    "peak of dsm_loss": Figure("tensors of the batch's size, the gradient among them", _loss),
    "peak of a run, 64 steps": Figure(
        "tensors of the start's size, the start among them", lambda: {"sdesolve": peak_of(1 << 23, 3, 64) / (3 << 25)}
    ),
    "peak of a first run, 64 steps": Figure(
        "tensors of the start's size, the start among them",
        lambda: {
            who: peak_of(1 << 22, 3, 64, 1, backend) / (3 << 24)
            for who, backend in (("sdesolve", "fused"), ("sdesolve eager", "eager"))
        },
    ),
    "peak of a run, 4 steps": Figure(
        "tensors of the start's size, the start among them", lambda: {"sdesolve": peak_of(1 << 23, 3, 4) / (3 << 25)},
        quick=False,
    ),
    "first call": Figure("s of CPU, tracing and compiling a 4-dimensional system", _first_call),
    "import over torch's": Figure("times the time of import torch", _import),
    "16 paths, a step": Figure("us, all that a call of 256 steps does", _few_paths),
    "solve over its kernel": Figure("times the kernel, 1M paths x 256", _over_kernel),
    "sampler over its network": Figure("times the network's, 64 x 3 x 32 x 32, 4 steps", _beside_a_network),
    "stress response, 6720 x 10000": Figure("s", _sweep, quick=False),
    "weak increments over normals": Figure("times the time with normals", _increments, quick=False),
}  # fmt: skip
