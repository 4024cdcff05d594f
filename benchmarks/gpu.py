"""Checks every kernel on a GPU against the reference, then measures: one command, one JSON file, one table.

From the repository's root, on a machine with a GPU, a tree and no installation::

    PYTHONPATH=.:kernels python benchmarks/gpu.py --out gpu.json

and the same code on a machine without one, in a minute::

    PYTHONPATH=.:kernels python benchmarks/gpu.py --device cpu --quick --out cpu.json

In two calls of four minutes, the second of which takes over what the first found; what is measured anew takes the place
of what was there::

    PYTHONPATH=.:kernels python benchmarks/gpu.py --only checks large small memory trajectories --out gpu.json
    PYTHONPATH=.:kernels python benchmarks/gpu.py --only sampler compiled problems tools --after gpu.json --out gpu.json

A kernel is timed in a dtype only if every check of it in that dtype held; the rest goes on. The report is written every
few seconds, so a run that is killed keeps what it had; a section that fails leaves its traceback. The exit code is 1 if
anything of ours was wrong or failed, and 0 if all there was time for is right, goals reached or not. Parts are measured
from the most to the least telling, and what does not fit into ``--budget-seconds`` is dropped and named.

Needs torch, numpy and Triton; samplers, trajectories, the suite's problems and their scaling also what sdesolve
imports: scipy, safetensors, tqdm. All but torch, numpy, scipy and Triton are pure
Python or small wheels that can be carried along and put on PYTHONPATH; what is missing is named first thing, with the
sections that go without, and peers in the report. numba is needed for ``--device cpu`` only. On a CPU the "aot_eager"
backend of ``torch.compile`` stands in for the compiler.
"""

from __future__ import annotations

import argparse
import datetime
import functools
import hashlib
import importlib.util
import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

_NEEDED = {
    "kernels": ("torch", "numpy"),
    "kernels on a GPU": ("triton",),
    "kernels on a CPU": ("numba",),
    "sampler": ("scipy", "safetensors", "tqdm"),
}
_PARTS = ("checks", "large", "small", "memory", "trajectories", "sampler", "compiled", "problems", "scaling", "tools")
_WRITE_EVERY = 5.0  # seconds, at most, whose measurements a killed run loses
Record = dict[str, Any]
Work = Callable[[], Iterable[Record]]


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="where the JSON goes")
    parser.add_argument("--device", default="cuda", help='"cuda", or "cpu" as a stand-in')
    parser.add_argument("--quick", action="store_true", help="tiny sizes, few rounds: to see that everything runs")
    parser.add_argument("--tiny", action="store_true", help="with --quick: one dtype, one shape, launchers unchecked")
    parser.add_argument("--only", nargs="+", choices=_PARTS, metavar="PART", help=", ".join(_PARTS))
    parser.add_argument("--after", type=Path, help="report of an earlier call on the same tree, to go on from")
    parser.add_argument("--budget-seconds", type=float, default=220.0, help="what comes last is dropped to keep to it")
    parser.add_argument("--date", default=datetime.date.today().isoformat(), help="for the report")
    parser.add_argument("--jobs", type=int, default=max(1, min(12, (os.cpu_count() or 2) - 2)), help="check processes")
    parser.add_argument("--spoil", help="break this kernel's ops on purpose, to see its gate close")
    options = parser.parse_args(argv)
    options.only = tuple(options.only or _PARTS)
    if "checks" not in options.only and options.after is None:
        parser.error(
            "nothing is timed that was not checked: name checks too, or give the report of a call --after which"
        )
    return options


def _sources() -> str:
    """What the kernels are made from, and what checks them: checks of one tree say nothing about another."""
    root, digest = Path(__file__).parents[1], hashlib.sha256()
    for folder in ("kernels", "benchmarks"):
        for file in sorted((root / folder).rglob("*.py")):
            digest.update(file.read_bytes())
    return digest.hexdigest()


def _missing() -> dict[str, list[str]]:
    lacks = {use: [name for name in names if importlib.util.find_spec(name) is None] for use, names in _NEEDED.items()}
    return {use: names for use, names in lacks.items() if names}


