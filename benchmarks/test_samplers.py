"""Samplers with a network in the loop: what a sampler costs beside its network, and exact error against evaluations.

``python -m pytest benchmarks/test_samplers.py -s``. Overhead is the time of a whole `sample` less the time spent inside
the network during that same call, as a share of the latter; the median of several calls. Quality is the relative
Wasserstein distance of ``tests/samplers/test_published_table.py``, which has no Monte Carlo error.
"""

from __future__ import annotations

import importlib.util
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sdesolve as sds

_spec = importlib.util.spec_from_file_location(
    "sdesolve_published_table", Path(__file__).parents[1] / "tests" / "samplers" / "test_published_table.py"
)
assert _spec is not None
assert _spec.loader is not None
_table = importlib.util.module_from_spec(_spec)
sys.modules[_spec.name] = _table
_spec.loader.exec_module(_table)

SHAPE = (64, 3, 32, 32)
SAMPLERS = [
    *(sds.EulerMaruyama(), sds.Ancestral(), sds.DDIM(), sds.DPMSolverPP(2), sds.SDEDPMSolverPP(3)),
    *(sds.SASolver(3, 3), sds.UniPC(3), sds.DEIS(4), sds.DPMSolver(3), sds.EDMHeun(), sds.SDEDPMSolverPP2S()),
]
# Published figures of `_table.TABLE` at the evaluations that tests leave out; a star marks the floor of the start.
MORE = {
    sds.DDIM(): (1.561e-2, 8.801e-3),
    sds.EDMHeun(): (1.786e-3, 2.171e-3),
    sds.DPM2(): (1.932e-3, 2.258e-3),
    sds.LinearMultistep(3): (2.439e-3, 2.395e-3),
    sds.DPMSolverPP(2): (2.167e-3, 2.332e-3),
    sds.DPMSolverPP(3): (2.333e-3, 2.375e-3),
    sds.ReverseDiffusion(): (2.609e-2, 1.282e-2),
    sds.Ancestral(): (2.884e-2, 1.455e-2),
    sds.SDEDPMSolverPP(2): (9.374e-4, 2.225e-4),
    sds.EDMHeun(churn=40.0, churn_range=(0.01, 50.0)): (1.177e-2, 3.649e-3),
}


class Timed(nn.Module):
    """A network that adds up the time spent in it."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net, self.seconds, self.calls = net, 0.0, 0

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        start = time.perf_counter()
        y = self.net(x, t)
        self.seconds += time.perf_counter() - start
        self.calls += 1
        return y


@pytest.mark.parametrize("solver", SAMPLERS, ids=repr)
def test_overhead_beside_the_network(benchmark: Any, solver: Any) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    process = sds.VP()
    net = Timed(sds.nn.ConvNet(SHAPE[1:], channels=32, depth=4))
    score = sds.NetworkScore(net, process)
    shares = []

    def call() -> None:
        net.seconds = 0.0
        start = time.perf_counter()
        sds.sample(process, score, SHAPE, steps=4, solver=solver, seed=0)
        shares.append((time.perf_counter() - start) / net.seconds - 1.0)

    benchmark.pedantic(call, rounds=3, warmup_rounds=1)
    torch.set_num_threads(before)
    share = statistics.median(shares[1:])
    benchmark.extra_info["overhead_percent"] = float(f"{100 * share:.3g}")
    print(f"\n{solver!r}: {100 * share:.2f}% beside the network's {1e3 * net.seconds:.0f} ms")


@pytest.mark.parametrize("solver", MORE, ids=repr)
def test_quality_at_many_evaluations(benchmark: Any, solver: Any) -> None:
    errors = benchmark.pedantic(lambda: [_table.relative_w2(solver, n) for n in (159, 319)], rounds=1)
    for error, figure in zip(errors, MORE[solver], strict=True):
        starred = figure in (2.171e-3, 2.258e-3, 2.439e-3, 2.395e-3, 2.167e-3, 2.332e-3, 2.333e-3, 2.375e-3)
        assert error == pytest.approx(figure, rel=0.03 if starred else 0.01)
    benchmark.extra_info["relative_w2"] = [float(f"{error:.4g}") for error in errors]
    print(f"\n{solver!r}: {errors[0]:.4g} at 159 evaluations, {errors[1]:.4g} at 319")
