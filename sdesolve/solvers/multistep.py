"""Weights of multistep schemes: integrals of interpolating polynomials, for all steps of a grid at once."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import torch
from torch import Tensor


def by_order(orders: Tensor, like: Tensor, width: int, weights: Callable[[Tensor, int], Tensor]) -> Tensor:
    """``(steps, width[, batch])`` weights of the newest and earlier values, 0 beyond the order of each step.

    Args:
        orders: of each step, ``(steps,)``.
        like: ``(steps[, batch])``.
        width: number of columns.
        weights: from indices ``(n,)`` of the steps of one order, and that order, to ``(n, columns[, batch])``.
    """
    w = torch.zeros(len(orders), width, *like.shape[1:], dtype=torch.float64, device="cpu")
    for p in orders.unique().tolist():
        at = (orders == p).nonzero()[:, 0]
        some = weights(at, p)
        w[at, : some.shape[1]] = some
    return w


def earlier(u: Tensor, at: Tensor, count: int) -> Tensor:
    """``u_k, u_{k-1}, ..., u_{k-count+1}`` for the steps ``k`` in ``at``: ``(n, count[, batch])``."""
    return torch.stack([u[at - i] for i in range(count)], dim=1)


def interpolation_weights(nodes: Tensor, moments: Tensor, counts: Tensor | None = None) -> Tensor:
    """``b_i`` with ``sum_i b_i nodes_i^m = moments_m`` for ``m = 0 ... p - 1``.

    The integral, against a weight that has these moments, of the polynomial through values at the nodes. Both arguments
    and the result are ``(n, p[, batch])``. With ``counts: (n,)`` only so many of the first nodes of each row are looked
    at, and the other ``b_i`` are 0.
    """
    width = nodes.shape[1]
    V = torch.stack([nodes**m for m in range(width)], dim=1)
    if counts is not None:
        used = (torch.arange(width, device="cpu") < counts[:, None]).reshape(
            len(counts), width, *(1,) * (nodes.ndim - 2)
        )
        eye = torch.eye(width, dtype=V.dtype, device="cpu").reshape(width, width, *(1,) * (nodes.ndim - 2))
        V, moments = torch.where(used[:, None] & used[:, :, None], V, eye), torch.where(used, moments, 0.0)
    if nodes.ndim == 2:
        return torch.linalg.solve(V, moments)
    V, m = V.movedim(-1, 1), moments.movedim(-1, 1)
    return torch.linalg.solve(V, m).movedim(1, -1)


def exponential_moments(eta: Tensor, count: int) -> Tensor:
    """``I_m = int_0^1 eta exp(-eta (1 - u)) u^m du`` for ``m = 0 ... count - 1``, along a new axis 1.

    By parts ``I_m = 1 - m I_{m-1} / eta``, which cancels where ``eta`` is small; there by the series
    ``eta sum_j (-eta)^j m! / (m + j + 1)!``.
    """
    small = eta.abs() < 1.0
    first = -torch.expm1(-eta)
    large, near = torch.where(small, 1.0, eta), torch.where(small, eta, 0.0)
    by_parts = [first]
    for m in range(1, count):
        by_parts.append(1.0 - m * by_parts[-1] / large)
    series = (-near)[..., None] ** torch.arange(_TERMS, device="cpu") @ _series(count) * near[..., None]
    result = torch.where(small[:, None], series.movedim(-1, 1), torch.stack(by_parts, dim=1))
    result[:, 0] = first
    return result


_TERMS = 25


@functools.cache
def _series(count: int) -> Tensor:
    """``m! / (m + j + 1)!`` for ``j < 25``: ``(25, count)``."""
    rows = [[math.factorial(m) / math.factorial(m + j + 1) for m in range(count)] for j in range(_TERMS)]
    return torch.tensor(rows, dtype=torch.float64, device="cpu")
