"""An operation of the compiler that was not there: one row of the table, and the aten operation that becomes it.

``sinc`` has its derivative at 0; kernels have no function for it, so the row says how to make it of others.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from sdesolve_kernels import use_backend
from sdesolve_kernels.trajectory import HANDLERS, OPERATIONS, Graph, OpSpec, State, Term, Walk, derivative, pointwise

import sdesolve as sds


def angle(a):
    """``pi a``, and 1 where ``a`` is 0."""
    return a.eq(0.0).where(1.0, math.pi * a)


def expansion(graph, e):
    a = Term(graph, e)
    return a.eq(0.0).where(1.0, (math.pi * a).sin() / angle(a)).e


SINC = OpSpec(
    "sinc",
    fold=np.sinc,
    torch=torch.sinc,
    numba="",
    triton="",
    derivatives=(lambda v, out, a: v * a.eq(0.0).where(0.0, math.pi * ((math.pi * a).cos() - out) / angle(a)),),
    expansion=expansion,
)


@pytest.fixture(scope="module", autouse=True)
def added():
    OPERATIONS["sinc"] = SINC
    pointwise("sinc", "sinc")
    yield
    del OPERATIONS["sinc"], HANDLERS["sinc"]


@pytest.mark.parametrize("backend", ["reference", "numba"])
def test_it_runs_in_a_trajectory(backend):
    x = torch.tensor([[0.0, 0.5, 1.0, -2.3]], dtype=torch.float64)
    sde = sds.ODE(lambda x, t: torch.sinc(x))
    with use_backend(backend):
        fused, eager = (sds.solve(sde, x, 0.0, 1.0, 3, solver=sds.RK4(), backend=b).x1 for b in ("fused", "eager"))
    assert (fused - eager).abs().max() < 1e-14


def test_it_has_a_derivative():
    g, x = Graph(), torch.tensor([0.0, 0.5, 1.0, -2.3], dtype=torch.float64, requires_grad=True)
    e = g.op("sinc", g.leaf(State(0, 0), "float64"))
    (ours,) = Walk([derivative(g, e, 0)])({State: [x.detach()]}, x)
    (expected,) = torch.autograd.grad(torch.sinc(x).sum(), x)
    assert (ours - expected).abs().max() < 1e-14
