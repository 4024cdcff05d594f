"""A schedule from the table of a discrete chain, as other packages keep them."""

from __future__ import annotations

import math
import struct
from typing import final

import torch
from torch import Tensor
from torch._C._functorch import is_functorch_wrapped_tensor as is_wrapped

from sdesolve._internal.arguments import real, whole_number
from sdesolve._internal.copies import Copies
from sdesolve.diffusions.base import as_time
from sdesolve.diffusions.vp import AbstractBetaSchedule


@final
class TableBeta(AbstractBetaSchedule):
    """``alpha(k)^2 = alphas_cumprod[k - 1]`` at the steps ``k = 1 ... N`` of a chain, for ``VP(TableBeta(...))``.

    Time counts steps, so that every step is a float32 number: 0 is clean data, ``t_max = N``, and a network of a chain
    whose steps are counted from 0 is called at ``t - 1``. Between steps the integral of the rate is linear; the rate
    at a step is that of the interval before it. In a last interval that ends at ``alpha = 0`` it is ``alpha`` that is
    linear.

    Args:
        alphas_cumprod: ``(N,)``, decreasing, within (0, 1); the last may be 0, for a zero terminal signal-to-noise
            ratio.
        zero_terminal_snr: shift and scale ``alpha`` so that it ends at 0 and begins as it did (Lin et al. 2024,
            algorithm 1).

    Raises:
        ValueError: another shape, or numbers that do not decrease within these bounds.
    """

    t_min = 1.0

    def __init__(self, alphas_cumprod: Tensor, *, zero_terminal_snr: bool = False) -> None:
        square = real(alphas_cumprod, "alphas_cumprod")
        if square.ndim != 1 or len(square) < 2:
            raise ValueError(f"alphas_cumprod must be (steps,) with at least 2 steps, got shape {tuple(square.shape)}")
        down = torch.cat([square.new_ones(1), square]).diff() < 0
        if not bool(down.all()) or float(square[-1]) < 0.0:
            k = len(square) - 1 if bool(down.all()) else int((~down).nonzero()[0])
            hint = "; betas are made one by (1 - betas).cumprod(0)" if bool((square < 0.5).all()) else ""
            raise ValueError(
                f"alphas_cumprod must decrease from below 1 to at least 0, and entry {k} is {float(square[k]):.6g} "
                f"after {float(square[k - 1]) if k else 1.0:.6g}{hint}"
            )
        if zero_terminal_snr:
            alpha = square.sqrt()
            square = ((alpha - alpha[-1]) * (alpha[0] / (alpha[0] - alpha[-1]))).square()
        integral = torch.cat([square.new_zeros(1), -square.log()])
        # Numbers as bytes: what searches objects for networks, or looks whether they have changed, takes them for one.
        self._integral, self._listed = Copies(integral), struct.pack(f"{len(integral)}d", *integral.tolist())
        self.steps, self.t_max = len(square), float(len(square))

    def beta(self, t: Tensor) -> Tensor:
        B, k, w = self._place(t)
        slope = B[k + 1] - B[k]
        return torch.where(slope.isinf(), 2.0 / (1.0 - w), slope).to(t.dtype)

    def integral(self, t: Tensor) -> Tensor:
        if type(t) is Tensor and t.ndim == 0 and t.is_cpu and not t.requires_grad and not is_wrapped(t):
            time = float(t)  # of a step of a sampler: ten operations on one number cost as much as a small network
            if 0.0 <= time <= self.steps:
                before = max(0, math.ceil(time) - 1)
                start, end = struct.unpack_from("2d", self._listed, 8 * before)
                if end != math.inf:
                    return torch.tensor(start + (time - before) * (end - start), dtype=t.dtype, device=t.device)
        B, k, w = self._place(t)
        step = B[k + 1] - B[k]
        return (B[k] + torch.where(step.isinf(), -2.0 * torch.log1p(-w), w * torch.where(step.isinf(), 0.0, step))).to(
            t.dtype
        )

    def time_at_integral(self, integral: Tensor) -> Tensor:
        value = integral.double()
        B = self._integral.like(value)
        k = (torch.searchsorted(B, value.contiguous()) - 1).clamp(0, self.steps - 1)
        rest, step = value - B[k], B[k + 1] - B[k]
        w = torch.where(step.isinf(), -torch.expm1(-0.5 * rest), rest / step)
        return (k + w).to(integral.dtype)

    def time_grid(self, steps: int) -> Tensor:
        """Whole steps from ``N`` to 1, as evenly as they go; `grids.timesteps` has other spacings."""
        if whole_number(steps, "steps", 1) >= self.steps:
            raise ValueError(
                f"a table of {self.steps} steps has at most {self.steps - 1} between its ends, got {steps}"
            )
        return torch.linspace(self.t_max, self.t_min, steps + 1, dtype=torch.float64).round()

    def __repr__(self) -> str:
        first, last = (float((-self.integral(as_time(k))).exp()) for k in (1.0, self.t_max))
        return f"TableBeta({self.steps} steps, alphas_cumprod {first:.6g} ... {last:.6g})"

    def _place(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The table, the step below ``t`` or at its left, and how far ``t`` is beyond it, in [0, 1]."""
        time = t.double()
        k = (time.ceil().long() - 1).clamp(0, self.steps - 1)
        return self._integral.like(time), k, time - k
