"""Fitted orders of every sampler with a stated one, by exact moments: no Monte Carlo error."""

from __future__ import annotations

import functools
import math

import numpy as np
import pytest
import torch

import sdesolve as sds

DATA = sds.Gaussian(torch.tensor([0.5, -0.5, 1.0, 0.2]), torch.tensor([1.0, 0.3, 0.05, 2.0]))
PROCESSES = [sds.VP(), sds.EDM(), sds.Rectified(t_max=0.99)]
# On the flow: sampler and order.
DETERMINISTIC = [
    (sds.EulerMaruyama(), 1),
    (sds.ReverseDiffusion(), 1),
    (sds.DDIM(), 1),
    *((sds.DPMSolver(order), order) for order in (1, 2, 3)),
    *((sds.DPMSolverPP(order), min(order, 2)) for order in (1, 2, 3)),
    (sds.DPMSolverPP2S(), 2),
    *((sds.DEIS(order), order) for order in (1, 2, 3, 4)),
    *((sds.LinearMultistep(order), order) for order in (1, 2, 3, 4)),
    *((sds.UniPC(order), order + 1) for order in (1, 2, 3)),
    *((sds.UniPC(order, "bh1"), order + 1) for order in (1, 2)),
    *((sds.SASolver(order, 0), order) for order in (1, 2, 3, 4)),
    *((sds.SASolver(order, order), order + 1) for order in (1, 2, 3)),
    *((sds.SASolver(p, c), min(p, c) + 1) for p, c in ((3, 1), (1, 3), (2, 3))),
    (sds.EDMHeun(), 2),
    (sds.DPM2(), 2),
]
SLOW_TO_SETTLE = [
    *(sds.EulerMaruyama(), sds.ReverseDiffusion(), sds.SASolver(4, 0)),
    *(sds.DEIS(3), sds.DEIS(4), sds.LinearMultistep(3), sds.LinearMultistep(4)),
]
# On a reverse SDE: sampler, its stochasticity, and weak order.
STOCHASTIC = [
    (sds.EulerMaruyama(), 1.0, 1),
    (sds.ReverseDiffusion(), 1.0, 1),
    (sds.ReverseDiffusion(), 0.5, 1),
    (sds.Ancestral(), 1.0, 1),
    (sds.Ancestral("forward"), 1.0, 1),
    (sds.DDIM(0.5), 0.5, 1),
    (sds.DDIM(1.0), 1.0, 1),
    *((sds.SDEDPMSolverPP(order), 1.0, min(order, 2)) for order in (1, 2, 3)),
    (sds.SDEDPMSolverPP(2), 0.5, 2),
    (sds.SDEDPMSolverPP2S(), 1.0, 2),
    (sds.SDEDPMSolverPP2S(), 0.5, 2),
    (sds.SASolver(2, 0), 1.0, 2),
    (sds.SASolver(3, 0), 1.0, 2),
    (sds.SASolver(1, 1), 1.0, 2),
    (sds.SASolver(3, 3), 1.0, 2),
    (sds.EDMHeun(churn=8.0), 1.0, 2),
    (sds.DPM2(churn=8.0), 1.0, 2),
]


def crossed(cases):
    """All on the first process, each on one of the others in turn; the rest is left for the thorough profile."""
    for i, case in enumerate(cases):
        for process in PROCESSES:
            rest = [] if process in (PROCESSES[0], PROCESSES[1 + i % 2]) else [pytest.mark.thorough]
            yield pytest.param(*case, process, marks=rest, id=f"{'-'.join(map(repr, case))}-{type(process).__name__}")


@functools.cache
def grid(process, steps):
    """Smooth in the log-SNR, with first steps so short that to start a multistep scheme at order 1 costs nothing."""
    u = torch.arange(steps + 1, dtype=torch.float64) / steps
    top = 0.5 * process.log_snr(process.t_max)
    target = top + (2.0 - top) * u**2
    noisy, clean = torch.full_like(u, process.t_max), torch.full_like(u, 1e-7)
    for _ in range(80):
        t = 0.5 * (noisy + clean)
        too_clean = 0.5 * process.log_snr(t) > target
        clean, noisy = torch.where(too_clean, t, clean), torch.where(too_clean, noisy, t)
    t[0] = process.t_max
    return t


