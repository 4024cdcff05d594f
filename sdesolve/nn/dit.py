"""A diffusion transformer for sequences, images and volumes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.nn.functional import silu

from sdesolve._internal.arguments import short, whole_number
from sdesolve.nn.embeddings import FourierFeatures
from sdesolve.nn.labels import LabelEmbedding, LabelledNetwork, Takes, ValueEmbedding, check_rows, place_mask
from sdesolve.nn.layers import attended, kept, zeroed
from sdesolve.nn.rebuilding import rebuildable
from sdesolve.nn.unet import checked_shape


@final
@rebuildable
class DiT(LabelledNetwork):
    """``net(x, t, label, values, context, context_mask, mask)``: a transformer over patches, with adaLN-Zero.

    A state is cut into patches of ``patch`` places a side, each of which becomes a token ``h_i = W patch_i + p_i``
    with ``p_i`` the sines and cosines of its place. Tokens of a sequence condition, ``context``, are appended. Then
    ``depth`` blocks

        ``h <- h + g_1 attention((1 + a_1) norm(h) + b_1)``, ``h <- h + g_2 mlp((1 + a_2) norm(h) + b_2)``

    with all ``a, b, g`` linear in an embedding of time, class and values, and zero at first, so that every block starts
    as the identity; the last layer starts at zero, so that a new network returns zeros (Peebles and Xie 2023, section
    3.2: adaLN-Zero for time and class, in-context conditioning for sequences).

    Nothing attends to tokens that masks leave out. Where ``mask`` is false the state counts as 0, and so does the
    result; a patch is left out where none of its places has data.

    Args:
        shape: shape of one state: its sides, or ``(colours, *sides)``.
        dims: how many sides there are, as for `UNet`.
        patch: places a side of a patch, or one number for each side; sides must be multiples of it.
        width: numbers of a token, an even multiple of ``heads``.
        depth: blocks.
        heads: attention heads.
        ratio: hidden units of a block's perceptron over ``width``.
        classes: number of classes; 0 for a network without labels.
        values: numbers of a continuous condition, ``values: (batch, values)``, of about unit size; 0 for none.
        context: numbers of a token of a sequence condition, ``context: (batch, tokens, context)``; 0 for none. Tokens
            have no order but what their numbers say.
        embedding: features of time; by default 32 log-spaced frequencies from 0.5 to 64 radians per unit.

    Raises:
        TypeError: a size that is not an integer.
        ValueError: a shape of another number of sides; sides that are no multiples of ``patch``; a ``width`` that is no
            even multiple of ``heads``, or too small for the places; a size below 1.
    """

    def __init__(
        self,
        shape: Sequence[int],
        *,
        dims: int = 2,
        patch: int | Sequence[int] = 2,
        width: int = 128,
        depth: int = 4,
        heads: int = 4,
        ratio: int = 4,
        classes: int = 0,
        values: int = 0,
        context: int = 0,
        embedding: FourierFeatures | None = None,
    ) -> None:
        super().__init__()
        self.shape, self.sides = checked_shape(shape, dims)
        each = list(patch) if isinstance(patch, Sequence) else [patch] * dims
        self.patch = tuple(whole_number(n, "patch", 1) for n in each)
        if len(self.patch) != dims or any(side % n for side, n in zip(self.sides, self.patch, strict=True)):
            raise ValueError(
                f"patch must divide the sides {self.sides}, one number for all or one for each; got {short(patch)}"
            )
        depth, heads = whole_number(depth, "depth", 1), whole_number(heads, "heads", 1)
        if whole_number(width, "width", 1) % (2 * heads) or width < 2 * dims:
            raise ValueError(f"width must be an even multiple of heads={heads}, {2 * dims} or more, got {short(width)}")
        ratio, context = whole_number(ratio, "ratio", 1), whole_number(context, "context", 0)
        self.colours = self.shape[0] if len(self.shape) > dims else 1
        cells = self.colours * math.prod(self.patch)
        phi = FourierFeatures.log_spaced(32, 0.5, 64.0) if embedding is None else embedding
        self.time = nn.Sequential(phi, nn.Linear(phi.size, width), nn.SiLU(), nn.Linear(width, width))
        self.label, self.value = LabelEmbedding(classes, width), ValueEmbedding(values, width)
        self.classes, self.context = self.label.classes, context
        self.inlet = nn.Linear(cells, width)
        self.told = nn.Sequential(nn.Linear(context, width), nn.LayerNorm(width)) if context else None
        tokens = [side // n for side, n in zip(self.sides, self.patch, strict=True)]
        self.register_buffer("places", _places(tokens, width), persistent=False)
        self.blocks = nn.ModuleList(_DiTBlock(width, heads, ratio) for _ in range(depth))
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.modulation, self.outlet = zeroed(nn.Linear(width, 2 * width)), zeroed(nn.Linear(width, cells))

    places: Tensor

    @property
    def takes(self) -> Takes:
        """Names of the conditions."""
        of_context = ("context", "context_mask") if self.context else ()
        return Takes(("label", *self.value.names, *of_context, "mask"), masks=(*of_context[1:], "mask"))

    @property
    def nulls(self) -> dict[str, Any]:
        """What stands for no condition, by name."""
        of_context = {"context": math.nan, "context_mask": True} if self.context else {}
        return super().nulls | self.value.nulls | of_context | {"mask": True}

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        label: Tensor | None = None,
        values: Tensor | None = None,
        context: Tensor | None = None,
        context_mask: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """``x: (batch, *shape)``, ``t`` of shape ``()`` or ``(batch,)`` to ``(batch, *shape)``.

        Args:
            x: states.
            t: times.
            label: classes, ``(batch,)``.
            values: a continuous condition, ``(batch, values)``; a row with a nan is as if not given.
            context: a sequence condition, ``(batch, tokens, context)`` or one row for all, ``(1, tokens, context)``; a
                token with a nan is as if not there.
            context_mask: which of its tokens are there, ``(batch, tokens)`` of booleans; all by default.
            mask: where a sample has data, ``(batch, *sides)`` of booleans; everywhere by default.

        Raises:
            ValueError: ``x`` holds states of another shape; a condition that the network was built without, or of
                another shape.
            TypeError: a mask that is not of booleans.
        """
        if tuple(x.shape[1:]) != self.shape:
            raise ValueError(f"this DiT takes states of shape {self.shape}, got x of shape {tuple(x.shape)}")
        e = silu(self.value(self.label(self.time(t).expand(len(x), -1), label), values))
        there = place_mask(mask, x, self.sides)
        h = self.inlet(self._cut(kept(x.reshape(len(x), self.colours, *self.sides), there))) + self.places.to(x.dtype)
        count = h.shape[1]
        keys = None if there is None else self._cut(there).any(2)
        if context is not None:
            told, known = self._told(context, context_mask, len(x))
            keys = torch.cat([known.new_ones(h.shape[:2]) if keys is None else keys, known], 1)
            h = torch.cat([h, told], 1)
        elif context_mask is not None:
            raise ValueError("a context_mask needs a context whose tokens it names")
        for block in self.blocks:
            h = block(h, e, keys)
        scale, shift = self.modulation(e)[:, None].chunk(2, dim=2)
        h = self.outlet(self.norm(h[:, :count]) * (1 + scale) + shift)
        return kept(self._joined(h), there).reshape(x.shape)

    def _told(self, context: Tensor, mask: Tensor | None, samples: int) -> tuple[Tensor, Tensor]:
        """Tokens of a sequence condition, and which of them are there."""
        if self.told is None:
            raise ValueError("this network was built without a context and takes none; build it with context=n")
        if context.ndim != 3 or context.shape[2] != self.context:
            raise ValueError(
                f"this network takes a context (batch, tokens, {self.context}), got shape {tuple(context.shape)}"
            )
        check_rows("context", context, samples)
        context = context.expand(samples, -1, -1)
        there = place_mask(mask, context, tuple(context.shape[1:2]), "context_mask")
        known = ~context.isnan().any(2)
        known = known if there is None else known & there[:, 0]
        return self.told(kept(context, known[..., None])), known

    def _cut(self, x: Tensor) -> Tensor:
        """``(batch, colours, *sides)`` to ``(batch, tokens, numbers of a patch)``."""
        for axis, n in enumerate(self.patch, 2):
            x = x.unfold(axis, n, n)
        return x.movedim(1, len(self.patch) + 1).flatten(1, len(self.patch)).flatten(2)

    def _joined(self, h: Tensor) -> Tensor:
        """The way back."""
        dims = len(self.patch)
        tokens = [side // n for side, n in zip(self.sides, self.patch, strict=True)]
        h = h.reshape(len(h), *tokens, self.colours, *self.patch)
        order = [0, dims + 1, *(axis for k in range(dims) for axis in (1 + k, dims + 2 + k))]
        return h.permute(order).reshape(len(h), self.colours, *self.sides)


@final
class _DiTBlock(nn.Module):
    def __init__(self, width: int, heads: int, ratio: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.modulation = zeroed(nn.Linear(width, 6 * width))
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.Linear(width, ratio * width), nn.GELU(approximate="tanh"), nn.Linear(ratio * width, width)
        )

    def forward(self, h: Tensor, e: Tensor, keys: Tensor | None) -> Tensor:
        a1, b1, g1, a2, b2, g2 = self.modulation(e)[:, None].chunk(6, dim=2)
        # (batch, tokens, 3 width) to three of (batch, heads, tokens, numbers of a head)
        qkv = self.qkv(self.norm(h) * (1 + a1) + b1).unflatten(2, (3, self.heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        h = h + g1 * self.out(attended(q, k, v, keys).transpose(1, 2).flatten(2))
        return h + g2 * self.mlp(self.norm(h) * (1 + a2) + b2)


def _places(tokens: Sequence[int], width: int) -> Tensor:
    """``(tokens, width)``: cosines and sines of the place along each side at frequencies from 1 down to 1e-4."""
    count = width // (2 * len(tokens))
    w = 1e-4 ** (torch.arange(count) / count)
    at = torch.meshgrid(*(torch.arange(float(n)) for n in tokens), indexing="ij")
    phase = torch.cat([place.reshape(-1, 1) * w for place in at], 1)
    features = torch.cat([phase.cos(), phase.sin()], 1)
    return nn.functional.pad(features, (0, width - features.shape[1]))
