"""Strong, weak and ODE orders, fitted; the same path at several resolutions."""

from __future__ import annotations

import contextlib
import functools

import numpy as np
import pytest
import torch
from sdesolve_kernels.dispatch import use_backend

import sdesolve as sds
from sdesolve.brownian import AbstractNoise, named
from sdesolve.solvers.base import Span


def fitted_slope(h, error):
    return np.polyfit(np.log2(h), np.log2(error), 1)[0]


def drift(x, t):
    a, b = x[:, 0], x[:, 1]
    return torch.stack([0.6 * torch.sin(b) * (1 + t) - 0.3 * a, 0.5 * t - 0.4 * b * torch.cos(a)], 1)


def own(x, t):
    return 0.3 + 0.9 * torch.sin(x + t)


def vector(x, t):
    return torch.stack([0.3 + 0.8 * torch.sin(x[:, 1] + t), 0.8 * torch.cos(x[:, 0] - t)], 1)


def commuting(x, t):
    """Two multiples, over time, of one vector field."""
    field = torch.stack([0.8 * torch.cos(x[:, 1]), 0.2 + 0.8 * torch.sin(x[:, 0])], 1)
    return torch.stack([field * (1 + 0.5 * t), field * torch.cos(2 * t) * 0.7], -1)


def general(x, t):
    a, b = x[:, 0], x[:, 1]
    rows = [0.3 + 0.8 * torch.sin(b + t), 0.6 * torch.sin(a)], [0.7 * torch.cos(a - t), 0.3 + 0.5 * torch.sin(2 * b)]
    return torch.stack([torch.stack(row, 1) for row in rows], 1)


def slanted(x, t):
    rows = torch.stack([2 + 2 * t, torch.cos(2 * t)]), torch.stack([0 * t, 2 + 2 * t * t])
    return torch.stack(rows).expand(len(x), 2, 2)


DIFFUSIONS = {
    "additive": ("additive", slanted), "diagonal": ("diagonal", own), "scalar": ("scalar", vector),
    "commuting": ("general", commuting), "general": ("general", general),
}  # fmt: skip
PATHS = 400
FINEST = {"general": 1024}  # of orders up to 1 alone, whose reference is no better


def nonlinear(name, calculus):
    noise, g = DIFFUSIONS[name]
    return sds.SDE(drift, g, noise, calculus)


