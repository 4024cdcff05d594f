"""The Triton kernels in Triton's interpreter, against the reference.

Triton decides when it is imported whether it interprets, and other tests here compile: so these run in a process of
their own, and fail here with its output.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_kernels_in_the_interpreter():
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    environment.pop("PYTEST_ADDOPTS", None)
    arguments = ["-q", "-p", "no:cacheprovider", "--rootdir", str(ROOT), "tests/fused_triton/interpreted"]
    run = subprocess.run(
        [sys.executable, "-m", "pytest", *arguments], capture_output=True, text=True, cwd=ROOT, env=environment
    )
    assert run.returncode == 0, run.stdout[-8000:] + run.stderr[-2000:]
    assert " passed" in run.stdout
    assert "skipped" not in run.stdout
