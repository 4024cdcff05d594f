"""A U-Net for sequences, images and volumes of any size."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.functional import interpolate, silu

from sdesolve._internal.arguments import number, short, whole_number
from sdesolve.nn.embeddings import FourierFeatures
from sdesolve.nn.labels import LabelEmbedding, LabelledNetwork, Takes, ValueEmbedding, place_mask
from sdesolve.nn.layers import attended, kept, zeroed
from sdesolve.nn.rebuilding import rebuildable

_CONVOLUTIONS: dict[int, type[nn.Conv1d] | type[nn.Conv2d] | type[nn.Conv3d]] = {
    1: nn.Conv1d,
    2: nn.Conv2d,
    3: nn.Conv3d,
}
_POOLS = {1: functional.max_pool1d, 2: functional.max_pool2d, 3: functional.max_pool3d}
_SIDES = ("depth", "height", "width")


@final
@rebuildable
class UNet(LabelledNetwork):
    """``net(x, t, label, values, mask)``: residual blocks at several resolutions, with attention at the coarse ones.

    On the way down each level has ``blocks`` residual blocks and halves all sides (rounding up) by a convolution of
    stride 2; on the way up each level has ``blocks + 1``, each fed with the state left at its counterpart, and the
    state grows back to just the size it had, so that sides need not be even. A block is

        ``h <- skip(h) + conv(dropout(silu(modulate(norm(conv(silu(norm(h)))), e))))``

    with an embedding ``e`` of time and conditions that scales and shifts the hidden channels. Attention is multi-headed
    over all places of a level, and always in the middle. Last layers of blocks, attention and network start at zero: a
    new network returns zeros.

    With a mask, data of different lengths share a batch: convolutions see zeros where nothing is, as they do beyond the
    ends, normalisation and attention leave those places out, and the result is 0 there. What a sample gets does not
    depend on how far it is padded, nor with what.

    The lineage is DDPM (Ho et al. 2020, appendix B) and DDPM++ and NCSN++ (Song et al. 2021, appendix H), with the
    modulation of Dhariwal and Nichol 2021, table 4.

    Args:
        shape: shape of one state: its sides, or ``(colours, *sides)``.
        dims: how many sides there are: 1 for sequences, ``(length,)`` or ``(colours, length)``; 2 for images,
            ``(height, width)`` and so on; 3 for volumes, ``(depth, height, width)`` and so on.
        channels: hidden channels at full resolution, at least 2.
        multipliers: one per level, from fine to coarse: the level has ``channels`` times that many channels.
        blocks: residual blocks of a level.
        attention: the levels that attend, by their heights (lengths of sequences, depths of volumes), or by all sides,
            ``(height, width)``, where several have one height; those of a sequence ``(1, length)`` by their lengths. By
            default the coarsest alone, ``()`` for the middle only.
        head: largest number of channels of an attention head.
        classes: number of classes; 0 for a network without labels.
        values: numbers of a continuous condition, ``values: (batch, values)``, of about unit size; 0 for none.
        embedding: features of time; by default 32 log-spaced frequencies from 0.5 to 64 radians per unit.
        dropout: share of hidden values set to zero in each block while training.

    Raises:
        TypeError: a size that is not an integer.
        ValueError: a shape of another number of sides, a size below 1, ``attention`` at a height that no level has, or
            that several have, or ``dropout`` outside [0, 1).
    """

    def __init__(
        self,
        shape: Sequence[int],
        *,
        dims: int = 2,
        channels: int = 64,
        multipliers: Sequence[int] = (1, 2, 2),
        blocks: int = 2,
        attention: Sequence[int | tuple[int, ...]] | None = None,
        head: int = 64,
        classes: int = 0,
        values: int = 0,
        embedding: FourierFeatures | None = None,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.shape, self.sides = checked_shape(shape, dims)
        whole_number(channels, "channels", 2)  # normalising one number alone leaves nothing of it
        whole_number(blocks, "blocks", 1)
        whole_number(head, "head", 1)
        widths = [channels * whole_number(m, "each entry of multipliers", 1) for m in multipliers]
        if not widths:
            raise ValueError("multipliers needs an entry for each level, got none")
        if not 0 <= number(dropout, "dropout") < 1:
            raise ValueError(f"dropout is a share in [0, 1), got {short(dropout)}")
        sizes = [tuple(-(-side // 2**level) for side in self.sides) for level in range(len(widths))]
        attending = {len(sizes) - 1} if attention is None else _levels(attention, sizes)

        convolution = _CONVOLUTIONS[dims]
        colours = self.shape[0] if len(self.shape) > dims else 1
        n = 4 * channels
        phi = FourierFeatures.log_spaced(32, 0.5, 64.0) if embedding is None else embedding
        self.time = nn.Sequential(phi, nn.Linear(phi.size, n), nn.SiLU(), nn.Linear(n, n))
        self.label, self.value = LabelEmbedding(classes, n), ValueEmbedding(values, n)
        self.classes = self.label.classes

        def block(before: int, after: int, attends: bool) -> _Block:
            return _Block(before, after, n, dropout, head if attends else None, convolution)

        self.inlet = convolution(colours, channels, 3, padding=1)
        self.down = nn.ModuleList()
        left, width = [channels], channels  # channels of the states left for the way up
        for level, after in enumerate(widths):
            if level:
                self.down.append(_Halve(convolution, width))
                left.append(width)
            for _ in range(blocks):
                self.down.append(block(width, after, level in attending))
                width = after
                left.append(width)
        self.middle = nn.ModuleList([block(width, width, True), block(width, width, False)])
        self.up = nn.ModuleList()
        for level, after in reversed(list(enumerate(widths))):
            for _ in range(blocks + 1):
                self.up.append(block(width + left.pop(), after, level in attending))
                width = after
            if level:
                self.up.append(_Double(convolution, width))
        self.outlet = nn.Sequential(_norm(width), nn.SiLU(), zeroed(convolution(width, colours, 3, padding=1)))

    @property
    def takes(self) -> Takes:
        """Names of the conditions."""
        return Takes(("label", *self.value.names, "mask"), masks=("mask",))

    @property
    def nulls(self) -> dict[str, Any]:
        """What stands for no condition, by name."""
        return super().nulls | self.value.nulls | {"mask": True}

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        label: Tensor | None = None,
        values: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """``x: (batch, *shape)``, ``t`` of shape ``()`` or ``(batch,)`` to ``(batch, *shape)``.

        Args:
            x: states.
            t: times.
            label: classes, ``(batch,)``.
            values: a continuous condition, ``(batch, values)``; a row with a nan is as if not given.
            mask: where a sample has data, ``(batch, *sides)`` of booleans; everywhere by default.

        Raises:
            ValueError: ``x`` holds states of another shape; a label for a network without classes, values for one
                without; a condition of another shape.
            TypeError: a mask that is not of booleans.
        """
        if tuple(x.shape[1:]) != self.shape:
            raise ValueError(f"this UNet takes states of shape {self.shape}, got x of shape {tuple(x.shape)}")
        e = silu(self.value(self.label(self.time(t).expand(len(x), -1), label), values))
        masks = [place_mask(mask, x, self.sides)]  # (batch, 1, *sides) of each level on the way down
        h = self.inlet(kept(x.reshape(len(x), self.inlet.in_channels, *self.sides), masks[0]))
        left = [h]
        for layer in self.down:
            h = layer(h, e, masks[-1])
            left.append(h)
            if isinstance(layer, _Halve):
                masks.append(_halved(masks[-1]))
        for layer in self.middle:
            h = layer(h, e, masks[-1])
        for layer in self.up:
            if isinstance(layer, _Double):
                masks.pop()
                h = layer(h, left[-1].shape[2:], masks[-1])
            else:
                h = layer(torch.cat([h, left.pop()], 1), e, masks[-1])
        h = self.outlet[2](kept(silu(_normalised(self.outlet[0], h, masks[0])), masks[0]))
        return kept(h, masks[0]).reshape(x.shape)


@final
class _Block(nn.Module):
    def __init__(
        self, before: int, after: int, embedding: int, dropout: float, head: int | None, convolution: Any = nn.Conv2d
    ) -> None:
        super().__init__()
        self.first = nn.Sequential(_norm(before), nn.SiLU(), convolution(before, after, 3, padding=1))
        self.norm = _norm(after)
        self.modulation = nn.Linear(embedding, 2 * after)
        self.second = nn.Sequential(nn.SiLU(), nn.Dropout(dropout), zeroed(convolution(after, after, 3, padding=1)))
        self.skip = nn.Identity() if before == after else convolution(before, after, 1)
        self.attention = nn.Identity() if head is None else _Attention(after, head, convolution)

    def forward(self, h: Tensor, e: Tensor, mask: Tensor | None = None) -> Tensor:
        modulation = self.modulation(e)
        scale, shift = modulation.reshape(*modulation.shape, *(1,) * (h.ndim - 2)).chunk(2, dim=1)
        inner = self.first[2](kept(silu(_normalised(self.first[0], h, mask)), mask))
        inner = _normalised(self.norm, inner, mask) * (1 + scale) + shift
        h = self.skip(h) + self.second[2](kept(self.second[1](silu(inner)), mask))
        return self.attention(h, mask) if isinstance(self.attention, _Attention) else h


@final
class _Attention(nn.Module):
    """``h + W_out softmax(Q K^T / sqrt(c)) V`` over the places of a level (Vaswani et al. 2017, eq. 1)."""

    def __init__(self, channels: int, head: int, convolution: Any = nn.Conv2d) -> None:
        super().__init__()
        self.heads = channels // _divisor(channels, head)
        self.norm = _norm(channels)
        self.qkv = convolution(channels, 3 * channels, 1)
        self.out = zeroed(convolution(channels, channels, 1))

    def forward(self, h: Tensor, mask: Tensor | None = None) -> Tensor:
        # (batch, 3 channels, *sides) to three of (batch, heads, places, channels of a head)
        qkv = self.qkv(_normalised(self.norm, h, mask))
        q, k, v = qkv.reshape(len(h), 3, self.heads, h.shape[1] // self.heads, math.prod(h.shape[2:])).mT.unbind(1)
        return h + self.out(attended(q, k, v, None if mask is None else mask.flatten(1)).mT.reshape(h.shape))


@final
class _Halve(nn.Module):
    def __init__(self, convolution: Any, channels: int) -> None:
        super().__init__()
        self.conv = convolution(channels, channels, 3, stride=2, padding=1)

    def forward(self, h: Tensor, e: Tensor, mask: Tensor | None) -> Tensor:
        return self.conv(kept(h, mask))


@final
class _Double(nn.Module):
    def __init__(self, convolution: Any, channels: int) -> None:
        super().__init__()
        self.conv = convolution(channels, channels, 3, padding=1)

    def forward(self, h: Tensor, sides: tuple[int, ...], mask: Tensor | None) -> Tensor:
        return self.conv(kept(interpolate(h, size=sides, mode="nearest"), mask))


def checked_shape(shape: Sequence[int], dims: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The shape of a state, and its last ``dims`` entries, its sides.

    Raises:
        TypeError: no sequence, or a size that is not an integer.
        ValueError: another number of sides, with or without colours; a size below 1; ``dims`` other than 1, 2 or 3.
    """
    if whole_number(dims, "dims", 1) > 3:
        raise ValueError(f"dims must be 1, 2 or 3, got {short(dims)}")
    if not isinstance(shape, Sequence) or isinstance(shape, str):
        raise TypeError(f"shape must be the sizes of one state, such as (3, 32, 32), got {short(shape)}")
    checked = tuple(whole_number(n, "each entry of shape", 1) for n in shape)
    if len(checked) not in (dims, dims + 1):
        sides = ("length",) if dims == 1 else _SIDES[-dims:]
        alone = f"({', '.join(sides)}{',' * (dims == 1)})"
        raise ValueError(
            f"with dims={dims} shape must be {alone} or (colours, {', '.join(sides)}), got {short(checked)}"
        )
    return checked, checked[-dims:]


