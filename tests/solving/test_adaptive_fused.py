"""Adaptive steps inside the kernel: the same paths as eager torch, whoever is beside them; laws; runs that stop."""

from __future__ import annotations

import pytest
import torch
from sdesolve_kernels.trajectory.numba_adaptive import NumbaAdaptive

import sdesolve as sds


def drift(x, t):
    return x - x**3 + 0.1 * t


def diffusion(x, t):
    return (0.4 + 0.1 * t) * x.cos()


SDE = sds.SDE(drift, diffusion, "diagonal", "stratonovich")
SOLVER = sds.Adaptive(sds.SPaRK(), 1e-2, 1e-3, first_steps=2)
X0 = torch.linspace(-1, 1, 400).reshape(200, 2)


def fused(x0, noise, solver=SOLVER, **options):
    return sds.solve(SDE, x0, 0.3, 1.4, solver=solver, noise=noise, backend="fused", **options)


@pytest.mark.slow
def test_paths_are_those_of_eager_torch_and_saved_where_they_are():
    noise, times = sds.BrownianPath(11, first_path=2**32 - 4), [0.3, 0.5, 0.85, 1.0, 1.4]
    made = fused(X0, noise, save_at=times)
    eager = sds.solve(SDE, X0[:12], 0.3, 1.4, solver=SOLVER, noise=noise, save_at=times, backend="eager")
    assert made.stats.execution == "fused"
    torch.testing.assert_close(made.xs[:, :12], eager.xs, rtol=0, atol=1e-5)
    assert torch.equal(made.stats.accepted[:12], eager.stats.accepted)
    assert torch.equal(made.stats.rejected[:12], eager.stats.rejected)
    assert torch.equal(made.xs[-1], made.x1)
    assert torch.equal(fused(X0, noise).x1, made.x1)
    mirrored = fused(X0[:3], noise.antithetic())
    again = sds.solve(SDE, X0[:3], 0.3, 1.4, solver=SOLVER, noise=noise.antithetic(), backend="eager")
    torch.testing.assert_close(mirrored.x1, again.x1, rtol=0, atol=1e-5)


def test_a_path_has_the_same_bits_whoever_is_beside_it():
    noise, many = sds.BrownianPath(4), X0.repeat(8, 1)
    whole, threads = fused(many, noise), torch.get_num_threads()
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            again = fused(many, noise)
            assert torch.equal(again.x1, whole.x1)
            assert torch.equal(again.stats.rejected, whole.stats.rejected)
    finally:
        torch.set_num_threads(threads)
    for first, last in ((0, 1), (77, 160), (1599, 1600)):
        part = fused(many[first:last], noise.rows(first))
        assert torch.equal(part.x1, whole.x1[first:last])
        assert torch.equal(part.stats.accepted, whole.stats.accepted[first:last])
    assert whole.stats.rejected.sum() > 0
    assert len(set(whole.stats.accepted.tolist())) > 3


def test_a_tolerance_that_never_rejects_has_the_bits_of_the_fused_grid():
    loose = fused(X0, sds.BrownianPath(3), sds.Adaptive(sds.SPaRK(), 1e9, 1e9, first_steps=7))
    grid = sds.solve(SDE, X0, 0.3, 1.4, 7, solver=sds.SPaRK(), seed=3, backend="fused")
    assert torch.equal(loose.x1, grid.x1)
    assert loose.stats.accepted.tolist() == [7] * len(X0)


def area(x, t):
    a, b, _ = x.unbind(1)
    o = torch.zeros_like(a)
    rows = ([o + 1, o], [o, o + 1], [-0.5 * b, 0.5 * a])
    return torch.stack([torch.stack(row, 1) for row in rows], 1)


@pytest.mark.slow
def test_the_area_of_adaptive_paths_has_no_mean():
    """Its steps are chosen by an error that goes with the area: end points that are skipped, or peeked at, bias it."""
    sde, n = sds.SDE(lambda x, t: 0 * x, area, "general", "stratonovich"), 100_000
    sol = sds.solve(
        sde, torch.zeros(n, 3), 0.0, 1.0, solver=sds.Adaptive(sds.SPaRK(), 1e-6, 0.1), seed=5, backend="fused"
    )
    accepted, rejected = sol.stats.accepted.sum(), sol.stats.rejected.sum()
    assert 0.2 < rejected / (accepted + rejected) < 0.5
    x = sol.x1.double()
    for value, mean in ((x[:, 2], 0.0), (x[:, 0], 0.0), (x[:, 0] ** 2, 1.0), (x[:, 0] * x[:, 1], 0.0)):
        assert abs(value.mean() - mean) < 3 * value.std() / n**0.5


def lorenz(x, t, rho):
    a, b, c = x.unbind(1)
    return torch.stack([10 * (b - a), a * (rho[:, 0] - c) - b, a * b - 8 / 3 * c], 1)


