"""What a fused run costs on this CPU: prices of a call and of each operation, and runs that they predict.

``python -m benchmarks.costs`` (two minutes) measures the prices on equations that do one thing, counts the operations
of others from one call of their functions, and writes measured beside predicted times to
``benchmarks/results/costs.json``; ``--into docs/cost.md`` puts the tables there. One thread, processor time, the least
of several calls: what other programs on the machine take is not in it.
"""

from __future__ import annotations

import argparse
import collections
import json
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from scipy.optimize import nnls
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import sdesolve as sds
from benchmarks.compare import head, insert
from benchmarks.models import MODELS, Model
from benchmarks.registry import describe
from sdesolve.sde import AbstractSDE

__all__ = ["CLASSES", "Run", "count", "features", "main", "markdown", "measure", "priced", "runs", "yardsticks"]

ROOT = Path(__file__).parents[1]
_PATHS = 8192

# What one number of a path's result costs, by the operation that makes it; all others move or fill.
CLASSES = {
    "arithmetic": "add sub rsub mul neg abs clamp clamp_min clamp_max maximum minimum where relu gt lt ge le eq sum "
                  "square addcmul lerp",
    "division": "div reciprocal sqrt rsqrt",
    "exponential": "exp log log1p expm1 tanh sigmoid sin cos silu softplus gelu softmax logsumexp",
    "power": "pow",
}  # fmt: skip
_CLASS = {name: label for label, names in CLASSES.items() for name in names.split()}


class _Counter(TorchDispatchMode):
    """Numbers that operations make, by class, and multiply-adds of matrix products."""

    def __init__(self) -> None:
        super().__init__()
        self.found: collections.Counter[str] = collections.Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__.rstrip("_")
        if name in ("mm", "bmm", "addmm"):
            inner = args[1 if name == "addmm" else 0].shape[-1]
            self.found["multiply-add"] += result.numel() * inner
        elif name in _CLASS and isinstance(result, Tensor):
            exponent = args[1] if name == "pow" and len(args) > 1 else None
            whole = isinstance(exponent, int | float) and exponent in (2, 3)
            read = args[0].numel() if name in ("sum", "logsumexp", "softmax") else result.numel()
            self.found["arithmetic" if whole else _CLASS[name]] += read
        return result


def count(sde: AbstractSDE, x: Tensor, params: Tensor | None = None) -> dict[str, float]:
    """Operations of one Euler-Maruyama step of one path: of drift and diffusion, by class, and of the step itself."""
    rows, t = len(x), torch.tensor(0.5, dtype=x.dtype)
    bound = sde.with_params(params) if isinstance(sde, sds.SDE) and params is not None else sde
    with torch.no_grad(), _Counter() as counter:
        f, g = bound.drift(x, t), bound.diffusion(x, t)
    found = {name: n / rows for name, n in counter.found.items()}
    general = g.dim() == x.dim() + 1
    numbers = g.shape[-1] if general else x[0].numel()
    found["normal"] = numbers
    found["arithmetic"] = found.get("arithmetic", 0) + (2 if general else 3) * f[0].numel()
    if general:
        found["multiply-add"] = found.get("multiply-add", 0) + g[0].numel()
    found["state"] = x[0].numel()
    return found


class Run(NamedTuple):
    """A run by Euler-Maruyama in float32."""

    name: str
    sde: AbstractSDE
    start: Callable[[], Tensor]
    params: Callable[[], Tensor] | None
    steps: int
    span: tuple[float, float] = (0.0, 1.0)
    options: dict[str, Any] | None = None


def _sum(name: str, times: int = 12) -> AbstractSDE:
    """An equation whose drift is a sum of one operation."""
    links: dict[str, Callable[[Tensor], Tensor]] = {
        "arithmetic": lambda y: (y - 0.25).clamp(-1.5, 1.5) * 0.75,
        "division": lambda y: 1.5 / (2.5 + y * y),
        "exponential": lambda y: torch.tanh(y),
        "power": lambda y: (y.abs() + 3.0) ** 0.3,
        "": lambda y: y,
    }
    link = links[name]

    def drift(x: Tensor, t: Tensor) -> Tensor:
        return -sum((link(x + 0.1 * k) for k in range(times if name else 0)), x)

    return sds.SDE(drift, lambda x, t: torch.full_like(x, 0.5))


