"""Schemes of strong order above 1/2 beside the same schemes of peers: time for a path-step, and errors at equal steps.

Equations are of one component each, four of them side by side. ``python -m benchmarks.schemes`` writes
``benchmarks/results/schemes.md``: errors on paths of each package's own, and seconds of the process (of all of its
threads), which what else the machine does leaves alone. Seconds by the clock are in the suite.

How much arithmetic costs: an operation is one of the elementwise operations that a step in torch, evaluated eagerly,
does to tensors of the state's or the increment's size. What one costs in a kernel is measured beside, on an
Euler-Maruyama step whose drift is a polynomial, longer and shorter; normals are those of as
many channels summed up. A scheme's model is the sum of both.
"""

from __future__ import annotations

import argparse
import functools
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import sdesolve as sds
from benchmarks.ensembles import Reference, off, statistics_of, tensor_of
from benchmarks.registry import BASELINE, Build, Call, Limit, Missing, Problem, require
from benchmarks.timing import THREADED
from sdesolve.sde import AbstractSDE
from sdesolve.solvers.base import AbstractOneStep, Span

__all__ = ["CASES", "Case", "arithmetic", "schemes"]

RESULTS = Path(__file__).parent / "results" / "schemes.md"
WIDTH, T1 = 4, 1.0
_QUICK = ("SRIW2", "ShARK", "SPaRK")  # those with goals


class Case(NamedTuple):
    """A scheme on an equation, and what has it besides.

    Attributes:
        solver: ours.
        sde: the equation.
        peer: the package.
        theirs: the scheme's name there.
        model: of `benchmarks.jax_peers.MODELS_1D`, or of torchsde's below.
        x0: start of each component.
    """

    solver: AbstractOneStep
    sde: AbstractSDE
    peer: str
    theirs: str
    model: str
    x0: float


def _tanh_drift(x: Tensor, t: Tensor) -> Tensor:
    return -0.25 * x * (1.0 - x * x)


def _tanh_noise(x: Tensor, t: Tensor) -> Tensor:
    return 0.5 * (1.0 - x * x)


_TANH = sds.SDE(_tanh_drift, _tanh_noise)  # X = tanh(W / 2 + artanh x0)
_QUADRATIC = sds.SDE(
    lambda x, t: -0.5 * (1.0 - x * x), lambda x, t: 0.5 * (1.0 - x * x), calculus="stratonovich"
)  # artanh X = artanh x0 - t / 2 + W / 2
CASES = {
    "SRIW2": Case(sds.SRIW2(), _TANH, "torchsde", "srk", "tanh", 0.5),
    "SRIW1": Case(sds.SRIW1(), _TANH, "torchsde", "srk", "tanh", 0.5),  # a scheme of the same order, at less cost
    "ShARK": Case(sds.ShARK(), sds.DoubleWell(0.7), "diffrax", "ShARK", "double well", 0.5),
    "SPaRK": Case(sds.SPaRK(), _QUADRATIC, "diffrax", "SPaRK", "quadratic", 0.5),
    "SlowRK": Case(sds.SlowRK(), _QUADRATIC, "diffrax", "SlowRK", "quadratic", 0.5),
}


def _start(case: Case, paths: int, device: torch.device | str = "cpu") -> Tensor:
    return torch.full((paths, WIDTH), case.x0, device=device)


def _ours(case: Case, paths: int, steps: int, backend: str = "fused", device: torch.device | str = "cpu") -> Call:
    x0 = _start(case, paths, device)
    return lambda: sds.solve(case.sde, x0, 0.0, T1, steps, solver=case.solver, seed=0, backend=backend).x1  # type: ignore[arg-type]


class _Torchsde(torch.nn.Module):
    noise_type, sde_type = "diagonal", "ito"

    def __init__(self, sde: AbstractSDE) -> None:
        super().__init__()
        self.sde = sde

    def f(self, t: Tensor, y: Tensor) -> Tensor:
        return self.sde.drift(y, t)

    def g(self, t: Tensor, y: Tensor) -> Tensor:
        return self.sde.diffusion(y, t)


@torch.no_grad()
def _in_torchsde(case: Case, x0: Tensor, steps: int, entropy: int | None = None) -> tuple[Tensor, Any]:
    """The last state, and the path."""
    import torchsde

    bm = torchsde.BrownianInterval(
        0.0, T1, size=tuple(x0.shape), dtype=x0.dtype, device=x0.device, entropy=entropy, dt=T1 / steps,
        cache_size=None, levy_area_approximation="space-time",
    )  # fmt: skip
    ts = torch.tensor([0.0, T1], dtype=x0.dtype, device=x0.device)
    equation = _Torchsde(case.sde)
    return torchsde.sdeint(equation, x0, ts, bm=bm, method=case.theirs, dt=T1 / steps)[-1], bm


