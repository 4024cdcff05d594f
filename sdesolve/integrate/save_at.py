"""Which states an integration keeps, on grid points and between them."""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor

from sdesolve._internal.arguments import kind_of
from sdesolve.sde import per_sample

SaveAt = Sequence[float] | Tensor | Literal["grid"] | None
Observable = Callable[[Tensor], Tensor]

_SAME_TIME = 1e-9  # of the length of the grid: nearer than this, a time is a grid point


class SavePlan:
    """Where each requested time lies on the grid, and the states found there.

    A time on the grid keeps the solver's own state. One inside a step, between ``x_k`` and ``x_{k+1}``, gets

    - for an SDE ``x_k + theta (x_{k+1} - x_k) + g(x_k, t_k) sqrt|dt| b(theta)`` with the Brownian bridge ``b`` of that
      very path: the chord alone has too little variance (at mid-step of a Wiener path, half of it);
    - for an ODE the cubic Hermite polynomial through both states and both slopes, of local order 4.

    Args:
        grid: ``(steps + 1,)`` or ``(steps + 1, batch)``, float64.
        save_at: times, in the direction of integration; ``"grid"`` for every grid point; ``None`` for the end alone.
        observable: what to keep of a state instead of all of it, ``(batch, *state) -> (batch, *values)``.
        moments: keep mean and variance over the batch instead of every path.

    Raises:
        ValueError: a time outside the grid or out of order; times inside steps on a grid with a time per sample.
        TypeError: ``observable`` cannot be called.
    """

    def __init__(
        self, grid: Tensor, save_at: SaveAt, observable: Observable | None = None, *, moments: bool = False
    ) -> None:
        if observable is not None and not callable(observable):
            raise TypeError(f"observable must be a function of x, got {kind_of(observable)}")
        steps = len(grid) - 1
        self.observable, self.moments = observable, moments
        self.on_grid: dict[int, list[int]] = defaultdict(list)
        self.inside: dict[int, list[tuple[int, float]]] = defaultdict(list)
        self._states: list[Tensor | None]
        self._variances: list[Tensor | None]
        if save_at is None or isinstance(save_at, str):
            if isinstance(save_at, str) and save_at != "grid":
                raise ValueError(f'save_at takes times, "grid" or None, got {save_at!r}')
            wanted = range(steps + 1) if save_at == "grid" else [steps]
            self.ts = grid[list(wanted)]
            for slot, k in enumerate(wanted):
                self.on_grid[k].append(slot)
        else:
            self.ts = torch.as_tensor(save_at, dtype=torch.float64, device="cpu")
            self._place(grid)
        self._states = [None] * len(self.ts)
        self._variances = [None] * len(self.ts)

    def _keep(self, slot: int, x: Tensor) -> None:
        kept = x if self.observable is None else observed(self.observable, x)
        if self.moments:
            kept = kept.double()
            self._variances[slot] = kept.var(0) if len(kept) > 1 else torch.full_like(kept[0], math.nan)
            kept = kept.mean(0)
        self._states[slot] = kept

    def _place(self, grid: Tensor) -> None:
        if self.ts.ndim != 1 or self.ts.numel() == 0:
            hint = "; for one time write save_at=[t], for every step save_at='grid'" if self.ts.ndim == 0 else ""
            raise ValueError(f"save_at must be a list of at least one time, got shape {tuple(self.ts.shape)}{hint}")
        if grid.ndim == 2:
            raise ValueError('with a time per sample, save_at can be None or "grid" only')
        first, last = float(grid[0]), float(grid[-1])
        sign = math.copysign(1.0, last - first)
        tolerance = _SAME_TIME * abs(last - first)
        s = self.ts.tolist()
        if any(sign * (b - a) <= 0 for a, b in itertools.pairwise(s)):
            raise ValueError(
                f"save_at must follow the direction of integration, from {first} to {last}, without repeats"
            )
        for slot, time in enumerate(s):
            if not (sign * (time - first) >= -tolerance and sign * (last - time) >= -tolerance):
                raise ValueError(f"save_at holds {time}, which is outside the grid from {first} to {last}")
            k = int(torch.searchsorted(sign * grid, sign * time + tolerance, right=True)) - 1
            near = min((k, min(k + 1, len(grid) - 1)), key=lambda i: abs(float(grid[i]) - time))
            if abs(float(grid[near]) - time) <= tolerance:
                self.on_grid[near].append(slot)
            else:
                t0, t1 = float(grid[k]), float(grid[k + 1])
                self.inside[k].append((slot, (time - t0) / (t1 - t0)))

    def at_grid_point(self, k: int, x: Tensor) -> None:
        """Keeps the state at grid point ``k`` if it was asked for."""
        for slot in self.on_grid.get(k, ()):
            self._keep(slot, x)

    def within_step(self, k: int, between: Callable[[float], Tensor]) -> None:
        """Keeps the states asked for inside step ``k``, given by the fraction of the step."""
        for slot, theta in self.inside.get(k, ()):
            self._keep(slot, between(theta))

    def fill(self, slot: int, x: Tensor, rows: Tensor) -> None:
        """Keeps the ``rows: (batch,)`` of a state that samples reach one after another."""
        old = self._states[slot]
        self._states[slot] = x if old is None else torch.where(per_sample(rows, x), x, old)

    def states(self) -> Tensor:
        """All that was kept, ``(times, batch, *values)``, or means ``(times, *values)``."""
        return torch.stack([x for x in self._states if x is not None])

    def variances(self) -> Tensor:
        """Variances over the batch, ``(times, *values)``."""
        return torch.stack([x for x in self._variances if x is not None])


def observed(observable: Observable, x: Tensor) -> Tensor:
    """``observable(x)``, checked."""
    y = observable(x)
    if not isinstance(y, Tensor) or y.ndim == 0 or len(y) != len(x):
        got = f"shape {tuple(y.shape)}" if isinstance(y, Tensor) else type(y).__name__
        raise ValueError(
            f"observable must return a tensor with a row per path, ({len(x)}, ...), for a state of shape "
            f"{tuple(x.shape)}; got {got}"
        )
    return y
