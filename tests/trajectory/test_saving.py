"""What a fused run keeps: states on and between grid points, observations, moments, stats; and where it diverged."""

from __future__ import annotations

import itertools

import pytest
import torch

import sdesolve as sds

SDE = sds.SDE(lambda x, t: torch.sin(x) - x * t, lambda x, t: 0.2 + 0.1 * torch.cos(x), noise="diagonal")
GENERAL = sds.SDE(lambda x, t: -x, lambda x, t: 0.1 * torch.stack([x.sin(), x.cos(), x * t], -1), noise="general")
ODE = sds.ODE(lambda x, t: -x * t)
TIMES = [
    None, "grid", [0.0, 1.0], [1.0], [0.25, 0.5], [0.25, 0.5 + 1e-12, 0.9], [0.1, 0.11, 0.12, 0.75], [0.0, 0.999],
    torch.linspace(0, 1, 9),
]  # fmt: skip


def saved():
    """All times for states of one equation, every third for others; the rest is left for the thorough profile."""
    for reduce, (name, sde), (i, save_at) in itertools.product(
        (None, "moments"), {"diagonal": SDE, "general": GENERAL, "ode": ODE}.items(), enumerate(TIMES)
    ):
        marks = [pytest.mark.thorough] if (sde is not SDE or reduce) and i % 3 else []
        yield pytest.param(sde, save_at, reduce, id=f"{reduce}-{name}-{save_at}", marks=marks)


@pytest.mark.parametrize(("sde", "save_at", "reduce"), list(saved()))
def test_states_observations_and_moments_are_eagers(sde, save_at, reduce, both, difference, interpreted, normals):
    x0 = normals(9, 3)
    for observable in (None, lambda x: x.square().sum(1), lambda x: torch.stack([x, x.exp()], -1)[:, :2]):
        fused, eager = both(sde, x0, solver=sds.EulerMaruyama(), save_at=save_at, reduce=reduce, observable=observable)
        assert difference(fused.x1, eager.x1) < 1e-14
        assert torch.equal(fused.ts, eager.ts)
        assert difference(fused.xs, eager.xs) < 1e-13
        assert fused.stats.nfe == eager.stats.nfe
        if reduce:
            assert difference(fused.mean, eager.mean) < 1e-13
            assert difference(fused.variance, eager.variance) < 1e-13
        else:
            assert fused.mean is eager.mean is None


def test_backwards_in_time(both, difference, interpreted, normals):
    for save_at in ("grid", [0.75, 0.3, 0.0]):
        fused, eager = both(SDE, normals(5, 2), 1.0, 0.0, save_at=save_at)
        assert difference(fused.xs, eager.xs) < 1e-14


def test_two_times_near_one_grid_point(both, interpreted, normals):
    """A Brownian motion moves by 1e-6 in 1e-12."""
    fused, eager = both(SDE, normals(5, 2), save_at=[0.25, 0.25 + 1e-12, 1.0])
    torch.testing.assert_close(fused.xs, eager.xs, rtol=1e-12, atol=1e-12)
    assert fused.xs.shape == (3, 5, 2)
    assert 0 < (fused.xs[0] - fused.xs[1]).abs().max() < 1e-5


@pytest.mark.parametrize("batch", [1, 2, 127, 128, 129, 1000])
def test_moments_of_kernels(batch, normals):
    """Two passes in float64 over numbers that far from zero: a rounding of the mean, squared, is all that is lost."""
    x0 = 1e4 + normals(batch, 3, dtype=torch.float32)
    options = {"solver": sds.EulerMaruyama(), "seed": 1, "backend": "fused", "save_at": [0.0, 0.25, 1.0]}
    every = sds.solve(GENERAL, x0, 0.0, 1.0, 4, **options).xs.double()
    moments = sds.solve(GENERAL, x0, 0.0, 1.0, 4, reduce="moments", **options)
    eps = batch * torch.finfo(torch.float64).eps
    torch.testing.assert_close(moments.mean, every.mean(1), rtol=eps, atol=0)
    expected = every.var(1) if batch > 1 else torch.full((3, 3), float("nan"), dtype=torch.float64)
    torch.testing.assert_close(moments.variance, expected, rtol=1e-9, atol=0, equal_nan=True)
    assert moments.xs.numel() == 0


