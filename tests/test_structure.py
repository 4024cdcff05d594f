"""What holds the packages apart: import directions, light imports, no package named `kernels`."""

from __future__ import annotations

import ast
import enum
import importlib.util
import inspect
import pkgutil
import pydoc
import re
import subprocess
import sys
from pathlib import Path

import pytest

import sdesolve

ROOT = Path(__file__).parents[1]
PUBLIC = [
    *("SDE", "ODE", "solve", "sample", "EulerMaruyama", "Milstein", "Heun", "RK4", "BrownianPath"),
    *("VP", "VE", "SubVP", "OU", "EDM", "LinearDiffusion", "ReverseSDE", "ProbabilityFlow"),
    *("Gaussian", "GaussianMixture", "NetworkScore", "DenoisingScoreMatching", "train"),
    *("EnergyScore", "ClassifierGuidance", "ClassifierFreeGuidance", "drop_labels"),
]
# A module may import from its own layer and from layers to its left; a folder is one layer but for the modules named.
# `reverse` stands left of `diffusions` because a process makes its own reversal, which needs nothing of the process but
# drift and diffusion.
LAYERS = [
    {"sdesolve_kernels", "sdesolve._internal", "sdesolve.grids", "sdesolve.sde"},
    {
        "sdesolve.reverse",
        "sdesolve.brownian",
        "sdesolve.control",
        "sdesolve.conversions",
        "sdesolve.carry",
        "sdesolve.crossing",
        "sdesolve.delays",
        "sdesolve.jumps",
        "sdesolve.plotting",
        "sdesolve.sums",
    },
    {"sdesolve.diffusions", "sdesolve.models", "sdesolve.nn", "sdesolve.inverse.operators"},
    {"sdesolve.scores", "sdesolve.solvers", "sdesolve.inverse"},
    {"sdesolve.chains", "sdesolve.likelihood.trace_estimators", "sdesolve.likelihood.quantisation"},
    {"sdesolve.integrate", "sdesolve.mcmc"},
    {
        "sdesolve.sampling",
        "sdesolve.oracle",
        "sdesolve.metrics",
        "sdesolve.flows",
        "sdesolve.parallel",
        "sdesolve.likelihood",
        "sdesolve.adapters",
        "sdesolve.montecarlo",
    },
    {"sdesolve.training"},
    {"sdesolve.ensembles", "sdesolve.diagnostics", "sdesolve.compat"},
    {"sdesolve.__main__"},
]


def layer_of(module: str) -> int | None:
    ranks = {n: rank for rank, names in enumerate(LAYERS) for n in names}
    named = [n for n in ranks if module == n or module.startswith(n + ".")]
    return ranks[max(named, key=len)] if named else None


def imports_of(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            deeper = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {d if layer_of(d) is not None else node.module for d in deeper}
    return found


def modules():
    for path in sorted((ROOT / "sdesolve").rglob("*.py")):
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        if name != "sdesolve":
            yield pytest.param(name, path, id=name)


@pytest.mark.parametrize(("name", "path"), list(modules()))
def test_imports_run_one_way(name, path):
    own = layer_of(name)
    assert own is not None, f"{name} has no layer: give it one in LAYERS"
    for imported in imports_of(path):
        rank = layer_of(imported)
        if rank is not None:
            assert rank <= own, f"{name} (layer {own}) imports {imported} (layer {rank})"
        assert imported != "sdesolve" or name == "sdesolve.__main__", f"{name} imports the package that imports it"
        assert not imported.startswith("kernels."), "that path makes a second module object"


def test_kernels_know_no_sde():
    for path in (ROOT / "kernels").rglob("*.py"):
        assert not any(m == "sdesolve" or m.startswith("sdesolve.") for m in imports_of(path)), path


def test_only_kernels_import_triton_and_numba():
    for path in [*(ROOT / "sdesolve").rglob("*.py"), *(ROOT / "kernels").rglob("*.py")]:
        heavy = {m.split(".")[0] for m in imports_of(path)} & {"triton", "numba", "llvmlite"}
        assert not heavy or path.parent.name in ("_numba", "_triton"), path


def test_kernels_is_not_a_package():
    assert not (ROOT / "kernels" / "__init__.py").exists()
    assert not (ROOT / "tests" / "kernels").exists()


def test_importing_loads_nothing_heavy():
    heavy = ("triton", "numba", "matplotlib", "scipy", "sklearn", "sdesolve_kernels.trajectory")
    code = f"import sys, sdesolve; print(*(m for m in {heavy} if m in sys.modules))"
    # torch may load triton by itself on a machine with a GPU; what counts is what we add
    baseline = code.replace(", sdesolve", ", torch")
    runs = [
        subprocess.run(
            [sys.executable, "-c", c],
            capture_output=True,
            text=True,
            check=True,
            cwd=ROOT,
            env={"PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"},
        ).stdout
        for c in (code, baseline)
    ]
    assert runs[0] == runs[1]


def test_completion_and_help_offer_the_public_names():
    assert set(dir(sdesolve)) == set(sdesolve.__all__)
    assert all(getattr(sdesolve, name).__doc__ for name in sdesolve.__all__)
    for module in (
        sdesolve,
        sdesolve.nn,
        sdesolve.inverse,
        sdesolve.mcmc,
        sdesolve.metrics,
        sdesolve.models,
        sdesolve.oracle,
    ):
        text = pydoc.plain(pydoc.render_doc(module))
        classes = [n for n in module.__all__ if isinstance(getattr(module, n), type)]
        assert classes
        assert all(f"class {name}" in text for name in classes), module.__name__


def test_every_module_imports_and_the_public_names_are_there():
    for module in pkgutil.walk_packages(sdesolve.__path__, "sdesolve."):
        assert importlib.util.find_spec(module.name) is not None
    for name in PUBLIC:
        assert callable(getattr(sdesolve, name))


def public_objects() -> dict[str, object]:
    """Everything that an ``__all__`` of the library's public modules offers, by name."""
    modules = [sdesolve, *(m for name, m in vars(sdesolve).items() if inspect.ismodule(m) and not name.startswith("_"))]
    return {f"{m.__name__}.{name}": getattr(m, name) for m in modules for name in getattr(m, "__all__", [])}


def documented_arguments(doc: str) -> set[str]:
    """Names in the ``Args`` or ``Attributes`` section of a docstring."""
    sections = re.split(r"^(?:Args|Attributes):\n", doc, flags=re.MULTILINE)[1:]
    entries = [line for s in sections for line in re.findall(r"^ {4}(\S[^:]*):", re.split(r"\n(?=\S)", s)[0], re.M)]
    return {name.strip().lstrip("*") for line in entries for name in line.split(",")}


def test_docstrings_explain_every_argument():
    """In one dialect: a section ``Args`` (``Attributes`` of records), or `another object` whose arguments they are."""
    short = {}
    for name, thing in public_objects().items():
        if not (inspect.isclass(thing) or inspect.isfunction(thing)):
            continue
        if inspect.isclass(thing) and (issubclass(thing, enum.Enum) or getattr(thing, "_is_protocol", False)):
            continue
        doc = inspect.getdoc(thing) or ""
        if not re.search(r"Arguments and errors as for `\w+`|`\w+`, of the same arguments", doc):
            try:
                arguments = set(inspect.signature(thing).parameters) - {"self", "args", "kwargs", "message"}
            except ValueError:  # made in C
                continue
            short[name] = arguments - documented_arguments(doc)
    assert {name: missing for name, missing in short.items() if missing} == {}
    assert len(short) > 150
