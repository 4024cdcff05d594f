"""Single-step samplers of several stages in the noise prediction: what DPM-Solver, DPM2 and EDM's Heun share."""

from __future__ import annotations

import abc
import math
from collections.abc import Sequence
from typing import NamedTuple, final

import torch
from torch import Tensor

from sdesolve._internal.arguments import number, short
from sdesolve.sde import AbstractSemilinear, Noise
from sdesolve.solvers.base import Supported, supports
from sdesolve.solvers.schedule import Schedule
from sdesolve.solvers.tabulated import AbstractTabulated, Evaluate, Row, Table


class Stage(NamedTuple):
    """``y/alpha = x/alpha_0 + sum_j weights_j e_j``: where it ends, and its weights of the noises predicted so far."""

    end: Schedule
    weights: list[Tensor]


class AbstractSingleStep(AbstractTabulated):
    """Explicit Runge-Kutta in ``rho = sigma / alpha``, where the flow of a linear diffusion is ``d(x/alpha) = e drho``.

    ``e = -sigma s`` is the noise predicted. The score is evaluated at the start and at the end of every stage but the
    last, so once a stage; a step to zero noise makes one evaluation, and is Tweedie's formula.
    """

    strong_order = None
    churn: float = 0.0
    churn_range: tuple[float, float] = (0.0, math.inf)
    churn_noise: float = 1.0

    @abc.abstractmethod
    def stages(self, start: Schedule, end: Schedule) -> list[Stage]:
        """The stages of all steps; the last one ends at ``end``."""

    @final
    def table(self, sde: AbstractSemilinear, times: Tensor) -> Table:
        p = Schedule.of(self, sde, times)
        here, end = p.at(times[:-1]), p.at(times[1:])
        start = p.at(self._churned(p, here)) if self.churn else here
        points, rows = [start], []
        for stage in self.stages(start, end):
            alpha = stage.end.alpha
            b = [-alpha * w * point.sigma for w, point in zip(stage.weights, points, strict=True)]
            rows.append(torch.stack([alpha / start.alpha, *b, torch.zeros_like(alpha)], dim=1))
            points.append(stage.end)
        t = torch.stack([point.times for point in points[:-1]], dim=1)
        skipped = torch.zeros(t.shape[:2], dtype=torch.bool, device="cpu")
        if p.ends_clean:
            # Stages inside the last step are not needed; they stay finite for those who cannot leave them out.
            for row in rows:
                row[-1] = 0.0
                row[-1, 0] = 1.0
            scale = end.alpha[-1] / start.alpha[-1]
            rows[-1][-1, 0], rows[-1][-1, 1] = scale, scale * start.sigma[-1].square()
            t[-1, 1:], skipped[-1, 1:] = t[-1, :1], True
        if not self.churn:
            return Table(t, tuple(rows), (False,) * len(rows), skipped)
        added = self.churn_noise * start.alpha * (start.rho.square() - here.rho.square()).clamp(min=0.0).sqrt()
        churn = torch.stack([start.alpha / here.alpha, added], dim=1)
        return Table(t, (churn, *rows), (True, *(False,) * len(rows)), skipped)

    @final
    def advance(
        self, field: Evaluate, rows: Sequence[Row], x: Tensor, memory: tuple[Tensor, ...]
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        if self.churn:
            churn, *rows = rows
            x = churn(x)
        y, s = x, []
        for i, row in enumerate(rows):
            s.append(field(y, i))
            y = row(x, *s)
        return y, memory

    def _churned(self, p: Schedule, here: Schedule) -> Tensor:
        """Times of the noise levels that the steps start from after churning."""
        low, high = self.churn_range
        gain = 1.0 + min(self.churn / (len(p.times) - 1), math.sqrt(2.0) - 1.0)
        churned = (here.rho >= low) & (here.rho <= high)
        end = torch.full_like(here.times, p.process.t_max)
        rho = torch.where(churned, gain * here.rho, here.rho)
        t = p.time_of(-rho.log(), here.times, end)
        return torch.where(churned, t, here.times)


class AbstractChurned(AbstractSingleStep):
    """A second-order method on the flow that may add noise before each step: "churn".

    With churn, each step first goes back to a higher noise level ``rho^ >= rho`` by adding noise of standard deviation
    ``churn_noise sqrt(rho^^2 - rho^2)``: ``rho^ = (1 + min(churn / steps, sqrt(2) - 1)) rho`` where ``rho`` is in
    ``churn_range``, but not above the level where the process ends. As steps get shorter that is a reverse SDE, with a
    stochasticity that depends on time. Exact noise keeps exact marginals, so in law the order is that on the flow, 2,
    once ``churn / steps`` is below ``sqrt(2) - 1``. Karras et al. 2022, algorithm 2.

    Args:
        churn: ``S_churn``; 0 for the flow.
        churn_range: ``(S_min, S_max)``, noise levels ``sigma / alpha``.
        churn_noise: ``S_noise``.

    Raises:
        ValueError: churn is negative or not finite, or its range is no interval; options of churn without churn.
        TypeError: something that is no number, or a range that is not two of them.
    """

    evaluations = 2

    @final
    def __init__(
        self, churn: float = 0.0, churn_range: tuple[float, float] = (0.0, math.inf), churn_noise: float = 1.0
    ) -> None:
        name = type(self).__name__
        if not 0.0 <= number(churn, "churn") < math.inf:
            raise ValueError(f"churn must be at least 0 and finite, got {short(churn)}")
        if not isinstance(churn_range, Sequence) or len(churn_range) != 2:
            raise TypeError(f"churn_range must be two noise levels, (lowest, highest), got {short(churn_range)}")
        if not 0.0 <= number(churn_range[0], "churn_range[0]") <= number(churn_range[1], "churn_range[1]"):
            raise ValueError(f"churn_range is the noise levels (lowest, highest) to churn at, got {short(churn_range)}")
        if not 0.0 < number(churn_noise, "churn_noise") < math.inf:
            raise ValueError(f"churn_noise must be positive and finite, got {short(churn_noise)}")
        if not churn and (churn_range != (0.0, math.inf) or churn_noise != 1.0):
            raise ValueError(f"{name} without churn is deterministic: churn_range and churn_noise need churn > 0")
        self.churn, self.churn_range = float(churn), (float(churn_range[0]), float(churn_range[1]))
        self.churn_noise = float(churn_noise)

    @property
    def supported(self) -> Supported:
        return supports(ito=(Noise.ADDITIVE if self.churn else Noise.NONE,))

    @property
    def stochasticity(self) -> float:
        return 1.0 if self.churn else 0.0

    @property
    def divisible(self) -> bool:
        return not self.churn  # which is shared out among all steps

    @property
    def weak_order(self) -> float | None:
        return 2.0 if self.churn else None

    @property
    def ode_order(self) -> int | None:
        return None if self.churn else 2
