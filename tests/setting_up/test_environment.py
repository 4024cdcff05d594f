"""Set-up says nothing of pip's while it works; when it fails, which package it was about and what to do."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SPEC = importlib.util.spec_from_file_location("environment", ROOT / "tools" / "environment.py")
environment = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(environment)

# What pip 23.2 to 26.3 printed.
CONFLICT = """\
Collecting torch>=2.6 (from sdesolve==0.1.0)
  Downloading torch-2.13.0-cp312-cp312-manylinux_2_28_x86_64.whl (526.6 MB)
ERROR: Cannot install sdesolve and sdesolve[dev]==0.1.0 because these package versions have conflicting dependencies.

The conflict is caused by:
    sdesolve[dev] 0.1.0 depends on triton>=3.2; sys_platform == "linux"
    torch 2.13.0 depends on triton==3.7.1; platform_system == "Linux" and python_version < "3.15"
    The user requested (constraint) triton==3.9.0

To fix this you could try to:
1. loosen the range of package versions you've specified
"""
ABSENT = """\
Collecting numba>=0.60 (from sdesolve==0.1.0)
ERROR: Could not find a version that satisfies the requirement numba>=0.60 (from versions: none)
ERROR: No matching distribution found for numba>=0.60
"""
UNREACHABLE = """\
Obtaining file:///home/me/sdesolve
  Installing build dependencies: started
  Installing build dependencies: finished with status 'error'
  error: subprocess-exited-with-error
      WARNING: Retrying (Retry(total=0, connect=None, read=None)) after connection broken by \
'NewConnectionError('Failed to establish a new connection: [Errno 111] Connection refused')': /simple/hatchling/
      ERROR: No matching distribution found for hatchling>=1.25
"""
FULL = """\
Collecting nvidia-cudnn-cu13==9.20.0.48 (from torch>=2.6->sdesolve==0.1.0)
ERROR: Could not install packages due to an OSError: [Errno 28] No space left on device
"""
SOURCE = """\
Collecting scipy>=1.11 (from sdesolve==0.1.0)
  Downloading scipy-1.17.1.tar.gz (30.6 MB)
  Preparing metadata (pyproject.toml): finished with status 'error'
  error: subprocess-exited-with-error
"""
UNKNOWN = """\
Collecting torchsde>=0.2.6 (from sdesolve==0.1.0)
ERROR: THESE PACKAGES DO NOT MATCH THE HASHES FROM THE REQUIREMENTS FILE.
"""


@pytest.mark.parametrize(
    ("log", "package", "advice"),
    [
        (CONFLICT, "torch 2.13.0 depends on triton==3.7.1", "pip config list"),
        (ABSENT, "numba>=0.60 for Python 3.15", "make PYTHON=python3.14"),
        (UNREACHABLE, "hatchling>=1.25", "HTTPS_PROXY"),
        (FULL, "nvidia-cudnn-cu13", "TMPDIR"),
        (SOURCE, "scipy", "make PYTHON=python3.14"),
        (UNKNOWN, "torchsde", "DO NOT MATCH THE HASHES"),
        ("", "the first package", "does not say why"),
    ],
)
def test_explanations(log, package, advice):
    found = environment.explain(log, "3.15")
    assert package in found
    assert advice in found


def copy_of_the_tree(folder: Path) -> Path:
    """As much of it as set-up needs."""
    for name in (
        "Makefile",
        "pyproject.toml",
        "constraints.txt",
        "README.md",
        "LICENSE",
        "tools",
        "sdesolve",
        "kernels",
    ):
        source = ROOT / name
        (shutil.copytree if source.is_dir() else shutil.copy)(source, folder / name)
    return folder


def make_lint(folder: Path, python: str) -> subprocess.CompletedProcess[str]:
    """`make lint` without any index: nothing to install from, on every machine."""
    own = {"PIP_CONFIG_FILE": os.devnull, "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": ""}
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS", "PIP_"))}
    command = ["make", "lint", f"PYTHON={python}"]
    return subprocess.run(command, capture_output=True, text=True, cwd=folder, env=kept | own)


def test_a_failure_names_the_package(tmp_path):
    """Twice: what a failed run leaves behind must not pass for an environment."""
    folder = copy_of_the_tree(tmp_path)
    for _ in range(2):
        run = make_lint(folder, sys.executable)
        assert run.returncode
        assert "pip finds no build of hatchling" in run.stderr
        assert "PYTHON=python3.14" in run.stderr
        assert ".venv/pip.log" in run.stderr
        assert len(run.stdout.splitlines()) == 1
        assert "Obtaining" not in run.stdout + run.stderr


def test_a_python_that_cannot_make_environments(tmp_path):
    """As Debian's, which leaves ensurepip to another package, and half an environment behind."""
    folder = copy_of_the_tree(tmp_path)
    (tmp_path / "debian").mkdir()
    (tmp_path / "debian" / "venv.py").write_text(
        "import os, sys\n"
        "os.makedirs(sys.argv[-1] + '/bin')\n"
        "os.symlink(sys.executable, sys.argv[-1] + '/bin/python')\n"
        "sys.exit('The virtual environment was not created successfully because ensurepip is not available.')\n"
    )
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nPYTHONPATH={tmp_path / "debian"} exec {sys.executable} "$@"\n')
    python.chmod(0o755)
    run = make_lint(folder, str(python))
    assert run.returncode
    version = f"{sys.version_info[0]}.{sys.version_info[1]}"
    assert f"apt-get install python{version}-venv" in run.stderr
    assert not (folder / ".venv").exists()


def test_an_old_python(tmp_path):
    folder = copy_of_the_tree(tmp_path)
    python = tmp_path / "python"
    check = "import sys; sys.version_info = (3, 9, 2); sys.version = '3.9.2 (main)'"
    python.write_text(f'#!/bin/sh\n[ "$1" = -c ] && exec {sys.executable} -c "{check}\n$2"\nexit 3\n')
    python.chmod(0o755)
    run = make_lint(folder, str(python))
    assert "sdesolve needs Python 3.11 or later, this is 3.9.2" in run.stderr


def test_newest_python_is_one_that_is_tested():
    text = (Path(__file__).parent / "test_resolution.py").read_text()
    versions = re.search(r"^VERSIONS = \((.+)\)", text, re.MULTILINE)
    assert versions[1].split(", ")[-1] == f'"{environment.NEWEST}"'
