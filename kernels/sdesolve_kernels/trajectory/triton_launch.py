"""Generated Triton kernels behind the launch layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import final

import torch
from torch import Tensor

from sdesolve_kernels.trajectory.expressions import topological
from sdesolve_kernels.trajectory.launch import AbstractTrajectory, Launch, Saved, combined, contiguous, tables
from sdesolve_kernels.trajectory.plan import Plan
from sdesolve_kernels.trajectory.triton_source import Shape, TritonKernel, triton_kernel

__all__ = ["TritonTrajectory"]


@final
class TritonTrajectory(AbstractTrajectory):
    """Generated Triton kernels of one plan: one for each `Shape` that a launch turns out to need.

    Attributes:
        source: of the kernel that ran last.
    """

    def __init__(self, plan: Plan, increments: Sequence[str]) -> None:
        self.plan, self._increments = plan, tuple(increments)
        self._operations = len(topological(plan.states))
        self._kernels: dict[Shape, TritonKernel] = {}
        self.source = self._kernel(Shape(128, 4)).source

    def _kernel(self, shape: Shape) -> TritonKernel:
        if shape not in self._kernels:
            self._kernels[shape] = triton_kernel(self.plan, self._increments, shape)
        return self._kernels[shape]

    def run(self, launch: Launch) -> Saved:
        from sdesolve_kernels._triton.trajectory import run, shape_for

        plan, device = self.plan, launch.x0.device
        x0 = launch.x0.detach().contiguous()
        batch, steps, slots = len(x0), len(launch.times) - 1, len(launch.saves)
        table, uniforms = tables(plan, launch)
        steady = bool(plan.columns) and steps > 0 and torch.equal(table, table[:1].expand_as(table))
        keep, moments = slots > 0 and not launch.moments, slots > 0 and launch.moments
        kernel = self._kernel(shape_for(batch, self._operations, keep=keep, moments=moments, steady=steady))
        self.source = kernel.source
        table, uniforms = _moved(table[:1] if steady else table, uniforms, device)
        captured = [contiguous(c, plan.program.captured[i].dtype) for i, c in enumerate(launch.captured)]
        x1 = torch.empty_like(x0)
        saves: Tensor | None = None
        saved: Tensor | None = None
        if slots:
            saves = torch.tensor(launch.saves, dtype=torch.int64, device="cpu").to(device, non_blocking=True)
            programs = -(-batch // kernel.shape.lanes)
            size, dtype = ((programs, 2), torch.float64) if moments else ((batch,), x0.dtype)
            saved = torch.empty(slots, *size, kernel.width, dtype=dtype, device=device)
        if batch:
            run(kernel, x0, x1, table, uniforms, captured, launch.places, steps, saves, saved)
        if saved is not None and moments:
            return Saved(x1, None, combined(saved, kernel.shape.lanes, batch))
        return Saved(x1, saved, None)


def _moved(table: Tensor, uniforms: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    """Both on the device, in one copy."""
    if device.type == "cpu":
        return table, uniforms
    both = torch.cat([table.reshape(-1), uniforms]).to(device, non_blocking=True)
    return both[: table.numel()], both[table.numel() :]
