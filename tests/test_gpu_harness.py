"""The GPU harness without a GPU: that a run leaves a whole report, and that no kernel is timed whose checks fail."""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

ROOT = Path(__file__).parents[1]
SPOILED = "perturb"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A tiny run as a user starts it, with one kernel broken on purpose; of all sections where tests are thorough."""
    out = tmp_path_factory.mktemp("gpu") / "report.json"
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu.py"), "--device", "cpu", "--quick", "--tiny"]
    command += ["--spoil", SPOILED, "--date", "2000-01-02", "--out", str(out)]
    if os.environ.get("HYPOTHESIS_PROFILE") != "thorough":
        command += ["--only", "checks", "large", "memory"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    assert done.returncode == 1, done.stdout[-3000:] + done.stderr[-3000:]
    return json.loads(out.read_text()), done.stdout


def started(*options):
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu.py"), "--device", "cpu", "--quick", "--tiny", *options]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)


def test_a_second_call_goes_on_from_the_first(run, tmp_path):
    first, _ = run
    before, after = tmp_path / "first.json", tmp_path / "second.json"
    before.write_text(json.dumps(first))
    done = started("--only", "memory", "tools", "--after", str(before), "--out", str(after))
    assert done.returncode == 1  # what failed in the first call still does
    second = json.loads(after.read_text())
    assert second["checks"] == first["checks"]
    assert len(second["calls"]) == 2
    both = zip(first["measurements"], second["measurements"], strict=False)
    assert {old["under"] for old, new in both if old != new} <= {m["under"] for m in second["measurements"]}
    assert [m for m in second["measurements"] if m["section"] == "large"] == [
        m for m in first["measurements"] if m["section"] == "large"
    ]
    counts = [sum(m["section"] == "memory" for m in report["measurements"]) for report in (first, second)]
    assert counts[0] == counts[1] > 0
    before.write_text(json.dumps({**first, "sources": "another"}))
    done = started("--only", "memory", "--after", str(before), "--out", str(after))
    assert "is of another tree" in done.stderr
    done = started("--only", "memory", "--out", str(after))
    assert (done.returncode, "name checks too" in done.stderr) == (2, True)


def test_what_the_vendors_tools_say_is_reported(harness, tmp_path, monkeypatch):
    from benchmarks import gpu_targets, gpu_tools

    where = harness.device.Cpu()
    monkeypatch.setenv("PATH", str(tmp_path))
    missing = list(gpu_tools.tools(where, True))
    assert [m["missing"] for m in missing] == ["compute-sanitizer", "compute-sanitizer", "ncu"]
    header = '"ID","Kernel Name","Metric Name","Metric Value"'
    rows = '"0","normal","lts__t_sector_hit_rate.pct","1,024.5"\n"0","normal","gpu__time_duration.sum","7"'
    programs = {
        "compute-sanitizer": "#!/bin/sh\nif [ $2 = racecheck ]; then echo a race; exit 9; fi\n",
        "ncu": f"#!/bin/sh\ncat <<'END'\n==PROF== connected\n{header}\n{rows}\nEND\n",
    }
    for name, text in programs.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    memory, race, counted = gpu_tools.tools(where, True)
    assert memory["ok"]
    assert (race["ok"], race["problem"]) == (False, "a race")
    assert counted["values"] == {"lts__t_sector_hit_rate.pct": 1024.5, "gpu__time_duration.sum": 7.0}
    report = {"measurements": [memory, race, counted, missing[0]], "checks": {}, "refused": [], "sections": {}}
    assert len(gpu_targets.failures(report)) == 1
    shown = gpu_targets.table({**report, "dropped": [], "targets": []})
    assert "a race" in shown
    assert "compute-sanitizer is not here" in shown


@pytest.fixture
def harness():
    """The harness's modules."""
    from benchmarks import gpu_checks, gpu_device, gpu_ops, gpu_targets, gpu_worker

    return SimpleNamespace(checks=gpu_checks, device=gpu_device, ops=gpu_ops, targets=gpu_targets, worker=gpu_worker)


