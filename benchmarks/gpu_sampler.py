"""The sampler loop with a small network: no waiting, capture that draws the same, and what the loop costs."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

import sdesolve as sds
from benchmarks.gpu_device import Machine
from benchmarks.gpu_measure import quartiles, rounds
from sdesolve.integrate.cuda_graph import CapturedSampler, StraightSampler

__all__ = ["sampler"]

_SEEDS = (0, 1, 12345, 2**63 + 5)
Record = dict[str, Any]


class _Watched:
    """A score that forbids waiting from its second call to its last but one: inside the loop, past set-up."""

    def __init__(self, score: Callable[[Tensor, Tensor], Tensor], machine: Machine, last: int) -> None:
        self._score, self._machine, self._last = score, machine, last
        self._calls = 0
        self._inside: Any = None

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        self._calls += 1
        if self._calls == 2:
            self._inside = self._machine.forbid_waiting()
            self._inside.__enter__()
        if self._calls == self._last:
            self.leave()
        return self._score(x, t)

    def leave(self) -> None:
        """Allows waiting again."""
        if self._inside is not None:
            self._inside.__exit__(None, None, None)
            self._inside = None


def _attempt(work: Callable[[], object]) -> str | None:
    """What went wrong, if something did."""
    try:
        work()
    except Exception as error:  # the report says what; the other checks go on
        return f"{type(error).__name__}: {error}"[:500]
    return None


def _check(name: str, problem: str | None, **more: Any) -> Record:
    return {"section": "sampler", "check": name, "ok": problem is None, "problem": problem, **more}


def sampler(machine: Machine, batch: int, steps: int, channels: int, count: int) -> Iterator[Record]:
    """Checks, then times, for ``(batch, 3, 32, 32)`` and a residual convolutional network."""
    torch.manual_seed(0)
    device, shape = machine.device, (batch, 3, 32, 32)
    net = sds.nn.ConvNet((3, 32, 32), channels=channels, depth=2, width=64).to(device).eval()
    with torch.no_grad():
        for p in net.parameters():
            if not bool(p.any()):  # layers that start at zero would make a score of nothing
                p.normal_(std=0.02)
    process = sds.VP()
    score = sds.NetworkScore(net, process)
    times = process.time_grid(steps)
    backward = process.reverse(score)
    straight = StraightSampler(
        process, score, backward, sds.EulerMaruyama(), times, shape, denoise=True, dtype=torch.float32, device=device
    )
    draw = functools.partial(sds.sample, process, score, shape, steps=steps, device=device)

    def straight_never_waits() -> None:
        straight(1)
        with machine.forbid_waiting():
            straight(2)

    yield _check("straight sampler never waits", _attempt(straight_never_waits))
    watched = _Watched(score, machine, last=steps)
    problem = _attempt(lambda: sds.sample(process, watched, shape, steps=steps, device=device, seed=1))
    watched.leave()
    yield _check("loop of sample never waits", problem)

    if machine.stand_in:
        problem = _attempt(lambda: draw(seed=0, cuda_graph=True))
        clear = problem is not None and "cuda_graph=True needs device='cuda'" in problem
        yield _check("capture refuses the CPU clearly", None if clear else f"got {problem}", stand_in=True)
        replays: dict[str, Callable[[], object]] = {"replay": lambda: straight(3)}
        whole: Callable[[], object] = lambda: draw(seed=3)  # noqa: E731
    else:
        yield from _capture_agrees(draw)
        captured = CapturedSampler(straight, device)
        replays = {"replay": lambda: captured(3)}
        whole = lambda: draw(seed=3, cuda_graph=True)  # noqa: E731

    x, t = torch.randn(shape, device=device), times[steps // 2].to(device=device, dtype=torch.float32)

    def network() -> object:
        with torch.no_grad():
            made = None
            for _ in range(steps + 1):
                made = net(x, t)
            return made

    calls = {"sample": lambda: draw(seed=3), "sample, cuda_graph": whole, "network": network, **replays}
    calls["network, graph"] = machine.graph(network)
    row: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(count):
        for name, call in calls.items():
            row[name].append(machine.per_call(call, 1)[1])
    device_times = rounds(machine, {name: calls[name] for name in ("replay", "network, graph")}, count)
    milliseconds = {name: quartiles([v * 1e3 for v in values]) for name, values in row.items()}
    on_device = {name: quartiles([v * 1e3 for v in values]) for name, values in device_times.items()}
    net_only = on_device["network, graph"]["median"]
    yield {
        "section": "sampler", "case": "times", "shape": list(shape), "steps": steps, "evaluations": steps + 1,
        "ms": milliseconds, "device_ms": on_device,
        "ratios": {"sample / sample, cuda_graph": quartiles(
            [a / b for a, b in zip(row["sample"], row["sample, cuda_graph"], strict=True)])},
        # what is not the network's own time in a graph
        "overhead": {
            "sample": 1 - net_only / milliseconds["sample"]["median"],
            "sample, cuda_graph": 1 - net_only / milliseconds["sample, cuda_graph"]["median"],
            "replay on the device": 1 - net_only / on_device["replay"]["median"],
        },
        "stand_in": machine.stand_in or None,
    }  # fmt: skip


def _capture_agrees(draw: Callable[..., Tensor]) -> Iterator[Record]:
    """A captured sampler draws what the loop draws, and a seed's draw again when it comes back to it."""
    first: Tensor | None = None
    for seed in (*_SEEDS, _SEEDS[0]):
        problem, error, bits = None, None, None
        try:
            loop, graph = draw(seed=seed), draw(seed=seed, cuda_graph=True)
            error = float((loop - graph).abs().max()) / float(loop.abs().max())
            bits = torch.equal(loop, graph)
            if not error <= 1e-4:
                problem = f"relative distance {error:.2e} for seed {seed}"
            if first is None:
                first = graph
            elif seed == _SEEDS[0]:
                if not torch.equal(first, graph):
                    problem = "a seed's second draw is not its first"
            elif torch.equal(first, graph):
                problem = f"seed {seed} draws what seed {_SEEDS[0]} draws"
        except Exception as caught:  # the report says what; the other checks go on
            problem = f"{type(caught).__name__}: {caught}"[:500]
        yield _check(f"graph draws what the loop draws, seed {seed}", problem, relative_error=error, same_bits=bits)
