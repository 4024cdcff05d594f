"""Tables of result files, a picture, and what got worse between two.

::

    python -m benchmarks.compare A.json                    # table and goals
    python -m benchmarks.compare A.json --markdown         # the same as Markdown
    python -m benchmarks.compare cpu.json --into PAGE.md   # what lies between <!-- cpu.json --> and <!-- /cpu.json -->
    python -m benchmarks.compare A.json --plot ratios.png
    python -m benchmarks.compare A.json --save benchmarks/results/cpu.json   # without the times of single rounds
    python -m benchmarks.compare OLD.json NEW.json         # exits with 1 if a ratio fell, or a figure rose, too far
    python -m benchmarks.compare A.json B.json --agree     # exits with 1 if ratios differ too far either way

Files are those of ``pytest benchmarks --benchmark-json=``, of ``benchmarks/gpu.py`` and of ``--save``. A ratio is a
contender's time over ours in the same round, so a ratio that falls is a regression, whoever got faster. What only the
older file has is one too, unless ``--partial`` says that the newer run was to be shorter. Two machines are not compared
(exit code 2, as for files that cannot be read), unless ``--across`` says that this is wanted.
"""

from __future__ import annotations

import argparse
import itertools
import math
import os
import sys
from dataclasses import dataclass
from pathlib import Path

from benchmarks.report import OURS, Record, Report, load

__all__ = ["Change", "changes", "goals", "head", "insert", "link", "main", "markdown", "plot", "table"]

_LIMIT, _AGREE = 1.25, 1.15


def _kept_on_fewer(machine: Record) -> bool:
    return bool(machine.get("cores_used")) and machine["cores_used"] < machine["cores"]


def head(machine: Record) -> str:
    """A line: date, processor, cores and threads, load, versions."""
    names = ", ".join(f"{name} {v}" for name, v in machine.get("versions", {}).items() if v)
    threads = f", torch on {machine['torch_threads']} threads" if machine.get("torch_threads") else ""
    cores = f", {machine['cores_used']} of {machine['cores']} cores" if _kept_on_fewer(machine) else ""
    load = f", load {machine['load_before']} before the run" if machine.get("load_before") is not None else ""
    return f"{machine.get('date', 'now')}, {machine.get('processor', '?')}{cores}{threads}{load}; {names}"


def _span(values: list[float], digits: str = ".3g") -> str:
    low, middle, high = values
    return f"{middle:{digits}} ({low:{digits}} to {high:{digits}})"


def _cell(row: Record) -> str:
    if "share" not in row:
        return _span(row["ratio"])
    return f"{_span(row['share'], '.2f')} of {_limit(row)}"


def _limit(row: Record) -> str:
    if "limit" not in row:
        return "it"
    thousands = min(3, max(0, math.floor(math.log10(row["limit"]) / 3)))
    return f"{row['limit'] / 1000**thousands:.3g} {('', 'k', 'M', 'G')[thousands]}{row['limit_unit']}"


def table(report: Report) -> str:
    """For a terminal: rows, figures, what is missing or refused, goals."""
    lines = [head(report.machine)]
    for suite, problems in report.suites().items():
        lines += ["", f"{suite}"]
        for problem, contenders in problems.items():
            ours = contenders.get(OURS)
            per = f"{ours['ns_per_unit']:.4g} ns/{ours['unit']}, {ours['threads']} thr." if ours else ""
            lines.append(f"  {problem:52}{per}")
            lines += [f"      {name:24}{_cell(row)}" for name, row in contenders.items() if name != OURS]
    if report.figures:
        lines += ["", "figures"]
        lines += [f"  {name:36}{who:14}{f['value']:<10.4g}{f['unit']}" for (name, who), f in report.figures.items()]
    lines += [""] + [f"missing: {name} ({why})" for name, why in report.missing.items()]
    lines += [f"NOT TIMED, as its result is wrong: {_refused(r)}" for r in report.refused]
    verdicts = goals(report)
    if verdicts:
        lines += ["", f"{'goal':62}{'got':>8}"]
        lines += [f"{text:62}{got:>8}  {verdict}" for text, got, verdict in verdicts]
    return "\n".join(lines)


