"""Stochastic Runge-Kutta schemes of strong order 3/2 for additive noise."""

from __future__ import annotations

from typing import final

from sdesolve.sde import Noise
from sdesolve.solvers.base import supports
from sdesolve.solvers.stochastic_table import AbstractStochasticTable, StochasticTable

_ADDITIVE = supports(ito=(Noise.NONE, Noise.ADDITIVE), stratonovich=(Noise.NONE, Noise.ADDITIVE))


@final
class SRA1(AbstractStochasticTable):
    """``x' = x + h (f(x, t) + 2 f(y, t + 3/4 h)) / 3 + g(t + h) (W - U) + g(t) U``.

    ``y = x + 3/4 h f(x, t) + 3/2 g(t + h) U`` with ``U = W/2 + H``. Strong order 3/2 and weak order 2 for additive
    noise, second order on an ODE. Roessler 2010, SIAM Journal on Numerical Analysis 48, table 6.1.
    """

    supported = _ADDITIVE
    strong_orders = (1.5, None, None)
    strong_order, weak_order, ode_order = None, 2.0, 2
    evaluations, diffusion_evaluations = 2, 2
    table = StochasticTable(
        A0=((), (3 / 4,)), B0=((), (3 / 2,)), alpha=(1 / 3, 2 / 3), beta1=(1.0, 0.0), beta3=(-1.0, 1.0), c1=(1.0, 0.0)
    )  # fmt: skip


@final
class SRA3(AbstractStochasticTable):
    """``x' = x + h (f(x, t) + f(y, t + h) + 4 f(z, t + h/2)) / 6 + g(t + h) (W - U) + g(t) U``.

    ``y = x + h f(x, t)``, ``z = x + h (f(x, t) + f(y, t + h)) / 4 + (g(t + h) + g(t) / 2) U`` with ``U = W/2 + H``.
    Strong order 3/2 and weak order 2 for additive noise, third order on an ODE. Roessler 2010, table 6.2.
    """

    supported = _ADDITIVE
    strong_orders = (1.5, None, None)
    strong_order, weak_order, ode_order = None, 2.0, 3
    evaluations, diffusion_evaluations = 3, 2
    table = StochasticTable(
        A0=((), (1.0,), (1 / 4, 1 / 4)),
        B0=((), (0.0,), (1.0, 1 / 2)),
        alpha=(1 / 6, 1 / 6, 2 / 3),
        beta1=(1.0, 0.0, 0.0),
        beta3=(-1.0, 1.0, 0.0),
        c1=(1.0, 0.0, 0.0),
        other=(1 / 2, 1 / 2, 0.0),
    )


@final
class SOSRA(AbstractStochasticTable):
    """The table of `AbstractStochasticTable` for additive noise that was optimised for stability, of three stages.

    Strong order 3/2 and weak order 2 for additive noise, second order on an ODE; a larger stability region than `SRA1`
    and `SRA3`. Rackauckas and Nie 2020, IEEE HPEC, "Stability-optimized high order methods and stiffness detection for
    pathwise stiff stochastic differential equations".
    """

    supported = _ADDITIVE
    strong_orders = (1.5, None, None)
    strong_order, weak_order, ode_order = None, 2.0, 2
    evaluations, diffusion_evaluations = 3, 3
    table = StochasticTable(
        A0=((), (0.6923962376159507,), (-3.1609142252828395, 4.1609142252828395)),
        B0=((), (1.3371632704399763,), (1.442371048468624, 1.8632741501139225)),
        alpha=(0.2889874966892885, 0.6859880440839937, 0.025024459226717772),
        beta1=(-16.792534242221663, 17.514995785380226, 0.27753845684143835),
        beta3=(0.4237535769069274, 0.6010381474428539, -1.0247917243497813),
        c1=(0.0, 0.041248171110700504, 1.0),
    )
