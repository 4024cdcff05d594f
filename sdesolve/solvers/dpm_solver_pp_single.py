"""DPM-Solver++ of second order in a single step, for the probability flow and for reverse SDEs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import final

import torch
from torch import Tensor

from sdesolve.sde import AbstractSemilinear, Noise
from sdesolve.solvers.base import supports
from sdesolve.solvers.schedule import Schedule, deviation
from sdesolve.solvers.tabulated import AbstractTabulated, Evaluate, Row, Table


class AbstractDataMidpoint(AbstractTabulated):
    """The exponential midpoint method in the denoised state ``D``, with the midpoint in the log-SNR.

    With the coefficients ``a, b, c`` of one exponential step with constant ``D`` (`AbstractDataMultistep`), over the
    first half, the second half and the whole of a step,

        ``u = a_1 x + b_1 D(x) + c_1 z_1`` and ``x' = a x + b D(u) + (a_2 c_1 z_1 + c_2 z_2)``.

    The noise of the whole step is that of its halves put together, so that the path that ``u`` is on is the path of
    ``x'``: with draws of their own for ``u`` and ``x'`` the weak order drops to 1. As ``a = a_2 a_1``, the last line is
    ``x' = a_2 (u - b_1 D(x)) + b D(u) + c_2 z_2``. Two evaluations a step, one for a step to zero noise.
    Lu et al. 2022 (DPM-Solver++), algorithm 1.
    """

    strong_order = None
    evaluations = 2

    @final
    def table(self, sde: AbstractSemilinear, times: Tensor) -> Table:
        p = Schedule.of(self, sde, times)
        here, end = p.at(times[:-1]), p.at(times[1:])
        t = p.time_of(here.lam + 0.5 * (end.lam - here.lam), here.times, end.times)
        if p.ends_clean:
            t[-1] = here.times[-1]
        middle = p.at(t)
        a1, b1, c1 = _exponential_step(p, here, middle)
        a2, _, c2 = _exponential_step(p, middle, end)
        _, b, _ = _exponential_step(p, here, end)
        # D(x) = (x + sigma^2 s) / alpha written out, which leaves two rows a step.
        before, ahead = -a2 * b1 / here.alpha, b / middle.alpha
        half = torch.stack([a1 + b1 / here.alpha, b1 * here.sigma.square() / here.alpha, c1], dim=1)
        rest = torch.stack([a2 + ahead, before, before * here.sigma.square(), ahead * middle.sigma.square(), c2], dim=1)
        skipped = torch.zeros(len(times) - 1, 2, dtype=torch.bool, device="cpu")
        if p.ends_clean:
            scale = end.alpha[-1] / here.alpha[-1]
            half[-1], rest[-1] = 0.0, 0.0
            half[-1, 0], rest[-1, 1], rest[-1, 2] = 1.0, scale, scale * here.sigma[-1].square()
            skipped[-1, 1] = True
        noisy = sde.noise is not Noise.NONE
        return Table(torch.stack([here.times, t], dim=1), (half, rest), (noisy, noisy), skipped)

    @final
    def advance(
        self, field: Evaluate, rows: Sequence[Row], x: Tensor, memory: tuple[Tensor, ...]
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        half, rest = rows
        s = field(x, 0)
        u = half(x, s)
        return rest(u, x, s, field(u, 1)), memory


@final
class DPMSolverPP2S(AbstractDataMidpoint):
    """DPM-Solver++(2S): the exponential midpoint method on the probability flow (`AbstractDataMidpoint`), order 2."""

    supported = supports(ito=(Noise.NONE,))
    weak_order = None
    ode_order = 2


@final
class SDEDPMSolverPP2S(AbstractDataMidpoint):
    """SDE-DPM-Solver++(2S) for reverse SDEs of any stochasticity, with nested noise (`AbstractDataMidpoint`).

    Weak order 2. Two draws of noise a step, one for each half.
    """

    supported = supports(ito=(Noise.ADDITIVE,))
    weak_order = 2.0
    ode_order = None


def _exponential_step(p: Schedule, start: Schedule, end: Schedule) -> tuple[Tensor, Tensor, Tensor]:
    """``a, b, c`` of ``x' = a x + b D + c z``, exact for constant ``D``."""
    h, q2 = end.lam - start.lam, p.stochasticity**2
    a = end.sigma / start.sigma * torch.exp(-q2 * h)
    return a, -end.alpha * torch.expm1(-(1.0 + q2) * h), end.sigma * deviation(-torch.expm1(-2.0 * q2 * h))
