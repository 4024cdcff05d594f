"""Drift and diffusion as one function, and a diffusion that is known by its products alone."""

from __future__ import annotations

import pickle

import pytest
import torch

import sdesolve as sds

F64 = torch.float64
M = torch.linspace(-0.4, 0.5, 6, dtype=F64).reshape(2, 3)


class Body:
    """Counts how often the body that drift and diffusion share is evaluated."""

    def __init__(self, matrix=False):
        self.calls, self.matrix = 0, matrix

    def __call__(self, x, t):
        self.calls += 1
        h = torch.tanh(x + 0.3 * t.reshape(-1, *(1,) * (x.ndim - 1)) if t.ndim else x + 0.3 * t)
        g = 0.3 * h.unsqueeze(-1) * M.to(x) if self.matrix else 0.3 * h
        return -h, g


def pair(noise="diagonal", calculus="ito", body=None):
    matrix = noise == "general"
    body = body or Body(matrix)
    joint = sds.SDE(noise=noise, calculus=calculus, drift_and_diffusion=body)
    apart = sds.SDE(lambda x, t: Body(matrix)(x, t)[0], lambda x, t: Body(matrix)(x, t)[1], noise, calculus)
    return joint, apart, body


X0 = torch.linspace(0.4, 1.2, 10, dtype=F64).reshape(5, 2)
OPTIONS = {"t0": 0.0, "t1": 1.0, "steps": 8, "seed": 3}
# Scheme, noise, calculus, and evaluations a step of what is joint where it is evaluated once for each point.
ONCE = [
    (sds.EulerMaruyama(), "general", "ito", 1),
    (sds.EulerMaruyama(), "diagonal", "ito", 1),
    (sds.Heun(), "general", "stratonovich", 2),
    (sds.Midpoint(), "general", "stratonovich", 2),
    (sds.EulerHeun(), "diagonal", "stratonovich", 2),
    (sds.SPaRK(), "general", "stratonovich", 3),
    (sds.GeneralShARK(), "general", "stratonovich", 3),
    (sds.ReversibleHeun(), "general", "stratonovich", 2),
    (sds.SRIW1(), "diagonal", "ito", 5),
    (sds.Tamed(sds.EulerMaruyama()), "diagonal", "ito", 1),
]


@pytest.mark.parametrize(("solver", "noise", "calculus", "once"), ONCE, ids=repr)
def test_a_joint_function_gives_the_bits_of_two_and_is_evaluated_once_at_a_point(solver, noise, calculus, once):
    joint, apart, body = pair(noise, calculus)
    with_both = sds.solve(joint, X0, solver=solver, backend="eager", **OPTIONS)
    assert torch.equal(with_both.x1, sds.solve(apart, X0, solver=solver, backend="eager", **OPTIONS).x1)
    before = body.calls
    sds.solve(joint, X0, solver=solver, backend="eager", **{**OPTIONS, "steps": 40})
    sds.solve(joint, X0, solver=solver, backend="eager", **{**OPTIONS, "steps": 8})
    longer = body.calls - before
    before = body.calls
    for _ in range(2):
        sds.solve(joint, X0, solver=solver, backend="eager", **OPTIONS)
    looks = 2 if "SRI" in repr(solver) else 0  # at the noise's structure, at steps 16 and 32
    assert longer - (body.calls - before) <= (once + looks) * 32


@pytest.mark.uncompiled
def test_joint_functions_fuse_convert_and_have_gradients():
    joint, apart, _ = pair("general", body=lambda x, t: Body(True)(x, t))
    one, two = (
        sds.solve(sds.to_stratonovich(sde), X0, solver=sds.Heun(), backend=backend, **OPTIONS)
        for sde, backend in ((joint, "fused"), (apart, "eager"))
    )
    torch.testing.assert_close(one.x1, two.x1, rtol=1e-13, atol=1e-13)
    rate = torch.tensor(0.7, dtype=F64, requires_grad=True)

    def both(x, t, p):
        h = torch.tanh(p["rate"] * x)
        return -h, 0.2 * h

    options = {"solver": sds.EulerMaruyama(), "params": {"rate": rate}, "backend": "eager"}
    separate = sds.SDE(lambda x, t, p: both(x, t, p)[0], lambda x, t, p: both(x, t, p)[1])
    grads = [
        torch.autograd.grad(sds.solve(sde, X0, **options, **OPTIONS).x1.square().sum(), rate)
        for sde in (sds.SDE(drift_and_diffusion=both), separate)
    ]
    torch.testing.assert_close(*grads, rtol=1e-12, atol=1e-13)


