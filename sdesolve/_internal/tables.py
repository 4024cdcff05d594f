"""Small HTML tables for notebooks."""

from __future__ import annotations

import html
from collections.abc import Mapping

__all__ = ["html_table"]


def html_table(title: str, rows: Mapping[str, str]) -> str:
    """A title and a row for each entry, escaped."""
    body = "".join(f"<tr><th>{html.escape(name)}</th><td>{html.escape(text)}</td></tr>" for name, text in rows.items())
    return f"<b>{html.escape(title)}</b><table>{body}</table>"
