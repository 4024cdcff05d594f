"""Brownian motion as a function: any increment of any path, at any resolution, from integer coordinates."""

from __future__ import annotations

import abc
import bisect
import copy
import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any, ClassVar, Literal, TypedDict, cast, final, get_args

import torch
from sdesolve_kernels import Stream, normal, reference, words
from sdesolve_kernels.backend import int64_bits
from sdesolve_kernels.threads import survives_forks
from torch import Tensor

from sdesolve._internal.arguments import device_of, short, whole_number
from sdesolve._internal.levy_area import VARIANCES, LevyArea, composed_area, composition
from sdesolve._internal.sobol import bridged_normals

Increments = Literal["normal", "two-point", "three-point", "sobol"]
Part = Literal["W", "H", "K", "S"] | LevyArea
_KINDS = get_args(Increments)
_STREAMS = {"H": Stream.LEVY, "K": Stream.LEVY_K, "S": Stream.SIGNS}

_BRIDGE_DEPTH = 20
_DEEPEST = 120  # levels: beyond, a cell moves a path by less than 2^-60 of what its step does
_BLOCK_ELEMENTS = 1 << 22
_DENSE = 8  # paths that are drawn at once for one of a list, at most
# Of `halved`: sqrt 2 times coefficients of `BrownianPath._halves`, by the roots of the variances of W, H and K.
HALVING = (
    *(2**0.5 * 0.5, 2**0.5 * 1.5 / 12**0.5, 2**0.5 / 4),
    *(2**0.5 * 0.25, 24**0.5 / 8, 24**0.5 * 3.75 / 720**0.5, 24**0.5 / 768**0.5),
    *(2**0.5 * 0.125, 1440**0.5 * 0.5 / 768**0.5, 1440**0.5 / 2880**0.5),
)


@dataclasses.dataclass(frozen=True, slots=True)
class Increment:
    """The Brownian motion over one step, from ``t0`` to ``t1``, as far as a solver `needs` it; the rest is ``None``.

    ``W``, ``H`` and ``K`` have the shape that `AbstractSDE` tabulates and are independent. Reversing time flips the
    signs of ``W`` and ``K``, and not that of ``H``.

    Attributes:
        W: ``W(t1) - W(t0)``, variance ``|dt|``.
        H: space-time Levy area ``1/dt int (W(t) - W(t0)) dt - W/2``, variance ``|dt|/12``. Foster, Lyons and Oberhauser
            2020, definition 3.5.
        K: space-time-time Levy area ``1/dt^2 int (W(t) - W(t0) - (t - t0)/dt W) ((t0 + t1)/2 - t) dt``, variance
            ``|dt|/720``.
        A: Levy areas ``1/2 int (W^l dW^k - W^k dW^l)``, ``(batch, channels, channels)``, variance ``dt^2/4``.
        S: two-point numbers, +-1 with equal chances, ``(batch, max(2, channels))``, or ``(batch, 2)`` for scalar and
            diagonal noise.
    """

    W: Tensor
    H: Tensor | None = None
    K: Tensor | None = None
    A: Tensor | None = None
    S: Tensor | None = None

    @property
    def mean(self) -> Tensor:
        """``1/dt int (W(t) - W(t0)) dt = W/2 + H``: the mean of the motion over the step, less where it starts."""
        assert self.H is not None
        return 0.5 * self.W + self.H


def named(part: Part) -> str:
    """The field of an `Increment` that holds a part."""
    return "A" if isinstance(part, LevyArea) else part


class AbstractNoise(abc.ABC):
    """Where a solver gets its random numbers from. `BrownianPath` is the one to use; the oracle has another.

    Attributes:
        timeless: whether it is a sequence of normals that grid times only scale, so that steps of unit length give
            standard normals. Noise that was made on a grid of its own is not.
    """

    timeless: ClassVar[bool] = True

    @property
    def provides(self) -> frozenset[str]:
        """Which parts of an `Increment` it can make."""
        return frozenset({"W"})

    def in_draws(self, draws: int) -> AbstractNoise:
        """This noise for a solver that takes ``draws`` increments a step, one after another."""
        return self

    def over(self, steps: int) -> AbstractNoise:
        """This noise for an integration over so many steps in all, for noise that has to know."""
        return self

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
            ``(n, batch, *channels)``; of Levy areas ``(n, batch, channels, channels)``.
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
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> Tensor:
        """The path at the fraction ``theta`` of a step, less its chord, for a step of unit length.

        ``(W(t_k + theta dt) - W(t_k) - theta W_k) / sqrt|dt|``, a Brownian bridge of variance ``theta (1 - theta)``,
        independent of ``W`` and consistent with every other ``theta`` asked for. It is that of the very path: given
        the step's ``H`` it has the mean ``6 theta (1 - theta) H / sqrt|dt|``, and so on for ``K``, whoever asks.

        Args:
            step: index of the step.
            theta: in [0, 1].
            shape: ``(batch, *channels)``.
            dtype: of the result.
            device: of the result.
        """


