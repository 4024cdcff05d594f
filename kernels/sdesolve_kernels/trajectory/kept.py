"""Symbolic tensors that a function keeps: a table that it makes when it is first called, the entries of a cache.

The function is used again after it was traced, with ordinary tensors. What it kept then has to be one as well.
"""

from __future__ import annotations

import contextlib
import contextvars
import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

__all__ = ["note", "settled"]

_made: contextvars.ContextVar[list[weakref.ref[Any]] | None] = contextvars.ContextVar("made", default=None)


def note(made: Any) -> None:
    """Has a traced tensor looked at when `settled` ends."""
    noted = _made.get()
    if noted is not None:
        noted.append(weakref.ref(made))


@contextlib.contextmanager
def settled() -> Iterator[None]:
    """Traced tensors that are still in use at the end become ordinary ones, if their values are known."""
    token = _made.set([])
    try:
        yield
    finally:
        noted = _made.get() or []
        _made.reset(token)
        for tracer in {id(made.tracer): made.tracer for made in map(_referent, noted) if made is not None}.values():
            tracer.forget()
        kept = [made for made in map(_referent, noted) if made is not None]
        noted.clear()  # a tensor that is referred to weakly stays what it is
        while kept:
            _settle(kept.pop())


def _referent(reference: weakref.ref[Any]) -> Any:
    return reference()


def _settle(made: Any) -> None:
    if any(e is None for e in made.elements.flat):
        return
    values = made.tracer.values(made)
    if values is not None:
        ordinary: Tensor = torch.tensor(values, dtype=made.dtype, device=made.tracer.device).reshape(made.shape)
        with contextlib.suppress(RuntimeError):
            torch.utils.swap_tensors(made, ordinary)
