"""Cost and memory against paths, steps, dimension and threads: slopes, and where fixed costs stop mattering.

``python -m benchmarks.scaling`` (three minutes; ``--quick`` for tiny sizes) writes ``assets/scaling.png`` and
``benchmarks/results/scaling_cpu.json``; with ``--redraw`` it measures nothing and draws what that file holds. Times are
fitted by ``T = fixed + each n``, least squares of relative errors; the slope is that of log T over the larger half of
the points; the knee, a dashed line, is ``fixed / each``, where both terms are alike.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from benchmarks.compare import head, insert, link
from benchmarks.ensembles import ensemble
from benchmarks.figures import peak_of
from benchmarks.registry import BASELINE, Missing, describe
from benchmarks.timing import keep_memory

__all__ = ["AXES", "Axis", "Fit", "fit", "main", "markdown", "memory", "picture", "summary", "sweep"]

ROOT = Path(__file__).parents[1]
Record = dict[str, Any]


class Axis(NamedTuple):
    """What grows, from where to where, and what stays."""

    label: str
    values: tuple[int, ...]
    paths: int
    steps: int
    width: int


_POWERS = tuple(4**k for k in range(2, 11))  # 16 to 2^20
AXES = {
    "paths": Axis("paths (x 256 steps, linear SDE)", _POWERS, 0, 256, 3),
    "steps": Axis("steps (x 1024 paths, linear SDE)", (16, 64, 256, 1024, 4096, 16384, 100_000), 1024, 0, 3),
    "dimension": Axis("dimension (8192 paths x 256 steps, OU)", (1, 2, 4, 8, 16, 32), 8192, 256, 0),
    "threads": Axis("threads (131,072 paths x 256 steps, linear SDE)", (), 131_072, 256, 3),
}
_MEMORY = {
    "paths": Axis("paths", tuple(4**k for k in range(7, 12)), 0, 64, 3),
    "steps": Axis("steps", (16, 256, 4096), 1 << 18, 0, 3),
    "dimension": Axis("dimension", (2, 8, 32), 1 << 18, 64, 0),
}
_CONTENDERS = (BASELINE, "torch loop", "jax scan", "torchsde")
_LONGEST = 2.0  # seconds a call: a contender that is slower stops there


class Fit(NamedTuple):
    """``T = fixed + each n``; the slope of its logarithm where n is large."""

    fixed: float
    each: float
    slope: float
    knee: float


def fit(values: list[int], seconds: list[float]) -> Fit:
    """Of at least three points; a fixed cost that would come out negative is none."""
    n, t = np.array(values, dtype=float), np.array(seconds)
    design = np.stack([1 / t, n / t], axis=1)
    (fixed, each), *_ = np.linalg.lstsq(design, np.ones_like(t), rcond=None)
    if fixed < 0:
        fixed, each = 0.0, float((n / t).sum() / ((n / t) ** 2).sum())
    upper = slice(len(values) // 2, None) if len(values) > 3 else slice(None)
    slope = float(np.polyfit(np.log(n[upper]), np.log(t[upper]), 1)[0])
    return Fit(float(fixed), float(each), slope, float(fixed / each) if each > 0 else math.inf)


def _seconds(call: Callable[[], object], synchronize: Callable[[], object], rounds: int) -> float:
    """Median, the first call left out."""
    call()
    synchronize()
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        repeats = 0
        while not repeats or time.perf_counter() - start < 2e-3:
            call()
            repeats += 1
            synchronize()
        times.append((time.perf_counter() - start) / repeats)
        if sum(times) > _LONGEST:
            break
    return statistics.median(times)


def _threads() -> tuple[int, ...]:
    most = torch.get_num_threads()
    return tuple(sorted({*(2**k for k in range(most.bit_length())), most}))


def sweep(
    device: torch.device, quick: bool, synchronize: Callable[[], object] = lambda: None,
    contenders: tuple[str, ...] = _CONTENDERS, axes: tuple[str, ...] = tuple(AXES),
) -> Iterator[Record]:  # fmt: skip
    """A record for each axis and contender: seconds at each value, and the fit. Results are checked by the suite."""
    before = torch.get_num_threads()
    for name, axis in ((name, AXES[name]) for name in axes):
        values = axis.values or (_threads() if device.type == "cpu" else ())
        for contender in contenders:
            if name == "threads" and contender != BASELINE:
                continue
            found: list[float] = []
            for value in values[:3] if quick else values:
                paths, steps, width = axis.paths or value, axis.steps or value, axis.width or value
                if name == "threads":
                    paths, steps, width = (axis.paths // 64 if quick else axis.paths), axis.steps, axis.width
                    torch.set_num_threads(value)
                model = "ou" if name == "dimension" else "linear"
                problem = ensemble(model, paths, steps, device, width=width)
                try:
                    found.append(_seconds(problem.contenders[contender](), synchronize, 3 if quick else 7))
                except Missing:
                    break
                finally:
                    problem.release()
                    torch.set_num_threads(before)
                if found[-1] > _LONGEST / 2:
                    break
            record: Record = {"axis": name, "label": axis.label, "contender": contender,
                              "values": list(values[: len(found)]), "seconds": found}  # fmt: skip
            if len(found) > 2 and name != "threads":
                record["fit"] = fit(record["values"], found)._asdict()
            if found:
                yield record


def memory(quick: bool, peak: Callable[[int, int, int], float] = peak_of) -> Iterator[Record]:
    """Peak bytes of a run to the last state, the start among them, against the same axes."""
    for name, axis in _MEMORY.items():
        values = axis.values[:2] if quick else axis.values
        found = [peak(axis.paths or v, axis.width or v, axis.steps or v) for v in values]
        start = [4.0 * (axis.paths or v) * (axis.width or v) for v in values]
        tensors = [b / s for b, s in zip(found, start, strict=True)]
        yield {"axis": name, "values": list(values), "bytes": found, "tensors_of_the_start": tensors}


def picture(records: list[Record], held: list[Record], path: Path) -> None:
    """Four panels of times and one of memory, all logarithmic."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 5, figsize=(19, 3.8), layout="constrained")
    names = dict.fromkeys(r["contender"] for r in records)
    colours = dict(zip(names, pyplot.get_cmap("tab10").colors, strict=False))  # type: ignore[attr-defined]
    for axis, name in zip(axes, AXES, strict=False):
        for r in (r for r in records if r["axis"] == name):
            label = r["contender"]
            if "fit" in r:
                label += f", slope {r['fit']['slope']:.2f}"
                n = np.geomspace(r["values"][0], r["values"][-1])
                axis.plot(n, r["fit"]["fixed"] + r["fit"]["each"] * n, color=colours[r["contender"]], lw=0.8)
                if r["contender"] == BASELINE and r["values"][0] < r["fit"]["knee"] < r["values"][-1]:
                    axis.axvline(r["fit"]["knee"], color="0.7", lw=0.8, ls="--")
            axis.plot(r["values"], r["seconds"], "o", ms=4, color=colours[r["contender"]], label=label)
        axis.set(xscale="log", yscale="log", xlabel=AXES[name].label, ylabel="s")
        axis.legend(fontsize=7)
    for r in held:
        axes[4].plot(np.array(r["values"]) / r["values"][0], r["tensors_of_the_start"], "o-", ms=4, label=r["axis"])
    axes[4].set(xscale="log", ylim=(0, 4), xlabel="growth of paths, steps or dimension",
                ylabel="peak memory, tensors of the start's size")  # fmt: skip
    axes[4].legend(fontsize=7)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def summary(records: list[Record], held: list[Record]) -> str:
    """A line for each axis and contender."""
    lines = []
    for r in records:
        last = f"{r['values'][0]} to {r['values'][-1]}: {r['seconds'][0]:.3g} to {r['seconds'][-1]:.3g} s"
        if "fit" in r:
            f = Fit(**r["fit"])
            last += f"; slope {f.slope:.2f}, fixed {f.fixed * 1e6:.3g} us, knee at {f.knee:.3g}"
        lines.append(f"{r['axis']:11}{r['contender']:14}{last}")
    for r in held:
        tensors = ", ".join(f"{t:.2f}" for t in r["tensors_of_the_start"])
        lines.append(f"{r['axis']:11}peak memory, in tensors of the start's size at {r['values']}: {tensors}")
    return "\n".join(lines)