def _located(t: float, times: Tensor | None) -> tuple[int, float]:
    """The step that holds a time, and the fraction of it that lies before."""
    if times is None:
        if not 0.0 <= t < 2.0**53:
            raise ValueError(f"without times= the path has steps of unit length from 0 on, and no value at {t}")
        return int(t), t % 1.0
    grid = times.tolist()
    sign = 1.0 if grid[-1] >= grid[0] else -1.0
    if not sign * grid[0] <= sign * t <= sign * grid[-1]:
        raise ValueError(f"the path lies between {grid[0]} and {grid[-1]}, and has no value at {t}")
    k = min(bisect.bisect_right(grid, sign * t, key=lambda time: sign * time) - 1, len(grid) - 2)
    return k, (t - grid[k]) / (grid[k + 1] - grid[k])


def halved(cell: Tensor, numbers: Tensor) -> tuple[Tensor, Tensor]:
    """Unit numbers of both halves of cells: a rotation of those of the cell and of six new ones at a node.

    ``(w, eta, kappa) = (W / sqrt h, H / sqrt(h/12), K / sqrt(h/720))`` of a cell of length ``h``, and ``numbers``, are
    independent standard normals, as are those of the halves with their own length. Foster, Lyons and Oberhauser 2020,
    theorem 6.1, for ``W`` and ``H``.

    Args:
        cell: ``(..., 3, m)``.
        numbers: likewise.
    """
    (w, eta, kappa), (z, x, y) = cell.unbind(-2), numbers.unbind(-2)
    halves = []
    for sign in (1.0, -1.0):
        W = HALVING[0] * w + sign * (HALVING[1] * eta + HALVING[2] * z)
        H = HALVING[3] * eta - HALVING[4] * z + sign * (HALVING[5] * kappa + HALVING[6] * x)
        K = HALVING[7] * kappa - HALVING[8] * x + sign * (HALVING[9] * y)
        halves.append(torch.stack([W, H, K], -2))
    return halves[0], halves[1]


