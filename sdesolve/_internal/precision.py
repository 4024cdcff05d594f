"""Whether networks compute in the precision of their own weights, where that is 16 bits, on states of float32."""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Iterator

import torch

NARROW = (torch.float16, torch.bfloat16)
_own = contextvars.ContextVar("_own", default=False)


@contextlib.contextmanager
def networks_in_their_own() -> Iterator[None]:
    """Within, a `NetworkScore` gives its network states in the 16 bits of its weights, and takes what it returns."""
    before = _own.set(True)
    try:
        yield
    finally:
        _own.reset(before)


def are_networks_in_their_own() -> bool:
    """Whether that holds here."""
    return _own.get()
