"""Integers as continuous data: dequantisation, its offset in bits per dimension, and the discretised Gaussian."""

from __future__ import annotations

import math
from typing import final

import torch
from sdesolve_kernels import Stream, uniform
from torch import Tensor

from sdesolve.grids import whole_number


@final
class Quantisation:
    r"""``n``-bit integers ``k`` as numbers on ``[low, high]``, in bins of width ``w = (high - low) / 2^n``.

    With uniform dequantisation ``x = low + w (k + u)``, ``u ~ U[0, 1)^d``, the expected log density of ``x`` bounds the
    log probability of ``k`` from below, ``log P(k) >= E_u log p(x) + d log w`` (Theis et al. 2016, eq. 6). So

        ``bits per dimension = -log2 p(x) / d + n - log2(high - low)``:

    an offset of 8 for 8 bits on [0, 1], 7 on [-1, 1], and 3 for 4 bits there.

    Args:
        bits: ``n``, from 1 to 16.
        low: lower end of the range of ``x``.
        high: its upper end.

    Raises:
        ValueError: ``bits`` out of range, or an empty range.
        TypeError: ``bits`` is not an integer.

    Example:
        >>> pixels = Quantisation(bits=8)
        >>> x = pixels.dequantise(images, seed=0)
        >>> pixels.bits_per_dimension(log_likelihood(process, score, x), x[0].numel())
    """

    def __init__(self, bits: int = 8, low: float = -1.0, high: float = 1.0) -> None:
        self.bits = whole_number(bits, "bits", 1)
        if self.bits > 16:
            raise ValueError(f"bits must be at most 16, got {bits}: float32 has few more digits to put noise into")
        if not (math.isfinite(low) and math.isfinite(high) and low < high):
            raise ValueError(f"the range of data needs finite low < high, got low={low}, high={high}")
        self.low, self.high = float(low), float(high)

    @property
    def levels(self) -> int:
        """``2^n``."""
        return 1 << self.bits

    @property
    def width(self) -> float:
        """Width ``w`` of a bin."""
        return (self.high - self.low) / self.levels

    def dequantise(self, k: Tensor, *, seed: int, first_sample: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
        """``low + w (k + u)`` from integers ``(batch, *state)``; ``u`` is a function of seed and sample number.

        Raises:
            TypeError: ``k`` is no tensor of integers.
            ValueError: an integer outside ``0 ... 2^n - 1``; no batch axis.
        """
        if not isinstance(k, Tensor) or k.is_floating_point() or k.is_complex() or k.dtype is torch.bool:
            raise TypeError(f"dequantise takes integers, got {k.dtype if isinstance(k, Tensor) else type(k).__name__}")
        if k.ndim == 0:
            raise ValueError("dequantise takes (batch, *state), got a single number; use k[None]")
        if k.numel() and not (int(k.min()) >= 0 and int(k.max()) < self.levels):
            raise ValueError(
                f"{self.bits}-bit data lies in 0 ... {self.levels - 1}, got values from {int(k.min())} to "
                f"{int(k.max())}; set bits= to what the data has"
            )
        u = uniform(
            len(k), k.shape[1:].numel(), seed=seed, stream=Stream.DEQUANTISATION, first_path=first_sample,
            dtype=torch.float64, device=k.device,
        )  # fmt: skip
        x = (self.low + self.width * (k.double() + u.reshape(k.shape))).to(dtype)
        # Rounding may reach the upper edge of a bin, which belongs to the next one.
        edge = (self.low + self.width * (k.double() + 1.0)).to(dtype)
        return torch.where(x < edge, x, torch.nextafter(edge, edge.new_tensor(-math.inf)))

    def quantise(self, x: Tensor) -> Tensor:
        """The bin that each number lies in, int64; ``high`` itself counts to the last.

        Raises:
            ValueError: a number outside ``[low, high]``.
        """
        if not bool(((x >= self.low) & (x <= self.high)).all()):
            raise ValueError(f"data must lie in [{self.low}, {self.high}] to be quantised; clamp it or state its range")
        return ((x.double() - self.low) / self.width).floor().long().clamp(max=self.levels - 1)

    def bits_per_dimension(self, log_density: Tensor, dimension: int) -> Tensor:
        """Bits per dimension of the integers, from the log density in nats of dequantised ``x`` of ``dimension``."""
        d = whole_number(dimension, "dimension", 1)
        return -log_density / (d * math.log(2.0)) - math.log2(self.width)

    def __repr__(self) -> str:
        return f"Quantisation(bits={self.bits}, low={self.low}, high={self.high})"


def discretised_gaussian_log_prob(
    x: Tensor, mean: Tensor, std: Tensor, *, bits: int = 8, low: float = -1.0, high: float = 1.0
) -> Tensor:
    r"""Log probability in nats of the levels ``x`` under a Gaussian rounded to ``2^n`` levels; of the shape of ``x``.

    Levels are ``low + j h``, ``h = (high - low) / (2^n - 1)``, both ends included. A level has the Gaussian's mass
    within ``h / 2`` of it, the outermost ones all mass beyond as well, so that probabilities add up to 1 (Ho et al.
    2020, eq. 13). Accurate in both tails, however far.

    Args:
        x: data on the levels, scaled to ``[low, high]``.
        mean: of the Gaussian, broadcasts against ``x``.
        std: its standard deviation, likewise.
        bits: ``n``.
        low: first level.
        high: last level.

    Raises:
        ValueError: data that is not on a level, by more than rounding.
    """
    levels = (1 << whole_number(bits, "bits", 1)) - 1
    h = (high - low) / levels
    j = (x - low) / h
    eps = torch.finfo(x.dtype).eps
    if not bool((((j - j.round()).abs() <= 8 * eps * levels) & (j.round() >= 0) & (j.round() <= levels)).all()):
        raise ValueError(
            f"the discretised decoder takes data on the {levels + 1} levels from {low} to {high} with both ends, such "
            f"as {low} + k * {high - low} / {levels} for integers k; this data has values between them or outside. For "
            "continuous data leave bits out"
        )
    a, b = (x - 0.5 * h - mean) / std, (x + 0.5 * h - mean) / std
    a, b = a.where(j.round() > 0, -math.inf), b.where(j.round() < levels, math.inf)
    # In the upper tail both distribution functions are near 1: reflected, they are small and exact.
    upper = a > 0
    a, b = torch.where(upper, -b, a), torch.where(upper, -a, b)
    top = torch.special.log_ndtr(b)
    return top + (-torch.expm1(torch.special.log_ndtr(a) - top)).log()
