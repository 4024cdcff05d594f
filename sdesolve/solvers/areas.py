"""Schemes for general noise that may read Levy areas."""

from __future__ import annotations

import torch
from torch import Tensor

from sdesolve._internal.derivatives import Push
from sdesolve._internal.levy_area import Areas, LevyArea
from sdesolve.brownian import Increment, Part
from sdesolve.sde import AbstractSDE, Calculus
from sdesolve.solvers.base import AbstractOneStep, Span


class AbstractWithArea(AbstractOneStep):
    """A scheme that takes Levy areas for general noise, or, without them, general noise that commutes.

    Diagonal noise must have each ``g_i`` depend on ``x_i`` alone, for otherwise it does not commute; such noise can be
    declared as general.

    Args:
        area: how areas are drawn (`LevyArea`); ``None`` for noise that commutes; ``zero`` leaves them out whatever the
            noise, which costs strong order 1/2 where it does not commute and nothing of the weak order: the step of
            antithetic multilevel Monte Carlo (Giles and Szpruch 2014, equation 2.7).
        terms: of a series.

    Raises:
        ValueError: an unknown ``area``, or no terms.
    """

    own_component_diffusion = True

    def __init__(self, area: Areas | None, terms: int) -> None:
        self.area, self.terms = area, terms
        self._drawn = None if area is None or area == "zero" else LevyArea(area, terms)

    @property
    def strong_orders(self) -> tuple[float | None, float | None, float | None]:
        return 1.0, self.strong_order, None if self.area is None else self.strong_order if self._drawn else 0.5

    @property
    def commutative_noise(self) -> bool:
        return self.area is None

    @property
    def needs(self) -> tuple[Part, ...]:
        return ("W",) if self._drawn is None else ("W", self._drawn)


def iterated_integrals(sde: AbstractSDE, span: Span, noise: Increment) -> Tensor:
    """``int W^l dW^k`` of the calculus, ``(batch, channels, channels)``: without areas, the mean of both orders."""
    W = noise.W
    products = 0.5 * W[:, :, None] * W[:, None, :]
    if noise.A is not None:
        products = products + noise.A
    if sde.calculus is Calculus.STRATONOVICH:
        return products
    h = span.dt.abs()
    h = h.reshape(-1, 1, 1) if h.ndim else h
    return products - 0.5 * h * torch.eye(W.shape[1], dtype=W.dtype, device=W.device)


def per_channel(g: Tensor, integrals: Tensor) -> Tensor:
    """``v_k = sum_l g_l I_lk``, ``(batch, *state, channels)``."""
    I = integrals.reshape(len(integrals), *(1,) * (g.ndim - 2), *integrals.shape[1:])  # noqa: E741
    return (g[..., :, None] * I).sum(-2)


def sum_of_columns(push: Push, v: Tensor) -> Tensor:
    """``sum_k (v_k . grad) g_k``, from the derivatives ``push`` of ``g``."""
    return sum((push(v[..., k])[..., k] for k in range(1, v.shape[-1])), push(v[..., 0])[..., 0])
