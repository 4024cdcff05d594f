"""Layers that more than one network is made of."""

from __future__ import annotations

from typing import TypeVar, final

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

Affine = TypeVar("Affine", bound=nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d)


@final
class ModulatedBlock(nn.Module):
    """``h <- h + W_2 silu((1 + a) W_1 norm(h) + b)`` with ``a``, ``b`` linear in an embedding; first the identity."""

    def __init__(self, width: int, embedding: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width))
        self.modulation = nn.Linear(embedding, 2 * width)
        self.second = nn.Sequential(nn.SiLU(), nn.Dropout(dropout), zeroed(nn.Linear(width, width)))

    def forward(self, h: Tensor, e: Tensor) -> Tensor:
        scale, shift = self.modulation(e).chunk(2, dim=-1)
        return h + self.second(self.first(h) * (1 + scale) + shift)


def zeroed(layer: Affine) -> Affine:
    """The layer with zero weights: a residual branch that ends in it starts as nothing."""
    nn.init.zeros_(layer.weight)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer


def kept(h: Tensor, mask: Tensor | None) -> Tensor:
    """``h`` where the mask is true, else 0, whatever ``h`` is there."""
    return h if mask is None else torch.where(mask, h, 0.0)


def attended(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """``softmax(Q K^T / sqrt(c)) V`` for ``(batch, heads, places, c)``, over keys ``mask: (batch, places)`` alone.

    A row without any key attends to all of them: it has no place whose result counts, and must not become nan.
    """
    if mask is not None:
        mask = (mask | ~mask.any(1, keepdim=True))[:, None, None]
    return scaled_dot_product_attention(q, k, v, attn_mask=mask)
