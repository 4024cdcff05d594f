"""Several threads of Python at once. Torch's forward-mode differentiation has one level for all of them."""

from __future__ import annotations

import contextlib
import threading

import torch
from sdesolve_kernels import perturb
from torch.autograd import forward_ad

import sdesolve as sds
from sdesolve._internal.forward_mode import jvp

X0 = torch.linspace(-1.0, 1.0, 12).reshape(6, 2)


def test_derivatives_of_two_threads_do_not_meet():
    """Each waits inside its function for the other; the first to leave would take the level of both with it."""
    inside, left, found = threading.Barrier(2), threading.Event(), {}

    def derivative(first):
        def function(x):
            with contextlib.suppress(threading.BrokenBarrierError):
                inside.wait(0.2)
            if not first:
                left.wait(0.2)
            return x * x

        try:
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
