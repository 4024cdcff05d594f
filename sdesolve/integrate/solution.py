"""What `solve` returns, and what it raises when the state stops being finite."""

from __future__ import annotations

import dataclasses
import functools
import math
import textwrap
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple, final

from torch import Tensor

from sdesolve._internal.arguments import short
from sdesolve._internal.tables import html_table
from sdesolve.brownian import AbstractNoise
from sdesolve.carry import AbstractCarry
from sdesolve.crossing import AbstractBoundary
from sdesolve.solvers.base import AbstractSolver
from sdesolve.sums import Sums

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@final
@dataclasses.dataclass(frozen=True)
class Saved:
    """What an executor leaves.

    Attributes:
        x1: final state, ``(batch, *state)``.
        xs: saved states or observations ``(times, batch, *values)``; means ``(times, *values)`` if there are variances.
        variances: over the batch.
        steps: taken; with an adaptive solver, the most of any sample.
        evaluations: of the drift, saving included.
        execution: what ran.
        reason: which kernel, or what follows each step; may be empty.
        source: of the generated kernel, if one ran.
        adaptive: counts of each sample, with an adaptive solver.
        memory: what the solver remembers at the end, and what follows paths.
        weights: divergences and log-weights of each path at the saved times, ``(times, 2, batch)``.
        work: steps of paths that were computed, where that is not every step of every path.
    """

    x1: Tensor
    xs: Tensor
    variances: Tensor | None
    steps: int
    evaluations: int
    execution: str
    reason: str
    source: str | None = None
    adaptive: AdaptiveCounts | None = None
    memory: tuple[Tensor, ...] = ()
    weights: Tensor | None = None
    work: int | None = None


class AdaptiveCounts(NamedTuple):
    """What each sample's steps took, ``(batch,)`` each: steps, attempts thrown away, drift evaluations.

    With ``until=`` also the times, float64, that samples have come to.
    """

    accepted: Tensor
    rejected: Tensor
    evaluations: Tensor
    reached: Tensor | None = None


@dataclasses.dataclass(frozen=True)
class Stats:
    """How a solution was made.

    Attributes:
        solver: name of the solver.
        steps: steps taken.
        nfe: evaluations of the drift (for a reverse SDE or probability flow, of the score), saving included.
        execution: what ran: ``fused``, the whole trajectory in one generated kernel; ``kernel``, one kernel for each
            step; or ``eager``, the solver's step in torch.
        reason: which kernel, or why no faster one.
        seed: seed of the driving noise; ``None`` for an ODE or for noise that has none.
        source: the generated kernel, if one ran.
        accepted: with an adaptive solver or ``until=``, steps that each path took, ``(batch,)``; ``steps`` is the most
            of any.
        rejected: attempts that each threw away.
        evaluations: of the drift on each sample's way; ``nfe`` counts calls, whatever their share of the batch.
        work: with ``until=``, steps of paths that were computed, those after a path's stop included.
    """

    solver: str
    steps: int
    nfe: int
    execution: str
    reason: str
    seed: int | None = None
    source: str | None = dataclasses.field(default=None, repr=False)
    accepted: Tensor | None = dataclasses.field(default=None, repr=False)
    rejected: Tensor | None = dataclasses.field(default=None, repr=False)
    evaluations: Tensor | None = dataclasses.field(default=None, repr=False)
    work: int | None = None

    @property
    def backend(self) -> str:
        """The same as `execution`, named as the argument of `solve`."""
        return self.execution


