"""The table of the compiler's operations, row by row, and expressions built of them: folding, depth, texts."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from sdesolve_kernels import ReferenceBackend, use_backend
from sdesolve_kernels.trajectory import launch
from sdesolve_kernels.trajectory.expressions import Graph, topological
from sdesolve_kernels.trajectory.leaves import Column, NoiseLeaf, PathEntry, Shared, State
from sdesolve_kernels.trajectory.operations import OPERATIONS
from sdesolve_kernels.trajectory.reassociation import reassociated
from sdesolve_kernels.trajectory.rerolling import Forms, reroll

import sdesolve as sds
from sdesolve.integrate import fused as fusing

DTYPES = {float: torch.float64, int: torch.int64, bool: torch.bool}
VALUES = [0.0, -0.0, 0.3, -0.7, 1.0, 2.5, -3.5, 1e300, math.inf, -math.inf, math.nan]


def arguments(row):
    """Every combination of values that a row takes, as Python numbers."""
    truth = row.name in ("and", "or", "not")
    values = [False, True] if truth else [-(2**33), -1, 0, 2**31, 2**40 + 3] if row.name == "wrap32" else VALUES
    if row.name == "where":
        return [(c, a, b) for c in (False, True) for a in values for b in values]
    return [tuple(values[i] for i in index) for index in np.ndindex(*[len(values)] * row.arity)]


@pytest.mark.parametrize("name", list(OPERATIONS))
def test_folding_is_torch(name):
    """Constants are folded in double precision: to a few roundings what torch makes of them."""
    row = OPERATIONS[name]
    for values in arguments(row):
        expected = row.torch(*(torch.tensor(v, dtype=DTYPES[type(v)]) for v in values)).item()
        with np.errstate(all="ignore"):
            folded = row.fold(*values)
        same = folded == expected or (math.isnan(folded) and math.isnan(expected))
        assert same or abs(folded - expected) < 1e-14 * abs(expected), (values, folded, expected)


@pytest.mark.parametrize("name", list(OPERATIONS))
def test_texts_use_every_argument(name):
    row = OPERATIONS[name]
    for text in (row.numba, row.triton):
        made = text.format(*(f"<{i}>" for i in range(row.arity)), dtype="float32")
        assert row.expansion or all(f"<{i}>" in made for i in range(row.arity))


def test_leaves_of_two_classes_are_two_expressions():
    """Classes of leaves are tuples, and equal as such."""
    g = Graph()
    assert len({g.leaf(leaf, "float64") for leaf in (State(0, 1), NoiseLeaf(0, 1), Shared(0, 1), Column(1))}) == 4
    assert g.leaf(PathEntry(0, 1, 2), "float64") is g.leaf(PathEntry(0, 1, 2), "float64")


@pytest.mark.parametrize("name", ["add", "mul", "sin", "where"])
def test_nothing_recurses(name):
    """Thousands of operations one upon another, through every pass, and in a text."""
    g = Graph()
    x, dt = g.leaf(State(0, 0), "float64"), g.leaf(Column(0), "float64")
    alike = [g.leaf(State(0, i), "float64") for i in range(1, 9)]
    for _ in range(2000):
        x = g.op("sin", x) if name == "sin" else g.op(name, x, dt) if name != "where" else _chosen(g, x, dt)
    for _ in range(500):
        alike = [g.op("tanh", g.op("mul", a, dt)) for a in alike]
    assert len(topological(reassociated(g, [x]))) > 3
    Forms().of(x)
    assert reroll(g, alike).count == 8
    assert len(repr(x)) < 100


def _chosen(g, x, dt):
    return g.op("where", g.op("lt", x, dt), g.op("add", x, dt), x)


def test_a_loop_in_a_drift(interpreted, difference, normals):
    """500 turns, as in an inner solver or a recurrent network."""

    def drift(x, t):
        y = x
        for _ in range(500):
            y = y * 0.999 * torch.cos(t) + 0.001 * x
        return y

    x0 = normals(5, 2)
    fused, eager = (
        sds.solve(sds.ODE(drift), x0, 0.0, 1.0, 2, solver=sds.EulerMaruyama(), backend=b).x1 for b in ("fused", "eager")
    )
    assert difference(fused, eager) < 1e4 * torch.finfo(torch.float64).eps


@pytest.mark.parametrize("kind", ["normal", "two-point", "three-point"])
def test_the_reference_runs_what_kernels_run(kind, difference, normals):
    """With the same noise to the bit, and states, observations and moments at the same times."""
    sde = sds.SDE(lambda x, t: torch.sin(x) * t, lambda x, t: 0.3 + 0.1 * x, noise="diagonal")
    path = sds.BrownianPath(2**63 + 5, first_path=2**33, first_step=3, kind=kind)
    for options in (
        {"save_at": "grid"}, {"save_at": [0.0, 0.4, 1.0], "observable": lambda x: x.square().sum(1)},
        {"save_at": [0.5, 1.0], "reduce": "moments"},
    ):  # fmt: skip
        found = []
        for backend in ("numba", "reference"):
            with use_backend(backend):
                sol = sds.solve(
                    sde, normals(9, 3), 0.0, 1.0, 10, solver=sds.EulerMaruyama(), noise=path, backend="fused", **options
                )
            found.append([sol.x1, sol.xs] if sol.mean is None else [sol.x1, sol.mean, sol.variance])
        for a, b in zip(*found, strict=True):
            assert difference(a, b) < 100 * torch.finfo(torch.float64).eps


def test_without_a_compiler_torch_runs_what_is_asked_for_alone(monkeypatch, normals):
    """``auto`` is eager then: walking a plan is no faster."""
    for module in (fusing, launch):
        monkeypatch.setattr(module, "backend_for", lambda op, device: ReferenceBackend())
    run = {"solver": sds.EulerMaruyama(), "seed": 1}
    sde = sds.SDE(lambda x, t: -x, lambda x, t: 0.1 * x, noise="diagonal")
    stats = sds.solve(sde, normals(4, 2), 0.0, 1.0, 3, **run).stats
    assert stats.backend != "fused"
    assert "no compiler" in stats.reason
    assert sds.solve(sde, normals(4, 2), 0.0, 1.0, 3, backend="fused", **run).stats.backend == "fused"
    with use_backend("reference"):
        stats = sds.solve(sde, normals(4, 2), 0.0, 1.0, 3, **run).stats
        assert stats.backend == "fused"
        assert "expression by expression" in stats.source
