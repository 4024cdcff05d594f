"""Products of a matrix for each row, and the step of general noise: values, bits, derivatives, bad input."""

from __future__ import annotations

import math

import pytest
import sdesolve_kernels as k
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sdesolve_kernels import reference_steps

import sdesolve as sds

DTYPES = [torch.float32, torch.float64, torch.bfloat16]
# batch, state, channels: lanes along rows and along entries, whole groups and parts, noise beyond one tile.
SHAPES = [
    (70, (3,), 3),
    (5, (1,), 1),
    (7, (), 4),
    (33, (8,), 5),
    (3, (2, 5), 7),
    (100, (17,), 2),
    (9, (4,), 2100),
    (40, (1,), 33),
    (130, (9,), 130),
]
PLACE = {"seed": 2**63 + 5, "stream": 9, "first_path": 2**32 - 3, "step": 7}


def random(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(dtype)


def inputs(batch, state, m, dtype, shared):
    g = random(1 if shared else batch, *state, m, seed=3, dtype=dtype)
    return random(batch, *state, seed=1, dtype=dtype), random(batch, *state, seed=2, dtype=dtype), g


@pytest.mark.parametrize(
    ("dtype", "shared"),
    [
        (torch.float32, False),
        pytest.param(torch.float64, False, marks=pytest.mark.thorough),
        (torch.bfloat16, True),
        pytest.param(torch.float32, True, marks=pytest.mark.thorough),
    ],
)
def test_against_float64(dtype, shared):
    for batch, state, m in SHAPES:
        x, f, g = inputs(batch, state, m, dtype, shared)
        for dt in (-0.05, 0.0, torch.linspace(-0.5, 0.5, batch)):
            c = torch.as_tensor(dt, dtype=torch.float64)
            exact = reference_steps.matrix_step(x.double(), f.double(), g.double(), c, **PLACE)
            made = k.matrix_step(x, f, g, dt, **PLACE)
            eps = torch.finfo(reference_steps.compute_dtype(dtype)).eps
            largest = 7.0 * float(g.double().abs().sum(-1).max()) + float(x.abs().max()) + float(f.abs().max())
            allowed = (m + 8) * eps * largest + torch.finfo(dtype).eps * exact.abs().max()
            assert made.dtype == dtype
            assert made.shape == x.shape
            assert (made.double() - exact).abs().max() <= allowed, (batch, state, m)
        v = random(batch, m, seed=4, dtype=dtype)
        exact = reference_steps.matrix_product(g.double(), v.double())
        largest = float(g.double().abs().sum(-1).max() * v.double().abs().max())
        error = (k.matrix_product(g, v).double() - exact).abs().max()
        assert error <= (m + 8) * eps * largest + torch.finfo(dtype).eps * exact.abs().max()


@given(data=st.data())
@settings(max_examples=25, deadline=None)
def test_bits_depend_on_the_row_alone(data):
    """Neither on the batch, nor on whether rows share their matrix, nor on layout, threads, or where it is written."""
    dtype = data.draw(st.sampled_from([torch.float32, torch.float64]))
    batch, state, m = data.draw(st.sampled_from([*SHAPES, (300, (2,), 2), (1500, (16,), 16)]))
    shared, threads = data.draw(st.booleans()), data.draw(st.integers(1, 4))
    start = data.draw(st.integers(0, batch - 1))
    stop = data.draw(st.integers(start + 1, batch))
    x, f, g = inputs(batch, state, m, dtype, shared)
    v, dt = random(batch, m, seed=4, dtype=dtype), random(batch, seed=5, dtype=dtype)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        whole, product = k.matrix_step(x, f, g, dt, **PLACE), k.matrix_product(g, v)
    finally:
        torch.set_num_threads(before)
    rows, own = slice(start, stop), g.expand(batch, *g.shape[1:])
    place = {**PLACE, "first_path": PLACE["first_path"] + start}
    for matrix in (own[rows], own[rows].contiguous(), own[rows].transpose(-1, 0).contiguous().transpose(-1, 0)):
        assert torch.equal(k.matrix_step(x[rows], f[rows], matrix, dt[rows], **place), whole[rows])
        assert torch.equal(k.matrix_product(matrix, v[rows]), product[rows])
    given_noise = k.normal(
        batch, m, seed=PLACE["seed"], stream=9, first_path=PLACE["first_path"], offset=7 * m, dtype=dtype
    )
    zero = torch.zeros_like(x)
    assert torch.equal(k.matrix_step(zero, zero, g, 1.0, **PLACE), k.matrix_product(g, given_noise))
    place = x.clone()
    assert k.matrix_step(place, f, g, dt, **PLACE, out=place) is place
    assert torch.equal(place, whole)


@pytest.mark.parametrize("shared", [False, True])
def test_derivatives(shared):
    g, v = random(1 if shared else 4, 2, 3, seed=1).requires_grad_(), random(4, 3, seed=2).requires_grad_()
    assert torch.autograd.gradcheck(k.matrix_product, (g, v))
    assert torch.autograd.gradgradcheck(k.matrix_product, (g, v))
    x, f = random(4, 2, seed=3).requires_grad_(), random(4, 2, seed=4).requires_grad_()

    def step(x, f, g):
        return k.matrix_step(x, f, g, torch.tensor([0.3, -0.2, 0.1, 0.0], dtype=torch.float64), **PLACE)

    assert torch.autograd.gradcheck(step, (x, f, g))
    assert torch.autograd.gradgradcheck(step, (x, f, g))
    tangents = torch.func.jvp(k.matrix_product, (g.detach(), v.detach()), (g.detach(), v.detach()))[1]
    torch.testing.assert_close(tangents, 2 * k.matrix_product(g, v).detach())
    if not shared:
        mapped = torch.func.vmap(lambda g, v: k.matrix_product(g[None], v[None])[0])(g.detach(), v.detach())
        torch.testing.assert_close(mapped, k.matrix_product(g, v).detach())


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_the_registered_op(shared):
    x, f, g = (t.requires_grad_() for t in inputs(5, (3,), 4, torch.float64, shared))
    place = (2**62 + 1, 3, 2**32 - 1, 5, None, None, None)
    torch.library.opcheck(
        torch.ops.sdesolve.matrix_step.default, (x, f, g, torch.tensor(0.3, dtype=torch.float64), *place)
    )
    with torch.device("meta"):
        made = k.matrix_step(torch.empty(5, 3), torch.empty(5, 3), torch.empty(1, 3, 4), 0.1, seed=0)
    assert made.shape == (5, 3)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"g": torch.ones(4, 2)}, ValueError, r"g must have shape \(4, 2, channels\), or 1 in place of 4"),
        ({"g": torch.ones(2, 2, 3)}, ValueError, "g must have shape"),
        ({"g": torch.ones(4, 2, 0)}, ValueError, "g must have shape"),
        ({"g": torch.ones(4, 2, 3, dtype=torch.complex64)}, TypeError, "dtype of x"),
        ({"g": 1.0}, TypeError, "must be a tensor of shape"),
        ({"x": torch.ones(4, 2, dtype=torch.complex64)}, TypeError, "dtype among"),
        ({"dt": torch.ones(3)}, ValueError, "dt must be a number"),
        ({"step": 2**57}, ValueError, r"times the 3 channels must be at most 2\^58"),
        ({"dt": torch.ones((), requires_grad=True)}, ValueError, "no gradient with respect to dt"),
    ],
)
def test_bad_input(change, error, message):
    arguments = {"x": torch.ones(4, 2), "f": torch.ones(4, 2), "g": torch.ones(4, 2, 3), "dt": 0.1, "seed": 0} | change
    with pytest.raises(error, match=message):
        k.matrix_step(**arguments)