@final
@dataclasses.dataclass(frozen=True, repr=False)
class Continuation:
    """Where an integration has come to: ``solve(sde, t1=..., steps=..., solver=solver, start=state)`` goes on from it.

    Cut at any grid point, an integration has the bits of the whole: the noise goes on where it stopped, counted in
    steps of the solver, and so does what a multistep solver remembers. It can be pickled.

    Attributes:
        x: the state, ``(batch, *state)``; the memory of `Solution.x1`.
        memory: tensors that the solver carries beside it; then what follows paths, and where they have stopped.
        times: the grid so far, ``(steps + 1,)`` or ``(steps + 1, batch)``, float64 on the host.
        noise: what drives it, from the first of all steps.
        solver: which takes the next step too.
        carry: functionals that go on.
        until: boundaries that go on to stop or reflect paths.
        weights: with ``kl_to``, the divergence and the log-weight of each path so far.
        jumps: of an equation that jumps, what each path waits for, its candidates and its jumps so far.
        delays: of an equation with delays, states of the steps before, the latest first.
    """

    x: Tensor
    memory: tuple[Tensor, ...]
    times: Tensor
    noise: AbstractNoise
    solver: AbstractSolver
    carry: AbstractCarry | None = None
    until: tuple[AbstractBoundary, ...] = ()
    weights: tuple[Tensor, ...] = ()
    jumps: tuple[Tensor, ...] = ()
    delays: tuple[Tensor, ...] = ()

    @property
    def t(self) -> Tensor:
        """The time of the state, ``()`` or ``(batch,)``."""
        return self.times[-1]

    @property
    def steps(self) -> int:
        """Steps taken."""
        return len(self.times) - 1

    def __repr__(self) -> str:
        batch = f"{len(self.x)} states of shape {tuple(self.x.shape[1:])}"
        return f"Continuation({batch}, {self.steps} steps of {self.solver!r})"