def _theirs(case: Case, paths: int, steps: int, device: torch.device) -> Call:
    if case.peer == "torchsde":
        require("torchsde")
        x0 = _start(case, paths, device)
        return lambda: _in_torchsde(case, x0, steps)[0]
    require("jax", "diffrax")
    from benchmarks import jax_peers

    return jax_peers.diffrax_scheme(case.model, case.theirs, _start(case, paths), T1, steps, device)


def schemes(device: torch.device, paths: int = 8192, steps: int = 64) -> Iterator[Problem]:
    """Each of `CASES`, with normals alone as the limit."""
    for name, case in CASES.items():
        normals = paths * steps * WIDTH * len(case.solver.needs)

        @functools.cache
        def reference(case: Case = case) -> Reference:
            """Of our own in float64, with other noise: the law of the chain, whoever walks it."""
            x = sds.solve(
                case.sde, torch.full((1 << 16, WIDTH), case.x0, dtype=torch.float64), 0.0, T1, steps,
                solver=case.solver, seed=1, backend="eager",
            ).x1  # fmt: skip
            found = statistics_of(x)
            return Reference(found.mean(0), found.std(0), len(x))

        def check(contender: str, call: Call, reference: Callable[[], Reference] = reference) -> str | None:
            x = tensor_of(call())
            if x.shape != (paths, WIDTH):
                return f"shape {tuple(x.shape)}, expected {(paths, WIDTH)}"
            return off(x, reference(), steps, torch.finfo(torch.float32).eps)

        def limit(count: int = normals) -> Call:
            from benchmarks.ensembles import noise_alone

            return noise_alone(count // steps, steps, device)

        contenders: dict[str, Build] = {
            BASELINE: functools.partial(_ours, case, paths, steps, "fused", device),
            "sdesolve eager": functools.partial(_ours, case, paths, steps, "eager", device),
            case.peer: functools.partial(_theirs, case, paths, steps, device), "limit: noise": limit,
        }  # fmt: skip
        yield Problem(
            f"{name} beside {case.theirs}, {paths} x {steps}", "schemes", "path-step", paths * steps, contenders, check,
            {"limit: noise": Limit(1.0, normals, "normals")}, None, (case.peer,) if name in _QUICK else (),
            {**THREADED, "rounds": 5, "seconds": 8.0}, reference.cache_clear,
        )  # fmt: skip


# Errors at equal steps


def _exact(case: Case, W: Tensor) -> Tensor:
    start = math.atanh(case.x0)
    return torch.tanh(start + 0.5 * W - (0.5 * T1 if case.model == "quadratic" else 0.0))


def _our_error(case: Case, paths: int, steps: int, finest: int) -> float:
    path, x0 = sds.BrownianPath(7, substeps=finest // steps), _start(case, paths).double()
    x = sds.solve(case.sde, x0, 0.0, T1, steps, solver=case.solver, noise=path, backend="eager").x1
    if case.model == "double well":
        fine = sds.BrownianPath(7)
        truth = sds.solve(case.sde, x0, 0.0, T1, finest, solver=case.solver, noise=fine, backend="eager").x1
    else:
        W = sds.BrownianPath(7).increments(sds.grids.uniform(0.0, T1, finest), x0.shape, dtype=x0.dtype).sum(0)
        truth = _exact(case, W)
    return float((x - truth).square().mean().sqrt())


def _their_errors(case: Case, paths: int, steps: Sequence[int], finest: int) -> list[float]:
    x0 = _start(case, paths).double()
    require(*(("torchsde",) if case.peer == "torchsde" else ("jax", "diffrax")))
    if case.peer == "torchsde":
        runs = [_in_torchsde(case, x0, n, entropy=7) for n in steps]
        ends = [(x, bm(0.0, T1)) for x, bm in runs]
        found = [(x, _exact(case, W[0] if isinstance(W, tuple) else W)) for x, W in ends]
    else:
        from benchmarks import jax_peers

        known = case.model != "double well"
        ends = jax_peers.diffrax_paths(case.model, case.theirs, x0, T1, [*steps, *([] if known else [finest])])
        found = [(x, _exact(case, W) if known else ends[-1][0]) for x, W in ends[: len(steps)]]
    return [float((x - truth).square().mean().sqrt()) for x, truth in found]


# Time, and the model of it


class _Counted(TorchDispatchMode):
    """Counts elementwise operations on tensors of at least so many numbers."""

    count = 0

    def __init__(self, least: int) -> None:
        super().__init__()
        self.least = least

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor) and out.numel() >= self.least and torch.Tag.pointwise in func.tags:
            self.count += 1
        return out


def arithmetic(case: Case) -> int:
    """Elementwise operations of an eager step, of each component."""
    x = torch.full((64, WIDTH), case.x0)
    t0, h = torch.tensor(0.0), torch.tensor(0.01)
    noise = sds.Increment(0.1 * torch.ones_like(x), H=0.02 * torch.ones_like(x))
    with _Counted(x.numel()) as counted:
        case.solver.step(case.sde, x, Span(t0, h, h), noise)
    return counted.count


def _cpu(calls: dict[str, Call], rounds: int) -> dict[str, list[float]]:
    """Seconds of the process for each call, interleaved."""
    found: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
    for turn in range(rounds):
        names = list(calls)
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            start = time.process_time()
            calls[name]()
            found[name].append(time.process_time() - start)
    return found


def _polynomial(degree: int) -> AbstractSDE:
    """Of values that stay below 1."""

    def drift(x: Tensor, t: Tensor) -> Tensor:
        y = 0.01 * x
        for i in range(degree):
            y = (0.1 + 0.001 * i) - 0.3 * y * y
        return y

    return sds.SDE(drift, lambda x, t: torch.ones_like(x))


def models(paths: int, steps: int, rounds: int) -> dict[str, tuple[float, float, float, int]]:
    """By scheme: ns of a path-step, of its normals, of its arithmetic by the model, and how many operations it has."""
    x0, most = torch.full((paths, WIDTH), 0.5), 40

    def polynomial(degree: int) -> Call:
        sde = _polynomial(degree)
        return lambda: sds.solve(sde, x0, 0.0, T1, steps, solver=sds.EulerMaruyama(), seed=0, backend="fused").x1

    from benchmarks.ensembles import noise_alone

    cases = {n: c for n, c in CASES.items() if n in ("SRIW1", "ShARK", "SPaRK")}
    calls = {name: _ours(case, paths, steps) for name, case in cases.items()}
    calls |= {"short": polynomial(8), "long": polynomial(8 + most)}
    calls["normals"] = noise_alone(paths * WIDTH * 2, steps, torch.device("cpu"))
    times = _cpu(calls, rounds)
    ns = 1e9 / (paths * steps)

    def median(values: Sequence[float]) -> float:
        return statistics.median(values) * ns

    # Two products and a difference, of each component.
    operation = [(b - a) / (3 * most * WIDTH) for a, b in zip(times["short"], times["long"], strict=True)]
    found = {}
    for name, case in cases.items():
        count = arithmetic(case)
        found[name] = (
            median(times[name]), median(times["normals"]), count * WIDTH * median(operation), count,
        )  # fmt: skip
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--paths", type=int, default=8192)
    parser.add_argument("--rounds", type=int, default=9)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    paths, rounds, steps, finest = arguments.paths, arguments.rounds, [8, 16, 32, 64], 512
    few = min(paths, 1024)  # of four components: errors to 2%, and trees take long
    lines = [
        "# Schemes beside those of peers", "", f"Made by `python -m benchmarks.schemes --paths {paths}`.", "",
        "Root mean square errors at the end of a unit interval, at equal steps, each on paths of its own package: "
        "theirs over ours.", "", "| ours, theirs | " + " | ".join(f"h = 1/{n}" for n in steps) + " |",
        "|---" * (len(steps) + 1) + "|",
    ]  # fmt: skip
    for name, case in CASES.items():
        ours = [_our_error(case, few, n, finest) for n in steps]
        try:
            theirs = _their_errors(case, few, steps, finest)
        except Missing as missing:
            print(f"{name}: {missing}")
            continue
        cells = [f"{ours_n:.2e}, {theirs_n / ours_n:.2f}" for ours_n, theirs_n in zip(ours, theirs, strict=True)]
        lines.append(f"| `{name}`, {case.peer} {case.theirs} | " + " | ".join(cells) + " |")
        print(lines[-1], flush=True)
    lines += [
        "", "Time of the process for a path-step, of four components, float32, medians of interleaved rounds.", "",
        "| ours, theirs | ns | theirs over ours |", "|---|---|---|",
    ]  # fmt: skip
    for name, case in CASES.items():
        calls = {
            "ours": _ours(case, paths, 64), "theirs": _theirs(case, paths, 64, torch.device("cpu")),
        }  # fmt: skip
        times = _cpu(calls, rounds)
        ratio = statistics.median(b / a for a, b in zip(times["ours"], times["theirs"], strict=True))
        ours = statistics.median(times["ours"]) / (paths * 64) * 1e9
        lines.append(f"| `{name}`, {case.peer} {case.theirs} | {ours:.2f} | {ratio:.1f} |")
        print(lines[-1], flush=True)
    lines += [
        "", "Time of a path-step beside a model of it: its normals, two a channel, and the operations of a step in "
        "torch, at what one costs in a kernel.", "",
        "| scheme | ns | normals | operations | their cost | over the model |",
        "|---|---|---|---|---|---|",
    ]  # fmt: skip
    for name, (took, normals, cost, count) in models(8 * paths, 64, rounds).items():
        ratio = took / (normals + cost)
        lines.append(f"| `{name}` | {took:.2f} | {normals:.2f} | {WIDTH} x {count} | {cost:.2f} | {ratio:.2f} |")
        print(lines[-1], flush=True)
    RESULTS.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
