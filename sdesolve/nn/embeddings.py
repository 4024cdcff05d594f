"""Features of time for networks."""

from __future__ import annotations

import math
from typing import Annotated, final

import torch
from torch import Tensor, nn

from sdesolve._internal.arguments import short, whole_number


@final
class FourierFeatures(nn.Module):
    """``phi(t) = sqrt(2) [cos(w_1 t), ..., cos(w_m t), sin(w_1 t), ..., sin(w_m t)]`` with frequencies that stay fixed.

    Each feature has unit mean square over a whole period. The frequencies live in a buffer: they move with the module
    and are saved with it, and no optimiser touches them. `log_spaced`, `gaussian` and `sinusoidal` make the usual
    choices.

    Args:
        frequencies: ``w``, in radians per unit of time, shape ``(m,)``.

    Raises:
        ValueError: ``frequencies`` is empty, not one-dimensional or not finite.
    """

    frequencies: Tensor

    def __init__(self, frequencies: Annotated[Tensor, "m"]) -> None:
        super().__init__()
        if frequencies.ndim != 1 or not frequencies.numel() or not bool(frequencies.isfinite().all()):
            raise ValueError(
                f"frequencies must be a finite vector with at least one entry, got shape {tuple(frequencies.shape)}"
            )
        self.register_buffer("frequencies", frequencies.detach().clone())

    @classmethod
    def log_spaced(cls, count: int, low: float, high: float) -> FourierFeatures:
        """``count`` frequencies in equal ratios from ``low`` to ``high`` (Vaswani et al. 2017, section 3.5).

        ``2 pi / high`` is the shortest time that the features tell apart at full contrast.

        Raises:
            ValueError: unless ``0 < low < high``; ``count`` below 2.
        """
        whole_number(count, "count", 2)
        if not (0 < low < high < math.inf):
            raise ValueError(f"frequencies need 0 < low < high < inf, got low={low}, high={high}")
        return cls(torch.logspace(math.log10(low), math.log10(high), count))

    @classmethod
    def gaussian(cls, count: int, scale: float = 16.0, generator: torch.Generator | None = None) -> FourierFeatures:
        """``w ~ N(0, (2 pi scale)^2)``, drawn once (Tancik et al. 2020, section 4; Song et al. 2021 use scale 16).

        Raises:
            ValueError: ``scale`` is not positive; ``count`` below 1.
        """
        whole_number(count, "count", 1)
        if not (0 < scale < math.inf):
            raise ValueError(f"scale must be positive and finite, got {short(scale)}")
        return cls(2 * math.pi * scale * torch.randn(count, generator=generator))

    @classmethod
    def sinusoidal(cls, count: int, steps: int = 1000) -> FourierFeatures:
        """The position code of DDPM's network on ``steps`` steps in unit time: ``w_k = steps 10^{-4 k / (count - 1)}``.

        Up to order and the factor ``sqrt(2)`` the features of Ho et al. 2020, appendix B, after Vaswani et al. 2017.

        Raises:
            ValueError: ``count`` below 2 or ``steps`` below 1.
        """
        return cls.log_spaced(count, 1e-4 * whole_number(steps, "steps", 1), float(steps))

    @property
    def size(self) -> int:
        """Features per time, ``2 m``."""
        return 2 * self.frequencies.numel()

    def forward(self, t: Tensor) -> Tensor:
        """Features ``(*t.shape, 2 m)`` in the dtype of ``t``, for ``t`` of shape ``()`` or ``(batch,)``."""
        phase = t.unsqueeze(-1) * self.frequencies.to(t.dtype)
        return math.sqrt(2.0) * torch.cat([phase.cos(), phase.sin()], dim=-1)
