"""Strong orders without Monte Carlo: the error of one step against the Ito-Taylor expansion, at nodes for its normals.

A scheme has strong order ``p`` if the error of one step has a root mean square of order ``p + 1/2`` and a mean of order
``p + 1`` (Milstein and Tretyakov 2004, theorem 1.1.1). Both are sums over Gauss-Hermite nodes in ``W`` and ``H``.
"""

from __future__ import annotations

import dataclasses
import functools
import math

import numpy as np
import pytest
import torch

import sdesolve as sds
from sdesolve.solvers.base import Span

T0, STEPS = 0.3, [2.0**-k for k in range(12, 16)]
X = torch.tensor([0.7, -0.4], dtype=torch.float64)


def drift(x, t):
    a, b = x[..., 0], x[..., 1]
    return torch.stack([torch.sin(b) * (1 + t) - a, a * a - b + torch.cos(2 * t)], -1)


def vector(x, t):
    return torch.stack([0.6 + 0.3 * torch.sin(x[..., 1] + t), 0.4 * torch.cos(x[..., 0] - t)], -1)


def of_time(x, t):
    return torch.stack([0.5 + t, 0.4 * torch.cos(t)], -1).expand(x.shape)


def along(phi, x, t, v, s):
    return torch.func.jvp(phi, (x, t), (v, s))[1]


def operators(g, calculus, sign):
    """``L0`` and ``L1`` of the Ito equation, over time that runs by ``sign``, and its drift."""
    one = torch.tensor(1.0, dtype=torch.float64)

    def L1(phi):
        return lambda x, t: along(phi, x, t, g(x, t), 0 * one)

    def f(x, t):
        moved = sign * drift(x, t)
        return moved if calculus == "ito" else moved + 0.5 * L1(g)(x, t)

    def L0(phi):
        def applied(x, t):
            v = g(x, t)
            curved = along(lambda y, s: along(phi, y, s, v, 0 * one), x, t, v, 0 * one)
            return along(phi, x, t, f(x, t), sign * one) + 0.5 * curved

        return applied

    return f, L0, L1


@functools.cache
def nodes():
    z, w = np.polynomial.hermite_e.hermegauss(9)
    first, second = np.meshgrid(z, z, indexing="ij")
    weights = np.outer(w, w).reshape(-1)
    return (
        torch.tensor(first.reshape(-1, 1)),
        torch.tensor(second.reshape(-1, 1)),
        torch.tensor(weights / weights.sum()),
    )


@functools.cache
def coefficients(g, calculus, sign):
    """Of the expansion of strong order 3/2 (Kloeden and Platen 1992, equation 10.4.1)."""
    (f, L0, L1), t = operators(g, calculus, sign), torch.tensor(T0, dtype=torch.float64)
    return [h(X, t) for h in (f, g, L1(g), L1(f), L0(g), L0(f), L1(L1(g)))]


def errors_of(made, noise, g, calculus, sign=1):
    """What ``made(sde, x, span, increment)`` gives at all nodes, at each of `STEPS`, and the solution."""
    columns = (lambda x, t: g(x, t)[..., None]) if noise == "additive" else g
    sde = sds.SDE(drift, columns, noise, calculus)
    z, y, _ = nodes()
    for h in STEPS:
        W, H = z * math.sqrt(h), y * math.sqrt(h / 12)
        I10 = h * (W / 2 + H)
        a, b, c, d, e, k, m = coefficients(g, calculus, sign)
        truth = X + a * h + b * W + c * (W * W - h) / 2 + d * I10 + e * (h * W - I10) + k * h * h / 2
        truth = truth + m * (W**3 - 3 * h * W) / 6
        t0, dt = torch.tensor(T0, dtype=torch.float64), torch.tensor(sign * h, dtype=torch.float64)
        yield made(sde, X.expand(len(z), 2), Span(t0, t0 + dt, dt), sds.Increment(W, H=H)), truth


def orders(values):
    """Fitted to the root mean square, and to the mean, over all nodes."""
    chance = nodes()[2]
    sizes = [(float((chance @ v.square()).sum().sqrt()), float((chance @ v).norm())) for v in values]
    return [np.polyfit(np.log2(STEPS), np.log2(size), 1)[0] for size in zip(*sizes, strict=True)]


