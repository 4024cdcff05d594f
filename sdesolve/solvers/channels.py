"""The diffusion of a step column by column, for schemes that take each column at a state of its own."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import final

import torch
from torch import Tensor

from sdesolve.brownian import Increment
from sdesolve.sde import AbstractSDE, Noise, is_matrix


@final
class Channels:
    """Columns ``g_k`` and increments ``W_k`` of a step, each ``(batch, *state)`` or broadcastable to it.

    Scalar and diagonal noise is one column: where each ``g_i`` depends on ``x_i`` alone, what is elementwise does for
    all channels what it does for one.

    Attributes:
        f: the drift at the start of the step.
        g: the columns at the start of the step.
        W: increments.
        S: two-point numbers, likewise.
    """

    def __init__(self, sde: AbstractSDE, x: Tensor, t: Tensor, noise: Increment) -> None:
        self._sde, self._x = sde, x
        self.f, g = sde.drift_and_diffusion(x, t)
        self._matrix = is_matrix(g, x)
        self.g = list(g.unbind(-1)) if self._matrix else [g]
        assert noise.S is not None
        self.S = self._of_channels(noise.S)
        self.W = self._of_channels(noise.W) if self._matrix else [noise.W]

    def __len__(self) -> int:
        return len(self.g)

    def columns(self, states: Sequence[Tensor], t: Tensor) -> list[Tensor]:
        """``g_k(states_k, t)``."""
        if not self._matrix:
            return [self._sde.diffusion(states[0], t)]
        if self._sde.noise is Noise.ADDITIVE:
            return list(self._sde.diffusion(self._x, t).unbind(-1))
        return [self._sde.diffusion(y, t)[..., k] for k, y in enumerate(states)]

    def product(self, columns: Sequence[Tensor]) -> Tensor:
        """``sum_k g_k W_k``."""
        total = columns[0] * self.W[0]
        for g, W in zip(columns[1:], self.W[1:], strict=True):
            total = total + g * W
        return total

    def mixed(self, k: int, columns: Sequence[Tensor], root_h: Tensor) -> Tensor:
        """``sum_{l != k} g_l I_kl / sqrt|h|`` with the two-point ``I_kl`` of `AbstractWeakTable`."""
        terms = [
            g * (0.5 * (self.W[k] * self.W[l] / root_h + root_h * (-self.S[k] if k < l else self.S[l])))
            for l, g in enumerate(columns)  # noqa: E741
            if l != k
        ]
        return functools.reduce(torch.add, terms)

    def _of_channels(self, numbers: Tensor) -> list[Tensor]:
        ones = (1,) * (self._x.ndim - 1)
        return [z.reshape(len(z), *ones) for z in numbers.unbind(1)]
