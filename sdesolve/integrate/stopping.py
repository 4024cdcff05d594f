"""Runs of kernels whose paths stop: a few steps at a time, of those that still run."""

from __future__ import annotations

import bisect
import dataclasses
from typing import final

import torch
from sdesolve_kernels.trajectory import AbstractTrajectory, Launch, Moments
from sdesolve_kernels.trajectory.launch import Saved as Run
from torch import Tensor

_SHARE = 0.15  # of the running paths, that should stop from one look to the next
_FIRST = 8  # steps until the first look
_LEAST = 1 << 12  # path-steps that are worth a launch


@final
class Stopping(AbstractTrajectory):
    """A trajectory whose paths stop: they leave the batch, and those that run keep their numbers.

    Between two looks some paths run on for nothing, half as many steps as lie between. The distance is such that about
    the same share of the running paths stops each time, so that is some percent of the work, whatever their lives.

    Args:
        trajectory: of a program that has the numbers of its paths listed.
        which: the place of the number of a path's boundary (0 while it runs) in what is carried beside the state.

    Attributes:
        work: steps of paths that were computed.
    """

    def __init__(self, trajectory: AbstractTrajectory, which: int) -> None:
        self._trajectory, self._which, self.plan, self.work = trajectory, which, trajectory.plan, 0

    @property
    def source(self) -> str:  # type: ignore[override]  # it may depend on the launch
        return self._trajectory.source

    def run(self, launch: Launch) -> Run:
        batch, self.work = len(launch.x0), 0
        assert launch.memory is not None
        x, memory = launch.x0.detach().clone(), launch.memory.detach().clone()
        numbers = torch.arange(batch, device=x.device) if launch.paths is None else launch.paths.to(x.device)
        saves, saved, moments = list(launch.saves), None, list[Moments]()
        if saves and not launch.moments:
            saved = x.new_empty(len(saves), batch, self.plan.width)

        def some(rows: Tensor, first: int, last: int, kept: list[int], *, moments: bool = False) -> Run:
            captured = [
                c[rows] if each else c for c, each in zip(launch.captured, self.plan.program.by_path, strict=True)
            ]
            piece = dataclasses.replace(
                launch, x0=x[rows], memory=memory[rows], captured=captured, paths=numbers[rows], saves=kept,
                moments=moments, first_step=first, last_step=last,
            )  # fmt: skip
            return self._trajectory.run(piece)

        everything = torch.arange(batch, device=x.device)
        running = memory[:, self._which] == 0
        rows, k, length = everything[running], launch.first_step, _FIRST
        # What a path that has stopped shows is what it showed then.
        self._fill(saved, saves, k - 1, everything[~running], lambda which: some(which, k, k, [k]).states)
        while k < launch.end and len(rows):
            length = max(length, -(-_LEAST // len(rows)))
            stop = min(k + length, launch.end)
            at = bisect.bisect_left(saves, k) if k == launch.first_step else bisect.bisect_right(saves, k)
            if launch.moments:
                stop = min([stop, *(s for s in saves[at : at + 1] if s > k)])
                if at < len(saves) and saves[at] == k:
                    moments.append(_moments(some(everything, k, k, [k], moments=True)))
            kept = [] if launch.moments else saves[at : bisect.bisect_right(saves, stop)]
            made = some(rows, k, stop, kept)
            assert made.memory is not None
            self.work += len(rows) * (stop - k)
            if saved is not None and made.states is not None:
                saved[at : at + len(kept), rows] = made.states
            x[rows], memory[rows] = made.x1, made.memory
            still = made.memory[:, self._which] == 0
            share = 1.0 - float(still.sum()) / len(rows)
            stopped, rows, taken, k = rows[~still], rows[still], stop - k, stop
            self._fill(saved, saves, k, stopped, lambda which, k=k: some(which, k, k, [k]).states)
            length = max(1, int(taken * min(2.0, max(0.25, _SHARE / max(share, 1e-9)))))
            if launch.moments and k in saves:
                moments.append(_moments(some(everything, k, k, [k], moments=True)))
        self._fill(saved, saves, k, rows, lambda which: some(which, k, k, [k]).states)
        if not launch.moments:
            return Run(x, saved, None, memory)
        if len(moments) < len(saves):
            last = _moments(some(everything, k, k, [k], moments=True))
            moments += [last] * (len(saves) - len(moments))
        mean, variance = (torch.cat([getattr(m, name) for m in moments]) for name in ("mean", "variance"))
        return Run(x, None, Moments(mean, variance), memory)

    @staticmethod
    def _fill(saved: Tensor | None, saves: list[int], k: int, rows: Tensor, show: object) -> None:
        """What paths that have stopped by step ``k`` show at all later times."""
        later = bisect.bisect_right(saves, k)
        if saved is None or later == len(saves) or not len(rows):
            return
        seen = show(rows)  # type: ignore[operator]
        saved[later:, rows] = seen


def _moments(run: Run) -> Moments:
    assert run.moments is not None
    return run.moments
