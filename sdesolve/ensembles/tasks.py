"""What a run computes for a block of paths: solutions, samples, likelihoods, chains."""

from __future__ import annotations

import abc
import dataclasses
import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, final

import torch
from torch import Tensor

from sdesolve import grids
from sdesolve._internal.arguments import kind_of, short, whole_number
from sdesolve._internal.modes import modules_within
from sdesolve.brownian import AbstractNoise, BrownianPath
from sdesolve.carry import as_carry
from sdesolve.crossing import as_boundaries
from sdesolve.integrate.checks import check_pair
from sdesolve.integrate.solution import Continuation, Solution
from sdesolve.integrate.solve import solve
from sdesolve.likelihood.likelihood import estimate_likelihood
from sdesolve.mcmc import run_chain
from sdesolve.sampling import sample


class Made(NamedTuple):
    """What a block leaves.

    Attributes:
        arrays: by name, ``(paths of the block, ...)`` each.
        summary: of the paths instead, where the task reduces them itself.
        about: what is said of it, such as what ran.
    """

    arrays: dict[str, Tensor]
    summary: dict[str, Tensor] | None = None
    about: Mapping[str, Any] = {}


Kept = Callable[[str, dict[str, Tensor]], None]


class AbstractTask(abc.ABC):
    """What an ensemble computes: a function of a block of paths.

    Rows ``[first, first + count)`` depend on the task, ``first`` and ``count`` alone, whoever asks, and how often.
    """

    main: str = "x"
    """Which array a reduction is of."""

    @abc.abstractmethod
    def arguments(self) -> dict[str, object]:
        """All that decides what is computed, by name."""

    @abc.abstractmethod
    def length(self) -> int | None:
        """How many paths the arguments have rows for; ``None`` if that is not theirs to say."""

    @abc.abstractmethod
    def prepared(self, paths: int, block: int) -> AbstractTask:
        """The task for so many paths in blocks of that size.

        Raises:
            ValueError, TypeError: it cannot be done for them.
        """

    chooses: bool = False
    """Whether there are executors to choose from, whose results differ by rounding: all blocks have to take one."""

    @abc.abstractmethod
    def compute(self, first: int, count: int, execution: str | None = None) -> Made:
        """What a block leaves.

        Args:
            first: number of its first path.
            count: of its paths.
            execution: what runs it, if that is decided; what did run it is in ``about``.
        """

    @abc.abstractmethod
    def replay(self, path: int, first: int, count: int, execution: str | None, changes: Mapping[str, Any]) -> Any:
        """One path again, by what ran its block."""


@final
class Cut:
    """An argument with a row for each path, or one for all, or as a function ``f(first, count)`` of the block.

    Args:
        name: of the argument, for messages.
        given: a tensor, a tuple or dictionary of them, a function, or any other value, which all blocks share.
        paths: of the run.
        block: size of a block.
        always: every tensor is one of rows, such as start states; of one row, all paths share it.
    """

    def __init__(self, name: str, given: Any, paths: int, block: int, *, always: bool = False) -> None:
        self.name, self.given, self.paths, self.always = name, given, paths, always
        sizes = {block, paths % block} - {0, paths}
        for value in _tensors(given):
            rows = value.shape[0] if value.ndim else None
            if always and rows not in (1, paths):
                raise ValueError(
                    f"{name} must have a row for each of {paths} paths, or one for all of them; got shape "
                    f"{tuple(value.shape)}. A function {name}(first, count) makes the rows of a block"
                )
            if not always and rows in sizes:
                raise ValueError(
                    f"{name} has a tensor of {rows} rows for all {paths} paths to share, as many as a block of the run "
                    "has paths, which would read one as a row for each: take another block size"
                )

    def of(self, first: int, count: int) -> Any:
        """The argument of a block."""
        if _is_maker(self.given):
            made = self.given(first, count)
            if self.always and not (isinstance(made, Tensor) and made.ndim and len(made) == count):
                got = tuple(made.shape) if isinstance(made, Tensor) else kind_of(made)
                raise ValueError(f"{self.name}({first}, {count}) must be a tensor of {count} rows, got {got}")
            return made
        return self._cut(self.given, first, count)

    def _cut(self, value: Any, first: int, count: int) -> Any:
        if isinstance(value, Tensor):
            if value.ndim and value.shape[0] == self.paths:
                return value[first : first + count]
            return value.expand(count, *value.shape[1:]).clone() if self.always else value
        if isinstance(value, Mapping):
            return {k: self._cut(v, first, count) for k, v in value.items()}
        if isinstance(value, list | tuple) and any(True for _ in _tensors(value)):
            cut = (self._cut(v, first, count) for v in value)
            return type(value)(*cut) if hasattr(value, "_fields") else type(value)(cut)
        return value


