"""Exponential multistep schemes that extrapolate the denoised state in the log-SNR."""

from __future__ import annotations

import abc
from collections.abc import Sequence
from typing import final

import torch
from torch import Tensor

from sdesolve.sde import AbstractSemilinear, Noise
from sdesolve.solvers.schedule import Schedule, deviation
from sdesolve.solvers.tabulated import AbstractTabulated, Evaluate, Row, Table, none_skipped


class AbstractDataMultistep(AbstractTabulated):
    r"""``x' = a x + sum_i b_i D_i + c z``, with ``D = (x + sigma^2 s) / alpha`` of this and earlier steps.

    With ``lam = log(alpha / sigma)``, a step of length ``h`` in it, and stochasticity ``q`` (0 for the flow), reverse
    SDE and flow are solved exactly by

        ``x' = sigma'/sigma e^(-q^2 h) x + alpha' int_0^h (1 + q^2) e^(-(1 + q^2)(h - u)) D(lam + u) du
        + sigma' sqrt(1 - e^(-2 q^2 h)) z``

    and the schemes differ in how they integrate ``D``, of which all they know is the present and past values. One
    evaluation a step. Lu et al. 2022 (DPM-Solver++), eq. 9 and appendix A; Xue et al. 2023 (SA-Solver), eq. 13.
    """

    @abc.abstractmethod
    def weights(self, schedule: Schedule, a: Tensor) -> Tensor:
        """``b``, ``(steps, memory + 1[, batch])``, newest first; ``a`` is the coefficient of ``x``."""

    @final
    def table(self, sde: AbstractSemilinear, times: Tensor) -> Table:
        p = Schedule.of(self, sde, times)
        denoise = torch.stack([1.0 / p.alpha, p.sigma.square() / p.alpha, torch.zeros_like(p.alpha)], dim=1)[:-1]
        return self._moved(p, denoise, noisy=sde.noise is not Noise.NONE)

    @final
    def denoised_table(self, sde: AbstractSemilinear, times: Tensor) -> Table:
        p = Schedule.of(self, sde, times, from_noise=True)
        denoise = torch.stack([torch.zeros_like(p.h), torch.ones_like(p.h), torch.zeros_like(p.h)], dim=1)
        return self._moved(p, denoise, noisy=sde.noise is not Noise.NONE)

    def _moved(self, p: Schedule, denoise: Tensor, *, noisy: bool) -> Table:
        sigma, q2h = p.sigma, p.stochasticity**2 * p.h
        a = sigma[1:] / sigma[:-1] * torch.exp(-q2h)
        c = sigma[1:] * deviation(-torch.expm1(-2.0 * q2h))
        move = torch.cat([a[:, None], self.weights(p, a), c[:, None]], dim=1)
        return Table(p.times[:-1, None], (denoise, move), (False, noisy), none_skipped(p.times, 1))

    @final
    def advance(
        self, field: Evaluate, rows: Sequence[Row], x: Tensor, memory: tuple[Tensor, ...]
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        denoise, move = rows
        D = denoise(x, field(x))
        return move(x, D, *memory), (D, *memory)[: len(memory)]