def _refused(r: Record) -> str:
    return f"{r.get('problem') or r.get('case')} by {r.get('contender', 'sdesolve')}: {r['why']}"


def markdown(report: Report, brief: bool = False) -> str:
    """Goals, a table for each suite, figures; or of the suites those alone whose problems are whole computations."""
    lines = [f"{head(report.machine)}.", "", "| goal | got | |", "|---|---|---|"]
    lines += [f"| {text} | {got} | {verdict} |" for text, got, verdict in goals(report)]
    for suite, problems in report.suites().items():
        if brief and suite not in ("ensembles", "generative", "problems"):
            continue
        names = dict.fromkeys(n for contenders in problems.values() for n in contenders if n != OURS)
        lines += ["", f"| {suite} | ns | " + " | ".join(names) + " |", "|---" * (len(names) + 2) + "|"]
        for problem, contenders in problems.items():
            ours = contenders.get(OURS)
            cells = [_brief(contenders.get(name)) for name in names]
            per = f"{ours['ns_per_unit']:.3g}" if ours else ""
            lines.append(f"| {problem} | {per} | " + " | ".join(cells) + " |")
    if report.figures and not brief:
        lines += ["", "| figure | of | | |", "|---|---|---|---|"]
        lines += [f"| {name} | {who} | {f['value']:.3g} | {f['unit']} |" for (name, who), f in report.figures.items()]
    lines += [""] + [f"Missing: {name} ({why})." for name, why in report.missing.items()]
    lines += [f"Not timed, as its result is wrong: {_refused(r)}." for r in report.refused]
    return "\n".join(lines)


def insert(file: Path, name: str, text: str) -> None:
    """Replaces what lies between the markers of a name.

    Raises:
        ValueError: they are not there, once each and in order.
    """
    first, last, whole = f"<!-- {name} -->", f"<!-- /{name} -->", file.read_text()
    before, found, rest = whole.partition(first)
    _, ended, after = rest.partition(last)
    if not (found and ended) or first in rest or last in after:
        raise ValueError(f"{file} must hold {first} and then {last}, once each")
    file.write_text(f"{before}{first}\n{text.strip()}\n{last}{after}")


def link(picture: Path, page: Path) -> str:
    """How a page names a picture."""
    return Path(os.path.relpath(picture, page.parent)).as_posix()


def _brief(row: Record | None) -> str:
    if row is None:
        return ""
    return f"{100 * row['share'][1]:.0f}% of {_limit(row)}" if "share" in row else f"{row['ratio'][1]:.3g}"


def _goal(target: dict[str, object]) -> str:
    """A goal of a GPU's, with what was expected before anything ran."""
    predicted = f", predicted {target['predicted']:g}" if "predicted" in target else ""
    return f"{target['target']}, at least {target['wanted']:g}{predicted}"


def goals(report: Report) -> list[tuple[str, str, str]]:
    """Each goal whose problem took part: what is wanted, what was found, and the verdict.

    None for a process that was kept from some of the machine's cores; a run of `gpu` has judged goals of its own.
    """
    if _kept_on_fewer(report.machine):
        return []
    found = [
        (
            _goal(t),
            "-" if t["got"] is None else f"{t['got']:.3g}",
            t["verdict"],
        )
        for t in report.targets
    ]
    if "stand_in" in report.machine:
        return found
    from benchmarks.suite import GOALS  # it takes a second: torch and all problems

    problems = {problem for problem, _ in report.rows} | {name for name, _ in report.figures}
    for goal in GOALS:
        if goal.problem not in problems:
            continue
        row, figure = (d.get((goal.problem, goal.contender)) for d in (report.rows, report.figures))
        if goal.most is not None:
            got = figure["value"] if figure else row["ns_per_unit"] if row else None
            met = got is not None and got <= goal.most
            wanted = f"at most {goal.most:g}"
        else:
            got = row["ratio"][1] if row else None
            met = got is not None and goal.least is not None and got >= goal.least
            wanted = f"at least {goal.least:g}"
        missed = f"missed, {wanted}" + (f": {goal.why}" if goal.why else "")
        verdict = "not measured" if got is None else "met" if met else missed
        rounded = "-" if got is None else f"{got:.3g}"
        if got is not None and not met and float(rounded) in (goal.most, goal.least):
            rounded = f"{got:.4g}"
        found.append((goal.text, rounded, verdict))
    return found