def _is_maker(value: Any) -> bool:
    return callable(value) and not isinstance(value, Tensor)


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, Mapping):
        return [t for v in value.values() for t in _tensors(v)]
    return [t for v in value for t in _tensors(v)] if isinstance(value, list | tuple) else []


def _length(value: Any) -> int | None:
    return len(value) if isinstance(value, Tensor) and value.ndim else None


def _check_options(name: str, function: Callable[..., Any], options: Mapping[str, Any], own: tuple[str, ...]) -> None:
    known = {n for n, p in inspect.signature(function).parameters.items() if p.kind is p.KEYWORD_ONLY} - set(own)
    wrong = sorted(set(options) - known)
    if wrong:
        raise TypeError(f"{name} takes no {', '.join(wrong)} in an ensemble; it takes {', '.join(sorted(known))}")


def noise_for(seed: int | None, noise: AbstractNoise | None, what: str) -> BrownianPath:
    """The noise of a run, which has to be one that another process makes again.

    Raises:
        TypeError: neither is given, or the noise is none whose rows can be counted.
        ValueError: both are given.
    """
    if (seed is None) == (noise is None):
        if seed is None:
            raise TypeError(
                f"{what} needs seed=, or noise=BrownianPath(seed): its blocks are made by several, or again"
            )
        raise ValueError("seed is short for noise=BrownianPath(seed); give one of them")
    if noise is None:
        return BrownianPath(seed)  # type: ignore[arg-type]
    if not isinstance(noise, BrownianPath):
        raise TypeError(
            f"the noise of an ensemble is a BrownianPath, whose blocks are rows of it; got {kind_of(noise)}"
        )
    return noise


