"""Reactions in a kernel: what is to be made, and one run."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable, Sequence
from typing import final

from torch import Tensor

from sdesolve_kernels.trajectory.launch import AbstractTrajectory

__all__ = ["AbstractReactions", "ReactionLaunch", "ReactionRule"]


@final
@dataclasses.dataclass(frozen=True)
class ReactionRule:
    """What reactions do to counts; the program carries the state, and propensities behind it.

    Attributes:
        stoichiometry: a row for each species, a number for each reaction.
    """

    stoichiometry: tuple[tuple[float, ...], ...]


@final
@dataclasses.dataclass(frozen=True)
class ReactionLaunch:
    """One run.

    Attributes:
        x: counts to begin with, ``(batch, species)``.
        times: the grid, float64 on the host.
        captured: tensors that the program reads.
        numbers: seed and number of each path, ``(batch, 2)``, as bits of int64.
        stream: of the words.
        first_number: block of words of a path's first event.
        clock: what is left to wait for, events so far and reactions so far, ``(batch, 3)``, float64; goes on.
        first_step: the step to begin with.
        slots: for each grid point where its states go in ``kept``, or -1.
        kept: ``(slots, batch, species)``.
        out: counts at the end, ``(batch, species)``.
        most: reactions that a path may have in a step.
        at_once: paths between two looks whether the run was interrupted.
        progress: called with paths that are done since the last call.
    """

    x: Tensor
    times: Tensor
    captured: Sequence[Tensor]
    numbers: Tensor
    stream: int
    first_number: int
    clock: Tensor
    first_step: int
    slots: Tensor
    kept: Tensor
    out: Tensor
    most: int
    at_once: int = 16
    progress: Callable[[int], None] | None = None


class AbstractReactions(AbstractTrajectory):
    """A compiled network of reactions, which are simulated one by one."""

    rule: ReactionRule

    @abc.abstractmethod
    def react(self, launch: ReactionLaunch) -> Tensor:
        """Carries all paths to the end of the grid.

        Returns:
            0 for each path that arrived, ``(batch,)``; others had propensities or counts that are none, or too many
            reactions.
        """
