"""Underdamped Langevin dynamics: exact covariances, fitted orders, equilibria, and what is refused."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

import sdesolve as sds
from sdesolve.brownian import AbstractNoise
from sdesolve.solvers import langevin as schemes

STRONG = {sds.ALIGN(): 2, sds.QUICSORT(): 3, sds.UBU(): 2, sds.BAOAB(): 1, sds.OBABO(): 1}
F64 = torch.float64
VARIANCES = {"W": 1.0, "H": 1 / 12, "K": 1 / 720}


def fitted_order(steps, errors):
    return -np.polyfit(np.log(steps), np.log(errors), 1)[0]


def state(x, v, paths=1):
    return sds.UnderdampedLangevin.state(*(torch.full((paths, 1), value, dtype=F64) for value in (x, v)))


class UnitNoise(AbstractNoise):
    """Row ``3 k + i + 1`` gets one standard deviation of part ``i`` of ``(W, H, K)`` in step ``k``, none elsewhere."""

    provides = frozenset(VARIANCES)

    def increments(self, times, shape, *, step=0, of="W", dtype=F64, device=None):
        z = torch.zeros(len(times) - 1, *shape, dtype=dtype)
        for k, dt in enumerate(times.diff().abs()):
            z[k, 3 * (step + k) + list(VARIANCES).index(of) + 1] = (dt * VARIANCES[of]).sqrt()
        return z


def covariance(sde, solver, t1, steps):
    """Of ``(x, v)`` from rest, exactly: a linear equation's responses to unit noises, squared and summed."""
    x0 = state(0.0, 0.0, 3 * steps + 1)
    x = sds.solve(sde, x0, 0.0, t1, steps, solver=solver, noise=UnitNoise()).x1[..., 0]
    assert torch.equal(x[0], x0[0, :, 0])
    return torch.stack([x[:, 0].square().sum(), (x[:, 0] * x[:, 1]).sum(), x[:, 1].square().sum()])


@pytest.mark.parametrize("solver", STRONG, ids=repr)
def test_covariances_of_the_harmonic_oscillator_are_reached(solver):
    """P18 of the study. Laws are reached at the weak order, fitted at steps 1/4 to 1/32 without Monte Carlo."""
    sde = sds.UnderdampedLangevin(lambda x, t: 2.0 * x, mass=2.0, friction=2.0)
    truth, steps = torch.tensor([0.161661792, 0.135335283, 0.432332358], dtype=F64), (4, 8, 16, 32)
    errors = [float((covariance(sde, solver, 1.0, n) - truth).abs().max()) for n in steps]
    assert fitted_order(steps, errors) > solver.weak_order - 0.1
    assert errors[-1] < (1e-6 if solver.weak_order == 3 else 5e-4)


