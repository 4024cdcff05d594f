"""The wheel in clean environments with the oldest torch and the newest: ``python tools/wheel_smoke.py``.

Builds the wheel, installs it as a user would, without constraints, beside each torch into an environment of its own in
a temporary folder, and runs `tools/smoke.py` there, away from this tree. Needs an index, time and 8 GB of disk.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tools"))
from environment import PIP, explain  # noqa: E402


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


def check(wheel: Path, torch: str, folder: Path, plain: bool) -> None:
    """One environment, made and thrown away."""
    begin = time.monotonic()
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    python = folder / "bin" / "python"
    wanted = "torch" if torch == "newest" else f"torch=={torch}"
    pip(python, "install", wheel, wanted, plain=plain)
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


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--torch", nargs="+", default=["2.6.0", "newest"], metavar="VERSION", help="2.6.0 newest")
    parser.add_argument("--plain", action="store_true", help="ignore pip's configuration and links on this machine")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        pip(sys.executable, "wheel", "--no-deps", "-w", folder, ROOT, plain=options.plain)
        (wheel,) = folder.glob("*.whl")
        print(f"{wheel.name}, {wheel.stat().st_size / 1e6:.1f} MB")
        for torch in options.torch:
            with tempfile.TemporaryDirectory() as environment:
                check(wheel, torch, Path(environment), options.plain)


if __name__ == "__main__":
    main()