@final
class Solves(AbstractTask):
    """`solve` for blocks of paths: what `ensemble` makes of an equation.

    Args:
        arguments: of `solve` by name.
        moments: whether `solve` itself reduces, and to what.
        segments: pieces of the grid after each of which the state of a block is kept.
    """

    main = "xs"

    def __init__(self, arguments: Mapping[str, Any], moments: Any, segments: int) -> None:
        _check_options("solve", solve, arguments["options"], ("paths", "start", "reduce", "progress", "gradients"))
        self.given, self.moments, self.segments = dict(arguments), moments, segments
        self.options: dict[str, Any] = dict(arguments["options"])
        self.noise = noise_for(self.options.pop("seed", None), self.options.pop("noise", None), "an ensemble")
        kind = self.options.pop("increments", None)
        if kind is not None:
            self.noise = dataclasses.replace(self.noise, kind=kind)
        if "solver" not in self.options:
            raise TypeError("an ensemble needs solver=, as solve does")
        check_pair(self.options["solver"], self.given["sde"])
        if moments is not None and self.options.get("carry") is not None and self.options.get("observable") is None:
            raise ValueError("with reduce=, what paths carry is kept by observable=lambda x, t, carry: ... alone")
        if segments > 1:
            self._check_segments()

    def _check_segments(self) -> None:
        solver = self.options["solver"]
        if not getattr(solver, "divisible", False):
            raise ValueError(f"{type(solver).__name__} cannot be cut at a grid point and go on; leave segments out")
        if self.moments == "sums":
            raise ValueError("segments= goes with reduce='moments' or none; leave one of them out")
        for name in ("at", "kl_to"):
            if self.options.get(name) is not None:
                raise ValueError(f"segments= and {name}= do not go together; leave segments out")

    def arguments(self) -> dict[str, object]:
        plain = {k: v for k, v in self.given.items() if k != "options"}
        return plain | self.options | {"noise": self.noise, "reduce": self.moments}

    def length(self) -> int | None:
        return _length(self.given["x0"])

    def prepared(self, paths: int, block: int) -> Solves:
        made = Solves.__new__(Solves)
        vars(made).update(vars(self))
        made.rows = {"x0": Cut("x0", self.given["x0"], paths, block, always=True)}
        if "params" in self.options:
            made.rows["params"] = Cut("params", self.options["params"], paths, block)
        for name in ("t0", "t1"):
            value = self.given[name]
            if isinstance(value, Tensor) and value.ndim == 1:
                made.rows[name] = Cut(name, value, paths, block, always=True)
        grid = self.options.get("grid")
        if isinstance(grid, Tensor) and grid.ndim == 2:
            made.rows["grid"] = Cut("grid", grid.T, paths, block, always=True)
        if made.segments > 1:
            made.points = self._points(made)
        return made

    rows: dict[str, Cut]
    points: Tensor

    def _points(self, made: Solves) -> Tensor:
        """The one grid of a run that is cut into segments."""
        if "grid" in made.rows or "t0" in made.rows or "t1" in made.rows:
            raise ValueError("segments= needs one grid for all paths; leave it out, or give one t0 and t1")
        grid = self.options.get("grid")
        if grid is not None:
            return grids.check_grid(grid)
        if self.given["steps"] is None:
            raise ValueError("segments= cuts a grid: give t0, t1 and steps, or grid")
        return grids.uniform(float(self.given["t0"]), float(self.given["t1"]), self.given["steps"])

    def _call(self, first: int, count: int) -> dict[str, Any]:
        call = {name: self.given[name] for name in ("sde", "t0", "t1", "steps")} | self.options
        for name, cut in self.rows.items():
            call[name] = cut.of(first, count)
        if "grid" in self.rows:
            call["grid"] = call["grid"].T.contiguous()
        return call | {"noise": self.noise.rows(first)}

    @property
    def chooses(self) -> bool:  # type: ignore[override]
        return self.options.get("backend", "auto") == "auto"

    @torch.no_grad()
    def compute(
        self,
        first: int,
        count: int,
        execution: str | None = None,
        kept: Callable[[], Any] = lambda: None,
        keep: Kept | None = None,
    ) -> Made:
        call = self._call(first, count)
        if execution is not None and self.chooses:
            call["backend"] = execution
        if self.moments is not None:
            call["reduce"] = self.moments
        if self.segments == 1 or not count:
            return self._made(solve(**call, gradients="none"), count)
        return self._in_segments(call, count, kept(), keep)

    def _in_segments(self, call: dict[str, Any], count: int, done: Any, keep: Kept | None) -> Made:
        """A block whose state is kept after every segment, and which goes on from the last that was."""
        points, solver = self.points, call["solver"]
        steps = len(points) - 1
        ends = sorted({round(steps * k / self.segments) for k in range(1, self.segments + 1)} - {0})
        start = {name: call.pop(name, None) for name in ("x0", "noise", "carry", "until")}
        save_at = call.pop("save_at", None)
        for name in ("t0", "t1", "steps", "grid", "reduce"):
            call.pop(name, None)
        begun, grown = 0, dict[str, list[Tensor]]()
        if done is not None:
            (at, call["backend"]), tensors = done[0].split(), done[1]
            begun = int(at)
            grown = {name: [tensors[f"grown.{name}"]] for name in _GROWING if f"grown.{name}" in tensors}
            start = {
                "start": Continuation(
                    x=tensors["x"],
                    times=points[: begun + 1].clone(),
                    noise=start["noise"],
                    solver=solver,
                    carry=as_carry(start["carry"]),
                    until=as_boundaries(start["until"]),
                    **{name: _numbered(tensors, name) for name in _REMEMBERED},
                )
            }
        made = Made({})
        for end in (end for end in ends if end > begun):
            wanted = _within(save_at, points, begun, end, steps)
            saving = wanted != []
            reduce = self.moments if saving else None
            solution = solve(
                **call, **start, grid=points[begun : end + 1], save_at=wanted or None, reduce=reduce, gradients="none"
            )
            begun, start, call["backend"] = end, {"start": solution.state}, solution.stats.execution
            made = self._made(solution, count, saving=saving)
            for name, value in {**made.arrays, **(made.summary or {})}.items():
                if name in _GROWING:
                    grown.setdefault(name, []).append(value)
            if keep is not None and end != steps:
                assert solution.state is not None
                record = {"x": solution.state.x}
                for name in _REMEMBERED:
                    record |= {f"{name}.{k}": value for k, value in enumerate(getattr(solution.state, name))}
                record |= {f"grown.{name}": torch.cat(v, self._times) for name, v in grown.items()}
                keep(f"{end} {solution.stats.execution}", record)
        whole = {name: torch.cat(values, self._times) for name, values in grown.items()}
        ts = None if save_at is None else _saved(save_at, points)
        about = dict(made.about) | ({} if ts is None else {"ts": ts})
        if self.moments is not None:
            return Made({}, whole | {"count": torch.tensor(count)}, about)
        return Made(made.arrays | whole, None, about)

    @property
    def _times(self) -> int:
        """Which axis of what grows from segment to segment is that of times."""
        return 1 if self.moments is None else 0

    def _made(self, sol: Solution, count: int, saving: bool = True) -> Made:
        times = sol.ts.tolist() if sol.ts.ndim == 1 else None
        about = {"execution": sol.stats.execution, "reason": sol.stats.reason, "ts": times}
        if self.moments == "moments":
            if not saving:
                return Made({}, {}, about)
            assert sol.mean is not None
            assert sol.variance is not None
            m2 = sol.variance.double() * (count - 1) if count > 1 else torch.zeros_like(sol.mean).double()
            return Made({}, {"count": torch.tensor(count), "mean": sol.mean.double(), "m2": m2}, about)
        if self.moments == "sums":
            assert sol.sums is not None
            return Made({}, None, about | {"sums": sol.sums})
        arrays = {"x1": sol.x1}
        if saving and (self.options.get("save_at") is not None or self.options.get("observable") is not None):
            arrays["xs"] = sol.xs.transpose(0, 1)
        if sol.ts.ndim > 1:
            arrays["ts"] = sol.ts.T
        for name in ("stopped", "stop_time", "boundary", "kl", "log_weight", "jumps"):
            if (value := getattr(sol, name)) is not None:
                arrays[name] = value
        if self.options.get("carry") is not None:
            arrays |= {f"carry{where}": value for where, value in _leaves(sol.carry)}
        for name in ("kls", "log_weights"):
            if saving and (value := getattr(sol, name)) is not None:
                arrays[name] = value.T
        for name in ("accepted", "rejected"):
            if sol.stats.accepted is not None and (value := getattr(sol.stats, name)) is not None:
                arrays[name] = value
        return Made(arrays, None, about)

    def replay(self, path: int, first: int, count: int, execution: str | None, changes: Mapping[str, Any]) -> Solution:
        _check_options(
            "replay", solve, changes, ("paths", "start", "reduce", "seed", "noise", "solver", "params", "grid")
        )
        changes = {"save_at": "grid"} | dict(changes) if self.options["solver"].controller is None else dict(changes)
        if execution == "fused" and not modules_within([self.given["sde"], *changes.values(), *self.options.values()]):
            made = dict(changes)
            if "backend" not in changes:
                made["backend"] = "fused"
            one = self._call(first, count)
            for name in self.rows:
                one[name] = _row(one[name], path - first, count, name)
            one["noise"] = self.noise.rows(path)
            try:
                with torch.no_grad():
                    return solve(**(one | made), gradients="none")
            except (ValueError, TypeError):  # what is asked for does not fuse, or the block has another number of rows
                pass
        with torch.no_grad():
            same = {} if execution is None else {"backend": execution}
            whole = solve(**(self._call(first, count) | same | changes), gradients="none")
        return _row_of(whole, path - first)