@dataclasses.dataclass(frozen=True, repr=False)
class Solution:
    """The result of `solve`.

    Attributes:
        x1: state at the end of the grid, ``(batch, *state)``.
        ts: times of ``xs``, float64 on the host, ``(times,)`` or ``(times, batch)``.
        xs: saved states, ``(times, batch, *state)``; the final state alone unless ``save_at`` was given. With an
            ``observable``, its values instead. Empty, with no times, if ``reduce`` was given.
        stats: how it was made.
        mean: of what ``xs`` would hold over the batch, ``(times, *state)``, float64, if ``reduce="moments"``.
        variance: likewise, unbiased.
        sums: likewise, exact sums that add up over batches, if ``reduce="sums"``.
        state: what `solve` goes on with; ``None`` if a run cannot be cut: steps are adaptive, or depend on how many the
            whole grid has (`AbstractSolver.divisible`).
        carry: what ``carry=`` has become at the end, ``(batch, ...)``.
        stopped: with ``until=``, which paths have stopped, ``(batch,)``.
        stop_time: when, float64; infinity in the direction of time for a path that has not.
        boundary: at which of the boundaries, counted from 0; -1 for a path that has not stopped.
        kl: with ``kl_to``, ``1/2 int |u|^2 dt`` along each path to the end of the grid, ``(batch,)``: its mean is the
            Kullback-Leibler divergence of the law of the paths from that of the prior.
        log_weight: likewise the log-density of the law of the prior in that of the SDE, ``(batch,)``, by Girsanov's
            theorem: means of ``exp(log_weight) phi(X)`` are those of ``phi(X)`` under the prior.
        kls: the divergence up to each of ``ts``, ``(times, batch)``; ``kls.diff(dim=0)`` is that of each interval.
            ``None`` with ``reduce``.
        log_weights: likewise.
        jumps: of a `JumpSDE` or of `Reactions`, how many jumps or reactions each path had from its start, ``(batch,)``.

    No two of ``x1``, ``xs`` and ``x0`` share memory, whatever ran.
    """

    x1: Tensor
    ts: Tensor
    xs: Tensor
    stats: Stats
    mean: Tensor | None = None
    variance: Tensor | None = None
    state: Continuation | None = None
    carry: Any = None
    stopped: Tensor | None = None
    stop_time: Tensor | None = None
    boundary: Tensor | None = None
    sums: Sums | None = None
    kl: Tensor | None = None
    log_weight: Tensor | None = None
    kls: Tensor | None = None
    log_weights: Tensor | None = None
    jumps: Tensor | None = None

    def plot(self, kind: str | None = None, **options: Any) -> Figure:
        """A picture of what was saved, as a matplotlib figure.

        Args:
            kind: ``"paths"``, lines and the histogram of their ends; ``"fan"``, the median and central bands;
                ``"density"``, histograms over time; ``"phase"``, two components against each other; ``"band"``, mean
                and two standard deviations. Paths if not given, a band where ``reduce="moments"`` left moments alone.
            options: of that function of `sdesolve.plotting`, such as ``component=1`` or ``title="..."``.

        Raises:
            ValueError: another kind; fewer than two times were saved, or no paths; times differ from path to path.
            ImportError: matplotlib is missing.
        """
        kind = ("paths" if self.mean is None else "band") if kind is None else kind
        if kind not in _KINDS:
            raise ValueError(f"kind must be one of {', '.join(map(repr, _KINDS))}, got {short(kind)}")
        held = self.mean if kind == "band" else self.xs
        if held is None:
            raise ValueError("a band needs moments; solve with reduce='moments', or plot(\"fan\")")
        if self.ts.ndim != 1:
            raise ValueError("times differ from path to path; draw paths one by one with sdesolve.plotting.paths")
        if len(held) < 2:
            some = "moments alone were kept" if kind != "band" and self.mean is not None else f"{len(held)} were saved"
            raise ValueError(f"a picture over time needs two times or more, and {some}; solve with save_at='grid'")
        from sdesolve import plotting

        if kind == "band":
            assert self.variance is not None
            return plotting.band(self.ts, held, self.variance, **options)
        if kind == "phase":
            return plotting.phase(held, **options)
        draw: Callable[..., Figure] = getattr(plotting, kind)
        return draw(self.ts, held, **options)

    def _told(self) -> dict[str, str]:
        """What a reader wants to know first, in short."""
        x, stats, ts = self.x1, self.stats, self.ts
        told = {"states": f"{len(x)} of shape {tuple(x.shape[1:])}, {str(x.dtype).removeprefix('torch.')}, {x.device}"}
        if ts.numel():
            ends = f"{float(ts[0].min()):g} to {float(ts[-1].max()):g}" if len(ts) > 1 else f"{float(ts[0].max()):g}"
            told["saved"] = f"{len(ts)} time{'s' * (len(ts) > 1)}, {ends}"
        told["by"] = f"{stats.solver}, {stats.steps} steps, seed {stats.seed}"
        told["ran"] = textwrap.shorten(f"{stats.execution}: {stats.reason}", 200, placeholder=" ...")
        beside = [name for name in _BESIDE if getattr(self, name) is not None]
        return told | ({"beside": ", ".join(beside)} if beside else {})

    def __repr__(self) -> str:
        return "Solution\n" + "\n".join(f"  {name + ':':7} {text}" for name, text in self._told().items())

    def _repr_html_(self) -> str:
        return html_table("Solution", self._told()) + self._picture()

    def _picture(self) -> str:
        """The first number of a few paths against time, as SVG; nothing where fewer than three times were saved."""
        if len(self.ts) < 3 or self.xs.ndim < 2 or self.ts.ndim != 1 or not len(self.x1):
            return ""
        x = self.xs.detach()[:, :12].reshape(len(self.ts), min(12, len(self.x1)), -1)[:, :, 0].double().cpu()
        t = self.ts.double()
        x, t = ((v - v.min()) / (v.max() - v.min()).clamp(min=1e-300) for v in (x, t))
        lines = []
        for path in x.T.nan_to_num().tolist():
            points = " ".join(f"{240 * a:.1f},{80 - 80 * b:.1f}" for a, b in zip(t.tolist(), path, strict=True))
            lines.append(f'<polyline points="{points}" fill="none" stroke="#4477aa" stroke-opacity="0.6"/>')
        return f'<svg width="240" height="80" viewBox="0 -2 240 84">{"".join(lines)}</svg>'


_KINDS = ("paths", "fan", "density", "phase", "band")
_BESIDE = ("mean", "variance", "sums", "carry", "stopped", "kl", "log_weight", "jumps")


