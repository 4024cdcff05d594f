"""A solver of your own, in one file: SRA1, of strong order 3/2 for additive noise, which needs the area ``H``.

A solver is one final subclass of `AbstractOneStep`. Its `step` is the equation; what it is right for, its orders, and
the parts of the Brownian increment that it reads are class attributes, which `solve` compares with the equation before
the first step. Nothing has to be registered: it runs eagerly, and as one fused kernel, as any other.
"""

import itertools
from typing import final

import numpy as np
import pytest
import torch

import sdesolve as sds


@final
class SRA1(sds.AbstractOneStep):
    """Roessler 2010, table 6.2: ``x' = x + h (f(x, t) + 2 f(y, t + 3/4 h)) / 3 + g(t + h) (W - U) + g(t) U``.

    ``y = x + 3/4 h f(x, t) + 3/2 g(t + h) U`` with ``U = W/2 + H``, the mean of ``W`` over the step.
    """

    supported = sds.supports(ito=(sds.Noise.NONE, sds.Noise.ADDITIVE), stratonovich=(sds.Noise.ADDITIVE,))
    strong_order = None  # for additive noise only, where it is 3/2
    weak_order = 2.0
    ode_order = 2
    evaluations = 2
    needs = ("W", "H")

    def step(self, sde, x, span, noise):
        t, h = span.t0, span.dt
        f = sde.drift(x, t)
        if noise is None:
            return x + h * (f + 2.0 * sde.drift(x + 0.75 * h * f, span.at(0.75))) / 3.0
        U = 0.5 * noise.W + noise.H
        y = x + 0.75 * h * f + 1.5 * sde.diffusion_product(x, span.t1, U)
        drift = h * (f + 2.0 * sde.drift(y, span.at(0.75))) / 3.0
        return x + drift + sde.diffusion_product(x, span.t1, noise.W - U) + sde.diffusion_product(x, t, U)


ADDITIVE = sds.SDE(lambda x, t: torch.sin(2.0 * x) * (1.0 + t), lambda x, t: 2.0 + t * t, "additive")
FINEST = 2048


def end(solver, steps, paths=500):
    noise = sds.BrownianPath(3, substeps=FINEST // steps)
    x0 = torch.full((paths, 1), 0.7, dtype=torch.float64)
    return sds.solve(ADDITIVE, x0, 0.0, 1.0, steps, solver=solver, noise=noise).x1


@pytest.mark.parametrize(("solver", "order"), [(SRA1(), 1.5), (sds.EulerMaruyama(), 1.0)])
def test_its_strong_order(solver, order):
    """Steps 1/16 to 1/256 of the same 500 paths against 1/2048 of SRA1."""
    truth, steps = end(SRA1(), FINEST), [16, 32, 64, 128, 256]
    errors = [float((end(solver, n) - truth).square().mean().sqrt()) for n in steps]
    assert abs(-np.polyfit(np.log2(steps), np.log2(errors), 1)[0] - order) < 0.15


@pytest.mark.parametrize("shape", [(5, 3), (4, 2, 2), (6,)])
def test_it_fuses(shape):
    x0 = torch.linspace(-1, 1, torch.Size(shape).numel(), dtype=torch.float64).reshape(shape)
    options = {"solver": SRA1(), "seed": 1, "save_at": [0.0, 0.3, 0.37, 1.0]}
    fused, eager = (sds.solve(ADDITIVE, x0, 0.0, 1.0, 10, backend=b, **options) for b in ("fused", "eager"))
    torch.testing.assert_close(fused.xs, eager.xs, rtol=1e-12, atol=1e-12)
    assert fused.stats.nfe == 20


def test_its_order_on_an_ode():
    ode = sds.ODE(lambda x, t: -2.0 * t * x * x)
    x0 = torch.ones(1, 1, dtype=torch.float64)
    errors = [abs(float(sds.solve(ode, x0, 0.0, 1.0, n, solver=SRA1()).x1) - 0.5) for n in (16, 32, 64)]
    assert all(abs(np.log2(a / b) - 2) < 0.1 for a, b in itertools.pairwise(errors))


def test_what_it_is_not_for_is_refused_before_it_starts():
    x0 = torch.ones(2, 1)
    diagonal = sds.SDE(lambda x, t: -x, lambda x, t: x)
    with pytest.raises(ValueError, match="SRA1 does not converge to the ito solution of an SDE with diagonal noise"):
        sds.solve(diagonal, x0, 0.0, 1.0, 4, solver=SRA1())

    class OnlyW(sds.AbstractNoise):
        def increments(self, times, shape, *, step=0, dtype=torch.float32, device=None):
            return torch.zeros(len(times) - 1, *shape, dtype=dtype, device=device)

    with pytest.raises(ValueError, match="SRA1 needs H of the driving noise, and OnlyW makes W alone"):
        sds.solve(ADDITIVE, x0, 0.0, 1.0, 4, solver=SRA1(), noise=OnlyW())
    with pytest.raises(
        ValueError, match=r"SRA1 needs H of the driving noise, and BrownianPath.*two-point.* makes W alone"
    ):
        sds.solve(ADDITIVE, x0, 0.0, 1.0, 4, solver=SRA1(), seed=0, increments="two-point")