_GROWING = ("xs", "mean", "m2")
_REMEMBERED = ("memory", "jumps", "delays")  # of a `Continuation`; what `kl_to` adds is refused with segments


def _numbered(tensors: Mapping[str, Tensor], name: str) -> tuple[Tensor, ...]:
    return tuple(tensors[f"{name}.{k}"] for k in range(sum(n.startswith(f"{name}.") for n in tensors)))


def _saved(save_at: Any, points: Tensor) -> list[float]:
    times = points if isinstance(save_at, str) else grids.read_times(save_at, "save_at").values
    return [float(t) for t in times]


def _within(save_at: Any, points: Tensor, begun: int, end: int, steps: int) -> Any:
    """What of ``save_at`` lies in a segment; a point where two meet belongs to the first."""
    if save_at is None:
        return None if end == steps else []
    low, high = float(points[begun]), float(points[end])
    if isinstance(save_at, str):
        return points[begun if begun == 0 else begun + 1 : end + 1].tolist()
    wanted = [float(t) for t in grids.read_times(save_at, "save_at").values]
    inside = [t for t in wanted if (min(low, high) <= t <= max(low, high)) and (begun == 0 or t != low)]
    if end == steps:
        inside += [t for t in wanted if (t > high if high > low else t < high)]  # refused by solve, in its words
    return inside


