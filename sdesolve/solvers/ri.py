"""Stochastic Runge-Kutta schemes of weak order 2 for Ito SDEs with any noise."""

from __future__ import annotations

from typing import final

from sdesolve.solvers.weak_table import AbstractWeakTable, WeakTable


@final
class RI6(AbstractWeakTable):
    """The step of `AbstractWeakTable` with two evaluations of the drift.

    Weak order 2 for Ito SDEs with any noise, second order on an ODE. The diffusion is evaluated once, and each column
    of it four times more. Roessler 2009, SIAM Journal on Numerical Analysis 47, table 5.2.
    """

    ode_order = 2
    evaluations, diffusion_evaluations, column_evaluations = 2, 3, 4
    table = WeakTable(
        A0=((), (1.0,), ()),
        B0=((), (1.0,), ()),
        alpha=(1 / 2, 1 / 2, 0.0),
        A1=((), (1.0,), (1.0,)),
        B1=((), (1.0,), (-1.0,)),
        B2=((0.0, 0.0, 0.0), (1.0, 0.0, 0.0), (-1.0, 0.0, 0.0)),
        beta1=(1 / 2, 1 / 4, 1 / 4),
        beta2=(0.0, 1 / 2, -1 / 2),
        beta3=(-1 / 2, 1 / 4, 1 / 4),
        beta4=(0.0, 1 / 2, -1 / 2),
    )


_B2 = (-214 / 513 * (1105 / 991) ** 0.5, -491 / 513 * (221 / 4955) ** 0.5)
_B1, _BETA2, _BETA4 = 3 * (38 / 491) ** 0.5, (491 / 38) ** 0.5 / 6, -((4955 / 221) ** 0.5) / 8


@final
class DRI1(AbstractWeakTable):
    """The step of `AbstractWeakTable` with three evaluations of the drift, and minimal error constants.

    Weak order 2 for Ito SDEs with any noise, third order on an ODE. The diffusion is evaluated once, and each column of
    it four times more. Debrabant and Roessler 2009, Applied Numerical Mathematics 59, table 2.
    """

    ode_order = 3
    evaluations, diffusion_evaluations, column_evaluations = 3, 3, 4
    table = WeakTable(
        A0=((), (1 / 2,), (-1.0, 2.0)),
        B0=((), ((6 - 6**0.5) / 10,), ((3 + 2 * 6**0.5) / 5,)),
        alpha=(1 / 6, 2 / 3, 1 / 6),
        A1=((), (342 / 491,), (342 / 491,)),
        B1=((), (_B1,), (-_B1,)),
        B2=((0.0, 0.0, 0.0), (_B2[0], _B2[1], _B2[1]), (-_B2[0], -_B2[1], -_B2[1])),
        beta1=(193 / 684, 491 / 1368, 491 / 1368),
        beta2=(0.0, _BETA2, -_BETA2),
        beta3=(-4955 / 7072, 4955 / 14144, 4955 / 14144),
        beta4=(0.0, _BETA4, -_BETA4),
    )
