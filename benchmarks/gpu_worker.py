"""Checks in processes of their own: a kernel that breaks the device's context takes down no other, and Triton compiles
on as many cores as there are.

A unit is one kernel's checks, or some of the self-check of the launchers; a worker prints a line of JSON a check.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu_checks import DTYPES, check_kernel, check_large, name_of
from benchmarks.gpu_device import Machine, machine
from benchmarks.gpu_ops import CASES, spoil

__all__ = ["KERNELS", "Gates", "in_processes", "in_this_process", "units"]

KERNELS = tuple(dict.fromkeys(case.kernel for case in CASES.values()))
_LARGE = (("perturb", torch.bfloat16), ("euler_maruyama_step", torch.float32), ("normal", torch.bfloat16))
_HERE = Path(__file__).resolve()
_ROOT = _HERE.parents[1]
# Of the launchers' self-check, one shape for each layout of the tiles: all of it compiles 3006 kernels, 0.3 s each. In
# every way for the two dtypes that are timed, values only for the others.
_LAYOUTS = ((5, 1), (3, 33), (3, 2, 5, 4), (2, 4104))
# Whose gate a check of the launchers closes, where they have names of their own: the op's that runs them.
_BELONGS = {
    "words": "normal", "uniform": "normal", "noise_product": "euler_maruyama_step", "scaled": "euler_maruyama_step",
}  # fmt: skip

Unit = dict[str, Any]
Record = dict[str, Any]


def units(stand_in: bool, quick: bool) -> list[Unit]:
    """What to check, the longest and the most telling first."""
    kernels = [name_of(dtype) for dtype in (DTYPES[:2] if quick else DTYPES)]
    found: list[Unit] = [{"suite": "large", "kernel": kernel, "dtypes": [name_of(dtype)]} for kernel, dtype in _LARGE]
    # The dtypes that are timed come first: a unit that is not done in time closes its gate.
    found += [{"suite": "op", "kernel": kernel, "dtypes": [dtype]} for dtype in kernels for kernel in KERNELS]
    if stand_in:  # Triton interprets: one shape, values only
        return [*found, {"suite": "launcher", "dtypes": ["float32"], "shape": [4, 3], "thorough": False}]
    for dtype in kernels:
        main = dtype in ("float32", "bfloat16")
        found.append({"suite": "launcher noise", "dtypes": [dtype]})
        found += [{"suite": "launcher", "dtypes": [dtype], "shape": list(shape), "thorough": main}
                  for shape in _LAYOUTS]  # fmt: skip
    return found


def run(unit: Unit, where: Machine, quick: bool) -> Iterator[Record]:
    """A unit's checks as records; then that each dtype is finished, or the traceback that stopped it."""
    for name in unit["dtypes"]:
        dtype = getattr(torch, name)
        label = {"suite": unit["suite"], "kernel": unit.get("kernel"), "dtype": name}
        start = time.perf_counter()
        try:
            if unit["suite"] == "op":
                yield from (check.record() for check in check_kernel(unit["kernel"], dtype, where, quick))
            elif unit["suite"] == "large":
                yield from (check.record() for check in check_large(unit["kernel"], dtype, where, quick))
            else:
                yield from _launchers(unit, dtype, where)
            yield {"finished": label, "seconds": round(time.perf_counter() - start, 2)}
        except Exception:
            yield {"error": traceback.format_exc(), **label}


def _launchers(unit: Unit, dtype: torch.dtype, where: Machine) -> Iterator[Record]:
    from sdesolve_kernels._triton import selfcheck

    if unit["suite"] == "launcher noise":
        checks = [*selfcheck.noise_checks(where.device, dtype), *selfcheck.batch_checks(where.device, dtype)]
    else:
        checks = list(selfcheck.step_checks(where.device, dtype, tuple(unit["shape"]), unit["thorough"]))
    for check in checks:
        kernel = check.name.split(":")[0].split("/")[0]
        yield {
            "kernel": _BELONGS.get(kernel, kernel), "dtype": check.dtype,
            "name": f"launcher: {check.name}", "shape": list(check.shape), "error": check.error,
            "budget": check.budget, "ok": check.ok,
        }  # fmt: skip


def in_this_process(unit: Unit, where: Machine, quick: bool) -> list[Record]:
    """A unit's records, without isolation."""
    return list(run(unit, where, quick))


