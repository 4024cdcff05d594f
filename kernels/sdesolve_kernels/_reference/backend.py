"""The reference back end: plain torch, on any device."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..backend import Backend, Ops

if TYPE_CHECKING:
    from ..trajectory.launch import AbstractTrajectory
    from ..trajectory.plan import Plan

__all__ = ["ReferenceBackend"]


class ReferenceBackend(Backend):
    """What the other back ends are compared with, and what runs where none of them does."""

    name = "reference"
    devices = None
    priority = 0

    def ops(self) -> Ops:
        from . import ops

        return ops

    def compile(self, plan: Plan, increments: Sequence[str], seconds: float = math.inf) -> AbstractTrajectory:
        from ..trajectory.reference import ReferenceTrajectory

        return ReferenceTrajectory(plan, increments)