def _levels(attention: Sequence[int | tuple[int, ...]], sizes: list[tuple[int, ...]]) -> set[int]:
    """Levels by their sizes, or by the first side that is longer than 1."""
    axis = next((k for k, side in enumerate(sizes[0]) if side > 1), 0)
    dims = len(sizes[0])
    name = "length" if axis == dims - 1 else _SIDES[-dims:][axis]
    attending: set[int] = set()
    for named in attention:
        found = {k for k, size in enumerate(sizes) if named in (size, size[axis])}
        found = found or {k for k, size in enumerate(sizes) if named == size[0]}
        if not found:
            raise ValueError(
                f"attention={tuple(attention)} names a {name} that no level has; they are {[s[axis] for s in sizes]}"
            )
        if len({sizes[k] for k in found}) > 1:
            sides = ", ".join(("length",) if dims == 1 else _SIDES[-dims:])
            raise ValueError(f"several levels have the {name} {named}; name them by ({sides}), some of {sizes}")
        attending |= found
    return attending


def _halved(mask: Tensor | None) -> Tensor | None:
    """Where cells of two places a side have any data."""
    if mask is None:
        return None
    return _POOLS[mask.ndim - 2](mask.float(), 2, ceil_mode=True) > 0


def _normalised(norm: nn.Module, h: Tensor, mask: Tensor | None) -> Tensor:
    """Group normalisation by the mean and variance of places that have data."""
    if mask is None or not isinstance(norm, nn.GroupNorm):
        return norm(h)
    cells = h.reshape(len(h), norm.num_groups, -1, *h.shape[2:])
    there, axes = mask.unsqueeze(1), tuple(range(2, cells.ndim))
    count = (cells.shape[2] * there.sum(axes, keepdim=True)).clamp(min=1)
    mean = kept(cells, there).sum(axes, keepdim=True) / count
    centred = kept(cells - mean, there)
    unit = (centred * (centred.square().sum(axes, keepdim=True) / count + norm.eps).rsqrt()).reshape(h.shape)
    sides = (1,) * (h.ndim - 2)
    return unit * norm.weight.reshape(-1, *sides) + norm.bias.reshape(-1, *sides)


def _norm(channels: int) -> nn.GroupNorm:
    """Groups of at least 4 channels where the number divides so, and at most 32 groups."""
    return nn.GroupNorm(_divisor(channels, min(32, max(1, channels // 4))), channels)


def _divisor(n: int, limit: int) -> int:
    return max(d for d in range(1, min(n, limit) + 1) if n % d == 0)