def _linear(width: int, noises: int = 0) -> AbstractSDE:
    made = torch.Generator().manual_seed(width)
    a = torch.randn(width, width, generator=made) / width
    if not noises:
        return sds.SDE(lambda x, t: x @ a, lambda x, t: torch.full_like(x, 0.5))
    g = torch.randn(width, noises, generator=made) / noises**0.5
    return sds.SDE(lambda x, t: -x, lambda x, t: g.expand(len(x), width, noises), noise="general")


def _network(width: int) -> AbstractSDE:
    made = torch.Generator().manual_seed(width)
    first, last = (torch.randn(shape, generator=made) / shape[0] for shape in ((4, width), (width, 4)))
    return sds.SDE(lambda x, t: torch.tanh(x @ first) @ last, lambda x, t: torch.full_like(x, 0.5))


def _started(model: Model, paths: int) -> tuple[Callable[[], Tensor], Callable[[], Tensor] | None]:
    device, params = torch.device("cpu"), model.params
    return lambda: model.start(paths, device), None if params is None else lambda: params(paths, device)


def _power(n: int) -> str:
    return f"10^{len(str(n)) - 1}" if n == 10 ** (len(str(n)) - 1) else f"2^{n.bit_length() - 1}"


def _zeros(paths: int, width: int) -> Callable[[], Tensor]:
    return lambda: torch.zeros(paths, width)


def features(run: Run, x0: Tensor, params: Tensor | None) -> dict[str, float]:
    """How often a run pays each price."""
    each = count(run.sde, x0[:4], None if params is None else params[:4])
    paths = len(x0)
    made = {name: n * paths * run.steps for name, n in each.items() if name != "state"}
    numbers = paths * each["state"]
    if (run.options or {}).get("reduce"):
        return {"call": 1.0, "start and moments": numbers, **made}
    return {"call": 1.0, "start and end": numbers, **made}


def yardsticks() -> Iterator[Run]:
    """Equations that do one thing, from which the prices come."""
    yield Run("a call", _sum(""), _zeros(16, 2), None, 1)
    yield Run("starts and ends", _sum(""), _zeros(1 << 18, 2), None, 1)
    yield Run("starts and moments", _sum(""), _zeros(1 << 20, 1), None, 1, options={"reduce": "moments"})
    for width in (1, 2, 8):
        yield Run(f"noise in {width} dimensions", _sum(""), _zeros(_PATHS, width), None, 128)
    for name in CLASSES:
        for times in (4, 16):
            yield Run(f"{name}, {times} times", _sum(name, times), _zeros(_PATHS, 2), None, 64)
    for width in (16, 48):
        yield Run(f"x A in {width} dimensions", _linear(width), _zeros(_PATHS, width), None, 32)


def runs() -> Iterator[Run]:
    """Runs that are predicted: models of the other benchmarks, and every size at both ends."""
    for name, model in MODELS.items():
        first, last = model.span
        if model.solver is not sds.EulerMaruyama or (first, last) == (0.0, 0.0):
            continue
        made = Run(name, model.sde(torch.device("cpu")), *_started(model, _PATHS), 64)
        yield made._replace(span=(first, model.until(64)))
    linear = MODELS["linear"].sde(torch.device("cpu"))
    for paths, steps in ((16, 256), (1024, 64), (1 << 20, 16), (10**7, 16)):
        yield Run(f"{_power(paths)} paths", linear, _started(MODELS["linear"], paths)[0], None, steps)
    yield Run(
        "10^8 paths, moments",
        _sum(""),
        lambda: torch.zeros(1, 1).expand(10**8, 1),
        None,
        4,
        options={"reduce": "moments"},
    )
    for steps in (10**4, 10**6):
        yield Run(f"{_power(steps)} steps", linear, _started(MODELS["linear"], 256)[0], None, steps)
    for width in (32, 128, 256):
        yield Run(f"{width} dimensions, own noise", _sum("exponential", 1), _zeros(2048, width), None, 32)
    for noises in (4, 16, 64):
        yield Run(f"16 dimensions, {noises} channels", _linear(16, noises), _zeros(2048, 16), None, 32)
    for width in (8, 32, 128, 512):
        yield Run(f"network 4-{width}-4", _network(width), _zeros(2048, 4), None, 32)


