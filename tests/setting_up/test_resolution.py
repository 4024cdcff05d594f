"""constraints.txt suits every supported Python: pip resolves all of it, without installing anything.

Where a Python is on the machine, pip runs in it, as `make` does. For the others it is told their version
(``--python-version``), which chooses the right builds but evaluates markers such as ``python_version < "3.13"`` for the
Python that runs it. What was done for which is in the summary.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
VERSIONS = ("3.11", "3.12", "3.13", "3.14")
DAY = 24 * 3600
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
    """All that `make` and `make peers` ask for."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]

    def extra(name: str) -> set[str]:
        found = set()
        for line in project["optional-dependencies"][name]:
            own = re.fullmatch(r"sdesolve\[(\w+)\]", line)
            found |= extra(own[1]) if own else {line}
        return found

    return sorted({*project["dependencies"], *extra("dev"), *extra("bench")})


@pytest.fixture(scope="module")
def newest_pip(tmp_path_factory) -> Path:
    """A Python with the newest pip: older ones download all that they resolve, gigabytes, even in a dry run."""
    folder = tmp_path_factory.mktemp("pip")
    subprocess.run([sys.executable, "-m", "venv", folder], check=True, capture_output=True)
    python = folder / "bin" / "python"
    # --force-reinstall: with no index in reach pip would be content with itself
    command = [python, "-m", "pip", "--retries", "1", "install", "--force-reinstall", "pip"]
    run = subprocess.run(command, capture_output=True, text=True)
    if run.returncode:
        pytest.skip("constraints.txt was not resolved, as pip reaches no index (python -m pip config list)")
    return python


def resolve(python: Path, target: Path | str, folder: Path, plain: bool = False) -> dict[str, list[str]]:
    """What pip would install for an interpreter, or for a version as text: versions and requirements by name.

    ``plain``: without what this machine adds to the index. Nothing, if that needs a connection that isn't there.
    """
    report = folder / "report.json"
    command = [python, "-m", "pip", "--no-input", "--no-color", "--disable-pip-version-check"]
    if isinstance(target, Path):
        command += ["--python", target, "install", "-e", f"{ROOT}[dev,bench]"]
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


def stamp(version: str) -> Path | None:
    """Where an environment notes that these very files were resolved for a Python."""
    files = [ROOT / "constraints.txt", ROOT / "pyproject.toml", Path(__file__)]
    digest = hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:16]
    return Path(sys.prefix) / f".resolved-{version}-{digest}" if sys.prefix != sys.base_prefix else None


@pytest.mark.parametrize("version", VERSIONS)
def test_constraints_resolve(version, request, tmp_path, record_property):
    """Pip takes 40 s for all of them, so an environment in which nothing has changed does it once a day."""
    note = stamp(version)
    if note is not None and note.exists() and time.time() - note.stat().st_mtime < DAY:
        record_property("summary", f"{note.read_text()}, within the last day, with these files")
        return
    newest_pip = request.getfixturevalue("newest_pip")
    path = interpreter(version)
    how = f"constraints.txt resolves on Python {version}: " + (
        "" if path else "not found on this machine, pip was told its version; "
    )
    found = resolve(newest_pip, path or version, tmp_path)
    for name, pin in pins().items():
        if name != "triton" or sys.platform == "linux":
            assert found[name][0].split("+")[0] == pin, name
    builds = [found["torch"]]
    if not any(line.startswith("triton") for line in found["torch"]):
        # A CPU build, from a folder or index of this machine: others have the build that asks for one Triton.
        builds.append(resolve(newest_pip, path or version, tmp_path, plain=True).get("torch"))
    for torch in builds:
        if torch is None:
            how += "no other build, as the ordinary index is not in reach, "
            continue
        triton = next((line.split(";")[0] for line in torch if line.startswith("triton")), "no Triton")
        how += f"torch {torch[0]} ({triton}), "
    record_property("summary", how.rstrip(", "))
    if note is not None:
        note.write_text(how.rstrip(", "))


def test_every_requirement_of_a_target_is_pinned():
    """But for those below, which no result depends on."""
    names = {re.split(r"[^\w.-]", line, maxsplit=1)[0] for line in requirements()}
    assert names - pins().keys() == {"tqdm", "pytest-xdist"}
    assert pins().keys() - names == {"jaxlib"}