def end_of(name, calculus, solver, steps, back):
    path = sds.BrownianPath(3, substeps=FINEST.get(name, 512) // steps)
    times, x0 = (1.0, 0.0) if back else (0.0, 1.0), torch.full((PATHS, 2), 0.7, dtype=torch.float64)
    return sds.solve(nonlinear(name, calculus), x0, *times, steps, solver=solver, noise=path, backend="eager").x1


@functools.cache
def reference(name, calculus, back):
    """The finest solution, by a scheme of the highest order; of Ito SDEs that have none, by way of Stratonovich."""
    solver = sds.LogODE() if name == "general" else sds.SRA3() if name == "additive" else sds.SlowRK()
    sde, x0 = sds.to_stratonovich(nonlinear(name, calculus)), torch.full((PATHS, 2), 0.7, dtype=torch.float64)
    times, steps = (1.0, 0.0) if back else (0.0, 1.0), FINEST.get(name, 512)
    return sds.solve(sde, x0, *times, steps, solver=solver, seed=3, backend="eager").x1


ANY = ["additive", "diagonal", "scalar", "commuting", "general"]
ITO = {
    sds.EulerMaruyama(): (1.0, 0.5, 0.5, 0.5, 0.5), sds.Milstein("foster"): (None, 1.0, 1.0, 1.0, 1.0),
    sds.SRI2("mrongowius-roessler", 1): (1.0, 1.0, 1.0, 1.0, 1.0), sds.Milstein(): (None, 1.0, None, 1.0, None),
    sds.SEA(): (1.0,), sds.ShARK(): (1.5,), sds.SRA1(): (1.5,), sds.SRA3(): (1.5,), sds.SOSRA(): (1.5,),
    sds.SRIW1(): (1.5, 1.5, 1.5), sds.SRIW2(): (None, 1.5, 1.5), sds.SOSRI(): (None, 1.5, 1.5),
}  # fmt: skip
STRATONOVICH = {
    sds.Milstein("foster"): (None, 1.0, 1.0, 1.0, 1.0), sds.SRI2("foster"): (None, 1.0, None, 1.0, 1.0),
    sds.Heun(): (1.0, 1.0, 1.0, 1.0, 0.5), sds.Midpoint(): (None, 1.0, 1.0, 1.0, 0.5),
    sds.EulerHeun(): (1.0, 1.0, 1.0, 1.0, None), sds.LogODE(): (None, 1.0, None, None, 1.0),
    sds.SPaRK(): (1.5, 1.0, 1.0, 1.0, 0.5), sds.GeneralShARK(): (1.5, 1.0, 1.0, 1.0),
    sds.SlowRK(): (1.5, 1.5, 1.5, 1.5, 0.5), sds.ReversibleHeun(): (None, 1.0),
}  # fmt: skip
STRONG = [
    (solver, calculus, name, order)
    for calculus, table in (("ito", ITO), ("stratonovich", STRATONOVICH))
    for solver, orders in table.items()
    for name, order in zip(ANY, orders, strict=False)
    if order is not None
]


# One step's errors are tested in both directions for all (test_local_errors.py): here backwards once a calculus, and
# where time is no matter.
BACK = [
    (sds.Milstein("foster"), "ito", "general", 1.0, True),
    (sds.SlowRK(), "stratonovich", "general", 0.5, True),
]
# Scalar noise is diagonal noise of one channel, and commuting noise of the order of general noise is general noise.
SURE = {(solver, calculus, order) for solver, calculus, name, order in STRONG if name in ("diagonal", "general")}
DIRECTED = [
    pytest.param(*case, False, marks=[pytest.mark.thorough] if repeated else [])
    for case in STRONG
    for repeated in [case[2] in ("scalar", "commuting") and (*case[:2], case[3]) in SURE]
]
DIRECTED += [pytest.param(*case, marks=pytest.mark.thorough) for case in BACK]


@pytest.mark.parametrize(("solver", "calculus", "name", "order", "back"), DIRECTED, ids=str)
def test_strong_order(solver, calculus, name, order, back):
    """Root mean square errors at steps 1/8 to 1/64 of the same paths, on nonlinear coefficients that depend on time.

    The errors are coupled, so 400 paths fix their slope to about 0.05; at these steps terms of the next order count for
    as much. Backwards the equation is that of a motion of its own.
    """
    truth, steps = reference(name, calculus, back), [8, 16, 32, 64]
    errors = [float((end_of(name, calculus, solver, n, back) - truth).square().mean().sqrt()) for n in steps]
    claimed = solver.strong_orders[{"additive": 0, "general": 2}.get(name, 1)]
    assert claimed == order
    assert abs(fitted_slope([1 / n for n in steps], errors) - order) < 0.15


class Smooth(AbstractNoise):
    """A path with a derivative, ``w(t) = sin(2 t) / 2``, in every channel; ``H`` is its mean height over its chord."""

    timeless = False
    provides = frozenset({"W", "H"})

    def increments(self, times, shape, *, step=0, of="W", dtype=torch.float32, device=None):
        w, area, dt = 0.5 * torch.sin(2 * times), -0.25 * torch.cos(2 * times), times.diff()
        H = area.diff() / dt - 0.5 * (w[1:] + w[:-1])
        part = w.diff() if of == "W" else H
        channels = 1.0 + torch.arange(shape[-1], dtype=torch.float64)  # one path each, of its own size
        return (part.reshape(-1, *(1,) * len(shape)) * channels).expand(-1, *shape).to(dtype=dtype, device=device)


def smooth_end(name, driven, solver, n):
    noise, g = DIFFUSIONS[name]
    sde = sds.SDE(drift if driven else (lambda x, t: 0 * x), g, noise, "stratonovich")
    x0 = torch.tensor([[0.7, 0.2], [-0.5, 1.0]], dtype=torch.float64)
    return sds.solve(sde, x0, 0.0, 1.0, n, solver=solver, noise=Smooth(), backend="eager").x1


@functools.cache
def smooth_truth(name, driven):
    return smooth_end(name, driven, sds.Midpoint(), 2048)


@pytest.mark.parametrize("name", ["diagonal", "scalar", "general"])
@pytest.mark.parametrize(
    "solver", [sds.Heun(), sds.Midpoint(), sds.EulerHeun(), sds.SPaRK(), sds.GeneralShARK(), sds.SlowRK()], ids=repr
)
def test_on_a_smooth_path_stratonovich_schemes_are_of_second_order(solver, name):
    """Noise hides at which time a diffusion is evaluated: taken at the other end of a step, orders stay as they are.

    A path with a derivative does not. The equation is an ordinary one, and errors fall with the square of the step.
    """
    driven, steps = not isinstance(solver, sds.EulerHeun), [16, 32, 64, 128]
    truth = smooth_truth(name, driven)
    errors = [float((smooth_end(name, driven, solver, n) - truth).abs().max()) for n in steps]
    assert fitted_slope([1 / n for n in steps], errors) > 1.8


SOLVERS = [
    sds.EulerMaruyama(), sds.Milstein(), sds.SRI2(), sds.Heun(), sds.Midpoint(), sds.EulerHeun(), sds.LogODE(),
    sds.SEA(), sds.ShARK(), sds.SPaRK(), sds.GeneralShARK(), sds.SlowRK(), sds.SRA1(), sds.SRA3(), sds.SOSRA(),
    sds.SRIW1(), sds.SRIW2(), sds.SOSRI(), sds.RI6(), sds.DRI1(), sds.W2Ito1(), sds.NON(),
    sds.ReversibleHeun(), sds.RK4(),
]  # fmt: skip


@pytest.mark.parametrize(("t0", "t1"), [(0.0, 1.0), (1.0, 0.0)])
@pytest.mark.parametrize("solver", SOLVERS, ids=repr)
def test_ode_order(solver, t0, t1):
    """A nonlinear, time-dependent equation with a known solution: ``x' = -2 t x^2``, ``x = 1 / (t^2 + c)``."""
    ode = sds.ODE(lambda x, t: -2.0 * t * x * x)
    c = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    steps = [32, 64, 128, 256]
    ends = [sds.solve(ode, 1 / (t0**2 + c), t0, t1, n, solver=solver, backend="eager").x1 for n in steps]
    errors = [(x - 1 / (t1**2 + c)).abs().max().item() for x in ends]
    assert abs(fitted_slope([1 / n for n in steps], errors) - solver.ode_order) < 0.1


@pytest.mark.parametrize("solver", SOLVERS[:-1], ids=repr)
def test_stages_are_evaluated_once(solver):
    """As often as the solver says: drift and diffusion on scalar noise (or additive), columns on general noise."""
    calculus = "ito" if (sds.Calculus.ITO, sds.Noise.SCALAR) in solver.supported else "stratonovich"
    noises = {noise for c, noise in solver.supported if c == calculus}
    for noise, g in (("scalar", vector), ("additive", lambda x, t: 1.0 + t), ("general", general)):
        if noise not in noises or (noise == "additive" and "scalar" in noises):
            continue
        counts = [0, 0]

        def counted(function, which, counts=counts):
            def call(y, t):
                counts[which] += 1
                return function(y, t)

            return call

        sde = sds.SDE(counted(drift, 0), counted(g, 1), noise, calculus)
        t0, t1 = torch.tensor([0.0, 0.1], dtype=torch.float64)
        x = torch.ones(3, 2, dtype=torch.float64)
        one, two = (3, 1), (3, 2)
        sources = {"W": one if noise == "scalar" else two, "S": two}
        parts = {named(part): torch.full(sources.get(named(part), sources["W"]), 0.3).double() for part in solver.needs}
        if noise != "general":
            parts.pop("A", None)
        elif "A" in parts:
            parts["A"] = torch.zeros(3, 2, 2, dtype=torch.float64)
        solver.step(sde, x, Span(t0, t1, t1 - t0), sds.Increment(**parts))
        columns = solver.column_evaluations
        assert counts[0] == solver.evaluations
        assert counts[1] == (1 + 2 * columns if columns and noise == "general" else solver.diffusion_evaluations)


OWN_TIMES = (sds.SEA, sds.ShARK, sds.SRA1, sds.SRA3, sds.SOSRA, sds.EulerHeun, sds.NON, sds.RK4)


@pytest.mark.parametrize("solver", [s for s in SOLVERS if not isinstance(s, OWN_TIMES)], ids=repr)
def test_time_is_one_more_component_of_the_state(solver):
    """A step on ``(X, t)``, whose drift is 1 in ``t``, is the step on ``X``: stages are taken at their own times."""
    calculus = "ito" if (sds.Calculus.ITO, sds.Noise.SCALAR) in solver.supported else "stratonovich"
    t0, dt = torch.tensor(0.3, dtype=torch.float64), torch.tensor(-0.2, dtype=torch.float64)
    x, span = torch.linspace(-1, 1, 10, dtype=torch.float64).reshape(5, 2), Span(t0, t0 + dt, dt)
    W = torch.linspace(-0.7, 0.9, 5, dtype=torch.float64)[:, None]
    noise = sds.Increment(W, H=0.2 * W.flip(0), S=torch.ones(5, 2, dtype=torch.float64))

    def by_row(function, last):
        """Of states with a time each; `torch.vmap` gives a row its own."""
        of_row = torch.vmap(lambda y: function(y[None, :2], y[2])[0])
        return lambda y, t: torch.cat([of_row(y), torch.full_like(y[:, :1], last)], 1)

    alone = solver.step(sds.SDE(drift, vector, "scalar", calculus), x, span, noise)
    both = sds.SDE(by_row(drift, 1.0), by_row(vector, 0.0), "scalar", calculus)
    y = torch.cat([x, t0.expand(5, 1)], 1)
    torch.testing.assert_close(solver.step(both, y, span, noise)[:, :2], alone, rtol=1e-13, atol=1e-14)


WEAK = [(s, "ito", name, None) for s in (sds.RI6(), sds.DRI1(), sds.W2Ito1()) for name in ANY]
WEAK += [(sds.NON(), "stratonovich", name, None) for name in ANY]
COMPILED = (sds.SRIW1(), sds.SPaRK(), sds.LogODE(), sds.W2Ito1())  # a kernel takes seconds


TRACED = [
    pytest.param(*case, marks=[pytest.mark.thorough] if case[2] in ("scalar", "commuting") else [])
    for case in STRONG + WEAK
]


@pytest.mark.parametrize(("solver", "calculus", "name", "order"), TRACED, ids=str)
def test_fused_is_eager(solver, calculus, name, order):
    """Traced and walked in torch, in either direction; a few are compiled."""
    compiled = solver in COMPILED and name in ("diagonal", "general")
    kind = "three-point" if order is None else "normal"
    path = sds.BrownianPath(1, kind=kind, substeps=1 if order is None else 2)
    x0, back = torch.linspace(-1, 1, 10, dtype=torch.float64).reshape(5, 2), len(name) % 2 == 0
    times = (0.8, 0.1) if back else (0.1, 0.8)

    def run(backend):
        sde = nonlinear(name, calculus)
        return sds.solve(sde, x0, *times, 4, solver=solver, noise=path, backend=backend, save_at="grid")

    with contextlib.nullcontext() if compiled else use_backend("reference"):
        fused = run("fused")
    assert fused.stats.execution == "fused"
    torch.testing.assert_close(fused.xs, run("eager").xs, rtol=1e-12, atol=1e-13)


def test_states_of_an_ode_between_grid_points_keep_fourth_order():
    ode = sds.ODE(lambda x, t: -2.0 * t * x * x)
    inside = [0.111, 0.333, 0.777]
    errors = []
    for n in (8, 16, 32, 64):
        sol = sds.solve(ode, torch.ones(1, dtype=torch.float64), 0.0, 1.0, n, solver=sds.RK4(), save_at=inside)
        truth = 1 / (torch.tensor(inside, dtype=torch.float64) ** 2 + 1)
        errors.append((sol.xs[:, 0] - truth).abs().max().item())
    assert fitted_slope([1 / n for n in (8, 16, 32, 64)], errors) > 3.5


def test_steps_of_reversible_heun_are_undone_by_steps_back():
    solver, sde = sds.ReversibleHeun(), nonlinear("general", "stratonovich")
    times = torch.linspace(0.2, 1.0, 21, dtype=torch.float64)
    W = sds.BrownianPath(2).increments(times, (5, 2), dtype=torch.float64)
    start = states = (
        torch.linspace(-1, 1, 10, dtype=torch.float64).reshape(5, 2),
        torch.zeros(5, 2, dtype=torch.float64),
    )
    for k in range(20):
        span = Span(times[k], times[k + 1], times[k + 1] - times[k])
        states = solver.advance(sde, states, span, sds.Increment(W[k]))
    assert states[1].abs().max() > 0.01
    for k in reversed(range(20)):
        span = Span(times[k + 1], times[k], times[k] - times[k + 1])
        states = solver.advance(sde, states, span, sds.Increment(-W[k]))
    for made, expected in zip(states, start, strict=True):
        torch.testing.assert_close(made, expected, rtol=0, atol=1e-11)


@pytest.mark.parametrize("backend", ["eager", "fused"])
def test_reversible_heun_says_when_its_states_have_come_apart(backend):
    sde = sds.SDE(lambda x, t: -4 * x, lambda x, t: 0.5 + 0.3 * torch.cos(x), calculus="stratonovich")
    with pytest.raises(ValueError, match=r"ReversibleHeun is unstable here: its two states are .* apart at the end"):
        sds.solve(sde, torch.ones(4, 1), 0.0, 4.0, 256, solver=sds.ReversibleHeun(), seed=0, backend=backend)
