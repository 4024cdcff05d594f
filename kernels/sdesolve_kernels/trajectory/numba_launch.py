"""Generated Numba kernels behind the launch layer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import final

import torch

from sdesolve_kernels._numba.trajectory import load
from sdesolve_kernels.backend import int64_bits
from sdesolve_kernels.threads import split
from sdesolve_kernels.trajectory.launch import AbstractTrajectory, Launch, Saved, combined, contiguous, tables
from sdesolve_kernels.trajectory.numba_source import numba_kernel
from sdesolve_kernels.trajectory.plan import Plan
from sdesolve_kernels.trajectory.tracing import Unsupported

__all__ = ["NumbaTrajectory"]

_PIECE = 100_000.0  # nanoseconds of work that are worth a thread's while


@final
class NumbaTrajectory(AbstractTrajectory):
    """A generated Numba kernel."""

    def __init__(self, plan: Plan, increments: Sequence[str]) -> None:
        self.plan = plan
        self._kernel = numba_kernel(plan, increments)
        self.source = self._kernel.source
        try:
            self._entry = load(self.source)
        except Exception as problem:
            text = str(problem).strip().partition("\n")[0]
            raise Unsupported(f"its kernel does not compile, a fault of sdesolve ({text})") from problem

    def run(self, launch: Launch) -> Saved:
        x0 = launch.x0.detach().contiguous()
        kernel, plan, batch = self._kernel, self.plan, len(x0)
        steps = len(launch.times) - 1
        blocks = -(-batch // kernel.lanes)
        table, uniforms = tables(plan, launch)
        captured = [contiguous(c, plan.program.captured[i].dtype) for i, c in enumerate(launch.captured)]
        x1 = torch.empty_like(x0)
        saves = torch.tensor([*launch.saves, -1], dtype=torch.int64, device="cpu")
        slots = len(launch.saves)
        states = moments = None
        if slots and launch.moments:
            moments = torch.empty(slots, blocks, 2, kernel.width, dtype=torch.float64, device="cpu")
        elif slots:
            states = torch.empty(slots, batch, kernel.width, dtype=x0.dtype, device="cpu")
        places = [int64_bits(part) for place in launch.places for part in place]
        noise = torch.tensor([*places, 0], dtype=torch.int64, device="cpu")
        pointers = torch.tensor([*(c.data_ptr() for c in captured), 0], dtype=torch.int64, device="cpu")
        arguments = torch.tensor(
            [
                x0.data_ptr(),
                x1.data_ptr(),
                table.data_ptr(),
                uniforms.data_ptr(),
                batch,
                steps,
                saves.data_ptr(),
                0 if states is None else states.data_ptr(),
                0 if moments is None else moments.data_ptr(),
                blocks,
                noise.data_ptr(),
                pointers.data_ptr(),
            ],
            dtype=torch.int64,
            device="cpu",
        )
        entry, address = self._entry, arguments.data_ptr()

        def work(start: int, stop: int) -> None:
            scratch = torch.empty(kernel.scratch + 64, dtype=torch.uint8, device="cpu")
            entry(address, -(-scratch.data_ptr() // 64) * 64, start, stop)

        cost = (
            kernel.lanes * steps * (0.1 * len(plan.states) + 0.5 * sum(map(math.prod, plan.program.signature.noises)))
        )
        split(work, blocks, max(1, int(_PIECE / max(cost, 1.0))))
        return Saved(x1, states, None if moments is None else combined(moments, kernel.lanes, batch))
