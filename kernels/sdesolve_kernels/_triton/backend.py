"""The Triton back end: hand-written and generated kernels for NVIDIA GPUs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..backend import Backend, Ops, installed

if TYPE_CHECKING:
    from ..trajectory.adaptive import AbstractAdaptive, Rule
    from ..trajectory.launch import AbstractTrajectory
    from ..trajectory.plan import Plan

__all__ = ["TritonBackend"]


class TritonBackend(Backend):
    """Kernels compiled by Triton."""

    name = "triton"
    devices = frozenset({"cuda"})
    priority = 10
    compiles = True

    def missing(self) -> str:
        return "" if installed("triton") else "triton"

    def ops(self) -> Ops:
        from . import ops

        return ops

    def compile(self, plan: Plan, increments: Sequence[str], seconds: float = math.inf) -> AbstractTrajectory:
        from ..trajectory.triton_launch import TritonTrajectory

        return TritonTrajectory(plan, increments)

    def adaptive(self, plan: Plan, rule: Rule, seconds: float = math.inf) -> AbstractAdaptive:
        from ..trajectory.triton_adaptive import TritonAdaptive

        return TritonAdaptive(plan, rule)
