"""Multistep predictor-correctors in the denoised state that make one evaluation a step."""

from __future__ import annotations

import abc
from typing import final

import torch
from torch import Tensor

from sdesolve.solvers.data_prediction import AbstractDataMultistep
from sdesolve.solvers.multistep import exponential_moments, interpolation_weights
from sdesolve.solvers.schedule import Schedule


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
        b = torch.zeros(len(a), self.memory + 1, *a.shape[1:], dtype=torch.float64, device="cpu")
        w, v = self.predicting(schedule), self.correcting(schedule)
        b[:, : w.shape[1]] += w
        if v is not None:
            change = torch.zeros_like(b)
            change[:, : v.shape[1]] += v
            change[:, 1 : w.shape[1] + 1] -= w
            b[1:] += a[1:, None] * change[:-1]
        return b


def exact_weights(p: Schedule, orders: Tensor, *, corrects: bool) -> Tensor:
    """Weights of the polynomials in the log-SNR through as many values as ``orders: (steps,)`` say and, to correct, the
    one ahead: ``(steps, columns[, batch])``, 0 beyond the order of each step."""
    steps, count = torch.arange(len(orders), device="cpu"), int(orders.max())
    before = (steps[:, None] - torch.arange(count, device="cpu")).clamp(min=0)
    nodes = (p.lam[before] - p.lam[:-1, None]) / p.h[:, None]
    if corrects:
        nodes, orders = torch.cat([torch.ones_like(nodes[:, :1]), nodes], dim=1), orders + 1
    moments = exponential_moments((1.0 + p.stochasticity**2) * p.h, nodes.shape[1])
    return p.alpha[1:, None] * interpolation_weights(nodes, moments, orders)