@dataclass(frozen=True)
class Change:
    """Of one figure between two files; more than 1 is better."""

    what: str
    before: float
    after: float
    factor: float

    def __str__(self) -> str:
        return f"{self.what:80}{self.before:10.4g}{self.after:10.4g}   {self.factor:6.2f}"


def changes(before: Report, after: Report, ratios_alone: bool = False) -> list[Change]:
    """Of every ratio and figure that both have, the worst first; shares of the machine's limits are left out."""
    found = []
    for key in before.rows.keys() & after.rows.keys():
        if key[1] == OURS or "share" in before.rows[key]:
            continue
        a, b = (report.rows[key]["ratio"][1] for report in (before, after))
        found.append(Change(": ".join(key), a, b, b / a))
    for key in set() if ratios_alone else before.figures.keys() & after.figures.keys():
        a, b = (report.figures[key]["value"] for report in (before, after))
        found.append(Change(": ".join(key), a, b, a / b if b else math.inf))
    return sorted(found, key=lambda change: change.factor)


def _gone(before: Report, after: Report, partial: bool = False) -> list[str]:
    """What was measured, and now is wrong, or is not there; with `partial` the former alone."""
    refused = {(r["problem"], r["contender"]): r["why"] for r in after.refused if "problem" in r}
    found = []
    for problem, who in (*before.rows, *before.figures):
        if (problem, who) in refused:
            found.append(f"{problem}: {who}: {refused[problem, who]}")
        elif not partial and (problem, who) not in after.rows.keys() | after.figures.keys():
            found.append(f"{problem}: {who}: {after.missing.get(who, 'not in the newer file')}")
    return found


def _apart(before: Report, after: Report) -> list[str]:
    """In what the machines of two reports differ, as far as both tell."""
    names = ("processor", "cores", "cores_used", "torch_threads", "keeps_freed_memory")
    pairs = ((name, before.machine.get(name), after.machine.get(name)) for name in names)
    return [f"{name}: {a}, then {b}" for name, a, b in pairs if a is not None and b is not None and a != b]


def _main(problem: str) -> bool:
    """Whether a picture shows it: layouts, dtypes and threads would make it long."""
    told = "float32" not in problem and "float64" not in problem and "float16" not in problem
    return told or problem.endswith(("4M float32", "1k float32"))