def _call(run: Run, x0: Tensor, params: Tensor | None) -> Callable[[], object]:
    options = {"solver": sds.EulerMaruyama(), "seed": 0, "backend": "fused", **(run.options or {})}
    if params is not None:
        options["params"] = params
    return lambda: sds.solve(run.sde, x0, *run.span, run.steps, **options)


def measure(cases: Iterable[Run], seconds: float = 0.5) -> list[dict[str, Any]]:
    """Seconds and features of each: the least processor time of a call among several, in ``seconds`` for each."""
    found = []
    for run in cases:
        x0, params = run.start(), None if run.params is None else run.params()
        call = _call(run, x0, params)
        call()
        times: list[float] = []
        while len(times) < 3 or (sum(times) < seconds and len(times) < 200):
            begin = time.process_time()
            call()
            times.append(time.process_time() - begin)
        found.append({"run": run.name, "seconds": min(times), "features": features(run, x0, params)})
    return found


def priced(measured: list[dict[str, Any]]) -> dict[str, float]:
    """Seconds of each feature: non-negative least squares of relative errors."""
    names = list(dict.fromkeys(name for m in measured for name in m["features"]))
    rows = np.array([[m["features"].get(n, 0.0) / m["seconds"] for n in names] for m in measured])
    scale = rows.max(0)  # features differ by nine orders
    return dict(zip(names, (nnls(rows / scale, np.ones(len(rows)))[0] / scale).tolist(), strict=True))


def markdown(found: dict[str, Any]) -> str:
    """Prices, and measured beside predicted times."""
    lines = [f"{head(found['machine'] | {'date': found['date']})}.", "", "| price of | ns |", "|---|---|"]
    lines += [f"| {name} | {seconds * 1e9:.2g} |" for name, seconds in found["prices"].items()]
    lines += ["", "| run | predicted, ms | measured, ms | ratio | largest share |", "|---" * 5 + "|"]
    for m in found["runs"]:
        shares = {n: found["prices"].get(n, 0.0) * v for n, v in m["features"].items()}
        most = max(shares, key=lambda n: shares[n])
        guess = sum(shares.values())
        lines.append(
            f"| {m['run']} | {guess * 1e3:.3g} | {m['seconds'] * 1e3:.3g} | {guess / m['seconds']:.2f} | "
            f"{most}, {shares[most] / guess:.0%} |"
        )
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.costs", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--json", type=Path, default=ROOT / "benchmarks" / "results" / "costs.json")
    parser.add_argument("--into", type=Path, metavar="FILE", help="put the tables between this file's markers")
    parser.add_argument("--redraw", action="store_true", help="from the JSON file as it is, without measuring")
    options = parser.parse_args(argv)
    if not options.redraw:
        before = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            with torch.no_grad():
                rulers = list(yardsticks())
                rounds = [measure(rulers) for _ in range(3)]
                least = [min(same, key=lambda m: m["seconds"]) for same in zip(*rounds, strict=True)]
                predicted = measure(runs())
        finally:
            torch.set_num_threads(before)
        made = {"machine": describe(), "date": time.strftime("%Y-%m-%d"), "prices": priced(least), "runs": predicted}
        options.json.write_text(json.dumps(made, indent=1) + "\n")
    found = json.loads(options.json.read_text())
    print(markdown(found))
    if options.into:
        insert(options.into, options.json.name, markdown(found))


if __name__ == "__main__":
    main()
