"""Matrix products in compiled kernels: tiles of sums in registers, along lanes and over them."""

from __future__ import annotations

import pytest
import torch

import sdesolve as sds

A = torch.randn(9, 11, generator=torch.Generator().manual_seed(0), dtype=torch.float64) / 4


def sde(a):
    """Tiles of 5 and of 6 rows; sums of outer products of 11 columns, which are no whole number of vectors."""
    return sds.ODE(lambda x, t: x[:, :9] @ a)


@pytest.fixture(scope="module")
def run():
    a = A.float()

    def solve(x0, backend="fused"):
        return sds.solve(sde(a), x0, 0.0, 1.0, 3, solver=sds.EulerMaruyama(), backend=backend)

    return solve


def test_bits_of_a_path_depend_on_no_other(run, normals):
    """Vectors one by one where lanes are few, several at once where they are many; two blocks."""
    x0 = normals(85, 11, dtype=torch.float32)
    whole = run(x0)
    assert "product_6_float32(" in whole.stats.source
    for paths in (1, 17, 33, 64, 80):
        assert torch.equal(run(x0[:paths]).x1, whole.x1[:paths])
    torch.testing.assert_close(whole.x1, run(x0, "eager").x1, rtol=1e-5, atol=1e-5)


def test_gradients_of_a_matrix(normals):
    """Blocks that are not full, and vectors with lanes that belong to no column."""
    a, x0 = A.clone().requires_grad_(), normals(85, 11).requires_grad_()
    found = []
    for backend in ("fused", "eager"):
        sol = sds.solve(sde(a), x0, 0.0, 1.0, 3, solver=sds.EulerMaruyama(), backend=backend)
        found.append(torch.autograd.grad(sol.x1.square().mean(), [x0, a]))
    for fused, eager in zip(*found, strict=True):
        torch.testing.assert_close(fused, eager, rtol=1e-11, atol=1e-13)
