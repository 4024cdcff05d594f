"""`ensemble`: many paths by blocks, here or by any number of workers, with a store that a killed run goes on from."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import os
import pickle
import platform
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, final

import torch
from torch import Tensor

from sdesolve._internal.arguments import flag, kind_of, short, whole_number
from sdesolve._internal.progress import progress_bar
from sdesolve.ensembles.identity import digest
from sdesolve.ensembles.reductions import AbstractReduction, Moments, merge
from sdesolve.ensembles.stores import AbstractStore, Blocks, Zarr, store_of
from sdesolve.ensembles.tasks import AbstractTask, Made, Solves
from sdesolve.integrate.solution import DivergenceError, StepLimitError
from sdesolve.sde import AbstractSDE
from sdesolve.sums import Sums

_FORMAT = 1


def ensemble(
    of: AbstractSDE | AbstractTask,
    x0: Any = None,
    t0: Any = None,
    t1: Any = None,
    steps: int | None = None,
    *,
    paths: int | None = None,
    block: int = 65_536,
    reduce: Any = None,
    out: str | os.PathLike[str] | None = None,
    segments: int = 1,
    identity: str | None = None,
    **options: Any,
) -> Ensemble:
    """A run of many paths, cut into blocks of ``block`` paths; nothing is computed yet.

    With ``backend="auto"`` all blocks take the executor that the first of them took, since others differ by rounding.
    Block ``k`` has the paths from ``k block`` on, with their noise, and depends on the arguments and ``k`` alone: not
    on who computes it, in which order, with how many workers or threads, or how often. ::

        run = sds.ensemble(sde, x0, 0.0, 1.0, 250, solver=sds.SRIW1(), seed=0, paths=10_000_000, out="run/")
        run()                         # here; under torchrun or in a Slurm array, this process's share
        run(map=executor.map)         # or by the map of an engine: processes, joblib, Dask, Ray, submitit
        run.missing()                 # blocks that are not there
        run.result()["x1"][:100]      # what there is, read when it is asked for
        run.replay(123_456)           # any one path again, in full detail

    Args:
        of: an equation to `solve`, or `Draws`, `Likelihoods` or `Chains`.
        x0: with an equation: ``(paths, *state)``, one row for all paths, or a function ``x0(first, count)`` that gives
            the rows of paths ``first`` to ``first + count``.
        t0: as for `solve`, as are ``t1`` and ``steps``.
        t1: end time.
        steps: number of steps.
        paths: how many; by default what the arguments have rows for.
        block: paths of a block: the unit of work, of memory and of what is lost to a kill. With a network in the loop
            its size is part of the result, to rounding.
        reduce: what to keep in place of every path: ``"moments"`` (`MergedMoments`), ``"sums"`` (exact `Sums`), or a
            reduction such as `QuantileSketch`, `ValueHistogram` or `FeatureMoments`, or a dictionary of reductions. It
            is of what `solve` keeps in ``xs``, of samples, of log-likelihoods, or of chains.
        out: a folder, for safetensors; one whose name ends in ``.zarr``, for a zarr group; or memory. What is complete
            there is kept, and another run's folder is refused.
        segments: pieces of the grid after each of which the state of a block is kept as well, for long runs.
        identity: a name for the functions of this run, where they cannot be told by their code and what they hold;
            what is no function is compared as ever.
        options: of `solve` by name, with ``solver``, and ``seed`` or ``noise``. ``params`` may be a function
            ``params(first, count)`` too. Nothing is recorded for gradients.

    Raises:
        TypeError: unknown arguments, no seed, or functions that cannot be told from others.
        ValueError: sizes that do not fit; ``out`` holds another run (says what differs).
        ImportError: ``out`` is a zarr store, and zarr is not installed.
    """
    segments, block = whole_number(segments, "segments", 1), whole_number(block, "block", 1)
    own = reduce if isinstance(reduce, str) else None
    if isinstance(of, AbstractTask):
        given = {"x0": x0, "t0": t0, "t1": t1, "steps": steps} | options
        extra = sorted(name for name, value in given.items() if value is not None)
        if extra or segments > 1:
            raise TypeError(
                f"{type(of).__name__} has its arguments already: leave out {', '.join(extra) or 'segments'}"
            )
        if own is not None:
            raise ValueError(f"reduce={own!r} goes with an equation; give sdesolve.Moments() or another reduction")
        task = of
    elif isinstance(of, AbstractSDE):
        if own not in (None, "moments", "sums"):
            raise ValueError(
                f"reduce must be 'moments', 'sums' or a reduction such as QuantileSketch(), got {short(own)}"
            )
        if x0 is None:
            raise TypeError("an ensemble needs x0: rows for all paths, one row, or a function of (first, count)")
        task = Solves({"sde": of, "x0": x0, "t0": t0, "t1": t1, "steps": steps, "options": options}, own, segments)
    else:
        raise TypeError(f"an ensemble is of an equation, or of Draws, Likelihoods or Chains; got {kind_of(of)}")
    reductions = _reductions(None if own is not None else reduce)
    length = task.length()
    if paths is None:
        if length is None:
            raise TypeError("give paths=, the number of paths")
        paths = length
    paths = whole_number(paths, "paths", 0)
    return Ensemble(task.prepared(paths, block), paths, block, reductions, own, out, identity)


def _reductions(given: Any) -> dict[str, AbstractReduction]:
    named = {} if given is None else dict(given) if isinstance(given, Mapping) else {"": given}
    for value in named.values():
        if not isinstance(value, AbstractReduction):
            raise TypeError(f"reduce takes reductions such as QuantileSketch(), got {kind_of(value)}")
    return named


@dataclasses.dataclass(frozen=True)
class Estimate:
    """What the rest of a run will take, by one block of it.

    Attributes:
        seconds: for all missing blocks in one process like this.
        bytes: of all blocks of the run in the store.
        blocks: that are missing.
        seconds_a_block: measured.
    """

    seconds: float
    bytes: int
    blocks: int
    seconds_a_block: float

    def __str__(self) -> str:
        return f"{self.blocks} blocks, about {self.seconds:.3g} s in one process, {self.bytes / 2**20:.3g} MiB in all"


@final
class Ensemble:
    """A run by blocks, made by `ensemble`.

    Args:
        task: what is computed.
        paths: how many.
        block: paths of a block.
        reductions: what is kept of blocks instead of their paths, by name.
        own: ``"moments"`` or ``"sums"``, where `solve` reduces.
        out: where blocks are kept.
        identity: stands for the functions of the task in the specification.

    Attributes:
        paths: how many.
        block: paths of a block.
        blocks: how many blocks.
        specification: what the run is: readable, and with a digest of each argument; ``run.json`` of its folder.
    """

    def __init__(
        self,
        task: AbstractTask,
        paths: int,
        block: int,
        reductions: Mapping[str, AbstractReduction],
        own: str | None,
        out: str | os.PathLike[str] | None,
        identity: str | None,
    ) -> None:
        self.paths, self.block, self.blocks = paths, block, max(1, -(-paths // block))
        self._task, self._reductions, self._own, self._out = task, reductions, own, out
        self._specify = functools.partial(_specification, task, paths, block, reductions, identity)
        self.specification = self._specify()
        self._store = store_of(out, paths, block)
        _check_same(self.specification, self._store.open(self.specification), out)

    def __repr__(self) -> str:
        kind = type(self._task).__name__
        where = "memory" if self._out is None else str(self._out)
        return (
            f"Ensemble({kind}, {self.paths} paths in {self.blocks} blocks, {len(self.missing())} missing, in {where})"
        )

    def __call__(self, *, map: Callable[..., Any] | None = None, progress: bool = False) -> Ensemble:
        """Computes what is missing: all of it, or the share of this process; gives the run itself.

        Process ``RANK`` of ``WORLD_SIZE`` (torchrun), or else task ``SLURM_ARRAY_TASK_ID`` of an array, takes the
        blocks ``k`` with ``k mod WORLD_SIZE = RANK``, and does not wait for others.

        Args:
            map: ``map(function, numbers)`` of an engine: ``concurrent.futures``' ``executor.map``, ``client.map`` of
                Dask, a Ray pool's, ``executor.map_array`` of submitit, or for joblib ``lambda f, ks:
                Parallel(4)(delayed(f)(k) for k in ks)``. Results, or futures with ``result()``, are collected here.
            progress: show a progress bar, over blocks.

        Raises:
            RuntimeError: a worker died. What was complete is kept, and another call does the rest.
            TypeError: the functions cannot be pickled for the engine, and cloudpickle is not there.
            Exception: what a block raised, when all others are complete.
        """
        rank, world = _place()
        if world > 1 and not self._store.shared:
            raise ValueError(f"{world} processes share a run by its folder: give out=")
        mine = [k for k in self.missing() if k % world == rank]
        with progress_bar(flag(progress, "progress"), total=len(mine), desc="blocks", unit="block") as bar:
            if map is None:
                first: Exception | None = None
                for k in mine:
                    try:
                        self.do(k)
                    except (DivergenceError, StepLimitError) as error:
                        first = first or error
                    bar.update()
                if first is not None:
                    raise first
            else:
                self._mapped(map, mine, bar)
        return self

    def _mapped(self, map: Callable[..., Any], mine: list[int], bar: Any) -> None:
        if mine and self._task.chooses and self._store.decided() is None:  # here, so that all workers take one executor
            self.do(mine[0])
            bar.update()
            mine = mine[1:]
        work = _Work(self._task, self.paths, self.block, self._reductions, self._store, self._specify)
        work.run, work.execution = self.specification["digest"], self._store.decided()
        work.check_pickles()
        first: Exception | None = None
        for k, run, made in self._answers(map, work, mine):
            bar.update()
            if run != self.specification["digest"]:
                first = first or ValueError(
                    f"a worker has another version of this run, and its block {k} was not taken: what differs there "
                    f"is its code, or its version of torch, Python or sdesolve"
                )
            elif isinstance(made, Exception):
                first = first or made
            elif made is not None:
                self._store.keep(k, *made)
        if first is not None:
            raise first

    def _answers(self, map: Callable[..., Any], work: _Work, mine: list[int]) -> Iterator[Any]:
        try:
            for answer in map(work, mine):
                yield answer.result() if callable(getattr(answer, "result", None)) else answer
        except Exception as error:
            left = self.missing()
            raise RuntimeError(
                f"a worker died or could not be reached ({type(error).__name__}: {short(str(error))}); "
                f"{self.blocks - len(left)} of {self.blocks} blocks are complete, call run() again for the rest"
            ) from error

    def missing(self) -> list[int]:
        """The numbers of the blocks that are not there."""
        return [k for k in range(self.blocks) if not self._store.has(k)]

    def do(self, k: int) -> None:
        """Computes block ``k`` and keeps it, in place of what is there; any order, and twice does no harm.

        Args:
            k: from 0 to ``blocks - 1``.

        Raises:
            ValueError: there is no such block.
            DivergenceError: with the number of the path among all of them.
            OSError: it could not be written; other blocks are as they were.
        """
        k = whole_number(k, "k", 0)
        if k >= self.blocks:
            raise ValueError(f"k must be below {self.blocks}, the number of blocks; got {k}")
        self._store.keep(k, *_computed(self._task, k, self.paths, self.block, self._reductions, self._store))

    def estimate(self) -> Estimate:
        """Does one missing block, which is kept, and says what the others will take.

        A second one is timed where there is one: the first may compile.
        """
        seconds, left = 0.0, self.missing()
        for k in left[:2]:
            begin = time.perf_counter()
            self.do(k)
            seconds = time.perf_counter() - begin
        left = self.missing()
        arrays, _ = self._store.read(next(k for k in range(self.blocks) if k not in set(left)))
        size = sum(v.numel() * v.element_size() for v in arrays.values())
        return Estimate(seconds * len(left), size * self.blocks, len(left), seconds)

    def result(self, *, partial: bool = False) -> Any:
        """What the run has left.

        Without ``reduce`` a `Blocks`: arrays by name, such as ``x1`` and ``xs: (paths, times, *values)``. With it, what
        the reduction gives, or a dictionary of that.

        Args:
            partial: of the blocks that are there, while others are missing.

        Raises:
            ValueError: blocks are missing, damaged, or of another run.
        """
        left = set(self.missing())
        there = [k for k in range(self.blocks) if k not in left]
        if (left and not flag(partial, "partial")) or not there:
            some = ", ".join(map(str, sorted(left)[:5])) + (", ..." if len(left) > 5 else "")
            raise ValueError(
                f"{len(left)} of {self.blocks} blocks are missing ({some}): run() makes them"
                + ("" if not there else "; result(partial=True) is of those that are there")
            )
        if self._own == "sums":
            made: Sums | None = None
            for k in there:
                one = _sums_read(self._store.read(k)[1]["sums"])
                made = one if made is None else made + one
            return made
        reductions = {"": Moments()} if self._own == "moments" else self._reductions
        if not reductions:
            return Blocks(self._store, self.paths, self.block, there)
        merged: dict[str, dict[str, Tensor]] = {}
        for k in there:
            arrays, _ = self._store.read(k)
            for name, reduction in reductions.items():
                own = {
                    n.removeprefix(f"summary.{name}."): v for n, v in arrays.items() if n.startswith(f"summary.{name}.")
                }
                merged[name] = own if name not in merged else merge(reduction, [merged[name], own])
        read = {name: reduction.read(merged[name]) for name, reduction in reductions.items()}
        return read[""] if list(read) == [""] else read

    def replay(self, path: int, **changes: Any) -> Any:
        """One path again, to the bit, with all that `solve` can keep of it: a `Solution` of a batch of one.

        A path of a fused run without a network is taken by itself; any other with its whole block, since the rounding
        of its numbers may depend on the block's size.

        Args:
            path: its number.
            changes: other arguments of `solve`: ``save_at`` (``"grid"`` by default), ``observable``, ``carry``.

        Raises:
            ValueError: there is no such path.
        """
        path = whole_number(path, "path", 0)
        if path >= self.paths:
            raise ValueError(f"path must be below {self.paths}, got {path}")
        k = path // self.block
        first, count = k * self.block, min(self.block, self.paths - k * self.block)
        if not self._store.has(k):
            self.do(k)
        execution = self._store.read(k)[1].get("execution")
        return self._task.replay(path, first, count, execution, changes)

    def to_xarray(self) -> Any:
        """The arrays of a complete run as an ``xarray.Dataset`` over ``path`` and ``time``.

        Of a zarr store nothing is read until it is used; others are read into memory.

        Raises:
            ImportError: xarray is not installed.
            ValueError: blocks are missing, or the run has no arrays since it was reduced.
        """
        try:
            import xarray  # type: ignore[import-not-found, unused-ignore]
        except ImportError:
            raise ImportError("to_xarray needs xarray: pip install 'sdesolve[arrays]'") from None
        found = self.result()
        if not isinstance(found, Blocks):
            raise ValueError("the run was reduced, and has no arrays; result() has what was kept")
        if isinstance(self._store, Zarr):
            made = xarray.open_zarr(self._store.path, consolidated=False)
        else:
            made = xarray.Dataset(
                {
                    name: (["path", *(f"{name}_{axis}" for axis in range(1, len(array.shape)))], array.tensor().numpy())
                    for name, array in found.items()
                }
            )
        made = made.assign_coords(path=range(self.paths))
        if found.ts is not None and "xs" in found:
            made = made.rename_dims(xs_1="time").assign_coords(time=found.ts.numpy())
        return made.assign_attrs({n: v for n, v in self.specification.items() if isinstance(v, str | int)})


def _place() -> tuple[int, int]:
    """Which of how many processes this one is."""
    for rank, world, least in (
        ("RANK", "WORLD_SIZE", None),
        ("SLURM_ARRAY_TASK_ID", "SLURM_ARRAY_TASK_COUNT", "SLURM_ARRAY_TASK_MIN"),
    ):
        if rank in os.environ and world in os.environ:
            own, all_of = int(os.environ[rank]), int(os.environ[world])
            own -= int(os.environ.get(least, 0)) if least else 0
            if least and "SLURM_ARRAY_TASK_STEP" in os.environ:
                own //= max(int(os.environ["SLURM_ARRAY_TASK_STEP"]), 1)
            if not 0 <= own < all_of:
                raise ValueError(f"{rank}={own} and {world}={all_of} in the environment name no process")
            return own, all_of
    return 0, 1


def _computed(
    task: AbstractTask,
    k: int,
    paths: int,
    block: int,
    reductions: Mapping[str, AbstractReduction],
    store: AbstractStore,
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Block ``k`` as a store keeps it, by the executor that all blocks of the run take."""
    first = k * block
    count = min(block, paths - first)

    def made_by(execution: str | None) -> Made:
        if isinstance(task, Solves) and task.segments > 1:
            return task.compute(
                first, count, execution, lambda: store.read_part(k), lambda m, tensors: store.keep_part(k, m, tensors)
            )
        return task.compute(first, count, execution)

    decided = store.decided() if task.chooses else None
    made = made_by(decided)
    if task.chooses and decided is None:
        won = store.decide(str(made.about["execution"]))
        if won != made.about["execution"]:  # another process was first
            made = made_by(won)
    return _kept(made, task, reductions)


