"""The embedded Runge-Kutta pair of Tsitouras."""

from __future__ import annotations

from typing import final

from torch import Tensor

from sdesolve.sde import Noise, per_sample
from sdesolve.solvers.base import supports
from sdesolve.solvers.embedded import AbstractExplicitPair, Attempt

# The last four weights of each stage, and all of the error's, are rounded as they were published.
_NODES = (0.161, 0.327, 0.9, 0.9800255409045097, 1.0, 1.0)
_STAGES = (
    (0.161,),
    (-0.008480655492356989, 0.335480655492357),
    (2.8971530571054935, -6.359448489975075, 4.3622954328695815),
    (5.325864828439257, -11.748883564062828, 7.4955393428898365, -0.09249506636175525),
    (5.86145544294642, -12.92096931784711, 8.159367898576159, -0.071584973281401, -0.028269050394068383),
    (0.09646076681806523, 0.01, 0.4798896504144996, 1.379008574103742, -3.290069515436081, 2.324710524099774),
)
_ERROR = (
    *(-0.00178001105222577714, -0.0008164344596567469, 0.007880878010261995, -0.1447110071732629, 0.5823571654525552),
    *(-0.45808210592918697, 0.015151515151515152),
)
# Of each slope, the polynomial in the fraction of the step, from its linear term on.
_DENSE = (
    (1.0, -2.763706197274826, 2.9132554618219126, -1.0530884977290216),
    (0.0, 0.13169999999999998, -0.2234, 0.1017),
    (0.0, 3.9302962368947516, -5.941033872131505, 2.490627285651253),
    (0.0, -12.411077166933676, 30.33818863028232, -16.548102889244902),
    (0.0, 37.50931341651104, -88.1789048947664, 47.37952196281928),
    (0.0, -27.896526289197286, 65.09189467479366, -34.87065786149661),
    (0.0, 1.5, -4.0, 2.5),
)


@final
class Tsit5(AbstractExplicitPair):
    """The 5(4) pair of Tsitouras with steps chosen for each sample alone.

    Order 5, six drift evaluations an attempted step, with smaller errors than `DormandPrince` at the same steps, and an
    interpolant of order 4. Tsitouras 2011, "Runge-Kutta pairs of order 5(4) satisfying only the first column
    simplifying assumption", Computers and Mathematics with Applications 62.

    Args:
        rtol: relative tolerance of a step, at least 4 times the rounding error of the state's dtype.
        atol: absolute tolerance of a step.
        max_steps: attempts that a sample may take before `solve` gives up.

    Raises:
        ValueError, TypeError: as `DormandPrince`.

    Example:
        >>> sol = solve(ODE(drift), x0, 0.0, 1.0, solver=Tsit5(rtol=1e-6, atol=1e-9), save_at=[0.5, 1.0])
    """

    supported = supports(ito=(Noise.NONE,))
    ode_order = 5
    strong_order = None
    weak_order = None
    evaluations = 6
    error_order = 5
    nodes, stages, error = _NODES, _STAGES, _ERROR

    def between(self, x: Tensor, attempt: Attempt, dt: Tensor, theta: Tensor) -> Tensor:
        h, u = per_sample(dt.to(x.dtype), x), per_sample(theta.to(x.dtype), x)
        for (a, b, c, d), slope in zip(_DENSE, attempt.slopes, strict=True):
            x = x + h * (u * (a + u * (b + u * (c + u * d)))) * slope
        return x
