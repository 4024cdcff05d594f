"""SDE objects against their laws, and the solvers that are made for them."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

import sdesolve as sds
from sdesolve.brownian import AbstractNoise

# P1, P2 and so on are problems of Kloeden and Platen 1992 (section 4.4) and others, with moments by closed forms,
# matrix exponentials, or grids for Kolmogorov's equation.
F64 = torch.float64
CIR = sds.CIR(rate=2.0, level=0.04, volatility=0.3)  # P16, from 0.09
HESTON = sds.Heston(2.0, 0.04, 0.3, correlation=-0.7, rate=0.02)  # P17


def full(value, paths=1):
    return torch.full((paths, 1), value, dtype=F64)


def within(values, truth, allowed=0.0):
    """Four standard errors, and what the order of the scheme allows."""
    return abs(float(values.mean()) - truth) < 4 * float(values.std()) / math.sqrt(len(values)) + allowed


def test_laws_in_numbers():
    gbm, stratonovich = (sds.GeometricBrownianMotion(1.01, 0.87, c) for c in ("ito", "stratonovich"))
    for sde, x0, mean, second in (
        (gbm, 0.5, 1.372800508, 4.017282339),  # P1
        (stratonovich, 0.5, 2.004315928, 8.563471345),  # P2
        (CIR, 0.09, 0.04676676416, 0.003333940355),  # P16
        (sds.OrnsteinUhlenbeck(3.0, 0.0, 0.4), -1.0, -0.049787068, 0.026600567 + 0.049787068**2),  # P6, second entry
    ):
        assert float(sde.mean(full(x0), 1.0)) == pytest.approx(mean, rel=1e-7)
        assert float(sde.variance(full(x0), 1.0) + sde.mean(full(x0), 1.0) ** 2) == pytest.approx(second, rel=1e-7)
    jacobi, x0, h = sds.Jacobi(1.0, 0.4, 0.8), full(0.7), 1e-4  # P24
    assert float(jacobi.mean(x0, 1.0)) == pytest.approx(0.5103638324, rel=1e-9)
    before, after = (jacobi.variance(x0, 1.0 + s) + jacobi.mean(x0, 1.0 + s) ** 2 for s in (-h, h))
    m1 = jacobi.mean(x0, 1.0)
    m2 = jacobi.variance(x0, 1.0) + m1**2
    slope = 0.8 * m1 - 2.0 * m2 + 0.64 * (m1 - m2)  # d E X^2 / dt, by Ito's formula
    torch.testing.assert_close((after - before) / (2 * h), slope, rtol=0.0, atol=1e-8)
    assert float(jacobi.variance(x0, 0.0)) == pytest.approx(0.0, abs=1e-15)
    x = torch.linspace(-6.0, 6.0, 2001, dtype=F64)
    ou, well = sds.OrnsteinUhlenbeck(0.7, 0.5, 0.4), sds.DoubleWell(0.7)
    for p in (ou.density(x, torch.tensor(1.0, dtype=F64), 0.8), well.stationary_density(x)):
        assert float(torch.trapezoid(p, x)) == pytest.approx(1.0, abs=1e-9)
    assert sds.Heston(2.0, 0.04, 0.3, -0.7, 0.02).call(1.0, 1.0, 0.04, 1.0) == pytest.approx(0.08686015399, abs=1e-10)
    assert sds.Heston(0.5, 0.04, 1.0, -0.9).call(100.0, 100.0, 0.04, 10.0) == pytest.approx(13.08467014, abs=2e-8)


@pytest.mark.parametrize(
    ("calculus", "solver", "order"), [("ito", sds.SRIW1(), 1.5), ("stratonovich", sds.Heun(), 1.0)]
)
def test_geometric_brownian_motion_along_its_path(calculus, solver, order):
    sde, x0 = sds.GeometricBrownianMotion(1.01, 0.87, calculus), full(0.5, 1000)
    W = sds.BrownianPath(3).increments(sds.grids.uniform(0.0, 1.0, 128), (1000, 1), dtype=F64).sum(0)
    steps, errors = (16, 32, 64, 128), []
    for n in steps:
        path = sds.BrownianPath(3, substeps=128 // n)
        x = sds.solve(sde, x0, 0.0, 1.0, n, solver=solver, noise=path, backend="eager").x1
        errors.append(float((x - sde.exact(x0, W, 1.0)).abs().mean()))
    assert abs(-np.polyfit(np.log(steps), np.log(errors), 1)[0] - order) < 0.15


@pytest.mark.parametrize("sde", [CIR, HESTON, sds.Jacobi(1.0, 0.4, 0.8)], ids=lambda sde: type(sde).__name__)
def test_where_a_root_ends_its_correction_is_finite(sde):
    """In states out of the domain, and on its boundary, where conversion differentiates the root."""
    x = torch.tensor([[-0.1, -0.1], [0.0, 0.0], [0.04, 0.04], [1.5, 1.5]], dtype=F64)
    t = torch.tensor(0.0, dtype=F64)
    moved = (sds.to_stratonovich(sde).drift(x, t) - sde.drift(x, t))[:, -1]
    v = x[:, -1]
    slope = -0.16 * (1 - 2 * v) if isinstance(sde, sds.Jacobi) else torch.full_like(v, -0.0225)  # -(g g') / 2
    inside = (v > 0) & (v < 1) if isinstance(sde, sds.Jacobi) else v > 0
    torch.testing.assert_close(moved, torch.where(inside, slope, 0.0), rtol=1e-9, atol=1e-12)


class Quantiles(AbstractNoise):
    """One step whose numbers are the normal law's quantiles at ``(i + 1/2) / batch``: its moments without sampling."""

    def increments(self, times, shape, *, step=0, of="W", dtype=F64, device=None):
        u = (torch.arange(shape[0], dtype=dtype) + 0.5) / shape[0]
        return (torch.special.ndtri(u) * (times[1] - times[0]).sqrt()).reshape(1, -1, 1)


