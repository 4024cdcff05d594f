"""Pictures of laws and equations of the plane: densities, fields, samples, trajectories."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sdesolve._internal.arguments import short, whole_number
from sdesolve._internal.modes import in_evaluation
from sdesolve.plotting.style import COLOURS, INK

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Function = Callable[[Tensor], Tensor]
Window = tuple[float, float, float, float]


def heatmap(
    axes: Axes,
    function: Function,
    window: Window,
    *,
    resolution: int = 160,
    value_range: tuple[float, float] | None = None,
    contours: int = 0,
) -> None:
    """A function of the plane as shades from white, the lowest, to blue.

    Args:
        axes: where to draw, from `panels`.
        function: takes points ``(n, 2)``, float32, to values ``(n,)``, such as a density or an energy.
        window: ``(left, right, bottom, top)`` of what is shown.
        resolution: points along each side, at least 2.
        value_range: values shown as white and as darkest; the extremes by default.
        contours: so many level lines, evenly spaced within the range.

    Raises:
        ValueError: an empty window, too few points, or values of another shape.
        TypeError: ``resolution`` or ``contours`` is not an integer.
    """
    x, y = _grid(window, whole_number(resolution, "resolution", 2))
    values = _at(function, x, y, ())
    low, high = value_range if value_range is not None else (float(values.min()), float(values.max()))
    image = values.numpy()
    axes.imshow(
        image, origin="lower", extent=window, cmap="Blues", vmin=low, vmax=high, interpolation="bilinear", zorder=0
    )
    if whole_number(contours, "contours", 0):
        levels = torch.linspace(low, high, contours + 2)[1:-1].tolist()
        axes.contour(
            x.numpy(), y.numpy(), image, levels=levels, colors=INK, linestyles="solid", linewidths=0.5, alpha=0.6
        )
    _frame(axes, window)


def arrows(axes: Axes, field: Function, window: Window, *, resolution: int = 13) -> None:
    """A vector field of the plane as arrows, whose lengths go with the square root of the field's.

    Scores differ in length by orders of magnitude over a picture; their square roots can be told apart in it.

    Args:
        axes: where to draw, from `panels`.
        field: takes points ``(n, 2)``, float32, to vectors ``(n, 2)``.
        window: ``(left, right, bottom, top)`` of what is shown.
        resolution: arrows along each side, at least 2.

    Raises:
        ValueError: an empty window, too few arrows, or vectors of another shape.
        TypeError: ``resolution`` is not an integer.
    """
    x, y = _grid(window, whole_number(resolution, "resolution", 2), margin=0.5)
    v = _at(field, x, y, (2,))
    v = v * v.norm(dim=-1, keepdim=True).clamp_min(1e-30).rsqrt()
    axes.quiver(
        x.numpy(), y.numpy(), v[..., 0].numpy(), v[..., 1].numpy(), color=COLOURS[1], width=0.006, pivot="mid", zorder=2
    )  # fmt: skip
    _frame(axes, window)


def points(axes: Axes, x: Tensor, window: Window, *, most: int = 4000, colour: str = COLOURS[0]) -> None:
    """Samples as dots, no more than ``most`` of them.

    Args:
        axes: where to draw, from `panels`.
        x: ``(n, 2)``.
        window: ``(left, right, bottom, top)`` of what is shown.
        most: dots drawn; the first of them.
        colour: of the dots.

    Raises:
        ValueError: samples that are not points of the plane, or an empty window.
    """
    shown = _plane(x, "x", 2)[:most]
    opacity = min(1.0, max(0.25, 600.0 / max(1, len(shown))))
    axes.scatter(shown[:, 0].numpy(), shown[:, 1].numpy(), s=1.6, color=colour, alpha=opacity, linewidths=0)
    _frame(axes, window)


def trails(axes: Axes, xs: Tensor, window: Window, *, colours: Sequence[str] = COLOURS) -> None:
    """Trajectories as lines, with a dot where each ends; a few can be told apart.

    Args:
        axes: where to draw, from `panels`.
        xs: ``(times, batch, 2)``, as in ``Solution.xs``.
        window: ``(left, right, bottom, top)`` of what is shown.
        colours: of the lines, in turn.

    Raises:
        ValueError: states that are not points of the plane, or an empty window.
    """
    x = _plane(xs, "xs", 3).numpy()
    for k in range(x.shape[1]):
        axes.plot(x[:, k, 0], x[:, k, 1], color=colours[k % len(colours)], linewidth=0.7, zorder=2)
    axes.scatter(x[-1, :, 0], x[-1, :, 1], s=14, color=INK, linewidths=0, zorder=3)
    _frame(axes, window)


def _grid(window: Window, resolution: int, margin: float = 0.0) -> tuple[Tensor, Tensor]:
    """``x`` and ``y`` of a lattice of the window, ``(resolution, resolution)``, rows from bottom to top."""
    left, right, bottom, top = _check_window(window)
    share = torch.linspace(0.0, 1.0, resolution)
    if margin:
        share = (torch.arange(resolution) + margin) / resolution
    y, x = torch.meshgrid(bottom + (top - bottom) * share, left + (right - left) * share, indexing="ij")
    return x, y


@in_evaluation
def _at(function: Function, x: Tensor, y: Tensor, value_shape: tuple[int, ...]) -> Tensor:
    with torch.no_grad():
        values = function(torch.stack([x.reshape(-1), y.reshape(-1)], dim=1))
    if not isinstance(values, Tensor) or values.shape != (x.numel(), *value_shape):
        got = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
        raise ValueError(
            f"the function must take points {(x.numel(), 2)} to values {(x.numel(), *value_shape)}, got {got}"
        )
    return values.detach().cpu().double().reshape(*x.shape, *value_shape)


def _plane(x: Tensor, name: str, rank: int) -> Tensor:
    if x.ndim != rank or x.shape[-1] != 2:
        expected = "(n, 2)" if rank == 2 else "(times, batch, 2)"
        raise ValueError(f"{name} must be {expected}, points of the plane, got {tuple(x.shape)}")
    return x.detach().cpu().double()


def _check_window(window: Window) -> Window:
    left, right, bottom, top = window
    if not (left < right and bottom < top):
        raise ValueError(
            f"a window is (left, right, bottom, top) with left < right and bottom < top, got {short(window)}"
        )
    return window


def _frame(axes: Axes, window: Window) -> None:
    left, right, bottom, top = _check_window(window)
    axes.set(xlim=(left, right), ylim=(bottom, top), xticks=[], yticks=[], aspect="equal")
    for spine in axes.spines.values():
        spine.set_visible(True)
