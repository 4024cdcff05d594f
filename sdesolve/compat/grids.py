"""Grids of fixed steps through times that are asked for."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_SPREAD = 0.1  # of a step: what an interval has more than whole steps is spread over them up to here
_NEAR = 2.0**-10  # of a step: grids that differ by less are one, written in other precisions


def steps_of(times: Sequence[float] | Tensor, dt: float) -> Tensor:
    """Each interval between ``times`` in equal steps: of length ``dt`` where it is a multiple of that, else near it.

    Args:
        times: increasing, ``(n,)``.
        dt: positive; steps are at most ``1.1 dt`` long.

    Returns:
        Float64 times on the host.

    Raises:
        ValueError: ``dt`` is not positive.
    """
    if not dt > 0.0:
        raise ValueError(f"dt must be positive, got {dt}")
    ends = torch.as_tensor(times, dtype=torch.float64, device="cpu")
    counts = (ends.diff() / dt - _SPREAD).ceil().clamp(min=1).long()
    first = counts.cumsum(0) - counts
    within = (torch.arange(int(counts.sum())) - first.repeat_interleave(counts)) / counts.repeat_interleave(
        counts
    ).double()
    starts, lengths = (v.repeat_interleave(counts) for v in (ends[:-1], ends.diff()))
    return torch.cat([starts + lengths * within, ends[-1:]])


def same_times(a: Tensor, b: Tensor) -> bool:
    """Whether two grids have the same steps, up to the rounding of their times."""
    return a.shape == b.shape and bool((a - b).abs().max() <= _NEAR * b.diff().min())