def _leaves(tree: Any, where: str = "") -> list[tuple[str, Tensor]]:
    if isinstance(tree, Mapping):
        return [leaf for k, v in tree.items() for leaf in _leaves(v, f"{where}.{k}")]
    if isinstance(tree, list | tuple):
        return [leaf for k, v in enumerate(tree) for leaf in _leaves(v, f"{where}.{k}")]
    return [(where, tree)] if isinstance(tree, Tensor) else []


def _row(value: Any, k: int, count: int, name: str) -> Any:
    if isinstance(value, Tensor):
        if name == "grid":
            return value[:, k : k + 1]
        return value[k : k + 1] if value.ndim and len(value) == count else value
    if isinstance(value, Mapping):
        return {n: _row(v, k, count, name) for n, v in value.items()}
    if isinstance(value, list | tuple) and _tensors(value):
        cut = (_row(v, k, count, name) for v in value)
        return type(value)(*cut) if hasattr(value, "_fields") else type(value)(cut)
    return value


def _row_of(sol: Solution, k: int) -> Solution:
    """Row ``k`` of a solution, as a solution of one path."""
    count = len(sol.x1)

    def first_axis(value: Any) -> Any:
        return _row(value, k, count, "")

    def second_axis(value: Tensor | None) -> Tensor | None:
        return None if value is None else value[:, k : k + 1]

    stats = dataclasses.replace(
        sol.stats, **{n: first_axis(getattr(sol.stats, n)) for n in ("accepted", "rejected", "evaluations")}
    )
    rows: dict[str, Any] = {
        n: first_axis(getattr(sol, n))
        for n in ("x1", "carry", "stopped", "stop_time", "boundary", "kl", "log_weight", "jumps")
    }
    columns: dict[str, Any] = {n: second_axis(getattr(sol, n)) for n in ("xs", "kls", "log_weights")}
    ts = sol.ts if sol.ts.ndim == 1 else sol.ts[:, k : k + 1]
    return dataclasses.replace(sol, ts=ts, stats=stats, state=None, **rows, **columns)


class _OfCalls(AbstractTask):
    """A task that calls one function of this library for each block."""

    _function: Callable[..., Any]
    _own: tuple[str, ...] = ()
    _cut: tuple[str, ...] = ()  # options with a row for each path
    _always: tuple[str, ...] = ("x0", "velocity")

    def __init__(self, options: Mapping[str, Any]) -> None:
        _check_options(type(self).__name__, type(self)._function, options, self._own)
        self.options = dict(options)
        self.noise = noise_for(self.options.pop("seed", None), self.options.pop("noise", None), type(self).__name__)

    rows: dict[str, Cut]

    def length(self) -> int | None:
        return next((n for name in self._always if (n := _length(self._argument(name))) is not None), None)

    def _argument(self, name: str) -> Any:
        return self.options.get(name)

    def prepared(self, paths: int, block: int) -> AbstractTask:
        made = type(self).__new__(type(self))
        vars(made).update(vars(self))
        made.rows = {
            name: Cut(name, self._argument(name), paths, block, always=name in self._always)
            for name in self._cut
            if self._argument(name) is not None
        }
        return made

    def arguments(self) -> dict[str, object]:
        return self.options | {"noise": self.noise}

    def _of_block(self, first: int, count: int) -> dict[str, Any]:
        return self.options | {name: cut.of(first, count) for name, cut in self.rows.items()}

    def replay(self, path: int, first: int, count: int, execution: str | None, changes: Mapping[str, Any]) -> Any:
        if changes:
            raise TypeError(f"replay of {type(self).__name__} takes the path alone, got {', '.join(sorted(changes))}")
        return {name: value[path - first] for name, value in self.compute(first, count, execution).arrays.items()}


