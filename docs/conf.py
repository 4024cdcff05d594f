"""Sphinx's settings; `make docs` builds the site into ``docs/_build``."""

from __future__ import annotations

import re
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "tools")]

import site_pages  # noqa: E402

import sdesolve  # noqa: E402

site_pages.write()

project = "sdesolve"
author = copyright = "The sdesolve authors"
version = release = sdesolve.__version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_copybutton"]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = f"sdesolve {release}"
html_show_sphinx = False

default_role = "py:obj"  # a name in single backquotes: its page where there is one
autodoc_typehints_format = "short"
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
napoleon_use_ivar = True
python_maximum_signature_line_length = 100
python_use_unqualified_type_names = True
myst_enable_extensions = ["attrs_inline"]
myst_heading_anchors = 4


def setup(app) -> None:
    """Equations that docstrings indent are shown as they stand; links to files of the source lead to their pages."""

    def equations(app, what, name, thing, options, lines) -> None:
        section = next((k for k, line in enumerate(lines) if re.fullmatch(r"[A-Z][a-z]+:", line)), len(lines))
        for k in range(section - 1, 0, -1):
            before = next((line for line in reversed(lines[:k]) if line), "")
            if (
                lines[k].startswith("    ")
                and not lines[k - 1]
                and re.match(r"[^\s*-]", before)
                and before[-2:] != "::"
            ):
                lines[k:k] = ["::", ""]

    def relink(app, name, content) -> None:
        page = Path(app.env.doc2path(name))
        if page.suffix == ".md" and not name.startswith("generated/"):
            content[0] = site_pages.relinked(content[0], page, page)

    app.connect("autodoc-process-docstring", equations, priority=100)  # before napoleon
    app.connect("source-read", relink)


# Several classes have an attribute of one name, such as ``x``; which of them a mention means is plain where it stands.
suppress_warnings = ["ref.python"]