@pytest.mark.parametrize(("x0", "h"), [(0.09, 0.1), (0.09, 2.0), (0.001, 0.5), (0.0, 0.05), (4.0, 100.0)])
def test_moments_of_a_step_of_qe_are_exact(x0, h):
    """On both sides of its switch; the tail that 2^17 quantiles leave out weighs less than 1e-3 of the variance."""
    x = sds.solve(CIR, full(x0, 1 << 17), 0.0, h, 1, solver=sds.QE(), noise=Quantiles()).x1
    assert float(x.min()) >= 0.0
    assert float(x.mean()) == pytest.approx(float(CIR.mean(full(x0), h)), rel=1e-4)
    assert float(x.var()) == pytest.approx(float(CIR.variance(full(x0), h)), rel=2e-3)


@pytest.mark.uncompiled
def test_square_root_processes_reach_their_laws():
    """P16 by both schemes, fused; weak order 1 allows a few percent of ``h`` = 1/32."""
    for solver in (sds.QE(), sds.ImplicitSquareRoot()):
        sol = sds.solve(CIR, full(0.09, 40_000), 0.0, 1.0, 32, solver=solver, seed=1)
        assert sol.stats.execution == "fused"
        assert float(sol.x1.min()) >= 0.0
        for values, truth in (
            (sol.x1, 0.04676676416), (sol.x1**2, 0.003333940355), (sol.x1.sqrt(), 0.202455568),
            ((sol.x1 < 0.02).double(), 0.2239048669),
        ):  # fmt: skip
            assert within(values, truth, 0.04 * truth)


