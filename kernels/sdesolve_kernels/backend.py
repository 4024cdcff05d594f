"""What a back end is: the interface that each of them fills in, and the types it is written in."""

from __future__ import annotations

import abc
import functools
import importlib.util
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Protocol

from torch import Tensor

if TYPE_CHECKING:
    from sdesolve_kernels.trajectory.adaptive import Rule
    from sdesolve_kernels.trajectory.launch import AbstractTrajectory
    from sdesolve_kernels.trajectory.plan import Plan
    from sdesolve_kernels.trajectory.reactions import ReactionRule

__all__ = [
    "Backend",
    "Coefficient",
    "Index",
    "NoiseOffset",
    "Ops",
    "Residual",
    "installed",
    "int64_bits",
]

Index = int | Tensor  # an integer, or a 0-d int64 tensor that the kernel reads
Coefficient = float | Tensor  # a number, or a tensor of shape () or (batch,)


class NoiseOffset(NamedTuple):
    """Where the noise of a step starts: element j of row i is ``Z(seed, stream, first_path + i, step * m + j)``.

    Attributes:
        seed: key of the generator, in two's complement.
        stream: in [0, 256).
        first_path: path of the first row, in two's complement.
        step: number of the step.
    """

    seed: Index
    stream: int
    first_path: Index
    step: Index


class Residual(NamedTuple):
    """``output - p x0 - q z`` and its weight: what `dsm_loss` sums the squares of; ``x0=None`` stands for ``p = 0``."""

    output: Tensor
    x0: Tensor | None
    p: Coefficient
    q: Coefficient
    weight: Coefficient


class Ops(Protocol):
    """The ops of a back end, a module or an object with these functions.

    Arguments are validated before, and no tensor is empty. `reference_steps` says what each op computes; here it writes
    the result to `out` (of any strides, possibly one of the inputs) and returns it.
    """

    def fill(self, kind: str, out: Tensor, *, seed: Index, stream: int, first_path: Index, offset: Index) -> Any:
        """Write entries ``offset, offset + 1, ...`` of each path: "normal", "uniform" or "words" (then int64).

        `out` has shape ``(paths, ...)``; `seed` and `first_path` are unsigned, or tensors on the device of `out`.
        """

    def euler_maruyama_step(
        self, x: Tensor, f: Tensor, g: Coefficient, dt: Coefficient, *, out: Tensor, noise: NoiseOffset
    ) -> Tensor:
        """``x + f dt + g sqrt|dt| z``; `g` may have the shape of `x`."""

    def matrix_step(
        self, x: Tensor, f: Tensor, g: Tensor, dt: Coefficient, *, out: Tensor, noise: NoiseOffset
    ) -> Tensor:
        """``x + f dt + sqrt|dt| g z`` for ``g: (batch, *state, channels)``, or 1 for the batch, and `channels` normals.

        In `noise`, a step has `channels` numbers.
        """

    def matrix_product(self, g: Tensor, v: Tensor, *, out: Tensor) -> Tensor:
        """``g v`` of each row, for such a ``g`` and ``v: (batch, channels)``."""

    def linear_step(
        self, x: Tensor, history: Sequence[Tensor], table: Tensor, row: Any, *, stochastic: bool, out: Tensor,
        noise: NoiseOffset,
    ) -> Tensor:  # fmt: skip
        """``a x + sum_i b_i history_i + c z`` with coefficients from row `row` of a table."""

    def perturb(self, x0: Tensor, alpha: Coefficient, sigma: Coefficient, *, out: Tensor, noise: NoiseOffset) -> Tensor:
        """``alpha x0 + sigma z``."""

    def noise_product(self, v: Tensor, c: Coefficient, *, out: Tensor, noise: NoiseOffset) -> Tensor:
        """``c v z``."""

    def scaled(self, v: Tensor, c: Coefficient, *, out: Tensor) -> Tensor:
        """``c v``, rounded once."""

    def langevin_step(
        self, x: Tensor, score: Tensor, *, mode: str, size: Coefficient, alpha: Coefficient, out: Tensor,
        noise: NoiseOffset,
    ) -> Tensor:  # fmt: skip
        """``x + delta s + sqrt(2 delta) z``, `delta` by `mode`."""

    def dsm_loss(self, r: Residual, *, mean: bool, out: Tensor, gradient: Tensor | None, noise: NoiseOffset) -> Tensor:
        """``weight mean_j r_j^2`` for each sample, ``(batch,)``, or its mean ``()``; and its gradient to `gradient`."""

    def dsm_gradient(
        self, r: Residual, upstream: Coefficient, *, mean: bool, out: Tensor, made: bool, noise: NoiseOffset
    ) -> Tensor:
        """``2 upstream weight r / m``, and over the batch if `mean`: the gradient of `dsm_loss`.

        `upstream` is the gradient of the loss. `made` says that `out` already holds the result for an upstream of 1.
        """


class Backend(abc.ABC):
    """One way to run the ops and the trajectories.

    `sdesolve_kernels.register_backend` makes an instance available to `use_backend`. Subclass this to write every op,
    or an existing back end to replace some.

    Attributes:
        name: by which `use_backend` asks for it.
        devices: types of device that it runs on, such as ``{"cpu"}``; ``None`` for all.
        priority: "auto" takes the back end with the highest priority among those that run on the device. The reference
            has 0 and runs everywhere, so one below 0 runs only where it is asked for by name.
        compiles: whether it makes trajectories at all. `compile` may still refuse a plan.
        compared: whether a new trajectory is run beside torch before it is trusted. False for one that records its
            launches instead of running them.
    """

    name: ClassVar[str]
    devices: ClassVar[frozenset[str] | None]
    priority: ClassVar[int] = -1
    compiles: ClassVar[bool] = False
    compared: ClassVar[bool] = True

    def missing(self) -> str:
        """What it would need and this machine lacks, such as the name of a package; empty if it can run here."""
        return ""

    @abc.abstractmethod
    def ops(self) -> Ops:
        """Its ops. Called once, at the first use: import what is heavy here."""

    def compile(self, plan: Plan, increments: Sequence[str], seconds: float = math.inf) -> AbstractTrajectory:
        """Make a trajectory from a plan.

        Args:
            plan: what a step computes, and when.
            increments: how the numbers of each source of noise are made: ``normal``, ``two-point`` or ``three-point``.
            seconds: that it may take, by an estimate beforehand.

        Raises:
            Unsupported: it makes none, or none of this plan; the message is the reason.
            TooCostly: it would take longer.
        """
        from sdesolve_kernels.trajectory.tracing import Unsupported

        raise Unsupported(f"the {self.name} back end makes no generated kernels")

    def adaptive(self, plan: Plan, rule: Rule | ReactionRule, seconds: float = math.inf) -> AbstractTrajectory:
        """Make a trajectory whose steps each path chooses.

        Args:
            plan: what an attempt computes.
            rule: how steps are chosen.
            seconds: that it may take, by an estimate beforehand.

        Raises:
            Unsupported: it makes none, or none of this plan; the message is the reason.
            TooCostly: it would take longer.
        """
        from sdesolve_kernels.trajectory.tracing import Unsupported

        raise Unsupported(f"the {self.name} back end makes no kernels that choose their steps")


def int64_bits(value: int) -> int:
    """The int64 with the same bits as a uint64."""
    return value - (1 << 64) if value >= 1 << 63 else value


@functools.cache
def installed(package: str) -> bool:
    """Whether a package can be imported here; it is not imported for that."""
    return importlib.util.find_spec(package) is not None
