"""Solvers whose step is one evaluation and one row."""

from __future__ import annotations

from collections.abc import Sequence
from typing import final

import torch
from torch import Tensor

from sdesolve.sde import AbstractSemilinear, Noise
from sdesolve.solvers.schedule import Schedule
from sdesolve.solvers.tabulated import AbstractTabulated, Evaluate, Row, Table, none_skipped


class AbstractSingleRow(AbstractTabulated):
    """``x <- a x + b s(x, t) + c z``: one evaluation and one row a step."""

    @final
    def advance(
        self, field: Evaluate, rows: Sequence[Row], x: Tensor, memory: tuple[Tensor, ...]
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        (row,) = rows
        return row(x, field(x)), memory


def single_row(times: Tensor, a: Tensor, b: Tensor, c: Tensor, *, noisy: bool) -> Table:
    """The table of an `AbstractSingleRow` that evaluates the field at the start of each step."""
    return Table(times[:-1, None], (torch.stack([a, b, c], dim=1),), (noisy,), none_skipped(times, 1))


def transition_variance(p: Schedule) -> Tensor:
    """``sigma^2 - (alpha sigma' / alpha')^2``, of the forward transition over each step."""
    return p.alpha[:-1].square() * (p.rho[:-1] - p.rho[1:]) * (p.rho[:-1] + p.rho[1:])


def clean_end(p: Schedule, a: Tensor, b: Tensor, c: Tensor, sde: AbstractSemilinear) -> Table:
    """The table of rows ``(a, b, c)``, with Tweedie's formula for a step to zero noise."""
    clean = p.sigma[1:] == 0
    scale = p.alpha[1:] / p.alpha[:-1]
    a, b = torch.where(clean, scale, a), torch.where(clean, scale * p.sigma[:-1].square(), b)
    return single_row(p.times, a, b, torch.where(clean, 0.0, c), noisy=sde.noise is not Noise.NONE)