@pytest.mark.parametrize("direction", [1, -1])
@pytest.mark.parametrize("solver", STRONG, ids=repr)
def test_strong_order_on_a_double_well_with_time_in_its_force(solver, direction):
    """Root mean square of 200 paths against QUICSORT with many more steps, on the same motion."""
    sde = sds.UnderdampedLangevin(lambda x, t: x**3 - x + torch.sin(2 * t), mass=2.0, friction=1.5, temperature=0.7)
    x0, span, finest, steps = state(0.5, 0.2, 200), (0.0, 1.0)[::direction], 512, (16, 32, 64, 128)
    truth = sds.solve(sde, x0, *span, finest, solver=sds.QUICSORT(), seed=1, backend="fused").x1
    errors = []
    for n in steps:
        path = sds.BrownianPath(1, substeps=finest // n)
        x = sds.solve(sde, x0, *span, n, solver=solver, noise=path, backend="eager").x1
        errors.append(float((x - truth).square().mean().sqrt()))
    assert abs(fitted_order(steps, errors) - STRONG[solver]) < 0.15


@pytest.mark.parametrize("solver", [sds.ALIGN(), sds.UBU(), sds.OBABO()], ids=repr)
def test_whole_trajectories_are_fused(solver):
    mass = torch.tensor([1.0, 3.0], dtype=F64)
    sde = sds.UnderdampedLangevin(lambda x, t: x**3 + t, mass=mass, friction=0.01)
    x0 = sds.UnderdampedLangevin.state(torch.ones(9, 2, dtype=F64), torch.zeros(9, 2, dtype=F64))
    grid = torch.tensor([0.0, 0.1, 0.15, 0.4], dtype=F64)
    for times in (grid, grid.flip(0)):
        runs = {
            backend: sds.solve(sde, x0, grid=times, solver=solver, seed=3, backend=backend, save_at="grid")
            for backend in ("auto", "eager")
        }
        assert runs["auto"].stats.execution == "fused"
        torch.testing.assert_close(runs["auto"].xs, runs["eager"].xs, rtol=1e-13, atol=1e-14)


def test_ubu_is_two_halves_of_the_exact_flow_and_a_kick():
    """Covariance of one step from rest: ``F K S K' F' + S`` with the flow ``F``, its noise ``S`` and the kick ``K``."""
    k, friction, h = 3.0, 1.7, 0.8
    s, e = friction * h / 2, math.exp(-friction * h / 2)
    F = torch.tensor([[1.0, (1 - e) / friction], [0.0, e]], dtype=F64)
    K = torch.tensor([[1.0, 0.0], [-h * k, 1.0]], dtype=F64)
    xx, xv = (2 * s - 3 + 4 * e - e * e) / friction**2, (1 - e) ** 2 / friction
    S = torch.tensor([[xx, xv], [xv, 1 - e * e]], dtype=F64)
    expected = F @ K @ S @ K.T @ F.T + S
    found = covariance(sds.UnderdampedLangevin(lambda x, t: k * x, friction=friction), sds.UBU(), h, 1)
    torch.testing.assert_close(found, expected[[0, 0, 1], [0, 1, 1]])


def test_friction_may_be_anything():
    """Free particles: UBU has their exact law at any ``friction h``, and without friction or noise all go straight."""
    for alpha in (1e-6, 0.3, 0.999, 1.001, 40.0, 3000.0):
        free = sds.UnderdampedLangevin(lambda x, t: 0.0 * x, friction=alpha)
        e = math.exp(-alpha)
        xx = 2 / 3 * alpha if alpha < 1e-3 else (2 * alpha - 3 + 4 * e - e * e) / alpha**2
        expected = torch.tensor([xx, math.expm1(-alpha) ** 2 / alpha, -math.expm1(-2 * alpha)], dtype=F64)
        torch.testing.assert_close(covariance(free, sds.UBU(), 1.0, 1), expected, rtol=2e-6, atol=0.0)
        torch.testing.assert_close(covariance(free, sds.UBU(), 1.0, 3), expected, rtol=2e-6, atol=0.0)
    straight = sds.UnderdampedLangevin(lambda x, t: 0.0 * x, friction=0.0)
    for solver in STRONG:
        x = sds.solve(straight, state(1.0, 3.0), 2.0, 0.0, 5, solver=solver, seed=0, backend="eager").x1
        torch.testing.assert_close(x[0, :, 0], torch.tensor([-5.0, 3.0], dtype=F64))


def test_numbers_of_a_step_are_smooth_where_their_series_end():
    """Each is analytic, with slopes below 1 in size: on both sides of ``alpha = 1`` there is one value."""
    z = torch.tensor([1 - 1e-9, 1 + 1e-9, -1 - 1e-9, -1 + 1e-9], dtype=F64)
    for function in (schemes.phi1, schemes.phi2, schemes.of_H, schemes.of_K, schemes.flow_noise):
        a, b, c, d = function(z)
        assert float((a - b).abs().max()) < 1e-8
        assert float((c - d).abs().max()) < 1e-8


def test_equilibria():
    """P18b, ``U = (x^2 - 1)^2``: moments of 20,000 paths within 4 standard errors, 0.004 allowed for steps of 0.05.

    BAOAB has the exact variance of a harmonic oscillator's positions at any step (Leimkuhler and Matthews 2013).
    """
    paths = 20_000
    sde = sds.UnderdampedLangevin(lambda x, t: 4 * x * (x * x - 1), friction=1.0)
    sign = torch.ones(paths, 1, dtype=F64)
    sign[::2] = -1.0
    x0 = sds.UnderdampedLangevin.state(sign, torch.zeros_like(sign))
    for solver in (sds.QUICSORT(), sds.UBU(), sds.ALIGN()):
        x = sds.solve(sde, x0, 0.0, 10.0, 200, solver=solver, seed=4, backend="eager").x1
        for value, truth in ((x[:, 0] ** 2, 0.8327454871), (x[:, 0] ** 4, 1.082745487), (x[:, 1] ** 2, 1.0)):
            assert abs(float(value.mean()) - truth) < 4 * float(value.std()) / math.sqrt(paths) + 0.004
    spring = sds.UnderdampedLangevin(lambda x, t: 4.0 * x, friction=3.0, temperature=0.5)
    assert abs(float(covariance(spring, sds.BAOAB(), 40.0, 80)[0]) - 0.125) < 1e-12


def test_what_is_refused():
    well = sds.UnderdampedLangevin(lambda x, t: x)
    x0 = state(0.0, 0.0, 3)
    plain = sds.SDE(lambda x, t: -x, lambda x, t: 1.0, noise="additive")
    with pytest.raises(ValueError, match="ALIGN integrates UnderdampedLangevin alone, got SDE"):
        sds.solve(plain, x0, 0.0, 1.0, 4, solver=sds.ALIGN(), seed=0)
    with pytest.raises(ValueError, match=r"\(batch, 2, \*state\), positions and velocities, got \(3, 4\)"):
        sds.solve(well, torch.zeros(3, 4), 0.0, 1.0, 4, solver=sds.ALIGN(), seed=0)
    with pytest.raises(ValueError, match=r"of the shape of positions, \(3, 1\), got \(1,\)"):
        sds.solve(sds.UnderdampedLangevin(lambda x, t: x[0]), x0, 0.0, 1.0, 4, solver=sds.UBU(), seed=0)
    with pytest.raises(ValueError, match=r"at most 8 / friction a step, got friction \|dt\| = 25"):
        sds.solve(sds.UnderdampedLangevin(lambda x, t: x, friction=100.0), x0, 1.0, 0.0, 4, solver=sds.UBU(), seed=0)
    with pytest.raises(ValueError, match="increments"):
        sds.solve(well, x0, 0.0, 1.0, 4, solver=sds.ALIGN(), seed=0, increments="two-point")
    for bad in ({"mass": 0.0}, {"friction": -1.0}, {"temperature": math.nan}, {"mass": torch.tensor([1.0, -1.0])}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            sds.UnderdampedLangevin(lambda x, t: x, **bad)
    with pytest.raises(TypeError, match=r"gradient must be a function of \(x, t\)"):
        sds.UnderdampedLangevin(2.0)


def test_solvers_for_any_additive_noise_take_it_too():
    """One number a degree of freedom and step drives the velocities, whoever asks: the same path gives close states."""
    sde = sds.UnderdampedLangevin(lambda x, t: x**3)
    x0 = state(1.0, 0.0, 50)
    options = {"seed": 2, "backend": "eager"}
    truth = sds.solve(sde, x0, 0.0, 1.0, 64, solver=sds.QUICSORT(), **options).x1
    for solver, tolerance in ((sds.EulerMaruyama(), 0.05), (sds.ShARK(), 2e-3), (sds.SRA3(), 2e-3)):
        x = sds.solve(sde, x0, 0.0, 1.0, 64, solver=solver, **options).x1
        assert float((x - truth).abs().max()) < tolerance, solver
