"""The Triton back end: hand-written and generated kernels for NVIDIA GPUs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from ..backend import Backend, Ops, installed

if TYPE_CHECKING:
    from ..trajectory.adaptive import Rule
    from ..trajectory.launch import AbstractTrajectory
    from ..trajectory.plan import Plan
    from ..trajectory.reactions import ReactionRule

__all__ = ["TritonBackend"]


class TritonBackend(Backend):
    """Kernels compiled by Triton."""

    name = "triton"
    devices = frozenset({"cuda"})
    priority = 10
    compiles = True

    def missing(self) -> str:
        if torch.version.hip is not None:  # whose devices torch calls "cuda" too
            return "a GPU of NVIDIA's, for which the kernels are written,"
        return "" if installed("triton") else "triton"

    def ops(self) -> Ops:
        from . import ops

        return ops

    def compile(self, plan: Plan, increments: Sequence[str], seconds: float = math.inf) -> AbstractTrajectory:
        from ..trajectory.triton_launch import TritonTrajectory

        return TritonTrajectory(plan, increments)

    def adaptive(self, plan: Plan, rule: Rule | ReactionRule, seconds: float = math.inf) -> AbstractTrajectory:
        from ..trajectory.reactions import ReactionRule
        from ..trajectory.tracing import Unsupported
        from ..trajectory.triton_adaptive import TritonAdaptive

        if isinstance(rule, ReactionRule):
            raise Unsupported("reactions one by one have no Triton kernel")

        return TritonAdaptive(plan, rule)
