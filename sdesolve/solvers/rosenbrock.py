"""A Rosenbrock pair for stiff ODEs."""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor

from sdesolve._internal.derivatives import linearised
from sdesolve.sde import Noise, per_sample
from sdesolve.solvers.base import supports
from sdesolve.solvers.embedded import AbstractEmbedded, Attempt, Slope
from sdesolve.solvers.implicit import factorised, jacobian

_GAMMA = 0.25
# Of stages 2 to 5; each of the last two goes on from the one before.
_A = (
    (1.544,),
    (0.9466785280815826, 0.2557011698983284),
    (3.314825187068521, 2.896124015972201, 0.9986419139977817),
    (1.221224509226641, 6.019134481288629, 12.53708332932087, -0.6878860361058950),
)
_C = (
    (-5.6688,),
    (-2.430093356833875, -0.2063599157091915),
    (-0.1073529058151375, -9.594562251023355, -20.47028614809616),
    (7.496443313967647, -10.24680431464352, -33.99990352819905, 11.70890893206160),
    (8.083246795921522, -7.981132988064893, -31.52159432874371, 16.31930543123136, -6.058818238834054),
)
_NODES = (0.386, 0.21, 0.63, 1.0)
_BY_TIME = (0.25, -0.1043, 0.1035, -0.0362)
_DENSE = (
    (10.12623508344586, -7.487995877610167, -34.80091861555747, -7.992771707568823, 1.025137723295662),
    (-0.6762803392801253, 6.087714651680015, 16.43084320892478, 24.76722511418386, -6.594389125716872),
)


@final
class Rodas4(AbstractEmbedded):
    """The stiffly accurate Rosenbrock pair of order 4(3) with steps chosen for each sample alone, for stiff ODEs.

    Each stage solves ``(I - h J / 4) u_i = h (f(x + sum_j a_ij u_j, t + alpha_i h) + gamma_i h df/dt) / 4 + sum_j c_ij
    u_j / 4`` with the Jacobian ``J`` and ``df/dt`` at the start of the step, by automatic differentiation: ``d + 1``
    derivatives of the drift a step for ``d`` entries of the state, beside 6 evaluations, and nothing has to converge.
    L-stable: fast transients decay in one step of any length. States between steps come from an interpolant of order 3.
    A state of up to four entries is eliminated entry by entry, so that it fuses. Hairer and Wanner 1996, "Solving
    ordinary differential equations II", section VI.4 (RODAS).

    Args:
        rtol: relative tolerance of a step, at least 4 times the rounding error of the state's dtype.
        atol: absolute tolerance of a step.
        max_steps: attempts that a sample may take before `solve` gives up.

    Raises:
        ValueError, TypeError: as `DormandPrince`.

    Example:
        >>> sol = solve(ODE(drift), x0, 0.0, 1.0, solver=Rodas4(rtol=1e-4, atol=1e-7))
    """

    supported = supports(ito=(Noise.NONE,))
    ode_order = 4
    strong_order = None
    weak_order = None
    evaluations = 6
    error_order = 4

    def attempt(self, drift: Slope, x: Tensor, slope: Tensor, t: Tensor, dt: Tensor) -> Attempt:
        h = per_sample(dt.to(x.dtype), x)
        solve = factorised([_GAMMA * h * column for column in jacobian(lambda y: drift(y, t), x)[1]], x)
        # Times of rows are their own, so one derivative along all of them gives that of each.
        by_time = h * h * linearised(lambda s: drift(x, s), t)[1](torch.ones_like(t))
        u, y = [solve(_GAMMA * (h * slope + _BY_TIME[0] * by_time))], x
        for i, row in enumerate(_C):
            if i < len(_A):
                y = x + sum((a * v for a, v in zip(_A[i][1:], u[1:], strict=True)), _A[i][0] * u[0])
            else:
                y = y + u[-1]
            f = h * drift(y, t + (_NODES[i] if i < len(_NODES) else 1.0) * dt)
            right = f + sum((c * v for c, v in zip(row[1:], u[1:], strict=True)), row[0] * u[0])
            right = right + _BY_TIME[i + 1] * by_time if i + 1 < len(_BY_TIME) else right
            u.append(solve(_GAMMA * right))
        after = y + u[-1]
        return Attempt(after, u[-1], (*u[:-1], drift(after, t + dt)))

    def between(self, x: Tensor, attempt: Attempt, dt: Tensor, theta: Tensor) -> Tensor:
        s = per_sample(theta.to(x.dtype), x)
        first, second = (sum(w * u for w, u in zip(row, attempt.slopes[:-1], strict=True)) for row in _DENSE)
        return (1 - s) * x + s * (attempt.x + (1 - s) * (first + s * second))
