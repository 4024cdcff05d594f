"""Brownian motion as a function: any increment of any path, at any resolution, from integer coordinates."""

from __future__ import annotations

import abc
import dataclasses
import math
from typing import ClassVar, Literal, TypedDict, final, get_args

import torch
from sdesolve_kernels import Stream, normal, words
from torch import Tensor

from sdesolve._internal.arguments import whole_number

Increments = Literal["normal", "two-point", "three-point"]
Part = Literal["W", "H"]
_KINDS = get_args(Increments)

BRIDGE_DEPTH = 20
_BLOCK_ELEMENTS = 1 << 22


@dataclasses.dataclass(frozen=True, slots=True)
class Increment:
    """The Brownian motion over one step, from ``t0`` to ``t1``, as far as a solver needs it.

    Attributes:
        W: ``W(t1) - W(t0)``, of the shape that `AbstractSDE` tabulates, variance ``|dt|``.
        H: space-time Levy area ``1/dt int_t0^t1 (W(t) - W(t0)) dt - W/2``, of the shape of ``W``, variance ``|dt|/12``
            and independent of ``W``; ``None`` unless the solver needs it (`AbstractSolver.needs`). Reversing time flips
            ``W`` and not ``H``. Foster, Lyons and Oberhauser 2020, definition 3.5.
    """

    W: Tensor
    H: Tensor | None = None

    @property
    def mean(self) -> Tensor:
        """``1/dt int (W(t) - W(t0)) dt = W/2 + H``: the mean of the motion over the step, less where it starts."""
        assert self.H is not None
        return 0.5 * self.W + self.H


