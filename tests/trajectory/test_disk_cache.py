"""Generated kernels on disk: found by later processes, rebuilt when damaged, done without where none can be written."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from sdesolve_kernels._numba import trajectory

import sdesolve as sds

ROOT = Path(__file__).parents[2]
RUN = """
import sys, torch, sdesolve as sds
sde = sds.SDE(lambda x, t: torch.sin(x), lambda x, t: 0.25 * x)
x = sds.solve(sde, torch.ones(5, 2), 0.0, 1.0, 7, solver=sds.EulerMaruyama(), seed=3, backend="fused").x1
print(x.double().sum().item(), "numba" in sys.modules)
"""


SOURCE = """
import hashlib, torch, sdesolve as sds
from sdesolve_kernels._numba import trajectory
def show(source):
    print(hashlib.sha256(source.encode()).hexdigest())
    raise SystemExit
trajectory.load = show
torch.manual_seed(0)
score = sds.NetworkScore(sds.nn.MLP((2,), width=16, depth=1), sds.VP())
sds.sample(score.process, score, (64, 2), steps=2, seed=0, backend="fused")
"""


def start(cache: Path, code: str = RUN) -> subprocess.Popen[str]:
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    environment = os.environ | {"PYTHONPATH": path, "SDESOLVE_CACHE": str(cache)}
    return subprocess.Popen(
        [sys.executable, "-c", code], env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


def finish(process: subprocess.Popen[str]) -> tuple[float, bool]:
    out, error = process.communicate(timeout=120)
    assert process.returncode == 0, error
    total, compiled = out.split()
    return float(total), compiled == "True"


def test_a_later_process_needs_no_numba(tmp_path):
    """Two that start at once may both compile, and agree; a later one finds what they left, if it is whole."""
    (first, compiled), (second, _) = map(finish, (start(tmp_path), start(tmp_path)))
    assert compiled
    assert first == second
    assert [p.suffix for p in sorted(tmp_path.iterdir())] == [".o", ".py"]
    (code,) = tmp_path.glob("*.o")
    assert "def trajectory" in code.with_suffix(".py").read_text()
    assert finish(start(tmp_path)) == (first, False)
    code.write_bytes(code.read_bytes()[:-40] + b"\0" * 40)
    assert finish(start(tmp_path)) == (first, True)
    assert trajectory._read(code) is not None


def test_processes_print_the_same_source_for_a_network(tmp_path):
    """Or its kernel would be compiled in each: Python's hashes of strings, types and None differ between them."""
    processes = (start(tmp_path, SOURCE), start(tmp_path, SOURCE))
    sources = [process.communicate(timeout=120)[0] for process in processes]
    assert all(process.returncode == 0 for process in processes)
    assert len(sources[0]) == 65
    assert sources[0] == sources[1]


def test_a_folder_that_cannot_be_written_is_done_without(tmp_path, monkeypatch):
    blocked = tmp_path / "a file, not a folder"
    blocked.write_text("")
    monkeypatch.setenv("SDESOLVE_CACHE", str(blocked))
    sde = sds.SDE(lambda x, t: torch.cos(x) * 1.0625, lambda x, t: 0.3 * x)
    options = {"solver": sds.EulerMaruyama(), "seed": 3}
    fused = sds.solve(sde, torch.ones(5, 2), 0.0, 1.0, 7, backend="fused", **options).x1
    eager = sds.solve(sde, torch.ones(5, 2), 0.0, 1.0, 7, backend="eager", **options).x1
    torch.testing.assert_close(fused, eager, rtol=1e-5, atol=1e-5)
    assert blocked.read_text() == ""


def test_a_user_without_a_home_has_no_folder(monkeypatch):
    def unknown():
        raise RuntimeError("Could not determine home directory.")

    for name in ("SDESOLVE_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(Path, "home", unknown)
    sde = sds.SDE(lambda x, t: torch.cos(x) * 1.1875, lambda x, t: 0.3 * x)
    sol = sds.solve(sde, torch.ones(5, 2), 0.0, 1.0, 7, solver=sds.EulerMaruyama(), seed=3)
    assert sol.stats.backend == "fused", sol.stats.reason


@pytest.mark.parametrize("damage", [b"", b"short", bytes(100)])
def test_a_file_that_is_not_whole_is_no_code(tmp_path, damage):
    (tmp_path / "x.o").write_bytes(damage)
    assert trajectory._read(tmp_path / "x.o") is None
    trajectory._write(tmp_path / "y.o", b"machine code")
    assert trajectory._read(tmp_path / "y.o") == b"machine code"
    assert not [p for p in tmp_path.iterdir() if p.suffix not in (".o",)]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty cache, and nothing loaded."""
    monkeypatch.setenv("SDESOLVE_CACHE", str(tmp_path / "cache"))
    trajectory.load.cache_clear()
    yield tmp_path / "cache"
    trajectory.load.cache_clear()


def decayed(rate):
    rates = torch.full((2,), rate, dtype=torch.float64)
    sde = sds.SDE(lambda x, t: -rates * x, lambda x, t: 0.1 * x, noise="diagonal")
    x0 = torch.ones(4, 2, dtype=torch.float64)
    return sds.solve(sde, x0, 0.0, 1.0, 8, solver=sds.EulerMaruyama(), seed=1, backend="fused").x1


def test_values_of_tensors_make_no_new_kernels(folder):
    before = trajectory.load.cache_info().misses
    assert not torch.equal(decayed(1.0), decayed(2.0))
    assert not torch.equal(decayed(3.0), decayed(2.0))
    assert trajectory.load.cache_info().misses == before + 1
    assert len(list(folder.glob("*.o"))) == 1
