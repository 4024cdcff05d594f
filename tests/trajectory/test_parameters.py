"""Tensors are arguments of a kernel, and change freely; anything else that functions read is seen when it changes."""

from __future__ import annotations

import pytest
import torch

import sdesolve as sds

X0 = torch.linspace(-1.0, 1.0, 20, dtype=torch.float64).reshape(10, 2)


def drift(x, t, p):
    return -p["rate"] * x + p["shift"]


def noise(x, t, p):
    return 0.1 * p["size"][..., None] * torch.ones_like(x)


def test_parameters_of_paths_times_functions_of_time(both, difference, interpreted, normals):
    sde = sds.SDE(lambda x, t, p: p * torch.cos(3 * t) * x, lambda x, t, p: torch.sin(p + t) * 0.1 + 0 * x)
    fused, eager = both(sde, X0, params=normals(10, 2))
    assert difference(fused.x1, eager.x1) < 1e-14


def test_a_tensor_with_a_row_for_each_path_is_wrong_for_another_batch(both, interpreted, normals):
    rows = normals(10, 2)
    sde = sds.SDE(lambda x, t: rows * x, lambda x, t: 0.1 * x)
    both(sde, X0)
    for backend in ("auto", "eager"):
        with pytest.raises(RuntimeError, match="must match the size"):
            sds.solve(sde, X0[:5], 0.0, 1.0, 4, solver=sds.EulerMaruyama(), seed=1, backend=backend)


def test_parameters_shared_and_per_path_change_without_a_new_kernel(both, difference, interpreted, normals):
    sde = sds.SDE(drift, noise, noise="diagonal")
    for seed in range(3):
        for paths in (10, 7):
            z = normals(10, 2, seed=seed)[:paths]
            params = {"rate": z, "shift": normals(2, seed=seed + 10), "size": normals(10, seed=seed + 20)[:paths]}
            fused, eager = both(sde, X0[:paths], params=params)
            assert difference(fused.x1, eager.x1) < 1e-14
    assert interpreted.made == 2  # one for each size of the batch, from which comes the same source


@pytest.mark.parametrize("shape", [(), (1,), (2,), (10, 1), (10, 2), (1, 2), (5, 2, 2)], ids=str)
@pytest.mark.parametrize("wrap", [lambda p: p, lambda p: (p, 2.0), lambda p: {"a": p}, lambda p: [p]])
def test_shapes_of_parameters(shape, wrap, both, difference, interpreted, normals):
    def first(p):
        p = p if isinstance(p, torch.Tensor) else next(iter(p.values() if isinstance(p, dict) else p))
        return p.sum((0, 1)) if p.ndim == 3 else p

    sde = sds.SDE(lambda x, t, p: first(p) * x, lambda x, t, p: 0.1 * torch.cos(first(p) + x), noise="diagonal")
    fused, eager = both(sde, X0, params=wrap(normals(*shape)))
    assert difference(fused.x1, eager.x1) < 1e-14


@pytest.mark.parametrize("width", [1, 2, 3, 4, 10])
@pytest.mark.parametrize("batch", [1, 2, 3, 4, 10])
def test_a_tensor_of_as_many_rows_as_the_batch(batch, width, both, difference, interpreted, normals):
    """One row for each path, or a vector over components, as torch's broadcasting has it."""
    x0 = normals(batch, width)
    rows, vector, matrix = normals(batch, width, seed=1), normals(width, seed=2), normals(width, width, seed=3)
    sde = sds.SDE(lambda x, t: torch.tanh(x @ matrix) + vector * x + rows, lambda x, t: 0.1 * vector + 0 * x)
    if batch == width:  # all are read in one way
        fused, eager = (sds.solve(sde, x0, 0.0, 1.0, 3, solver=sds.EulerMaruyama(), seed=1, backend=b)
                        for b in ("auto", "eager"))  # fmt: skip
    else:
        fused, eager = both(sde, x0)
    assert difference(fused.x1, eager.x1) < 1e-13
    fused, eager = both(sds.SDE(lambda x, t: vector * torch.tanh(x @ matrix), lambda x, t: 0.1 * x), x0)
    assert difference(fused.x1, eager.x1) < 1e-13
    fused, eager = both(sds.SDE(lambda x, t: rows * x, lambda x, t: rows.tanh()), x0)
    assert difference(fused.x1, eager.x1) < 1e-13


def test_a_shared_matrix_of_as_many_rows_as_the_batch_keeps_the_count_of_evaluations(both, interpreted, normals):
    matrix = normals(10, 2)
    ode = sds.ODE(lambda x, t: (x @ matrix.T).mean(1, keepdim=True) * x)
    fused, eager = both(ode, X0, solver=sds.RK4())
    assert fused.stats.nfe == eager.stats.nfe == 16


def test_dtypes_of_what_is_held(both, difference, interpreted):
    held = [
        torch.tensor([2, 3]),
        torch.tensor([True, False]),
        torch.tensor([2, 3], dtype=torch.int32),
        torch.tensor(0.5),
    ]
    held.append(torch.tensor(0.5, dtype=torch.float64))
    for dtype in (torch.float32, torch.float64):
        for c in held:
            fused, eager = both(sds.SDE(lambda x, t, c=c: x * c, lambda x, t: 0.1 * x), X0.to(dtype))
            assert difference(fused.x1, eager.x1) < 8 * torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.uint8, torch.complex64], ids=str)
