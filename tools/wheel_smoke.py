"""The wheel in clean environments with the oldest torch and the newest: ``python tools/wheel_smoke.py``.

Builds the wheel, installs it as a user would, without constraints, beside each torch into an environment of its own in
a temporary folder, and runs `tools/smoke.py` there, away from this tree. Needs an index, time and 8 GB of disk.

``--matrix`` does so for every Python from 3.11 on that is here and each minor version of torch since 2.6, and says what
became of each pair in place of ending with the first that fails; ``--into`` writes the table into a page.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tools"))
from environment import PIP, explain  # noqa: E402

PYTHONS = ("3.11", "3.12", "3.13", "3.14")
TORCHES = ("2.6.*", "2.7.*", "2.8.*", "2.9.*", "2.10.*", "2.11.*", "2.12.*", "2.13.*")
MARKS = ("<!-- matrix -->", "<!-- /matrix -->")


def pip(python: str | Path, *arguments: str | Path, plain: bool) -> None:
    """Runs it quietly; if it fails, says why and ends."""
    environment = dict(os.environ)
    if plain:
        environment = {name: value for name, value in environment.items() if name != "PIP_FIND_LINKS"}
        environment["PIP_CONFIG_FILE"] = os.devnull
    command = [python, *PIP, *arguments]
    run = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)
    if run.returncode:
        sys.exit(f"{run.stdout}\npip failed. {explain(run.stdout)}")


def check(wheel: Path, torch: str, folder: Path, plain: bool, interpreter: str = sys.executable) -> None:
    """One environment, made and thrown away."""
    begin = time.monotonic()
    subprocess.run([interpreter, "-m", "venv", folder], check=True)
    python = folder / "bin" / "python"
    wanted = "torch" if torch == "newest" else f"torch=={torch}"
    pip(python, "install", f"sdesolve[cpu,gpu] @ {wheel.as_uri()}", wanted, plain=plain)
    pip(python, "check", plain=plain)
    installed = time.monotonic()
    print(f"\n{wanted}: installed in {installed - begin:.0f} s", flush=True)
    own = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "TRITON_"))}
    for cache in ("SDESOLVE_CACHE", "TRITON_CACHE_DIR", "XDG_CACHE_HOME"):  # nothing compiled before is found
        own[cache] = str(folder / "cache")
    smoke = folder / "smoke.py"
    smoke.write_bytes((ROOT / "tools" / "smoke.py").read_bytes())
    run = subprocess.run([python, "-I", smoke], cwd=folder, env=own, check=False)
    if run.returncode:
        sys.exit(f"the wheel does not work with {wanted}")
    print(f"checked in {time.monotonic() - installed:.0f} s", flush=True)


def interpreter(version: str) -> str | None:
    """A Python of that version, on PATH."""
    found = shutil.which(f"python{version}")
    code = "import sys; print(*sys.version_info[:2], sep='.')"
    told = found and subprocess.run([found, "-c", code], capture_output=True, text=True).stdout.strip()
    return found if told == version else None  # pyenv's stand-ins fail where no such version has been chosen


def matrix(wheel: Path, torches: Sequence[str], plain: bool) -> str:
    """A table of Pythons by torches: ``yes`` where the wheel works."""
    lines = ["| torch | " + " | ".join(f"Python {version}" for version in PYTHONS) + " |", "|---" * 5 + "|"]
    for torch in torches:
        cells = []
        for version in PYTHONS:
            python, cell = interpreter(version), "-"
            if python:
                with tempfile.TemporaryDirectory() as environment:
                    try:
                        check(wheel, torch, Path(environment), plain, python)
                        cell = "yes"
                    except SystemExit as ended:
                        print(f"Python {version}, torch {torch}: {ended}", flush=True)
                        cell = "no build" if "no build of" in str(ended) else "no"
            cells.append(cell)
        lines.append(f"| {torch.removesuffix('.*')} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--torch", nargs="+", metavar="VERSION", help="2.6.0 newest, and 2.6 to 2.13 for the matrix")
    parser.add_argument("--matrix", action="store_true", help="every Python that is here, and a table")
    parser.add_argument("--into", type=Path, metavar="FILE", help="put the table between this file's markers")
    parser.add_argument("--plain", action="store_true", help="ignore pip's configuration and links on this machine")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        pip(sys.executable, "wheel", "--no-deps", "-w", folder, ROOT, plain=options.plain)
        (wheel,) = folder.glob("*.whl")
        print(f"{wheel.name}, {wheel.stat().st_size / 1e6:.1f} MB")
        if options.matrix:
            table = matrix(wheel, options.torch or TORCHES, options.plain)
            print(table)
            if options.into:
                before, _, rest = options.into.read_text().partition(MARKS[0])
                after = rest.partition(MARKS[1])[2]
                options.into.write_text(f"{before}{MARKS[0]}\n{table}\n{MARKS[1]}{after}")
            return
        for torch in options.torch or ("2.6.0", "newest"):
            with tempfile.TemporaryDirectory() as environment:
                check(wheel, torch, Path(environment), options.plain)


if __name__ == "__main__":
    main()
