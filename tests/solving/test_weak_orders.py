"""Weak orders without Monte Carlo: one step's expectations over all outcomes of its random numbers, summed exactly."""

from __future__ import annotations

import functools
import itertools
import math

import numpy as np
import pytest
import torch

import sdesolve as sds
from sdesolve.solvers.base import Span

T0, STEPS = 0.3, [2.0**-k for k in range(4, 9)]
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


def local_order(solver, noise, calculus, sign=1, steps=STEPS):
    """Fitted to the largest errors of expectations after one step, over its length."""
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
        errors.append(float((means - (a + h * b + h * h * c / 2)).abs().max()))
    return np.polyfit(np.log2(steps), np.log2(errors), 1)[0]


ITO, STRATONOVICH = [sds.RI6(), sds.DRI1(), sds.W2Ito1()], [sds.NON()]
CASES = [(s, n, "ito") for s in ITO for n in NOISES] + [(s, n, "stratonovich") for s in STRATONOVICH for n in NOISES]
CASES += [(s, n, "ito") for s in (sds.SRIW1(), sds.SRIW2(), sds.SOSRI()) for n in ("scalar",)]
CASES += [(sds.SlowRK(), "scalar", "stratonovich")]
CASES += [
    (s, "additive", "ito") for s in (sds.ShARK(), sds.SPaRK(), sds.GeneralShARK(), sds.SRA1(), sds.SRA3(), sds.SOSRA())
]


@pytest.mark.parametrize(("solver", "noise", "calculus"), CASES, ids=lambda case: str(case).removesuffix("()"))
@pytest.mark.parametrize("sign", [1, -1])
def test_weak_order_two(solver, noise, calculus, sign):
    """The error of one step is of order 3: ``phi + h L phi + h^2 L^2 phi / 2`` is what it gives, but for ``h^3``."""
    assert abs(local_order(solver, noise, calculus, sign) - 3.0) < 0.1


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
    assert abs(local_order(solver, noise, calculus, steps=[2.0**-k for k in range(12, 16)]) - 2.0) < 0.1
