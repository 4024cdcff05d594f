"""What the Triton kernels compile to: ``python -m sdesolve_kernels.report``, on any machine, with or without a GPU.

Compiles every kernel in every dtype ahead of time and prints registers, spills, local and shared memory, barriers,
widths of global accesses, and instructions per element (the counting rule is that of `_triton.aot.Figures`). The
committed table, ``report_table.json``, is what a test compares with. It has a part for each of some versions of Triton,
which compile the same kernel to different code.
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
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ._triton.arguments import Launch

__all__ = ["TABLE", "add_options", "architectures", "compare", "figures", "finish", "hold", "report", "show"]

TABLE = Path(__file__).parent / "report_table.json"
Row = dict[str, Any]
Found = dict[str, dict[str, Row]]
"""Figures by architecture and by kernel, shape and dtype."""
_WITHIN, _BETWEEN = 1.1, 1.25


def _ordered(triton: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", triton)[:3])


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


def architectures() -> tuple[int, ...]:
    """Compute capabilities times ten that this Triton's assembler knows, of those reported."""
    return (80, 90) if _ordered(version("triton")) < (3, 3) else (80, 90, 100)


def report(architectures: Iterable[int], only: str = "", jobs: int = 2) -> Found:
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
    found: Found = {}
    for (_, architecture), (label, row) in zip(work, rows, strict=True):
        found.setdefault(f"sm_{architecture}", {})[label] = row
    return found


def compare(new: dict[str, Row], old: dict[str, Row]) -> list[str]:
    """What got worse, of variants in both tables: figures by 10%; spills, local memory and narrow accesses at all."""
    complaints = []
    for label in new.keys() & old.keys():
        was, now = old[label], new[label]
        for figure in ("registers", "barriers", "shared", "accesses", "per_element", "once"):
            if now[figure] is not None and now[figure] > _WITHIN * (was[figure] or 0):
                complaints.append(f"{label}: {figure} {was[figure]} -> {now[figure]}")
        for figure in ("spills", "local"):
            if now[figure] > was[figure]:
                complaints.append(f"{label}: {figure} {was[figure]} -> {now[figure]} bytes")
        for figure in ("load_bits", "store_bits"):
            if now[figure] < was[figure]:
                complaints.append(f"{label}: {figure} {was[figure]} -> {now[figure]}")
    return sorted(complaints)


def hold(found: Found, triton: str, table: dict[str, Found]) -> list[str]:
    """What is worse than the table says.

    With a version of Triton that the table has, by `compare`. With another, `per_element` alone is held, to 25% more
    than with the last version before it (the first, if there is none). From one version in the tables to a later one it
    rises by up to 12%; what is outside the hot loop by up to 34%, as a compiler unrolls more; and registers, barriers
    and shared memory are traded for each other.

    Args:
        found: Figures by architecture and kernel.
        triton: Version of Triton that compiled them.
        table: The committed figures by version of Triton.
    """
    if triton in table:
        return [f"{a} {line}" for a, rows in found.items() for line in compare(rows, table[triton].get(a, {}))]
    before = [known for known in table if _ordered(known) < _ordered(triton)]
    nearest = max(before, key=_ordered) if before else min(table, key=_ordered)
    complaints = []
    for architecture, rows in found.items():
        old = table[nearest].get(architecture, {})
        for label in sorted(rows.keys() & old.keys()):
            was, now = old[label]["per_element"], rows[label]["per_element"]
            if now is not None and now > _BETWEEN * (was or 0):
                complaints.append(f"{architecture} {label}: per_element {was} (Triton {nearest}) -> {now} ({triton})")
    return complaints


def show(found: Found) -> None:
    """Prints them as tables."""
    for architecture, rows in found.items():
        print(f"\n### {architecture}\n")
        print("| kernel, shape, dtype | registers | spills | local | shared | barriers | load/store bits | accesses | "
              "per element | once |\n|---|---|---|---|---|---|---|---|---|---|")  # fmt: skip
        for label, r in rows.items():
            each = "" if r["per_element"] is None else f"{r['per_element']:.1f}"
            print(f"| {label} | {r['registers']} | {r['spills']} | {r['local']} | {r['shared']} | {r['barriers']} | "
                  f"{r['load_bits']}/{r['store_bits']} | {r['accesses']} | {each} | {r['once']} |")  # fmt: skip


def add_options(parser: argparse.ArgumentParser) -> None:
    """What every such report can do with its figures."""
    known = architectures()
    parser.add_argument("--arch", type=int, nargs="+", default=known, metavar="CC", help=", ".join(map(str, known)))
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there as well")
    parser.add_argument("--write", action="store_true", help="make this the committed table's part for this Triton")
    parser.add_argument("--check", action="store_true", help="exit with 1 if it is worse than the committed table")


def finish(found: Found, options: argparse.Namespace, file: Path) -> int:
    """Shows figures and does with them what the options say; ``file`` has the committed table. The exit status."""
    triton = version("triton")
    show(found)
    if options.json is not None:
        options.json.write_text(json.dumps({"triton": triton, "figures": found}))
    table: dict[str, Found] = json.loads(file.read_text())
    if options.write:
        table = dict(sorted({**table, triton: found}.items(), key=lambda item: _ordered(item[0])))
        text = json.dumps(table, indent=1)
        text = re.sub(r"\n {4,}|\n {3}(?=\})", " ", text)  # a kernel a line
        file.write_text(text.replace("{ ", "{").replace(" }", "}") + "\n")
    if not options.check:
        return 0
    worse = hold(found, triton, table)
    print("", *worse or ["no worse than the committed table"], sep="\n")
    if triton not in table:
        print(f"(which has no part for Triton {triton}, so that instructions per element alone were held, to 25%)")
    return bool(worse)


def main(arguments: list[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m sdesolve_kernels.report", description=__doc__.split("\n\n")[1])
    add_options(parser)
    parser.add_argument("--only", default="", metavar="REGEX", help="variants whose name matches")
    parser.add_argument("--jobs", type=int, default=2, help="processes (2)")
    options = parser.parse_args(arguments)
    return finish(report(options.arch, options.only, options.jobs), options, TABLE)


if __name__ == "__main__":
    sys.exit(main())
