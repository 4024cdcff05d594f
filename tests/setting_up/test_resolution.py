"""constraints.txt suits every supported Python: pip resolves all of it, without installing anything.

Where a Python is on the machine, pip runs in it, as `make` does. For the others it is told their version
(``--python-version``), which chooses the right builds but evaluates markers such as ``python_version < "3.13"`` for the
Python that runs it. That takes a minute and an index, so what was found is kept in ``resolved.json``. It holds for as
long as requirements and pins are those it was found for; ``make resolve`` finds it again. Where it does not hold, the
test resolves them itself. What was done for which Python is in the summary.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
from datetime import date
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
VERSIONS = ("3.11", "3.12", "3.13", "3.14")
RECORD = Path(__file__).with_name("resolved.json")
# What one person's or machine's settings add to the ordinary index, such as a folder with a CPU build of torch.
OWN_SETTINGS = ("PIP_FIND_LINKS", "PIP_EXTRA_INDEX_URL", "PIP_CONSTRAINT")


def interpreter(version: str) -> Path | None:
    """A Python of that version: this one, or on PATH, or one of pyenv's."""
    candidates = [Path(sys.executable), Path(shutil.which(f"python{version}") or "")]
    pyenv = Path(os.environ.get("PYENV_ROOT") or Path.home() / ".pyenv")
    candidates += sorted(pyenv.glob(f"versions/{version}.*/bin/python"))
    for path in candidates:
        if path.is_file():
            # pyenv's stand-ins on PATH fail where no such version has been chosen
            code = "import sys; print(*sys.version_info[:2], sep='.')"
            run = subprocess.run([path, "-c", code], capture_output=True, text=True)
            if run.stdout.strip() == version:
                return path
    return None


def requirements() -> list[str]:
    """All that `make`, `make peers` and `make docs` ask for."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]

    def extra(name: str) -> set[str]:
        found = set()
        for line in project["optional-dependencies"][name]:
            own = re.fullmatch(r"sdesolve\[(\w+)\]", line)
            found |= extra(own[1]) if own else {line}
        return found

    return sorted({*project["dependencies"], *extra("dev"), *extra("bench"), *extra("docs")})


def newest_pip(folder: Path) -> Path | None:
    """A Python with the newest pip: older ones download all that they resolve, gigabytes, even in a dry run."""
    subprocess.run([sys.executable, "-m", "venv", folder], check=True, capture_output=True)
    python = folder / "bin" / "python"
    # --force-reinstall: with no index in reach pip would be content with itself
    command = [python, "-m", "pip", "--retries", "1", "install", "--force-reinstall", "pip"]
    return None if subprocess.run(command, capture_output=True, text=True).returncode else python


def resolve(python: Path, target: Path | str, folder: Path, plain: bool = False) -> dict[str, list[str]]:
    """What pip would install for an interpreter, or for a version as text: versions and requirements by name.

    ``plain``: without what this machine adds to the index. Nothing, if that needs a connection that isn't there.
    """
    report = folder / "report.json"
    command = [python, "-m", "pip", "--no-input", "--no-color", "--disable-pip-version-check"]
    if isinstance(target, Path):
        command += ["--python", target, "install", "-e", f"{ROOT}[dev,bench,docs]"]
    else:
        command += ["install", "--python-version", target, "--only-binary", ":all:", "--target", folder / "none"]
        command += requirements()
    # fast-deps: of an index without separate metadata it reads the part of a wheel that holds them, not the wheel
    command += ["--dry-run", "--ignore-installed", "--use-feature=fast-deps", "--quiet", "--report", report]
    environment = dict(os.environ)
    if plain:
        environment = {name: value for name, value in environment.items() if name not in OWN_SETTINGS}
        environment["PIP_CONFIG_FILE"] = os.devnull
    run = subprocess.run([*command, "-c", ROOT / "constraints.txt"], capture_output=True, text=True, env=environment)
    lines = [line for line in run.stderr.splitlines() if "is ignored: it is neither" not in line]
    if plain and run.returncode and any("connection broken by" in line for line in lines):
        return {}
    assert run.returncode == 0, "\n".join(lines[-40:])
    found = [item["metadata"] for item in json.loads(report.read_text())["install"]]
    return {re.sub("[-_.]+", "-", m["name"]).lower(): [m["version"], *m.get("requires_dist", ())] for m in found}


def pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return dict(line.split("==") for line in lines if line and not line.startswith("#"))


def digest() -> str:
    """Of all that pip is asked for; not of the file's other words."""
    return hashlib.sha256(json.dumps([requirements(), pins()]).encode()).hexdigest()[:16]


def resolution(pip: Path, version: str, folder: Path) -> str:
    """Resolves for a Python, compares with the pins, and says what was done."""
    path = interpreter(version)
    how = f"constraints.txt resolves on Python {version}: " + (
        "" if path else "not found on this machine, pip was told its version; "
    )
    found = resolve(pip, path or version, folder)
    for name, pin in pins().items():
        if name != "triton" or sys.platform == "linux":
            assert found[name][0].split("+")[0] == pin, name
    builds = [found["torch"]]
    if not any(line.startswith("triton") for line in found["torch"]):
        # A CPU build, from a folder or index of this machine: others have the build that asks for one Triton.
        builds.append(resolve(pip, path or version, folder, plain=True).get("torch"))
    for torch in builds:
        if torch is None:
            how += "no other build, as the ordinary index is not in reach, "
            continue
        triton = next((line.split(";")[0] for line in torch if line.startswith("triton")), "no Triton")
        how += f"torch {torch[0]} ({triton}), "
    return how.rstrip(", ")


def test_constraints_resolve(tmp_path, record_property):
    record = json.loads(RECORD.read_text())
    if record["digest"] != digest():
        pip = newest_pip(tmp_path / "pip")
        if pip is None:
            pytest.skip("constraints.txt was not resolved, as pip reaches no index (python -m pip config list)")
        record = {
            "found": [resolution(pip, version, tmp_path) for version in VERSIONS],
            "on": "now: run `make resolve`",
        }
    for line in record["found"]:
        record_property("summary", f"{line} ({record['on']})")
    assert len(record["found"]) == len(VERSIONS)


def test_every_requirement_of_a_target_is_pinned():
    """But for those below, which no result depends on."""
    names = {re.split(r"[^\w.-]", line, maxsplit=1)[0] for line in requirements()}
    assert names - pins().keys() == {"tqdm", "pytest-xdist"}
    assert pins().keys() - names == {"jaxlib"}


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        python = newest_pip(Path(folder) / "pip")
        if python is None:
            sys.exit("pip reaches no index (python -m pip config list)")
        found = [resolution(python, version, Path(folder)) for version in VERSIONS]
    RECORD.write_text(json.dumps({"digest": digest(), "on": str(date.today()), "found": found}, indent=2) + "\n")
    print(*found, sep="\n")
