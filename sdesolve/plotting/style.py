"""How all figures look, and figures of several panels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from sdesolve._internal.arguments import whole_number

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Told apart by people with colour-blindness (Okabe and Ito 2008), the pale yellow left out; markers differ as well.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
INK, GREY = "#222222", "#9a9a9a"
_STYLE: Any = {  # matplotlib's stubs name every key in a type of their own
    "font.size": 11,
    "axes.titlesize": 12,
    "axes.labelcolor": INK,
    "axes.edgecolor": GREY,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.8,
    "xtick.color": GREY,
    "ytick.color": GREY,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "text.color": INK,
}


def panels(
    columns: int,
    rows: int = 1,
    *,
    titles: Sequence[str] = (),
    width: float = 2.6,
    height: float = 2.6,
) -> tuple[Figure, list[Axes]]:
    """A figure of ``rows * columns`` panels, row by row, to be drawn on by what takes ``axes``, or by matplotlib.

    Args:
        columns: panels in a row.
        rows: rows of panels.
        titles: of the first panels; the others have none.
        width: of a panel, in inches.
        height: of a panel, in inches.

    Raises:
        ValueError: no panel, or more titles than panels.
        ImportError: matplotlib is missing.
    """
    columns, rows = whole_number(columns, "columns", 1), whole_number(rows, "rows", 1)
    if len(titles) > columns * rows:
        raise ValueError(f"{len(titles)} titles for {columns * rows} panels")
    figure, axes = new_figure(width * columns, height * rows, columns, rows)
    for title, panel in zip(titles, axes, strict=False):
        panel.set_title(title, loc="left", fontsize=11)
    return figure, axes


def new_figure(width: float, height: float, columns: int = 1, rows: int = 1) -> tuple[Figure, list[Axes]]:
    """A figure of so many inches with its axes, in the style of this library."""
    try:
        import matplotlib
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            "pictures need matplotlib, which comes with the 'plot' extra: pip install 'sdesolve[plot]'"
        ) from error
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(width, height), layout="constrained", dpi=160)
        FigureCanvasAgg(figure)
        return figure, list(figure.subplots(rows, columns, squeeze=False).flat)