def test_strong_order_of_the_implicit_square_root():
    """``E|X_h - X|`` of 1000 paths: the order 1 of `ImplicitSquareRoot`, seen as 0.9 to 1 at these steps."""
    x0, steps, errors = full(0.09, 1000), (32, 64, 128, 256), []
    truth = sds.solve(CIR, x0, 0.0, 1.0, 2048, solver=sds.ImplicitSquareRoot(), seed=5).x1
    for n in steps:
        path = sds.BrownianPath(5, substeps=2048 // n)
        x = sds.solve(CIR, x0, 0.0, 1.0, n, solver=sds.ImplicitSquareRoot(), noise=path, backend="eager").x1
        errors.append(float((x - truth).abs().mean()))
    assert 0.85 < -np.polyfit(np.log(steps), np.log(errors), 1)[0] < 1.1


def test_the_price_of_a_call_under_heston():
    """P17 by QE with 32 steps within four standard errors and 1e-3 of the price, and the discounted price itself."""
    x0 = torch.tensor([[0.0, 0.04]], dtype=F64).expand(100_000, 2).contiguous()
    sol = sds.solve(HESTON, x0, 0.0, 1.0, 32, solver=sds.QE(), seed=7)
    assert sol.stats.execution == "fused"
    assert float(sol.x1[:, 1].min()) >= 0.0
    price = math.exp(-0.02) * sol.x1[:, 0].exp()
    assert within(price, 1.0, 2e-4)
    assert within(math.exp(-0.02) * (sol.x1[:, 0].exp() - 1.0).clamp(min=0.0), 0.08686015399, 1e-4)
    eager = sds.solve(HESTON, x0[:500], 0.0, 1.0, 32, solver=sds.QE(), seed=7, backend="eager").x1
    torch.testing.assert_close(sol.x1[:500], eager, rtol=1e-9, atol=1e-12)


def test_general_solvers_reach_the_laws_of_the_other_models():
    """P24 by Euler-Maruyama, P19b by ShARK, and the mean that Lotka and Volterra's invariant grows to."""
    jacobi = sds.Jacobi(1.0, 0.4, 0.8)
    x = sds.solve(jacobi, full(0.7, 20_000), 0.0, 1.0, 64, solver=sds.EulerMaruyama(), seed=2, backend="eager").x1
    assert within(x, 0.5103638324, 1 / 64)
    assert float(x.var()) == pytest.approx(float(jacobi.variance(full(0.7), 1.0)), rel=0.08)
    x = sds.solve(sds.DoubleWell(), full(0.5, 20_000), 0.0, 1.0, 32, solver=sds.ShARK(), seed=2, backend="eager").x1
    assert within(x, 0.586954, 1e-3)
    assert within(x**2, 0.717432, 2e-3)
    for volatility in (0.0, 0.2):
        sde = sds.LotkaVolterra(1.0, 2.0, 1.5, 0.8, volatility)
        x0 = torch.tensor([[1.0, 0.4]], dtype=F64).expand(4000, 2).contiguous()
        x = sds.solve(sde, x0, 0.0, 4.0, 256, solver=sds.SRIW2(), seed=3, backend="eager").x1
        gained = sde.invariant(x) - sde.invariant(x0)
        assert within(gained, 0.5 * volatility**2 * 1.8 * 4.0, 1e-5 + 0.02 * volatility**2)


def test_what_is_refused():
    for solver in (sds.QE(), sds.ImplicitSquareRoot()):
        with pytest.raises(ValueError, match="goes forwards in time, and this grid goes from 1 to 0"):
            sds.solve(CIR, full(0.1), 1.0, 0.0, 4, solver=solver, seed=0)
        with pytest.raises(ValueError, match=r"integrates CIR( or Heston)? alone, got Jacobi"):
            sds.solve(sds.Jacobi(1.0, 0.4, 0.8), full(0.1), 0.0, 1.0, 4, solver=solver, seed=0)
    with pytest.raises(ValueError, match=r"4 rate level > volatility\^2, got 0.16 and 1; take QE"):
        sds.solve(sds.CIR(1.0, 0.04, 1.0), full(0.1), 0.0, 1.0, 4, solver=sds.ImplicitSquareRoot(), seed=0)
    assert bool((sds.solve(sds.CIR(1.0, 0.04, 1.0), full(0.1), 0.0, 1.0, 4, solver=sds.QE(), seed=0).x1 >= 0).all())
    with pytest.raises(ValueError, match=r"\(batch, 2\), log-price and variance, got \(1, 1\)"):
        sds.solve(HESTON, full(0.1), 0.0, 1.0, 4, solver=sds.QE(), seed=0)
    for make in (
        lambda: sds.CIR(-1.0, 0.04, 0.3), lambda: sds.CIR(1.0, 0.0, 0.3), lambda: sds.Jacobi(1.0, 1.0, 0.3),
        lambda: sds.Heston(1.0, 0.04, 0.3, 1.5), lambda: sds.DoubleWell(math.nan), lambda: sds.LotkaVolterra(gain=-1.0),
        lambda: sds.GeometricBrownianMotion(math.inf, 0.1), lambda: sds.GeometricBrownianMotion(0.1, 0.1, "levy"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match="must be"):
            make()
    with pytest.raises(TypeError, match="rate must be a number"):
        sds.CIR("fast", 0.04, 0.3)
