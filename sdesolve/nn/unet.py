"""A U-Net for images of any size."""

from __future__ import annotations

from collections.abc import Sequence
from typing import final

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate, scaled_dot_product_attention

from sdesolve._internal.arguments import number, short, whole_number
from sdesolve.nn.embeddings import FourierFeatures
from sdesolve.nn.labels import LabelEmbedding, LabelledNetwork
from sdesolve.nn.layers import zeroed
from sdesolve.nn.rebuilding import rebuildable


@final
@rebuildable
class UNet(LabelledNetwork):
    """``net(x, t, label)`` on images: residual blocks at several resolutions, with attention at the coarse ones.

    On the way down each level has ``blocks`` residual blocks and halves the image (rounding up) by a convolution of
    stride 2; on the way up each level has ``blocks + 1``, each fed with the state left at its counterpart, and the
    image grows back to just the size it had, so that sides need not be even. A block is

        ``h <- skip(h) + conv(dropout(silu(modulate(norm(conv(silu(norm(h)))), e))))``

    with an embedding ``e`` of time and class that scales and shifts the hidden channels. Attention is multi-headed over
    all places of a level, and always in the middle. Last layers of blocks, attention and network start at zero: a new
    network returns zeros.

    The lineage is DDPM (Ho et al. 2020, appendix B) and DDPM++ and NCSN++ (Song et al. 2021, appendix H), with the
    modulation of Dhariwal and Nichol 2021, table 4.

    Args:
        shape: shape of one state, ``(height, width)`` or ``(colours, height, width)``.
        channels: hidden channels at full resolution, at least 2.
        multipliers: one per level, from fine to coarse: the level has ``channels`` times that many channels.
        blocks: residual blocks of a level.
        attention: the levels that attend, by their heights, or as ``(height, width)`` where several have one height;
            those of a sequence, ``(1, length)``, by their lengths. By default the coarsest alone, ``()`` for the middle
            only.
        head: largest number of channels of an attention head.
        classes: number of classes; 0 for a network without labels.
        embedding: features of time; by default 32 log-spaced frequencies from 0.5 to 64 radians per unit.
        dropout: share of hidden values set to zero in each block while training.

    Raises:
        TypeError: a size that is not an integer.
        ValueError: a shape that is no image's, a size below 1, ``attention`` at a height that no level has, or that
            several have, or ``dropout`` outside [0, 1).
    """

    def __init__(
        self,
        shape: Sequence[int],
        *,
        channels: int = 64,
        multipliers: Sequence[int] = (1, 2, 2),
        blocks: int = 2,
        attention: Sequence[int | tuple[int, int]] | None = None,
        head: int = 64,
        classes: int = 0,
        embedding: FourierFeatures | None = None,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.shape = tuple(whole_number(n, "each entry of shape", 1) for n in shape)
        if len(self.shape) not in (2, 3):
            raise ValueError(f"shape must be (height, width) or (colours, height, width), got {short(self.shape)}")
        whole_number(channels, "channels", 2)  # normalising one number alone leaves nothing of it
        whole_number(blocks, "blocks", 1)
        whole_number(head, "head", 1)
        widths = [channels * whole_number(m, "each entry of multipliers", 1) for m in multipliers]
        if not widths:
            raise ValueError("multipliers needs an entry for each level, got none")
        if not 0 <= number(dropout, "dropout") < 1:
            raise ValueError(f"dropout is a share in [0, 1), got {short(dropout)}")
        sizes = [(-(-self.shape[-2] // 2**level), -(-self.shape[-1] // 2**level)) for level in range(len(widths))]
        attended = {len(sizes) - 1} if attention is None else _levels(attention, sizes)

        colours = self.shape[0] if len(self.shape) == 3 else 1
        n = 4 * channels
        phi = FourierFeatures.log_spaced(32, 0.5, 64.0) if embedding is None else embedding
        self.time = nn.Sequential(phi, nn.Linear(phi.size, n), nn.SiLU(), nn.Linear(n, n))
        self.label = LabelEmbedding(classes, n)
        self.classes = self.label.classes

        def block(before: int, after: int, attends: bool) -> _Block:
            return _Block(before, after, n, dropout, head if attends else None)

        self.inlet = nn.Conv2d(colours, channels, 3, padding=1)
        self.down = nn.ModuleList()
        left, width = [channels], channels  # channels of the states left for the way up
        for level, after in enumerate(widths):
            if level:
                self.down.append(_Halve(width))
                left.append(width)
            for _ in range(blocks):
                self.down.append(block(width, after, level in attended))
                width = after
                left.append(width)
        self.middle = nn.ModuleList([block(width, width, True), block(width, width, False)])
        self.up = nn.ModuleList()
        for level, after in reversed(list(enumerate(widths))):
            for _ in range(blocks + 1):
                self.up.append(block(width + left.pop(), after, level in attended))
                width = after
            if level:
                self.up.append(_Double(width))
        self.outlet = nn.Sequential(_norm(width), nn.SiLU(), zeroed(nn.Conv2d(width, colours, 3, padding=1)))

    def forward(self, x: Tensor, t: Tensor, label: Tensor | None = None) -> Tensor:
        """``x: (batch, *shape)``, ``t`` of shape ``()`` or ``(batch,)``, ``label: (batch,)`` to ``(batch, *shape)``.

        Raises:
            ValueError: ``x`` holds states of another shape, or a label for a network without classes.
        """
        if tuple(x.shape[1:]) != self.shape:
            raise ValueError(f"this UNet takes states of shape {self.shape}, got x of shape {tuple(x.shape)}")
        e = nn.functional.silu(self.label(self.time(t).expand(len(x), -1), label))
        h = self.inlet(x.reshape(len(x), self.inlet.in_channels, *self.shape[-2:]))
        left = [h]
        for layer in self.down:
            h = layer(h, e)
            left.append(h)
        for layer in self.middle:
            h = layer(h, e)
        for layer in self.up:
            h = layer(h, left[-1].shape[-2:]) if isinstance(layer, _Double) else layer(torch.cat([h, left.pop()], 1), e)
        return self.outlet(h).reshape(x.shape)


@final
class _Block(nn.Module):
    def __init__(self, before: int, after: int, embedding: int, dropout: float, head: int | None) -> None:
        super().__init__()
        self.first = nn.Sequential(_norm(before), nn.SiLU(), nn.Conv2d(before, after, 3, padding=1))
        self.norm = _norm(after)
        self.modulation = nn.Linear(embedding, 2 * after)
        self.second = nn.Sequential(nn.SiLU(), nn.Dropout(dropout), zeroed(nn.Conv2d(after, after, 3, padding=1)))
        self.skip = nn.Identity() if before == after else nn.Conv2d(before, after, 1)
        self.attention = nn.Identity() if head is None else _Attention(after, head)

    def forward(self, h: Tensor, e: Tensor) -> Tensor:
        scale, shift = self.modulation(e)[:, :, None, None].chunk(2, dim=1)
        return self.attention(self.skip(h) + self.second(self.norm(self.first(h)) * (1 + scale) + shift))


@final
class _Attention(nn.Module):
    """``h + W_out softmax(Q K^T / sqrt(c)) V`` over the places of an image (Vaswani et al. 2017, eq. 1)."""

    def __init__(self, channels: int, head: int) -> None:
        super().__init__()
        self.heads = channels // _divisor(channels, head)
        self.norm = _norm(channels)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.out = zeroed(nn.Conv2d(channels, channels, 1))

    def forward(self, h: Tensor) -> Tensor:
        # (batch, 3 channels, height, width) to three of (batch, heads, places, channels of a head)
        sizes = (3, self.heads, h.shape[1] // self.heads, h.shape[2] * h.shape[3])
        q, k, v = self.qkv(self.norm(h)).reshape(len(h), *sizes).mT.unbind(1)
        return h + self.out(scaled_dot_product_attention(q, k, v).mT.reshape(h.shape))


@final
class _Halve(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, h: Tensor, e: Tensor) -> Tensor:
        return self.conv(h)


@final
class _Double(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, h: Tensor, size: tuple[int, int]) -> Tensor:
        return self.conv(interpolate(h, size=size, mode="nearest"))


def _levels(attention: Sequence[int | tuple[int, int]], sizes: list[tuple[int, int]]) -> set[int]:
    """Levels by their sizes, or by their heights (lengths, of a sequence)."""
    axis, side = (1, "length") if sizes[0][0] == 1 else (0, "height")
    attended: set[int] = set()
    for named in attention:
        found = {k for k, size in enumerate(sizes) if named in (size, size[axis])}
        found = found or {k for k, size in enumerate(sizes) if named == size[0]}
        if not found:
            raise ValueError(
                f"attention={tuple(attention)} names a {side} that no level has; they are {[s[axis] for s in sizes]}"
            )
        if len({sizes[k] for k in found}) > 1:
            raise ValueError(f"several levels have the {side} {named}; name them by (height, width), some of {sizes}")
        attended |= found
    return attended


def _norm(channels: int) -> nn.GroupNorm:
    """Groups of at least 4 channels where the number divides so, and at most 32 groups."""
    return nn.GroupNorm(_divisor(channels, min(32, max(1, channels // 4))), channels)


def _divisor(n: int, limit: int) -> int:
    return max(d for d in range(1, min(n, limit) + 1) if n % d == 0)