class Run:
    """The report, the clock and the sections."""

    def __init__(self, options: argparse.Namespace, command: list[str]) -> None:
        self.options = options
        self._start = self._written = time.monotonic()
        shown = {name: str(value) if isinstance(value, Path) else value for name, value in vars(options).items()}
        self.report: Record = {
            "schema": 1, "complete": False, "command": command, "date": options.date, "options": shown,
            "missing": _missing(), "missing_peers": {}, "machine": {}, "checks": {}, "sections": {},
            "measurements": [], "refused": [], "dropped": [], "targets": [], "sources": _sources(), "calls": [],
        }  # fmt: skip
        if options.after is not None:
            self._go_on(json.loads(options.after.read_text()))
        self.report["calls"].append({"command": command, "date": options.date})

    def _go_on(self, earlier: Record) -> None:
        if earlier.get("sources") != self.report["sources"]:
            raise SystemExit(
                f"{self.options.after} is of another tree, whose checks do not hold here; run without --after"
            )
        for name in ("missing_peers", "checks", "sections", "measurements", "refused", "calls"):
            self.report[name] = earlier[name]
        self.report["dropped"] = [name for name in earlier["dropped"] if self._part(name) not in self.options.only]

    @staticmethod
    def _part(section: str) -> str:
        """The part that a section belongs to."""
        first = section.partition(",")[0].partition(":")[0]
        return "problems" if first == "problem" else first

    def left(self) -> float:
        """Seconds of the budget that are left."""
        return float(self.options.budget_seconds) - (time.monotonic() - self._start)

    def write(self) -> None:
        """The report as it is now, whole or not at all."""
        out: Path = self.options.out
        out.parent.mkdir(parents=True, exist_ok=True)
        draft = out.with_name(out.name + ".part")
        draft.write_text(json.dumps(self.report, indent=1, default=float) + "\n")
        draft.replace(out)
        self._written = time.monotonic()

    def section(self, name: str, work: Work, needs: float = 0.0) -> bool:
        """Whether a section ran; its records go to the report as they come.

        It is not run if its part was not asked for, and dropped if fewer than ``needs`` seconds are left.
        """
        if self._part(name) not in self.options.only:
            return False
        if self.left() < needs:
            self.report["dropped"].append(name)
            print(f"[{name}] dropped: {self.left():.0f} s left, {needs:.0f} needed", flush=True)
            return False
        # What an earlier call found under this name is measured anew.
        kept = [m for m in self.report["measurements"] if m.get("under") != name]
        self.report["measurements"][:] = kept
        start, before = time.monotonic(), len(kept)
        print(f"[{name}] {self.left():.0f} s left", flush=True)
        state: Record = {"status": "running"}
        self.report["sections"][name] = state
        try:
            for record in work():
                self.report["measurements"].append({**record, "under": name})
                if time.monotonic() - self._written > _WRITE_EVERY:
                    self.write()
                if self.left() < 0:
                    state["cut"] = True
                    self.report["dropped"].append(f"{name}: the rest")
                    break
            state["status"] = "done"
        except Exception:
            state["status"] = "failed"
            state["traceback"] = traceback.format_exc()
            print(state["traceback"], flush=True)
        state["seconds"] = round(time.monotonic() - start, 2)
        state["records"] = len(self.report["measurements"]) - before
        self.write()
        return True


def main(argv: list[str] | None = None) -> Record:
    """Runs it all and returns the report."""
    options = _arguments(argv)
    run = Run(options, [sys.executable, *sys.argv])
    missing = run.report["missing"]
    for use, names in missing.items():
        print(f"missing for {use}: {', '.join(names)}; carry them as wheels and put them on PYTHONPATH", flush=True)
    run.write()
    if "kernels" in missing or f"kernels on a {'CPU' if options.device == 'cpu' else 'GPU'}" in missing:
        raise SystemExit("nothing can run without these; see above")
    _sections(run)
    run.report["complete"] = not run.report["dropped"] and all(
        s["status"] == "done" for s in run.report["sections"].values()
    )
    run.write()
    from benchmarks.gpu_targets import table

    print(table(run.report), flush=True)
    return run.report


