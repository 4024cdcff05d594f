"""Several threads of Python at once. Torch's forward-mode differentiation has one level for all of them."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from sdesolve_kernels import perturb
from torch.autograd import forward_ad

import sdesolve as sds
from sdesolve._internal.derivatives import jvp, slopes

X0 = torch.linspace(-1.0, 1.0, 12).reshape(6, 2)


@pytest.mark.parametrize("recorded", [True, False], ids=["reverse mode", "forward mode"])
def test_derivatives_of_two_threads_do_not_meet(recorded):
    """Each waits inside its function for the other; the first to leave would take the level of both with it."""
    inside, left, found = threading.Barrier(2), threading.Event(), {}

    def derivative(first):
        def function(x):
            torch.set_grad_enabled(recorded)
            with contextlib.suppress(threading.BrokenBarrierError):
                inside.wait(0.2)
            if not first:
                left.wait(0.2)
            return x * x

        try:
            with torch.enable_grad():  # and put back as it was
                found[first] = jvp(function, X0, torch.ones_like(X0))[1]
        except RuntimeError as problem:
            found[first] = problem
        left.set()

    threads = [threading.Thread(target=derivative, args=(first,)) for first in (True, False)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert isinstance(found[True], torch.Tensor), found[True]
    assert isinstance(found[False], torch.Tensor), found[False]
    assert torch.equal(found[True], 2 * X0)
    assert torch.equal(found[False], 2 * X0)


def test_a_level_that_another_thread_has_open_changes_nothing():
    def run():
        sde = sds.SDE(lambda x, t: -x, lambda x, t: 0.1 * torch.ones_like(x))
        return sds.solve(sde, X0, 0.0, 1.0, 3, solver=sds.EulerMaruyama(), seed=1)

    alone, out = run(), torch.empty_like(X0)
    with forward_ad.dual_level():
        beside = run()
        perturb(X0, 1.0, 0.5, seed=1, out=out)
    assert beside.stats.backend == alone.stats.backend == "fused"
    assert torch.equal(beside.x1, alone.x1)
    assert torch.equal(out, perturb(X0, 1.0, 0.5, seed=1))


FORKED = """
import os, signal, torch, sdesolve as sds
rate = torch.tensor(2.0)
sde = sds.SDE(lambda x, t: -rate * x, lambda x, t: 0.1 * x)
process, solver = sds.VP(), sds.EulerMaruyama()
many, few, wide = torch.ones(20_000, 2), torch.ones(3, 2), torch.linspace(0, 1, 40_001).double()
data = sds.Gaussian(torch.zeros(2), torch.eye(2))
few_samples = torch.randn(300, 2)
calls = {
    "eager": lambda: sds.solve(sde, many, 0.0, 1.0, 2, solver=solver, seed=0, backend="eager").x1,
    "50,000 steps": lambda: sds.solve(sde, few, 0.0, 1.0, 50_000, solver=solver, seed=0).x1,
    "a grid": lambda: sds.solve(sde, few, grid=wide, solver=solver, seed=0, save_at="grid", reduce="moments").mean,
    "an adaptive solver": lambda: sds.solve(sds.ODE(lambda x, t: -x), many, 0.0, 1.0, solver=sds.DormandPrince()).x1,
    "a path": lambda: sds.BrownianPath(0).increments(wide, (2, 2)),
    "grids": lambda: sds.grids.karras_sigma(process, 40_000),
    "a metric": lambda: torch.tensor(sds.metrics.energy_distance(many[:900], few_samples).value),
    "exact samples": lambda: data.sample(40_000, seed=0),
}
for call in calls.values():
    call(), many.exp()  # torch's threads, and all kernels, are there
threads = torch.get_num_threads()
for name, call in calls.items():
    expected = call()
    child = os.fork()
    if not child:
        signal.alarm(60)
        found = call()
        same = torch.get_num_threads() == threads
        torch.set_num_threads(1)
        os._exit(0 if same and torch.allclose(found, expected, rtol=1e-5, atol=1e-6) else 1)
    print(name, os.waitpid(child, 0)[1])
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
def test_a_forked_child_does_all_that_its_parent_did():
    """Torch's threads are not there in the child of a process that has used them, and it waited for them for ever."""
    root = Path(__file__).parents[2]
    path = os.pathsep.join(str(p) for p in (root, root / "kernels"))
    command = [sys.executable, "-W", "ignore", "-c", FORKED]
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "2"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    lines = done.stdout.splitlines()
    assert len(lines) == 8, done.stderr
    assert all(line.endswith(" 0") for line in lines), done.stdout


@pytest.mark.parametrize("part", ["all of it", "some of it", "nothing"])
def test_derivatives_of_functions_that_switch_autograd_off(part):
    """They are evaluated again by forward mode; others, whose results depend on ``x`` or not, once."""
    calls = []

    def function(x):
        calls.append(1)
        with torch.no_grad() if part != "nothing" else contextlib.nullcontext():
            s = x.sin()
        with torch.no_grad() if part == "all of it" else contextlib.nullcontext():
            return s * x

    expected = X0.cos() * X0 + X0.sin()
    torch.testing.assert_close(slopes(function, X0)[1], expected)
    assert len(calls) == (1 if part == "nothing" else 2)
    torch.testing.assert_close(jvp(function, X0, 2 * X0)[1], 2 * X0 * expected)
    assert not jvp(lambda x: torch.ones_like(x), X0, X0)[1].any()


def test_derivatives_have_gradients_where_something_wants_them():
    rate, x = torch.tensor(0.7, dtype=torch.float64, requires_grad=True), X0.double()
    _, slope = slopes(lambda y: rate * y.sin(), x)
    _, along = jvp(lambda y: rate * y.sin(), x, x)
    assert torch.allclose(torch.autograd.grad(slope.sum(), rate)[0], x.cos().sum())
    assert torch.allclose(torch.autograd.grad(along.sum(), rate)[0], (x * x.cos()).sum())
    assert not slopes(torch.sin, x)[1].requires_grad
    assert not jvp(torch.sin, x, x)[1].requires_grad
