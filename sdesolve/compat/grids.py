"""Grids of fixed steps through times that are asked for."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_NEAR = 2.0**-10  # of a step: nearer than that, a step ends at the time that was asked for in place of its own end


def steps_of(times: Sequence[float] | Tensor, dt: float) -> Tensor:
    """Steps of length ``dt`` from the first time on, the last one shorter, that also end at each of ``times``.

    Args:
        times: increasing, ``(n,)``.
        dt: positive.

    Returns:
        Float64 times on the host.

    Raises:
        ValueError: ``dt`` is not positive.
    """
    if not dt > 0.0:
        raise ValueError(f"dt must be positive, got {dt}")
    ends = torch.as_tensor(times, dtype=torch.float64, device="cpu")
    count = max(int(float(ends[-1] - ends[0]) / dt + 1.0 - _NEAR), 1)
    steps = ends[0] + dt * torch.arange(count, dtype=torch.float64)
    after = torch.searchsorted(ends, steps).clamp(1, max(len(ends) - 1, 1))
    apart = torch.minimum((steps - ends[after.clamp(max=len(ends) - 1)]).abs(), (steps - ends[after - 1]).abs())
    return torch.cat([ends, steps[apart > _NEAR * dt]]).sort().values


def same_times(a: Tensor, b: Tensor) -> bool:
    """Whether two grids have the same steps, up to the rounding of their times."""
    return a.shape == b.shape and bool((a - b).abs().max() <= _NEAR * b.diff().min())
