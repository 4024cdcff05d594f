"""What the Triton kernels compile to: ``python -m sdesolve_kernels.report``, on any machine, with or without a GPU.

Compiles every kernel in every dtype ahead of time and prints registers, spills, local and shared memory, barriers,
widths of global accesses, and instructions per element (the counting rule is that of `_triton.aot.Figures`). The
committed table, ``report_table.json``, is what a test compares with.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import functools
import hashlib
import json
import multiprocessing
import os
import re
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ._triton.arguments import Launch

__all__ = ["TABLE", "compare", "figures", "report", "show"]

TABLE = Path(__file__).parent / "report_table.json"
ARCHITECTURES = (80, 90, 100)
Row = dict[str, Any]
_TOLERANCE = 1.1


@functools.cache
def _variants() -> list[tuple[str, str, int, Launch]]:
    if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        raise RuntimeError("the report compiles kernels, and TRITON_INTERPRET interprets them; unset it")
    from ._triton.variants import variants

    return list(variants())


def _cache_folder() -> Path:
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "sdesolve" / "report"


def _row(index: int, architecture: int) -> tuple[str, Row]:
    name, dtype, itemsize, launch = _variants()[index]
    return f"{name} {dtype}", figures(launch, architecture, itemsize)


def figures(launch: Launch, architecture: int, itemsize: int) -> Row:
    """Figures of one launch, from the cache if its source, its constants, Triton and the counting are the same."""
    from ._triton import aot

    counting = Path(aot.__file__).read_bytes()
    content = (
        f"{aot.source(launch).hash()} {aot.TRITON_VERSION} {architecture} {itemsize} {launch.num_warps} {launch[4:]}"
    )
    file = _cache_folder() / f"{hashlib.sha256(content.encode() + counting).hexdigest()}.json"
    try:
        found: Row = json.loads(file.read_text())
        return found
    except (OSError, ValueError):
        pass
    row: Row = aot.measure(launch, architecture, itemsize)._asdict()
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=file.parent, delete=False) as new:
            json.dump(row, new)
        os.replace(new.name, file)
    except OSError:  # a cache that cannot be written costs time, no more
        pass
    return row


def report(architectures: Iterable[int] = ARCHITECTURES, only: str = "", jobs: int = 2) -> dict[str, dict[str, Row]]:
    """Figures by architecture and variant.

    Args:
        architectures: Compute capabilities times ten.
        only: Regular expression: variants in whose "name shape dtype" it is found.
        jobs: Processes that compile.
    """
    chosen = [i for i, (name, dtype, *_) in enumerate(_variants()) if re.search(only, f"{name} {dtype}")]
    work = [(index, architecture) for architecture in architectures for index in chosen]
    if jobs > 1:
        context = multiprocessing.get_context("spawn")
        with concurrent.futures.ProcessPoolExecutor(jobs, mp_context=context) as pool:
            rows = list(pool.map(_row, *zip(*work, strict=True), chunksize=4)) if work else []
    else:
        rows = [_row(*item) for item in work]
    found: dict[str, dict[str, Row]] = {}
    for (_, architecture), (label, row) in zip(work, rows, strict=True):
        found.setdefault(f"sm_{architecture}", {})[label] = row
    return found


def compare(new: dict[str, Row], old: dict[str, Row]) -> list[str]:
    """What got worse, of variants in both tables: figures by 10%; spills, local memory and narrow accesses at all."""
    complaints = []
    for label in new.keys() & old.keys():
        was, now = old[label], new[label]
        for figure in ("registers", "barriers", "shared", "accesses", "per_element", "once"):
            if now[figure] is not None and now[figure] > _TOLERANCE * (was[figure] or 0):
                complaints.append(f"{label}: {figure} {was[figure]} -> {now[figure]}")
        for figure in ("spills", "local"):
            if now[figure] > was[figure]:
                complaints.append(f"{label}: {figure} {was[figure]} -> {now[figure]} bytes")
        for figure in ("load_bits", "store_bits"):
            if now[figure] < was[figure]:
                complaints.append(f"{label}: {figure} {was[figure]} -> {now[figure]}")
    return sorted(complaints)


def show(found: dict[str, dict[str, Row]]) -> None:
    """Prints them as tables."""
    for architecture, rows in found.items():
        print(f"\n### {architecture}\n")
        print("| kernel, shape, dtype | registers | spills | local | shared | barriers | load/store bits | accesses | "
              "per element | once |\n|---|---|---|---|---|---|---|---|---|---|")  # fmt: skip
        for label, r in rows.items():
            each = "" if r["per_element"] is None else f"{r['per_element']:.1f}"
            print(f"| {label} | {r['registers']} | {r['spills']} | {r['local']} | {r['shared']} | {r['barriers']} | "
                  f"{r['load_bits']}/{r['store_bits']} | {r['accesses']} | {each} | {r['once']} |")  # fmt: skip


def main(arguments: list[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m sdesolve_kernels.report", description=__doc__.split("\n\n")[1])
    parser.add_argument("--arch", type=int, nargs="+", default=list(ARCHITECTURES), metavar="CC", help="80, 90, 100")
    parser.add_argument("--only", default="", metavar="REGEX", help="variants whose name matches")
    parser.add_argument("--jobs", type=int, default=2, help="processes (2)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there as well")
    parser.add_argument("--write", action="store_true", help="make this the committed table")
    parser.add_argument("--check", action="store_true", help="exit with 1 if it is worse than the committed table")
    options = parser.parse_args(arguments)
    from ._triton.aot import TRITON_VERSION

    found = report(options.arch, options.only, options.jobs)
    show(found)
    table = {"triton": TRITON_VERSION, "figures": found}
    for file in [options.json] * (options.json is not None) + [TABLE] * options.write:
        file.write_text(json.dumps(table, indent=1) + "\n")
    if options.check:
        committed = json.loads(TABLE.read_text())
        worse = [f"{architecture} {line}" for architecture, rows in found.items()
                 for line in compare(rows, committed["figures"].get(architecture, {}))]  # fmt: skip
        print("", *worse or ["no worse than the committed table"], sep="\n")
        if worse and committed["triton"] != TRITON_VERSION:
            print(f"(that table is from Triton {committed['triton']}, this is {TRITON_VERSION})")
        return bool(worse)
    return 0


if __name__ == "__main__":
    sys.exit(main())
