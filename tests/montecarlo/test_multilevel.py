"""Multilevel Monte Carlo against expectations in closed form; its rates, its work, and what it cannot do."""

from __future__ import annotations

import math

import pytest
import torch

import sdesolve as sds

HESTON = sds.Heston(reversion=2.0, level=0.04, volatility=0.3, correlation=-0.7, rate=0.02)
GEOMETRIC = sds.GeometricBrownianMotion(0.03, 0.2)
ONE = torch.full((1, 1), 100.0)


def heston_call(x):
    return math.exp(-0.02) * (x[:, 0].exp() - 1.0).clamp(min=0.0)


def call(x):
    return math.exp(-0.03) * (x[:, 0] - 110.0).clamp(min=0.0)


def products_channels(x, t):
    zero = torch.zeros_like(x[:, 0])
    return torch.stack([torch.stack([zero + 0.6, zero], 1), torch.stack([zero, 0.5 * x[:, 0]], 1)], 1)


PRODUCTS = sds.SDE(
    lambda x, t: torch.stack([-0.5 * x[:, 0], 0.5 * x[:, 0] ** 2 - 0.8 * x[:, 1]], 1), products_channels, "general"
)
START = torch.tensor([[1.0, 0.0]], dtype=torch.float64)
MOMENTS = torch.tensor([0.2542202198, 0.1815061934, 0.2155689084], dtype=torch.float64)


def moments(x):
    return torch.stack([x[:, 1], x[:, 1] ** 2, x[:, 0] * x[:, 1]], 1)


def test_work_is_proportional_to_rmse_to_the_minus_two():
    """Heston's call, 0.08686015399 by its transform; four times ``rmse`` is four standard deviations and the bias."""
    work = []
    for rmse in (2e-3, 1e-3, 5e-4):
        price = sds.multilevel(
            HESTON, torch.tensor([[0.0, 0.04]]), 0.0, 1.0, heston_call, rmse=rmse, seed=1, backend="eager", steps=4
        )
        assert price.converged
        assert float(price.error) <= rmse
        assert abs(float(price.estimate) - 0.08686015399) < 4 * rmse
        assert all(float(level.consistency) < 1 for level in price.levels)
        work.append(price.work * rmse**2)
    assert float(price.variance_rate) > 1.4  # 3/2 for a kink; 0 for levels on paths of their own
    # Crude Monte Carlo's grows with the number of steps, twofold for half of rmse.
    assert work[2] < 1.3 * work[1] < 1.7 * work[0]


@pytest.mark.parametrize("sde", [PRODUCTS, sds.to_stratonovich(PRODUCTS)], ids=["ito", "stratonovich"])
def test_antithetic_twins_double_the_rate_of_the_variance(sde):
    """Noise that does not commute, by schemes without Levy areas. Giles and Szpruch 2014, theorem 4.10."""
    options = {"rmse": [4e-3, 3e-3], "steps": 4, "seed": 2, "backend": "eager"}
    twins, plain = (
        sds.multilevel(sde, START, 0.0, 1.0, lambda x: moments(x)[:, :2], antithetic=antithetic, **options)
        for antithetic in (None, False)
    )
    assert float(twins.variance_rate.min()) > 1.8
    assert float(plain.variance_rate.max()) < 1.6
    for made in (twins, plain):
        assert made.converged
        assert bool(((made.estimate - MOMENTS[:2]).abs() < 4 * made.rmse).all())


@pytest.mark.parametrize("solver", [sds.EulerMaruyama(), sds.Milstein("foster")], ids=repr)
def test_every_value_is_within_its_error(solver):
    """By increments alone, and by the exact Levy areas of coarse steps."""
    made = sds.multilevel(PRODUCTS, START, 0.0, 1.0, moments, rmse=8e-3, solver=solver, seed=1, backend="eager")
    assert made.converged
    assert made.estimate.shape == (3,)
    assert bool(((made.estimate - MOMENTS).abs() < 4 * 8e-3).all())