@final
class Draws(_OfCalls):
    """`sample` for blocks: ``ensemble(Draws(process, score, (3, 32, 32), steps=18, seed=0), paths=50_000, block=250)``.

    The network sees whole blocks, so the block's size belongs to what the run is: its rounding may depend on it.

    Args:
        process: the forward diffusion.
        score: ``grad_x log p_t(x)``.
        shape: of one sample, without a batch axis; may be left out with ``x0``.
        options: of `sample`, by name; ``x0`` and the tensors of ``given`` have a row for each path, or are functions
            ``f(first, count)`` of the block. ``seed`` is needed.

    Raises:
        TypeError: `sample` has no such option, or there is no seed.
    """

    _function = staticmethod(sample)
    _own = ("start", "progress", "cuda_graph", "full", "save_at", "callback", "paths")
    _cut = ("x0", "given")

    def __init__(self, process: Any, score: Any, shape: tuple[int, ...] | None = None, **options: Any) -> None:
        super().__init__(options)
        if isinstance(shape, int) or (shape is None and self.options.get("x0") is None):
            raise TypeError(f"shape is that of one sample, a tuple such as (3, 32, 32), got {short(shape)}")
        self.process, self.score, self.shape = process, score, shape

    def arguments(self) -> dict[str, object]:
        return super().arguments() | {"process": self.process, "score": self.score, "shape": self.shape}

    @property
    def chooses(self) -> bool:  # type: ignore[override]
        return self.options.get("backend", "auto") == "auto"

    def compute(self, first: int, count: int, execution: str | None = None) -> Made:
        shape = None if self.shape is None else (count, *self.shape)
        call = self._of_block(first, count) | {"noise": self.noise.rows(first)}
        if execution is not None and self.chooses:
            call["backend"] = execution
        found = sample(self.process, self.score, shape, **call, full=True)
        return Made({"x": found.x1}, None, {"execution": found.stats.execution, "reason": found.stats.reason})


@final
class Likelihoods(_OfCalls):
    """`estimate_likelihood` for blocks of data.

    Arrays are ``log_prob``, ``standard_error`` and ``latent``.

    Args:
        process: the forward diffusion.
        score: ``grad_x log p_t(x)``.
        x: data, ``(paths, *state)``, or a function ``x(first, count)`` of the block.
        options: of `estimate_likelihood`; ``seed`` is 0 by default, as there.

    Raises:
        TypeError: `estimate_likelihood` has no such option.
    """

    main = "log_prob"
    _function = staticmethod(estimate_likelihood)
    _own = ("first_sample",)
    _cut = ("x",)
    _always = ("x",)

    def __init__(self, process: Any, score: Any, x: Tensor | Callable[[int, int], Tensor], **options: Any) -> None:
        super().__init__({"seed": 0} | options)
        self.process, self.score, self.x = process, score, x

    def _argument(self, name: str) -> Any:
        return self.x if name == "x" else self.options.get(name)

    def arguments(self) -> dict[str, object]:
        return super().arguments() | {"process": self.process, "score": self.score, "x": self.x}

    def compute(self, first: int, count: int, execution: str | None = None) -> Made:
        call = self._of_block(first, count)
        found = estimate_likelihood(
            self.process, self.score, call.pop("x"), **call, seed=self.noise.seed, first_sample=first
        )
        return Made({n: getattr(found, n).detach() for n in ("log_prob", "standard_error", "latent")})


@final
class Chains(_OfCalls):
    """`run_chain` for blocks of chains.

    Arrays are ``x``, and where there are any ``xs`` ``(chains, saved, *state)``, ``velocity`` and ``acceptance``.

    Args:
        kernel: `Langevin`, `MALA` or `BAOAB`.
        x0: ``(chains, *state)``, one row for all, or a function ``x0(first, count)`` of the block.
        steps: of each chain.
        options: of `run_chain`; ``seed`` is needed.

    Raises:
        TypeError: `run_chain` has no such option, or there is no seed.
    """

    _function = staticmethod(run_chain)
    _own = ("progress",)
    _cut = ("x0", "velocity")

    def __init__(self, kernel: Any, x0: Tensor | Callable[[int, int], Tensor], steps: int, **options: Any) -> None:
        super().__init__(options)
        self.kernel, self.x0, self.steps = kernel, x0, whole_number(steps, "steps", 1)
        self.main = "x" if self.options.get("save_every") is None else "xs"

    def _argument(self, name: str) -> Any:
        return self.x0 if name == "x0" else self.options.get(name)

    def arguments(self) -> dict[str, object]:
        return super().arguments() | {"kernel": self.kernel, "x0": self.x0, "steps": self.steps}

    def compute(self, first: int, count: int, execution: str | None = None) -> Made:
        call = self._of_block(first, count)
        chain = run_chain(self.kernel, call.pop("x0"), self.steps, **call, noise=self.noise.rows(first))
        arrays = {"x": chain.x}
        if self.options.get("save_every") is not None:
            arrays["xs"] = chain.xs.transpose(0, 1)
        for name in ("velocity", "acceptance"):
            if (value := getattr(chain, name)) is not None:
                arrays[name] = value
        return Made(arrays)
