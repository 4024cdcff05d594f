"""Checks of samples."""

from __future__ import annotations

import torch
from torch import Tensor

from sdesolve._internal.arguments import kind_of


def samples(x: Tensor, name: str, least: int) -> Tensor:
    """``x`` as float64 on its own device."""
    try:
        x = torch.as_tensor(x).detach()
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"{name} must be a tensor (n, *state) of samples, got {kind_of(x)}") from None
    if x.is_meta or x.layout != torch.strided:
        raise TypeError(f"{name} must be a dense tensor with values, got one of layout {x.layout} on {x.device}")
    if x.is_complex() or x.is_quantized:
        raise TypeError(f"{name} must be real, got {x.dtype}")
    if x.ndim == 0 or len(x) < least or x.numel() == 0:
        raise ValueError(
            f"{name} must hold at least {least} sample(s) along its first axis, got shape {tuple(x.shape)}"
        )
    x = x.double()
    if not bool(x.isfinite().all()):
        raise ValueError(f"{name} must be finite, it holds nan or inf")
    return x


def flat_pair(a: Tensor, b: Tensor, least: int) -> tuple[Tensor, Tensor]:
    """Two samples of states of one shape as float64 ``(n, d)`` and ``(m, d)``, at least ``least`` rows each."""
    a, b = samples(a, "a", least), samples(b, "b", least)
    if a.shape[1:] != b.shape[1:]:
        raise ValueError(
            f"states of both samples must have one shape, got {tuple(a.shape[1:])} and {tuple(b.shape[1:])}"
        )
    return a.reshape(len(a), -1), b.reshape(len(b), -1)
