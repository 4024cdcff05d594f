"""Compiled kernels: tiles of matrix products, along lanes and over them; blocks of one path."""

from __future__ import annotations

import pytest
import torch
from sdesolve_kernels.trajectory import numba_launch

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


@pytest.mark.slow
def test_gradients_of_a_matrix(normals):
    """Blocks that are not full, and vectors with lanes that belong to no column."""
    a, x0 = A.clone().requires_grad_(), normals(85, 11).requires_grad_()
    found = []
    for backend in ("fused", "eager"):
        sol = sds.solve(sde(a), x0, 0.0, 1.0, 3, solver=sds.EulerMaruyama(), backend=backend)
        found.append(torch.autograd.grad(sol.x1.square().mean(), [x0, a]))
    for fused, eager in zip(*found, strict=True):
        torch.testing.assert_close(fused, eager, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize(
    ("drift", "loops"),
    [(lambda x: x.sin(), True), (lambda x: x.flip(1), False), (lambda x: x[:, :1].expand_as(x), False)],
    ids=["own numbers", "another's", "the first"],
)
def test_numbers_of_a_state_are_computed_in_a_loop_unless_they_read_each_other(drift, loops, normals):
    x0 = normals(3, 9, dtype=torch.float64)
    equation = sds.SDE(lambda x, t: drift(x), lambda x, t: 0.2 * torch.ones_like(x))
    fused, eager = (
        sds.solve(equation, x0, 0.0, 1.0, 4, solver=sds.EulerMaruyama(), seed=1, backend=backend)
        for backend in ("fused", "eager")
    )
    assert ("for j in range(9)" in fused.stats.source) == loops
    torch.testing.assert_close(fused.x1, eager.x1, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize(
    ("solver", "paths", "kind"),
    [(sds.SRIW1(), None, "normal"), (sds.EulerMaruyama(), torch.arange(40) + 2**32, "three-point")],
    ids=["two sources", "listed, three-point"],
)
def test_one_path_has_the_bits_that_it_has_among_others(solver, paths, kind, normals, monkeypatch):
    """Numbers for many steps at a time, in each source."""
    monkeypatch.setattr(numba_launch, "is_kept", lambda source: False)
    theta = torch.tensor([0.9, 1.1, 1.3], dtype=torch.float32)
    equation = sds.SDE(lambda x, t: -theta * torch.sin(x + t), lambda x, t: 0.1 * theta * torch.cos(x))
    x0 = normals(40, 3, dtype=torch.float32)

    def solve(rows):
        given = {"seed": 1, "paths": None if paths is None else paths[rows], "increments": kind}
        return sds.solve(equation, x0[rows], 0.0, 1.0, 150, solver=solver, save_at="grid", backend="fused", **given)

    among, alone = solve(slice(None)), solve(slice(0, 1))
    assert "fill_one_" in alone.stats.source
    assert "fill_one_" not in among.stats.source
    assert torch.equal(alone.xs, among.xs[:, :1])


def test_a_kernel_for_one_path_is_compiled_when_that_pays(monkeypatch, tmp_path, normals):
    """Where the kernel for many is there already."""
    monkeypatch.setenv("SDESOLVE_CACHE", str(tmp_path))
    equation = sds.SDE(lambda x, t: -1.7 * x, lambda x, t: 0.3 * x)
    x0 = normals(2, 2, dtype=torch.float32)

    def solve(paths):
        return sds.solve(equation, x0[:paths], 0.0, 1.0, 9, solver=sds.EulerMaruyama(), seed=1, backend="fused")

    many, before = solve(2), solve(1)
    assert before.stats.source == many.stats.source
    run, running = numba_launch.NumbaTrajectory.run, []
    monkeypatch.setattr(numba_launch.NumbaTrajectory, "run", lambda *args: running.append(args[0]) or run(*args))

    def at_once(source):
        running[-1]._better = None  # as if another thread had taken it meanwhile
        return 0.0

    monkeypatch.setattr(numba_launch, "seconds_to_compile", at_once)
    after = solve(1)
    assert "fill_one_" in after.stats.source
    assert torch.equal(before.x1, many.x1[:1])
    assert torch.equal(after.x1, many.x1[:1])
