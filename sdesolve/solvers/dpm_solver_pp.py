"""DPM-Solver++, multistep, for the probability flow and for reverse SDEs."""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor

from sdesolve.sde import Noise
from sdesolve.solvers.base import supports
from sdesolve.solvers.data_prediction import AbstractDataMultistep
from sdesolve.solvers.multistep import by_order, exponential_moments
from sdesolve.solvers.schedule import Schedule, check_order


@final
class DPMSolverPP(AbstractDataMultistep):
    """DPM-Solver++ of Lu et al. 2022 for the probability flow, multistep ("2M", "3M"): one evaluation a step.

    The denoised state is expanded in the log-SNR about the start of the step, with backward differences for its
    derivatives. Order 1 is DDIM. Order 2 has order 2 (algorithm 2). Order 3 takes the third-order form of the same
    paper's appendix, which carries half of the quadratic term that third order needs: it converges with order 2, with a
    fifth of the error of order 2 on a uniform log-SNR grid. `SASolver` has a true third order.

    The first steps have the order that the history allows.

    Args:
        order: 1, 2 or 3.
    """

    supported = supports(ito=(Noise.NONE,))
    strong_order = None
    weak_order = None
    evaluations = 1

    def __init__(self, order: int = 2) -> None:
        self.order = check_order(order, 3, type(self).__name__)

    @property
    def ode_order(self) -> int:
        return min(self.order, 2)

    @property
    def memory(self) -> int:
        return self.order - 1

    def weights(self, schedule: Schedule, a: Tensor) -> Tensor:
        return _expansion(schedule, self.order)


@final
class SDEDPMSolverPP(AbstractDataMultistep):
    """SDE-DPM-Solver++ for reverse SDEs of any stochasticity, multistep ("2M SDE", "3M SDE"): one evaluation a step.

    As `DPMSolverPP`, with the linear part and the noise of the SDE integrated exactly. Order 1 is ancestral sampling.
    Weak order 1, 2 and 2. Lu et al. 2022, appendix A.

    Args:
        order: 1, 2 or 3.
    """

    supported = supports(ito=(Noise.ADDITIVE,))
    strong_order = None
    ode_order = None
    evaluations = 1

    def __init__(self, order: int = 2) -> None:
        self.order = check_order(order, 3, type(self).__name__)

    @property
    def weak_order(self) -> float:
        return float(min(self.order, 2))

    @property
    def memory(self) -> int:
        return self.order - 1

    def weights(self, schedule: Schedule, a: Tensor) -> Tensor:
        return _expansion(schedule, self.order)


def _expansion(p: Schedule, order: int) -> Tensor:
    h = p.h
    eta = (1.0 + p.stochasticity**2) * h

    def weights(at: Tensor, order: int) -> Tensor:
        I0, I1, I2 = exponential_moments(eta[at], 3).unbind(1)
        D = torch.eye(order, dtype=torch.float64, device="cpu").reshape(order, order, *(1,) * (h.ndim))
        w = I0 * D[0]
        if order > 1:
            r0 = h[at - 1] / h[at]
            first = (D[0] - D[1]) / r0
        if order == 2:
            w = w + 0.5 * I0 * first
        if order == 3:
            r1 = h[at - 2] / h[at]
            before = (D[1] - D[2]) / r1
            second = (first - before) / (r0 + r1)
            w = w + I1 * (first + r0 * second) + 0.5 * I2 * second
        return w.movedim(1, 0) * p.alpha[at + 1][:, None]

    return by_order(p.orders(order), h, order, weights)
