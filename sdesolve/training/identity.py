"""What data are, as a short text: equal for equal data, and different as soon as one number is."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

_CHUNK = 1 << 24  # elements copied to the host at a time
_TEXTS = (str, bytes, int, float, complex, bool, type(None))


def identity(data: object) -> str:
    """The kind of ``data`` and a checksum of what they hold: tensors and arrays in full, lists, texts and numbers.

    A loader is known by its data set, the size of its batches and the kind of its sampler; a data set by the tensors,
    arrays, lists, texts and data sets that are its attributes. Numbers and dictionaries among them are left out, which
    count and keep what was loaded. What cannot be looked into is known by its class alone.
    """
    digest = hashlib.blake2b(digest_size=8)
    for piece in _pieces(data, set()):
        digest.update(piece)
    return f"{type(data).__name__} {digest.hexdigest()}"


def _pieces(value: Any, above: set[int]) -> Iterator[Any]:
    if isinstance(value, _TEXTS):
        yield repr(value).encode()
        return
    yield f"<{type(value).__module__}.{type(value).__qualname__}>".encode()
    if id(value) in above:
        return
    above = above | {id(value)}
    if isinstance(value, Tensor):
        yield from _numbers(value)
    elif isinstance(value, np.ndarray) and value.dtype != object:
        yield f"{value.shape} {value.dtype}".encode()
        yield np.ascontiguousarray(value).reshape(-1).view(np.uint8).data
    elif isinstance(value, DataLoader):
        yield repr((value.batch_size, type(value.sampler).__name__, value.drop_last)).encode()
        yield from _pieces(value.dataset, above)
    elif isinstance(value, Mapping):
        for key, entry in value.items():
            yield repr(key).encode()
            yield from _pieces(entry, above)
    elif isinstance(value, list | tuple | range | np.ndarray):
        yield repr(len(value)).encode()
        for entry in value:
            yield from _pieces(entry, above)
    else:
        for name, held in sorted(getattr(value, "__dict__", {}).items()):
            if isinstance(held, Tensor | np.ndarray | Dataset | DataLoader | list | tuple | range | str):
                yield name.encode()
                yield from _pieces(held, above)


def _numbers(value: Tensor) -> Iterator[Any]:
    yield f"{tuple(value.shape)} {value.dtype}".encode()
    if value.layout is not torch.strided:
        value = value.to_dense()
    rows = max(1, _CHUNK // max(1, value[0].numel())) if value.ndim and len(value) else 1
    for part in value.detach().split(rows) if value.ndim else (value.detach(),):
        host = part.to("cpu").resolve_conj().resolve_neg().contiguous()
        yield host.reshape(-1).view(torch.uint8).numpy().data