def test_times_per_row_row_kernels_reversals_and_correlations_take_joint_functions():
    joint, apart, _ = pair("diagonal")
    t1 = torch.tensor([1.0, 0.5, 2.0, -1.0, 0.3], dtype=F64)
    options = {"t0": 0.0, "t1": t1, "steps": 6, "solver": sds.EulerMaruyama(), "seed": 1}
    for backend in ("eager", "kernel"):
        one, two = (sds.solve(sde, X0, backend=backend, **options).x1 for sde in (joint, apart))
        torch.testing.assert_close(one, two, rtol=1e-13, atol=1e-13)
    L = torch.tensor([[1.0, 0.0], [0.6, 0.8]], dtype=F64)
    eager = {"solver": sds.EulerMaruyama(), "backend": "eager"}
    one, two = (sds.solve(sds.correlated(sde, L), X0, **eager, **OPTIONS).x1 for sde in (joint, apart))
    torch.testing.assert_close(one, two, rtol=1e-13, atol=1e-13)
    forward = sds.SDE(noise="additive", drift_and_diffusion=lambda x, t: (-x, (0.5 + t) * torch.ones_like(x)))
    plain = sds.SDE(lambda x, t: -x, lambda x, t: (0.5 + t) * torch.ones_like(x), noise="additive")
    one, two = (
        sds.solve(sds.ReverseSDE(sde, lambda x, t: -x), X0, 1.0, 0.0, 6, seed=0, **eager).x1 for sde in (forward, plain)
    )
    torch.testing.assert_close(one, two, rtol=1e-13, atol=1e-13)


def product(x, t, v):
    return 0.3 * x * (v @ M.to(x).T) * (1.0 + t)


def matrix(x, t):
    return 0.3 * x.unsqueeze(-1) * M.to(x) * (1.0 + t)


BY_PRODUCT = [
    (sds.EulerMaruyama(), "ito"),
    (sds.Tamed(sds.EulerMaruyama()), "ito"),
    (sds.ImplicitEuler(), "ito"),
    (sds.SplitStepEuler(), "ito"),
    (sds.SKSROCK(3), "ito"),
    (sds.Heun(), "stratonovich"),
    (sds.Midpoint(), "stratonovich"),
    (sds.EulerHeun(), "stratonovich"),
    (sds.SPaRK(), "stratonovich"),
    (sds.GeneralShARK(), "stratonovich"),
    (sds.SlowRK(), "stratonovich"),
    (sds.ReversibleHeun(), "stratonovich"),
]


@pytest.mark.parametrize(("solver", "calculus"), BY_PRODUCT, ids=repr)
def test_a_product_is_the_matrix_that_is_never_formed(solver, calculus):
    sde = sds.SDE(lambda x, t: -x, diffusion_product=product, channels=3, calculus=calculus)
    formed = sds.SDE(lambda x, t: -x, matrix, noise="general", calculus=calculus)
    assert sde.noise == "general"
    a, b = (sds.solve(s, X0, solver=solver, backend="eager", **OPTIONS).x1 for s in (sde, formed))
    torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("solver", [sds.SEA(), sds.ShARK(), sds.SRA1(), sds.SOSRA(), sds.SKenCarp()], ids=repr)
def test_additive_noise_by_products(solver):
    scale = torch.tensor([0.2, 0.5], dtype=F64)
    sde = sds.SDE(
        lambda x, t: -(x**3),
        noise="additive",
        channels=3,
        diffusion_product=lambda x, t, v: scale * (v @ M.T) * (1 + t),
    )
    formed = sds.SDE(lambda x, t: -(x**3), lambda x, t: (scale[:, None] * M * (1 + t))[None], noise="additive")
    a, b = (sds.solve(s, X0, solver=solver, backend="eager", **OPTIONS).x1 for s in (sde, formed))
    torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)


@pytest.mark.uncompiled
def test_products_fuse_and_have_gradients():
    s = torch.tensor(0.4, dtype=F64, requires_grad=True)
    sde = sds.SDE(lambda x, t: -x, diffusion_product=lambda x, t, v: s * x * (v @ M.T), channels=3)
    formed = sds.SDE(lambda x, t: -x, lambda x, t: s * x.unsqueeze(-1) * M, noise="general")
    results = []
    for equation, backend in ((sde, "fused"), (sde, "eager"), (formed, "eager")):
        x1 = sds.solve(equation, X0, solver=sds.EulerMaruyama(), backend=backend, **OPTIONS).x1
        results.append((x1.detach(), *torch.autograd.grad(x1.square().sum(), s)))
    for other in results[1:]:
        torch.testing.assert_close(results[0], other, rtol=1e-11, atol=1e-12)


