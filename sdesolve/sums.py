"""Sums over paths that do not depend on how the paths are split up: exact, and rounded once when they are read."""

from __future__ import annotations

import dataclasses
import math
from typing import final

import torch
from torch import Tensor

_LEAST = 1200  # totals are counted in units of 2^-1200, below the smallest float64 and its square
_BITS, _PART = 32, 18  # of a bin of exponents, and of a part of a significand
_ROWS = 1 << 12  # whose parts, of less than 2^50, are added up in 63 bits


@final
@dataclasses.dataclass(frozen=True)
class Sums:
    """The sum of what paths leave, and of its squares, exactly (``reduce="sums"`` of `solve`).

    ``a + b`` is that of all paths of both, whatever the order and however they were cut: the same bits as if they had
    run together. Each square is rounded to float64 before it is added (those of float32 are exact).

    Attributes:
        count: of paths.
        shape: of what each leaves, times first.
        totals: for each number its sum in units of ``2^-1200``, ``None`` if a summand was not finite.
        squares: likewise, of squares.
    """

    count: int
    shape: tuple[int, ...]
    totals: tuple[int | None, ...]
    squares: tuple[int | None, ...]

    @classmethod
    def of(cls, values: Tensor) -> Sums:
        """Over the paths of ``(times, paths, *values)``."""
        times, paths, *rest = values.shape
        flat = values.detach().to(device="cpu", dtype=torch.float64).transpose(0, 1).reshape(paths, -1)
        return cls(paths, (times, *rest), _exact(flat), _exact(flat.square()))

    def __add__(self, other: Sums) -> Sums:
        if not isinstance(other, Sums):
            return NotImplemented
        if self.shape != other.shape:
            raise ValueError(f"sums are of numbers of shape {self.shape} and {other.shape}, which do not add up")
        pairs = zip((self.totals, self.squares), (other.totals, other.squares), strict=True)
        totals, squares = (
            tuple(None if a is None or b is None else a + b for a, b in zip(x, y, strict=True)) for x, y in pairs
        )
        return Sums(self.count + other.count, self.shape, totals, squares)

    @property
    def total(self) -> Tensor:
        """The sum over paths, float64."""
        return self._tensor([math.nan if a is None else a / (1 << _LEAST) for a in self.totals])

    @property
    def mean(self) -> Tensor:
        """The mean over paths, float64."""
        n = self.count << _LEAST
        return self._tensor([math.nan if a is None or not n else a / n for a in self.totals])

    @property
    def variance(self) -> Tensor:
        """The unbiased variance over paths, float64."""
        n = self.count
        whole = n * (n - 1) << (2 * _LEAST)
        pairs = zip(self.totals, self.squares, strict=True)
        return self._tensor(
            [
                math.nan if a is None or b is None or n < 2 else max(0, (n * b << _LEAST) - a * a) / whole
                for a, b in pairs
            ]
        )

    @property
    def standard_error(self) -> Tensor:
        """Of the mean."""
        return (self.variance / max(self.count, 1)).sqrt()

    def _tensor(self, numbers: list[float]) -> Tensor:
        return torch.tensor(numbers, dtype=torch.float64, device="cpu").reshape(self.shape)


def _exact(x: Tensor) -> tuple[int | None, ...]:
    """Sums of the columns of ``(paths, numbers)``, float64, in units of ``2^-1200``."""
    finite, width = x.isfinite().all(0).tolist(), x.shape[1]
    totals = [0] * width
    for rows in x.split(_ROWS):
        fraction, exponent = torch.frexp(torch.where(rows.isfinite(), rows, 0.0))
        whole = (fraction.abs() * 2.0**53).long()
        sign = torch.where(rows < 0, -1, 1)
        bins = torch.zeros((_LEAST + 1100) // _BITS + 3, width, dtype=torch.int64, device="cpu")
        for part in range(3):
            digits = (whole >> (_PART * part)) & ((1 << _PART) - 1)
            place = exponent.long() - 53 + _PART * part + _LEAST
            bins.scatter_add_(0, place // _BITS, sign * (digits << (place % _BITS)))
        for k, row in enumerate(bins.tolist()):
            if any(row):
                totals = [total + (a << (_BITS * k)) for total, a in zip(totals, row, strict=True)]
    return tuple(total if good else None for total, good in zip(totals, finite, strict=True))
