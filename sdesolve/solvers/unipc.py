"""UniPC."""

from __future__ import annotations

from typing import Literal, final

import torch
from torch import Tensor

from sdesolve._internal.arguments import short
from sdesolve.sde import Noise
from sdesolve.solvers.base import supports
from sdesolve.solvers.data_predictor_corrector import AbstractPredictorCorrectorMultistep, exact_weights
from sdesolve.solvers.schedule import Schedule, check_order


@final
class UniPC(AbstractPredictorCorrectorMultistep):
    """UniPC for the probability flow, in the denoised state: multistep, one evaluation a step, order ``order + 1``.

    The predictor of order ``order`` (UniP) and the corrector that raises it by one (UniC) integrate interpolating
    polynomials in the log-SNR exactly, but for the two cases in which the paper fixes a coefficient at 1/2, where
    ``B(h)`` is ``h`` (``"bh1"``) or ``e^h - 1`` (``"bh2"``). Zhao et al. 2023, algorithms 5 to 8.

    The first steps have the order that the history allows: where they are not shorter than the others, the first one's
    error shows as order 3 in all.

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
            raise ValueError(f"variant must be 'bh1' or 'bh2', got {short(variant)}")
        self.order, self.variant = check_order(order, 3, type(self).__name__), variant

    @property
    def ode_order(self) -> int:
        return self.order + 1

    @property
    def memory(self) -> int:
        return self.order

    def predicting(self, p: Schedule) -> Tensor:
        orders = p.orders(self.order)
        w, at = exact_weights(p, orders, corrects=False), (orders == 2).nonzero()[:, 0]
        if len(at):
            I0, half_slope = -torch.expm1(-p.h[at]), 0.5 * self._B(p)[at] * p.h[at] / p.h[at - 1]
            w[at, :2] = p.alpha[at + 1][:, None] * torch.stack([I0 + half_slope, -half_slope], dim=1)
        return w

    def correcting(self, p: Schedule) -> Tensor | None:
        orders = p.orders(self.order)
        w, at = exact_weights(p, orders, corrects=True), (orders == 1).nonzero()[:, 0]
        half = 0.5 * self._B(p)[at]
        w[at, :2] = p.alpha[at + 1][:, None] * torch.stack([half, -torch.expm1(-p.h[at]) - half], dim=1)
        return w

    def _B(self, p: Schedule) -> Tensor:
        if self.variant == "bh1" and bool((p.alpha[0] == 0).any()):
            raise ValueError(
                "UniPC of variant='bh1' goes by the length of a step, infinite from pure noise on; take 'bh2'"
            )
        return p.h if self.variant == "bh1" else -torch.expm1(-p.h)
