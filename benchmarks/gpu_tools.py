"""Kernels under the vendor's tools: the sanitizer's checks of one shape a layout, and what the profiler counts.

Each runs in a process of its own, and is named as missing where the machine does not have it.
"""

from __future__ import annotations

import csv
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.gpu_device import Machine

__all__ = ["tools"]

Record = dict[str, Any]
_ROOT = Path(__file__).resolve().parents[1]
_CHECKS = ("memcheck", "racecheck")
# Whether a kernel waits for memory, for issue slots or for the unit of square roots and sines.
_METRICS = (
    "dram__throughput.avg.pct_of_peak_sustained_elapsed",
    "sm__inst_issued.avg.pct_of_peak_sustained_active",
    "sm__inst_executed_pipe_xu.avg.pct_of_peak_sustained_active",
    "lts__t_sector_hit_rate.pct",
    "gpu__time_duration.sum",
)
_PROFILED = """
import sys, torch, sdesolve_kernels as k
device, n = sys.argv[1], int(sys.argv[2])
x, f = torch.zeros(n, 1024, device=device), torch.ones(n, 1024, device=device)
for _ in range(2):
    k.normal(n, 1024, seed=1, out=x)
    k.euler_maruyama_step(x, f, 0.1, 0.1, seed=1, out=x)
    k.langevin_step(x, f, mode="batch", size=0.1, seed=1, out=x)
"""


def tools(where: Machine, quick: bool, seconds: float = 60.0) -> Iterator[Record]:
    """A record for each check of the sanitizer, and one for each kernel that the profiler saw."""
    yield from _sanitized(where, seconds)
    yield from _profiled(where, 4 if quick else 65536, seconds)


def _environment(where: Machine) -> dict[str, str]:
    search = os.pathsep.join(filter(None, [str(_ROOT), str(_ROOT / "kernels"), os.environ.get("PYTHONPATH", "")]))
    stand_in = {"TRITON_INTERPRET": "1"} if where.stand_in else {}
    return {**os.environ, **stand_in, "PYTHONPATH": search, "OMP_NUM_THREADS": "1"}


def _run(command: list[str], where: Machine, seconds: float) -> tuple[int, str]:
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, cwd=_ROOT, env=_environment(where), timeout=seconds, check=False
        )
    except subprocess.TimeoutExpired:
        return 124, f"not done in {seconds:.0f} s"
    return done.returncode, done.stdout + done.stderr


def _sanitized(where: Machine, seconds: float) -> Iterator[Record]:
    found = shutil.which("compute-sanitizer")
    unit = {"suite": "launcher", "dtypes": ["float32"], "shape": [3, 33], "thorough": False}
    order = json.dumps({"unit": unit, "device": str(where.device), "quick": True, "spoil": None})
    worker = [sys.executable, str(_ROOT / "benchmarks" / "gpu_worker.py"), order]
    for tool in _CHECKS:
        record: Record = {"section": "tools", "check": f"compute-sanitizer {tool}", "ok": True, "problem": ""}
        if found is None:
            yield {**record, "missing": "compute-sanitizer"}
            continue
        status, output = _run([found, "--tool", tool, "--error-exitcode", "9", *worker], where, seconds)
        yield {**record, "ok": status == 0, "problem": "" if status == 0 else output.strip()[-1000:]}


def _profiled(where: Machine, rows: int, seconds: float) -> Iterator[Record]:
    found = shutil.which("ncu")
    if found is None:
        yield {"section": "tools", "check": "ncu", "ok": True, "problem": "", "missing": "ncu"}
        return
    script = [sys.executable, "-c", _PROFILED, str(where.device), str(rows)]
    command = [found, "--csv", "--clock-control", "none", "--metrics", ",".join(_METRICS), *script]
    status, output = _run(command, where, seconds)
    lines = [line for line in output.splitlines() if line.startswith('"')]
    if status != 0 or not lines:
        yield {"section": "tools", "check": "ncu", "ok": False, "problem": output.strip()[-1000:]}
        return
    counted: dict[tuple[str, str], dict[str, float]] = {}
    for row in csv.DictReader(lines):
        value = row["Metric Value"].replace(",", "")
        counted.setdefault((row["ID"], row["Kernel Name"]), {})[row["Metric Name"]] = float(value)
    for (number, kernel), values in counted.items():
        yield {"section": "tools", "profiled": kernel, "launch": int(number), "values": values}
