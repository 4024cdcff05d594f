"""Steps of equations whose paths jump, of which each path takes as many as it needs between two grid points."""

from __future__ import annotations

import abc
import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple, cast, final

import torch
from sdesolve_kernels import Stream, counts, reference, words
from sdesolve_kernels.backend import int64_bits
from sdesolve_kernels.counts import Tail, tail
from torch import Tensor

from sdesolve._internal.arguments import positional
from sdesolve._internal.levy_area import VARIANCES
from sdesolve._internal.transforms import refuse_vmap
from sdesolve.brownian import BrownianPath, BrownianRows, Increment, joined, named
from sdesolve.integrate.checks import all_finite, bad_rows, unchanged
from sdesolve.integrate.clock import check_clock
from sdesolve.integrate.lowering import Lowered, States, StepContext, one_step
from sdesolve.integrate.problem import Problem
from sdesolve.integrate.solution import DivergenceError, RateError, Reached, StepLimitError
from sdesolve.jumps import AbstractJumping, JumpSDE, Reactions
from sdesolve.sde import Noise, per_sample
from sdesolve.solvers.base import AbstractOneStep, AbstractRemembering, Span
from sdesolve.solvers.predictor_corrector import PredictorCorrector
from sdesolve.solvers.reactions import AbstractReacting, Gillespie, TauLeap

EAGER = "each path jumps at times of its own, which no kernel does; steps run in torch"
_NUMBERS = 20  # bits of candidates between the numbers of two steps of a path that begins later
_DRAWS = 24  # bits of the draws within a step
_DEEPEST = 60
_AHEAD = 33  # candidates whose numbers are made at once
_LARGEST = {torch.float32: 2.0**24, torch.float64: 2.0**53}


class Clock(NamedTuple):
    """What a path carries beside its state, ``(batch,)`` each, float64.

    Attributes:
        waiting: what is left of the unit exponential number that the next candidate waits for.
        tried: candidates so far; leaps, with `TauLeap`.
        jumps: how many of them were jumps; reactions so far.
    """

    waiting: Tensor
    tried: Tensor
    jumps: Tensor


@final
class Coordinates:
    """Random words of each row, by numbers of its own.

    Args:
        noise: paths.
        batch: how many rows.
        device: of the words.
    """

    def __init__(self, noise: BrownianPath | BrownianRows, batch: int, device: torch.device) -> None:
        parts = noise.parts(batch) if isinstance(noise, BrownianRows) else [(noise, batch)]
        path = torch.empty(batch, dtype=torch.int64, device=device)
        self._seeds: list[int] = []
        which = torch.empty(batch, dtype=torch.int64, device=device)
        first = 0
        for own, count in parts:
            row = torch.arange(count, dtype=torch.int64, device=device) + own.first_row
            row = row if own.repeat is None else row % own.repeat
            seed = own.units("H").seed  # another one, where this is not the stream that drives
            if seed not in self._seeds:
                self._seeds.append(seed)
            path[first : first + count] = row + int64_bits(own.first_path)
            which[first : first + count] = self._seeds.index(seed)
            first += count
        self._path, self._which, self.first_step = path, which, parts[0][0].first_step if parts else 0
        alone = len(parts) == 1 and parts[0][0].repeat is None
        self._first_path = parts[0][0].first_path if alone else None  # of rows one after another

    @property
    def numbers(self) -> tuple[Tensor, Tensor]:
        """Number and seed of each row's path, as bits of int64."""
        return self._path, torch.tensor([int64_bits(s) for s in self._seeds], device=self._which.device)[self._which]

    def of_all(self, stream: int, block: int, blocks: int) -> Tensor:
        """`words` of all rows from one block on."""
        if self._first_path is None:
            first = torch.full_like(self._path, block)
            return self.words(stream, first, blocks)
        made = words(
            len(self._path), 4 * blocks, seed=self._seeds[0], stream=stream, first_path=self._first_path,
            offset=4 * block, device=self._path.device,
        )  # fmt: skip
        return made.reshape(-1, blocks, 4)

    def words(self, stream: int, block: Tensor, blocks: int, rows: Tensor | None = None) -> Tensor:
        """Words of ``blocks`` blocks from ``block: (rows,)`` on, ``(rows, blocks, 4)``."""
        path, which = (v if rows is None else v[rows] for v in (self._path, self._which))
        at = block[:, None] + torch.arange(blocks, dtype=torch.int64, device=block.device)
        if len(self._seeds) == 1:
            return torch.stack(reference.words(self._seeds[0], stream, path[:, None], at), -1)
        made = torch.empty(len(at), blocks, 4, dtype=torch.int64, device=block.device)
        for i, seed in enumerate(self._seeds):
            own = (which == i).nonzero().squeeze(1)
            made[own] = torch.stack(reference.words(seed, stream, path[own][:, None], at[own]), -1)
        return made


