"""Integers as continuous data: dequantisation, its offset in bits per dimension, and the discretised Gaussian."""

from __future__ import annotations

import math
from typing import final

import torch
from sdesolve_kernels import Stream, uniform
from torch import Tensor

from sdesolve._internal.arguments import short, whole_number

_MOST_LEVELS = 1 << 16


@final
class Quantisation:
    r"""Integers ``k = 0 ... n - 1`` as numbers on ``[low, high]``, in bins of width ``w = (high - low) / n``.

    Bin ``k`` reaches from ``low + w k`` to ``low + w (k + 1)``, and its `value` is the centre. With uniform
    dequantisation ``x = low + w (k + u)``, ``u ~ U[0, 1)^d``, the expected log density of ``x`` bounds the log
    probability of ``k`` from below, ``log P(k) >= E_u log p(x) + d log w`` (Theis et al. 2016, eq. 6). So

        ``bits per dimension = -log2 p(x) / d + log2 n - log2(high - low)``:

    an offset of 8 for 8 bits on [0, 1], 7 on [-1, 1], and 3 for 4 bits there.

    Args:
        bits: ``log2 n``, from 1 to 16; 8 if neither this nor ``levels`` is given.
        low: lower end of the range of ``x``.
        high: its upper end.
        levels: ``n`` itself, from 2 to 2^16, for data with another number of levels than a power of 2.

    Raises:
        ValueError: both ``bits`` and ``levels``, or one that is out of range; an empty range.
        TypeError: ``bits`` or ``levels`` is not an integer.

    Example:
        >>> pixels = Quantisation(bits=8)
        >>> x = pixels.dequantise(images, seed=0)
        >>> pixels.bits_per_dimension(log_likelihood(process, score, x), x[0].numel())
    """

    def __init__(
        self, bits: int | None = None, low: float = -1.0, high: float = 1.0, *, levels: int | None = None
    ) -> None:
        if levels is None:
            bits = whole_number(8 if bits is None else bits, "bits", 1)
            if bits > 16:
                raise ValueError(
                    f"bits must be at most 16, got {short(bits)}: float32 has few more digits to put noise into"
                )
            levels = 1 << bits
        elif bits is not None:
            raise ValueError(f"give bits or levels, which is 2^bits, not both; got {short(bits)} and {levels}")
        self.levels = whole_number(levels, "levels", 2)
        if self.levels > _MOST_LEVELS:
            raise ValueError(
                f"levels must be at most 2^16, got {short(levels)}: float32 has few more digits to put noise in"
            )
        if not (math.isfinite(low) and math.isfinite(high) and low < high):
            raise ValueError(f"the range of data needs finite low < high, got low={low}, high={high}")
        self.low, self.high = float(low), float(high)

    @staticmethod
    def inclusive(levels: int, first: float = -1.0, last: float = 1.0) -> Quantisation:
        """Bins whose values run from ``first`` to ``last``, such as pixels ``k / 127.5 - 1`` have.

        The range reaches half a bin further on both sides.

        Raises:
            ValueError: unless ``first < last``, both finite; ``levels`` out of range.
        """
        half = 0.5 * (last - first) / (whole_number(levels, "levels", 2) - 1)
        return Quantisation(low=first - half, high=last + half, levels=levels)

    @property
    def bits(self) -> float:
        """``log2 n``."""
        return math.log2(self.levels)

    @property
    def width(self) -> float:
        """Width ``w`` of a bin."""
        return (self.high - self.low) / self.levels

    def value(self, k: Tensor, *, dtype: torch.dtype = torch.float32) -> Tensor:
        """``low + w (k + 1/2)``: the centres of the bins, of the shape of ``k``.

        Raises:
            TypeError: ``k`` is no tensor of integers.
            ValueError: an integer outside ``0 ... n - 1``.
        """
        self._check(k, "value")
        return (self.low + self.width * (k.double() + 0.5)).to(dtype)

    def dequantise(self, k: Tensor, *, seed: int, first_sample: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
        """``low + w (k + u)`` from integers ``(batch, *state)``; ``u`` is a function of seed and sample number.

        Raises:
            TypeError: ``k`` is no tensor of integers.
            ValueError: an integer outside ``0 ... n - 1``; no batch axis.
        """
        self._check(k, "dequantise")
        if k.ndim == 0:
            raise ValueError("dequantise takes (batch, *state), got a single number; use k[None]")
        u = uniform(
            len(k), k.shape[1:].numel(), seed=seed, stream=Stream.DEQUANTISATION, first_path=first_sample,
            dtype=torch.float64, device=k.device,
        )  # fmt: skip
        x = (self.low + self.width * (k.double() + u.reshape(k.shape))).to(dtype)
        # Rounding may leave the bin on either side; its upper edge belongs to the next one.
        lower, upper = (self.low + self.width * (k.double() + edge) for edge in (0.0, 1.0))
        x = torch.where(x.double() < lower, torch.nextafter(x, x.new_tensor(math.inf)), x)
        return torch.where(x.double() >= upper, torch.nextafter(x, x.new_tensor(-math.inf)), x)

    def quantise(self, x: Tensor) -> Tensor:
        """The bin that each number lies in, int64; ``high`` itself counts to the last.

        Raises:
            ValueError: a number outside ``[low, high]``.
        """
        if not bool(((x >= self.low) & (x <= self.high)).all()):
            raise ValueError(f"data must lie in [{self.low}, {self.high}] to be quantised; clamp it or state its range")
        return ((x.double() - self.low) / self.width).floor().long().clamp(0, self.levels - 1)

    def bits_per_dimension(self, log_density: Tensor, dimension: int) -> Tensor:
        """Bits per dimension of the integers, from the log density in nats of dequantised ``x`` of ``dimension``."""
        d = whole_number(dimension, "dimension", 1)
        return -log_density / (d * math.log(2.0)) - math.log2(self.width)

    def gaussian_log_prob(self, x: Tensor, mean: Tensor, std: Tensor) -> Tensor:
        r"""Log probability in nats, of the shape of ``x``, of the values ``x`` under a Gaussian rounded to values.

        A value has the Gaussian's mass within its bin, the outermost ones all mass beyond as well, so that
        probabilities add up to 1 (Ho et al. 2020, eq. 13). Accurate in both tails, however far.

        Args:
            x: data on the values.
            mean: of the Gaussian, broadcasts against ``x``.
            std: its standard deviation, likewise.

        Raises:
            ValueError: data that is not on a value, by more than rounding.
        """
        last = self.levels - 1
        first_value, h = self.low + 0.5 * self.width, self.width
        j = (x - first_value) / h
        reach = max(abs(self.low), abs(self.high)) / h  # what rounding of x comes to in bins
        near = 8 * torch.finfo(x.dtype).eps * max(last, reach)
        nearest = j.round()
        if not bool((((j - nearest).abs() <= near) & (nearest >= 0) & (nearest <= last)).all()):
            first, end = round(first_value, 12), round(first_value + last * h, 12)
            raise ValueError(
                f"the discretised decoder takes data on the {self.levels} levels from {first} to {end} with both ends, "
                f"such as {first} + k * {round(end - first, 12)} / {last} for integers k; this data has values between "
                "them or outside. For continuous data leave bits or the quantisation out"
            )
        # From the number of the level: neighbours then share an edge to the bit, whatever the rounding of x.
        a, b = (self.low + h * nearest - mean) / std, (self.low + h * (nearest + 1.0) - mean) / std
        a, b = a.where(nearest > 0, -math.inf), b.where(nearest < last, math.inf)
        # In the upper tail both distribution functions are near 1: reflected, they are small and exact.
        upper = a > 0
        a, b = torch.where(upper, -b, a), torch.where(upper, -a, b)
        top = torch.special.log_ndtr(b)
        return top + (-torch.expm1(torch.special.log_ndtr(a) - top)).log()

    def _check(self, k: Tensor, taker: str) -> None:
        if not isinstance(k, Tensor) or k.is_floating_point() or k.is_complex() or k.dtype is torch.bool:
            given = k.dtype if isinstance(k, Tensor) else type(k).__name__
            raise TypeError(
                f"{taker} takes integers from 0 to {self.levels - 1} in a tensor, got {given}; images that are floats "
                f"in [0, 1] go back to levels by (x * {self.levels - 1}).round().long()"
            )
        if k.numel() and not (int(k.min()) >= 0 and int(k.max()) < self.levels):
            raise ValueError(
                f"data of {self.levels} levels lies in 0 ... {self.levels - 1}, got values from {int(k.min())} to "
                f"{int(k.max())}; set bits= or levels= to what the data has"
            )

    def __repr__(self) -> str:
        return f"Quantisation(levels={self.levels}, low={self.low}, high={self.high})"


def discretised_gaussian_log_prob(
    x: Tensor, mean: Tensor, std: Tensor, *, bits: int = 8, low: float = -1.0, high: float = 1.0
) -> Tensor:
    r"""`Quantisation.gaussian_log_prob` for ``2^bits`` levels from ``low`` to ``high``, both ends included.

    Raises:
        ValueError: data that is not on a level, by more than rounding.
    """
    return Quantisation.inclusive(1 << whole_number(bits, "bits", 1), low, high).gaussian_log_prob(x, mean, std)
