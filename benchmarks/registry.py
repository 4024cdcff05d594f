"""What a problem is, what a contender is, and the gate between a contender and the clock."""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import os
import platform
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, final

import torch

from benchmarks.timing import FailedCall, Timing, interleave, quartiles

__all__ = [
    "BASELINE",
    "Build",
    "Call",
    "Limit",
    "Missing",
    "Outcome",
    "Problem",
    "compete",
    "cores_used",
    "describe",
    "require",
    "row",
    "use_one_core",
    "versions",
]

BASELINE = "sdesolve"
Call = Callable[[], Any]
Build = Callable[[], Call]

_PACKAGES = (
    *("torch", "numpy", "numba", "triton", "torchsde", "torchdiffeq", "jax", "jaxlib", "diffrax", "diffusers"),
    "pytest-benchmark",
)


class Missing(Exception):
    """A contender needs what is not there."""


def require(*packages: str) -> None:
    """Raises `Missing`, with names, unless all packages can be imported."""
    lacks = [p for p in packages if importlib.util.find_spec(p) is None]
    if lacks:
        raise Missing(f"not installed: {', '.join(lacks)}")


class Limit(NamedTuple):
    """Of the machine: a contender that does ``1 / factor`` of the ``amount`` that a call of ours has to do at least."""

    factor: float
    amount: float
    unit: str


@final
@dataclass(frozen=True)
class Problem:
    """Something to compute, by several contenders.

    Attributes:
        name: unique; holds the size.
        suite: under which it is shown.
        unit: what a call does ``work`` of, such as path-steps.
        work: how many.
        contenders: by name, what makes the call that is timed; it raises `Missing` where a package is not there.
        check: given a contender's name and call, what is wrong with the result, or ``None``.
        limits: contenders that are no peers but limits of the machine; the baseline reaches a share of them.
        threads: for this problem; ``None`` leaves torch's setting.
        quick: contenders of the short version, which is without the problem if there are none.
        timing: options of `interleave`.
        release: lets go of what the contenders share.
    """

    name: str
    suite: str
    unit: str
    work: float
    contenders: Mapping[str, Build]
    check: Callable[[str, Call], str | None]
    limits: Mapping[str, Limit] = field(default_factory=dict)
    threads: int | None = None
    quick: tuple[str, ...] = ()
    timing: Mapping[str, float] = field(default_factory=dict)
    release: Callable[[], object] = lambda: None


class Outcome(NamedTuple):
    """Of a contender: a timing, or why there is none."""

    timing: Timing | None = None
    missing: str | None = None
    refused: str | None = None


@contextlib.contextmanager
def _threads(count: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def compete(
    problem: Problem,
    names: Iterable[str] | None = None,
    synchronize: Callable[[], object] = lambda: None,
    **timing: float,
) -> dict[str, Outcome]:
    """Checks each contender, and times those whose results are right in the same rounds.

    Args:
        problem: what to compute.
        names: contenders; all by default. The baseline and the limits always take part.
        synchronize: as for `interleave`.
        timing: options of `interleave`, above those of the problem.

    Raises:
        ValueError: the problem lacks one of the names, or the baseline.
    """
    wanted = {BASELINE, *problem.limits, *(problem.contenders if names is None else names)}
    if unknown := wanted - problem.contenders.keys():
        raise ValueError(
            f"{problem.name!r} has no contender {', '.join(map(repr, sorted(unknown)))}; "
            f"it has {', '.join(map(repr, problem.contenders))}"
        )
    outcomes: dict[str, Outcome] = {}
    calls: dict[str, Call] = {}
    options: dict[str, Any] = {"warm": True, **problem.timing, **timing}
    with _threads(problem.threads), contextlib.ExitStack() as afterwards:
        afterwards.callback(problem.release)
        for name, build in problem.contenders.items():
            if name not in wanted:
                continue
            try:
                call = build()
                if name in problem.limits:
                    call()
                    wrong = None
                else:
                    wrong = problem.check(name, call)
            except Missing as missing:
                outcomes[name] = Outcome(missing=str(missing))
                continue
            except Exception as error:  # of a peer, perhaps; the others go on
                wrong = _what(error)
            if wrong is None:
                calls[name] = call
            else:
                outcomes[name] = Outcome(refused=wrong)
        while BASELINE in calls:
            try:
                times = interleave(calls, baseline=BASELINE, synchronize=synchronize, **options)
            except FailedCall as failed:  # after its check; the others begin again without it
                del calls[failed.name]
                outcomes[failed.name] = Outcome(refused=_what(failed.error))
            else:
                return outcomes | {name: Outcome(timing=t) for name, t in times.items()}
    return outcomes | {name: Outcome(refused=f"no {BASELINE} to compare with") for name in calls}


def _what(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"[:500]


def row(problem: Problem, name: str, timing: Timing) -> dict[str, Any]:
    """For the report: ``ratio`` is the contender's time over ours in the same round, quartiles of both figures."""
    found = {
        "suite": problem.suite, "problem": problem.name, "contender": name, "unit": problem.unit, "work": problem.work,
        "seconds": _short(quartiles(timing.seconds)), "ratio": _short(quartiles(timing.over_baseline)),
        "ns_per_unit": float(f"{timing.median / problem.work * 1e9:.4g}"), "rounds": len(timing.seconds),
        "threads": problem.threads or torch.get_num_threads(),
    }  # fmt: skip
    if name in problem.limits:
        limit = problem.limits[name]
        found["share"] = _short(limit.factor * r for r in quartiles(timing.over_baseline))
        found["limit"] = float(f"{limit.amount / (limit.factor * timing.median):.4g}")
        found["limit_unit"] = f"{limit.unit}/s"
    return found


def _short(values: Iterable[float]) -> list[float]:
    return [float(f"{v:.4g}") for v in values]


def _processor() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def cores_used() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def use_one_core() -> None:
    """For the rest of the process; what starts threads by the number of cores must not have done so yet.

    Raises:
        OSError: this system cannot keep a process on one core.
    """
    if not hasattr(os, "sched_setaffinity"):
        raise OSError("keeping a process on one core needs Linux; leave out --one-core")
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    torch.set_num_threads(1)


def versions() -> dict[str, str | None]:
    """Of the packages that take part; ``None`` for what is not there."""
    found: dict[str, str | None] = {}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    return found


def describe() -> dict[str, Any]:
    """Machine and versions, for the report."""
    return {
        "processor": _processor(), "cores": os.cpu_count(), "cores_used": cores_used(),
        "torch_threads": torch.get_num_threads(),
        "load_before": round(os.getloadavg()[0], 2), "python": sys.version.split()[0], "versions": versions(),
        "environment": {n: os.environ[n] for n in ("OMP_NUM_THREADS", "OMP_WAIT_POLICY") if n in os.environ},
    }  # fmt: skip