def test_starts_have_an_estimate_each_on_the_same_paths():
    """Black and Scholes's calls; a payoff with a kink, whose variances fall as ``h^2`` for Milstein's scheme."""
    starts = torch.tensor([[90.0], [110.0], [110.0]])
    made = sds.multilevel(GEOMETRIC, starts, 0.0, 1.0, call, rmse=0.1, seed=3, backend="eager")
    assert made.estimate.shape == (3,)
    assert made.estimate[1] == made.estimate[2]
    for x0, estimate in zip(starts.flatten().tolist(), made.estimate.tolist(), strict=True):
        d = (math.log(x0 / 110.0) + 0.03) / 0.2
        low, high = (0.5 * math.erfc(-(d + side) / math.sqrt(2.0)) for side in (-0.1, 0.1))
        assert abs(estimate - (x0 * high - 110.0 * math.exp(-0.03) * low)) < 0.4


def test_payoffs_of_what_is_carried_along_paths():
    """The mean of a price over time: ``100 (exp(0.03) - 1) / 0.03``, on levels and by Sobol points."""
    options = {"carry": {"mean": sds.TimeAverage(lambda x, t: x[:, 0])}, "seed": 5, "backend": "eager"}
    payoff, exact = lambda x, c: c["mean"].reshape(-1), 100.0 * math.expm1(0.03) / 0.03
    made = sds.multilevel(GEOMETRIC, ONE, 0.0, 1.0, payoff, rmse=0.1, **options)
    assert abs(float(made.estimate) - exact) < 0.4
    fine = sds.quasi_monte_carlo(GEOMETRIC, ONE, 0.0, 1.0, payoff, steps=32, solver=sds.Milstein(), paths=64, **options)
    assert (
        abs(float(fine.estimate) - exact) < 4 * float(fine.standard_error) + 0.01
    )  # of the trapezoidal rule and steps
    assert float(fine.standard_error) < 0.1


def test_a_root_without_a_derivative():
    """Heston's model with a clamp of one's own, at whose edge Milstein's scheme has no derivative to take."""

    def drift(x, t):
        return torch.stack([0.02 * x[:, 0], 2.0 * (0.04 - x[:, 1])], 1)

    def diffusion(x, t):
        root, zero = x[:, 1].clamp(min=0.0).sqrt(), torch.zeros_like(x[:, 0])
        return torch.stack([torch.stack([x[:, 0] * root, zero], 1), torch.stack([zero, 0.5 * root], 1)], 1)

    made = sds.multilevel(
        sds.SDE(drift, diffusion, "general"), torch.tensor([[1.0, 0.04]]), 0.0, 1.0, lambda x: x[:, 0], rmse=5e-3,
        seed=1, steps=2, backend="eager",
    )  # fmt: skip
    assert isinstance(made.solver, sds.SRI2)
    assert abs(float(made.estimate) - math.exp(0.02)) < 4 * 5e-3


@pytest.mark.parametrize("solver", [sds.SPaRK(), sds.Heun()], ids=repr)
def test_twins_are_for_schemes_that_read_increments_alone(solver):
    """Space-time areas have a part of the Levy area in them, which does not cancel: no twin is taken."""
    sde, options = sds.to_stratonovich(PRODUCTS), {"rmse": 0.02, "seed": 1, "steps": 4, "backend": "eager"}
    made = sds.multilevel(sde, START, 0.0, 1.0, moments, solver=solver, **options)
    assert [level.cost for level in made.levels[:2]] == [4, 8 + 4 + 8 * (tuple(solver.needs) == ("W",))]


def test_levels_run_fused():
    """Fine paths, their twins and coarse ones; the same paths as in torch."""
    sde = sds.SDE(lambda x, t: torch.sin(x) * t - x, lambda x, t: 0.4 * torch.cos(x + 2 * t), "diagonal")
    x0 = torch.full((1, 1), 0.5, dtype=torch.float64)
    options = {"rmse": 5e-3, "antithetic": True, "solver": sds.EulerMaruyama(), "steps": 2, "seed": 4}
    fused, eager = (
        sds.multilevel(sde, x0, 1.0, 0.25, lambda x: x[:, 0].square(), backend=backend, **options)
        for backend in ("fused", "eager")
    )
    torch.testing.assert_close(fused.estimate, eager.estimate, rtol=1e-12, atol=0)
    assert [level.paths for level in fused.levels] == [level.paths for level in eager.levels]


def test_coarse_levels_that_do_not_pay_or_diverge_are_left_out():
    """Stationary variance of ``dX = -100 X dt + 0.5 dW``: explicit steps explode on fewer than 50."""
    stiff = sds.SDE(lambda x, t: -100.0 * x, lambda x, t: 0.5, "additive")
    x0 = torch.ones(1, 1, dtype=torch.float64)
    made = sds.multilevel(stiff, x0, 0.0, 1.0, lambda x: x[:, 0].square(), rmse=1e-4, seed=1, backend="eager")
    assert made.converged
    assert made.levels[0].steps >= 64
    assert abs(float(made.estimate) - 0.25 / 200.0) < 4e-4