def slopes(solver, noise, g, calculus, sign):
    """Orders of one step's error; one motion drives all components."""

    def made(sde, x, span, increment):
        numbers = solver.numbers(sde, torch.stack([span.t0, span.t1]))
        numbers = () if numbers is None else tuple(numbers[0])
        return solver.step(sde, x, dataclasses.replace(span, numbers=numbers), increment)

    return orders([x - truth for x, truth in errors_of(made, noise, g, calculus, sign)])


SCALAR = {
    "ito": [
        sds.EulerMaruyama(), sds.Milstein(), sds.SRI2(), sds.SRIW1(), sds.SRIW2(), sds.SOSRI(), sds.ImplicitEuler(),
        sds.ImplicitEuler(0.5, 3), sds.SplitStepEuler(), sds.SKSROCK(5), sds.Tamed(sds.EulerMaruyama()),
    ],
    "stratonovich": [
        sds.Milstein(), sds.SRI2(), sds.Heun(), sds.Midpoint(), sds.EulerHeun(), sds.SPaRK(), sds.GeneralShARK(),
        sds.SlowRK(), sds.LogODE(),
    ],
}  # fmt: skip


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize(("calculus", "solver"), [(c, s) for c, of in SCALAR.items() for s in of], ids=str)
def test_one_step_with_scalar_noise(calculus, solver, sign):
    order = solver.strong_orders[1]
    spread, mean = slopes(solver, "scalar", vector, calculus, sign)
    assert abs(spread - order - 0.5) < 0.05
    assert mean > order + 0.95


ADDITIVE = [
    sds.EulerMaruyama(), sds.SEA(), sds.ShARK(), sds.SRA1(), sds.SRA3(), sds.SOSRA(), sds.SKenCarp(), sds.SRIW1(),
    sds.SPaRK(), sds.GeneralShARK(), sds.SlowRK(), sds.Heun(), sds.Midpoint(), sds.EulerHeun(), sds.SKSROCK(5),
    sds.ImplicitEuler(0.3), sds.SplitStepEuler(),
]  # fmt: skip


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("solver", ADDITIVE, ids=str)
def test_one_step_with_additive_noise(solver, sign):
    """That of `SKenCarp` too: longer steps hide it, for its stages lie up to 14 times as far away as the noise goes."""
    order = solver.strong_orders[0]
    calculus = "ito" if (sds.Calculus.ITO, sds.Noise.ADDITIVE) in solver.supported else "stratonovich"
    spread, mean = slopes(solver, "additive", of_time, calculus, sign)
    assert abs(spread - order - 0.5) < 0.05
    assert mean > order + 0.95


ESTIMATING = [
    sds.ShARK(), sds.SRA1(), sds.SRA3(), sds.SOSRA(), sds.SRIW1(), sds.SRIW2(), sds.SOSRI(), sds.SPaRK(),
    sds.GeneralShARK(), sds.SlowRK(), sds.Heun(),
]  # fmt: skip


@pytest.mark.parametrize(
    ("solver", "calculus", "noise"),
    [
        (s, "ito" if ("ito", noise) in s.supported else "stratonovich", noise)
        for s in ESTIMATING for noise in ("scalar", "additive") if noise in {n for _, n in s.supported}
    ],
    ids=str,
)  # fmt: skip
def test_an_estimate_is_the_local_error_of_a_lower_order(solver, calculus, noise):
    """That of order 1; of 1/2 for `Heun` and `GeneralShARK`, whose stages hold nothing between."""
    g = vector if noise == "scalar" else of_time

    def estimate(sde, x, span, increment):
        return solver.attempt(sde, x, span, increment)[1]()

    spread, _ = orders([v for v, _ in errors_of(estimate, noise, g, calculus)])
    one_half = noise == "scalar" and isinstance(solver, sds.Heun | sds.GeneralShARK)
    assert abs(spread - (1.0 if one_half else 1.5)) < 0.05
