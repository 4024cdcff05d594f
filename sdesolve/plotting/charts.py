"""Grids of images, error curves, sample paths."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sdesolve._internal.arguments import short
from sdesolve.plotting.style import COLOURS, GREY, MARKERS, new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def image_grid(
    images: Tensor,
    *,
    columns: int | None = None,
    title: str | None = None,
    row_labels: Sequence[str] | None = None,
    value_range: tuple[float, float] | None = None,
) -> Figure:
    """A grid of images, row by row.

    Args:
        images: ``(n, height, width)`` or ``(n, 1, height, width)``, shown in grey, or ``(n, 3, height, width)``.
        columns: images in a row; by default a grid that is about square.
        title: above the grid.
        row_labels: one for each row, at its left.
        value_range: values shown as black and as white; the extremes of all images by default.

    Raises:
        ValueError: another shape, no image, or a wrong number of row labels.
        ImportError: matplotlib is missing.
    """
    x = images.detach().cpu().double()
    x = x[:, None] if x.ndim == 3 else x
    if x.ndim != 4 or x.shape[1] not in (1, 3) or x.numel() == 0:
        raise ValueError(
            "images must be (n, height, width) or (n, channels, height, width) with 1 or 3 channels and n of at least "
            f"1, got {tuple(images.shape)}"
        )
    n, _, height, width = x.shape
    columns = min(n, math.ceil(math.sqrt(n))) if columns is None else columns
    if columns < 1:
        raise ValueError(f"columns must be at least 1, got {short(columns)}")
    rows = math.ceil(n / columns)
    if row_labels is not None and len(row_labels) != rows:
        raise ValueError(f"row_labels must have one label for each of {rows} rows, got {len(row_labels)}")
    low, high = value_range if value_range is not None else (float(x.min()), float(x.max()))
    x = ((x - low) / max(high - low, 1e-300)).clamp(0.0, 1.0)

    # One picture with gaps of white, rather than one axes per image: hundreds of images stay quick.
    gap = max(1, round(0.08 * max(height, width)))
    canvas = torch.ones(rows * (height + gap) - gap, columns * (width + gap) - gap, x.shape[1], dtype=x.dtype)
    for i, image in enumerate(x):
        top, left = (i // columns) * (height + gap), (i % columns) * (width + gap)
        canvas[top : top + height, left : left + width] = image.permute(1, 2, 0)
    scale = min(9.0 / canvas.shape[1], 9.0 / canvas.shape[0], 0.8 / max(height, width))
    heading = 0.4 if title else 0.0
    beside = 0.3 + 0.095 * max(map(len, row_labels)) if row_labels else 0.0  # inches, of letters of 11 points
    figure, (axes,) = new_figure(canvas.shape[1] * scale + beside, canvas.shape[0] * scale + heading)
    axes.imshow(canvas.squeeze(-1).numpy(), cmap="gray", vmin=0.0, vmax=1.0, interpolation="nearest")
    axes.set(xticks=[])
    for spine in axes.spines.values():
        spine.set_visible(False)
    if row_labels is None:
        axes.set(yticks=[])
    else:
        axes.set_yticks([k * (height + gap) + (height - 1) / 2 for k in range(rows)], labels=list(row_labels))
        axes.tick_params(length=0)
    if title:
        axes.set_title(title, loc="left", pad=10)
    return figure


def error_curves(
    curves: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    *,
    x_label: str = "steps",
    y_label: str = "error",
    title: str | None = None,
    orders: Sequence[float] = (),
    floor: tuple[str, float] | None = None,
    axes: Axes | None = None,
) -> Figure:
    """Errors against cost on two logarithmic axes.

    Args:
        curves: for each name, costs (steps, evaluations, milliseconds) and errors. Errors that are zero, negative or
            not finite cannot be drawn on these axes and are left out.
        x_label: what costs are.
        y_label: what errors are.
        title: above the axes.
        orders: slopes ``error ~ cost^-order`` to draw in grey for comparison.
        floor: name and value of an error that cannot be beaten, such as the distance between two real samples; a grey
            line.
        axes: where to draw, from `panels`; by default a figure of its own is made.

    Raises:
        ValueError: no curve, or one with different numbers of costs and errors.
        ImportError: matplotlib is missing.
    """
    if not curves:
        raise ValueError("there is no curve to draw")
    alone = axes is None
    if axes is None:
        _, (axes,) = new_figure(6.4, 4.4)
    axes.set_xscale("log")
    axes.set_yscale("log")
    drawn: list[tuple[float, float]] = []
    for i, (name, (costs, errors)) in enumerate(curves.items()):
        if len(costs) != len(errors):
            raise ValueError(f"curve {short(name)} has {len(costs)} costs and {len(errors)} errors; they go in pairs")
        pairs = [(float(c), float(e)) for c, e in zip(costs, errors, strict=True)]
        points = [(c, e) for c, e in pairs if 0.0 < e < math.inf and 0.0 < c < math.inf]
        drawn += points
        colour, marker = COLOURS[i % len(COLOURS)], MARKERS[i % len(MARKERS)]
        xs, ys = [c for c, _ in points], [e for _, e in points]
        axes.plot(xs, ys, color=colour, marker=marker, markersize=5, linewidth=1.6, label=name)
    if drawn:
        _slopes(axes, drawn, orders)
        _cost_ticks(axes, sorted({c for c, _ in drawn}))
    if floor is not None:
        axes.axhline(floor[1], color=GREY, linewidth=1.0, linestyle=(0, (4, 3)), zorder=1)
        _beside(axes, floor[0], (1.0, floor[1]), xycoords=("axes fraction", "data"))
    axes.set(xlabel=x_label, ylabel=y_label)
    if title:
        axes.set_title(title, loc="left", pad=10)
    axes.grid(axis="y", color="#ebebeb", linewidth=0.7)
    axes.set_axisbelow(True)
    figure: Any = axes.get_figure()
    if alone:
        figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=10)
    else:
        axes.legend(frameon=False, fontsize=8.5)
    return figure


def paths(
    ts: Tensor,
    xs: Tensor,
    *,
    component: int = 0,
    most: int = 60,
    title: str | None = None,
    y_label: str = "x",
) -> Figure:
    """One component of sample paths over time, with the histogram of where all of them end.

    Args:
        ts: ``(times,)``, in either direction; the axis follows the direction of integration.
        xs: ``(times, batch, *state)``.
        component: index into the flattened state.
        most: draw no more than so many paths; the histogram is of all.
        title: above the axes.
        y_label: what the component is.

    Raises:
        ValueError: shapes that do not fit, or no such component.
        ImportError: matplotlib is missing.
    """
    t, x = ts.detach().cpu().double(), xs.detach().cpu().double()
    if t.ndim != 1 or x.ndim < 2 or x.shape[0] != t.shape[0] or x.numel() == 0:
        raise ValueError(
            f"paths needs ts (times,) and xs (times, batch, *state), got {tuple(ts.shape)} and {tuple(xs.shape)}"
        )
    x = x.reshape(*x.shape[:2], -1)
    if not 0 <= component < x.shape[2]:
        raise ValueError(
            f"component must be in [0, {x.shape[2]}), the size of the flattened state, got {short(component)}"
        )
    x = x[:, :, component]
    figure, (axes,) = new_figure(7.2, 4.0)
    shown = x[:, :most]
    opacity = min(0.8, max(0.15, 12.0 / shown.shape[1]))
    axes.plot(t.numpy(), shown.numpy(), color=COLOURS[0], linewidth=0.8, alpha=opacity)
    axes.set(xlabel="t", ylabel=y_label, xlim=(float(t[0]), float(t[-1])))
    if title:
        axes.set_title(title, loc="left", pad=10)
    side = axes.inset_axes((1.02, 0.0, 0.16, 1.0), sharey=axes)
    side.hist(x[-1].numpy(), bins=min(60, max(10, x.shape[1] // 20)), orientation="horizontal", color=COLOURS[0])
    side.set(xticks=[])
    side.tick_params(left=False, labelleft=False)
    for spine in side.spines.values():
        spine.set_visible(False)
    return figure


def _slopes(axes: Axes, drawn: list[tuple[float, float]], orders: Sequence[float]) -> None:
    """Grey lines of slope ``-order``, from a little above the worst error."""
    first, last = min(c for c, _ in drawn), max(c for c, _ in drawn)
    top, bottom = 1.5 * max(e for _, e in drawn), min(e for _, e in drawn)
    for order in orders:
        # Down to the lowest error drawn, so that a steep slope does not stretch the axis.
        end = min(last, first * (top / bottom) ** (1.0 / order))
        axes.plot(
            [first, end], [top, top * (end / first) ** -order], color=GREY, linewidth=1.0, linestyle=":", zorder=1
        )
        _beside(axes, f"order {order:g}", (end, top * (end / first) ** -order))


def _beside(axes: Axes, text: str, place: tuple[float, float], **options: Any) -> None:
    """A small grey note to the right of a place."""
    axes.annotate(
        text, place, xytext=(5, 0), textcoords="offset points", color="#6e6e6e", fontsize=9, va="center", **options
    )


def _cost_ticks(axes: Axes, costs: list[float]) -> None:
    """Ticks at the costs themselves while they are few, as plain numbers."""
    if 0 < len(costs) <= 10:
        axes.set_xticks(costs, labels=[f"{c:g}" for c in costs])
        axes.tick_params(axis="x", which="minor", bottom=False, labelbottom=False)
