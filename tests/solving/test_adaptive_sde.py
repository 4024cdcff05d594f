"""Steps that each path of an SDE chooses: nested cells of one Brownian path, against closed forms and fixed grids."""

from __future__ import annotations

import math
import pickle

import pytest
import torch

import sdesolve as sds
from sdesolve.brownian import halved

ROOT = torch.tensor([0.0, 1.0], dtype=torch.float64)


def geometric(calculus="stratonovich"):
    drift = (lambda x, t: 0.3 * x) if calculus == "stratonovich" else (lambda x, t: (0.3 + 0.5 * 0.64) * x)
    return sds.SDE(drift, lambda x, t: 0.8 * x, noise="diagonal", calculus=calculus)


def exact(noise, t, n):
    """The solution of `geometric` from 1 on the root step [0, 1]."""
    return torch.exp(0.3 * t + 0.8 * noise.value(t, (n, 1), times=ROOT))


def double_well(noise="additive", calculus="ito"):
    return sds.SDE(lambda x, t: 4 * (x - x**3), lambda x, t: 0.5 * torch.ones_like(x), noise=noise, calculus=calculus)


def test_halving_is_a_rotation_and_the_path_of_every_other_query():
    unit = torch.eye(6, dtype=torch.float64).reshape(6, 2, 3, 1)
    turned = torch.cat(halved(unit[:, 0], unit[:, 1]), 1)[..., 0]
    torch.testing.assert_close(turned @ turned.T, torch.eye(6, dtype=torch.float64), rtol=0, atol=1e-15)
    for path in (
        sds.BrownianPath(3, first_path=5),
        sds.BrownianPath(4, repeat=3, first_row=1, swapped=True).antithetic(),
    ):
        like, rows = torch.empty(0, dtype=torch.float64), torch.arange(4)
        first, second = halved(path.roots(2, 4, 2, like), path.nodes(rows, rows * 0 + 2, rows * 0 + 1, 2, like))
        later, _ = halved(second, path.nodes(rows, rows * 0 + 2, rows * 0 + 3, 2, like))
        for cell, (a, b) in ((first, (2.0, 2.5)), (later, (2.5, 2.75))):
            torch.testing.assert_close(math.sqrt(b - a) * cell[:, 0], path.increment(a, b, (4, 2)), rtol=0, atol=1e-14)
        W, H, K = path.beginning(2, 0.75, rows * 0 + 1, 2, like)  # the first half of the second half
        for made, scale, part in ((W, 1.0, 0), (H, 12.0, 1), (K, 720.0, 2)):
            torch.testing.assert_close(made, math.sqrt(0.25 / scale) * later[:, part], rtol=0, atol=1e-14)
        W = path.beginning(2, 0.3125 + 2.0**-40, rows % 3, 2, like)[0]
        starts = torch.tensor([2.0, 2.0, 2.25, 2.0])
        for i, a in enumerate(starts.tolist()):
            torch.testing.assert_close(W[i], path.increment(a, 2.3125 + 2.0**-40, (4, 2))[i], rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("solver", "calculus", "noise"),
    [
        (sds.SPaRK(), "stratonovich", "diagonal"),
        (sds.ShARK(), "ito", "additive"),
        (sds.SRIW1(), "ito", "diagonal"),
        (sds.Heun(), "stratonovich", "scalar"),
    ],
    ids=lambda v: type(v).__name__ if isinstance(v, sds.AbstractOneStep) else v,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_tolerance_that_never_rejects_has_the_bits_of_the_grid(solver, calculus, noise, dtype):
    sde = sds.SDE(
        lambda x, t: x - x**3 + t, lambda x, t: (1 + 0.1 * t) * (1 if noise == "additive" else x), noise, calculus
    )
    x0 = torch.linspace(-1, 1, 6, dtype=dtype).reshape(3, 2)
    loose = sds.solve(sde, x0, 0.3, 1.4, solver=sds.Adaptive(solver, 1e9, 1e9, first_steps=5), seed=7, backend="eager")
    grid = sds.solve(sde, x0, 0.3, 1.4, 5, solver=solver, seed=7, backend="eager")
    assert torch.equal(loose.x1, grid.x1)
    assert loose.stats.accepted.tolist() == [5] * 3
    assert loose.stats.rejected.tolist() == [0] * 3


def test_errors_follow_the_tolerance_along_the_very_path():
    """With an order of 1, errors at a fixed time are about proportional to the tolerance."""
    noise, n = sds.BrownianPath(1), 32
    for solver in (sds.SPaRK(), sds.Milstein()):  # with an estimate of its own, and by two half steps
        errors, steps = [], []
        for rtol in (1e-1, 5e-3):
            sol = sds.solve(
                geometric(), torch.ones(n, 1, dtype=torch.float64), 0.0, 1.0, solver=sds.Adaptive(solver, rtol, 1e-9),
                noise=noise, save_at=[0.3, 0.5, 1.0], backend="eager",
            )  # fmt: skip
            truth = torch.stack([exact(noise, t, n) for t in (0.3, 0.5, 1.0)])
            errors.append((sol.xs / truth - 1).square().mean((1, 2)).sqrt())
            steps.append(sol.stats.accepted.double().mean())
        assert sol.stats.rejected.sum() > 0
        assert bool((errors[0] < 0.2).all() and (errors[1] < errors[0] / 3).all())
        assert steps[1] > 3 * steps[0]


def test_a_path_depends_on_nobody_else_and_asking_for_states_changes_nothing():
    sde, solver, x0 = double_well(), sds.Adaptive(sds.ShARK(), 1e-1, 1e-2), torch.linspace(-1, 1, 6)[:, None]
    noise = sds.BrownianPath(5, first_path=3)
    whole = sds.solve(sde, x0, 0.0, 1.0, solver=solver, noise=noise, backend="eager")
    rows = {"noise": noise.rows(4), "save_at": [0.0, 0.11, 0.7, 1.0], "backend": "eager"}
    part = sds.solve(sde, x0[4:], 0.0, 1.0, solver=solver, **rows)
    assert torch.equal(whole.x1[4:], part.x1)
    assert torch.equal(whole.stats.accepted[4:], part.stats.accepted)
    assert torch.equal(whole.stats.rejected[4:], part.stats.rejected)
    assert torch.equal(part.xs[0], x0[4:])
    assert torch.equal(part.xs[-1], part.x1)
    assert len(set(whole.stats.accepted.tolist())) > 1


@pytest.mark.parametrize(
    ("solver", "sde", "why"),
    [
        (sds.EulerMaruyama(), geometric("ito"), "does not converge.*double integrals"),
        (sds.ImplicitEuler(), geometric("ito"), "does not converge.*SRIW1"),
        (sds.SPaRK(), geometric("ito"), "Stratonovich|stratonovich"),
        (sds.Tamed(sds.EulerMaruyama()), geometric("ito"), "does not converge"),
    ],
    ids=["Euler", "implicit Euler", "of the other calculus", "wrapped"],
)
def test_schemes_that_would_not_converge_are_refused(solver, sde, why):
    with pytest.raises(ValueError, match=why):
        sds.solve(sde, torch.ones(2, 1), 0.0, 1.0, solver=sds.Adaptive(solver), seed=0)


@pytest.mark.parametrize(
    ("make", "kind", "why"),
    [
        (lambda: sds.Adaptive(sds.Milstein("foster")), ValueError, "Levy areas"),
        (lambda: sds.Adaptive(sds.W2Ito1()), ValueError, "right in law alone"),
        (lambda: sds.Adaptive(sds.ReversibleHeun()), ValueError, "remembers"),
        (lambda: sds.Adaptive(sds.Adaptive(sds.SPaRK())), TypeError, "one-step solver of fixed steps"),
        (lambda: sds.Adaptive(sds.SPaRK), TypeError, "one-step solver of fixed steps"),
        (lambda: sds.Adaptive(sds.SPaRK(), rtol=0.0), ValueError, "rtol > 0"),
        (lambda: sds.Adaptive(sds.SPaRK(), max_level=21), ValueError, "max_level must be at most 20"),
    ],
)  # fmt: skip
def test_what_cannot_choose_its_steps(make, kind, why):
    with pytest.raises(kind, match=why):
        make()


@pytest.mark.uncompiled
def test_what_cannot_be_solved():
    sde, x0 = double_well(), torch.ones(3, 1)
    with pytest.raises(ValueError, match=r"rtol=1e-08 is below what torch.float32 resolves"):
        sds.solve(sde, x0, 0.0, 1.0, solver=sds.Adaptive(sds.ShARK(), 1e-8), seed=0)
    noise = sds.BrownianPath(0, substeps=2)
    with pytest.raises(ValueError, match="substeps=1"):
        sds.solve(sde, x0, 0.0, 1.0, solver=sds.Adaptive(sds.ShARK()), noise=noise)
    with pytest.raises(ValueError, match="differ"):
        sds.solve(sde, x0, 1.0, 1.0, solver=sds.Adaptive(sds.ShARK()), seed=0)
    nan = sds.SDE(lambda x, t: x / 0.0 - x / 0.0, lambda x, t: torch.ones_like(x), "additive")
    with pytest.raises(sds.DivergenceError, match="drift is not finite at the start"):
        sds.solve(nan, x0, 0.0, 1.0, solver=sds.Adaptive(sds.ShARK()), seed=0)


def test_a_limit_names_path_and_time_and_keeps_what_was_reached():
    sde, x0 = double_well(), torch.tensor([[8.0]])
    noise = sds.BrownianPath(0, first_path=22)
    with pytest.raises(sds.StepLimitError, match=r"equation of sample 22 .*max_steps=9 .*max_level") as caught:
        sds.solve(
            sde, x0, 0.0, 1.0, solver=sds.Adaptive(sds.ShARK(), 1e-1, 1e-1, max_steps=9), noise=noise, backend="eager"
        )
    again = pickle.loads(pickle.dumps(caught.value))
    assert (again.path, again.time) == (22, float(again.reached.t[0]))
    assert 0.0 < again.time < 1.0
    assert bool(again.reached.x.isfinite().all())
    assert int(again.reached.accepted + again.reached.rejected) == 9
    root = sds.SDE(lambda x, t: (0.5 - t).sqrt() + 0 * x, lambda x, t: torch.ones_like(x), "additive")
    with pytest.raises(sds.StepLimitError, match="drift is not finite there"):
        sds.solve(root, x0, 0.0, 1.0, solver=sds.Adaptive(sds.ShARK(), 1e-1, max_level=6), seed=0, backend="eager")


def test_an_ode_by_any_scheme():
    x0 = torch.tensor([[1.0], [2.0]], dtype=torch.float64)
    for solver in (sds.RK4(), sds.Heun(), sds.SlowRK(), sds.DormandPrince()):
        sol = sds.solve(
            sds.ODE(lambda x, t: -x),
            x0,
            0.0,
            2.0,
            solver=sds.Adaptive(solver, 1e-6, 1e-9),
            save_at=[0.7, 2.0],
            backend="eager",
        )
        torch.testing.assert_close(sol.xs, torch.stack([x0 * math.exp(-0.7), x0 * math.exp(-2)]), rtol=1e-4, atol=0)
        assert sol.stats.accepted.min() > 4


def test_a_scheme_for_one_equation_is_for_that_equation_alone():
    class ForCIR(sds.AbstractOneStep):
        supported = sds.supports(ito=("scalar", "diagonal"))
        equations = (sds.CIR,)
        strong_order, weak_order, ode_order = 1.0, 1.0, 1
        evaluations = 1

        def step(self, sde, x, span, noise):
            return x + sde.drift(x, span.t0) * span.dt + sde.diffusion(x, span.t0) * noise.W

    sde = sds.SDE(lambda x, t: -x, lambda x, t: 0.1 * x)
    with pytest.raises(ValueError, match="Adaptive integrates CIR alone, got SDE"):
        sds.solve(sde, torch.ones(3, 2), 0.0, 1.0, solver=sds.Adaptive(ForCIR()), seed=0)


def test_seeds_of_rows_are_refused_by_what_to_give_in_their_place():
    with pytest.raises(ValueError, match="give one seed, seed=0, or a BrownianPath, not BrownianRows"):
        sds.solve(double_well(), torch.ones(2, 1), 0.0, 1.0, solver=sds.Adaptive(sds.ShARK(), 1e-2), seed=[1, 2])
