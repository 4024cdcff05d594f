"""Tables, goals, regressions and scaling fits, on results made up for the purpose; and one true run of the suite."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import compare, gpu_targets, report, scaling

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"
GOAL = "linear, 8192 x 256"


def row(contender, ratio, problem=GOAL, **more):
    return {"row": {
        "suite": "ensembles", "problem": problem, "contender": contender, "unit": "component-step", "work": 1.0,
        "seconds": [0.9, 1.0, 1.1], "ratio": [0.9 * ratio, ratio, 1.2 * ratio], "ns_per_unit": 0.33, "rounds": 9,
        "threads": 2, **more,
    }}  # fmt: skip


def figure(value):
    return {"figure": {"name": "16 paths, a step", "unit": "us", "values": {"sdesolve": value}}}


def written(path, infos, refused=(), **machine):
    made = {
        "machine_info": {"processor": "a processor", "versions": {"torch": "2.13", "jax": None}, **machine},
        "datetime": "2026-11-23T00:00:00", "commit_info": {"id": "0123456789abcdef"},
        "benchmarks": [{"extra_info": info} for info in infos], "missing": {"diffrax": "not installed: diffrax"},
        "refused": list(refused),
    }  # fmt: skip
    path.write_text(json.dumps(made))
    return path


REST = (
    row("sdesolve", 1.0), row("jax scan", 8.2),
    row("limit: noise", 0.9, share=[0.8, 0.9, 1.0], limit=2.5e9, limit_unit="normals/s"),
)  # fmt: skip


@pytest.fixture
def before(tmp_path):
    return written(tmp_path / "before.json", [row("torch loop", 8.8), figure(1.2), *REST])


def test_a_table_says_what_was_met_missed_and_missing(before, capsys):
    assert compare.main([str(before)]) == 0
    shown = capsys.readouterr().out
    assert "a processor" in shown
    assert "8.8 (7.92 to 10.6)" in shown
    assert "missing: diffrax (not installed: diffrax)" in shown
    verdicts = {text: verdict for text, _, verdict in compare.goals(report.load(before))}
    assert verdicts["linear SDE, 8192 paths: 8 x torch loop"] == "met"
    assert verdicts["linear SDE, 8192 paths: 25 x jax scan"].startswith("missed, at least 25: ")
    assert verdicts["linear SDE, 8192 paths: 25 x diffrax"] == "not measured"
    assert all(text in shown and verdict in shown for text, verdict in verdicts.items())
    assert len(verdicts) == 6


def test_a_figure_has_to_be_small(tmp_path):
    for value, verdict in ((5.0, "met"), (5.1, "missed, at most 5")):
        file = written(tmp_path / "figure.json", [figure(value)])
        assert compare.goals(report.load(file)) == [("16 paths: us per step, all told", f"{value:.3g}", verdict)]


def test_goals_are_for_all_cores(tmp_path, capsys):
    for used in (1, 2):
        file = written(tmp_path / "figure.json", [figure(5.0)], cores=2, cores_used=used)
        assert compare.main([str(file)]) == 0
        assert ("1 of 2 cores" in (shown := capsys.readouterr().out)) == (used == 1)
        assert ("16 paths: us per step, all told" in shown) == (used == 2)


def test_markdown_has_a_column_for_each_contender(before, capsys):
    assert compare.main([str(before), "--markdown"]) == 0
    shown = capsys.readouterr().out
    assert "| ensembles | ns | torch loop | jax scan | limit: noise |" in shown
    assert "| linear, 8192 x 256 | 0.33 | 8.8 | 8.2 | 90% of 2.5 Gnormals/s |" in shown


@pytest.mark.parametrize(
    ("infos", "options", "code"),
    [
        ([row("torch loop", 8.0), figure(1.2)], [], 0),
        ([row("torch loop", 6.9), figure(1.2)], [], 1),
        ([row("torch loop", 6.9), figure(1.2)], ["--limit", "1.3"], 0),
        ([row("torch loop", 12.0), figure(1.2)], [], 0),
        ([row("torch loop", 12.0), figure(1.2)], ["--agree"], 1),
        ([row("torch loop", 9.9), figure(1.2)], ["--agree"], 0),
        ([row("torch loop", 8.8), figure(1.6)], [], 1),
        ([row("torch loop", 8.8), figure(1.6)], ["--agree"], 0),
        ([row("torch loop", 8.8), figure(0.6)], [], 0),
        ([row("torch loop", float("nan")), figure(1.2)], [], 1),
        ([row("other", 8.8)], ["--partial"], 1),
    ],
    ids=[
        "a little less", "fell", "fell within a limit", "rose", "rose, and was to agree", "agrees", "figure rose",
        "figure rose, and is no ratio", "figure fell", "not a number", "nothing to compare",
    ],
)  # fmt: skip
def test_a_regression_is_what_fell_too_far(before, tmp_path, capsys, infos, options, code):
    after = written(tmp_path / "after.json", [*infos, *(() if "--partial" in options else REST)])
    assert compare.main([str(before), str(after), *options]) == code
    assert ("BEYOND" in capsys.readouterr().out) == (code == 1 and "other" not in str(infos))


def test_what_is_wrong_now_is_a_regression(before, tmp_path, capsys):
    refused = [{"problem": GOAL, "contender": "torch loop", "why": "the mean is off"}]
    after = written(tmp_path / "after.json", [row("jax scan", 8.2)], refused)
    for options in ([], ["--partial"]):
        assert compare.main([str(before), str(after), *options]) == 1
        assert f"GONE: {GOAL}: torch loop: the mean is off" in capsys.readouterr().out
    assert compare.main([str(after)]) == 0
    assert "NOT TIMED" in capsys.readouterr().out


def test_what_was_not_measured_again_is_a_regression(before, tmp_path, capsys):
    whole = [row("torch loop", 8.8), figure(1.2), *REST]
    assert compare.main([str(before), str(written(tmp_path / "after.json", whole))]) == 0
    for left_out in range(len(whole)):
        after = written(tmp_path / "after.json", whole[:left_out] + whole[left_out + 1 :])
        assert compare.main([str(before), str(after)]) == 1
        assert capsys.readouterr().out.count("GONE: ") == 1
        assert compare.main([str(before), str(after), "--partial"]) == 0
    after = written(tmp_path / "after.json", [row("diffrax", 9.0), *whole])
    assert compare.main([str(after), str(before)]) == 1
    assert f"GONE: {GOAL}: diffrax: not installed: diffrax" in capsys.readouterr().out


def test_two_machines_are_not_compared_unawares(before, tmp_path, capsys):
    after = written(tmp_path / "after.json", [row("torch loop", 8.8), figure(1.2), *REST], processor="another")
    with pytest.raises(SystemExit) as ended:
        compare.main([str(before), str(after)])
    assert ended.value.code == 2
    assert "processor: a processor, then another" in capsys.readouterr().err
    assert compare.main([str(before), str(after), "--across"]) == 0


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (None, "No such file"), ("", "is not JSON"), ('{"benchmarks": [', "cut off"), ("[]", "is not from"),
        ("3", "lacks parts"), ('{"benchmarks": []}', "lacks parts"), ('{"infos": [{"row": {}}]}', "lacks parts"),
    ],
)  # fmt: skip
def test_a_file_that_cannot_be_read_is_named(before, tmp_path, capsys, text, said):
    file = tmp_path / "torn.json"
    if text is not None:
        file.write_text(text)
    for files in ([file], [before, file], [file, before]):
        with pytest.raises(SystemExit) as ended:
            compare.main(list(map(str, files)))
        assert ended.value.code == 2
        shown = capsys.readouterr().err
        assert said in shown
        assert "torn.json" in shown


@pytest.mark.parametrize("options", [["--limit", "0"], ["--limit", "1"], ["--limit", "nan"]])
def test_a_limit_that_allows_nothing_is_refused(before, options):
    for files in ([before, before], [before]):
        with pytest.raises(SystemExit) as ended:
            compare.main([*map(str, files), *options])
        assert ended.value.code == 2


def test_a_picture_has_a_colour_for_everybody(tmp_path, capsys):
    many = [row(f"contender {n}", 1.0 + n) for n in range(25)]
    file = written(tmp_path / "many.json", [*many, row("eager", 3.0, problem="a, 2k float64", suite="none is shown")])
    assert compare.main([str(file), "--plot", str(tmp_path / "ratios.png")]) == 0
    for infos in ([figure(1.2)], list(REST[::2])):
        with pytest.raises(SystemExit):
            compare.main([str(written(tmp_path / "none.json", infos)), "--plot", str(tmp_path / "none.png")])
        assert "no ratio to draw" in capsys.readouterr().err


def test_a_saved_file_is_read_back(before, tmp_path):
    kept = tmp_path / "kept.json"
    assert compare.main([str(before), "--save", str(kept), "--plot", str(tmp_path / "ratios.png")]) == 0
    first, second = report.load(before), report.load(kept)
    assert first == second
    assert (tmp_path / "ratios.png").stat().st_size > 10_000


def test_a_report_from_a_gpu_has_the_same_rows(tmp_path):
    q = {"lower": 5.0, "median": 6.0, "upper": 7.0}
    measured = {
        "section": "large", "case": "perturb", "size": "64 MiB", "dtype": "float32", "us": {"ours": q},
        "ratios": {"eager / ours": q, "of copy": {"lower": 0.8, "median": 0.9, "upper": 0.95}},
    }  # fmt: skip
    file = tmp_path / "gpu.json"
    found = {"machine": {"device": "a GPU"}, "date": "2026-11-23", "measurements": [measured, row("torch loop", 9.0)]}
    file.write_text(json.dumps(found))
    rows = report.load(file).rows
    assert rows["perturb, 64 MiB float32", "eager"]["ratio"] == [5.0, 6.0, 7.0]
    assert rows["perturb, 64 MiB float32", "limit: copy"]["share"][1] == 0.9
    assert rows[GOAL, "torch loop"]["ratio"][1] == 9.0


def test_goals_of_a_cpu_are_not_for_a_gpu(tmp_path):
    file = tmp_path / "gpu.json"
    target = {"target": "normal: write bandwidth", "wanted": 0.9, "got": 0.95, "verdict": "reached"}
    found = {"machine": {"device": "a GPU", "stand_in": False}, "date": "2026-11-23", "targets": [target],
             "measurements": [row("sdesolve", 1.0), row("torch loop", 9.0), row("diffrax", 9.0)]}  # fmt: skip
    file.write_text(json.dumps(found))
    assert compare.goals(report.load(file)) == [("normal: write bandwidth, at least 0.9", "0.95", "reached")]


def test_what_a_gpu_run_had_no_time_for_is_named(tmp_path, capsys):
    file = tmp_path / "gpu.json"
    sections = {"checks": {"status": "done"}, "sampler": {"status": "failed"}, "scaling": {"status": "running"}}
    found = {"machine": {"device": "a GPU", "stand_in": False}, "date": "2026-11-23", "targets": [],
             "sections": sections, "measurements": [row("torch loop", 9.0)],
             "dropped": ["large, 1024 MiB, float32", "trajectories"],
             "missing_peers": {"diffrax": "not installed: diffrax"}}  # fmt: skip
    file.write_text(json.dumps(found))
    for options in ([], ["--markdown"]):
        assert compare.main([str(file), *options]) == 0
        shown = capsys.readouterr().out.lower()
        for what in ("diffrax (not installed: diffrax)", "sampler (failed)", "scaling (running)",
                     "sections (no time was left for large, 1024 mib, float32; trajectories)"):  # fmt: skip
            assert f"missing: {what}" in shown


@pytest.mark.parametrize(
    ("limit", "shown"),
    [(2.5e9, "2.5 Gnormals/s"), (27.4e6, "27.4 Mnormals/s"), (4087.0, "4.09 knormals/s"), (0.5, "0.5 normals/s")],
)
def test_limits_have_the_prefix_that_fits(limit, shown):
    assert compare._limit({"limit": limit, "limit_unit": "normals/s"}) == shown


def test_tables_go_between_markers(before, tmp_path, capsys):
    page = tmp_path / "page.md"
    page.write_text("above\n<!-- before.json -->\nstale\n<!-- /before.json -->\nbelow\n")
    for _ in range(2):
        assert compare.main([str(before), "--into", str(page)]) == 0
    text = page.read_text()
    assert text.startswith("above\n<!-- before.json -->\n2026-11-23, a processor")
    assert text.endswith("<!-- /before.json -->\nbelow\n")
    assert "stale" not in text
    assert text.count("| linear, 8192 x 256 | 0.33 |") == 1
    page.write_text("nothing here")
    with pytest.raises(SystemExit):
        compare.main([str(before), "--into", str(page)])
    assert "must hold" in capsys.readouterr().err


def block(name):
    """Of the page on performance, between the markers of a name."""
    return (ROOT / "docs" / "performance.md").read_text().split(f"<!-- {name} -->\n")[1].split(f"\n<!-- /{name} -->")[0]


def test_the_tables_that_are_shown_are_those_of_the_files():
    """What `make bench-record` writes; by the commands in the heads of `compare` and `scaling`, without measuring."""
    kept = report.load(RESULTS / "cpu.json")
    whole, short = compare.markdown(kept), compare.markdown(kept, brief=True)
    assert (RESULTS / "cpu.md").read_text() == f"{whole}\n"
    assert block("cpu.json") == f"{short}\n\n![Time of each contender over ours](../assets/ratios.png)".strip()
    found = json.loads((RESULTS / "scaling_cpu.json").read_text())
    assert block("scaling_cpu.json") == scaling.markdown(found, "../assets/scaling.png").strip()
    if not (RESULTS / "gpu.json").exists():
        shown = block("gpu.json").splitlines()
        for target in gpu_targets.judge([], [], stand_in=False):
            goal = f"{target['target']}, at least {target['wanted']:g}, predicted {target['predicted']:g}"
            assert f"| {goal} | - | not measured yet |" in shown


def test_what_is_missed_has_a_reason():
    for text, got, verdict in compare.goals(report.load(RESULTS / "cpu.json")):
        if verdict not in ("met", "not measured"):
            assert verdict.startswith("missed, at ")
            assert ": " in verdict, text
            assert got not in verdict.split(":")[0].split(), f"{text}: {got} looks as if it were met"


def test_scaling_is_drawn_again_without_measuring(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(scaling, "sweep", None)
    file = tmp_path / "scaling_cpu.json"
    file.write_text((RESULTS / "scaling_cpu.json").read_text())
    scaling.main(["--redraw", "--json", str(file), "--plot", str(tmp_path / "scaling.png")])
    assert "peak memory" in capsys.readouterr().out
    assert (tmp_path / "scaling.png").stat().st_size > 10_000


def test_another_file_is_refused(tmp_path):
    file = tmp_path / "other.json"
    file.write_text("{}")
    with pytest.raises(ValueError, match="is not from"):
        report.load(file)


def test_fits_find_cost_slope_and_knee():
    n = [4**k for k in range(2, 11)]
    found = scaling.fit(n, [1e-3 + 2e-6 * v for v in n])
    assert found.fixed == pytest.approx(1e-3)
    assert found.each == pytest.approx(2e-6)
    assert found.knee == pytest.approx(500.0)
    assert 0.9 < found.slope < 1.0
    free = scaling.fit(n, [2e-6 * v * (1 + 0.01 * (v == 16)) for v in n])
    assert free.fixed == pytest.approx(0.0, abs=1e-6)
    assert scaling.fit(n, [3e-7 * v**1.5 for v in n]).slope == pytest.approx(1.5)


@pytest.fixture(scope="module")
def suite(tmp_path_factory):
    """The command that runs a little of the suite, what that printed, and its file."""
    out = tmp_path_factory.mktemp("suite") / "out.json"
    # pytest-benchmark times nothing in what it takes for a worker of pytest-xdist
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    environment |= {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "benchmarks/test_suite.py", "--hasty", "-q", "-p", "no:cacheprovider",
               "-k", "(normal and 1024 and x and 2 and float32 and not 4096)", f"--benchmark-json={out}"]  # fmt: skip
    start = functools.partial(subprocess.run, capture_output=True, text=True, cwd=ROOT, env=environment)
    done = start(command)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return command, start, done, out


def test_the_suite_runs_and_leaves_a_file(suite):
    """Rounds shared by contenders, times told to pytest-benchmark, what is missing or wrong in the file."""
    *_, done, out = suite
    found = json.loads(out.read_text())
    assert "load_before" not in found["machine_info"]  # or pytest-benchmark takes any two runs for two machines
    assert report.load(out).machine["load_before"] >= 0
    assert "node" not in found["machine_info"]
    assert found["machine_info"]["versions"]["torch"]
    made = report.load(out)
    name = "normal, 1024 x 2 float32"
    for contender in ("sdesolve", "torch"):
        (entry,) = (b for b in found["benchmarks"] if b["name"] == f"test_problem[{name}: {contender}]")
        assert entry["stats"]["rounds"] == made.rows[name, contender]["rounds"]
        assert entry["stats"]["median"] == pytest.approx(made.rows[name, contender]["seconds"][1], rel=1e-3)
    assert made.rows[name, "sdesolve"]["ratio"] == [1.0, 1.0, 1.0]
    assert "how many times as long as sdesolve" in done.stdout


@pytest.mark.thorough
def test_a_comparison_by_pytest_benchmark_warns_of_another_machine(suite, tmp_path):
    """And goes on."""
    command, start, _, out = suite
    found = json.loads(out.read_text())
    another = tmp_path / "another.json"
    another.write_text(json.dumps({**found, "machine_info": {**found["machine_info"], "processor": "another"}}))
    again = start([*command[:-1], f"--benchmark-compare={another}", "--collect-only"])
    assert again.returncode == 0, again.stdout[-3000:] + again.stderr[-3000:]
    assert "machine_info is different" in again.stdout + again.stderr