def test_products_between_grid_points_and_correlated():
    sde = sds.SDE(lambda x, t: -x, diffusion_product=product, channels=3)
    formed = sds.SDE(lambda x, t: -x, matrix, noise="general")
    L = torch.linspace(0.1, 1.0, 12, dtype=F64).reshape(3, 4)
    options = {"solver": sds.EulerMaruyama(), "backend": "eager", "save_at": [0.31, 1.0]} | OPTIONS
    for a, b in ((sde, formed), (sds.correlated(sde, L), sds.correlated(formed, L))):
        one, two = (sds.solve(e, X0, **options).xs for e in (a, b))
        torch.testing.assert_close(one, two, rtol=1e-12, atol=1e-13)
    with pytest.raises(ValueError, match="cholesky has 4 rows, and the noise of the SDE has 3 channels"):
        sds.correlated(sde, L.T)


def test_what_needs_the_diffusion_itself_refuses_a_product_and_says_what_to_do():
    sde = sds.SDE(lambda x, t: -x, diffusion_product=product, channels=3)
    strat = sds.SDE(lambda x, t: -x, diffusion_product=product, channels=3, calculus="stratonovich")
    additive = sds.SDE(lambda x, t: -x, diffusion_product=lambda x, t, v: v @ M.T, channels=3, noise="additive")
    for equation, solver in (
        (sde, sds.Milstein("foster")), (sde, sds.SRI2("foster")), (sde, sds.W2Ito1()), (strat, sds.LogODE()),
        (strat, sds.NON()),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=r"its product g v alone\. Give diffusion in place of diffusion_product"):
            sds.solve(equation, X0, solver=solver, **OPTIONS)
    with pytest.raises(ValueError, match="give diffusion in place of diffusion_product"):
        sds.to_stratonovich(sde)
    assert sds.to_stratonovich(additive).calculus == "stratonovich"
    with pytest.raises(ValueError, match="give diffusion in place of diffusion_product"):
        sds.ReverseSDE(additive, lambda x, t: -x)


def solved(**arguments):
    return sds.solve(sds.SDE(lambda x, t: -x, **arguments), X0, solver=sds.EulerMaruyama(), **OPTIONS)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"diffusion_product": product}, TypeError, "needs channels="),
        ({"diffusion": matrix, "channels": 3}, TypeError, "channels= goes with diffusion_product"),
        ({"diffusion_product": product, "channels": 3, "noise": "diagonal"}, ValueError, "give diffusion"),
        ({"diffusion_product": product, "channels": 0}, ValueError, "at least 1"),
        ({"diffusion_product": product, "channels": 3.0}, TypeError, "must be an integer"),
        ({"diffusion_product": product, "diffusion": matrix, "channels": 3}, TypeError, "is made of drift and"),
        ({"drift_and_diffusion": product}, TypeError, "is made of drift and"),
        ({"diffusion_product": "g"}, TypeError, "must be a function"),
        ({"diffusion_product": lambda x, t, v: v, "channels": 3}, ValueError, "must return the shape of the state"),
        ({"diffusion_product": lambda x, t, v: v[:, :2] + 1.0, "channels": 3}, ValueError, "linear in v"),
        ({"diffusion_product": lambda x, t, v: (v**2)[:, :2], "channels": 3}, ValueError, "linear in v"),
        (
            {"diffusion_product": lambda x, t, v: x * v[:, :2], "channels": 3, "noise": "additive"},
            ValueError,
            "depends on the state",
        ),
    ],
)
def test_bad_products(arguments, error, message):
    with pytest.raises(error, match=message):
        solved(**arguments)


@pytest.mark.parametrize(
    ("both", "error", "message"),
    [
        (lambda x, t: x, TypeError, "tuple"),
        (lambda x, t: (x, x, x), TypeError, "3 values"),
        (lambda x, t: (x, x.float()), TypeError, "diffusion returned torch.float32"),
        (lambda x, t: (x.unsqueeze(-1), x), ValueError, "drift must return the shape"),
    ],
)
def test_bad_joint_functions(both, error, message):
    with pytest.raises(error, match=message):
        sds.solve(sds.SDE(drift_and_diffusion=both), X0, solver=sds.EulerMaruyama(), **OPTIONS)
    with pytest.raises(TypeError, match="none of them"):
        sds.SDE()


def test_equations_pickle():
    sde = sds.SDE(torch.neg, diffusion_product=product, channels=3)
    again = pickle.loads(pickle.dumps(sde))
    assert torch.equal(
        again.diffusion_product(X0, X0[0, 0], X0[:, :1].expand(5, 3)), product(X0, X0[0, 0], X0[:, :1].expand(5, 3))
    )