def test_other_dtypes_are_refused_and_run_eagerly(dtype, refused):
    c = torch.tensor([1.0, 2.0]).to(dtype)
    drift = (lambda x, t: x * c.real) if dtype.is_complex else (lambda x, t: x * c)
    assert str(dtype).removeprefix("torch.") in refused(drift, X0.float()) or dtype.is_complex
    sol = sds.solve(sds.ODE(drift), X0.float(), 0.0, 1.0, 2, solver=sds.EulerMaruyama())
    assert sol.stats.backend != "fused"


def test_indices_held_outside_are_made_into_the_kernel_and_watched(both, difference, interpreted):
    order, mask = torch.tensor([1, 0]), torch.tensor([True, False])
    sde = sds.SDE(lambda x, t: x[:, order] + x[:, mask], lambda x, t: 0.1 * x)
    for change in (lambda: None, lambda: order.copy_(torch.tensor([0, 0])), lambda: mask.logical_not_(), lambda: None):
        change()
        fused, eager = both(sde, X0)
        assert difference(fused.x1, eager.x1) < 1e-14
    assert interpreted.made == 3


def test_values_of_tensors_that_are_read_while_tracing_are_refused(refused):
    c = torch.tensor([1.0, 2.0])
    readers = [
        lambda: c[0].item(), lambda: float(c[0]), lambda: c.tolist()[0], lambda: c.numpy()[0].item(), lambda: int(c[1]),
        lambda: 1.0 if c[0] > 0 else 2.0, lambda: 1.0 if c.equal(c) else 2.0, lambda: float(c.__array__()[0]),
    ]  # fmt: skip
    for reader in readers:
        assert "reads the value of a tensor" in refused(lambda x, t, reader=reader: reader() * x, X0)


@pytest.mark.parametrize("where", ["closure", "params"])
def test_nan_and_infinity_in_parameters(where, both, difference, interpreted):
    for value in (float("nan"), float("inf")):
        p = torch.tensor([1.0, value], dtype=torch.float64)
        f = (lambda x, t: p * x) if where == "closure" else (lambda x, t, p: p * x)  # noqa: B023
        g = (lambda x, t: 0.1 * x) if where == "closure" else (lambda x, t, p: 0.1 * x)
        options = {"params": p} if where == "params" else {}
        fused, eager = both(sds.SDE(f, g), X0, steps=1, check_finite=False, **options)
        assert difference(fused.x1, eager.x1) < 1e-14
        fused, eager = both(sds.SDE(f, g), X0, check_finite=False, **options)  # infinities may turn into nan or not
        assert torch.equal(fused.x1.isfinite(), eager.x1.isfinite())


# Gradients -------------------------------------------------------------------------------------------------------
def holders(w):
    class Slotted:
        __slots__ = ("w",)

    slotted = Slotted()
    slotted.w = w
    layer = torch.nn.Linear(2, 2, bias=False, dtype=torch.float64)
    layer.weight = torch.nn.Parameter(torch.eye(2, dtype=torch.float64))
    yield "closure", lambda x, t: w * x, w
    yield "slot", lambda x, t: slotted.w * x, w
    yield "set", lambda x, t, s={w}: next(iter(s)) * x, w
    yield "module", lambda x, t: layer(x), layer.weight


def test_gradients_are_never_lost(interpreted):
    w = torch.tensor(1.5, dtype=torch.float64, requires_grad=True)
    for name, f, parameter in holders(w):
        sde = sds.SDE(f, lambda x, t: 0.1 * x)
        options = {"solver": sds.EulerMaruyama(), "seed": 1}
        wanted, given = (
            torch.autograd.grad(sds.solve(sde, X0, 0.0, 1.0, 4, backend=b, **options).x1.sum(), parameter)[0]
            for b in ("eager", "fused")
        )
        torch.testing.assert_close(given, wanted, msg=name)
        with torch.no_grad():
            assert sds.solve(sde, X0, 0.0, 1.0, 4, **options).stats.backend == "fused", name
    start = X0.clone().requires_grad_()
    sol = sds.solve(
        sds.SDE(lambda x, t: -x, lambda x, t: 0.1 * x), start, 0.0, 1.0, 4, solver=sds.EulerMaruyama(), seed=1
    )
    assert sol.stats.backend == "fused"
    assert torch.autograd.grad(sol.x1.sum(), start)[0].abs().min() > 0


def test_surroundings_that_change_what_torch_does_are_part_of_the_kernel(both, difference, interpreted):
    sde = sds.SDE(
        lambda x, t: torch.ones(2).to(x) / 3 * x if torch.ones(1).dtype == torch.float32 else -x, lambda x, t: x
    )
    before = torch.get_default_dtype()
    try:
        for dtype in (torch.float32, torch.float64):
            torch.set_default_dtype(dtype)
            fused, eager = both(sde, X0)
            assert difference(fused.x1, eager.x1) < 1e-14
    finally:
        torch.set_default_dtype(before)
