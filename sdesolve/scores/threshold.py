"""Scores whose denoised estimate is kept within what data can be."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import final

from torch import Tensor

from sdesolve._internal.arguments import kind_of, number, short
from sdesolve.diffusions.base import AbstractDiffusion, as_time
from sdesolve.reverse import Score, evaluated
from sdesolve.scores.base import check_process
from sdesolve.sde import per_sample


@final
class Clip:
    """Static thresholding: every element of the denoised estimate is clipped to ``[low, high]`` (Ho et al. 2020).

    Args:
        low, high: of the data.

    Raises:
        ValueError: no interval.
        TypeError: something that is no number.
    """

    def __init__(self, low: float = -1.0, high: float = 1.0) -> None:
        self.low, self.high = number(low, "low"), number(high, "high")
        if not self.low < self.high:
            raise ValueError(f"low must be below high, got {short(low)} and {short(high)}")

    def __call__(self, data: Tensor) -> Tensor:
        """``data: (batch, *state)``, clipped."""
        return data.clamp(self.low, self.high)

    def __repr__(self) -> str:
        return f"Clip({self.low:g}, {self.high:g})"


@final
class DynamicThreshold:
    r"""Dynamic thresholding: ``clamp(D, -s, s) bound / s`` with ``s = max(bound, quantile of |D|)`` of each sample.

    So a sample in which few elements leave ``[-bound, bound]`` is clipped there, and one in which many do is scaled
    back as a whole, which keeps strongly guided samples from saturating. Saharia et al. 2022 (Imagen), section 2.3.

    Args:
        quantile: of the absolute values of one sample, in (0, 1].
        bound: of the data, positive.

    Raises:
        ValueError: either is out of its range.
        TypeError: either is no number.
    """

    def __init__(self, quantile: float = 0.995, bound: float = 1.0) -> None:
        if not 0.0 < number(quantile, "quantile") <= 1.0:
            raise ValueError(f"quantile must lie in (0, 1], got {short(quantile)}")
        if not 0.0 < number(bound, "bound") < math.inf:
            raise ValueError(f"bound must be positive and finite, got {short(bound)}")
        self.quantile, self.bound = float(quantile), float(bound)

    def __call__(self, data: Tensor) -> Tensor:
        """``data: (batch, *state)``, thresholded sample by sample."""
        if not data.numel():
            return data
        sizes = data.reshape(len(data), -1).abs().sort(1).values
        place = self.quantile * (sizes.shape[1] - 1)
        low = math.floor(place)
        high = min(low + 1, sizes.shape[1] - 1)
        s = sizes[:, low] + (place - low) * (sizes[:, high] - sizes[:, low])
        s = per_sample(s.clamp(min=self.bound), data)
        return data.clamp(-s, s) * (self.bound / s)

    def __repr__(self) -> str:
        return f"DynamicThreshold({self.quantile:g}, bound={self.bound:g})"


Threshold = Callable[[Tensor], Tensor]


@final
class ThresholdedScore:
    """``(alpha h(D) - x) / sigma^2`` with ``D = E[x_0 | x_t = x]`` of another score: its denoised estimate, changed.

    It goes wherever a score does; ``sample(..., threshold=h)`` makes one. What it is the score of is no longer the
    noised law of the data, unless ``h`` changes nothing that data can be.

    Args:
        process: the forward diffusion.
        score: ``grad_x log p_t(x)``.
        threshold: ``h``, such as ``Clip(-1, 1)`` or ``DynamicThreshold(0.995)``, or any function of ``D`` that keeps
            its shape and dtype.

    Raises:
        TypeError: no process; score or threshold cannot be called. When called: ``h`` returns no tensor of the dtype
            of ``D``.
        ValueError: when called, ``h`` returns another shape.
    """

    def __init__(self, process: AbstractDiffusion, score: Score, threshold: Threshold) -> None:
        check_process(process)
        if not callable(score):
            raise TypeError(f"score must be a function of (x, t), got {kind_of(score)}")
        if isinstance(threshold, type) or not callable(threshold):
            raise TypeError(
                "threshold must be a function of the denoised estimate such as Clip(-1, 1) or DynamicThreshold(0.995), "
                f"got {kind_of(threshold)}"
            )
        self.process, self.score, self.threshold = process, score, threshold

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        """The score of the changed estimate, of the shape of ``x: (batch, *state)``; ``t: ()`` or ``(batch,)``."""
        alpha, sigma = self._coefficients(x, t)
        return (alpha * self.data(x, t) - x) / sigma.square()

    def data(self, x: Tensor, t: Tensor) -> Tensor:
        """``h(D)``, of the shape of ``x``."""
        alpha, sigma = self._coefficients(x, t)
        return self.changed((x + sigma.square() * evaluated(self.score, x, t)) / alpha)

    def _coefficients(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        parts = self.process.alpha(as_time(t)), self.process.sigma(as_time(t))
        alpha, sigma = (per_sample(c.to(x) if c.ndim else c.to(x.dtype), x) for c in parts)
        return alpha, sigma

    def changed(self, data: Tensor) -> Tensor:
        """``h(data)``, checked."""
        made = self.threshold(data)
        if not isinstance(made, Tensor) or made.dtype != data.dtype:
            got = made.dtype if isinstance(made, Tensor) else kind_of(made)
            raise TypeError(f"threshold must return a tensor of {data.dtype}, as the estimate is, got {got}")
        if made.shape != data.shape:
            raise ValueError(
                f"threshold must keep the shape of the denoised estimate, {tuple(data.shape)}, got {tuple(made.shape)}"
            )
        return made
