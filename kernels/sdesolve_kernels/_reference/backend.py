"""The reference back end: plain torch, on any device."""

from __future__ import annotations

from ..backend import Backend, Ops

__all__ = ["ReferenceBackend"]


class ReferenceBackend(Backend):
    """What the other back ends are compared with, and what runs where none of them does."""

    name = "reference"
    devices = None
    priority = 0

    def ops(self) -> Ops:
        from . import ops

        return ops