@pytest.mark.slow
def test_an_ode_takes_the_steps_of_eager_torch():
    ode, rho = sds.ODE(lorenz), torch.linspace(5, 28, 100, dtype=torch.float64)[:, None]
    x0, options = torch.tensor([[1.0, 0.0, 0.0]], dtype=torch.float64).repeat(100, 1), {"save_at": [0.25, 1.0, 2.0]}
    solver = sds.DormandPrince(1e-6, 1e-6)
    made = sds.solve(ode, x0, 0.0, 2.0, solver=solver, params=rho, backend="fused", **options)
    eager = sds.solve(ode, x0, 0.0, 2.0, solver=solver, params=rho, backend="eager", **options)
    torch.testing.assert_close(made.xs, eager.xs, rtol=0, atol=1e-9)
    assert torch.equal(made.stats.accepted, eager.stats.accepted)
    assert torch.equal(made.stats.rejected, eager.stats.rejected)
    one = sds.solve(ode, x0[40:41], 0.0, 2.0, solver=solver, params=rho[40:41], backend="fused")
    assert torch.equal(one.x1[0], made.x1[40])
    few = sds.DormandPrince(1e-6, 1e-6, max_steps=30)
    for backend in ("fused", "eager"):
        with pytest.raises(sds.StepLimitError, match=r"max_steps=30") as caught:
            sds.solve(ode, x0, 0.0, 2.0, solver=few, params=rho, backend=backend)
        tries = caught.value.reached.accepted + caught.value.reached.rejected
        assert tries.max() == 30
        assert caught.value.path == int((caught.value.reached.t < 2.0).nonzero()[0])
        assert 0.0 < caught.value.time < 2.0


def test_a_run_of_unknown_length_can_be_watched_and_stopped(monkeypatch):
    told, adapt = [], NumbaAdaptive.adapt

    def watched(self, launch):
        def progress(amount):
            told.append(amount)
            if len(told) > 2:
                raise KeyboardInterrupt

        import dataclasses

        return adapt(self, dataclasses.replace(launch, progress=progress))

    monkeypatch.setattr(NumbaAdaptive, "adapt", watched)
    monkeypatch.setattr("sdesolve_kernels.trajectory.numba_adaptive._MOST", 64)
    solver = sds.Adaptive(sds.SPaRK(), 1e-4, 1e-6, first_steps=2)
    with pytest.raises(KeyboardInterrupt):
        fused(X0.repeat(10, 1), sds.BrownianPath(0), solver)
    assert len(told) == 3
    assert all(amount > 0 for amount in told)


def test_limits_and_gradients():
    tight = sds.Adaptive(sds.SPaRK(), 1e-2, 1e-3, first_steps=2, max_steps=12)
    with pytest.raises(sds.StepLimitError, match="max_steps=12") as caught:
        fused(X0, sds.BrownianPath(3, first_path=50), tight)
    tries = caught.value.reached.accepted + caught.value.reached.rejected
    stuck = (caught.value.reached.t < 1.4).nonzero()[:, 0]
    assert caught.value.path == 50 + int(stuck[0])
    assert tries.max() == 12
    assert bool(caught.value.reached.x.isfinite().all())
    leaf = X0[:2].clone().requires_grad_()
    sol = sds.solve(SDE, leaf, 0.3, 1.4, solver=SOLVER, seed=3)
    assert "gradients are wanted" in sol.stats.reason
    sol.x1.sum().backward()
    assert bool(leaf.grad.abs().gt(0).all())


@pytest.mark.parametrize("backend", ["auto", "fused", "eager"])
def test_tolerances_that_a_dtype_cannot_resolve_are_refused_before_anything_runs(backend):
    calls = []

    def drift(x, t):
        calls.append(t)
        return -x

    noisy = sds.SDE(drift, lambda x, t: torch.ones_like(x), noise="diagonal", calculus="stratonovich")
    for dtype, rtol in ((torch.float32, 4e-7), (torch.float64, 8e-16)):
        x0 = torch.ones(3, 2, dtype=dtype)
        for equation, make in (
            (noisy, lambda rtol: sds.Adaptive(sds.SPaRK(), rtol)),
            (sds.ODE(drift), lambda rtol: sds.Adaptive(sds.Heun(), rtol)),
            (sds.ODE(drift), sds.DormandPrince),
        ):
            with pytest.raises(ValueError, match=f"below what {dtype} resolves: take at least") as caught:
                sds.solve(equation, x0, 0.0, 1.0, solver=make(rtol), seed=0, backend=backend)
            assert not calls
            least = float(str(caught.value).split("at least ")[1].split(",")[0])
            sds.solve(equation, x0, 0.0, 1e-6, solver=make(1.01 * least), seed=0, backend="eager")  # as it advises
            calls.clear()
