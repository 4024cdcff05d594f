"""What a release is made of: one version, requirements that are used, a page for every public name."""

from __future__ import annotations

import ast
import inspect
import re
import subprocess
import sys
import tomllib
from importlib import import_module
from pathlib import Path

import sdesolve as sds

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def test_the_version_comes_from_one_place():
    assert re.fullmatch(r"\d+\.\d+\.\d+", sds.__version__)
    assert PROJECT["dynamic"] == ["version"]
    assert f"\nversion: {sds.__version__}\n" in (ROOT / "CITATION.cff").read_text()
    heads = re.findall(r"^## (.+)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert heads[0] == "Unreleased"
    assert all(re.fullmatch(r"\d+\.\d+\.\d+ - \d{4}-\d\d-\d\d", head) for head in heads[1:])
    assert not heads[1:] or heads[1].startswith(sds.__version__)


def names(requirements: list[str]) -> set[str]:
    return {re.split(r"[^\w-]", line, maxsplit=1)[0] for line in requirements}


def test_requirements_are_what_the_library_imports():
    found = set()
    for path in [*(ROOT / "sdesolve").rglob("*.py"), *(ROOT / "kernels").rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                found |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                found.add(node.module.partition(".")[0])
    found -= {*sys.stdlib_module_names, "sdesolve", "sdesolve_kernels"}
    core = names(PROJECT["dependencies"])
    extras = {extra: names(PROJECT["optional-dependencies"][extra]) for extra in ("cpu", "gpu", "plot", "arrays")}
    assert core <= found
    assert all(extra <= found for extra in extras.values())
    # Numba brings the second; the others are looked for where somebody has them, or asks for what needs them.
    others = {"llvmlite", "torchsde", "diffusers", "huggingface_hub", "cloudpickle", "IPython"}
    assert found - core - set().union(*extras.values()) <= others


def test_it_runs_without_any_compiler():
    code = """
import importlib.util, sys
absent = ("numba", "llvmlite", "triton", "scipy", "matplotlib", "zarr", "xarray")
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name.partition(".")[0] in absent else find(name, *rest)
sys.modules.update(dict.fromkeys(absent))
import torch, sdesolve as sds
sde = sds.SDE(lambda x, t: 0.05 * x, lambda x, t: 0.2 * x)
sol = sds.solve(sde, torch.ones(8, 1), 0.0, 1.0, 4, solver=sds.SRIW1(), seed=0)
print(sol.stats.execution, sol.stats.reason)
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert run.stdout.startswith("eager")
    assert "pip install 'sdesolve[cpu]'" in run.stdout


def test_every_public_name_has_a_page(tmp_path):
    sys.path.insert(0, str(ROOT / "tools"))
    try:
        site_pages = import_module("site_pages")
    finally:
        sys.path.pop(0)
    site_pages.write(tmp_path / "generated")
    pages = {path.stem for path in (tmp_path / "generated" / "api").glob("*.rst")}
    shown = {id(getattr(import_module(page.rpartition(".")[0]), page.rpartition(".")[2])) for page in pages - {"index"}}
    offered = [sds, *(m for name, m in vars(sds).items() if inspect.ismodule(m) and not name.startswith("_"))]
    for module in offered:
        for name in getattr(module, "__all__", []):
            assert inspect.ismodule(getattr(module, name)) or id(getattr(module, name)) in shown, name
    index = (tmp_path / "generated" / "api" / "index.rst").read_text()
    assert all(f"<{page}>" in index for page in pages - {"index"})
    examples = {path.stem for path in (ROOT / "examples").glob("*.py")}
    assert {path.stem for path in (tmp_path / "generated" / "gallery").glob("*.md")} == examples | {"index"}