def plot(report: Report, path: Path) -> None:
    """Ratios with quartiles on a logarithmic axis, a panel for each suite."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    suites = {
        suite: {
            p: {n: r for n, r in c.items() if n != OURS and "share" not in r} for p, c in problems.items() if _main(p)
        }
        for suite, problems in report.suites().items()
    }
    suites = {suite: shown for suite, problems in suites.items() if (shown := {p: c for p, c in problems.items() if c})}
    if not suites:
        raise ValueError("no ratio to draw: the file has none of a peer, or none of a problem that the picture shows")
    heights = [len(problems) + 1 for problems in suites.values()]
    names = list(dict.fromkeys(n for problems in suites.values() for c in problems.values() for n in c))
    legend = 0.22 * max(0, math.ceil(len(names) / 4) - 3)  # the first three lines fit into the inch that is there
    figure, axes = pyplot.subplots(
        len(suites), figsize=(9, 0.28 * sum(heights) + 1 + legend), height_ratios=heights, sharex=True, squeeze=False,
        layout="constrained",
    )  # fmt: skip
    # The first ten strong ones, then their pale ones; from the 21st on again.
    pairs = pyplot.get_cmap("tab20").colors  # type: ignore[attr-defined]
    colours = dict(zip(names, itertools.cycle([*pairs[::2], *pairs[1::2]]), strict=False))
    for axis, (suite, problems) in zip(axes[:, 0], suites.items(), strict=True):
        for y, contenders in enumerate(problems.values()):
            for name, row in contenders.items():
                low, middle, high = row["ratio"]
                error = [[middle - low], [high - middle]]
                axis.errorbar(middle, y, xerr=error, fmt="o", ms=4, color=colours[name])
        axis.axvline(1.0, color="0.6", lw=1)
        axis.set(xscale="log", yticks=range(len(problems)), yticklabels=list(problems), title=suite)
        axis.tick_params(labelsize=7)
        axis.invert_yaxis()
    axes[-1, 0].set_xlabel("time over that of sdesolve in the same round")
    handles = [pyplot.Line2D([], [], marker="o", ls="", color=colours[n], label=n) for n in names]
    figure.legend(handles=handles, loc="outside upper center", ncols=4, fontsize=8)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def main(argv: list[str] | None = None) -> int:
    """The command line; 1 if something got worse than the limit allows, 2 if there is nothing to be said."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compare", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("files", type=Path, nargs="+", help="one result file, or the older and the newer")
    parser.add_argument("--markdown", action="store_true", help="tables for a page")
    parser.add_argument("--into", type=Path, metavar="FILE", help="put the short tables between this file's markers")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="a picture of the ratios")
    parser.add_argument("--save", type=Path, metavar="FILE", help="the same in a smaller file")
    parser.add_argument("--limit", type=float, help=f"largest factor by which a ratio may fall; {_LIMIT} by default")
    parser.add_argument("--agree", action="store_true", help=f"either way, and {_AGREE} by default")
    parser.add_argument("--partial", action="store_true", help="the newer file may lack what the older one has")
    parser.add_argument("--across", action="store_true", help="compare files of different machines all the same")
    options = parser.parse_args(argv)
    if len(options.files) > 2:
        parser.error(f"one or two files, got {len(options.files)}")
    if len(options.files) == 1 and (options.agree or options.limit is not None):
        parser.error("--agree and --limit compare two files, got one")
    limit = options.limit if options.limit is not None else _AGREE if options.agree else _LIMIT
    if not limit > 1:
        parser.error(f"--limit must be greater than 1, got {limit}")
    try:
        reports = [load(path) for path in options.files]
        if len(reports) == 2 and not options.across and (apart := _apart(*reports)):
            raise ValueError(f"two machines, whose ratios differ anyway ({'; '.join(apart)}); --across compares them")
        if options.plot:
            plot(reports[-1], options.plot)
        if options.save:
            reports[-1].save(options.save)
        if options.into:
            shown = markdown(reports[-1], brief=True)
            if options.plot:
                shown += f"\n\n![Time of each contender over ours]({link(options.plot, options.into)})"
            insert(options.into, options.files[-1].name, shown)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    if len(reports) == 1:
        print(markdown(reports[0]) if options.markdown else table(reports[0]))
        return 0
    return _verdict(*reports, limit, options.agree, options.partial)


def _verdict(before: Report, after: Report, limit: float, both_ways: bool, partial: bool) -> int:
    print(f"before: {head(before.machine)}\nafter:  {head(after.machine)}\n")
    found, gone = changes(before, after, ratios_alone=both_ways), _gone(before, after, partial)
    bad = [c for c in found if not c.factor >= 1 / limit or (both_ways and c.factor > limit)]  # nan is bad
    print(f"{'better is more than 1':80}{'before':>10}{'after':>10}   factor")
    print("\n".join(map(str, found)))
    if found:
        worst = max(found, key=lambda c: abs(math.log(c.factor)))
        print(f"\nlargest difference: a factor of {max(worst.factor, 1 / worst.factor):.2f}, {worst.what}")
    for change in bad:
        print(f"BEYOND {limit:g}: {change.what}: {change.before:.4g}, then {change.after:.4g}")
    for name in gone:
        print(f"GONE: {name}")
    print(f"{len(found)} compared, {len(bad)} beyond a factor of {limit:g}, {len(gone)} gone")
    return int(bool(bad or gone or not found))


if __name__ == "__main__":
    sys.exit(main())
