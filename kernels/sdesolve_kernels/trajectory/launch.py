"""A program made ready to run: which back end, its kernel, and the arguments of one launch."""

from __future__ import annotations

import abc
import dataclasses
import math
from collections.abc import Sequence
from typing import final

import torch
from torch import Tensor

from sdesolve_kernels._numba.threads import split
from sdesolve_kernels.dispatch import backend_for
from sdesolve_kernels.trajectory.evaluate import evaluate
from sdesolve_kernels.trajectory.numba_source import numba_kernel
from sdesolve_kernels.trajectory.plan import Plan, plan
from sdesolve_kernels.trajectory.program import Program
from sdesolve_kernels.trajectory.tracing import Unsupported, dtype_name

__all__ = ["AbstractTrajectory", "Launch", "Moments", "Saved", "combined", "compile_trajectory", "contiguous", "tables"]

_PIECE = 100_000.0  # nanoseconds of work that are worth a thread's while


@final
@dataclasses.dataclass(frozen=True)
class Moments:
    """Mean and unbiased variance over the paths at each saving time, ``(times, width)``, float64."""

    mean: Tensor
    variance: Tensor


@final
@dataclasses.dataclass(frozen=True)
class Launch:
    """One run of a kernel.

    Attributes:
        x0: ``(batch, *state)``.
        times: ``(steps + 1,)``, float64 on the host.
        rows: the solver's numbers for each step, ``(steps, columns)``, float64 on the host; ``None`` without any.
        places: seed, stream, first path, and index of the first number, of each source of noise.
        saves: steps after which to save, increasing; 0 is the start.
        moments: save mean and variance over the paths instead of every path.
        captured: tensors the program reads, as `Program.captured`.
    """

    x0: Tensor
    times: Tensor
    rows: Tensor | None
    places: Sequence[tuple[int, int, int, int]]
    saves: Sequence[int]
    moments: bool
    captured: Sequence[Tensor]


@final
@dataclasses.dataclass(frozen=True)
class Saved:
    """What a run leaves: the state at its end, ``(batch, width)`` numbers at each saving time, or their moments."""

    x1: Tensor
    states: Tensor | None
    moments: Moments | None


class AbstractTrajectory(abc.ABC):
    """A compiled program."""

    source: str
    plan: Plan

    @abc.abstractmethod
    def run(self, launch: Launch) -> Saved:
        """Carries all paths through all steps."""


def compile_trajectory(program: Program, increments: Sequence[str]) -> AbstractTrajectory:
    """Generates and compiles the kernel of a program for its device.

    Args:
        program: what to run.
        increments: how the numbers of each source of noise are made: ``normal``, ``two-point`` or ``three-point``.

    Raises:
        Unsupported: the back end cannot compile it.
    """
    name = backend_for("trajectory", program.signature.device)
    if name == "numba":
        return NumbaTrajectory(plan(program), increments)
    if name == "triton":
        from sdesolve_kernels.trajectory.triton_launch import TritonTrajectory

        return TritonTrajectory(plan(program), increments)
    from sdesolve_kernels.trajectory.reference import ReferenceTrajectory

    return ReferenceTrajectory(plan(program), increments)


@final
class NumbaTrajectory(AbstractTrajectory):
    """A generated Numba kernel."""

    def __init__(self, plan: Plan, increments: Sequence[str]) -> None:
        from sdesolve_kernels._numba.trajectory import load

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
        places = [part if part < 2**63 else part - 2**64 for place in launch.places for part in place]
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


def tables(plan: Plan, launch: Launch) -> tuple[Tensor, Tensor]:
    """Columns for every step, ``(steps, columns)``, and uniforms, in the dtype of the state, on the host."""
    dtype = plan.program.signature.dtype
    if not (plan.columns or plan.loop_invariants):
        empty = torch.empty(0, dtype=dtype, device="cpu")
        return empty, empty
    dt = launch.times.diff()
    times = {"t0": launch.times[:-1], "t1": launch.times[1:], "dt": dt, "scale": dt.abs().sqrt()}
    shared = [
        None if by_path else _on_host(c) for c, by_path in zip(launch.captured, plan.program.by_path, strict=True)
    ]
    values = evaluate([*plan.columns, *plan.loop_invariants], times, launch.rows, shared)
    largest = torch.finfo(dtype).max
    if any(v.is_floating_point() and bool(((v.abs() > largest) & v.isfinite()).any()) for v in values):
        # Torch might multiply in an order in which nothing overflows.
        raise Unsupported(f"a number that its steps are made with is too large for {dtype_name(dtype)}")
    n = len(plan.columns)
    table = torch.stack(values[:n], 1).to(dtype) if n else torch.empty(0, dtype=dtype, device="cpu")
    uniforms = torch.stack(values[n:]).to(dtype) if plan.loop_invariants else torch.empty(0, dtype=dtype, device="cpu")
    return table, uniforms


def combined(parts: Tensor, lanes: int, batch: int) -> Moments:
    """Mean and variance over all blocks from those of each (Chan, Golub and LeVeque 1983, eq. 2.1)."""
    counts = torch.full((parts.shape[1],), float(lanes), dtype=torch.float64, device=parts.device)
    counts[-1] = batch - lanes * (len(counts) - 1)
    means, squares = parts[:, :, 0], parts[:, :, 1]
    weight = counts[None, :, None]
    mean = (weight * means).sum(1) / batch
    between = (weight * (means - mean[:, None]).square()).sum(1)
    return Moments(mean, (squares.sum(1) + between) / (batch - 1 if batch > 1 else math.nan))


def _on_host(c: Tensor) -> Tensor:
    c = c.detach().reshape(-1).cpu()
    return c.double() if c.dtype.is_floating_point else c


def contiguous(c: Tensor, dtype: torch.dtype) -> Tensor:
    """As generated code reads it: in order, whole numbers as int64."""
    c = c.detach().contiguous()
    return c.to(torch.int64) if dtype == torch.int32 else c
