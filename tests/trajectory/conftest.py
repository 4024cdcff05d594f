"""Runs of fused integrations beside eager ones, with kernels and without.

A kernel takes most of a second to compile. What lies before it, from contents of functions to the plan of a kernel, is
checked on the reference back end, which walks the plan in torch.
"""

from __future__ import annotations

import pytest
import torch
from sdesolve_kernels import use_backend
from sdesolve_kernels.trajectory.reference import ReferenceTrajectory

import sdesolve as sds
from sdesolve.integrate import fused as fusing


@pytest.fixture(autouse=True)
def no_kernels_kept(monkeypatch):
    """Each test traces and compiles its own."""
    monkeypatch.setattr(fusing, "_kernels", type(fusing._kernels)())


@pytest.fixture
def interpreted(monkeypatch):
    """Fused runs on the reference back end; ``interpreted.made`` counts what would have been compiled."""

    def counted(self, *arguments):
        ReferenceTrajectory.made += 1
        make(self, *arguments)

    make = ReferenceTrajectory.__init__
    monkeypatch.setattr(ReferenceTrajectory, "made", 0, raising=False)
    monkeypatch.setattr(ReferenceTrajectory, "__init__", counted)
    with use_backend("reference"):
        yield ReferenceTrajectory


def difference(a, b):
    """The largest error of ``a`` in units of ``1 + |b|``; nan and infinities must be in the same places."""
    assert a.shape == b.shape
    assert torch.equal(a.isnan(), b.isnan())
    same = (a == b) | a.isnan()
    return ((a - b).abs() / (1 + b.abs()))[~same].max().item() if not bool(same.all()) else 0.0


@pytest.fixture(name="difference")
def difference_fixture():
    return difference


@pytest.fixture
def both():
    """The same integration, fused and eager."""

    def run(sde, x0, t0=0.0, t1=1.0, steps=4, *, solver=None, **options):
        options = {"solver": solver or sds.EulerMaruyama(), "seed": 1, **options}
        if "noise" in options:
            del options["seed"]
        return [sds.solve(sde, x0, t0, t1, steps, backend=backend, **options) for backend in ("fused", "eager")]

    return run


@pytest.fixture
def normals():
    """Fixed standard normals, ``(*shape)``."""

    def make(*shape, dtype=torch.float64, seed=0):
        z = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        return z.to(dtype)

    return make


@pytest.fixture
def refused(both):
    """Says why a drift cannot be fused; ``auto`` must give the eager result then."""

    def why(drift, x0, **options):
        sde = sds.SDE(drift, lambda x, t, *p: 0.1 * x) if not isinstance(drift, sds.SDE | sds.ODE) else drift
        options = {"solver": sds.EulerMaruyama(), "seed": 1, **options}
        with pytest.raises(ValueError, match="cannot be fused") as error:
            sds.solve(sde, x0, 0.0, 1.0, 2, backend="fused", **options)
        return str(error.value)

    return why


@pytest.fixture
def both_interpreted(both, interpreted):
    """`both`, without kernels."""
    return both