def narrow_grid(process, steps):
    """From a log-SNR of -2 to 1, where all of the data's scales matter alike, likewise with short first steps."""
    u = torch.arange(steps + 1, dtype=torch.float64) / steps
    return process.time_at_log_snr(-2.0 + 3.0 * u**2)


def fitted_order(solver, process, stochasticity, counts, data=DATA, grid=grid):
    score, errors = data.score(process), []
    sde = process.reverse(score, stochasticity) if stochasticity else process.probability_flow(score)
    for steps in counts:
        times = grid(process, steps)
        start, end = data.moments(process, float(times[0])), data.moments(process, float(times[-1]))
        chain = sds.oracle.chain_moments(sde, solver, times, start.mean, start.cov, diagonal=True)
        errors.append(
            float((chain.cov.sqrt() - end.cov.sqrt()).abs().max()) + float((chain.mean - end.mean).abs().max())
        )
    assert errors[-1] < 0.05
    return -np.polyfit([math.log(n) for n in counts], [math.log(e) for e in errors], 1)[0]


@pytest.mark.parametrize(("solver", "order", "process"), list(crossed(DETERMINISTIC)))
def test_order_on_the_flow(solver, order, process):
    assert solver.ode_order == order
    counts = (128, 256, 512) if solver in SLOW_TO_SETTLE else (64, 128, 256)
    assert fitted_order(solver, process, 0.0, counts) == pytest.approx(order, abs=0.15)


@pytest.mark.parametrize(("solver", "stochasticity", "order", "process"), list(crossed(STOCHASTIC)))
def test_weak_order_on_the_reverse_sde(solver, stochasticity, order, process):
    assert solver.weak_order == order
    counts = (128, 256, 512) if isinstance(solver, sds.EulerMaruyama) else (64, 128, 256)
    assert fitted_order(solver, process, stochasticity, counts) == pytest.approx(order, abs=0.15)


@pytest.mark.parametrize("process", PROCESSES, ids=lambda p: type(p).__name__)
@pytest.mark.parametrize(
    ("solver", "stochasticity", "order", "data"),
    [
        (sds.SASolver(3, 2), 0.0, 3, DATA),
        (sds.SASolver(2, 2), 1.0, 2, sds.Gaussian(torch.tensor([0.5]), torch.tensor([0.3]))),
    ],
    ids=["flow", "sde"],
)
def test_orders_that_show_on_a_narrow_span_alone(solver, stochasticity, order, data, process):
    """Over the whole span the next order in the step has so large a coefficient that it rules up to 1000 steps."""
    assert (solver.weak_order if stochasticity else solver.ode_order) == order
    fitted = fitted_order(solver, process, stochasticity, (128, 256, 512), data, narrow_grid)
    assert fitted == pytest.approx(order, abs=0.15)


@pytest.mark.parametrize(
    ("solver", "order"),
    [
        *((sds.DEIS(3), 2), (sds.LinearMultistep(4), 2), (sds.SASolver(3, 0), 2)),
        *((sds.SASolver(3, 3), 3), (sds.UniPC(3), 3), (sds.DPMSolver(3), 3)),
    ],
    ids=repr,
)
def test_what_long_first_steps_leave_of_the_order(solver, order):
    """Equal steps in the log-SNR: the first one, of order 1, has an error of second order, or of third if corrected."""
    assert solver.ode_order >= order
    data = sds.Gaussian(torch.tensor([0.7, -1.3]), torch.tensor([0.04, 1.44]))

    def equal(process, steps):
        return process.time_at_log_snr(torch.linspace(-1.0, 3.0, steps + 1, dtype=torch.float64))

    fitted = fitted_order(solver, sds.VP(), 0.0, (256, 512), data, equal)
    assert fitted == pytest.approx(order, abs=0.15)
