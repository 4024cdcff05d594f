"""Layers that more than one network is made of."""

from __future__ import annotations

from typing import TypeVar, final

from torch import Tensor, nn

Affine = TypeVar("Affine", nn.Linear, nn.Conv2d)


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