@pytest.mark.parametrize(("batch", "shape"), [(0, (3, 3)), (3, (3, 3)), (1, (1, 4)), (40, (4, 1))], ids=str)
def test_solves_by_row_kernel_are_those_in_torch(batch, shape):
    d, m = shape
    x0 = torch.linspace(0.4, 1.2, batch * d, dtype=torch.float64).reshape(batch, d)
    G = torch.linspace(-0.5, 0.7, d * m, dtype=torch.float64).reshape(d, m)
    own = sds.SDE(lambda x, t: -x, lambda x, t: (1 + t) * x.unsqueeze(-1) * G, noise="general")
    one = sds.SDE(lambda x, t: -x, lambda x, t: (1 + t) * G[None], noise="additive")
    by_row = sds.SDE(lambda x, t: -x, lambda x, t: x.new_full((1, 1, m), 0.3), noise="general")
    for sde in (own, one, by_row):
        for t1 in (1.0, -0.5):
            options = {
                "t0": 0.0,
                "t1": t1,
                "steps": 5,
                "solver": sds.EulerMaruyama(),
                "noise": sds.BrownianPath(4, first_path=9),
            }
            kernel = sds.solve(sde, x0, backend="kernel", **options)
            eager = sds.solve(sde, x0, backend="eager", **options)
            assert kernel.stats.execution == "kernel"
            torch.testing.assert_close(kernel.x1, eager.x1, rtol=1e-12, atol=1e-13)
            assert batch == 0 or math.isfinite(float(kernel.x1.sum()))
