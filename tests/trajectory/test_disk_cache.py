"""Generated kernels on disk: found by later processes, rebuilt when damaged, done without where none can be written."""

from __future__ import annotations

import gc
import hashlib
import os
import shutil
import subprocess
import sys
import weakref
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


def start(cache: Path, code: str = RUN, variables: dict[str, str] | None = None) -> subprocess.Popen[str]:
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    environment = os.environ | {"PYTHONPATH": path, "SDESOLVE_CACHE": str(cache), **(variables or {})}
    return subprocess.Popen(
        [sys.executable, "-c", code], env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


def finish(process: subprocess.Popen[str]) -> tuple[float, bool]:
    out, error = process.communicate(timeout=120)
    assert process.returncode == 0, error
    total, compiled = out.split()
    return float(total), compiled == "True"


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A folder that two processes have written at once, both of which may have compiled; and what both gave."""
    folder = tmp_path_factory.mktemp("written")
    (first, compiled), (second, _) = map(finish, (start(folder), start(folder)))
    assert compiled
    assert first == second
    return folder, first


@pytest.fixture
def here(monkeypatch):
    """What `RUN` does, in this process."""

    def run(folder):
        monkeypatch.setenv("SDESOLVE_CACHE", str(folder))
        trajectory.load.cache_clear()
        sde = sds.SDE(lambda x, t: torch.sin(x), lambda x, t: 0.25 * x)
        x0 = torch.ones(5, 2)
        return sds.solve(sde, x0, 0.0, 1.0, 7, solver=sds.EulerMaruyama(), seed=3, backend="fused").x1.double().sum()

    yield run
    trajectory.load.cache_clear()


def test_a_later_process_needs_no_numba(written):
    """It finds what an earlier one left."""
    folder, first = written
    assert [p.suffix for p in sorted(folder.iterdir())] == [".o", ".py"]
    (code,) = folder.glob("*.o")
    assert "def trajectory" in code.with_suffix(".py").read_text()
    assert finish(start(folder)) == (first, False)


def test_code_that_is_damaged_is_made_anew(written, here, tmp_path):
    (code,) = written[0].glob("*.o")
    damaged = tmp_path / code.name
    damaged.write_bytes(code.read_bytes()[:-40] + b"\0" * 40)
    assert here(tmp_path) == written[1]
    assert trajectory._read(damaged) is not None


@pytest.mark.thorough
def test_processes_print_the_same_source_for_a_network(tmp_path):
    """Or its kernel would be compiled in each: Python's hashes of strings, types and None differ between them."""
    processes = (start(tmp_path, SOURCE), start(tmp_path, SOURCE))
    sources = [process.communicate(timeout=120)[0] for process in processes]
    assert all(process.returncode == 0 for process in processes)
    assert len(sources[0]) == 65
    assert sources[0] == sources[1]


NETWORK = """
import sys, torch, sdesolve as sds
W, V = torch.linspace(-1, 1, 128).reshape(2, 64), torch.linspace(-1, 1, 128).reshape(64, 2)
sde = sds.SDE(lambda x, t: torch.tanh(x @ W) @ V, lambda x, t: 0.1, noise="additive")
x = sds.solve(sde, torch.ones(300, 2), 0.0, 1.0, 7, solver=sds.EulerMaruyama(), seed=3, backend="fused").x1
print(x.double().sum().item(), "numba" in sys.modules)
"""


def test_a_later_process_finds_what_the_compiler_calls_of_itself(tmp_path):
    """Such as memset, for a vector that starts at zero: without Numba nothing had told the loader where it is."""
    first, compiled = finish(start(tmp_path, NETWORK))
    assert compiled
    assert finish(start(tmp_path, NETWORK)) == (first, False)


def test_a_file_under_another_name_is_not_taken(written, tmp_path):
    (code,) = written[0].glob("*.o")
    other = tmp_path / ("0" * 40 + ".o")
    shutil.copy(code, other)
    assert trajectory._read(code) is not None
    assert trajectory._read(other) is None


@pytest.mark.skipif(not hasattr(os, "geteuid"), reason="owners and modes are those of POSIX")
def test_code_that_others_could_have_written_is_not_loaded(tmp_path, monkeypatch):
    folder = tmp_path / "cache"
    trajectory._write(folder / "x.o", b"machine code")
    assert folder.stat().st_mode & 0o777 == 0o700
    assert trajectory._read(folder / "x.o") == b"machine code"
    for path, open_to_all, closed in ((folder, 0o777, 0o700), (folder / "x.o", 0o666, 0o600)):
        path.chmod(open_to_all)
        assert trajectory._read(folder / "x.o") is None
        if path is folder:
            trajectory._write(folder / "y.o", b"machine code")
            assert not (folder / "y.o").exists()
        path.chmod(closed)
    (folder / "z.o").symlink_to(folder / "x.o")
    assert trajectory._read(folder / "z.o") is None
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    if os.getuid() != 0:  # root's files are trusted by all
        assert trajectory._read(folder / "x.o") is None


def test_a_planted_folder_is_done_without(written, here, tmp_path):
    """A solve compiles its own, leaves nothing, and gives what it gives elsewhere."""
    folder, expected = written
    planted = tmp_path / "planted"
    planted.mkdir()
    for file in folder.iterdir():
        (planted / file.name).write_bytes(b"planted")
    planted.chmod(0o777)
    assert here(planted) == expected
    assert all(file.read_bytes() == b"planted" for file in planted.iterdir())


def test_a_full_disk_leaves_no_temporary_files(tmp_path, monkeypatch):
    def full(descriptor, mode):
        os.close(descriptor)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fdopen", full)
    trajectory._write(tmp_path / "x.o", b"machine code")
    assert list(tmp_path.iterdir()) == []


def test_the_folder_may_be_given_relative_to_the_home(monkeypatch):
    monkeypatch.setenv("SDESOLVE_CACHE", "~/kernels")
    assert trajectory.cache_folder() == Path.home() / "kernels"


@pytest.mark.thorough
def test_a_debugger_that_disables_numba_breaks_nothing(written, tmp_path):
    """``NUMBA_DISABLE_JIT=1``, as coverage tools have it: kernels work on addresses and are compiled all the same."""
    variables = {"NUMBA_DISABLE_JIT": "1", "NUMBA_CACHE_DIR": str(tmp_path / "numba")}
    steps = "import sdesolve_kernels as k; k.perturb(torch.ones(4, 3), 0.5, 1.0, seed=0); k.normal(4, 3, seed=0)"
    assert finish(start(tmp_path / "cache", RUN + steps, variables)) == (written[1], True)


def test_code_is_unloaded_when_nothing_refers_to_it(folder):
    """And not before: kernels are dropped from a full cache while somebody holds and runs them."""
    entry = trajectory.load("def trajectory(arguments, scratch, start, stop):\n    pass\n")
    engine = weakref.ref(entry._engine)
    trajectory.load.cache_clear()
    gc.collect()
    entry(0, 0, 0, 0)
    assert engine() is not None
    del entry
    gc.collect()
    assert engine() is None


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


@pytest.mark.parametrize(
    "damage", [b"", b"short", bytes(100), hashlib.sha256(b"").digest(), hashlib.sha256(b"x").digest()]
)
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