def exponential(w: Tensor) -> Tensor:
    """Unit exponential numbers from the first two words of blocks, ``(..., 4)``."""
    u = tail(w[..., 0], w[..., 1])
    return torch.where(u.upper, -(-u.chance).log1p(), -u.chance.log())


def jumping(problem: Problem) -> Lowered:
    """The step of an equation whose paths jump, over one interval of the grid.

    Raises:
        ValueError: what this cannot be combined with; states that are no counts.
    """
    refuse_vmap("paths jump at times that depend on their values")
    _check(problem)
    make = (
        _Leaps if isinstance(problem.solver, TauLeap) else Events if isinstance(problem.solver, Gillespie) else _Jumps
    )
    return make(problem).lowered()


def _check(problem: Problem) -> None:
    following, noise = problem.following, problem.noise
    if not isinstance(noise, BrownianPath | BrownianRows):
        raise TypeError(f"jumps are drawn from a BrownianPath, and {type(noise).__name__} has none of its numbers")
    path = noise.parts(len(problem.x0))[0][0] if isinstance(noise, BrownianRows) else noise
    if isinstance(problem.solver, TauLeap) and path.substeps != 1:
        raise ValueError(
            f"counts of a leap are no sums of those of shorter ones, and the noise has substeps={path.substeps}"
        )
    if following is not None and following.normals:
        raise ValueError(
            "between grid points a path that jumps is no Brownian bridge: give bridge=False to Crossing, Reflection, "
            "RunningMaximum or RunningMinimum, which then look at grid points alone"
        )


class _Stepping(abc.ABC):
    """Interval after interval of the grid. A subclass says what happens within one."""

    def __init__(self, problem: Problem) -> None:
        self.problem, self.batch, self.device = problem, len(problem.x0), problem.x0.device
        assert isinstance(problem.noise, BrownianPath | BrownianRows)
        self.coordinates = Coordinates(problem.noise, self.batch, self.device)
        self.first_number = self.coordinates.first_step << _NUMBERS
        if (self.coordinates.first_step + problem.steps + 1) * max(1, self.width()) >= 1 << 32:
            raise ValueError(
                f"first_step={self.coordinates.first_step} is too far along the path for the numbers of its jumps; "
                f"below {(1 << 32) // max(1, self.width())}"
            )

    def width(self) -> int:
        """Blocks of numbers that a candidate, or a leap, may take."""
        equation = self.problem.equation
        if isinstance(equation, Reactions):
            return equation.stoichiometry.shape[1]
        assert isinstance(equation, JumpSDE)
        return max(equation.marks, 2 * math.prod(self.problem.increment.shape[1:]))

    def lowered(self) -> Lowered:
        return Lowered(self.step, extra=self.clock(), eager=EAGER)

    def clock(self) -> States:
        """Before the first step."""
        if self.problem.earlier is not None:
            return self.problem.earlier.jumps
        nothing = torch.zeros(self.batch, dtype=torch.float64, device=self.device)
        return (self.fresh(nothing)[0], nothing, nothing)

    def fresh(self, number: Tensor, rows: Tensor | None = None) -> tuple[Tensor, Tail]:
        """The unit exponential number that candidate ``number`` waits for, and the uniform one that it is judged by."""
        w = self.coordinates.words(Stream.JUMP, number.long() + self.first_number, 1, rows)[:, 0]
        return exponential(w), tail(w[:, 2], w[:, 3])

    def ends(self, k: int) -> tuple[Tensor, Tensor]:
        """Of step ``k``, ``(batch,)`` each, float64."""
        at, b = (t.to(self.device).expand(self.batch) for t in self.problem.times[k : k + 2])
        return at, b

    @abc.abstractmethod
    def step(self, context: StepContext, states: States) -> States:
        """From one grid point to the next."""

    def path_of(self, row: int) -> int:
        """The number of a row's path, for a message."""
        return row + self.problem.first_path

    def give_up(self, stuck: Tensor, x: Tensor, t: Tensor, clock: Clock, what: str, limit: str) -> None:
        """Refuses paths that have too many events."""
        row = int(stuck.nonzero()[0])
        raise StepLimitError(
            f"path {self.path_of(row)} has more than {what} at t = {float(t[row]):.6g} ({int(stuck.sum())} of "
            f"{len(stuck)} paths do): {limit}. err.reached has states, times and counts of all paths",
            reached=Reached(x.detach(), t, clock.jumps.long(), (clock.tried - clock.jumps).long().clamp_min(0)),
            time=float(t[row]),
            path=self.path_of(row),
        )

    def refuse(
        self, bad: Tensor, what: str, x: Tensor, t: Tensor, clock: Clock, rate: Tensor, bound: Tensor | None, mend: str
    ) -> None:
        """Refuses rates for which there are no jumps."""
        row = int(bad.nonzero()[0])
        state = ", ".join(f"{v:.6g}" for v in x[row].detach().flatten()[:4].tolist())
        state = f"[{state}{', ...' if x[row].numel() > 4 else ''}]"
        raise RateError(
            f"{what} for path {self.path_of(row)} at t = {float(t[row]):.6g}, in the state {state} "
            f"({int(bad.sum())} of {len(bad)} paths are affected); {mend}. err.reached has states, times and counts of "
            "all paths",
            path=self.path_of(row),
            time=float(t[row]),
            rate=float(rate.flatten(1)[row, 0] if rate.ndim > 1 else rate[row]),
            bound=None if bound is None else float(bound[row]),
            reached=Reached(x.detach(), t, clock.jumps.long(), (clock.tried - clock.jumps).long().clamp_min(0)),
        )


