"""Stochastic Runge-Kutta schemes of strong order 3/2 for diagonal and scalar noise."""

from __future__ import annotations

from typing import final

from sdesolve.sde import Noise
from sdesolve.solvers.base import supports
from sdesolve.solvers.stochastic_table import AbstractStochasticTable, StochasticTable

_ITO = supports(
    ito=(Noise.NONE, Noise.ADDITIVE, Noise.DIAGONAL, Noise.SCALAR), stratonovich=(Noise.NONE, Noise.ADDITIVE)
)


@final
class SRIW1(AbstractStochasticTable):
    """The step of `AbstractStochasticTable` with four stages, of which two need the drift.

    Strong and weak order 3/2 for diagonal noise with ``g_i`` a function of ``x_i`` alone (`solve` tests this), and for
    scalar noise with any ``g``; weak order 2 for additive noise; second order on an ODE. Ito. The cheapest scheme of
    this order. In one step's expectations the term ``h^(5/2)`` that keeps the weak order from 2 is small, its
    coefficient some hundredth of that of ``h^3``. Roessler 2010, SIAM Journal on Numerical Analysis 48, table 5.1.
    """

    supported = _ITO
    own_component_diffusion = True
    strong_order, weak_order, ode_order = 1.5, 1.5, 2
    evaluations, diffusion_evaluations = 2, 4
    table = StochasticTable(
        A0=((), (3 / 4,), (), ()),
        A1=((), (1 / 4,), (1.0,), (0.0, 0.0, 1 / 4)),
        B0=((), (3 / 2,), (), ()),
        B1=((), (1 / 2,), (-1.0,), (-5.0, 3.0, 1 / 2)),
        alpha=(1 / 3, 2 / 3, 0.0, 0.0),
        beta1=(-1.0, 4 / 3, 2 / 3, 0.0),
        beta2=(-1.0, 4 / 3, -1 / 3, 0.0),
        beta3=(2.0, -4 / 3, -2 / 3, 0.0),
        beta4=(-2.0, 5 / 3, -2 / 3, 1.0),
    )


@final
class SRIW2(AbstractStochasticTable):
    """The step of `AbstractStochasticTable` with four stages, of which three need the drift.

    Strong and weak order 3/2 for diagonal noise with ``g_i`` a function of ``x_i`` alone (`solve` tests this), and for
    scalar noise with any ``g``; weak order 2 for additive noise; third order on an ODE. Ito. Roessler 2010, table 5.2.
    """

    supported = _ITO
    own_component_diffusion = True
    strong_order, weak_order, ode_order = 1.5, 1.5, 3
    evaluations, diffusion_evaluations = 3, 4
    table = StochasticTable(
        A0=((), (1.0,), (1 / 4, 1 / 4), ()),
        A1=((), (1 / 4,), (1.0,), (0.0, 0.0, 1 / 4)),
        B0=((), (0.0,), (1.0, 1 / 2), ()),
        B1=((), (-1 / 2,), (1.0,), (2.0, -1.0, 1 / 2)),
        alpha=(1 / 6, 1 / 6, 2 / 3, 0.0),
        beta1=(-1.0, 4 / 3, 2 / 3, 0.0),
        beta2=(1.0, -4 / 3, 1 / 3, 0.0),
        beta3=(2.0, -4 / 3, -2 / 3, 0.0),
        beta4=(-2.0, 5 / 3, -2 / 3, 1.0),
        other=(1 / 2, 1 / 2, 0.0, 0.0),
    )


@final
class SOSRI(AbstractStochasticTable):
    """The step of `AbstractStochasticTable` with four stages that were optimised for stability.

    Strong and weak order 3/2 for diagonal noise with ``g_i`` a function of ``x_i`` alone (`solve` tests this), and for
    scalar noise with any ``g``; weak order 2 for additive noise; second order on an ODE. Ito. Takes larger steps than
    `SRIW1` where noise or drift is stiff; beyond ``h lambda = 9.8``, as coarse reverse grids have it, it amplifies as
    that to the fourth. Rackauckas and Nie 2020, IEEE HPEC.
    """

    supported = _ITO
    own_component_diffusion = True
    strong_order, weak_order, ode_order = 1.5, 1.5, 2
    evaluations, diffusion_evaluations = 4, 4
    table = StochasticTable(
        A0=(
            (),
            (-0.04199224421316468,),
            (2.842612915017106, -2.0527723684000727),
            (4.338237071435815, -2.8895936137439793, 2.3017575594644466),
        ),
        A1=(
            (),
            (0.26204282091330466,),
            (0.20903646383505375, -0.1502377115150361),
            (0.05836595312746999, 0.6149440396332373, 0.08535117634046772),
        ),
        B0=(
            (),
            (-0.21641093549612528,),
            (1.5336352863679572, 0.26066223492647056),
            (-1.0536037558179159, 1.7015284721089472, -0.20725685784180017),
        ),
        B1=(
            (),
            (-0.5119011827621657,),
            (2.67767339866713, -4.9395031322250995),
            (0.15580956238299215, 3.2361551006624674, -1.4223118283355949),
        ),
        alpha=(1.140099274172029, -0.6401334255743456, 0.4736296532772559, 0.026404498125060714),
        beta1=(-1.8453464565104432, 2.688764531100726, -0.2523866501071323, 0.40896857551684956),
        beta2=(0.4969658141589478, -0.5771202869753592, -0.12919702470322217, 0.2093514975196336),
        beta3=(2.8453464565104425, -2.688764531100725, 0.2523866501071322, -0.40896857551684945),
        beta4=(0.11522663875443433, -0.57877086147738, 0.2857851028163886, 0.17775911990655704),
    )