def in_processes(
    work: list[Unit], device: str, quick: bool, jobs: int, seconds: float, spoiled: str | None
) -> Iterator[list[Record]]:
    """All units, `jobs` at a time; a unit that is not done in time, or dies, leaves what it found and an error."""
    deadline = time.monotonic() + seconds
    search = [str(_ROOT), str(_ROOT / "kernels"), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, search)), "OMP_NUM_THREADS": "1"}
    if device == "cpu":
        environment["TRITON_INTERPRET"] = "1"

    def one(unit: Unit) -> list[Record]:
        order = json.dumps({"unit": unit, "device": device, "quick": quick, "spoil": spoiled})
        with tempfile.TemporaryFile("w+") as lines, tempfile.TemporaryFile("w+") as errors:
            try:
                left = max(1.0, deadline - time.monotonic())
                done = subprocess.run([sys.executable, str(_HERE), order], stdout=lines, stderr=errors, env=environment,
                                      cwd=_ROOT, timeout=left, check=False)  # fmt: skip
                end = "" if done.returncode == 0 else f"worker ended with {done.returncode}"
            except subprocess.TimeoutExpired:
                end = "out of time"
            lines.seek(0)
            errors.seek(0)
            records = []
            for line in lines:
                if line.startswith("{") and line.endswith("}\n"):  # the last one may be cut off
                    records.append(json.loads(line))
            if end:
                label = {"suite": unit["suite"], "kernel": unit.get("kernel"), "dtype": unit["dtypes"][0]}
                records.append({"error": f"{end}\n{errors.read()[-3000:]}", **label})
            return records

    with ThreadPoolExecutor(jobs) as pool:
        yield from pool.map(one, work)


class Gates:
    """Which kernels may be timed, by dtype; closed until the op's own checks are done and hold."""

    def __init__(self, earlier: dict[str, Any] | None = None) -> None:
        """``earlier``: the `summary` of another call's, to go on from."""
        found: dict[str, Any] = earlier or {}
        gates = {tuple(name.split(" ")): gate for name, gate in found.get("gates", {}).items()}
        self._passed: dict[tuple[str, str], int] = {key: gate["passed"] for key, gate in gates.items()}
        self._finished: set[tuple[str, str]] = {key for key, gate in gates.items() if gate["why"] != "not checked"}
        self.failures: list[Record] = list(found.get("failures", []))
        self.errors: list[Record] = list(found.get("errors", []))

    def add(self, records: list[Record]) -> None:
        """Takes what checks found."""
        for record in records:
            if "error" in record and "ok" not in record:
                self.errors.append(record)
            elif "finished" in record:
                if record["finished"]["suite"] == "op":
                    self._finished.add((record["finished"]["kernel"], record["finished"]["dtype"]))
            elif record["ok"]:
                key = (record["kernel"], record["dtype"])
                self._passed[key] = self._passed.get(key, 0) + 1
            else:
                self.failures.append(record)

    def why_closed(self, kernel: str, dtype: str) -> str | None:
        """Why a kernel must not be timed; None if it may."""
        # A failure of the words, which have a dtype of their own, closes all dtypes.
        failed = [r for r in self.failures if r["kernel"] == kernel and r["dtype"] in (dtype, "int64")]
        if failed:
            first = failed[0]
            return (f"{len(failed)} checks failed, first {first['name']} {tuple(first['shape'])}: error "
                    f"{first['error']:.3g}, budget {first['budget']:.3g}")  # fmt: skip
        crashed = [r for r in self.errors if r.get("kernel") == kernel and r["dtype"] == dtype]
        if crashed:
            return "checks did not end: " + crashed[0]["error"].strip().splitlines()[-1][:200]
        if (kernel, dtype) not in self._finished:
            return "not checked"
        return None

    def close(self, check: Record) -> None:
        """Closes a gate by a check that failed later."""
        self.failures.append(check)

    def summary(self) -> dict[str, Any]:
        """For the report."""
        keys = sorted({*self._passed, *self._finished, *((r["kernel"], r["dtype"]) for r in self.failures)})
        gates: dict[str, Any] = {}
        for kernel, dtype in keys:
            why = self.why_closed(kernel, dtype) if dtype != "int64" else None
            failed = sum(r["kernel"] == kernel and r["dtype"] == dtype for r in self.failures)
            passed = self._passed.get((kernel, dtype), 0)
            gates[f"{kernel} {dtype}"] = {"passed": passed, "failed": failed, "open": why is None, "why": why}
        return {"gates": gates, "failures": self.failures[:200], "errors": self.errors}


def _main() -> None:
    order = json.loads(sys.argv[1])
    if order["spoil"]:
        spoil(order["spoil"])
    for record in run(order["unit"], machine(order["device"]), order["quick"]):
        print(json.dumps(record, default=float), flush=True)


if __name__ == "__main__":
    _main()
