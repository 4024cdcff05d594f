"""Pages of the site that are made: a page for every public name, one for each example, and the source's own pages.

``docs/conf.py`` calls `write` before Sphinx reads; nothing here needs Sphinx. Pages end up in ``docs/generated``.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import os
import pkgutil
import re
import shutil
from pathlib import Path
from types import ModuleType

import sdesolve_kernels

import sdesolve

__all__ = ["PAGES", "public_names", "relinked", "write"]

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
# Pages of the source that the site shows too, by their names there.
PAGES = {
    "CHANGELOG.md": "changelog",
    "CONTRIBUTING.md": "contributing",
    "kernels/README.md": "kernels",
    "benchmarks/results/problems.md": "problems",
    "benchmarks/results/schemes.md": "schemes",
    "benchmarks/results/work_precision.md": "work_precision",
    "benchmarks/results/learned_scores.md": "learned_scores",
    "benchmarks/results/images_digits.md": "images_digits",
}
_LINKED = PAGES | {"examples/README.md": "gallery/index"}
# Where a name is defined, and what that part of the library is called; others are called by their own names.
PARTS = {
    "integrate": "Solving",
    "solvers": "Solvers and samplers",
    "sde": "Equations",
    "reverse": "Equations",
    "conversions": "Equations",
    "jumps": "Equations",
    "models": "Equations with known laws",
    "brownian": "Noise",
    "control": "Noise",
    "_internal": "Noise",
    "carry": "Along paths",
    "crossing": "Along paths",
    "sums": "Along paths",
    "diffusions": "Processes",
    "chains": "Chains",
    "scores": "Scores",
    "sampling": "Sampling",
    "mcmc": "Markov chains",
    "training": "Training",
    "montecarlo": "Expectations",
    "ensembles": "Ensembles",
    "diagnostics": "Diagnostics",
}


def _offered(module: ModuleType) -> list[str]:
    """What a module offers: its ``__all__``, or else its own functions and classes."""
    if hasattr(module, "__all__"):
        return sorted(module.__all__, key=str.lower)
    own = (name for name, thing in vars(module).items() if getattr(thing, "__module__", None) == module.__name__)
    return sorted((name for name in own if not name.startswith("_") and callable(vars(module)[name])), key=str.lower)


def _modules() -> list[ModuleType]:
    found = [sdesolve]
    for info in pkgutil.walk_packages(sdesolve.__path__, "sdesolve."):
        public = not any(part.startswith("_") for part in info.name.split("."))
        if public and (info.name.count(".") == 1 or info.name.startswith("sdesolve.compat.")):
            found.append(importlib.import_module(info.name))
    return [*found, importlib.import_module("sdesolve.inverse.operators"), sdesolve_kernels]


def public_names() -> dict[str, dict[str, str]]:
    """Headings of the reference, and under each of them the dotted names and what kind of thing they are.

    A thing that two modules offer is listed under the first of them: `sdesolve` itself, then its modules by name.
    """
    found: dict[str, dict[str, str]] = {}
    seen: set[int] = set()
    for module in _modules():
        for name in _offered(module):
            thing = getattr(module, name)
            if inspect.ismodule(thing) or id(thing) in seen:
                continue
            seen.add(id(thing))
            part = getattr(thing, "__module__", module.__name__).split(".")[1:2]
            heading = f"`{module.__name__}`"
            if module is sdesolve:
                heading = PARTS.get(part[0], part[0].capitalize()) if part else "Other"
            kind = "class" if inspect.isclass(thing) else "function" if callable(thing) else "data"
            if inspect.isclass(thing) and issubclass(thing, BaseException):
                kind = "exception"
            found.setdefault(heading, {})[f"{module.__name__}.{name}"] = kind
    order = [*dict.fromkeys(PARTS.values())]
    return dict(sorted(found.items(), key=lambda item: order.index(item[0]) if item[0] in order else len(order)))


def _first_sentence(thing: object) -> str:
    doc = inspect.getdoc(thing) or ""
    line = " ".join(doc.split("\n\n")[0].split())
    ends = [m.start() for m in re.finditer(r"[.:] (?=[A-Z`])", line) if line[: m.start()].count("``") % 2 == 0]
    return (line[: ends[0]] if ends else line).rstrip(".:") + "."


def _resolve(dotted: str) -> object:
    module, _, name = dotted.rpartition(".")
    return getattr(importlib.import_module(module), name)


def write_reference(folder: Path) -> None:
    """``index.rst`` and a page for each name."""
    folder.mkdir(parents=True)
    lines = ["API reference", "=============", ""]
    for heading, names in public_names().items():
        title = heading.replace("`", "``")
        lines += [title, "-" * len(title), "", ".. list-table::", "   :widths: 30 70", ""]
        for dotted in names:
            shown = dotted.removeprefix("sdesolve.") if not heading.startswith("`") else dotted.rpartition(".")[2]
            lines += [f"   * - :doc:`{shown} <{dotted}>`", f"     - {_first_sentence(_resolve(dotted))}"]
        lines += [""]
        for dotted, kind in names.items():
            module, _, name = dotted.rpartition(".")
            directive = {"class": "autoclass", "exception": "autoexception", "data": "autodata"}.get(
                kind, "autofunction"
            )
            page = [name, "=" * len(name), "", f".. currentmodule:: {module}", "", f".. {directive}:: {name}"]
            if kind in ("class", "exception"):
                page += ["   :members:", "   :show-inheritance:"]
            (folder / f"{dotted}.rst").write_text(":orphan:\n\n" + "\n".join(page) + "\n")
    (folder / "index.rst").write_text("\n".join(lines))


def relinked(text: str, source: Path, page: Path) -> str:
    """The text of a page of the source, with links that lead on from its place on the site.

    Args:
        text: Markdown.
        source: the file that it is from.
        page: the file that it becomes.
    """

    def link(match: re.Match[str]) -> str:
        target, hash_, anchor = match[1].partition("#")
        if re.match(r"\w+:", target) or not target:
            return match[0]
        to = Path(os.path.normpath(source.parent / target))
        known = _LINKED.get(to.relative_to(ROOT).as_posix())
        to = DOCS / "generated" / f"{known}.md" if known else to
        return f"]({Path(os.path.relpath(to, page.parent)).as_posix()}{hash_}{anchor})"

    return re.sub(r"\]\(([^)\s]+)\)", link, text)


def write_pages(folder: Path) -> None:
    """Those of `PAGES`."""
    for name, stem in PAGES.items():
        page = folder / f"{stem}.md"
        text = relinked((ROOT / name).read_text(), ROOT / name, page)
        if "\n## " not in text:
            text = text.replace("\n### ", "\n## ")  # Sphinx wants no level left out
        page.write_text(text)


def write_gallery(folder: Path) -> None:
    """``index.md``, pictures beside titles, and a page for each example: text, picture, numbers, code."""
    folder.mkdir(parents=True)
    source = ROOT / "examples" / "README.md"
    sections = re.split(r"^## ", source.read_text(), flags=re.MULTILINE)[1:]
    index = ["# Gallery", "", "Scripts that run as they stand and end in numbers beside exact ones.", ""]
    index += ["| | |", "|---|---|"]
    pages = []
    for script in sorted((ROOT / "examples").glob("*.py")):
        title, _, rest = (ast.get_docstring(ast.parse(script.read_text())) or "").partition("\n\n")
        title = " ".join(title.split()).removesuffix(".")
        short = title.partition(":")[0]
        numbers = next((s.partition("\n")[2] for s in sections if f"assets/{script.stem}.png" in s), "")
        picture = ROOT / "assets" / ("solver_errors.png" if script.stem == "quickstart" else f"{script.stem}.png")
        if not numbers and picture.exists():
            numbers = f"![{title}](../assets/{picture.name})\n"
        page = folder / f"{script.stem}.md"
        code = f"```{{literalinclude}} ../../../examples/{script.name}\n```"
        body = f"# {short}\n\n{title}.\n\n{rest.replace('::', ':')}\n\n{numbers}\n{code}\n"
        page.write_text(relinked(body, source, page))
        shown = f"[![{title}](../../../assets/{picture.name}){{width=320px}}]({page.name})" if picture.exists() else ""
        index.append(f"| {shown} | [{title}]({page.name}) |")
        pages.append(script.stem)
    index += ["", "```{toctree}", ":hidden:", "", *pages, "```", ""]
    (folder / "index.md").write_text("\n".join(index))


def write(folder: Path = DOCS / "generated") -> None:
    """All of them, from nothing.

    Args:
        folder: where; what was there is removed.
    """
    shutil.rmtree(folder, ignore_errors=True)
    write_reference(folder / "api")
    write_pages(folder)
    write_gallery(folder / "gallery")
