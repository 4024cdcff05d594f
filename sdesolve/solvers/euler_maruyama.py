"""The Euler-Maruyama scheme."""

from __future__ import annotations

from typing import final

from torch import Tensor

from sdesolve.brownian import Increment
from sdesolve.sde import AbstractSDE, AbstractSemilinear, Noise
from sdesolve.solvers.base import AbstractOneStep, Span, drift_and_noise, supports
from sdesolve.solvers.single_row import AbstractSingleRow, single_row
from sdesolve.solvers.tabulated import Table


@final
class EulerMaruyama(AbstractSingleRow, AbstractOneStep):
    """``x' = x + f(x, t) dt + g(x, t) dW``.

    Strong order 1/2 (1 for additive noise), weak order 1, Euler's method on an ODE. Converges to the Ito solution, so a
    Stratonovich SDE is accepted only where the two agree. Maruyama 1955; Kloeden and Platen 1992, section 10.2.
    """

    supported = supports(ito=tuple(Noise), stratonovich=(Noise.NONE, Noise.ADDITIVE))
    strong_order = 0.5
    weak_order = 1.0
    ode_order = 1
    evaluations = 1
    by_products = True

    def step(self, sde: AbstractSDE, x: Tensor, span: Span, noise: Increment | None) -> Tensor:
        f, g_dW = drift_and_noise(sde, x, span.t0, noise)
        return x + f * span.dt + g_dW

    def table(self, sde: AbstractSemilinear, times: Tensor) -> Table | None:
        rates = sde.rates(times[:-1])
        if rates is None:
            return None
        dt = times.diff(dim=0)
        a, b, c = 1.0 + rates.linear * dt, rates.field * dt, rates.noise * dt.abs().sqrt()
        return single_row(times, a, b, c, noisy=sde.noise is not Noise.NONE)