def test_work_is_bounded():
    with pytest.warns(
        RuntimeWarning, match="has not reached rmse: it would take .* path-steps, and max_work=3e.05 are"
    ):
        made = sds.multilevel(GEOMETRIC, ONE, 0.0, 1.0, call, rmse=1e-2, seed=1, max_work=3e5, backend="eager")
    assert not made.converged
    assert made.work <= 3e5 + 3 * 2**17
    assert "not converged: it would take" in repr(made)
    assert abs(float(made.estimate) - 5.293398058) < 4 * float(made.error)


def test_levels_that_do_not_decay():
    """A diffusion that turns round ten thousand times a unit of time: no step sees it."""
    sde = sds.SDE(lambda x, t: 0 * x, lambda x, t: torch.cos(1e4 * t) + 0 * x)
    x0, options = torch.ones(1, 1, dtype=torch.float64), {"rmse": 0.08, "seed": 1, "steps": 1, "backend": "eager"}
    with pytest.warns(RuntimeWarning, match="corrections do not fall from 2 to 16 steps"):
        made = sds.multilevel(sde, x0, 0.0, 1.0, lambda x: x[:, 0].square(), **options)
    assert not made.converged
    assert made.levels[-1].steps == 16


def test_corrections_that_few_paths_have():
    """A digital option, whose corrections are 0 for 999 paths of 1000: exp(-0.03) Phi(-0.4265...)."""
    digital = sds.multilevel(
        GEOMETRIC, ONE, 0.0, 1.0, lambda x: math.exp(-0.03) * (x[:, 0] > 110.0), rmse=2e-3, seed=2, backend="eager"
    )
    d = (math.log(100.0 / 110.0) + 0.03 - 0.02) / 0.2
    assert abs(float(digital.estimate) - math.exp(-0.03) * 0.5 * math.erfc(-d / math.sqrt(2.0))) < 4 * 2e-3
    assert all(level.paths > 1024 for level in digital.levels[1:])  # that no path of 1024 has one is no variance of 0


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"payoff": lambda x: x.mean()}, ValueError, r"must have a row for each, \(1024,\) or .*, got \(\)"),
        ({"payoff": lambda x: x - x.mean()}, ValueError, "another value if fewer are given with it"),
        ({"payoff": lambda x: x + torch.rand_like(x)}, ValueError, "nothing random"),
        ({"payoff": lambda x: (x[:, 0] - 100.0).sqrt()}, ValueError, "payoff is nan or inf for row .* at the state"),
        ({"payoff": lambda x: x[:, 0].tolist()}, TypeError, "tensor of real numbers, got list"),
        ({"payoff": 3.0}, TypeError, "payoff must be a function of the states at t1, got float"),
        (
            {"rmse": 1e-7},
            ValueError,
            "by which rounding of float32 states alone changes the payoff; give x0 in float64",
        ),
        ({"rmse": 0.0}, ValueError, "rmse must be positive, got 0.0"),
        ({"rmse": "small"}, TypeError, "rmse must be a number"),
        ({"rmse": torch.ones(3)}, ValueError, "one for each value"),
        ({"x0": torch.ones(0, 1)}, ValueError, "a row for each start"),
        ({"x0": torch.ones(1, 1, requires_grad=True)}, ValueError, r"give x0.detach\(\)"),
        ({"t0": torch.zeros(1)}, ValueError, "one time for all paths"),
        ({"max_work": 0}, ValueError, "max_work must be positive"),
        ({"sde": sds.ODE(lambda x, t: x)}, ValueError, "an ODE has one path"),
        ({"sde": 3}, TypeError, "sde must be an SDE"),
        ({"solver": sds.RK4()}, ValueError, "RK4 integrates ODEs"),
    ],
)
def test_bad_arguments(changed, error, message):
    arguments = {"sde": GEOMETRIC, "x0": ONE, "t0": 0.0, "t1": 1.0, "payoff": call, "rmse": 0.1, "backend": "eager"}
    with pytest.raises(error, match=message):
        sds.multilevel(**{**arguments, **changed})
