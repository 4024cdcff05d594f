"""A back end of one's own, in one file.

A back end is a subclass of `Backend`, or of one that exists already. It says where it runs and what it needs, gives its
ops, and may make trajectories. This one replaces one op of the reference and takes the others as they are.
"""

from __future__ import annotations

import types

import numpy as np
import pytest
import sdesolve_kernels as k
import torch

import sdesolve as sds

CALLS = []


def perturb(x0, alpha, sigma, *, out, noise):
    """``alpha x0 + sigma z``, the noise from wherever the library has it."""
    CALLS.append("perturb")
    m = x0[0].numel()
    seed, first_path = noise.seed % 2**64, noise.first_path % 2**64  # they come as int64
    where = {"seed": seed, "first_path": first_path, "stream": noise.stream, "offset": noise.step * m}
    z = k.normal(len(x0), m, **where, dtype=torch.float64)
    made = np.asarray(alpha) * x0.numpy() + np.asarray(sigma) * z.numpy().reshape(x0.shape)
    return out.copy_(torch.from_numpy(made))


class Numpy(k.ReferenceBackend):
    """The reference, with `perturb` in numpy."""

    name = "numpy"
    devices = frozenset({"cpu"})
    priority = -1  # for whoever asks for it by name

    def ops(self):
        return types.SimpleNamespace(**{**vars(super().ops()), "perturb": perturb})

    compile = k.Backend.compile  # which refuses: trajectories are not what this one is for


@pytest.fixture(autouse=True)
def registered():
    k.register_backend(Numpy(), replace=True)
    CALLS.clear()


def test_its_ops_run_where_it_is_asked_for():
    x0 = torch.linspace(0.0, 1.0, 12).reshape(4, 3)
    expected = k.perturb(x0, 0.5, 2.0, seed=3)
    assert CALLS == []  # "auto" prefers others
    with k.use_backend("numpy"):
        torch.testing.assert_close(k.perturb(x0, 0.5, 2.0, seed=3), expected)
        assert CALLS == ["perturb"]
        torch.testing.assert_close(k.normal(4, 3, seed=3), k.normal(4, 3, seed=3))


def test_it_makes_no_trajectories_and_says_so():
    sde = sds.SDE(lambda x, t: -x, lambda x, t: 0.1 * x, noise="diagonal")
    arguments = (sde, torch.ones(4, 3), 0.0, 1.0, 5)
    with k.use_backend("numpy"):
        sol = sds.solve(*arguments, solver=sds.EulerMaruyama(), seed=0)
        assert "the numpy back end makes no generated kernels" in sol.stats.reason
        with pytest.raises(ValueError, match="the numpy back end makes no generated kernels"):
            sds.solve(*arguments, solver=sds.EulerMaruyama(), seed=0, backend="fused")


def test_what_it_lacks_is_named():
    class Lacking(Numpy):
        name = "lacking"

        def missing(self):
            return "package-that-is-not-there"

    k.register_backend(Lacking(), replace=True)
    x0 = torch.ones(2, 3)
    with k.use_backend("lacking"), pytest.raises(ValueError, match="package-that-is-not-there is missing"):
        k.perturb(x0, 1.0, 1.0, seed=0)
    with k.use_backend("numpy"), pytest.raises(ValueError, match=r"data is on 'meta' and it runs on cpu only"):
        k.perturb(x0.to("meta"), 1.0, 1.0, seed=0)


def test_names_are_taken_once():
    with pytest.raises(ValueError, match="the name 'numpy' is taken"):
        k.register_backend(Numpy())
    with pytest.raises(TypeError, match="must be an instance of a subclass of Backend"):
        k.register_backend(Numpy)


def test_the_highest_priority_runs():
    class First(Numpy):
        name = "first"
        priority = 99

        def missing(self):
            return missing

    missing = ""
    x0 = torch.ones(2, 3)
    try:
        k.register_backend(First(), replace=True)
        k.perturb(x0, 1.0, 1.0, seed=0)
        assert CALLS == ["perturb"]
    finally:
        missing = "anything"
        k.register_backend(First(), replace=True)
    k.perturb(x0, 1.0, 1.0, seed=0)
    assert CALLS == ["perturb"]
