"""Times: large tensors against a copy, a fill and eager torch; small ones by launches; compiled torch; memory."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch

from benchmarks import timing
from benchmarks.gpu_checks import name_of, value_check
from benchmarks.gpu_device import Machine
from benchmarks.gpu_ops import CASES, STREAM, Case, states
from benchmarks.gpu_worker import Gates

__all__ = ["Size", "compiled", "large", "memory", "quartiles", "rounds", "small"]

_WHERE: dict[str, Any] = {"seed": 3, "stream": STREAM, "first_path": 0, "step": 5}
Record = dict[str, Any]


class Size(NamedTuple):
    """A state's size: bytes of one tensor if it is large, else a shape."""

    name: str
    bytes: int = 0
    shape: tuple[int, ...] = ()

    def of(self, dtype: torch.dtype) -> tuple[int, ...]:
        """The shape in a dtype: latents of 4 x 32 x 32 where bytes are given."""
        return self.shape or (max(1, self.bytes // (4096 * dtype.itemsize)), 4, 32, 32)


def quartiles(values: list[float]) -> dict[str, float]:
    """Median and quartiles, by name."""
    low, middle, high = timing.quartiles(values)
    return {"median": middle, "lower": low, "upper": high}


def rounds(machine: Machine, calls: dict[str, Callable[[], object]], count: int) -> dict[str, list[float]]:
    """Device seconds of each call, once a round, in an order that rotates: what disturbs one disturbs all."""
    timers = {name: machine.timer(call) for name, call in calls.items()}
    times: dict[str, list[float]] = {name: [] for name in calls}
    names = list(calls)
    for turn in range(count):
        shift = turn % len(names)
        for name in names[shift:] + names[:shift]:
            times[name].append(timers[name]())
    return times


def _summary(times: dict[str, list[float]]) -> dict[str, dict[str, float]]:
    return {name: quartiles([t * 1e6 for t in values]) for name, values in times.items()}


def _ratio(above: list[float], below: list[float], factor: float = 1.0) -> dict[str, float]:
    """Quartiles over the rounds of ``factor above / below``."""
    return quartiles([factor * a / b for a, b in zip(above, below, strict=True)])


def _open(gates: Gates, case: Case, dtype: torch.dtype, size: Size, refused: list[Record]) -> bool:
    why = gates.why_closed(case.kernel, name_of(dtype))
    if why is not None:
        refused.append({"case": case.name, "dtype": name_of(dtype), "size": size.name, "why": why})
    return why is None


def large(
    machine: Machine, gates: Gates, size: Size, dtype: torch.dtype, count: int, refused: list[Record], check: bool
) -> Iterator[Record]:
    """Every case at one large size: fraction of the copy's bandwidth at the fewest bytes, and times faster than eager.

    ``check``: compare the very result that is timed with the reference first, on the device. It needs some hundred
    bytes an element, so only the smaller sizes do.
    """
    s = states(size.of(dtype), dtype, machine.device)
    target = torch.empty_like(s.x)
    state_bytes = s.x.numel() * s.x.element_size()
    for case in CASES.values():
        if not case.timed or not _open(gates, case, dtype, size, refused):
            continue
        if check:
            with torch.no_grad() if case.has_out else torch.enable_grad():
                found = value_check(case, s, _WHERE, case.ours(s, **_WHERE), f"value at {size.name}")
            machine.release()
            if not found.ok:
                gates.close(found.record())
                _open(gates, case, dtype, size, refused)
                continue
        eager = case.eager(lambda f: f)
        calls: dict[str, Callable[[], object]] = {
            "ours": lambda case=case: case.ours(s, **_WHERE),  # type: ignore[misc]
            "eager": lambda eager=eager: eager(s),  # type: ignore[misc]
            "copy": lambda: target.copy_(s.x),
        }
        if case.kernel == "normal":
            calls["write"] = lambda: target.fill_(1.5)
            calls["randn"] = calls.pop("eager")
        times = rounds(machine, calls, count)
        base = "randn" if "randn" in times else "eager"
        ratios = {
            # bytes a second of the case's fewest bytes over the copy's, which moves two states
            "of copy": _ratio(times["copy"], times["ours"], case.passes / 2),
            f"{base} / ours": _ratio(times[base], times["ours"]),
        }
        if "write" in times:
            ratios["of write"] = _ratio(times["write"], times["ours"])
        yield {
            "section": "large", "case": case.name, "kernel": case.kernel, "dtype": name_of(dtype), "size": size.name,
            "shape": list(s.x.shape), "state_bytes": state_bytes, "least_bytes": case.passes * state_bytes,
            "rounds": count, "us": _summary(times), "ratios": ratios,
            "copy_gb_s": 2e-9 * state_bytes / statistics.median(times["copy"]),
            "least_gb_s": 1e-9 * case.passes * state_bytes / statistics.median(times["ours"]),
            "stand_in": machine.stand_in or None,
        }  # fmt: skip


def small(
    machine: Machine, gates: Gates, size: Size, dtype: torch.dtype, count: int, repeats: int, refused: list[Record]
) -> Iterator[Record]:
    """Every case at one small size: the host's time a call, calls in a row, and inside a graph of `repeats` of them."""
    s = states(size.of(dtype), dtype, machine.device)
    for case in CASES.values():
        if not case.timed or not _open(gates, case, dtype, size, refused):
            continue
        eager = case.eager(lambda f: f)
        calls: dict[str, Callable[[], object]] = {
            "ours": lambda case=case: case.ours(s, **_WHERE),  # type: ignore[misc]
            "eager": lambda eager=eager: eager(s),  # type: ignore[misc]
        }
        record: Record = {
            "section": "small", "case": case.name, "kernel": case.kernel, "dtype": name_of(dtype), "size": size.name,
            "shape": list(s.x.shape), "rounds": count, "stand_in": machine.stand_in or None,
        }  # fmt: skip
        host: dict[str, list[float]] = {name: [] for name in calls}
        row: dict[str, list[float]] = {name: [] for name in calls}
        for _ in range(count):
            for name, call in calls.items():
                free, done = machine.per_call(call, 5 * repeats)
                host[name].append(free)
                row[name].append(done)
        record |= {"host_us": _summary(host), "us": _summary(row)}
        record["ratios"] = {"eager / ours": _ratio(row["eager"], row["ours"])}
        try:
            replays = {name: machine.graph(_repeated(call, repeats)) for name, call in calls.items()}
            graph = rounds(machine, replays, count)
            graph = {name: [t / repeats for t in values] for name, values in graph.items()}
            record["graph_us"] = _summary(graph)
            record["ratios"] |= {
                "eager / ours, graphs": _ratio(graph["eager"], graph["ours"]),
                "eager / ours in a graph": _ratio(row["eager"], graph["ours"]),
            }
        except RuntimeError as error:  # what cannot be captured is said, and the rest goes on
            record["graph_error"] = str(error)[:500]
            machine.synchronize()
        yield record


def _repeated(call: Callable[[], object], repeats: int) -> Callable[[], object]:
    def calls() -> object:
        made = None
        for _ in range(repeats):
            made = call()
        return made

    return calls


def compiled(
    machine: Machine, gates: Gates, case: Case, size: Size, dtype: torch.dtype, count: int, backend: str,
    refused: list[Record],
) -> Iterator[Record]:  # fmt: skip
    """One case against ``torch.compile`` of the eager code, each shape compiled for itself."""
    if not _open(gates, case, dtype, size, refused):
        return
    torch.compiler.reset()  # past eight shapes of one function, torch would quietly run it uncompiled
    s = states(size.of(dtype), dtype, machine.device)
    call = case.eager(lambda f: torch.compile(f, dynamic=False, backend=backend))
    calls: dict[str, Callable[[], object]] = {
        "ours": lambda: case.ours(s, **_WHERE),
        "compiled": lambda: call(s),
    }
    times = rounds(machine, calls, count)
    record: Record = {
        "section": "compiled", "case": case.name, "kernel": case.kernel, "dtype": name_of(dtype), "size": size.name,
        "shape": list(s.x.shape), "rounds": count, "backend": backend, "us": _summary(times),
        "ratios": {"compiled / ours": _ratio(times["compiled"], times["ours"])}, "stand_in": machine.stand_in or None,
    }  # fmt: skip
    if not size.bytes:
        row: dict[str, list[float]] = {name: [machine.per_call(c, 20)[1] for _ in range(count)]
                                       for name, c in calls.items()}  # fmt: skip
        record["row_us"] = _summary(row)
        record["ratios"]["compiled / ours, in a row"] = _ratio(row["compiled"], row["ours"])
    yield record


def memory(machine: Machine, gates: Gates, size: Size, dtype: torch.dtype, refused: list[Record]) -> Iterator[Record]:
    """Peak memory of a training step beyond what it starts with, in tensors of the batch's size."""
    s = states(size.of(dtype), dtype, machine.device)
    state_bytes = s.x.numel() * s.x.element_size()

    def tensors(peak: int | None) -> float | None:
        return None if peak is None else round(peak / state_bytes, 3)

    for name in ("dsm_loss", "dsm_loss/one pass", "dsm_loss/training"):
        case = CASES[name]
        if not _open(gates, case, dtype, size, refused):
            continue
        eager = case.eager(lambda f: f)
        yield {
            "section": "memory", "case": name, "kernel": case.kernel, "dtype": name_of(dtype), "size": size.name,
            "tensors": {"ours": tensors(machine.peak(lambda c=case: c.ours(s, **_WHERE))),  # type: ignore[misc]
                        "eager": tensors(machine.peak(lambda e=eager: e(s)))},  # type: ignore[misc]
            "stand_in": machine.stand_in or None,
        }  # fmt: skip