def markdown(found: Record, plot: str) -> str:
    """For a page: machine, picture, fits and memory."""
    records, held = found["times"], found["memory"]
    lines = [f"{head(found['machine'] | {'date': found['date']})}.", "",
             f"![Cost and memory against paths, steps, dimension and threads]({plot})", "",
             "| axis | by | from, to | s | slope | fixed, us | knee |", "|---" * 7 + "|"]  # fmt: skip
    for r in records:
        f = Fit(**r["fit"]) if "fit" in r else None
        fitted = f"{f.slope:.2f} | {f.fixed * 1e6:.3g} | {f.knee:.3g}" if f else " | | "
        ends = f"{r['values'][0]}, {r['values'][-1]} | {r['seconds'][0]:.2g}, {r['seconds'][-1]:.2g}"
        lines.append(f"| {r['label']} | {r['contender']} | {ends} | {fitted} |")
    lines += ["", "| peak memory against | at | tensors of the start's size |", "|---|---|---|"]
    for r in held:
        tensors = ", ".join(f"{t:.2f}" for t in r["tensors_of_the_start"])
        lines.append(f"| {r['axis']} | {', '.join(map(str, r['values']))} | {tensors} |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scaling", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="tiny sizes")
    parser.add_argument("--json", type=Path, default=ROOT / "benchmarks" / "results" / "scaling_cpu.json")
    parser.add_argument("--plot", type=Path, default=ROOT / "assets" / "scaling.png")
    parser.add_argument("--into", type=Path, metavar="FILE", help="put the tables between this file's markers")
    parser.add_argument("--redraw", action="store_true", help="from the JSON file as it is, without measuring")
    options = parser.parse_args(argv)
    if not options.redraw:
        machine = {**describe(), "keeps_freed_memory": keep_memory()}
        records = list(sweep(torch.device("cpu"), options.quick))
        held = list(memory(options.quick)) if os.path.exists("/proc/self/clear_refs") else []
        measured = {"machine": machine, "date": time.strftime("%Y-%m-%d"), "times": records, "memory": held}
        options.json.write_text(json.dumps(measured, indent=1) + "\n")
    found = json.loads(options.json.read_text())
    picture(found["times"], found["memory"], options.plot)
    print(summary(found["times"], found["memory"]))
    if options.into:
        insert(options.into, options.json.name, markdown(found, link(options.plot, options.into)))


if __name__ == "__main__":
    main()