@pytest.mark.thorough
def test_the_report_is_whole(run):
    report, output = run
    assert report["complete"]
    assert report["missing"] == {}
    assert report["dropped"] == []
    assert report["date"] == "2000-01-02"
    assert report["machine"]["stand_in"] is True
    assert report["machine"]["versions"]["torch"] == importlib.metadata.version("torch")
    assert {"jax", "diffrax", "torchsde", "diffusers", "numba"} <= report["machine"]["versions"].keys()
    assert {s["status"] for s in report["sections"].values()} == {"done"}
    assert not report["checks"]["errors"]
    seen = {m["section"] for m in report["measurements"]}
    assert seen == {"large", "small", "compiled", "memory", "sampler", "trajectories", "problems", "scaling", "tools"}
    for m in report["measurements"]:
        for times in m.get("us", {}).values():
            assert 0 < times["lower"] <= times["median"] <= times["upper"]
    assert all(m["ok"] for m in report["measurements"] if "check" in m)
    assert len(report["targets"]) >= 10
    assert {t["verdict"] for t in report["targets"]} == {"not judged (no GPU)"}
    assert "euler_maruyama_step: copy bandwidth, float32" in output


def test_a_kernel_whose_checks_fail_is_not_timed(run):
    report, output = run
    gates = report["checks"]["gates"]
    assert [name for name, gate in gates.items() if not gate["open"]] == [f"{SPOILED} float32"]
    assert "checks failed" in gates[f"{SPOILED} float32"]["why"]
    timed = {m["kernel"] for m in report["measurements"] if "kernel" in m}
    assert timed == {"normal", "euler_maruyama_step", "linear_step", "langevin_step", "dsm_loss"}
    assert {r["case"] for r in report["refused"]} == {SPOILED}
    assert f"closed: {SPOILED} float32" in output
    failed = [line for line in output.splitlines() if line.startswith("FAILED: ")]
    assert failed
    assert all(SPOILED in line for line in failed)


def test_a_run_ends_well_if_nothing_of_ours_is_wrong(run, harness):
    report, _ = run
    right = {**report, "checks": {"gates": {"perturb float32": {"open": True, "why": None}}}, "refused": []}
    assert harness.targets.failures(right) == []
    by_peer = {"problem": "p", "case": "p", "contender": "torchsde", "dtype": "float32", "why": "RuntimeError"}
    assert harness.targets.failures({**right, "refused": [by_peer]}) == []
    error = {"suite": "op", "kernel": "normal", "dtype": "float32", "error": "worker ended with 1"}
    for wrong in (
        {"refused": [{**by_peer, "contender": "sdesolve"}]},
        {"sections": {"sampler": {"status": "failed"}}},
        {"measurements": [{"section": "sampler", "check": "never waits", "ok": False, "problem": "it waits"}]},
        {"checks": {"errors": [error]}},
        {"checks": {"gates": {"normal float32": {"open": False, "why": "not checked"}}}},
    ):
        assert len(harness.targets.failures({**right, **wrong})) == 1, wrong


def wrapped(ours, s, *, step=0, **where):
    """Noise that repeats after 2^32 steps."""
    return ours(s, step=step if isinstance(step, torch.Tensor) else step % 2**32, **where)


def short(ours, s, *, out=None, **where):
    """A last element that nobody writes."""
    made = ours(s, **where)
    if out is None:
        return made
    out.view(-1)[:-1] = made.view(-1)[:-1]
    return out


def long(ours, s, *, out=None, **where):
    """A write past the end."""
    made = ours(s, **where)
    if out is None:
        return made
    out.as_strided((out.numel() + 1,), (1,))[:-1] = made.view(-1)
    out.as_strided((out.numel() + 1,), (1,))[-1] = 0.0
    return out


def moody(ours, s, **where):
    """Another result each time, by less than the tolerance of its value."""
    moody.calls += 1
    return ours(s, **where) + 1e-7 * moody.calls


def detached(ours, s, **where):
    """A gradient that lacks a part."""
    return ours(replace(s, f=2 * s.f - s.f.detach()), **where)


moody.calls = 0


@pytest.mark.parametrize(
    ("fault", "caught"),
    [(wrapped, "far"), (short, "near"), (long, "writes beside"), (moody, "again"), (detached, "gradient in f")],
    ids=lambda v: getattr(v, "__name__", v),
)
def test_checks_see_each_kind_of_fault(harness, fault, caught):
    right = harness.ops.CASES["euler_maruyama_step"]
    wrong = replace(right, ours=functools.partial(fault, right.ours))
    place = {"dtype": torch.float32, "shape": (4, 33), "machine": harness.device.Cpu(), "thorough": fault is moody}
    check = functools.partial(harness.checks.check_case, **place)
    assert all(c.ok for c in check(right))
    failed = [c.name for c in check(wrong) if not c.ok]
    assert any(caught in name for name in failed), failed


