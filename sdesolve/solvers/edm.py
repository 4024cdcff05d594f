"""The second-order samplers of Karras et al. and k-diffusion, with and without churn."""

from __future__ import annotations

from typing import final

from sdesolve.solvers.schedule import Schedule
from sdesolve.solvers.singlestep import AbstractChurned, Stage


@final
class EDMHeun(AbstractChurned):
    """Heun's method in the noise level ``rho = sigma / alpha``, with optional churn (`AbstractChurned`).

    Order 2 on the flow, two evaluations a step, one for a step to zero noise. On `EDM` algorithms 1 and 2 of
    Karras et al. 2022; on any other linear diffusion the same after the change of variables to theirs.

    Args:
        churn, churn_range, churn_noise: ``S_churn``, ``[S_min, S_max]`` and ``S_noise`` of Karras et al. 2022; without
            churn nothing is random.
    """

    def stages(self, start: Schedule, end: Schedule) -> list[Stage]:
        d = end.rho - start.rho
        return [Stage(end, [d]), Stage(end, [0.5 * d, 0.5 * d])]


@final
class DPM2(AbstractChurned):
    """The midpoint method in ``rho = sigma / alpha``, with the geometric mean for midpoint and optional churn.

    Order 2 on the flow, where it is `DPMSolver` of order 2; two evaluations a step, one for a step to zero noise. Churn
    as in `EDMHeun`. Lu et al. 2022, algorithm 1; Karras et al. 2022, algorithm 2.

    Args:
        churn, churn_range, churn_noise: ``S_churn``, ``[S_min, S_max]`` and ``S_noise`` of Karras et al. 2022; without
            churn nothing is random.
    """

    def stages(self, start: Schedule, end: Schedule) -> list[Stage]:
        middle = start.at(start.time_of(0.5 * (start.lam + end.lam), start.times, end.times))
        return [Stage(middle, [middle.rho - start.rho]), Stage(end, [0.0 * end.rho, end.rho - start.rho])]