def finished(
    saved: Saved,
    reason: str,
    solver: AbstractSolver,
    noise: AbstractNoise,
    seed: int | None,
    times: Tensor,
    ts: Tensor,
    memory: tuple[Tensor, ...],
    carried: tuple[AbstractCarry | None, tuple[AbstractBoundary, ...]] = (None, ()),
    weights: tuple[Tensor, ...] = (),
    accepted: Tensor | None = None,
    work: int | None = None,
    waiting: tuple[Tensor, ...] = (),
    delays: tuple[Tensor, ...] = (),
    **outcome: Any,
) -> Solution:
    """What `solve` returns of what an executor left."""
    adaptive = saved.adaptive
    stats = Stats(
        type(solver).__name__, saved.steps, saved.evaluations, saved.execution, reason, seed, saved.source, accepted,
        adaptive and adaptive.rejected, adaptive and adaptive.evaluations, saved.work if work is None else work,
    )  # fmt: skip
    if solver.divisible:
        own = weights, waiting, delays
        outcome["state"] = Continuation(saved.x1, memory, times.clone(), noise, solver, *carried, *own)
    if saved.variances is None:
        return Solution(saved.x1, ts, saved.xs, stats, **outcome)
    nothing = saved.x1.new_empty(0, *saved.x1.shape)
    return Solution(saved.x1, ts, nothing, stats, saved.xs, saved.variances, **outcome)


class DivergenceError(FloatingPointError):
    """The state, the drift or the diffusion stopped being finite.

    Attributes:
        step: index of the first step that gave a value which is not finite.
        time: where that step starts.
        path: index of the first path it happened to, counted from the noise's ``first_path``.
    """

    def __init__(self, message: str, *, step: int, time: float, path: int) -> None:
        super().__init__(message)
        self.step, self.time, self.path = step, time, path

    def __reduce__(self) -> tuple[Callable[..., DivergenceError], tuple[object, ...]]:
        return functools.partial(type(self), step=self.step, time=self.time, path=self.path), self.args


class Reached(NamedTuple):
    """Where samples are when a run stops: states ``(batch, *state)``, their times and counts of steps, ``(batch,)``."""

    x: Tensor
    t: Tensor
    accepted: Tensor
    rejected: Tensor


class StepLimitError(RuntimeError):
    """An adaptive solver cannot meet its tolerances: steps would be too many, or too short.

    Attributes:
        reached: states and times of all samples; those that have arrived are at their end. ``None`` if raised by hand.
        time: as far as the first of the samples that are stuck came.
        path: which one that is, counted from the noise's ``first_path``.
    """

    def __init__(self, message: str, *, reached: Reached | None = None, time: float = 0.0, path: int = 0) -> None:
        super().__init__(message)
        self.reached, self.time, self.path = reached, time, path

    def __reduce__(self) -> tuple[Callable[..., StepLimitError], tuple[object, ...]]:
        make = functools.partial(type(self), reached=self.reached, time=self.time, path=self.path)
        return make, self.args


class RateError(ValueError):
    """A rate of jumps is none: it exceeds its bound, is negative or not finite, or makes a count negative.

    Attributes:
        path: the first path that it happened to, counted from the noise's ``first_path``.
        time: when.
        rate: its value.
        bound: what it exceeds, if that is the matter.
        reached: states and times of all paths then, with the jumps that each has had; ``None`` if raised by hand.
    """

    def __init__(
        self,
        message: str,
        *,
        path: int = 0,
        time: float = 0.0,
        rate: float = math.nan,
        bound: float | None = None,
        reached: Reached | None = None,
    ) -> None:
        super().__init__(message)
        self.path, self.time, self.rate, self.bound, self.reached = path, time, rate, bound, reached

    def __reduce__(self) -> tuple[Callable[..., RateError], tuple[object, ...]]:
        kept = {"path": self.path, "time": self.time, "rate": self.rate, "bound": self.bound, "reached": self.reached}
        return functools.partial(type(self), **kept), self.args  # type: ignore[arg-type]
