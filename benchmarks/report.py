"""Result files: of pytest-benchmark, of `gpu`, and a smaller kind of our own."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

__all__ = ["OURS", "Record", "Report", "load"]

OURS = "sdesolve"
Record = dict[str, Any]


@dataclass(frozen=True)
class Report:
    """What a run found: rows by problem and contender, figures by name and contender."""

    machine: Record
    rows: dict[tuple[str, str], Record]
    figures: dict[tuple[str, str], Record] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)
    refused: list[Record] = field(default_factory=list)
    targets: list[Record] = field(default_factory=list)  # of a run on a GPU, with verdicts

    @staticmethod
    def of(infos: Iterable[Record], machine: Record, missing: dict[str, str], refused: list[Record]) -> Report:
        """From records that hold a row or a figure."""
        rows, figures = {}, {}
        for info in infos:
            if "row" in info:
                rows[info["row"]["problem"], info["row"]["contender"]] = info["row"]
            if "figure" in info:
                for who, value in info["figure"]["values"].items():
                    figures[info["figure"]["name"], who] = {"value": value, "unit": info["figure"]["unit"]}
        return Report(machine, rows, figures, missing, refused)

    def save(self, path: Path) -> None:
        """As a file that `load` takes."""
        infos: list[Record] = [{"row": row} for row in self.rows.values()]
        names = dict.fromkeys(name for name, _ in self.figures)
        for name in names:
            of = {who: f for (n, who), f in self.figures.items() if n == name}
            unit = next(iter(of.values()))["unit"]
            infos.append({"figure": {"name": name, "unit": unit, "values": {w: f["value"] for w, f in of.items()}}})
        found = {
            "machine": self.machine,
            "infos": infos,
            "missing": self.missing,
            "refused": self.refused,
            "targets": self.targets,
        }
        path.write_text(json.dumps(found, indent=None, separators=(",", ":")).replace('{"row"', '\n{"row"') + "\n")

    def suites(self) -> dict[str, dict[str, dict[str, Record]]]:
        """Rows by suite, problem and contender, as they came."""
        found: dict[str, dict[str, dict[str, Record]]] = {}
        for (problem, contender), row in self.rows.items():
            found.setdefault(row["suite"], {}).setdefault(problem, {})[contender] = row
        return found


def load(path: Path) -> Report:
    """A result file.

    Raises:
        OSError: it cannot be read.
        ValueError: it is of no kind known here, or not whole.
    """
    try:
        return _report(json.loads(path.read_text()), path)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON, or cut off: {error}") from error
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} lacks parts of a result file: {type(error).__name__}: {error}") from error


def _report(found: Any, path: Path) -> Report:
    if "infos" in found:
        report = Report.of(found["infos"], found["machine"], found["missing"], found["refused"])
        return dataclasses.replace(report, targets=found["targets"])
    if "benchmarks" in found:
        infos = [b["extra_info"] for b in found["benchmarks"]]
        kept = (
            *("processor", "cores", "cores_used", "keeps_freed_memory", "torch_threads", "python", "versions"),
            "environment",
        )
        machine = {name: found["machine_info"].get(name) for name in kept}
        machine["load_before"] = found.get("load_before")
        machine |= {"date": found["datetime"][:10], "commit": found["commit_info"].get("id", "")[:9]}
        return Report.of(infos, machine, found.get("missing", {}), found.get("refused", []))
    if "measurements" in found:
        machine = found["machine"] | {"date": found["date"], "processor": found["machine"].get("device", "?")}
        infos = [record for m in found["measurements"] for record in (m, *_from_device(m))]
        missing = dict(found.get("missing_peers", {}))
        missing |= {n: s["status"] for n, s in found.get("sections", {}).items() if s["status"] != "done"}
        if found.get("dropped"):
            missing["sections"] = f"no time was left for {'; '.join(found['dropped'])}"
        report = Report.of(infos, machine, missing, found.get("refused", []))
        return dataclasses.replace(report, targets=found.get("targets", []))
    raise ValueError(f"{path} is not from pytest --benchmark-json, benchmarks/gpu.py or benchmarks.compare --save")


def _from_device(m: Record) -> Iterable[Record]:
    """Rows of a record with ratios by name: ``eager / ours`` is one of times, ``of copy`` a share of a limit."""
    if "ratios" not in m or "dtype" not in m:
        return
    common = {"suite": m["section"], "problem": f"{m['case']}, {m['size']} {m['dtype']}"}
    ours = m.get("us", {}).get("ours") or m.get("us", {}).get("kernel")
    if ours:
        each = {"ns_per_unit": 1e3 * ours["median"], "unit": "call", "threads": 1, "ratio": [1.0, 1.0, 1.0]}
        yield {"row": {**common, "contender": OURS, **each}}
    for name, q in m["ratios"].items():
        values = [q["lower"], q["median"], q["upper"]]
        share = name.startswith("of ")
        contender = f"limit: {name[3:]}" if share else name.removesuffix(" / ours").removesuffix(" / kernel")
        yield {"row": {**common, "contender": contender, "ratio": values, **({"share": values} if share else {})}}
