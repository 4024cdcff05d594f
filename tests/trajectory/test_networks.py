"""Matrix products that are kept whole, and loops over entries that are alike: networks, and what is nearly one."""

from __future__ import annotations

import pytest
import torch
from sdesolve_kernels import use_backend
from torch.nn.functional import layer_norm, silu

import sdesolve as sds

Z = torch.Generator().manual_seed(4)


def weights(*shape):
    return torch.randn(shape, dtype=torch.float64, generator=Z) / 4


A, LARGE, V = weights(20, 20), weights(30, 50), weights(20, 24)
b, c, ORDER = weights(20), weights(24), torch.randperm(20, generator=Z)
RAMP = torch.linspace(0.5, 1.5, 20, dtype=torch.float64)
NET = torch.nn.Sequential(
    torch.nn.Linear(20, 24), torch.nn.SiLU(), torch.nn.Linear(24, 24), torch.nn.Tanh(), torch.nn.Linear(24, 20)
)
NET.double().requires_grad_(False)

STEPS = {
    "rows": lambda x, t: x @ A,
    "columns": lambda x, t: (A @ x[..., None])[..., 0],
    "transposed": lambda x, t: torch.tanh(x) @ A.T + t,
    "part of a matrix": lambda x, t: torch.sin(x @ LARGE[3:23, 1:41:2] + b),
    "flipped part": lambda x, t: x @ LARGE[:20, :40].reshape(20, 2, 20)[:, 1].flip(0),
    "network": lambda x, t: NET(x) + torch.cos(t),
    "residual": lambda x, t: x + silu(layer_norm(x, (20,)) @ V + c) @ V.T,
    "permuted": lambda x, t: torch.tanh(x[:, ORDER] * b) @ A,
    "backwards": lambda x, t: (x.flip(1) * RAMP + b.flip(0)) @ A,
    "two kinds": lambda x, t: torch.cat([torch.tanh(x[:, :7]), x[:, 7:].abs()], 1) @ A,
    "factors in either order": lambda x, t: (
        torch.stack([b[j] * x[:, j] if j % 3 else x[:, j] * b[j] for j in range(20)], 1) @ A
    ),
    "state and its square": lambda x, t: (x * x - x.roll(3, 1)) @ A,
    "twice": lambda x, t: (x @ A) * (x @ A.T),
    "products written out": lambda x, t: (A * torch.tanh(x)[:, None]).sum(-1),
    "sums": lambda x, t: x * x.square().sum(1, keepdim=True) + (x * b).sum(1, keepdim=True) - x.mean(1, keepdim=True),
    "sums of parts": lambda x, t: (
        x * (x[:, ::2] * b[:10]).sum(1, keepdim=True) * x[:, ORDER[:9]].tanh().sum(1, keepdim=True)
    ),
}


@pytest.mark.parametrize("f", list(STEPS.values()), ids=list(STEPS))
def test_plans(f, both, difference, interpreted, normals):
    """Twenty products a sum, three steps: each loses a few roundings at the size of the sum of magnitudes."""
    fused, eager = both(sds.SDE(f, lambda x, t: 0.1 * torch.cos(x)), normals(9, 20), steps=3)
    assert difference(fused.x1, eager.x1) < 1e3 * torch.finfo(torch.float64).eps


@pytest.mark.thorough
def test_kernels(difference, normals):
    """All of them observed in one kernel, twice with other weights."""
    x0 = normals(70, 20)
    for _ in range(2):
        sol = sds.solve(
            sds.ODE(lambda x, t: -x), x0, 0.0, 1.0, 1, solver=sds.EulerMaruyama(), backend="fused", save_at="grid",
            observable=lambda x: torch.stack([f(x, torch.tensor(0.5, dtype=x.dtype)) for f in STEPS.values()], 1),
        )  # fmt: skip
        for (name, f), value in zip(STEPS.items(), sol.xs[0].unbind(1), strict=True):
            assert difference(value, f(x0, torch.tensor(0.5, dtype=x0.dtype))) < 1e3 * torch.finfo(torch.float64).eps, (
                name
            )
        for w in (A, V, LARGE, b, c, NET[0].weight):
            w.mul_(-0.5).add_(0.1)
    assert "product_" in sol.stats.source


