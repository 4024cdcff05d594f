"""Weak orders without Monte Carlo: one step's expectations over all outcomes of its random numbers, summed exactly."""

from __future__ import annotations

import functools
import itertools
import math

import numpy as np
import pytest
import torch
from sdesolve_kernels.dispatch import use_backend

import sdesolve as sds
from sdesolve.solvers.base import Span

T0, STEPS, SHORT = 0.3, [2.0**-k for k in range(4, 9)], [2.0**-k for k in range(7, 11)]
X = torch.tensor([0.7, -0.4], dtype=torch.float64)


def drift(x, t):
    a, b = x[..., 0], x[..., 1]
    return torch.stack([torch.sin(b) * (1 + t) - a, a * a - b + torch.cos(2 * t)], -1)


def matrix(x, t):
    """Two channels that do not commute, on states ``(..., 2)``."""
    a, b = x[..., 0], x[..., 1]
    rows = [0.6 + 0.3 * torch.sin(b + t), 0.5 * a * torch.cos(t)], [0.4 * b + 0.2 * t, 0.5 + 0.3 * torch.sin(a)]
    return torch.stack([torch.stack(row, -1) for row in rows], -2)


def vector(x, t):
    return torch.stack([0.6 + 0.3 * torch.sin(x[..., 1] + t), 0.4 * torch.cos(x[..., 0] - t)], -1)


def own(x, t):
    return 0.5 + 0.4 * torch.sin(x + 2 * t)


def of_time(x, t):
    return torch.stack([1.0 + t, torch.cos(t)]).expand(x.shape)


# By noise type: the diffusion, and the columns that it stands for.
NOISES = {
    "general": (matrix, matrix),
    "scalar": (vector, lambda x, t: vector(x, t)[..., None]),
    "diagonal": (own, lambda x, t: torch.diag_embed(own(x, t))),
    "additive": (of_time, lambda x, t: torch.diag_embed(of_time(x, t))),
}
MONOMIALS = [(1, 0), (0, 1), (2, 0), (1, 1), (0, 2), (3, 0), (2, 1), (1, 2), (0, 3)]


def monomials(x, t):
    return torch.stack([x[0] ** p * x[1] ** q + 0.0 * t for p, q in MONOMIALS])


def generator(phi, columns, calculus, sign):
    """``L phi = d/dt phi + f . grad phi + sum_k (g_k . grad)^2 phi / 2``, over time that runs by ``sign``."""

    def applied(x, t):
        g, f = columns(x, t), sign * drift(x, t)
        if calculus == "stratonovich":
            f = f + 0.5 * torch.einsum("ikj,jk->i", torch.func.jacrev(columns)(x, t), g)
        gradient, curvature = torch.func.jacrev(phi)(x, t), torch.func.jacrev(torch.func.jacrev(phi))(x, t)
        return (
            sign * torch.func.jacrev(phi, 1)(x, t) + gradient @ f + 0.5 * torch.einsum("ik,jk,pij->p", g, g, curvature)
        )

    return applied


@functools.cache
def expansion(noise, calculus, sign):
    """The monomials ``phi``, ``L phi`` and ``L^2 phi`` at the start."""
    once = generator(monomials, NOISES[noise][1], calculus, sign)
    t = torch.tensor(T0, dtype=torch.float64)
    return [h(X, t) for h in (monomials, once, generator(once, NOISES[noise][1], calculus, sign))]


def outcomes(channels, needs):
    """Unit numbers of the sources, every combination, with its chance: three-point, two-point, or Gauss-Hermite."""
    if "H" in needs:  # normals, exact for polynomials of degree 13
        z, w = np.polynomial.hermite_e.hermegauss(7)
        rows = [list(zip(z, w / w.sum(), strict=True))] * (2 * channels)
    else:
        three = [(0.0, 2 / 3), (math.sqrt(3), 1 / 6), (-math.sqrt(3), 1 / 6)]
        rows = [three] * channels + [[(1.0, 0.5), (-1.0, 0.5)]] * (2 if "S" in needs else 0)
    every = list(itertools.product(*rows))
    numbers = torch.tensor([[z for z, _ in row] for row in every], dtype=torch.float64)
    return numbers, torch.tensor([math.prod(p for _, p in row) for row in every], dtype=torch.float64)


def local_errors(solver, noise, calculus, sign=1, steps=STEPS):
    """Of expectations after one step of each length: a row for a step, a column for a monomial."""
    sde = sds.SDE(drift, NOISES[noise][0], noise, calculus)
    channels = 1 if noise == "scalar" else 2
    z, chance = outcomes(channels, solver.needs)
    (a, b, c), errors = expansion(noise, calculus, sign), []
    for h in steps:
        W, rest = z[:, :channels] * math.sqrt(h), z[:, channels:]
        parts = {"H": rest * math.sqrt(h / 12)} if "H" in solver.needs else {"S": rest}
        t0, dt = torch.tensor(T0, dtype=torch.float64), torch.tensor(sign * h, dtype=torch.float64)
        x = solver.step(sde, X.expand(len(z), 2), Span(t0, t0 + dt, dt), sds.Increment(W, **parts))
        means = chance @ torch.stack([x[:, 0] ** p * x[:, 1] ** q for p, q in MONOMIALS], 1)
        errors.append((means - (a + h * b + h * h * c / 2)).numpy())
    return np.array(errors)


