"""Checks of samples."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from sdesolve._internal.arguments import kind_of, whole_number
from sdesolve._internal.modes import evaluation_mode

Samples = Tensor | Iterable[Tensor]
Features = Callable[[Tensor], Tensor]


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


def flat_pair(
    a: Samples, b: Samples, least: int, features: Features | None = None, batch_size: int = 256
) -> tuple[Tensor, Tensor]:
    """Two samples of states of one shape as float64 ``(n, d)`` and ``(m, d)``, at least ``least`` rows each."""
    x, y = (samples(featured(value, name, features, batch_size), name, least) for name, value in (("a", a), ("b", b)))
    if x.shape[1:] != y.shape[1:]:
        raise ValueError(
            f"states of both samples must have one shape, got {tuple(x.shape[1:])} and {tuple(y.shape[1:])}"
        )
    return x.reshape(len(x), -1), y.reshape(len(y), -1)


def featured(x: Samples, name: str, features: Features | None, batch_size: int) -> Any:
    """Features ``(n, f)`` of samples, batch by batch; samples as they are, without ``features``.

    Args:
        x: ``(n, *state)``, or batches of such, of which a tuple begins with the states (a loader's).
        name: what messages call it.
        features: of a batch, ``(batch, ...)``, flattened here; networks are in evaluation mode, without gradients.
        batch_size: rows of a batch where ``x`` is a tensor.

    Raises:
        TypeError: ``features`` cannot be called or returns no tensor; batches that are no tensors.
        ValueError: no batch; not a row for each sample.
    """
    if features is None:
        return x
    if not callable(features):
        raise TypeError(f"features must be a function of a batch of samples, got {kind_of(features)}")
    rows = []
    with torch.no_grad(), evaluation_mode(features):
        for batch in _batches(x, name, whole_number(batch_size, "batch_size", 1)):
            made = features(batch)
            if not isinstance(made, Tensor):
                raise TypeError(f"features must return a tensor (batch, features), got {kind_of(made)}")
            if made.ndim == 0 or len(made) != len(batch):
                raise ValueError(
                    f"features must return a row for each of {len(batch)} samples, got shape {tuple(made.shape)}"
                )
            rows.append(made.reshape(len(made), -1).double())
    if not rows:
        raise ValueError(f"{name} holds no sample")
    return torch.cat(rows)


def _batches(x: Samples, name: str, batch_size: int) -> Iterator[Tensor]:
    if isinstance(x, Tensor):
        yield from x.split(batch_size) if x.ndim else [x[None]]
        return
    if not isinstance(x, Iterable):
        raise TypeError(f"{name} must be a tensor (n, *state) or batches of such, got {kind_of(x)}")
    for part in x:
        batch = part[0] if isinstance(part, list | tuple) else part
        if not isinstance(batch, Tensor) or batch.ndim == 0:
            raise TypeError(f"batches of {name} must be tensors (batch, *state), got {kind_of(batch)}")
        yield batch
