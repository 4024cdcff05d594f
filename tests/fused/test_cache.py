"""Compiled kernels are found again by the next process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
CODE = """
import torch
from sdesolve_kernels import dsm_loss, perturb
x = torch.ones(4, 6)
perturb(x, torch.ones(4), 0.5, seed=0)
perturb(x.bfloat16(), torch.ones(4), 0.5, seed=0)
dsm_loss(x, x, 1.0, 1.0, 1.0, seed=0)
"""


def test_a_second_process_compiles_nothing(tmp_path):
    """A kernel whose key in the cache changes from process to process is compiled, and stored, in each."""
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(ROOT / "kernels")}

    def run():
        subprocess.run([sys.executable, "-c", CODE], check=True, env=environment)
        return {path.name for path in tmp_path.rglob("*.nbc")}

    first = run()
    assert len(first) >= 8
    assert run() == first
