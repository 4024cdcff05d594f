"""The embedded Runge-Kutta pair of Dormand and Prince."""

from __future__ import annotations

from typing import final

from torch import Tensor

from sdesolve.sde import Noise, per_sample
from sdesolve.solvers.base import supports
from sdesolve.solvers.embedded import AbstractExplicitPair, Attempt, combination

_NODES = (1 / 5, 3 / 10, 4 / 5, 8 / 9, 1.0, 1.0)
_STAGES = (
    (1 / 5,),
    (3 / 40, 9 / 40),
    (44 / 45, -56 / 15, 32 / 9),
    (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
    (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
    (35 / 384, 0.0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84),
)
# The last stage is the fifth-order state itself; these are its weights less those of the fourth-order one.
_ERROR = (71 / 57600, 0.0, -71 / 16695, 71 / 1920, -17253 / 339200, 22 / 525, -1 / 40)
_DENSE = (
    -12715105075 / 11282082432,
    0.0,
    87487479700 / 32700410799,
    -10690763975 / 1880347072,
    701980252875 / 199316789632,
    -1453857185 / 822651844,
    69997945 / 29380423,
)


@final
class DormandPrince(AbstractExplicitPair):
    """The 5(4) pair of Dormand and Prince with steps chosen for each sample alone: `solve` without ``steps``.

    Order 5, six drift evaluations an attempted step, for ODEs such as the probability flow. Every sample of a batch has
    its own time, step size and decision to accept, so that its result does not depend on who is in the batch with it.
    The drift is always evaluated on the whole batch, so that labels and whatever else it holds for each row stay with
    their rows; samples that have arrived stand still.
    Step sizes are those of `StepController`. States between steps come from the fourth-order interpolant of Hairer,
    Norsett and Wanner 1993, section II.6. Dormand and Prince 1980.

    Args:
        rtol: relative tolerance of a step, at least 4 times the rounding error of the state's dtype.
        atol: absolute tolerance of a step.
        max_steps: attempts that a sample may take before `solve` gives up.

    Raises:
        ValueError: a tolerance that is not positive and finite (``atol`` may be 0), or ``max_steps`` below 1.
        TypeError: a tolerance that is not a number, or ``max_steps`` that is not an integer.

    Example:
        >>> sol = solve(process.probability_flow(score), x, process.t_max, process.t_min, solver=DormandPrince())
        >>> sol.stats.accepted, sol.stats.rejected  # for each sample
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
        k, rise = attempt.slopes, attempt.x - x
        left, right = h * k[0] - rise, rise - h * k[-1]
        return x + u * (rise + (1 - u) * (left + u * (right - left + (1 - u) * h * combination(_DENSE, k))))
