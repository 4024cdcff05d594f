"""The figures that the project set itself, and whether a run reached them."""

from __future__ import annotations

from typing import Any, NamedTuple

__all__ = ["failures", "judge", "table"]

Record = dict[str, Any]


class Target(NamedTuple):
    """At least `wanted` of a ratio, at every size measured in its section that tells.

    `predicted` is what the machine code and the memory's bandwidth let expect before anything ran.
    """

    text: str
    wanted: float
    predicted: float
    section: str
    case: str
    dtype: str
    ratio: str


_L, _S, _T, _F = "large", "small", "trajectories", "float32"
# A step of the eager formula moves 44 bytes an element and draws a normal, which costs 6 more: 50 / 12 = 4.2 is the
# most that a kernel of 12 bytes can gain. A launch in a graph takes 1.5 us a node and 1 between nodes; a short run of
# `solve` has a fixed cost of .15 ms. What wanted more than these bounds allow was restated.
_TARGETS = (
    Target("euler_maruyama_step: copy bandwidth, float32", 0.90, 0.97, _L, "euler_maruyama_step", _F, "of copy"),
    Target(
        "euler_maruyama_step: copy bandwidth, bfloat16", 0.85, 0.90, _L, "euler_maruyama_step", "bfloat16", "of copy"
    ),
    Target("euler_maruyama_step: times eager (same formula)", 4.0, 4.2, _L, "euler_maruyama_step", _F, "eager / ours"),
    Target("the same step by linear_step: times eager predictor", 6.0, 6.5, _L, "linear_step", _F, "eager / ours"),
    Target("langevin_step: of its 16-byte roofline", 0.80, 0.88, _L, "langevin_step/batch", _F, "of copy"),
    Target("dsm_loss with gradient: of its 8-byte roofline", 0.85, 0.90, _L, "dsm_loss", _F, "of copy"),
    Target("the same by the launcher, one pass", 0.85, 0.93, _L, "dsm_loss/one pass", _F, "of copy"),
    Target("dsm_loss with gradient: times eager", 5.0, 7.0, _L, "dsm_loss", _F, "eager / ours"),
    Target("normal: write bandwidth", 0.90, 0.92, _L, "normal", _F, "of write"),
    Target("normal: times torch.randn", 1.4, 2.0, _L, "normal", _F, "randn / ours"),
    Target("trajectory: linear SDE, 8.39M x 256, in 6.5 ms", 1.0, 1.38, _T, "linear", _F, "6500 us / kernel"),
    Target("trajectory: stress, 1.72M x 10^4, in 0.25 s", 1.0, 0.89, _T, "stress", _F, "250000 us / kernel"),
    Target("trajectory: 8 to 1024 paths x 256, in 25 us", 1.0, 1.6, _T, "linear, few", _F, "25 us / kernel"),
    Target("trajectory: kernel over solve, 1M paths", 0.75, 0.80, _T, "linear, solve", _F, "kernel / solve"),
    Target("goal: langevin_step, times eager", 3.0, 3.1, _L, "langevin_step/batch", _F, "eager / ours"),
    Target("goal: small euler_maruyama_step, times eager", 1.2, 1.4, _S, "euler_maruyama_step", _F, "eager / ours"),
    Target(
        "goal: the same in a graph, times eager", 8.0, 8.5, _S, "euler_maruyama_step", _F, "eager / ours in a graph"
    ),
    Target("goal: small langevin_step, times eager", 1.5, 1.7, _S, "langevin_step/batch", _F, "eager / ours"),
)


def _tells(section: str, size: str) -> bool:
    """Whether a size is beyond what the device's cache keeps of a state that was just written."""
    return section != _L or not size.endswith("MiB") or int(size.split()[0]) >= 256


def judge(measurements: list[Record], refused: list[Record], stand_in: bool) -> list[Record]:
    """Each target with its worst size; a target without a measurement is not reached."""
    rows = []
    for target in _TARGETS:
        found = [
            m
            for m in measurements
            if (m["section"], m.get("case"), m.get("dtype")) == (target.section, target.case, target.dtype)
            and _tells(target.section, m["size"])
        ]
        values = {m["size"]: m["ratios"][target.ratio]["median"] for m in found if target.ratio in m["ratios"]}
        closed = [r["why"] for r in refused if (r["case"], r["dtype"]) == (target.case, target.dtype)]
        worst = min(values, key=lambda size: values[size]) if values else None
        got = values[worst] if worst is not None else None
        if stand_in:
            verdict = "not judged (no GPU)"
        elif closed:
            verdict = "refused: " + closed[0]
        elif got is None:
            verdict = "not measured"
        elif got >= target.wanted:
            verdict = "reached"
        else:
            verdict = f"missed by {100 * (1 - got / target.wanted):.1f}%"
        rows.append({"target": target.text, "wanted": target.wanted, "predicted": target.predicted, "got": got,
                     "worst_size": worst, "by_size": values, "verdict": verdict})  # fmt: skip
    return rows