MASK, D = torch.arange(10) % 3 > 0, torch.linspace(1.0, 2.0, 10, dtype=torch.float64)
# Types beside the state's, in loops and in what is kept from one loop for the next; in float32.
MIXED = {
    "constant mask": lambda x, A: torch.where(MASK, x, -x) @ A,
    "mask": lambda x, A: x.masked_fill(x > 0.3, 0) @ A,
    "mask as numbers": lambda x, A: (x > 0).to(x) @ A,
    "mask in a sum": lambda x, A: x * torch.where(MASK, x, 0.0).sum(1, keepdim=True),
    "count": lambda x, A: x * (x > 0).sum(1, keepdim=True),
    "mask of a layer": lambda x, A: torch.where(x @ A > 0, x @ A, -x) @ A,
    "double": lambda x, A: (x.double() * D).float() @ A,
    "double layer": lambda x, A: ((x.double() @ A.double()).tanh() * D).float() @ A,
    "double sum": lambda x, A: x + (x.double() + 1e9).sum(1, keepdim=True).sub(1e10).float(),
    "whole numbers": lambda x, A: ((3 * x).long() * 2 + MASK).float() @ A,
    "whole sum": lambda x, A: x * ((1000 * x).long() + 2**40).sum(1, keepdim=True).sub(10 * 2**40).float() * 1e-3,
    "places": lambda x, A: torch.bucketize(x, D[:5].to(x) - 1.1).to(x) @ A,
    "wrapping": lambda x, A: ((x > 0).int() * 2**30 + (x > -9).int() * 2**30).float() @ A * 1e-9,
    "time in double": lambda x, A: x * torch.sin(x.double() + 1e9 * A[0, 0].double().cos()).float(),
}


IN_KERNELS = ("mask of a layer", "double layer", "whole sum", "wrapping")


@pytest.mark.parametrize(
    ("backend", "state"),
    [("reference", torch.float32), ("reference", torch.float64), ("numba", torch.float32)],
    ids=str,
)
def test_types_beside_the_states(state, backend, difference, normals):
    """Kernels and the reference back end. A float32 number in a float64 state is rounded where torch rounds it."""
    x0, matrix, chosen = (
        normals(70, 10, dtype=state),
        A[:10, :10].float(),
        MIXED if backend == "reference" else IN_KERNELS,
    )
    functions = [lambda x, f=MIXED[name]: f(x.float(), matrix)[:, :1].to(state) for name in chosen]
    with use_backend(backend):
        sol = sds.solve(
            sds.ODE(lambda x, t: -x), x0, 0.0, 1.0, 1, solver=sds.EulerMaruyama(), backend="fused", save_at="grid",
            observable=lambda x: torch.stack([f(x) for f in functions], 1),
        )  # fmt: skip
    for name, f, value in zip(chosen, functions, sol.xs[0].unbind(1), strict=True):
        assert difference(value, f(x0)) < 100 * torch.finfo(torch.float32).eps, name


def test_units_of_a_narrow_layer_are_computed_once(normals):
    """Small products after it are sums here, each of which would compute them again; large ones are found in sums."""
    first, last, wide = weights(4, 10), weights(10, 4), weights(8, 10)

    def drift(x, t):
        units = torch.tanh(x @ first)
        return units @ last + (wide * units[:, None]).sum(-1)[:, 2:6]

    ran = sds.solve(
        sds.SDE(drift, lambda x, t: torch.ones_like(x)), normals(3, 4), 0.0, 1.0, 2, solver=sds.EulerMaruyama(), seed=0,
        backend="fused",
    )  # fmt: skip
    assert ran.stats.source.count("tanh_float64(") == 1
    assert ran.stats.source.count("product_") >= 1
