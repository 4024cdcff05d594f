"""Grids of images, error curves, and sample paths: lines, quantiles, moments, densities, phase planes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from sdesolve._internal.arguments import short, whole_number
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
    t, x = _of_one(ts, xs, component, "paths")
    figure, (axes,) = new_figure(7.2, 4.0)
    shown = x[:, :most]
    opacity = min(0.8, max(0.15, 12.0 / shown.shape[1]))
    axes.plot(t.numpy(), shown.numpy(), color=COLOURS[0], linewidth=0.8, alpha=opacity)
    _over_time(figure, axes, t, title, y_label)
    side = axes.inset_axes((1.02, 0.0, 0.16, 1.0), sharey=axes)
    ends = x[-1][x[-1].isfinite()]
    side.hist(ends.numpy(), bins=min(60, max(10, x.shape[1] // 20)), orientation="horizontal", color=COLOURS[0])
    side.set(xticks=[])
    side.tick_params(left=False, labelleft=False)
    for spine in side.spines.values():
        spine.set_visible(False)
    return figure


def fan(
    ts: Tensor,
    xs: Tensor,
    *,
    component: int = 0,
    levels: Sequence[float] = (0.5, 0.8, 0.95),
    title: str | None = None,
    y_label: str = "x",
) -> Figure:
    """The median of one component over time, and the central bands that hold such shares of the paths.

    Args:
        ts: ``(times,)``, in either direction; the axis follows the direction of integration.
        xs: ``(times, batch, *state)``.
        component: index into the flattened state.
        levels: shares in (0, 1), of the paths that a band holds.
        title: above the axes.
        y_label: what the component is.

    Raises:
        ValueError: shapes that do not fit, no such component, or a level that is no share.
        ImportError: matplotlib is missing.
    """
    t, x = _of_one(ts, xs, component, "fan")
    if not levels or not all(0 < level < 1 for level in levels):
        raise ValueError(f"levels must be shares in (0, 1), such as (0.5, 0.95), got {short(levels)}")
    figure, (axes,) = new_figure(7.2, 4.0)
    for level in sorted(levels, reverse=True):
        low, high = np.quantile(x.numpy(), [0.5 - level / 2, 0.5 + level / 2], axis=1)
        axes.fill_between(t.numpy(), low, high, color=COLOURS[0], alpha=0.22, linewidth=0,
                          label=f"{level:.0%} of paths")  # fmt: skip
    axes.plot(t.numpy(), np.median(x.numpy(), axis=1), color=COLOURS[0], linewidth=1.5, label="median")
    return _over_time(figure, axes, t, title, y_label, legend=True)


def band(
    ts: Tensor,
    mean: Tensor,
    variance: Tensor,
    *,
    component: int = 0,
    title: str | None = None,
    y_label: str = "x",
) -> Figure:
    """The mean of one component over time, with two standard deviations of the paths to either side.

    Args:
        ts: ``(times,)``, in either direction.
        mean, variance: ``(times, *state)``.
        component: index into the flattened state.
        title: above the axes.
        y_label: what the component is.

    Raises:
        ValueError: shapes that do not fit, or no such component.
        ImportError: matplotlib is missing.
    """
    t, m = _of_one(ts, mean[:, None], component, "band")
    _, v = _of_one(ts, variance[:, None], component, "band")
    m, reach = m[:, 0], 2 * v[:, 0].clamp(min=0).sqrt()
    figure, (axes,) = new_figure(7.2, 4.0)
    axes.fill_between(t.numpy(), (m - reach).numpy(), (m + reach).numpy(), color=COLOURS[0], alpha=0.3, linewidth=0,
                      label="2 standard deviations")  # fmt: skip
    axes.plot(t.numpy(), m.numpy(), color=COLOURS[0], linewidth=1.5, label="mean")
    return _over_time(figure, axes, t, title, y_label, legend=True)


def density(
    ts: Tensor,
    xs: Tensor,
    *,
    component: int = 0,
    bins: int = 80,
    title: str | None = None,
    y_label: str = "x",
) -> Figure:
    """How the paths' density in one component changes over time: a histogram for each saved time, side by side.

    Each column is scaled to its own largest value. The range leaves out the outermost 0.1% of all values, and states
    that are not finite are in no histogram.

    Args:
        ts: ``(times,)``, in either direction, at least two.
        xs: ``(times, batch, *state)``.
        component: index into the flattened state.
        bins: of each histogram, at least 2.
        title: above the axes.
        y_label: what the component is.

    Raises:
        ValueError: shapes that do not fit, no such component, too few bins, or no finite state.
        ImportError: matplotlib is missing.
    """
    bins = whole_number(bins, "bins", 2)
    t, x = _of_one(ts, xs, component, "density")
    if len(t) < 2:
        raise ValueError("density needs two times or more; solve with save_at='grid'")
    finite = x[x.isfinite()].numpy()
    if not finite.size:
        raise ValueError("density needs finite states, and none is")
    low, high = np.quantile(finite, [0.0005, 0.9995])
    low, high = (low - 0.5, high + 0.5) if not low < high else (low, high)
    counts = np.stack([np.histogram(row, bins, (low, high))[0] for row in x.numpy()], axis=1).astype(float)
    figure, (axes,) = new_figure(7.2, 4.0)
    edges = torch.cat([t[:1], 0.5 * (t[1:] + t[:-1]), t[-1:]]).numpy()
    axes.pcolormesh(edges, np.linspace(low, high, bins + 1), counts / counts.max(0).clip(1.0), cmap="Blues",
                    rasterized=True)  # fmt: skip
    return _over_time(figure, axes, t, title, y_label)


def phase(
    xs: Tensor,
    *,
    components: tuple[int, int] = (0, 1),
    most: int = 24,
    title: str | None = None,
    labels: tuple[str, str] | None = None,
) -> Figure:
    """Two components of a few paths against each other, with a dot where each ends.

    Args:
        xs: ``(times, batch, *state)``.
        components: two indices into the flattened state.
        most: draw no more than so many paths.
        title: above the axes.
        labels: of the axes; ``x0`` and the like if not given.

    Raises:
        ValueError: shapes that do not fit, or no such components.
        ImportError: matplotlib is missing.
    """
    if len(components) != 2:
        raise ValueError(f"components must be two indices, got {short(components)}")
    ts = torch.arange(len(xs), dtype=torch.float64)
    a, b = (_of_one(ts, xs, i, "phase")[1][:, :most].numpy() for i in components)
    figure, (axes,) = new_figure(4.6, 4.4)
    opacity = min(0.9, max(0.25, 8.0 / a.shape[1]))
    axes.plot(a, b, color=COLOURS[0], linewidth=0.8, alpha=opacity)
    axes.plot(a[-1], b[-1], "o", color=COLOURS[1], markersize=3)
    first, second = labels or tuple(f"x{i}" for i in components)
    axes.set(xlabel=first, ylabel=second)
    if title:
        axes.set_title(title, loc="left", pad=10)
    return figure


def _of_one(ts: Tensor, xs: Tensor, component: int, what: str) -> tuple[Tensor, Tensor]:
    """Times, and one component of the paths, ``(times, batch)``, in float64 on the host."""
    t, x = ts.detach().cpu().double(), xs.detach()
    if t.ndim != 1 or x.ndim < 2 or x.shape[0] != t.shape[0] or x.numel() == 0:
        raise ValueError(
            f"{what} needs ts (times,) and xs (times, batch, *state), got {tuple(ts.shape)} and {tuple(xs.shape)}"
        )
    x = x.reshape(*x.shape[:2], -1)
    if not 0 <= component < x.shape[2]:
        raise ValueError(
            f"component must be in [0, {x.shape[2]}), the size of the flattened state, got {short(component)}"
        )
    return t, x[:, :, component].cpu().double()


def _over_time(
    figure: Figure, axes: Axes, t: Tensor, title: str | None, y_label: str, *, legend: bool = False
) -> Figure:
    """Labels of an axis of time, in the direction of integration."""
    axes.set(xlabel="t", ylabel=y_label, **({"xlim": (float(t[0]), float(t[-1]))} if len(t) > 1 else {}))
    if title:
        axes.set_title(title, loc="left", pad=10)
    if legend:
        axes.legend(frameon=False, fontsize=8.5, loc="center left", bbox_to_anchor=(1.01, 0.5))
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
