"""The Numba back end: hand-written and generated kernels for CPU tensors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..backend import Backend, Ops, installed

if TYPE_CHECKING:
    from ..trajectory.adaptive import AbstractAdaptive, Rule
    from ..trajectory.launch import AbstractTrajectory
    from ..trajectory.plan import Plan

__all__ = ["NumbaBackend"]


class NumbaBackend(Backend):
    """Kernels compiled by Numba."""

    name = "numba"
    devices = frozenset({"cpu"})
    priority = 10
    compiles = True

    def missing(self) -> str:
        return "" if installed("numba") else "numba"

    def ops(self) -> Ops:
        from . import ops

        return ops

    def compile(self, plan: Plan, increments: Sequence[str], seconds: float = math.inf) -> AbstractTrajectory:
        from ..trajectory.numba_launch import NumbaTrajectory

        return NumbaTrajectory(plan, increments, seconds)

    def adaptive(self, plan: Plan, rule: Rule, seconds: float = math.inf) -> AbstractAdaptive:
        from ..trajectory.numba_adaptive import NumbaAdaptive

        return NumbaAdaptive(plan, rule, seconds)
