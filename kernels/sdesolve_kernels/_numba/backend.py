"""The Numba back end: hand-written and generated kernels for CPU tensors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..backend import Backend, Ops, installed

if TYPE_CHECKING:
    from ..trajectory.adaptive import Rule
    from ..trajectory.launch import AbstractTrajectory
    from ..trajectory.plan import Plan
    from ..trajectory.reactions import ReactionRule

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

    def adaptive(self, plan: Plan, rule: Rule | ReactionRule, seconds: float = math.inf) -> AbstractTrajectory:
        from ..trajectory.numba_adaptive import NumbaAdaptive
        from ..trajectory.numba_reactions import NumbaReactions
        from ..trajectory.reactions import ReactionRule

        if isinstance(rule, ReactionRule):
            return NumbaReactions(plan, rule, seconds)

        return NumbaAdaptive(plan, rule, seconds)
