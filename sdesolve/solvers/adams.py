"""Adams-Bashforth samplers in the noise prediction: plain linear multistep and DEIS."""

from __future__ import annotations

import abc
from collections.abc import Sequence
from typing import final

import numpy as np
import torch
from torch import Tensor

from sdesolve.sde import AbstractSemilinear, Noise
from sdesolve.solvers.base import supports
from sdesolve.solvers.multistep import by_order, earlier, interpolation_weights
from sdesolve.solvers.schedule import Schedule, check_order
from sdesolve.solvers.tabulated import AbstractTabulated, Evaluate, Row, Table, none_skipped

_GAUSS = 64


class AbstractNoiseMultistep(AbstractTabulated):
    """``x'/alpha' = x/alpha + sum_i C_i e_i`` with the noises ``e = -sigma s`` predicted at this and earlier steps.

    The flow of any linear diffusion is ``d(x/alpha) = e drho``, ``rho = sigma / alpha``; ``C_i`` integrate the
    polynomial through the ``e_i`` against ``drho``. One evaluation a step; order ``order``, given as many starting
    values. The first steps have the order that the history allows: where they are not shorter than the others, the
    first one's error shows as order 2 in all. A step to zero noise is Tweedie's formula.
    """

    supported = supports(ito=(Noise.NONE,))
    strong_order = None
    weak_order = None
    evaluations = 1

    def __init__(self, order: int = 3) -> None:
        self.order = check_order(order, 4, type(self).__name__)

    @property
    def ode_order(self) -> int:
        return self.order

    @property
    def memory(self) -> int:
        return self.order - 1

    @abc.abstractmethod
    def variable(self, p: Schedule) -> Tensor:
        """The variable ``u`` that the polynomial is one of, at the grid times."""

    @abc.abstractmethod
    def moments(self, p: Schedule, count: int) -> Tensor:
        """``int v^m drho`` for ``m = 0 ... count - 1`` along axis 1, where ``v`` goes from 0 to 1 with ``u``."""

    @final
    def table(self, sde: AbstractSemilinear, times: Tensor) -> Table:
        p = Schedule.of(self, sde, times)
        u, moments = self.variable(p), self.moments(p, self.order)

        def weights(at: Tensor, order: int) -> Tensor:
            nodes = (earlier(u, at, order) - u[at][:, None]) / (u[at + 1] - u[at])[:, None]
            return -earlier(p.sigma, at, order) * interpolation_weights(nodes, moments[at, :order])

        C = by_order(p.orders(self.order), p.h, self.order, weights)
        alpha = p.alpha[1:]
        row = torch.cat([(alpha / p.alpha[:-1])[:, None], alpha[:, None] * C, torch.zeros_like(C[:, :1])], dim=1)
        return Table(times[:-1, None], (row,), (False,), none_skipped(times, 1))

    @final
    def advance(
        self, field: Evaluate, rows: Sequence[Row], x: Tensor, memory: tuple[Tensor, ...]
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        (row,) = rows
        s = field(x)
        return row(x, s, *memory), (s, *memory)[: len(memory)]


@final
class LinearMultistep(AbstractNoiseMultistep):
    """Adams-Bashforth in ``rho = sigma / alpha`` ("LMS"), of order 1 to 4: one evaluation a step. Order 1 is DDIM.

    On processes with ``alpha = 1`` the linear multistep method of Liu et al. 2022 with weights for any grid; DEIS in
    ``rho`` (Zhang and Chen 2023, section 3, rho-AB).

    Args:
        order: 1 to 4.
    """

    def variable(self, p: Schedule) -> Tensor:
        return p.rho

    def moments(self, p: Schedule, count: int) -> Tensor:
        d = p.rho.diff(dim=0)
        return torch.stack([d / (m + 1) for m in range(count)], dim=1)


@final
class DEIS(AbstractNoiseMultistep):
    """DEIS with polynomials in time (tAB), of order 1 to 4: one evaluation a step. Order 1 is DDIM.

    Zhang and Chen 2023, eq. 14 and 15, with integrals by quadrature.

    Args:
        order: 1 to 4.
    """

    def variable(self, p: Schedule) -> Tensor:
        return p.times

    def moments(self, p: Schedule, count: int) -> Tensor:
        # By parts: int v^m drho = int m v^(m - 1) (rho' - rho(v)) dv.
        nodes, weights = np.polynomial.legendre.leggauss(_GAUSS)
        end, moments = p.rho[1:], [p.rho.diff(dim=0)] + [torch.zeros_like(p.h)] * (count - 1)
        for node, weight in zip(nodes.tolist(), weights.tolist(), strict=True):
            v = 0.5 * (1.0 + node)
            rest = end - p.at(p.times[:-1] + v * p.times.diff(dim=0)).rho
            for m in range(1, count):
                moments[m] = moments[m] + 0.5 * weight * m * v ** (m - 1) * rest
        return torch.stack(moments, dim=1)
