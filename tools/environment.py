"""Makes the environment that the targets of Makefile run in: ``python tools/environment.py .venv dev``.

pip's output goes to a file in it. If pip fails, what is printed is which package it was about and what to do. Needs the
standard library alone.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

__all__ = ["explain", "main"]

ROOT = Path(__file__).parents[1]
PIP = ("-m", "pip", "--disable-pip-version-check", "--no-input", "--no-color")
# The newest interpreter for which everything in constraints.txt has builds, as tests/setting_up finds.
NEWEST = "3.14"


def _quietly(*command: str | Path) -> tuple[int, str]:
    run = subprocess.run([str(part) for part in command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    return run.returncode, run.stdout


def _last(pattern: str, log: str) -> str | None:
    found = re.findall(pattern, log, re.MULTILINE)
    return found[-1].strip() if found else None


def explain(log: str, version: str = f"{sys.version_info[0]}.{sys.version_info[1]}") -> str:
    """Which package a failed run of pip was about, and what to do.

    Args:
        log: All that pip printed, without ``--quiet``.
        version: Of Python, as in "3.12".
    """
    at = _last(r"^\s*(?:Collecting|Processing|Downloading|Using cached) ([^\s(]+)", log) or "the first package"
    missing = _last(r"No matching distribution found for (.+)", log)
    conflict = re.search(r"The conflict is caused by:\n((?:[ \t]+.+\n)+)", log)
    if re.search(r"No space left on device|Errno 28", log):
        return (
            f"The disk is full, at {at}. With torch's ordinary build the environment takes 6 GB, with a CPU build\n"
            "2.5 GB, and for a while half of that again in the folder for temporary files (TMPDIR=... moves it)."
        )
    if conflict:
        names = _last(r"Cannot install (.+) because", log) or "the packages"
        return (
            f"No set of versions suits all of {names}:\n{conflict[1].rstrip()}\n"
            "A pin in constraints.txt doesn't suit the builds that pip finds here. `python -m pip config list` shows\n"
            "where it looks for them; if that is the ordinary index, please report the mistake in constraints.txt."
        )
    if re.search(r"connection broken by|ConnectionError|ConnectionResetError|Read timed out", log):
        return (
            f"The package index can't be reached, at {missing or at}. Look at the network, the proxy (HTTPS_PROXY)\n"
            "and the index that pip is set to use (`python -m pip config list`), and try again."
        )
    if missing:
        return (
            f"pip finds no build of {missing} for Python {version} on this machine. Either there is none for it\n"
            f"(Pythons 3.11 to {NEWEST} have all: make PYTHON=python{NEWEST}), or the index that pip is set to\n"
            "use doesn't have it (`python -m pip config list`)."
        )
    if "subprocess-exited-with-error" in log or "Failed building wheel" in log:
        built = _last(r"(?:Failed building wheel for|Failed to build:?) (?:editable )?['\"]?([\w.-]+)", log)
        return (
            f"{built or at} came as source and could not be built; its own error is in pip's output. Pythons 3.11 to\n"
            f"{NEWEST} need nothing built: make PYTHON=python{NEWEST}."
        )
    return f"At {at}: {_last(r'^ *ERROR: (.+)', log) or 'it does not say why'}."


def _has_pip(python: Path) -> bool:
    code = f"import sys, pip; sys.exit(sys.version_info[:2] != {sys.version_info[:2]})"
    return python.exists() and subprocess.run([python, "-c", code], capture_output=True).returncode == 0


def _create(folder: Path, version: str) -> str | None:
    """An environment with pip; what is wrong, or None."""
    if _has_pip(folder / "bin" / "python"):
        return None
    status, output = _quietly(sys.executable, "-m", "venv", "--clear", folder)
    if status == 0:
        return None
    shutil.rmtree(folder, ignore_errors=True)  # half an environment would be taken for a whole one
    if "ensurepip" in output or "No module named venv" in output:
        return (
            f"Python {version} here can't make environments: its modules venv and ensurepip are not complete.\n"
            f"On Debian and Ubuntu: apt-get install python{version}-venv. Elsewhere: a Python that has them, by\n"
            "make PYTHON=/where/it/is/python3."
        )
    return f"{sys.executable} -m venv failed:\n{output}"


def main(arguments: list[str]) -> int:
    """The command line: the environment's folder, and extras of the package, separated by commas."""
    folder, extras = Path(arguments[0]), arguments[1]
    version = f"{sys.version_info[0]}.{sys.version_info[1]}"
    wrong = _create(folder, version)
    if wrong:
        print(wrong, file=sys.stderr)
        return 1
    log = folder / "pip.log"
    python = folder / "bin" / "python"
    print(f"installing sdesolve[{extras}] into {folder} (Python {version}); pip's output: {log}", flush=True)
    begin = time.monotonic()
    with log.open("w") as output:
        command = [python, *PIP, "install", "--progress-bar", "off", "-c", "constraints.txt", "-e", f".[{extras}]"]
        run = subprocess.run(command, stdout=output, stderr=subprocess.STDOUT, cwd=ROOT)
    if run.returncode:
        print(f"\npip failed. {explain(log.read_text(), version)}\nAll of pip's output: {log}", file=sys.stderr)
        return 1
    code = "from importlib.metadata import version as v; print('torch', v('torch'), 'numpy', v('numpy'))"
    print(f"installed in {time.monotonic() - begin:.0f} s: {_quietly(python, '-c', code)[1].strip()}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