def test_observables_in_kernels(normals, difference):
    x0, weights = normals(200, 3, dtype=torch.float32), torch.tensor([1.0, -2.0, 0.5])
    options = {"solver": sds.EulerMaruyama(), "seed": 1, "backend": "fused", "save_at": "grid"}

    def payoff(x):
        return torch.relu(x @ weights - 0.1)

    for change in (1.0, 2.0):
        weights.mul_(change)
        seen = sds.solve(SDE, x0, 0.0, 1.0, 4, observable=payoff, **options)
        every = sds.solve(SDE, x0, 0.0, 1.0, 4, **options)
        assert seen.xs.shape == (5, 200)
        assert difference(seen.xs, torch.stack([payoff(x) for x in every.xs])) < 8 * torch.finfo(torch.float32).eps
        assert torch.equal(seen.x1, every.x1)


@pytest.mark.parametrize(
    "observable",
    [lambda x: x.mean(), lambda x: x.mean(0), lambda x: x[:2], lambda x: 1.0, lambda x: x.sum(0, keepdim=True)],
)
def test_observables_of_wrong_shape(observable, both, interpreted, normals):
    for backend in ("fused", "eager", "auto"):
        with pytest.raises(ValueError, match="row per path"):
            sds.solve(
                SDE, normals(5, 3), 0.0, 1.0, 2, solver=sds.EulerMaruyama(), observable=observable, backend=backend
            )


def test_an_observable_that_couples_paths_runs_eagerly(interpreted, normals):
    x0, f = normals(5, 3), lambda x: x - x.mean(0)
    options = {"solver": sds.EulerMaruyama(), "seed": 1, "observable": f}
    with pytest.raises(ValueError, match="couples the paths"):
        sds.solve(SDE, x0, 0.0, 1.0, 2, backend="fused", **options)
    auto, eager = (sds.solve(SDE, x0, 0.0, 1.0, 2, backend=b, **options) for b in ("auto", "eager"))
    assert "couples the paths" in auto.stats.reason
    torch.testing.assert_close(auto.xs, eager.xs)


def test_stats(both, normals):
    fused, eager = both(SDE, normals(5, 2))
    assert (fused.stats.backend, eager.stats.backend) == ("fused", "eager")
    assert "def trajectory(" in fused.stats.source
    assert eager.stats.source is None
    for name in ("solver", "steps", "nfe", "seed"):
        assert getattr(fused.stats, name) == getattr(eager.stats, name)


@pytest.mark.parametrize("solver", [sds.EulerMaruyama(), sds.Milstein()], ids=repr)
def test_divergence_names_the_step_and_path_that_eager_names(solver, interpreted):
    x0 = torch.tensor([[0.1], [3.0], [0.2], [40.0]], dtype=torch.float64)
    sde = sds.SDE(lambda x, t: x**3, lambda x, t: 0.1 * x)
    found = []
    for backend in ("fused", "eager"):
        noise = sds.BrownianPath(1, first_path=100)
        with pytest.raises(sds.DivergenceError) as error:
            sds.solve(sde, x0, 0.0, 1.0, 12, solver=solver, noise=noise, backend=backend)
        found.append((error.value.step, error.value.path, error.value.time, str(error.value)))
    assert found[0] == found[1]
    sol = sds.solve(sde, x0, 0.0, 1.0, 12, solver=solver, seed=1, backend="fused", check_finite=False)
    assert sol.x1.isfinite().flatten().tolist() == [True, False, True, False]


def test_a_run_that_diverges_in_the_kernel_alone_is_not_silent(interpreted, monkeypatch, normals):
    """Rounding may take one of them over the edge; the state that is handed back is finite or there is an error."""
    run = interpreted.run

    def spoilt(self, launch):
        saved = run(self, launch)
        if len(launch.times) > 2:  # not where the kernel is compared with torch
            saved.x1[2, 0] = float("nan")
        return saved

    monkeypatch.setattr(interpreted, "run", spoilt)
    with pytest.raises(sds.DivergenceError) as error:
        sds.solve(
            SDE,
            normals(5, 2),
            0.0,
            1.0,
            4,
            solver=sds.EulerMaruyama(),
            noise=sds.BrownianPath(1, first_path=7),
            backend="fused",
        )
    assert error.value.path == 9
