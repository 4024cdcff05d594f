"""Derivatives of expressions: rows of the table, and compositions, against torch.autograd and finite differences."""

from __future__ import annotations

import math
import random

import pytest
import torch
from sdesolve_kernels.trajectory.derivatives import derivative, jvp, vjp
from sdesolve_kernels.trajectory.expressions import Graph, topological
from sdesolve_kernels.trajectory.leaves import Shared, State
from sdesolve_kernels.trajectory.matrices import Matrix
from sdesolve_kernels.trajectory.operations import OPERATIONS
from sdesolve_kernels.trajectory.reference import Walk

EPS = torch.finfo(torch.float64).eps
FLOAT_ROWS = [n for n, r in OPERATIONS.items() if not r.truth and n not in ("wrap32", "detach", "tied_min", "tied_max")]
# Where a function is defined and smooth: a range for each argument.
RANGES = {
    "sqrt": [(0.1, 3)], "log": [(0.1, 3)], "log1p": [(-0.8, 3)], "asin": [(-0.9, 0.9)], "acos": [(-0.9, 0.9)],
    "tan": [(-1.2, 1.2)], "pow": [(0.1, 3), (-2, 2)], "div": [(-2, 2), (0.5, 3)], "fmod": [(5.1, 5.9), (2.1, 2.4)],
    "floor": [(0.1, 0.9)], "ceil": [(0.1, 0.9)], "trunc": [(0.1, 0.9)], "round": [(0.6, 0.9)], "sign": [(0.1, 1)],
    "abs": [(-2, -0.1)], "atan2": [(-2, 2), (0.5, 2)],
}  # fmt: skip
EDGES = [0.0, -0.0, 1.0, -1.0, 2.0, 0.5, 1e-300, math.inf, -math.inf, math.nan]
# What torch differentiates, where it is not the function that computes the value.
BY_TORCH = {"clamp_min": lambda a, b: torch.clamp(a, min=b), "clamp_max": lambda a, b: torch.clamp(a, max=b)}


def values(roots, inputs):
    """What expressions of `State` leaves, and of a matrix of `Shared` ones, are."""
    state, shared = inputs if isinstance(inputs, tuple) else (inputs, [])
    return Walk(roots)({State: state.unbind(1), Shared: shared}, state)


def applied(name, dtype="float64"):
    """A row of the table on leaves."""
    g, spec = Graph(), OPERATIONS[name]
    leaves = [g.leaf(State(0, i), dtype) for i in range(spec.arity)]
    if name == "where":
        leaves[0] = g.op("gt", leaves[0], g.const(0, dtype))
    return g, leaves, g.op(name, *leaves)


def torch_value(name, columns):
    columns = [columns[0] > 0, *columns[1:]] if name == "where" else columns
    return BY_TORCH.get(name, OPERATIONS[name].torch)(*columns)


def partials(name, x):
    g, leaves, e = applied(name)
    return [values([derivative(g, e, i)], x)[0] for i in range(len(leaves)) if leaves[i].dtype == "float64"]


def by_autograd(name, x):
    columns = [c.clone().requires_grad_() for c in x.unbind(1)]
    y = torch_value(name, columns)
    found = torch.autograd.grad(y.sum(), columns, allow_unused=True) if y.requires_grad else [None] * len(columns)
    found = [torch.zeros_like(y) if f is None else f for f in found]
    return found[1:] if name == "where" else found


def close(a, b, scale):
    same = (a == b) | (a.isnan() & b.isnan())
    return bool((same | ((a - b).abs() <= scale * (1 + b.abs()))).all())