def fitted(steps, errors):
    return np.polyfit(np.log2(steps), np.log2(np.abs(errors).max(1)), 1)[0]


def half_power(steps, errors):
    """The largest coefficient of ``h^(5/2)`` over that of ``h^3``: larger terms hide it from a fitted slope."""
    h = np.array(steps)[:, None]
    powers = np.concatenate([h**-0.5, h**0, h**0.5], 1)
    coefficients = np.abs(np.linalg.lstsq(powers, errors / h**3, rcond=None)[0]).max(1)
    return coefficients[0] / coefficients[1]


ITO, STRATONOVICH = [sds.RI6(), sds.DRI1(), sds.W2Ito1()], [sds.NON()]
CASES = [(s, n, "ito") for s in ITO for n in NOISES] + [(s, n, "stratonovich") for s in STRATONOVICH for n in NOISES]
CASES += [(sds.SlowRK(), n, "stratonovich") for n in ("scalar", "diagonal")]
CASES += [
    (s, "additive", "ito") for s in (sds.ShARK(), sds.SPaRK(), sds.GeneralShARK(), sds.SRA1(), sds.SRA3(), sds.SOSRA())
]
CASES += [(s, "additive", "ito") for s in (sds.SRIW1(), sds.SRIW2(), sds.SOSRI())]


@pytest.mark.parametrize(("solver", "noise", "calculus"), CASES, ids=lambda case: str(case).removesuffix("()"))
@pytest.mark.parametrize("sign", [1, -1])
def test_weak_order_two(solver, noise, calculus, sign):
    """The error of one step is of order 3: ``phi + h L phi + h^2 L^2 phi / 2`` is what it gives, but for ``h^3``."""
    assert abs(fitted(STEPS, local_errors(solver, noise, calculus, sign)) - 3.0) < 0.1
    assert half_power(SHORT, local_errors(solver, noise, calculus, sign, SHORT)) < 2e-3


@pytest.mark.parametrize("noise", ["scalar", "diagonal"])
@pytest.mark.parametrize("solver", [sds.SRIW1(), sds.SRIW2(), sds.SOSRI()], ids=repr)
def test_weak_order_three_halves(solver, noise):
    """Stages at distances ``sqrt(h)`` leave a term ``h^(5/2)``, small beside that of ``h^3``: no weak order 2."""
    assert solver.weak_order == 1.5
    errors = local_errors(solver, noise, "ito", steps=SHORT)
    assert fitted(SHORT, errors) > 2.8
    assert 4e-3 < half_power(SHORT, errors) < 0.05


@pytest.mark.parametrize(
    ("solver", "noise", "calculus"),
    [
        (sds.EulerMaruyama(), "general", "ito"),
        (sds.Heun(), "scalar", "stratonovich"),
        (sds.Midpoint(), "general", "stratonovich"),
        (sds.EulerHeun(), "scalar", "stratonovich"),
        (sds.SPaRK(), "scalar", "stratonovich"),
        (sds.GeneralShARK(), "scalar", "stratonovich"),
        (sds.Milstein(), "scalar", "ito"),
        (sds.SRI2(), "scalar", "ito"),
        (sds.LogODE(), "scalar", "stratonovich"),
    ],
)
def test_weak_order_one(solver, noise, calculus):
    steps = [2.0**-k for k in range(12, 16)]
    assert abs(fitted(steps, local_errors(solver, noise, calculus, steps=steps)) - 2.0) < 0.1


@pytest.mark.parametrize("solver", [sds.W2Ito1(), sds.NON()], ids=repr)
def test_sources_of_different_width_are_drawn_for_as_many_steps(solver):
    """One channel takes one increment and two signs a step, in more steps than are drawn at once."""
    calculus = "ito" if isinstance(solver, sds.W2Ito1) else "stratonovich"
    sde = sds.GeometricBrownianMotion(0.5, 0.4, calculus)
    x0, options = torch.ones(3, 1, dtype=torch.float64), {"solver": solver, "seed": 0}
    eager = sds.solve(sde, x0, 0.0, 1.0, 70, backend="eager", **options).x1
    with use_backend("reference"):
        fused = sds.solve(sde, x0, 0.0, 1.0, 70, backend="fused", **options).x1
    torch.testing.assert_close(eager, fused, rtol=1e-12, atol=0.0)