def joined(
    first: tuple[Tensor, ...], a: Tensor, second: tuple[Tensor, ...], b: float | Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """``W, H, K`` of a piece of length ``a`` followed by one of length ``b``: Chen's relation."""
    (W1, H1, K1), (W2, H2, K2), h = first, second, a + b
    D = b * W1 - a * W2
    H = (a * H1 + b * H2 + 0.5 * D) / h
    K = (a * a * K1 + b * b * K2 + 0.5 * a * b * (H1 - H2) + (b - a) * D / 12.0) / (h * h)
    return W1 + W2, H, K


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


@dataclasses.dataclass(frozen=True, repr=False)
class BrownianPath(AbstractStreams, AbstractPath):
    r"""Brownian paths addressed by coordinates: row ``i`` of a batch is a function of ``(seed, first_path + i)``.

    Nothing is stored and nothing depends on batch size, order of queries, chunking, device or backend. Step ``k`` with
    ``m`` channels uses the normals ``Z(seed, stream, path, n)``, ``n = k m ... k m + m - 1``, scaled by ``sqrt|dt|``.

    With ``substeps = r`` every step's increment is the sum of ``r`` finer ones of equal length, the very increments
    that a grid with ``r`` times as many steps takes with ``substeps = 1``: so an integration with ``steps = n`` and
    ``substeps = r`` and one with ``steps = n r`` see the same path, up to rounding in the sum.

    Space-time areas ``H`` and ``K`` and Levy areas come from streams of their own, so ``W`` is the same whether or not
    a solver asks for them, and those of a coarse step are the exact combination of the fine ones.

    Times between grid points come from halving the step, given its ``W``, ``H`` and ``K``, down to the time asked for;
    nodes of that tree are integers, and a float time never seeds anything. `value` and `increment` give the path at
    any times. (Levy areas are drawn given ``W``, ``H`` and, by Foster's method, ``K``; they do not bind values within
    the step any further.)

    For weak convergence alone, where only expectations matter, the normals may be replaced by simpler numbers of the
    same first moments, at a fraction of the cost: ``two-point``, +-1 with equal chances, keeps weak order 1;
    ``three-point``, +-sqrt(3) with chances 1/6 and else 0, weak order 2 (Kloeden and Platen 1992, sections 14.1 and
    14.2). Number ``n`` of a path is then bit ``n mod 128`` of block ``n div 128`` of the generator, or its word
    ``n mod 4`` of block ``n div 4`` (below ``2^32 div 6``: minus; from ``2^32 - 2^32 div 6``: plus).

    ``sobol`` is for expectations by quasi-Monte Carlo (`quasi_monte_carlo`): path ``i`` is point ``i`` of a Sobol
    sequence with the scrambling ``seed``, in the order of a Brownian bridge over the steps of the whole integration:
    where the path ends, for each channel, takes the first dimensions, then its middle, and so on. Rows, steps and
    coarse increments are addressed as those of other paths. Paths of one scrambling are not independent: means over
    ``2^k`` of them, from a multiple of ``2^k`` on, have an error of nearly ``2^-k`` or less, and independent seeds tell
    how large it is. There are ``2^30`` points, and 21,201 dimensions; what a path of more ``steps * channels`` needs
    beyond those are ordinary normals, on the finest levels, as are ``H``, ``K``, Levy areas and values within steps.
    Increments are made in torch, and runs go step by step.

    Args:
        seed: in [0, 2^64).
        first_path: path index of row 0, below 2^64, so that a shard can ask for its own rows.
        first_step: step index that counts as 0, so that an integration can go on where another stopped.
        substeps: how many fine increments make one step.
        stream: which of the independent noise streams (`sdesolve_kernels.Stream`), in [0, 256).
        kind: of increments, ``normal``, ``two-point``, ``three-point`` or ``sobol``.
        repeat: row ``i`` is driven by path ``first_path + i mod repeat``, so that a sweep over parameters in one batch
            has common random numbers; ``None`` for a path of its own for each row.
        mirrored: ``-W`` in place of ``W`` (`antithetic`).
        swapped: steps ``2 k`` and ``2 k + 1`` change places (`with_swapped_pairs`).
        first_row: the row among those that repeat that row 0 is.
        horizon: steps that ``sobol`` paths have in all, from step 0 of the path on; `solve` takes those of its grid if
            it is left out. To be given where a path is taken up again.

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
    repeat: int | None = None
    mirrored: bool = False
    swapped: bool = False
    first_row: int = 0
    horizon: int | None = None

    def __post_init__(self) -> None:
        for name, least, most in (
            *(("seed", 0, 2**64), ("first_path", 0, 2**64), ("first_step", 0, 2**58), ("substeps", 1, 2**58)),
            *(("stream", 0, 2**8), ("repeat", 1, 2**64), ("first_row", 0, self.repeat or 1)),
            ("horizon", 1, 2**58),
        ):
            given = getattr(self, name)
            if (type(given) is int and least <= given < most) or (name in ("repeat", "horizon") and given is None):
                continue
            value = whole_number(given, name, least)
            if value >= most:
                raise ValueError(f"{name} must be below 2^{most.bit_length() - 1}, got {short(value)}")
            if not isinstance(given, int):  # numbers of NumPy and torch wrap when they are added up
                object.__setattr__(self, name, value)
        if not isinstance(self.kind, str) or self.kind not in _KINDS:
            raise ValueError(f"increments must be one of {', '.join(map(repr, _KINDS))}, got {short(self.kind)}")

    def __repr__(self) -> str:
        given = [
            f"{f.name}={getattr(self, f.name)!r}"
            for f in dataclasses.fields(self)[1:]
            if getattr(self, f.name) != f.default
        ]
        return f"BrownianPath({', '.join([str(self.seed), *given])})"

    @property
    def provides(self) -> frozenset[str]:
        """Everything; of increments that are no normals, ``W`` and the signs of weak schemes alone."""
        return frozenset("WHKAS") if self.kind in ("normal", "sobol") else frozenset("WS")

    @property
    def plain(self) -> bool:
        """Whether each increment is one normal of the path's sequence, scaled: what step kernels make themselves."""
        views = self.mirrored or self.swapped or self.repeat is not None
        return self.substeps == 1 and self.kind == "normal" and not views

    def rows(self, first: int) -> BrownianPath:
        """The paths of a shard whose row 0 is row ``first`` of this batch."""
        first = whole_number(first, "first", 0)
        if self.repeat is not None:
            return dataclasses.replace(self, first_row=(self.first_row + first) % self.repeat)
        return dataclasses.replace(self, first_path=self.first_path + first)

    def after(self, steps: int) -> BrownianPath:
        """The same paths from ``steps`` steps of the solver later, however many draws of noise it takes in a step.

        An integration cut at a grid point goes on with it if its solver remembers nothing; one that remembers earlier
        steps would begin afresh, and goes on by ``start=sol.state`` of `solve`.
        """
        return dataclasses.replace(self, first_step=self.first_step + whole_number(steps, "steps", 0))

    def in_draws(self, draws: int) -> BrownianPath:
        """Increment ``j`` of step ``k`` is number ``k draws + j`` of the result."""
        if draws <= 1:
            return self
        horizon = None if self.horizon is None else self.horizon * draws
        return dataclasses.replace(self, first_step=self.first_step * draws, horizon=horizon)

    def over(self, steps: int) -> BrownianPath:
        """These paths for an integration over ``steps`` steps: ``sobol`` paths get their `horizon`.

        Raises:
            ValueError: they have one that is too near.
        """
        last = self.first_step + steps
        if self.kind != "sobol" or self.horizon is None or last <= self.horizon:
            return dataclasses.replace(self, horizon=last) if self.kind == "sobol" and self.horizon is None else self
        raise ValueError(
            f"the Sobol path has horizon={self.horizon} steps in all, and this run ends at step {last}; give "
            "BrownianPath(seed, kind='sobol', horizon=...) the steps of the whole run before its first part"
        )

    def antithetic(self) -> BrownianPath:
        """The mirrored paths, ``-W``: means of both have no error from odd functions of the noise."""
        return dataclasses.replace(self, mirrored=not self.mirrored)

    def with_swapped_pairs(self) -> BrownianPath:
        """The paths with (sub)steps ``2 k`` and ``2 k + 1`` in the opposite order.

        Increments over pairs are the same and their Levy areas have the opposite sign: the fine twin of antithetic
        multilevel Monte Carlo. Giles and Szpruch 2014, Annals of Applied Probability 24, section 3.
        """
        return dataclasses.replace(self, swapped=not self.swapped)

    def scrambled(self, index: int) -> BrownianPath:
        """Sobol paths with one of independent scramblings, ``index`` in [0, 2^20)."""
        return dataclasses.replace(self, seed=self._seed_of(index), kind="sobol")

    def correctors(self, draws: int) -> BrownianPath:
        """The corrector stream of the same paths: step ``k`` of this one has draws ``k draws ... (k + 1) draws - 1``.

        It has no coarse increments: a corrector's steps are its own, whatever the grid.
        """
        first = self.first_step * whole_number(draws, "draws", 1)
        return dataclasses.replace(
            self, stream=Stream.CORRECTOR, first_step=first, substeps=1, kind="normal", swapped=False
        )

    def within_steps(self, draws: int) -> BrownianPath:
        """The normals of these paths for what is drawn within a step given its ends, ``draws`` a step."""
        own = self.units("H")  # for the seed, where this is not the stream that drives
        return dataclasses.replace(
            own, stream=Stream.PASSAGE, first_step=self.first_step * draws, substeps=1, kind="normal", mirrored=False,
            swapped=False,
        )  # fmt: skip

    def place(self, step: int) -> Place:
        """Where the normals of step ``step`` stand, for a kernel that makes them itself.

        Raises:
            ValueError: an increment of this path is not just one normal (`plain`).
        """
        if self.kind != "normal":
            raise ValueError(f"increments are {self.kind} numbers; a step kernel makes normals")
        if self.substeps != 1:
            raise ValueError(f"increments are sums of {self.substeps} normals; a kernel makes one for each step")
        if not self.plain:
            raise ValueError("paths are repeated, mirrored or swapped; a step kernel takes them as they come")
        return {
            "seed": self.seed,
            "stream": self.stream,
            "first_path": self.first_path,
            "step": self.first_step + step,
        }

    def units(self, of: Part) -> BrownianPath:
        """The sequence of unit numbers that a part is made of: of its own stream and kind, one after another.

        ``W``, ``H`` and ``K`` take as many numbers a (sub)step as there are channels, Levy areas `LevyArea.numbers`.
        """
        if of == "W":
            return self
        stream = Stream.AREA if isinstance(of, LevyArea) else _STREAMS[of]
        own = dataclasses.replace(self, kind="normal") if self.kind == "sobol" else self
        own = own if of != "S" else dataclasses.replace(own, kind="two-point", mirrored=False)
        if self.stream == Stream.DRIVING:
            return dataclasses.replace(own, stream=stream)
        # The companions of other streams than that which drives: seeded by words that nothing else reads.
        return dataclasses.replace(own, stream=stream, seed=self._seed_of((1 << 56) + self.stream))

    @survives_forks
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
        if named(of) not in self.provides:
            raise ValueError(f"{self.kind} increments have no {short(named(of))}; leave increments= out")
        batch, *channels = (whole_number(n, "each entry of shape", 0) for n in shape)
        m, dt = math.prod(channels), torch.as_tensor(times, dtype=torch.float64, device="cpu").diff(dim=0).abs()
        first, n = (self.first_step + step) * self.substeps, len(dt)
        like = torch.empty(0, dtype=dtype, device=device_of(device))
        if of == "S":
            z = self.units("S")._numbers(first, n * self.substeps, batch, m, like)[:: self.substeps]
            return z.reshape(n, *shape)
        if isinstance(of, LevyArea):
            unit, scale = self._areas(of, first, n, batch, m, like), dt / self.substeps
        else:
            unit, scale = self._composed(of, first, n, batch, m, like).reshape(n, *shape), (dt / self.substeps).sqrt()
        if scale.numel() == 1 and scale.dim() == 1 and dtype in (torch.float32, torch.float64):
            return unit * float(scale)  # a copy of it to a device would wait for that
        scale = scale.to(like)
        return unit * scale.reshape(*scale.shape, *(1,) * (unit.ndim - scale.ndim))

    @survives_forks
    def bridge(
        self,
        step: int,
        theta: float,
        shape: tuple[int, ...],
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> Tensor:
        if self.kind not in ("normal", "sobol"):
            raise ValueError(f"{self.kind} increments are no Brownian path and have no values between grid points")
        if not 0.0 <= theta <= 1.0:
            raise ValueError(f"theta is a fraction of a step, in [0, 1], got {short(theta)}")
        r, m, like = self.substeps, math.prod(shape[1:]), torch.empty(0, dtype=dtype, device=device)
        first = (self.first_step + step) * r
        substep = min(int(theta * r), r - 1)
        local = theta * r - substep
        value = self._unit_bridge(first + substep, local, shape[0], m, like)
        if r > 1:  # W at theta, less its chord: whole substeps before, the local chord, and the local bridge
            z = self._numbers(first, r, shape[0], m, like)
            value = (value + z[:substep].sum(0) + local * z[substep] - theta * z.sum(0)) / math.sqrt(r)
        return value.reshape(shape)

    def value(
        self,
        t: float,
        shape: tuple[int, ...] = (1,),
        *,
        times: Tensor | None = None,
        dtype: torch.dtype = torch.float64,
        device: torch.device | str | None = None,
    ) -> Tensor:
        """``W(t)``, the path at any time: 0 where its first step starts.

        A function of coordinates and ``t``, whatever else is asked for, and exact in law for any set of times, however
        near. Takes the increments of all steps before ``t``, and halves the step that holds it.

        Args:
            t: the time.
            shape: ``(batch, *channels)``.
            times: the grid that the steps go over, as that of an integration: ``(steps + 1,)``, in either direction.
                Steps of unit length from 0 on where it is left out.
            dtype: of the result.
            device: of the result.

        Raises:
            ValueError: the path does not reach ``t``; increments that are no Brownian path.
        """
        start = 0.0 if times is None else float(times[0])
        return self.increment(start, t, shape, times=times, dtype=dtype, device=device)

    def increment(
        self,
        s: float,
        t: float,
        shape: tuple[int, ...] = (1,),
        *,
        times: Tensor | None = None,
        dtype: torch.dtype = torch.float64,
        device: torch.device | str | None = None,
    ) -> Tensor:
        """``W(t) - W(s)`` at any two times; arguments as for `value`. Takes the increments between them alone."""
        (k, a), (last, b) = (_located(time, times) for time in (s, t))
        if times is not None and self != (path := self.over(len(times) - 1)):
            return path.increment(s, t, shape, times=times, dtype=dtype, device=device)
        if (last, b) < (k, a):
            return -self.increment(t, s, shape, times=times, dtype=dtype, device=device)
        kwargs: dict[str, Any] = {"dtype": dtype, "device": device}

        def length(step: int) -> float:
            return 1.0 if times is None else abs(float(times[step + 1]) - float(times[step]))

        def within(step: int, theta: float) -> Tensor:
            return math.sqrt(length(step)) * self.bridge(step, theta, shape, **kwargs)

        total = within(last, b) - within(k, a)
        block = max(1, _BLOCK_ELEMENTS // max(1, math.prod(shape) * self.substeps))
        for first in range(k, last + 1, block):
            count = min(block, last + 1 - first)
            ends = torch.arange(first, first + count + 1, dtype=torch.float64) if times is None else times[first:]
            dW = self.increments(ends[: count + 1], shape, step=first, **kwargs)
            for i, w in enumerate(dW, first):
                part = (b if i == last else 1.0) - (a if i == k else 0.0)
                total = total + (w if part == 1.0 else part * w)
        return total

    def _composed(self, of: Part, first: int, n: int, batch: int, m: int, like: Tensor) -> Tensor:
        """A part of ``n`` steps of length ``substeps``, from fine ones of unit length: ``(n, batch, m)``.

        One substep after another, so that the order of the sum, hence the last bit, is the same for every batch size.
        """
        r, total = self.substeps, torch.zeros(0)
        block = max(1, _BLOCK_ELEMENTS // max(1, batch * r * m)) if r > 1 else n
        for part, weights in composition(named(of), r).items():
            units, scale = self.units(cast(Part, part)), math.sqrt(VARIANCES[part])
            if r == 1:
                if any(weights):  # at r = 1, the part itself
                    own = units._numbers(first, n, batch, m, like)
                    total = own if scale == 1.0 else scale * own
                continue
            if total.numel() == 0:
                total = torch.zeros(n, batch, m, dtype=like.dtype, device=like.device)
            for k in range(0, n, block):
                steps = min(block, n - k)
                z = units._numbers(first + k * r, steps * r, batch, m, like).unflatten(0, (steps, r))
                for i, weight in enumerate(weights):
                    total[k : k + steps] += weight * scale * z[:, i]
        return total

    def _areas(self, of: LevyArea, first: int, n: int, batch: int, m: int, like: Tensor) -> Tensor:
        """Levy areas of ``n`` steps of length ``substeps``: ``(n, batch, m, m)``."""
        r, path = self.substeps, dataclasses.replace(self, mirrored=False)  # areas of -W are those of W

        def fine(part: Part, numbers: int) -> Tensor:
            return path.units(part)._numbers(first, n * r, batch, numbers, like).unflatten(0, (n, r))

        W, H, K = (math.sqrt(VARIANCES[named(part)]) * fine(part, m) for part in ("W", "H", "K"))
        A = of.draw(W, H, K, fine(of, of.numbers(m)))
        return composed_area(lambda i: A[:, i], lambda i: W[:, i], r)

    def _unit_bridge(self, step: int, theta: float, batch: int, m: int, like: Tensor) -> Tensor:
        """A standard bridge on [0, 1] at ``theta``: halves of ``(W, H, K)`` down a dyadic tree.

        Foster, Lyons and Oberhauser 2020, "An optimal polynomial approximation of Brownian motion", theorem 6.1, for
        ``(W, H)``. Below depth 20 a cell is the root of a tree of its own, with a seed of its own.
        """
        left = torch.zeros(batch, m, dtype=like.dtype, device=like.device)
        if theta in (0.0, 1.0):
            return left
        H, K = (math.sqrt(VARIANCES[o]) * self.units(o)._numbers(step, 1, batch, m, like)[0] for o in ("H", "K"))
        low, width, W = 0.0, 1.0, torch.zeros_like(left)
        for first, second in self._halves(step, theta, (W, H, K)):
            width *= 0.5
            W = first[0]
            if theta == low + width:
                return left + W
            if theta > low + width:
                left, low, W = left + W, low + width, second[0]
        return left + (theta - low) / width * W

    def _halves(
        self, step: int, theta: float, cell: tuple[Tensor, Tensor, Tensor]
    ) -> Iterator[tuple[tuple[Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]]:
        """``(W, H, K)`` of both halves of the cells that hold ``theta``, from all of a step of unit length down."""
        bridges = self._bridges
        step ^= self.swapped
        low, width, node, (W, H, K) = 0.0, 1.0, 1, cell
        (batch, m), like = W.shape, W
        for level in range(_DEEPEST):
            if level and level % _BRIDGE_DEPTH == 0:
                own = (step << (_BRIDGE_DEPTH + 1)) + node
                bridges, step, node = dataclasses.replace(bridges, seed=bridges._seed_of(own)), 0, 1
            first = (step << (_BRIDGE_DEPTH + 1)) + node
            z, x, y = bridges._numbers(first, 1, batch, 3 * m, like)[0].unflatten(1, (3, m)).unbind(1)
            root = math.sqrt(width)
            z, x, y = root / 4.0 * z, root / math.sqrt(768.0) * x, root / math.sqrt(2880.0) * y
            half = 0.5 * W + 1.5 * H + z
            width *= 0.5
            halves = [
                (w, 0.25 * H - 0.5 * z + sign * (3.75 * K + x), 0.125 * K - 0.5 * x + sign * y)
                for w, sign in ((half, 1.0), (W - half, -1.0))
            ]
            yield halves[0], halves[1]
            later = theta >= low + width
            W, H, K = halves[later]
            low, node = low + width * later, 2 * node + later

    @property
    def _bridges(self) -> BrownianPath:
        """The sequence that halves of steps are drawn from."""
        return dataclasses.replace(self.units("H"), stream=Stream.BRIDGE, swapped=False)

    def roots(self, step: int, batch: int, m: int, like: Tensor) -> Tensor:
        """Unit numbers of ``W``, ``H`` and ``K`` over a step, ``(batch, 3, m)``: where halving it begins (`halved`)."""
        first = self.first_step + step
        return torch.stack([self.units(part)._numbers(first, 1, batch, m, like)[0] for part in ("W", "H", "K")], 1)

    def nodes(self, rows: Tensor, steps: Tensor, nodes: Tensor, m: int, like: Tensor) -> Tensor:
        """The unit numbers that a cell of a step is halved with (`halved`), each row's own: ``(rows, 3, m)``.

        Args:
            rows: of the batch, ``(rows,)``, int64, as are the others.
            steps: which step of the path.
            nodes: which cell of it: 1 for the step, ``2 n`` and ``2 n + 1`` for the halves of cell ``n``.
            m: channels.
            like: has the dtype and device of the result.
        """
        at = ((((steps + self.first_step) ^ self.swapped) << (_BRIDGE_DEPTH + 1)) + nodes) * 3 * m
        z = self._bridges._of_rows(rows, at, 3 * m, like)
        return (-z if self.mirrored else z).reshape(-1, 3, m)

    @survives_forks
    def normals(self, rows: Tensor, steps: Tensor, draws: int, like: Tensor) -> Tensor:
        """The normals of a step of each row's own, ``draws`` a step: ``(rows, draws)``.

        Args:
            rows: of the batch, ``(rows,)``, int64.
            steps: likewise, which step.
            draws: how many.
            like: has the dtype and device of the result.
        """
        return self._of_rows(rows, self.first_step + steps * draws, draws, like)

    def _of_rows(self, rows: Tensor, at: Tensor, width: int, like: Tensor) -> Tensor:
        """Normals ``at ... at + width - 1`` of the sequence of each row's path."""
        path = rows + self.first_row
        path = (path if self.repeat is None else path % self.repeat) + int64_bits(self.first_path)
        block = torch.arange((width + 6) // 4, dtype=torch.int64, device=rows.device)
        words = torch.stack(reference.words(self.seed, self.stream, path[:, None], (at >> 2)[:, None] + block), -1)
        words = words.flatten(1)
        z = torch.stack(reference.box_muller(words[:, 0::2], words[:, 1::2]), -1).flatten(1)
        return z.gather(1, (at & 3)[:, None] + torch.arange(width, device=rows.device)).to(like)

    @survives_forks
    def beginning(self, step: int, theta: float, levels: Tensor, m: int, like: Tensor) -> tuple[Tensor, ...]:
        """``W``, ``H`` and ``K`` from the start of a cell to the fraction ``theta`` of the step that holds it.

        For a step of unit length. Row ``i`` is that of the cell of length ``2^-levels[i]`` whose end is at ``theta`` or
        the first beyond.

        Args:
            step: of the path.
            theta: in (0, 1), where no cell of these lengths ends.
            levels: ``(batch,)``.
            m: channels.
            like: has the dtype and device of the results, ``(batch, m)``.
        """
        scales = torch.tensor([VARIANCES[part] for part in ("W", "H", "K")], dtype=torch.float64).sqrt().to(like)
        W, H, K = (self.roots(step, len(levels), m, like) * scales[:, None]).unbind(1)
        total, length = tuple(torch.zeros_like(W) for _ in range(3)), like.new_zeros(len(levels), 1)
        low, width = 0.0, 1.0
        for level, (first, _) in enumerate(self._halves(self.first_step + step, theta, (W, H, K))):
            width *= 0.5
            if theta < low + width:
                continue
            low, within = low + width, (levels <= level)[:, None]
            longer = joined(total, length, first, width)
            total = tuple(torch.where(within, new, old) for new, old in zip(longer, total, strict=True))
            length = torch.where(within, length + width, length)
            if theta == low:
                break
        return total

    def _numbers(self, first: int, count: int, batch: int, m: int, like: Tensor) -> Tensor:
        """Unit numbers of ``count`` (sub)steps, ``m`` for each: ``(count, batch, m)``."""
        z = torch.empty(count, batch, m, dtype=like.dtype, device=like.device)
        if self.swapped:
            start = first - first % 2
            pairs = (first + count + 1 - start) // 2
            whole = dataclasses.replace(self, swapped=False)._numbers(start, 2 * pairs, batch, m, like)
            return whole.unflatten(0, (pairs, 2)).flip(1).flatten(0, 1)[first - start :][:count]
        if self.repeat is None or self.first_row + batch <= self.repeat:
            here = dataclasses.replace(self, first_path=self.first_path + self.first_row) if self.first_row else self
            if here.kind == "sobol":
                z = here._of_points(first, count, batch, m, like)
            else:
                here._draw(batch, count * m, first * m, like.dtype, like.device, out=z.transpose(0, 1))
        else:
            rows = self.first_row + torch.arange(batch, device=like.device)
            once = dataclasses.replace(self, repeat=None, first_row=0, mirrored=False)
            until = self.repeat - self.first_row  # rows before the paths start again
            if batch >= self.repeat:
                z = once._numbers(first, count, self.repeat, m, like)[:, rows % self.repeat]
            else:
                z[:, :until] = once.rows(self.first_row)._numbers(first, count, until, m, like)
                z[:, until:] = once._numbers(first, count, batch - until, m, like)
        return z.neg_() if self.mirrored else z

    def _of_points(self, first: int, count: int, batch: int, m: int, like: Tensor) -> Tensor:
        """Unit numbers of ``count`` (sub)steps from Sobol points."""
        if self.horizon is None or first + count > self.horizon * self.substeps:
            known = "no horizon" if self.horizon is None else f"horizon={self.horizon}"
            raise ValueError(
                f"a Sobol path is laid out over all of its steps, and this one has {known} and was asked for step "
                f"{(first + count - 1) // self.substeps}; give BrownianPath(seed, kind='sobol', horizon=steps)"
            )
        seed = self.seed if self.stream == Stream.DRIVING else self._seed_of((1 << 56) + self.stream)
        steps = self.horizon * self.substeps
        return bridged_normals(seed, self.stream, self.first_path, batch, steps, first, count, m, like)

    def _seed_of(self, index: int) -> int:
        """A seed for what has no stream of its own, from two words of the generator."""
        low, high = words(1, 2, seed=self.seed, stream=Stream.SEEDS, offset=2 * index, device="cpu")[0].tolist()
        return low + (high << 32)

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
        return 2.0 * bits.flatten(1)[:, start : start + count].double() - 1.0


@final
class BrownianRows(AbstractStreams, AbstractPath):
    """Brownian paths with a seed, or a path number, for each row: row ``i`` is row 0 of a `BrownianPath` of its own.

    Chosen rows of a large run are made again by their numbers, and each request of a service keeps the seed that it
    came with, whatever else is in the batch. Runs go step by step, in torch.

    Args:
        seed: of all rows, or one for each.
        paths: path number of each row; 0 for all by default, where each has a seed.
        substeps, kind: as `BrownianPath`.

    Raises:
        TypeError: something that is no integer.
        ValueError: no row, not as many seeds as paths, or a number out of range; in `solve`, another batch.

    Example:
        >>> again = sds.solve(sde, x0[[3, 17]], 0.0, 1.0, 256, solver=solver, noise=BrownianRows(7, paths=[3, 17]))
    """

    def __init__(
        self,
        seed: int | Iterable[int] | Tensor,
        paths: Iterable[int] | Tensor | None = None,
        *,
        substeps: int = 1,
        kind: Increments = "normal",
    ) -> None:
        single = isinstance(seed, int) or (isinstance(seed, Tensor) and seed.ndim == 0)
        if single and paths is None:
            raise ValueError("give a seed or a path number for each row; one seed for all is BrownianPath(seed)")
        numbers = None if paths is None else [whole_number(path, "each of paths", 0) for path in paths]
        seeds: list[Any] = [seed] * len(numbers or ()) if single else list(seed)  # type: ignore[arg-type]
        numbers = [0] * len(seeds) if numbers is None else numbers
        if len(seeds) != len(numbers) or not seeds:
            raise ValueError(f"rows have a seed and a path number each, got {len(seeds)} and {len(numbers)}")
        self._parts: list[tuple[BrownianPath, int]] = []
        for own, path in zip(seeds, numbers, strict=True):
            last, count = self._parts[-1] if self._parts else (None, 0)
            if last is not None and last.seed == own and last.first_path + count == path:
                self._parts[-1] = last, count + 1
            else:
                self._parts.append((BrownianPath(own, path, substeps=substeps, kind=kind), 1))

    @classmethod
    def of(cls, path: BrownianPath, numbers: Iterable[int]) -> BrownianRows:
        """The paths of these numbers, counted from the first path of ``path``."""
        made = cls(path.seed, [path.first_path + n for n in numbers])
        return made._with(lambda own: dataclasses.replace(path, first_path=own.first_path))

    @property
    def listed(self) -> tuple[BrownianPath, Tensor] | None:
        """One path, and the numbers of the rows' paths counted from it, where all have one seed."""
        first = min((path for path, _ in self._parts), key=lambda path: path.first_path)
        if any(dataclasses.replace(path, first_path=first.first_path) != first for path, _ in self._parts):
            return None
        numbers = [path.first_path - first.first_path + i for path, count in self._parts for i in range(count)]
        return None if max(numbers) >> 62 else (first, torch.tensor(numbers, dtype=torch.int64, device="cpu"))

    @property
    def provides(self) -> frozenset[str]:
        return self._parts[0][0].provides

    def after(self, steps: int) -> BrownianRows:
        """As `BrownianPath.after`."""
        return self._with(lambda path: path.after(steps))

    def in_draws(self, draws: int) -> BrownianRows:
        return self._with(lambda path: path.in_draws(draws))

    def over(self, steps: int) -> BrownianRows:
        return self._with(lambda path: path.over(steps))

    def correctors(self, draws: int) -> BrownianRows:
        return self._with(lambda path: path.correctors(draws))

    def within_steps(self, draws: int) -> BrownianRows:
        """As `BrownianPath.within_steps`."""
        return self._with(lambda path: path.within_steps(draws))

    def initial(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | str | None) -> Tensor:
        """Standard normals for states at the start, ``(batch, *state)``: those that `Prior.sample` makes."""
        start = self._with(lambda path: BrownianPath(path.seed, path.first_path, stream=Stream.INITIAL))
        return start.increments(torch.tensor([0.0, 1.0]), shape, dtype=dtype, device=device)[0]

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
        made, first, parts = [], 0, self.parts(shape[0])
        listed = self.listed if len(parts) > 1 and times.ndim == 1 else None
        if listed is not None and int(listed[1].max()) < _DENSE * shape[0]:
            whole = (int(listed[1].max()) + 1, *shape[1:])
            dense = listed[0].increments(times, whole, step=step, of=of, dtype=dtype, device=device)
            return dense.index_select(1, listed[1].to(dense.device))
        for path, count in parts:
            own = times[:, first : first + count] if times.ndim == 2 else times
            made.append(path.increments(own, (count, *shape[1:]), step=step, of=of, dtype=dtype, device=device))
            first += count
        return torch.cat(made, 1)

    def bridge(
        self,
        step: int,
        theta: float,
        shape: tuple[int, ...],
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> Tensor:
        parts = self.parts(shape[0])
        return torch.cat([p.bridge(step, theta, (n, *shape[1:]), dtype=dtype, device=device) for p, n in parts])

    def check_rows(self, batch: int) -> None:
        """Refuses a batch of another size."""
        rows = sum(count for _, count in self._parts)
        if batch != rows:
            raise ValueError(f"noise has seeds or path numbers for {rows} rows, and the batch has {batch}")

    def parts(self, batch: int) -> list[tuple[BrownianPath, int]]:
        """Paths of rows one after another, and how many rows each has."""
        self.check_rows(batch)
        return self._parts

    def _with(self, change: Callable[[BrownianPath], BrownianPath]) -> BrownianRows:
        changed = copy.copy(self)
        changed._parts = [(change(path), count) for path, count in self._parts]
        return changed