@final
class _Jumps(_Stepping):
    """Of a `JumpSDE`."""

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem)
        equation, solver = problem.equation, problem.solver
        assert isinstance(equation, JumpSDE)
        self.k = 0
        self.sde, self.takes = equation, positional(equation.jump) if callable(equation.jump) else 0
        if not isinstance(solver, AbstractOneStep) or isinstance(solver, PredictorCorrector):
            raise TypeError(f"{type(solver).__name__} has no step for an equation that jumps")
        self.base, self.solver = one_step(problem, solver), solver
        if equation.adapted:
            self._check_adapted(solver)

    def _check_adapted(self, solver: AbstractOneStep) -> None:
        problem, name = self.problem, type(solver).__name__
        check_clock(problem.times, problem.x0, by_row=True)
        unfit = [named(part) for part in solver.needs if named(part) in ("A", "S")]
        why = ""
        if isinstance(solver, AbstractRemembering):
            why = f"{name} remembers earlier steps"
        elif self.base.table is not None:
            why = f"{name} has numbers of each step made from the grid beforehand"
        elif problem.noise.provides.isdisjoint("HK") and problem.equation.noise is not Noise.NONE:
            why = f"increments of {problem.noise!r} are no Brownian path that could be cut"
        elif unfit and problem.equation.noise is not Noise.NONE:
            why = f"{name} reads {'Levy areas' if 'A' in unfit else 'two-point numbers'}, and parts of a step have none"
        if why:
            raise ValueError(
                f"steps end at jumps, and {why}: give JumpSDE(..., adapted=False), whose jumps are made at grid "
                "points, or take EulerMaruyama, Heun, SRIW1 or SPaRK"
            )

    def lowered(self) -> Lowered:
        return dataclasses.replace(
            self.base, step=self.step, extra=(*self.base.extra, *self.clock()), one_step=None, eager=EAGER
        )

    def step(self, context: StepContext, states: States) -> States:
        *own, waiting, tried, jumps = states
        clock = Clock(waiting, tried, jumps)
        if self.sde.adapted:
            x, clock = self._within(context, own[0], clock)
            return (x, *clock)
        x, *memory = self.base.step(context, tuple(own))
        x, after = self._within(None, x, clock, context)
        jumped = after.jumps > jumps
        # A solver that remembers begins anew.
        return (x, *(torch.where(per_sample(jumped, m), 0.0, m) for m in memory), *after)

    def _within(
        self, context: StepContext | None, x: Tensor, clock: Clock, grid: StepContext | None = None
    ) -> tuple[Tensor, Clock]:
        """An interval of the grid, in parts between candidates; with jumps alone where there is no context."""
        k = self.k = cast(Any, context or grid).k
        at, b = self.ends(k)
        sign, active = (b - at).sign(), b != at
        increment = None if context is None else context.increment()
        cell: tuple[Tensor, ...] | None = None
        while True:
            bound = self._rate(self.sde.bound, "bound", x, at, clock)
            gap = torch.where(bound > 0, clock.waiting / bound, math.inf)
            left = (b - at).abs()
            hit = active & (gap < left)
            end = torch.where(hit, at + sign * gap, b)
            end = torch.where(active, end, at)
            if context is not None:
                part = increment
                if increment is not None and (cell is not None or bool(hit.any())):
                    whole = increment if cell is None else None
                    part, cell = self._cut(cell or self._cell(k), hit, at, end, b, clock.tried, whole)
                span = Span(self.problem.clock(at), self.problem.clock(end), per_sample((end - at).to(x.dtype), x))
                moved = self.solver.step(self.problem.watched, x, span, part)
                x = torch.where(per_sample(active, x), moved, x)
            spent = torch.where(active & ~hit, clock.waiting - bound * left, clock.waiting)
            clock = clock._replace(waiting=spent.clamp_min(0.0))
            if not bool(hit.any()):
                return x, clock
            x, clock = self._judge(x, end, hit, bound, clock)
            at, active = end, hit
            if bool((many := clock.tried > self.sde.max_jumps).any()):
                self.give_up(
                    many, x, at, clock, f"max_jumps={self.sde.max_jumps} candidates for jumps",
                    "give JumpSDE a lower bound or a larger max_jumps",
                )  # fmt: skip

    def _judge(self, x: Tensor, t: Tensor, hit: Tensor, bound: Tensor, clock: Clock) -> tuple[Tensor, Clock]:
        """Makes jumps of candidates, with the probability that their rate has of the bound."""
        rows = hit.nonzero().squeeze(1)
        waiting = clock.waiting.index_copy(0, rows, self.fresh(clock.tried[rows] + 1.0, rows)[0])
        accepted = hit
        if self.sde.rate is not self.sde.bound:
            rate = self._rate(self.sde.rate, "rate", x, t, clock, hit)
            above = hit & (rate > bound * (1.0 + 1e-9))
            if bool(above.any()):
                row = int(above.nonzero()[0])
                self.refuse(
                    above, f"the rate {float(rate[row]):.6g} exceeds its bound {float(bound[row]):.6g}", x, t, clock,
                    rate, bound, "raise bound=",
                )  # fmt: skip
            _, u = self.fresh(clock.tried[rows], rows)
            accepted = hit.index_copy(0, rows, u.value * bound[rows] < rate[rows])
        if bool(accepted.any()):
            c = self._size(x, t, clock.jumps, accepted.nonzero().squeeze(1))
            x = torch.where(per_sample(accepted, x), x + c, x)
        return x, Clock(waiting, clock.tried + hit, clock.jumps + accepted)

    def _rate(
        self, function: float | Callable[..., Any], what: str, x: Tensor, t: Tensor, clock: Clock,
        where: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        if not callable(function):
            return torch.full_like(t, function)
        value = unchanged(function, x, self.problem.clock(t), what)
        if isinstance(value, int | float):
            value = torch.full_like(t, value)
        if not isinstance(value, Tensor) or (value.ndim and (len(value) != len(x) or value.numel() != len(x))):
            got = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(f"the {what} must return a number for each path, ({len(x)},), got {got}")
        if value.requires_grad and torch.is_grad_enabled():
            if what == "rate":
                raise ValueError(
                    "the rate depends on what gradients are asked for, and whether a path jumps has no derivative "
                    "along it: leave that part out by rate=lambda x, t: ... x.detach() ..., or give gradients='none'"
                )
            value = value.detach()
        value = value.detach().double().reshape(-1).expand(len(x))
        bad = ~(value >= 0) | value.isinf()
        bad = bad if where is None else bad & where
        if bool(bad.any()):
            row = int(bad.nonzero()[0])
            v = float(value[row])
            self.refuse(
                bad,
                f"the {what} is {v:.6g}",
                x,
                t,
                clock,
                value,
                None,
                "rates are finite numbers that are not negative",
            )
        return value

    def _size(self, x: Tensor, t: Tensor, number: Tensor, rows: Tensor) -> Tensor:
        """What jump ``number`` of each path adds to its state; right for these rows."""
        sde = self.sde
        if not callable(sde.jump):
            return torch.full_like(x, sde.jump)
        time = per_sample(self.problem.clock(t), x)
        marks = () if self.takes == 2 else (self._mark(number[rows], rows),)
        filled = [x.new_full((len(x), sde.marks), 0.5).index_copy(0, rows, z.to(x.dtype)) for z in marks]
        c = unchanged(sde.jump, x, time, "jump", *filled)
        if isinstance(c, int | float):
            return torch.full_like(x, c)
        fits = isinstance(c, Tensor) and c.ndim in (0, x.ndim)
        if not fits or any(n not in (1, m) for n, m in zip(c.shape, x.shape, strict=False)):
            got = f"shape {tuple(c.shape)}" if isinstance(c, Tensor) else type(c).__name__
            raise ValueError(
                f"jump must return the shape of the state, {tuple(x.shape)}, or one of as many axes that broadcasts to "
                f"it, got {got}"
            )
        c = c.to(x.dtype).expand_as(x)
        if self.problem.check_finite and not all_finite(c[rows]):
            row = int(rows[bad_rows(c[rows]).nonzero()[0, 0]])
            raise DivergenceError(
                f"jump is not finite for path {self.path_of(row)} at t = {float(t[row]):.6g}",
                step=self.k, time=float(t[row]), path=self.path_of(row),
            )  # fmt: skip
        return c

    def _mark(self, number: Tensor, rows: Tensor) -> Tensor:
        """Of jump ``number`` of some rows, ``(rows, marks)``, float64."""
        m, normal = self.sde.marks, self.sde.mark == "normal"
        blocks = -(-m // (4 if normal else 2))
        w = self.coordinates.words(Stream.MARK, (number.long() + self.first_number) * blocks, blocks, rows).flatten(1)
        if normal:
            return torch.stack(reference.box_muller(w[:, 0::2], w[:, 1::2]), -1).flatten(1)[:, :m]
        v = tail(w[:, 0 : 2 * m : 2], w[:, 1 : 2 * m : 2]).value
        if self.sde.mark == "uniform":
            return v
        z = cast(Callable[[Tensor], Tensor], self.sde.mark)(v.clamp(2.0**-65, 1.0 - 2.0**-53))
        if not isinstance(z, Tensor) or z.shape != v.shape:
            got = f"shape {tuple(z.shape)}" if isinstance(z, Tensor) else type(z).__name__
            raise ValueError(f"mark must return a number for each of those it is given, {tuple(v.shape)}, got {got}")
        return z

    def _cell(self, k: int) -> tuple[Tensor, ...]:
        """``W, H, K`` of step ``k``, as they are for a step of unit length, ``(batch, channels)`` each, float64."""
        problem = self.problem
        times, shape = problem.times[k : k + 2], problem.increment.shape
        make = functools.partial(problem.noise.increments, dtype=problem.x0.dtype, device=self.device)
        root = (times[1] - times[0]).abs().sqrt().to(self.device).reshape(-1, 1)
        root = torch.where(root > 0, root, 1.0)
        W = make(times, shape, step=k)[0]
        others = [make(times, shape, step=k, of=part)[0] for part in ("H", "K")]
        return tuple(v.reshape(self.batch, -1).double() / root for v in (W, *others))

    def _cut(
        self,
        cell: tuple[Tensor, ...],
        hit: Tensor,
        at: Tensor,
        end: Tensor,
        b: Tensor,
        number: Tensor,
        whole: Increment | None,
    ) -> tuple[Increment, tuple[Tensor, ...]]:
        """The Brownian motion up to a candidate, and what is left of the step beyond it, given that of both together.

        Two pieces are drawn as if they were free, and corrected by what is wrong with them together (Matheron's rule).
        Theirs are linear in a rest of the whole with the covariances of Chen's relation.
        """
        rows, left = hit.nonzero().squeeze(1), (b - at).abs()
        a = ((end - at).abs() / left)[rows][:, None]
        c, m = 1.0 - a, cell[0].shape[1]
        blocks = -(-6 * m // 4)
        first = (number[rows].long() + self.first_number) * blocks
        w = self.coordinates.words(Stream.PARTS, first, blocks, rows).flatten(1)
        z = torch.stack(reference.box_muller(w[:, 0::2], w[:, 1::2]), -1).flatten(1)[:, : 6 * m]
        scales = [math.sqrt(VARIANCES[part]) for part in "WHK"] * 2
        W1, H1, K1, W2, H2, K2 = (
            scale * n * (a if i < 3 else c).sqrt()
            for i, (scale, n) in enumerate(zip(scales, z.unflatten(1, (6, m)).unbind(1), strict=True))
        )
        drawn = joined((W1, H1, K1), a, (W2, H2, K2), c)
        dW, dH, dK = (given[rows] - free for given, free in zip(cell, drawn, strict=True))
        turn = 60.0 * (c - a) * a * c * dK
        before = W1 + a * dW + 6.0 * a * c * dH + turn, H1 + a * a * (dH + 30.0 * c * dK), K1 + a**3 * dK
        beyond = W2 + c * dW - 6.0 * a * c * dH - turn, H2 + c * c * (dH - 30.0 * a * dK), K2 + c**3 * dK
        made, x, root = {}, self.problem.x0, left.sqrt()[:, None]
        for part, v, known in zip("WHK", before, cell, strict=True):
            if part == "W" or part in self.solver.needs:
                # Steps without candidates keep their bits, whatever other paths do.
                others = (known * root).to(x.dtype) if whole is None else getattr(whole, part).reshape(self.batch, m)
                own = others.index_copy(0, rows, (v * root[rows]).to(x.dtype))
                made[part] = own.reshape(self.problem.increment.shape)
        rest = torch.where(c > 0, c, 1.0).sqrt()  # what is left is counted for a step of its own length again
        left_over = (known.index_copy(0, rows, v / rest) for v, known in zip(beyond, cell, strict=True))
        return Increment(**made), tuple(left_over)


class _Reacting(_Stepping):
    """Of `Reactions`."""

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem)
        equation, solver = problem.equation, problem.solver
        assert isinstance(equation, Reactions)
        assert isinstance(solver, AbstractReacting)
        self.reactions, self.max_steps = equation, solver.max_steps
        self.nu = equation.stoichiometry.to(self.device)
        self.takes = (-self.nu).clamp_min(0.0)
        if bool((problem.times[-1] < problem.times[0]).any()):
            raise ValueError("reactions run forwards in time, and t1 is before t0")
        with torch.no_grad():
            self.equation_at_start(problem)

    def equation_at_start(self, problem: Problem) -> None:
        x = problem.x0.detach()
        t = problem.times[problem.first].to(self.device).expand(self.batch)
        if x.ndim != 2 or x.shape[1] != len(self.nu):
            raise ValueError(
                f"stoichiometry has {len(self.nu)} rows, so states are (batch, {len(self.nu)}); got shape "
                f"{tuple(x.shape)}"
            )
        self.counts(x, t)

    def counts(self, x: Tensor, t: Tensor) -> Tensor:
        """States in float64, refused if they are no counts."""
        y = x.detach().double()
        wrong = (y != y.round()) | (y < 0)
        if bool(wrong.any()):
            row, i = wrong.nonzero()[0].tolist()
            raise ValueError(
                f"states of reactions are counts, whole numbers that are not negative, and species {i} of path "
                f"{self.path_of(row)} is {float(y[row, i]):.6g} at t = {float(t[row]):.6g}; round the states, or "
                "integrate reactions.langevin()"
            )
        large = y > _LARGEST[x.dtype]
        if bool(large.any()):
            row, i = large.nonzero()[0].tolist()
            raise ValueError(
                f"species {i} of path {self.path_of(row)} is {float(y[row, i]):.6g}, and {x.dtype} does not hold "
                f"counts that large; "
                + ("integrate in float64" if x.dtype == torch.float32 else "take reactions.langevin()")
            )
        return y

    def rates(self, x: Tensor, y: Tensor, t: Tensor, active: Tensor, clock: Clock) -> Tensor:
        """Propensities in float64, refused if they are none; 0 for paths that are not active."""
        a = unchanged(self.reactions.propensities, x, self.problem.clock(t), "propensities")
        self.problem.watched.evaluations += 1
        if a.requires_grad and torch.is_grad_enabled():
            raise ValueError(
                "propensities depend on what gradients are asked for, and counts of reactions have no derivative along "
                "a path; give gradients='none', or take gradients of reactions.langevin() or reactions.mean_field()"
            )
        a = a.detach().double()
        bad = (~(a >= 0) | a.isinf()) & active[:, None]
        if bool(bad.any()):
            row, j = bad.nonzero()[0].tolist()
            self.refuse(
                bad.any(1), f"the propensity of reaction {j} is {float(a[row, j]):.6g}", x, t, clock,
                a[:, j], None, "propensities are finite numbers that are not negative",
            )  # fmt: skip
        missing = (a > 0) & active[:, None] & ~self.possible(y)
        if bool(missing.any()):
            row, j = missing.nonzero()[0].tolist()
            self.refuse(
                missing.any(1), f"the propensity of reaction {j} is {float(a[row, j]):.6g} where it would leave fewer "
                "than none of a species", x, t, clock, a[:, j], None, "let it be 0 where reactants are missing",
            )  # fmt: skip
        return torch.where(active[:, None], a, 0.0)

    def possible(self, y: Tensor) -> Tensor:
        """Which reactions find what they use up, ``(batch, reactions)``."""
        return (y[:, :, None] >= self.takes).all(1)

    def check_steps(self, taken: int, active: Tensor, x: Tensor, t: Tensor, clock: Clock, what: str) -> None:
        if taken > self.max_steps:
            self.give_up(
                active, x, t, clock, f"max_steps={self.max_steps} {what} in a step of the grid",
                "take a larger max_steps, or shorter steps of the grid",
            )  # fmt: skip


@final
class Events(_Reacting):
    """One reaction after another."""

    def step(self, context: StepContext, states: States) -> States:
        x, clock = states[0], Clock(*states[1:])
        at, b = self.ends(cast(Any, context).k)
        y, active, taken = self.counts(x, at), b > at, 0
        first, numbers = clock.tried, self._ahead(clock.tried)
        while True:
            a = self.rates(x, y, at, active, clock)
            sums = a.cumsum(1)
            total, left = sums[:, -1], b - at
            gap = torch.where(total > 0, clock.waiting / total, math.inf)
            hit = active & (gap < left)
            spent = torch.where(active & ~hit, clock.waiting - total * left, clock.waiting).clamp_min(0.0)
            if not bool(hit.any()):
                return (x, *clock._replace(waiting=spent))
            if taken % (_AHEAD - 1) == 0 and taken:
                first, numbers = clock.tried, self._ahead(clock.tried)
            which = (clock.tried - first).long()[:, None]
            v, waiting = numbers[1].gather(1, which)[:, 0], numbers[0].gather(1, which + 1)[:, 0]
            chosen = (sums <= (v * total)[:, None]).sum(1)
            last = a.shape[1] - 1 - (a > 0).flip(1).int().argmax(1)  # a sum that was rounded up to the total
            y = torch.where(hit[:, None], y + self.nu.T[chosen.minimum(last)], y)
            x = y.to(x.dtype)
            at = torch.where(hit, at + gap, at)
            clock = Clock(torch.where(hit, waiting, spent), clock.tried + hit, clock.jumps + hit)
            active, taken = hit, taken + 1
            self.check_steps(taken, active, x, at, clock, "reactions")

    def _ahead(self, number: Tensor) -> tuple[Tensor, Tensor]:
        """Exponential and uniform numbers of the next candidates, ``(batch, _AHEAD)`` each."""
        w = self.coordinates.words(Stream.JUMP, number.long() + self.first_number, _AHEAD)
        return exponential(w), tail(w[..., 2], w[..., 3]).value


@final
class _Leaps(_Reacting):
    """Leaps over many reactions."""

    def step(self, context: StepContext, states: States) -> States:
        x, clock = states[0], Clock(*states[1:])
        k = cast(Any, context).k
        at, b = self.ends(k)
        y, active, taken = self.counts(x, at), b > at, 0
        solver = self.problem.solver
        assert isinstance(solver, TauLeap)
        drawn = torch.zeros(self.batch, dtype=torch.int64, device=self.device)
        first = (self.coordinates.first_step + k) << _DRAWS
        while bool(active.any()):
            a, left = self.rates(x, y, at, active, clock), b - at
            tau = left if solver.epsilon is None else self._longest(y, a, solver.epsilon).minimum(left)
            whole = tau >= left
            if solver.midpoint:
                middle = (y + 0.5 * tau[:, None] * (a @ self.nu.T)).clamp_min(0.0)
                at_middle = self.reactions.propensities(middle.to(x.dtype), self.problem.clock(at + 0.5 * tau))
                a = torch.where(active[:, None] & self.possible(y), at_middle.detach().double().clamp_min(0.0), 0.0)
            rows = active.nonzero().squeeze(1)
            mean = a[rows] * tau[rows][:, None]
            if bool((large := ~(mean <= counts.LARGEST_MEAN)).any()):
                row, j = large.nonzero()[0].tolist()
                every = torch.zeros_like(active).index_put((rows[large.any(1)],), torch.tensor(True))
                self.refuse(
                    every, f"a leap would hold {float(mean[row, j]):.6g} reactions of number {j}", x, at, clock,
                    a[:, j], None, "take shorter steps, or reactions.langevin()",
                )  # fmt: skip
            leap = _Leap(self, rows, first, drawn)
            y_new, share, events = leap.run(y[rows], mean)
            y = y.index_copy(0, rows, y_new)
            reached = torch.where(whole[rows] & (share == 1.0), b[rows], at[rows] + share * tau[rows])
            at = at.index_copy(0, rows, reached)
            x = torch.where(active[:, None], y.to(x.dtype), x)
            clock = Clock(clock.waiting, clock.tried + active, clock.jumps.index_add(0, rows, events))
            active, taken = active & (at < b), taken + 1
            self.check_steps(taken, active, x, at, clock, "leaps")
        self.counts(x, b)
        return (x, *clock)

    def _longest(self, y: Tensor, a: Tensor, epsilon: float) -> Tensor:
        """Of leaps that change propensities by about ``epsilon``."""
        drift, spread = (a @ self.nu.T).abs(), a @ self.nu.square().T
        most = (0.5 * epsilon * y).clamp_min(1.0)
        return torch.minimum(most / drift, most.square() / spread).nan_to_num(math.inf).amin(1)


@final
class _Leap:
    """One leap of some rows: their counts, and where one would become negative, the way there.

    Args:
        stepping: the reactions.
        rows: of the batch.
        first: number of the step's first draw.
        drawn: draws that each row of the batch has made in this step, which goes on here.
    """

    def __init__(self, stepping: _Leaps, rows: Tensor, first: int, drawn: Tensor) -> None:
        self.of, self.rows, self.first, self.drawn = stepping, rows, first, drawn
        self.m = stepping.nu.shape[1]

    def _words(self, which: Tensor) -> Tensor:
        """A block of words for each reaction, of the next draw: ``(rows, reactions, 4)``."""
        rows = self.rows[which]
        at = (self.drawn[rows] + self.first) * self.m
        self.drawn[rows] += 1
        return self.of.coordinates.words(Stream.JUMP, at, self.m, rows)

    def run(self, y: Tensor, mean: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """States after the leap, how much of it they took, and how many reactions there were.

        Args:
            y: states before it, ``(rows, species)``.
            mean: of counts, ``(rows, reactions)``.
        """
        if len(y) == len(self.drawn) and not bool(self.drawn.any()):  # the first leap of a step
            w = self.of.coordinates.of_all(Stream.JUMP, self.first * self.m, self.m)
            self.drawn += 1
        else:
            w = self._words(torch.arange(len(y), device=y.device))
        found = counts.poisson(tail(w[..., 0], w[..., 1]), mean)
        after, share, events = y + found @ self.of.nu.T, torch.ones_like(mean[:, 0]), found.sum(1)
        unsafe = self._unsafe(y, found).nonzero().squeeze(1)
        if len(unsafe):
            parts = self._halved(unsafe, y[unsafe], found[unsafe])
            after, share, events = (
                whole.index_copy(0, unsafe, part) for whole, part in zip((after, share, events), parts, strict=True)
            )
        return after, share, events

    def _unsafe(self, y: Tensor, found: Tensor) -> Tensor:
        """Where a species could run out, whatever the order of the reactions."""
        return (found @ self.of.takes.T > y).any(1)

    def _halved(self, which: Tensor, y: Tensor, cell: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Cells of the dyadic tree over a leap in order of time, halved until all before the first failure are safe."""
        n, device = len(which), y.device
        waiting = cell.new_zeros(n, _DEEPEST + 1, self.m)  # second halves, by level
        level, index = (torch.zeros(n, dtype=torch.int64, device=device) for _ in range(2))
        share, events = cell.new_ones(n), cell.new_zeros(n)
        active = torch.ones(n, dtype=torch.bool, device=device)
        every = torch.arange(n, device=device)
        while bool(active.any()):
            unsafe = active & self._unsafe(y, cell)
            safe = active & ~unsafe
            last = unsafe & ((cell.sum(1) <= 1) | (level >= _DEEPEST))
            split = unsafe & ~last
            y = torch.where(safe[:, None], y + cell @ self.of.nu.T, y)
            events = torch.where(safe, events + cell.sum(1), events)
            if bool(last.any()):  # one reaction, somewhere in its cell
                rows = last.nonzero().squeeze(1)
                v = tail(*self._words(which[rows])[:, 0, 2:].unbind(1)).value
                share[rows] = torch.ldexp(index[rows].double() + v, -level[rows])
            # From safe cells on to those beside them, or beside those that they end.
            up = safe
            while bool((up := up & (level > 0) & (index % 2 == 1)).any()):
                level, index = level - up.long(), torch.where(up, index // 2, index)
            beside = safe & (level > 0)
            index = torch.where(beside, index + 1, index)
            cell = torch.where(beside[:, None], waiting[every, level], cell)
            active = (active & ~last & ~safe) | beside
            if bool(split.any()):
                rows = split.nonzero().squeeze(1)
                w = self._words(which[rows])
                half = counts.binomial(tail(w[..., 0], w[..., 1]), cell[rows])
                waiting[rows, level[rows] + 1] = cell[rows] - half
                cell = cell.index_copy(0, rows, half)
                level, index = level + split.long(), torch.where(split, 2 * index, index)
        return y, share, events


def is_jumping(problem: Problem) -> bool:
    """Whether an integration is of an equation whose paths jump."""
    return isinstance(problem.equation, AbstractJumping)
