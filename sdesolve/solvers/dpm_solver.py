"""DPM-Solver: single-step exponential integrators in the noise prediction."""

from __future__ import annotations

from typing import final

from sdesolve.sde import Noise
from sdesolve.solvers.base import supports
from sdesolve.solvers.multistep import exponential_moments
from sdesolve.solvers.schedule import Schedule, check_order
from sdesolve.solvers.singlestep import AbstractSingleStep, Stage


@final
class DPMSolver(AbstractSingleStep):
    """DPM-Solver-1, -2 and -3 for the probability flow: single step, of order 1, 2 and 3 with as many evaluations.

    The noise predicted is expanded in the log-SNR about the start of the step; stages stand at 1/2 of it for order 2
    and at 1/3 and 2/3 for order 3. Order 1 is DDIM, order 2 is `DPM2`. Lu et al. 2022, algorithms 1 and 2.

    Args:
        order: 1, 2 or 3.
    """

    supported = supports(ito=(Noise.NONE,))
    weak_order = None

    def __init__(self, order: int = 3) -> None:
        self.order = check_order(order, 3, type(self).__name__)

    @property
    def ode_order(self) -> int:
        return self.order

    @property
    def evaluations(self) -> int:
        return self.order

    def stages(self, start: Schedule, end: Schedule) -> list[Stage]:
        h = end.lam - start.lam
        if self.order == 1:
            return [Stage(end, [end.rho - start.rho])]
        if self.order == 2:
            middle = start.at(start.time_of(start.lam + 0.5 * h, start.times, end.times))
            return [Stage(middle, [middle.rho - start.rho]), Stage(end, [0.0 * h, end.rho - start.rho])]
        third, two_thirds = (
            start.at(start.time_of(start.lam + r * h, start.times, end.times)) for r in (1.0 / 3.0, 2.0 / 3.0)
        )
        # rho' I_1(-r h) is the integral of (lam - lam_0) / (r h) over the stage.
        I1, J1 = exponential_moments(-h, 2)[:, 1], exponential_moments(-2.0 / 3.0 * h, 2)[:, 1]
        inner, outer = 2.0 * two_thirds.rho * J1, 1.5 * end.rho * I1
        return [
            Stage(third, [third.rho - start.rho]),
            Stage(two_thirds, [two_thirds.rho - start.rho - inner, inner]),
            Stage(end, [end.rho - start.rho - outer, 0.0 * h, outer]),
        ]