def test_a_worker_that_dies_closes_the_gate_and_nothing_else(harness):
    if torch.cuda.is_available():
        return  # the worker would live
    unit = {"suite": "op", "kernel": "normal", "dtypes": ["float32"]}
    gates = harness.worker.Gates()
    for records in harness.worker.in_processes([unit], "cuda", True, 1, 60.0, None):
        gates.add(records)
    assert "worker ended with 1" in gates.errors[0]["error"]
    assert "sees no CUDA device" in gates.errors[0]["error"]
    assert "did not end" in gates.why_closed("normal", "float32")
    assert gates.why_closed("perturb", "float32") == "not checked"


def test_a_failed_word_closes_every_dtype(harness):
    gates = harness.worker.Gates()
    gates.add([{"finished": {"suite": "op", "kernel": "normal", "dtype": "bfloat16"}, "seconds": 0.0}])
    assert gates.why_closed("normal", "bfloat16") is None
    bad = {"kernel": "normal", "dtype": "int64", "name": "words", "shape": [5, 1], "error": 1.0, "budget": 0.0}
    gates.add([{**bad, "ok": False}])
    assert "words" in gates.why_closed("normal", "bfloat16")


def test_targets_are_judged_by_their_worst_size(harness):
    def measured(size, ratio):
        return {"section": "large", "case": "euler_maruyama_step", "dtype": "float32", "size": size,
                "ratios": {"of copy": {"median": ratio}, "eager / ours": {"median": 7.0}}}  # fmt: skip

    sizes = [measured("64 MiB", 0.5), measured("256 MiB", 0.81), measured("1024 MiB", 0.95)]
    rows = harness.targets.judge(sizes, [], stand_in=False)
    assert rows[0]["verdict"] == "missed by 10.0%"
    assert rows[0]["worst_size"] == "256 MiB"  # what is smaller stays in the cache
    assert rows[2]["verdict"] == "reached"
    assert rows[-1]["verdict"] == "not measured"
    refused = [{"case": "normal", "dtype": "float32", "why": "checks failed"}]
    assert "refused: checks failed" in {r["verdict"] for r in harness.targets.judge([], refused, stand_in=False)}


class FakeEvent:
    clock = 0.0

    def __init__(self, enable_timing):
        assert enable_timing

    def record(self):
        FakeEvent.clock += 1.0
        self.at = FakeEvent.clock

    def synchronize(self):
        pass

    def elapsed_time(self, other):
        return other.at - self.at


class FakeStream:
    def __init__(self, device):
        pass

    def wait_stream(self, other):
        pass


def test_what_only_a_gpu_runs_at_least_runs(harness, monkeypatch):
    """The CUDA machine on stand-ins for torch's calls: names, arguments and order, not what they do."""
    spins, modes = [], [0]
    fakes = {
        "Event": FakeEvent, "Stream": FakeStream, "current_stream": FakeStream, "synchronize": lambda device: None,
        "stream": lambda stream: contextlib.nullcontext(), "graph": lambda graph: contextlib.nullcontext(),
        "CUDAGraph": lambda: SimpleNamespace(replay=lambda: None), "_sleep": spins.append,
        "memory_allocated": lambda device: 100, "max_memory_allocated": lambda device: 140,
        "reset_peak_memory_stats": lambda device: None, "empty_cache": lambda: None,
        "mem_get_info": lambda device: (7, 9), "get_sync_debug_mode": lambda: modes[-1],
        "set_sync_debug_mode": modes.append, "is_available": lambda: True,
        "get_device_properties": lambda device: SimpleNamespace(
            name="a GPU", major=9, minor=0, multi_processor_count=132, total_memory=80 << 30),
    }  # fmt: skip
    for name, fake in fakes.items():
        assert name == "_sleep" or hasattr(torch.cuda, name)
        monkeypatch.setattr(torch.cuda, name, fake, raising=name != "_sleep")
    machine = harness.device.Cuda.__new__(harness.device.Cuda)
    machine.device, machine._flush = torch.device("cpu"), torch.zeros(4)
    assert machine.describe()["device"] == "a GPU"
    assert machine.clocks() == {}
    assert machine.timer(lambda: None)() == 1e-3
    assert spins[0] >= 50e-6 * 2e9
    assert machine.graph(lambda: 5)() == 5
    assert machine.peak(lambda: None) == 40
    assert machine.free_bytes() == 7
    with pytest.raises(KeyError), machine.forbid_waiting():
        raise KeyError
    assert modes == [0, "error", 0]
