"""A sampler of your own, in one file: exponential Euler on the reverse SDE or the flow.

A sampler is one subclass of `AbstractTabulated`: the numbers of all its steps as a float64 table, and the few lines
that say what its rows ``a x + sum_i b_i y_i + c z`` are applied to. It then runs in torch, by one kernel for each row,
as one fused kernel, and under the exact oracle.
"""

from typing import final

import numpy as np
import torch

import sdesolve as sds


@final
class ExponentialEuler(sds.AbstractTabulated):
    """The linear part solved exactly over a step, the score held: ``x' = e^(l dt) (x + b s(x, t)) + c z``.

    With rates ``l``, ``b`` and ``c`` at the middle of the step, where ``c`` has the variance that they give over it.
    """

    supported = sds.supports(ito=(sds.Noise.NONE, sds.Noise.ADDITIVE))
    strong_order = None
    weak_order = 1.0
    ode_order = 1
    evaluations = 1

    def table(self, sde, times):
        dt, rates = times.diff(dim=0), sde.rates(0.5 * (times[1:] + times[:-1]))
        if rates is None:
            return None
        a = (rates.linear * dt).exp()
        growth = torch.where(rates.linear == 0, dt, torch.expm1(rates.linear * dt) / rates.linear)
        square = torch.where(
            rates.linear == 0, dt.abs(), (torch.expm1(2 * rates.linear * dt) / (2 * rates.linear)).abs()
        )
        noisy = sde.noise is not sds.Noise.NONE
        c = rates.noise * square.sqrt() if noisy else torch.zeros_like(a)
        row = torch.stack([a, rates.field * growth, c], dim=1)
        nothing = torch.zeros(len(dt), 1, dtype=torch.bool)
        return sds.Table(times=times[:-1, None], rows=(row,), noisy=(noisy,), skipped=nothing)

    def advance(self, field, rows, x, memory):
        (row,) = rows
        return row(x, field(x)), memory


PROCESS = sds.VP()
DATA = sds.Gaussian(torch.tensor([0.5, -1.0]), torch.tensor([0.3, 0.8]))


def test_all_executors_agree():
    for equation in (PROCESS.reverse(DATA.score(PROCESS)), PROCESS.probability_flow(DATA.score(PROCESS))):
        x = PROCESS.sample_prior((5, 2), seed=1, dtype=torch.float64)
        fused, kernel, eager = (
            sds.solve(equation, x, grid=PROCESS.time_grid(12), solver=ExponentialEuler(), seed=2, backend=backend).x1
            for backend in ("fused", "kernel", "eager")
        )
        torch.testing.assert_close(fused, eager, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(kernel, eager, rtol=1e-12, atol=1e-12)


def test_its_order_in_law_is_one():
    """By the oracle, exactly: no samples, no chance. On grids from 1 to 0.05, where the rates are smooth."""
    steps = [16, 32, 64, 128]
    for stochasticity in (0.0, 1.0):
        sampler = sds.oracle.as_sampler(ExponentialEuler(), stochasticity)
        grids = [sds.grids.uniform(1.0, 0.05, n) for n in steps]
        errors = [float(sds.oracle.error(sampler, PROCESS, DATA, grid)) for grid in grids]
        assert abs(-np.polyfit(np.log2(steps), np.log2(errors), 1)[0] - 1.0) < 0.15


def test_sample_takes_it():
    x = sds.sample(PROCESS, DATA.score(PROCESS), (4000, 2), solver=ExponentialEuler(), steps=100, seed=0)
    std = torch.tensor([0.3, 0.8])
    assert bool(((x.mean(0) - torch.tensor([0.5, -1.0])).abs() < 4 * std / 4000**0.5 + 0.02).all())