def _sections(run: Run) -> None:
    # After the check of what is missing: these import torch and the kernels.
    import torch

    from benchmarks.gpu_device import machine
    from benchmarks.gpu_measure import Size, compiled, large, memory, small
    from benchmarks.gpu_ops import CASES, spoil
    from benchmarks.gpu_targets import judge
    from benchmarks.gpu_worker import Gates

    options, report = run.options, run.report
    where = machine(options.device)
    report["machine"] = where.describe()
    print(json.dumps(report["machine"], indent=1), flush=True)
    run.write()
    if options.spoil:
        spoil(options.spoil)
    gates = Gates(report["checks"] if "checks" not in options.only else None)
    run.section("checks", functools.partial(_checks, run, gates))
    report["checks"] = gates.summary()
    run.write()

    quick, gpu = options.quick, not where.stand_in
    count = 3 if quick else 15
    main, dtypes = torch.float32, (torch.float32,) if options.tiny else (torch.float32, torch.bfloat16)
    units = 1 << 10 if quick else 1 << 20
    sizes = {n: Size(f"{n} {'KiB' if quick else 'MiB'}", bytes=n * units) for n in (64, 256, 1024)}
    shapes = (Size("CIFAR 64", shape=(64, 3, 32, 32)), Size("1k", shape=(64, 16)))[options.tiny :]
    backend = "inductor" if gpu else "aot_eager"
    refused: list[Record] = report["refused"]

    def add(section: str, size: Size, dtype: torch.dtype, work: Work, needs: float) -> None:
        name = f"{section}, {size.name}, {str(dtype).removeprefix('torch.')}"
        if run.section(name, work, needs if gpu else 0.0):
            where.release()  # of the states, which end with the section

    def add_large(size: Size, needs: float, check: bool = False) -> None:
        for dtype in dtypes:
            work = functools.partial(large, where, gates, size, dtype, count, refused, check)
            add("large", size, dtype, work, needs)
        report["machine"][f"clocks after {size.name}"] = where.clocks()

    def add_compiled(size: Size, needs: float) -> None:
        for dtype in dtypes:
            for case in CASES.values():
                if (
                    case.launcher
                    or not case.timed
                    or (options.tiny and case.kernel not in ("euler_maruyama_step", "dsm_loss"))
                ):
                    continue
                work = functools.partial(compiled, where, gates, case, size, dtype, count, backend, refused)
                add(f"compiled, {case.name}", size, dtype, work, needs)

    # The sizes that say most about the device's memory first; then what is short; comparisons with the compiler and
    # with others last, which is what goes when time is short.
    add_large(sizes[256], 10, check=True)
    add_large(sizes[1024], 15)
    add_large(sizes[64], 10)
    for size in shapes:
        for dtype in dtypes:
            work = functools.partial(small, where, gates, size, dtype, 3 if quick else 9, 4 if quick else 20, refused)
            add("small", size, dtype, work, 10)
    add("memory", sizes[256], main, functools.partial(memory, where, gates, sizes[256], main, refused), 5)
    if "sampler" in report["missing"]:
        report["sections"]["sampler"] = {"status": f"skipped: missing {report['missing']['sampler']}", "seconds": 0.0}
    else:
        run.section("trajectories", functools.partial(_trajectories, run, where), 45 if gpu else 0)
        run.section("sampler", functools.partial(_sampler, run, where), 25 if gpu else 0)
    add_compiled(sizes[256], 10)
    run.section("tools", functools.partial(_tools, where, options.quick), 40 if gpu else 0)
    if "sampler" not in report["missing"]:
        _contests(run, where)
    for size in shapes[quick:]:
        add_compiled(size, 15)
    report["checks"] = gates.summary()
    report["targets"] = judge(report["measurements"], refused, where.stand_in)


def _checks(run: Run, gates: Any) -> Iterator[Record]:
    """Fills the gates; measures nothing. In processes of their own on a GPU, in this one where the CPU stands in."""
    from benchmarks.gpu_device import machine
    from benchmarks.gpu_worker import in_processes, in_this_process, units

    options = run.options
    work = units(options.device == "cpu", options.quick)
    if options.tiny:
        work = [u for u in work if u["dtypes"] == ["float32"] and not u["suite"].startswith("launcher")]
    if options.device == "cpu":
        where = machine("cpu")
        for unit in work:
            if not unit["suite"].startswith("launcher"):
                gates.add(in_this_process(unit, where, options.quick))
        work = [u for u in work if u["suite"].startswith("launcher")]
    if work:
        seconds = max(30.0, 0.5 * run.left())
        for records in in_processes(work, options.device, options.quick, options.jobs, seconds, options.spoil):
            gates.add(records)
            run.report["checks"] = gates.summary()
            run.write()
    for name, gate in gates.summary()["gates"].items():
        state = "open" if gate["open"] else f"CLOSED: {gate['why']}"
        print(f"  {name}: {gate['passed']} hold, {gate['failed']} fail, {state}", flush=True)
    yield from ()


def _sampler(run: Run, where: Any) -> Iterator[Record]:
    from benchmarks.gpu_sampler import sampler

    quick = run.options.quick
    return sampler(where, batch=2 if quick else 64, steps=4 if quick else 100, channels=4 if quick else 64,
                   count=2 if quick else 7)  # fmt: skip


def _contests(run: Run, where: Any) -> None:
    from benchmarks.gpu_suite import contest, contests, scaling

    options, report = run.options, run.report
    needs = 0.0 if where.stand_in else 60.0  # all contenders of a problem, JAX's compiler among them
    for problem, names in contests(where, options.quick, options.tiny):
        work = functools.partial(
            contest, where, problem, names, options.quick, report["missing_peers"], report["refused"]
        )
        run.section(f"problem, {problem.name}", work, needs)
    run.section("scaling", functools.partial(scaling, where, options.quick, options.tiny), needs)


def _tools(where: Any, quick: bool) -> Iterator[Record]:
    from benchmarks.gpu_tools import tools

    return tools(where, quick)


def _trajectories(run: Run, where: Any) -> Iterator[Record]:
    from benchmarks.gpu_trajectories import trajectories

    return trajectories(where, run.options.quick, run.options.tiny, run.report["refused"])


def _ends_well(report: Record) -> bool:
    from benchmarks.gpu_targets import failures

    found = failures(report)
    for failure in found:
        print(f"FAILED: {failure}", flush=True)
    return not found


if __name__ == "__main__":
    sys.exit(not _ends_well(main()))