def failures(report: Record) -> list[str]:
    """What was wrong or did not end: checks, sections, and results of ours. A peer that fails is no failure of ours."""
    checks = report["checks"]
    found = [f"{name}: {gate['why']}" for name, gate in checks.get("gates", {}).items() if not gate["open"]]
    found += [f"check of {f['kernel']} {f['dtype']}: {f['name']}" for f in checks.get("failures", [])]
    found += [f"{e['suite']} {e['kernel']} {e['dtype']} ended early" for e in checks.get("errors", [])]
    found += [f"section {name}" for name, s in report["sections"].items() if s["status"] in ("failed", "running")]
    found += [f"{m['section']}: {m['check']}" for m in report["measurements"] if not m.get("ok", True)]
    found += [f"{r['problem']} by {r['contender']}: {r['why']}" for r in report["refused"]
              if r.get("contender", "").startswith("sdesolve")]  # fmt: skip
    return found


def _number(value: float | None, digits: str = ".3g") -> str:
    return "-" if value is None else format(value, digits)


def _times(m: Record) -> str:
    parts = []
    for key, label in (("us", "us"), ("host_us", "host"), ("graph_us", "graph"), ("row_us", "in a row")):
        if key in m:
            parts.append(label + ": " + ", ".join(f"{name} {v['median']:.4g}" for name, v in m[key].items()))
    ratios = ", ".join(f"{name} {v['median']:.3g}" for name, v in m["ratios"].items())
    failed = f" | no graph: {m['graph_error'][:80]}" if "graph_error" in m else ""
    return f"{m['section']:9}{m['case']:30}{m['dtype']:9}{m['size']:9} {'; '.join(parts)} | {ratios}{failed}"


def table(report: Record) -> str:
    """Times, then the rest, the targets last: a terminal keeps the end."""
    lines = [_times(m) for m in report["measurements"] if "us" in m]
    for m in report["measurements"]:
        if "profiled" in m:
            lines.append(f"{m['section']:9}{m['profiled']:30} {_rounded(m['values'])}")
        elif "missing" in m:
            lines.append(f"{m['section']:9}{m['check']}: not run, {m['missing']} is not here")
        elif "check" in m:
            lines.append(f"{m['section']:9}{m['check']}: {'holds' if m['ok'] else m['problem']}")
        elif "tensors" in m:
            lines.append(f"{m['section']:9}{m['case']:30}{m['dtype']:9}{m['size']:9} tensors: {m['tensors']}")
        elif "ms" in m:
            medians = {name: round(v["median"], 3) for name, v in m["ms"].items()}
            lines.append(f"{m['section']:9}ms: {medians}; overhead {_rounded(m['overhead'])}")
        elif "row" in m and m["row"]["contender"] != "sdesolve":
            row = m["row"]
            lines.append(f"{m['section']:9}{row['problem']:40}{row['contender']:20} {row['ratio'][1]:.3g} x ours")
        elif "fit" in m:
            lines.append(f"{m['section']:9}{m['axis']:12}{m['contender']:20} {_rounded(m['fit'])}")
    gates = report["checks"].get("gates", {})
    closed = {name: gate["why"] for name, gate in gates.items() if not gate["open"]}
    passed, failed = (sum(gate[key] for gate in gates.values()) for key in ("passed", "failed"))
    lines.append(f"checks: {passed} hold, {failed} do not; {len(gates) - len(closed)} of {len(gates)} gates open")
    lines += [f"  closed: {name}: {why}" for name, why in closed.items()]
    lines += [f"  error: {e['suite']} {e['kernel']} {e['dtype']}: {e['error'].strip().splitlines()[-1][:150]}"
              for e in report["checks"].get("errors", [])]  # fmt: skip
    if report["refused"]:
        lines.append(f"not timed because their gates are closed: {len(report['refused'])} measurements")
    lines += [f"section {name}: {s['status']}" for name, s in report["sections"].items() if s["status"] != "done"]
    lines += [f"dropped for time: {name}" for name in report["dropped"]]
    lines += ["", f"{'target':54}{'wanted':>8}{'predicted':>10}{'got':>8}  {'worst at':9} verdict"]
    for t in report["targets"]:
        figures = f"{t['wanted']:>8}{t.get('predicted', '-'):>10}{_number(t['got']):>8}"
        lines.append(f"{t['target']:54}{figures}  {t['worst_size'] or '-':9} {t['verdict']}")
    return "\n".join(lines)


def _rounded(values: dict[str, float]) -> dict[str, float]:
    return {name: float(f"{value:.3g}") for name, value in values.items()}
