"""Runs the test suite of torchsde or torchdiffeq on `sdesolve.compat`: their files with the import exchanged.

    PYTHONPATH=.:kernels python tools/peer_suites.py torchsde CHECKOUT [pytest's arguments]

``CHECKOUT`` is a clone of the peer's repository, which is only read: its tests are copied to a temporary folder, with
``from sdesolve.compat import torchsde`` in place of ``import torchsde``. ``--theirs`` leaves the import as it is.
Needs pytest and scipy. The whole takes long; pytest's ``-k`` chooses.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from pathlib import Path

# What newer versions of torch have no more, and names that are annotations alone.
CONFTEST = """
import sys, types, typing
import torch

def assert_allclose(actual, expected, rtol=None, atol=None):
    actual, expected = (v if torch.is_tensor(v) else torch.tensor(v) for v in (actual, expected))
    exact = torch.float64 in (actual.dtype, expected.dtype)
    rtol, atol = (1e-7 if exact else 1.3e-6, 1e-7 if exact else 1e-5) if rtol is None else (rtol, atol)
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=atol, check_dtype=False)

if not hasattr(torch.testing, "assert_allclose"):
    torch.testing.assert_allclose = assert_allclose
names = ("Tensor", "Tensors", "TensorOrTensors", "ModuleOrModules")
found = types.ModuleType("sdesolve.compat.torchsde.types")
vars(found).update({"Callable": typing.Callable, "Optional": typing.Optional}, **{n: typing.Any for n in names})
sys.modules[found.__name__] = found
"""
SUITES = {"torchsde": "test_*.py", "torchdiffeq": "*_tests.py"}


def exchanged(text: str, peer: str) -> str:
    """A test file of a peer with our module in place of its own."""
    text = re.sub(rf"^import {peer}$", f"from sdesolve.compat import {peer}", text, flags=re.M)
    return re.sub(rf"^from {peer}\b", f"from sdesolve.compat.{peer}", text, flags=re.M)


def main() -> int:
    """Copies, runs, and gives pytest's exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("peer", choices=list(SUITES))
    parser.add_argument("checkout", type=Path)
    parser.add_argument("--theirs", action="store_true", help="run the suite as it is, on the peer itself")
    arguments, others = parser.parse_known_args()
    tests = arguments.checkout / "tests"
    if not tests.is_dir():
        parser.error(f"{arguments.checkout} has no folder tests: give a clone of the repository of {arguments.peer}")
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "tests"
        root.mkdir()
        (Path(folder) / "conftest.py").write_text(CONFTEST)
        for path in tests.glob("*.py"):
            text = path.read_text().replace("sys.path = sys.path[1:]", "")
            (root / path.name).write_text(text if arguments.theirs else exchanged(text, arguments.peer))
        command = [
            *(sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--tb=short", "-W", "ignore"),
            *("-o", f"python_files={SUITES[arguments.peer]}", "--rootdir", folder, str(root)),
        ]
        return subprocess.run([*command, *others], check=False, cwd=folder).returncode


if __name__ == "__main__":
    sys.exit(main())