@pytest.mark.parametrize("name", FLOAT_ROWS)
def test_rows_at_ordinary_points(name):
    """Central differences with ``h = eps^(1/3)``: their error is about ``1e-10 f'''``."""
    arity = OPERATIONS[name].arity
    ranges = RANGES.get(name, [(-2, 2)] * arity)
    z = torch.rand(50, arity, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    x = torch.stack([lo + (hi - lo) * z[:, i] for i, (lo, hi) in enumerate(ranges)], 1)
    ours, h = partials(name, x), EPS ** (1 / 3)
    assert all(close(a, b, 1e-13) for a, b in zip(ours, by_autograd(name, x), strict=True))
    for i, ours_i in zip(range(arity - len(ours), arity), ours, strict=True):
        up, down = x.clone(), x.clone()
        up[:, i] += h
        down[:, i] -= h
        numeric = (torch_value(name, up.unbind(1)) - torch_value(name, down.unbind(1))) / (up[:, i] - down[:, i])
        assert close(ours_i, numeric, 1e-6), i


@pytest.mark.parametrize("name", FLOAT_ROWS)
def test_rows_at_edges(name):
    """Zeros, ties, infinities and nan: what torch has, wherever torch is finite; elsewhere nothing finite either."""
    arity = OPERATIONS[name].arity
    x = torch.cartesian_prod(*[torch.tensor(EDGES, dtype=torch.float64)] * arity).reshape(-1, arity)
    for i, (a, b) in enumerate(zip(partials(name, x), by_autograd(name, x), strict=True)):
        finite = b.isfinite()
        if name == "pow" and i == 0:  # torch has ``0 * 0^-1`` for nan where its exponent is no constant
            finite &= x[:, 1] != 0
        assert close(a[finite], b[finite], 1e-14), (i, x[finite & (a != b)][:5], a[finite & (a != b)][:5])


def test_every_float_operation_has_rules():
    for name, row in OPERATIONS.items():
        flat = row.truth or row.rounds or name in ("sign", "wrap32", "detach", "tied_min", "tied_max")
        if not flat or name == "fmod":
            assert all(r is not None for r in row.derivatives[name == "where" :]), name


def test_whole_numbers_and_leaves_are_refused_by_name():
    g = Graph()
    whole, x = g.leaf(State(0, 0), "int64"), g.leaf(State(0, 1), "float64")
    with pytest.raises(ValueError, match="int64"):
        vjp(g, [g.cast(whole, "float64")], [g.const(1, "float64")], [whole])
    with pytest.raises(ValueError, match="int64"):
        jvp(g, [x], [whole], [whole])
    for e in (x, g.op("lt", x, g.const(0, "float64"))):
        with pytest.raises(ValueError, match="no partial derivatives"):
            derivative(g, e, 0)
    assert vjp(g, [g.cast(g.cast(x, "int64"), "float64")], [x], [x])[0].data == 0


MATRIX = Matrix(0, 1, 4, 3, 3, 1)


def random_program(seed):
    """A composition of operations of bounded size on three numbers of the state, with a matrix kept whole."""
    pick, g = random.Random(seed), Graph()
    nodes = [g.leaf(State(0, i), "float64") for i in range(3)]
    smooth = [n for n in FLOAT_ROWS if n not in ("where", "fma") and n not in RANGES]
    for _ in range(pick.randrange(4, 30)):
        a, b, c = (pick.choice(nodes) for _ in range(3))
        kind = pick.choice(["row"] * 6 + ["where", "sum", "product", "fma", "root", "pow"])
        if kind == "row":
            name = pick.choice(smooth)
            e = g.op(name, *(a, b)[: OPERATIONS[name].arity])
        elif kind == "where":
            e = g.op("where", g.op("lt", a, b), c, a)
        elif kind == "sum":
            e = g.sum([pick.choice(nodes) for _ in range(9)], "float64")
        elif kind == "product":
            e = g.element(g.product(MATRIX, [a, b, c], "float64"), pick.randrange(4))
        elif kind == "fma":
            e = g.op("fma", a, b, c)
        else:
            positive = g.op("add", g.op("mul", a, a), g.const(0.5, "float64"))
            e = g.op("sqrt", positive) if kind == "root" else g.op("pow", positive, b)
        nodes.append(g.op("tanh", e))
    return g, nodes[-3:], nodes[:3]


@pytest.mark.parametrize("seed", range(60))
def test_random_compositions(seed):
    """Reverse and forward accumulation; autograd goes through the torch column of the table.

    A rounding error is at most doubled by each of the up to 30 nodes on the way, which are at most 1 in size.
    """
    g, roots, leaves = random_program(seed)
    weights = [g.leaf(Shared(0, i), "float64") for i in range(13)]
    generator = torch.Generator().manual_seed(seed)
    x, u, du = (torch.randn(20, 3, dtype=torch.float64, generator=generator).requires_grad_() for _ in range(3))
    w = torch.randn(13, dtype=torch.float64, generator=generator).requires_grad_()
    wrt = [*leaves, *weights]
    y = torch.stack(values(roots, (x, [w])), 1)
    cotangents = [g.leaf(State(0, 3 + i), "float64") for i in range(3)]
    both = torch.cat([x, u], 1).detach()
    pulled = torch.stack(values(vjp(g, roots, cotangents, wrt), (both, [w.detach()])), 1)
    gx, gw = torch.autograd.grad((y * u.detach()).sum(), (x, w), retain_graph=True, materialize_grads=True)
    assert close(pulled[:, :3], gx, 1e-9)
    assert close(pulled[:, 3:].sum(0), gw, 1e-8)
    tangents = jvp(g, roots, leaves, cotangents)
    pushed = torch.stack(values(tangents, (torch.cat([x, du], 1).detach(), [w.detach()])), 1)
    for i in range(3):
        (row,) = torch.autograd.grad(y[:, i].sum(), x, retain_graph=True, materialize_grads=True)
        assert close(pushed[:, i], (row * du).sum(1).detach(), 1e-9)


def test_casts_round_what_they_pass_on():
    g = Graph()
    x, v = (g.leaf(State(0, i), "float64") for i in range(2))
    half = g.cast(x, "float32")
    expected = g.cast(g.cast(v, "float32"), "float64")
    assert vjp(g, [half], [g.cast(v, "float32")], [x]) == [expected]
    assert jvp(g, [g.cast(half, "float64")], [x], [v]) == [expected]


def test_tangents_of_matrix_entries():
    g = Graph()
    x = [g.leaf(State(0, i), "float64") for i in range(3)]
    y = [g.element(g.product(MATRIX, x, "float64"), i) for i in range(4)]
    pushed = jvp(g, y, [g.leaf(Shared(0, 1 + 3 * 2 + 1), "float64")], [g.const(2, "float64")])
    assert [e.data for e in pushed[:2] + pushed[3:]] == [0, 0, 0]
    assert pushed[2] is g.op("mul", g.const(2, "float64"), x[1])


def test_what_an_output_does_not_depend_on_makes_no_nan():
    """``d/dx where(x > 0, sqrt(x), 0)`` at -1 passes 0 to a branch whose derivative is nan, as in torch."""
    g = Graph()
    x = g.leaf(State(0, 0), "float64")
    assert vjp(g, [g.op("exp", x)], [g.const(0, "float64")], [x])[0].data == 0
    assert len(topological(vjp(g, [x, x], [g.const(0, "float64"), g.const(3, "float64")], [x]))) == 1
