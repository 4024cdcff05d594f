"""Processes that start at once share the kernels on disk; values of tensors make no new ones."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from sdesolve_kernels._numba import trajectory

import sdesolve as sds

PROGRAM = """
import sys, torch, sdesolve as sds
x0 = torch.linspace(-1, 1, 30, dtype=torch.float64).reshape(10, 3)
sde = sds.SDE(lambda x, t: torch.sin({rate} * x), lambda x, t: 0.1 * x, noise="diagonal")
sol = sds.solve(sde, x0, 0.0, 1.0, 8, solver=sds.EulerMaruyama(), seed=1, backend="fused")
print(float(sol.x1.sum()).hex(), "numba" in sys.modules)
"""


def start(folder, rate=1.0):
    root = Path(sds.__file__).parents[1]
    environment = {**os.environ, "SDESOLVE_CACHE": str(folder), "PYTHONPATH": f"{root}{os.pathsep}{root / 'kernels'}"}
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM.format(rate=rate)], env=environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def finish(process):
    out, error = process.communicate(timeout=120)
    assert process.returncode == 0, error
    value, compiled = out.split()
    return value, compiled == "True"


def test_processes_share_kernels(tmp_path):
    """Two that start at once may both compile, and agree; a third finds what they left."""
    first, second = start(tmp_path), start(tmp_path)
    (value, _), (same, _) = finish(first), finish(second)
    assert value == same
    assert [p.suffix for p in sorted(tmp_path.iterdir())] == [".o", ".py"]
    assert finish(start(tmp_path)) == (value, False)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty cache, and nothing loaded."""
    monkeypatch.setenv("SDESOLVE_CACHE", str(tmp_path / "cache"))
    trajectory.load.cache_clear()
    yield tmp_path / "cache"
    trajectory.load.cache_clear()


def run(rate=1.0):
    rates = torch.full((2,), rate, dtype=torch.float64)
    sde = sds.SDE(lambda x, t: -rates * x, lambda x, t: 0.1 * x, noise="diagonal")
    x0 = torch.ones(4, 2, dtype=torch.float64)
    return sds.solve(sde, x0, 0.0, 1.0, 8, solver=sds.EulerMaruyama(), seed=1, backend="fused").x1


def test_values_of_tensors_make_no_new_kernels(folder):
    before = trajectory.load.cache_info().misses
    assert not torch.equal(run(1.0), run(2.0))
    assert not torch.equal(run(3.0), run(2.0))
    assert trajectory.load.cache_info().misses == before + 1
    assert len(list(folder.glob("*.o"))) == 1
