"""Multistep predictor-correctors in the denoised state with one evaluation a step: UniPC and SA-Solver."""

from __future__ import annotations

import abc
from typing import Literal, final

import torch
from torch import Tensor

from sdesolve.grids import whole_number
from sdesolve.sde import Noise
from sdesolve.solvers.base import supports
from sdesolve.solvers.data_prediction import AbstractDataMultistep
from sdesolve.solvers.multistep import by_order, earlier, exponential_moments, interpolation_weights
from sdesolve.solvers.schedule import Schedule, check_order


class AbstractPredictorCorrectorMultistep(AbstractDataMultistep):
    """Predicts with weights ``w`` of past values, and when the value there is known corrects with weights ``v``.

    Both share the linear part and the noise of a step, so the corrected state is the predicted one plus
    ``sum_i (v_i - w_i) D_i``, and the next prediction starts from it: one row over present and past values does both.
    The last state is a prediction, which nothing evaluated at its end corrects.
    """

    @abc.abstractmethod
    def predicting(self, p: Schedule) -> Tensor:
        """``w`` for each step: of the values at its start, and before, ``(steps, columns[, batch])``."""

    @abc.abstractmethod
    def correcting(self, p: Schedule) -> Tensor | None:
        """``v`` for each step: of the values at its end, at its start, and before; ``None`` to leave it out."""

    @final
    def weights(self, schedule: Schedule, a: Tensor) -> Tensor:
        b = torch.zeros(len(a), self.memory + 1, *a.shape[1:], dtype=torch.float64)
        w, v = self.predicting(schedule), self.correcting(schedule)
        b[:, : w.shape[1]] += w
        if v is not None:
            change = v.clone()
            change[:, 1 : w.shape[1] + 1] -= w[:, : v.shape[1] - 1]
            b[1:, : v.shape[1]] += a[1:, None] * change[:-1]
        return b


@final
class UniPC(AbstractPredictorCorrectorMultistep):
    """UniPC for the probability flow, in the denoised state: multistep, one evaluation a step, order ``order + 1``.

    The predictor of order ``order`` (UniP) and the corrector that raises it by one (UniC) integrate interpolating
    polynomials in the log-SNR exactly, but for the two cases in which the paper fixes a coefficient at 1/2, where
    ``B(h)`` is ``h`` (``"bh1"``) or ``e^h - 1`` (``"bh2"``). Zhao et al. 2023, algorithms 5 to 8.

    The first steps have the order that the history allows.

    Args:
        order: 1, 2 or 3.
        variant: ``"bh1"`` or ``"bh2"``.
    """

    supported = supports(ito=(Noise.NONE,))
    strong_order = None
    weak_order = None
    evaluations = 1

    def __init__(self, order: int = 3, variant: Literal["bh1", "bh2"] = "bh2") -> None:
        if variant not in ("bh1", "bh2"):
            raise ValueError(f"variant must be 'bh1' or 'bh2', got {variant!r}")
        self.order, self.variant = check_order(order, 3, type(self).__name__), variant
        self.memory, self.ode_order = order, order + 1

    def predicting(self, p: Schedule) -> Tensor:
        B = self._B(p)

        def weights(at: Tensor, order: int) -> Tensor:
            if order != 2:
                return _exact(p, at, order, corrects=False)
            I0, half_slope = -torch.expm1(-p.h[at]), 0.5 * B[at] * p.h[at] / p.h[at - 1]
            return p.alpha[at + 1][:, None] * torch.stack([I0 + half_slope, -half_slope], dim=1)

        return by_order(p.orders(self.order), p.h, self.order, weights)

    def correcting(self, p: Schedule) -> Tensor | None:
        B = self._B(p)

        def weights(at: Tensor, order: int) -> Tensor:
            if order != 1:
                return _exact(p, at, order, corrects=True)
            half = 0.5 * B[at]
            return p.alpha[at + 1][:, None] * torch.stack([half, -torch.expm1(-p.h[at]) - half], dim=1)

        return by_order(p.orders(self.order), p.h, self.order + 1, weights)

    def _B(self, p: Schedule) -> Tensor:
        return p.h if self.variant == "bh1" else -torch.expm1(-p.h)


@final
class SASolver(AbstractPredictorCorrectorMultistep):
    """SA-Solver: stochastic Adams predictor-corrector in the denoised state, one evaluation a step.

    Interpolating polynomials in the log-SNR are integrated exactly against the reverse SDE of any stochasticity, or the
    flow. On the flow of order ``max(predictor, corrector + 1)``; on an SDE of weak order at most 2, with an error that
    falls with the stochasticity. Without corrector, and on the flow, ``predictor=3`` is DPM-Solver++ of true third
    order. Xue et al. 2023, eq. 14 to 18 and algorithm 1.

    The first steps have the order that the history allows.

    Args:
        predictor: order of the predictor, 1 to 4: the number of values that it looks at.
        corrector: likewise of the corrector, which looks at one more: 0 (no corrector) to 3.
    """

    supported = supports(ito=(Noise.NONE, Noise.ADDITIVE))
    strong_order = None
    evaluations = 1

    def __init__(self, predictor: int = 3, corrector: int = 3) -> None:
        name = type(self).__name__
        self.predictor = check_order(predictor, 4, name)
        self.corrector = whole_number(corrector, "corrector", 0)
        if corrector > 3:
            raise ValueError(f"{name} has correctors of order 0 (none) to 3, got {corrector}")
        self.memory = max(predictor - 1, corrector)
        self.ode_order = max(predictor, corrector + 1 if corrector else 0)
        self.weak_order = min(2.0, self.ode_order)

    def predicting(self, p: Schedule) -> Tensor:
        orders = p.orders(self.predictor)
        return by_order(orders, p.h, self.predictor, lambda at, k: _exact(p, at, k, corrects=False))

    def correcting(self, p: Schedule) -> Tensor | None:
        if not self.corrector:
            return None
        orders = p.orders(self.corrector)
        return by_order(orders, p.h, self.corrector + 1, lambda at, k: _exact(p, at, k, corrects=True))


def _exact(p: Schedule, at: Tensor, order: int, *, corrects: bool) -> Tensor:
    """Weights of the polynomial in the log-SNR through ``order`` values and, to correct, the one ahead."""
    h = p.h[at]
    nodes = (earlier(p.lam, at, order) - p.lam[at][:, None]) / h[:, None]
    if corrects:
        nodes = torch.cat([torch.ones_like(nodes[:, :1]), nodes], dim=1)
    moments = exponential_moments((1.0 + p.stochasticity**2) * h, nodes.shape[1])
    return p.alpha[at + 1][:, None] * interpolation_weights(nodes, moments)