def _kept(
    made: Made, task: AbstractTask, reductions: Mapping[str, AbstractReduction]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    about = dict(made.about)
    if isinstance(about.get("sums"), Sums):
        about["sums"] = _sums_written(about["sums"])
    if made.summary is not None:
        return {f"summary..{n}": v.cpu() for n, v in made.summary.items()}, about
    arrays = {name: value.detach().cpu().contiguous() for name, value in made.arrays.items()}
    if not reductions:
        return arrays, about
    values = arrays["x1"] if task.main not in arrays and "x1" in arrays else arrays[task.main]
    own = {
        f"summary.{name}.{n}": v.cpu().contiguous()
        for name, reduction in reductions.items()
        for n, v in reduction.of(values).items()
    }
    return own, about


def _sums_written(sums: Sums) -> dict[str, Any]:
    def text(totals: Iterable[int | None]) -> list[str | None]:
        return [None if t is None else hex(t) for t in totals]

    return {"count": sums.count, "shape": list(sums.shape), "totals": text(sums.totals), "squares": text(sums.squares)}


def _sums_read(said: Mapping[str, Any]) -> Sums:
    def numbers(totals: Iterable[str | None]) -> tuple[int | None, ...]:
        return tuple(None if t is None else int(t, 16) for t in totals)

    return Sums(said["count"], tuple(said["shape"]), numbers(said["totals"]), numbers(said["squares"]))


@final
class _Work:
    """A function of a block's number that workers get: computes it, and keeps it where they see the store."""

    def __init__(
        self,
        task: AbstractTask,
        paths: int,
        block: int,
        reductions: Mapping[str, AbstractReduction],
        store: AbstractStore | None,
        specify: Callable[[], Mapping[str, Any]],
    ) -> None:
        self.task, self.paths, self.block, self.reductions, self._specify = task, paths, block, reductions, specify
        self.store = store if store is not None and store.shared else None
        self.run: str | None = None  # which run this is where the work is done: functions travel by name
        self.execution: str | None = None
        self._asked: str | None = None

    def __call__(self, k: int) -> tuple[int, str, Any]:
        if self.run is None:
            self.run = str(self._specify()["digest"])
        if self._asked not in (None, self.run):
            return k, self.run, None
        try:
            store = self.store or store_of(None, self.paths, self.block)
            if self.store is None and self.execution is not None:
                store.decide(self.execution)
            made = _computed(self.task, k, self.paths, self.block, self.reductions, store)
            if self.store is None:
                return k, self.run, made
            self.store.keep(k, *made)
        except Exception as error:  # other blocks go on; the caller raises it when they are complete
            return k, self.run, error
        return k, self.run, None

    def __reduce__(self) -> tuple[Callable[..., _Work], tuple[Any, ...]]:
        of = (self.task, self.paths, self.block, self.reductions, self.store, self._specify)
        parts = (of, self.execution, self.run)
        try:
            return _restored, (pickle.dumps(parts),)
        except Exception as error:
            try:
                import cloudpickle  # type: ignore[import-untyped, unused-ignore]
            except ImportError:
                raise TypeError(
                    f"the functions of this run cannot be pickled for another process ({error}): define them in a "
                    "module, or pip install cloudpickle, which takes lambdas and closures"
                ) from error
            return _restored, (cloudpickle.dumps(parts),)

    def check_pickles(self) -> None:
        """Refuses what no engine can send, before any worker starts."""
        try:
            pickle.dumps(self)
        except TypeError:
            raise
        except Exception as error:
            raise TypeError(
                f"what this run holds cannot be sent to another process ({type(error).__name__}: {short(str(error))}); "
                "make open files, locks and the like within the functions"
            ) from error


@functools.lru_cache(2)  # an engine sends it with every block
def _restored(content: bytes) -> _Work:
    of, execution, asked = pickle.loads(content)
    work = _Work(*of)
    work.execution, work._asked = execution, asked
    return work


def _specification(
    task: AbstractTask,
    paths: int,
    block: int,
    reductions: Mapping[str, AbstractReduction],
    identity: str | None,
) -> dict[str, Any]:
    said: dict[str, Any] = {"format": _FORMAT, "task": type(task).__name__, "paths": paths, "block": block}
    if isinstance(task, Solves):
        said["segments"] = task.segments
    arguments = dict(task.arguments())
    if reductions:
        arguments["reduce"] = dict(reductions)
    said["arguments"] = {
        name: f"{_described(value)} [{digest(value, identity)[:16]}]" for name, value in sorted(arguments.items())
    }
    if identity is not None:
        said["identity"] = identity
    said["versions"] = {
        "sdesolve": _version(),
        "torch": torch.__version__,
        "python": ".".join(platform.python_version_tuple()[:2]),
    }
    text = json.dumps(said, sort_keys=True)
    return said | {"digest": hashlib.sha256(text.encode()).hexdigest()}


def _described(value: object) -> str:
    if isinstance(value, bool | int | float | str | None):
        return repr(value)
    text = short(value)
    return kind_of(value) if " at 0x" in text else text


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("sdesolve")
    except PackageNotFoundError:
        return "not installed"


def _check_same(ours: Mapping[str, Any], theirs: Mapping[str, Any], out: object) -> None:
    if ours["digest"] == theirs.get("digest"):
        return
    mine, other = _flat(ours), _flat(theirs)
    lines = [
        f"{name}: {other.get(name, 'absent')} there, {mine.get(name, 'absent')} here"
        for name in mine | other
        if name != "digest" and mine.get(name) != other.get(name)
    ]
    more = f"; and {len(lines) - 4} more" if len(lines) > 4 else ""
    raise ValueError(
        f"{out} holds another run: {'; '.join(lines[:4])}{more}. Give the same arguments to go on with it, or another "
        "out"
    )


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    made: dict[str, Any] = {}
    for name, value in tree.items():
        made |= (
            _flat(value, f"{prefix}{name} ".replace("arguments ", ""))
            if isinstance(value, Mapping)
            else {prefix + name: value}
        )
    return made