class AbstractNoise(abc.ABC):
    """Where a solver gets its random numbers from. `BrownianPath` is the one to use; the oracle has another.

    Attributes:
        timeless: whether it is a sequence of normals that grid times only scale, so that steps of unit length give
            standard normals. Noise that was made on a grid of its own is not.
    """

    timeless: ClassVar[bool] = True

    @property
    def provides(self) -> frozenset[Part]:
        """Which parts of an `Increment` it can make."""
        return frozenset({"W"})

    @abc.abstractmethod
    def increments(
        self,
        times: Tensor,
        shape: tuple[int, ...],
        *,
        step: int = 0,
        of: Part = "W",
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> Tensor:
        """One part of the `Increment` of each of the ``n`` steps between consecutive ``times``.

        Args:
            times: ``(n + 1,)`` or ``(n + 1, batch)``, float64 on the host, in either direction.
            shape: ``(batch, *channels)`` of one increment.
            step: index of the first of these steps in the whole integration.
            of: ``W``, ``W(t_{k+1}) - W(t_k)`` of variance ``|t_{k+1} - t_k|``; or another part, passed only to a noise
                that `provides` it.
            dtype: of the result.
            device: of the result.

        Returns:
            ``(n, batch, *channels)``.
        """


class AbstractStreams(AbstractNoise):
    """Noise of several independent streams: one drives, another is for correctors between the steps."""

    @abc.abstractmethod
    def correctors(self, draws: int) -> AbstractNoise:
        """The noise of correctors on these paths, ``draws`` of it a step; independent of the driving noise."""


class AbstractPath(AbstractNoise):
    """Noise that is a path, with values between the grid points too."""

    @abc.abstractmethod
    def bridge(
        self,
        step: int,
        theta: float,
        shape: tuple[int, ...],
        *,
        given: tuple[Part, ...] = ("W",),
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> Tensor:
        """The path at the fraction ``theta`` of a step, less its chord, for a step of unit length.

        ``(W(t_k + theta dt) - W(t_k) - theta W_k) / sqrt|dt|``, consistent with every other ``theta`` asked for.

        Args:
            step: index of the step.
            theta: in [0, 1].
            shape: ``(batch, *channels)``.
            given: what drove the step. Given ``W`` alone this is a Brownian bridge, of variance ``theta (1 - theta)``
                and independent of ``W``; given ``H`` too, it has the mean ``6 theta (1 - theta) H / sqrt|dt|`` and the
                variance ``theta (1 - theta) (1 - 3 theta (1 - theta))``.
            dtype: of the result.
            device: of the result.
        """


@final
class GivenNormals(AbstractNoise):
    """Normals that somebody else has drawn: draw ``k`` is ``normals[k]``, whatever the times."""

    def __init__(self, normals: Tensor) -> None:
        self._normals = normals

    def increments(self, times: Tensor, shape: tuple[int, ...], *, step: int = 0, **_: object) -> Tensor:
        return self._normals[step : step + len(times) - 1]


def drawn_seed() -> int:
    """A seed for who gave none, from torch's default generator."""
    return int(torch.randint(2**63 - 1, (), dtype=torch.int64, device="cpu"))


def unit_normals(noise: AbstractNoise, k: int, x: Tensor) -> Tensor:
    """Draw ``k`` of ``noise``: standard normals like ``x``."""
    times = torch.tensor([k, k + 1], dtype=torch.float64, device="cpu")
    return noise.increments(times, tuple(x.shape), step=k, dtype=x.dtype, device=x.device)[0]


class Place(TypedDict):
    """Where a kernel finds the normals of one step: what all step kernels of `sdesolve_kernels` take."""

    seed: int | Tensor
    stream: int
    first_path: int | Tensor
    step: int


@dataclasses.dataclass(frozen=True)
class BrownianPath(AbstractStreams, AbstractPath):
    r"""Brownian paths addressed by coordinates: row ``i`` of a batch is a function of ``(seed, first_path + i)``.

    Nothing is stored and nothing depends on batch size, order of queries, chunking, device or backend. Step ``k`` with
    ``m`` channels uses the normals ``Z(seed, stream, path, n)``, ``n = k m ... k m + m - 1``, scaled by ``sqrt|dt|``.

    With ``substeps = r`` every step's increment is the sum of ``r`` finer ones of equal length, the very increments
    that a grid with ``r`` times as many steps takes with ``substeps = 1``: so an integration with ``steps = n`` and
    ``substeps = r`` and one with ``steps = n r`` see the same path, up to rounding in the sum.

    The space-time areas ``H`` of the steps come from a stream of their own, so ``W`` is the same whether or not a
    solver asks for them, and those of a coarse step are the exact combination of the fine ``W`` and ``H``.

    Times between grid points come from a Brownian bridge on a dyadic tree of depth 20 under each (sub)step, whose nodes
    are integers; a float time never seeds anything.

    For weak convergence alone, where only expectations matter, the normals may be replaced by simpler numbers of the
    same first moments, at a fraction of the cost: ``two-point``, +-1 with equal chances, keeps weak order 1;
    ``three-point``, +-sqrt(3) with chances 1/6 and else 0, weak order 2 (Kloeden and Platen 1992, sections 14.1 and
    14.2). Number ``n`` of a path is then bit ``n mod 128`` of block ``n div 128`` of the generator, or its word
    ``n mod 4`` of block ``n div 4`` (below ``2^32 div 6``: minus; from ``2^32 - 2^32 div 6``: plus).

    Args:
        seed: in [0, 2^64).
        first_path: path index of row 0, below 2^64, so that a shard can ask for its own rows.
        first_step: step index that counts as 0, so that an integration can go on where another stopped.
        substeps: how many fine increments make one step.
        stream: which of the independent noise streams (`sdesolve_kernels.Stream`), in [0, 256).
        kind: of increments, ``normal``, ``two-point`` or ``three-point``.

    Raises:
        TypeError: an argument is not an integer.
        ValueError: an argument is out of range.
    """

    seed: int
    first_path: int = 0
    first_step: int = 0
    substeps: int = 1
    stream: int = Stream.DRIVING
    kind: Increments = "normal"

    def __post_init__(self) -> None:
        for name, least, most in (
            *(("seed", 0, 2**64), ("first_path", 0, 2**64), ("first_step", 0, 2**58), ("substeps", 1, 2**58)),
            ("stream", 0, 2**8),
        ):
            given = getattr(self, name)
            if type(given) is int and least <= given < most:
                continue
            value = whole_number(given, name, least)
            if value >= most:
                raise ValueError(f"{name} must be below 2^{most.bit_length() - 1}, got {value}")
            if not isinstance(given, int):  # numbers of NumPy and torch wrap when they are added up
                object.__setattr__(self, name, value)
        if self.kind not in _KINDS:
            raise ValueError(f"increments must be one of {', '.join(map(repr, _KINDS))}, got {self.kind!r}")

    @property
    def provides(self) -> frozenset[Part]:
        """``W`` and ``H``; of numbers that are no normals, ``W`` alone."""
        return frozenset({"W", "H"}) if self.kind == "normal" else frozenset({"W"})

    @property
    def plain(self) -> bool:
        """Whether each increment is one normal of the path's sequence, scaled: what step kernels make themselves."""
        return self.substeps == 1 and self.kind == "normal"

    def rows(self, first: int) -> BrownianPath:
        """The paths of a shard whose row 0 is row ``first`` of this batch."""
        return dataclasses.replace(self, first_path=self.first_path + whole_number(first, "first", 0))

    def after(self, steps: int) -> BrownianPath:
        """The same paths from ``steps`` steps later: what an integration split at a grid point goes on with."""
        return dataclasses.replace(self, first_step=self.first_step + whole_number(steps, "steps", 0))

    def correctors(self, draws: int) -> BrownianPath:
        """The corrector stream of the same paths: step ``k`` of this one has draws ``k draws ... (k + 1) draws - 1``.

        It has no coarse increments: a corrector's steps are its own, whatever the grid.
        """
        first = self.first_step * whole_number(draws, "draws", 1)
        return dataclasses.replace(self, stream=Stream.CORRECTOR, first_step=first, substeps=1, kind="normal")

    def place(self, step: int) -> Place:
        """Where the normals of step ``step`` stand, for a kernel that makes them itself.

        Raises:
            ValueError: an increment of this path is a sum of several normals (``substeps > 1``), or no normal.
        """
        if self.kind != "normal":
            raise ValueError(f"increments are {self.kind} numbers; a step kernel makes normals")
        if self.substeps != 1:
            raise ValueError(f"increments are sums of {self.substeps} normals; a kernel makes one for each step")
        return {
            "seed": self.seed,
            "stream": self.stream,
            "first_path": self.first_path,
            "step": self.first_step + step,
        }

    def increments(
        self,
        times: Tensor,
        shape: tuple[int, ...],
        *,
        step: int = 0,
        of: Part = "W",
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> Tensor:
        batch, *channels = shape
        dt = torch.as_tensor(times, dtype=torch.float64, device="cpu").diff(dim=0).abs() / self.substeps
        make = self._normals if of == "W" else self._areas
        z = make(step, len(dt), batch, math.prod(channels), dtype, device)
        scale = dt.sqrt().to(dtype=dtype, device=z.device)
        return z.reshape(len(dt), *shape) * scale.reshape(*scale.shape, *(1,) * (len(shape) + 1 - scale.ndim))

    def bridge(
        self,
        step: int,
        theta: float,
        shape: tuple[int, ...],
        *,
        given: tuple[Part, ...] = ("W",),
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> Tensor:
        if self.kind != "normal":
            raise ValueError(f"{self.kind} increments are no Brownian path and have no values between grid points")
        if not 0.0 <= theta <= 1.0:
            raise ValueError(f"theta is a fraction of a step, in [0, 1], got {theta}")
        r = self.substeps
        m = math.prod(shape[1:])
        substep = min(int(theta * r), r - 1)
        local = theta * r - substep
        unit_bridge = self._unit_bridge_given_area if "H" in given else self._unit_bridge
        value = unit_bridge((self.first_step + step) * r + substep, local, shape[0], m, dtype, device)
        if r > 1:  # W at theta, less its chord: whole substeps before, the local chord, and the local bridge
            fine = dataclasses.replace(self, substeps=1, first_step=(self.first_step + step) * r)
            z = fine._normals(0, r, shape[0], m, dtype, device)
            value = (value + z[:substep].sum(0) + local * z[substep] - theta * z.sum(0)) / math.sqrt(r)
        return value.reshape(shape)

    def _normals(
        self, step: int, steps: int, batch: int, m: int, dtype: torch.dtype, device: torch.device | str | None
    ) -> Tensor:
        """Sums of ``substeps`` standard normals, ``(steps, batch, m)``."""
        if self.substeps > 1:
            return self._sums([1.0] * self.substeps, step, steps, batch, m, dtype, device)
        z = torch.empty(steps, batch, m, dtype=dtype, device=device)
        self._draw(batch, steps * m, (self.first_step + step) * m, dtype, device, out=z.transpose(0, 1))
        return z

    def _areas(
        self, step: int, steps: int, batch: int, m: int, dtype: torch.dtype, device: torch.device | str | None
    ) -> Tensor:
        """``H`` for substeps of unit length, ``(steps, batch, m)``.

        Over ``r`` substeps, from their ``W_i`` and ``H_i``: ``sum_i [(1/2 - (i + 1/2)/r) W_i + H_i / r]``.
        """
        if "H" not in self.provides:
            raise ValueError(f"{self.kind} increments have no space-time area H; leave increments= out")
        r = self.substeps
        own = dataclasses.replace(self, stream=Stream.LEVY)._normals(step, steps, batch, m, dtype, device)
        areas = own / (math.sqrt(12.0) * r)
        if r > 1:
            areas += self._sums([0.5 - (i + 0.5) / r for i in range(r)], step, steps, batch, m, dtype, device)
        return areas

    def _sums(
        self,
        weights: list[float],
        step: int,
        steps: int,
        batch: int,
        m: int,
        dtype: torch.dtype,
        device: torch.device | str | None,
    ) -> Tensor:
        """``sum_i weights_i z_i`` over the normals of the substeps of each step, ``(steps, batch, m)``.

        One substep after another, so that the order of the sum, hence the last bit, is the same for every batch size.
        """
        r = self.substeps
        first = (self.first_step + step) * r * m
        total = torch.zeros(steps, batch, m, dtype=dtype, device=device)
        block = max(1, _BLOCK_ELEMENTS // max(1, batch * r * m))
        for k in range(0, steps, block):
            n = min(block, steps - k)
            z = self._draw(batch, n * r * m, first + k * r * m, dtype, device).reshape(batch, n, r, m)
            for j, weight in enumerate(weights):
                total[k : k + n] += weight * z[:, :, j].transpose(0, 1)
        return total

    def _unit_bridge(
        self, step: int, theta: float, batch: int, m: int, dtype: torch.dtype, device: torch.device | str | None
    ) -> Tensor:
        """A standard bridge on [0, 1] at ``theta``: midpoints down a dyadic tree (Levy's construction)."""
        left = torch.zeros(batch, m, dtype=dtype, device=device)
        right = torch.zeros_like(left)
        low, width, node = 0.0, 1.0, 1
        bridges = dataclasses.replace(self, stream=Stream.BRIDGE)
        if theta in (0.0, 1.0):
            return left
        for _ in range(BRIDGE_DEPTH):
            z = bridges._draw(batch, m, ((step << (BRIDGE_DEPTH + 1)) + node) * m, dtype, device)
            middle = 0.5 * (left + right) + 0.5 * math.sqrt(width) * z
            width *= 0.5
            if theta == low + width:
                return middle
            if theta < low + width:
                right, node = middle, 2 * node
            else:
                left, low, node = middle, low + width, 2 * node + 1
        # Below the resolution of the tree, 2^-20 of a step: a bridge over the last cell, exact for one time in it.
        u = (theta - low) / width
        z = bridges._draw(batch, m, ((step << (BRIDGE_DEPTH + 1)) + node) * m, dtype, device)
        return (1 - u) * left + u * right + math.sqrt(u * (1 - u) * width) * z

    def _unit_bridge_given_area(
        self, step: int, theta: float, batch: int, m: int, dtype: torch.dtype, device: torch.device | str | None
    ) -> Tensor:
        """The same given the area too: halves of ``(W, H)`` down the tree (Foster, Lyons and Oberhauser 2020, 6.1)."""
        left = torch.zeros(batch, m, dtype=dtype, device=device)
        if theta in (0.0, 1.0):
            return left
        fine = dataclasses.replace(self, substeps=1, first_step=step)
        W, H = torch.zeros_like(left), fine._areas(0, 1, batch, m, dtype, device)[0]
        low, width, node = 0.0, 1.0, 1
        bridges = dataclasses.replace(self, stream=Stream.BRIDGE)

        def draw() -> Tensor:
            first = ((step << (BRIDGE_DEPTH + 1)) + node) * 2 * m
            return bridges._draw(batch, 2 * m, first, dtype, device).reshape(batch, 2, m)

        for _ in range(BRIDGE_DEPTH):
            z, y = draw().unbind(1)
            first = 0.5 * W + 1.5 * H + 0.25 * math.sqrt(width) * z
            second = W - first
            mean, half = H - 0.25 * (first - second), 0.5 * math.sqrt(width / 12.0) * y
            width *= 0.5
            if theta == low + width:
                return left + first
            if theta < low + width:
                W, H, node = first, mean + half, 2 * node
            else:
                left, low = left + first, low + width
                W, H, node = second, mean - half, 2 * node + 1
        u = (theta - low) / width
        v = u * (1 - u)
        return left + u * W + 6.0 * v * H + math.sqrt(width * v * (1.0 - 3.0 * v)) * draw()[:, 0]

    def _draw(
        self,
        batch: int,
        count: int,
        offset: int,
        dtype: torch.dtype,
        device: torch.device | str | None,
        out: Tensor | None = None,
    ) -> Tensor:
        if self.kind != "normal":
            made = self._simple(batch, count, offset, device).to(dtype if out is None else out.dtype)
            return made if out is None else out.copy_(made.reshape(out.shape))
        return normal(
            batch,
            count,
            seed=self.seed,
            stream=self.stream,
            first_path=self.first_path,
            offset=offset,
            dtype=None if out is not None else dtype,
            device=None if out is not None else device,
            out=out,
        )

    def _simple(self, batch: int, count: int, offset: int, device: torch.device | str | None) -> Tensor:
        """Two- or three-point numbers of mean 0 and variance 1, ``(batch, count)``, float64."""

        def block_words(first: int, number: int) -> Tensor:
            return words(
                batch, number, seed=self.seed, stream=self.stream, first_path=self.first_path, offset=first,
                device=device,
            )  # fmt: skip

        if self.kind == "three-point":
            w = block_words(offset, count)
            sixth = 2**32 // 6
            return math.sqrt(3.0) * ((w >= 2**32 - sixth).double() - (w < sixth).double())
        first, last = offset // 32, (offset + count - 1) // 32
        w = block_words(first, max(last - first + 1, 0))
        bits = (w[:, :, None] >> torch.arange(32, device=w.device)) & 1
        start = offset - 32 * first
        return 2.0 * bits.reshape(batch, -1)[:, start : start + count].double() - 1.0
