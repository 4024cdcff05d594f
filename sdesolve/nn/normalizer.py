"""The map between data as they are and data of unit scale, kept with the model."""

from __future__ import annotations

import math
from typing import Literal, final

import torch
from torch import Tensor, nn

from sdesolve._internal.arguments import short

Share = Literal["all", "channel", "entry"]


@final
class Normalizer(nn.Module):
    """``z = (x - shift) / scale``, and back; shift and scale are buffers, so they are saved and moved with a model.

    Args:
        shift: a number, or a tensor that broadcasts against one state.
        scale: likewise, positive.
        low: smallest value that data may have, if they have a range.
        high: largest value.

    Raises:
        ValueError: ``shift`` or ``scale`` is not finite, a ``scale`` is not positive, or ``low >= high``.
    """

    shift: Tensor
    scale: Tensor

    def __init__(
        self, shift: Tensor | float, scale: Tensor | float, *, low: float = -math.inf, high: float = math.inf
    ) -> None:
        super().__init__()
        a, b = torch.broadcast_tensors(torch.as_tensor(shift).double(), torch.as_tensor(scale).double())
        if not bool(a.isfinite().all()) or not bool((b.isfinite() & (b > 0)).all()):
            raise ValueError(f"shift must be finite and scale positive and finite, got {short(shift)} and {scale}")
        if not low < high:
            raise ValueError(f"a range needs low < high, got low={low}, high={high}")
        self.register_buffer("shift", a.detach().clone())
        self.register_buffer("scale", b.detach().clone())
        self.low, self.high = float(low), float(high)

    @classmethod
    def range(cls, low: float, high: float) -> Normalizer:
        """The map of ``[low, high]`` onto ``[-1, 1]``, for data that have such a range; others are refused in training.

        Raises:
            ValueError: unless ``low < high``, both finite.
        """
        if not (math.isfinite(low) and math.isfinite(high)):
            raise ValueError(f"a range needs finite low < high, got low={low}, high={high}")
        return cls(0.5 * (low + high), 0.5 * (high - low), low=low, high=high)

    @classmethod
    def fit(cls, data: Tensor, per: Share = "all") -> Normalizer:
        """Mean zero and standard deviation one over ``data: (samples, *state)``.

        Args:
            data: what to measure.
            per: ``"all"`` for one mean and deviation in all, ``"channel"`` for one per entry of the first axis of a
                state, ``"entry"`` for one per entry. Where nothing varies the scale is 1.

        Raises:
            TypeError: ``data`` is not floating-point.
            ValueError: ``data`` has no batch axis, fewer than 2 samples, nan or inf; ``per`` is unknown.
        """
        if not data.is_floating_point():
            raise TypeError(f"data must be floating-point, got {data.dtype}; convert it with .float()")
        if data.ndim == 0 or len(data) < 2 or not data.numel():
            raise ValueError(f"data must be (samples, *state) with at least 2 samples, got {tuple(data.shape)}")
        axes = {"all": list(range(data.ndim)), "channel": [0, *range(2, data.ndim)], "entry": [0]}
        if per not in axes:
            raise ValueError(f"per={short(per)} is unknown; choose one of {', '.join(map(repr, axes))}")
        x = data.detach().double()
        if not bool(x.isfinite().all()):
            raise ValueError("data must be finite; it holds nan or inf")
        std, mean = torch.std_mean(x, dim=axes[per], correction=0, keepdim=True)
        # Rounding leaves a trace of deviation where nothing varies, and dividing by it would blow it up.
        constant = std <= 1e-12 * mean.abs().clamp_min(1e-300)
        shape = mean.shape[1:] if per != "all" else ()
        return cls(mean.reshape(shape), torch.where(constant, 1.0, std).reshape(shape))

    def forward(self, x: Tensor) -> Tensor:
        """Data ``(batch, *state)`` to unit scale, in their own dtype."""
        return ((x - self.shift.to(x.device)) / self.scale.to(x.device)).to(x.dtype)

    def inverse(self, z: Tensor) -> Tensor:
        """The data that `forward` maps to ``z``; samples of a model that was trained on ``z``, as data."""
        return (z * self.scale.to(z.device) + self.shift.to(z.device)).to(z.dtype)

    def log_determinant(self, x: Tensor) -> Tensor:
        """``log |dz / dx|`` of one state like those in ``x: (batch, *state)``: what densities of data gain, ``()``."""
        return -self.scale.log().expand(x.shape[1:]).sum()

    @property
    def bounded(self) -> bool:
        """Whether data have a range."""
        return math.isfinite(self.low) or math.isfinite(self.high)

    def check(self, x: Tensor) -> None:
        """Refuses data outside the range, where there is one; nan is left to others.

        Raises:
            ValueError: naming the range of ``x``.
        """
        if not self.bounded:
            return
        least, most = (float(v) for v in x.detach().aminmax())
        low, high = torch.tensor([self.low, self.high], dtype=x.dtype).tolist()  # ends as such data can have them
        if least < low or most > high:
            raise ValueError(
                f"the data must lie in [{self.low:g}, {self.high:g}], as this Normalizer was told; they reach from "
                f"{least:g} to {most:g}"
            )

    def extra_repr(self) -> str:
        return f"shift of shape {tuple(self.shift.shape)}, low={self.low:g}, high={self.high:g}"
