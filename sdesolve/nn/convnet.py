"""A residual convolutional network for small images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import final

import torch
from torch import Tensor, nn

from sdesolve._internal.arguments import short, whole_number
from sdesolve.nn.embeddings import FourierFeatures
from sdesolve.nn.layers import ModulatedBlock, zeroed
from sdesolve.nn.rebuilding import rebuildable


@final
@rebuildable
class ConvNet(nn.Module):
    """``net(x, t)`` on small images: residual 3x3 convolutions at full resolution, and one dense look at the whole.

    ``h = conv(x) + position``; then ``depth`` blocks ``h <- h + conv(silu(modulate(conv(norm(h)), e)))`` with the time
    embedding ``e`` scaling and shifting the hidden channels; half-way, the image averaged over 2x2 cells goes through a
    residual dense layer and is added back, which lets every pixel see every other; then ``conv(silu(h))``. The learned
    position tells places apart: digits sit in the middle of theirs. Last layers of blocks start at zero.

    On the 8x8 digits of scikit-learn, with half a million weights each and 1.3 times the training time, it reached half
    the Frechet distance of an `MLP`.

    Args:
        shape: shape of one state, ``(height, width)`` or ``(colours, height, width)``, both sides even.
        channels: hidden channels, a multiple of 4.
        depth: residual blocks.
        width: hidden units of the dense layer.
        embedding: features of time; by default 32 log-spaced frequencies from 0.5 to 16 radians per unit.

    Raises:
        TypeError: a size that is not an integer.
        ValueError: a shape that is not one of an image with even sides; ``channels`` not a multiple of 4.
    """

    def __init__(
        self,
        shape: Sequence[int],
        *,
        channels: int = 32,
        depth: int = 4,
        width: int = 256,
        embedding: FourierFeatures | None = None,
    ) -> None:
        super().__init__()
        self.shape = tuple(whole_number(n, "each entry of shape", 1) for n in shape)
        if len(self.shape) not in (2, 3) or self.shape[-1] % 2 or self.shape[-2] % 2:
            raise ValueError(
                f"shape must be (height, width) or (colours, height, width) with even sides, got {self.shape}"
            )
        if whole_number(channels, "channels", 4) % 4:
            raise ValueError(f"channels must be a multiple of 4, for normalisation in 4 groups; got {short(channels)}")
        whole_number(depth, "depth", 1)
        colours = self.shape[0] if len(self.shape) == 3 else 1
        height, breadth = self.shape[-2:]
        cells = channels * (height // 2) * (breadth // 2)
        phi = FourierFeatures.log_spaced(32, 0.5, 16.0) if embedding is None else embedding
        n = phi.size
        self.time = nn.Sequential(phi, nn.Linear(n, n), nn.SiLU(), nn.Linear(n, n), nn.SiLU())
        self.inlet = nn.Conv2d(colours, channels, 3, padding=1)
        self.position = nn.Parameter(0.1 * torch.randn(channels, height, breadth))
        self.blocks = nn.ModuleList(_ConvBlock(channels, n) for _ in range(depth))
        self.gather = nn.Linear(cells, width)
        self.whole = ModulatedBlock(width, n)
        self.spread = zeroed(nn.Linear(width, cells))
        self.outlet = zeroed(nn.Conv2d(channels, colours, 3, padding=1))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """``x: (batch, *shape)`` and ``t`` of shape ``()`` or ``(batch,)`` to ``(batch, *shape)``.

        Raises:
            ValueError: ``x`` holds states of another shape.
        """
        if tuple(x.shape[1:]) != self.shape:
            raise ValueError(f"this ConvNet takes states of shape {self.shape}, got x of shape {tuple(x.shape)}")
        e = self.time(t).expand(len(x), -1)
        h = self.inlet(x.reshape(len(x), self.inlet.in_channels, *self.shape[-2:])) + self.position
        for k, block in enumerate(self.blocks):
            h = block(h, e)
            if k == (len(self.blocks) - 1) // 2:
                h = h + self._dense(h, e)
        return self.outlet(nn.functional.silu(h)).reshape(x.shape)

    def _dense(self, h: Tensor, e: Tensor) -> Tensor:
        cells = nn.functional.avg_pool2d(h, 2)
        seen = self.spread(nn.functional.silu(self.whole(self.gather(cells.flatten(1)), e)))
        return nn.functional.interpolate(seen.reshape(cells.shape), scale_factor=2)


@final
class _ConvBlock(nn.Module):
    def __init__(self, channels: int, embedding: int) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.GroupNorm(4, channels), nn.Conv2d(channels, channels, 3, padding=1))
        self.modulation = nn.Linear(embedding, 2 * channels)
        self.second = nn.Sequential(nn.SiLU(), zeroed(nn.Conv2d(channels, channels, 3, padding=1)))

    def forward(self, h: Tensor, e: Tensor) -> Tensor:
        scale, shift = self.modulation(e)[:, :, None, None].chunk(2, dim=1)
        return h + self.second(self.first(h) * (1 + scale) + shift)
