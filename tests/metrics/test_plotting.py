"""Figures are made, hold what they were given, and refuse what they cannot draw."""

from __future__ import annotations

import builtins
import math

import pytest
import torch

from sdesolve import plotting


def rendered(figure) -> bytes:
    figure.canvas.draw()
    return bytes(figure.canvas.buffer_rgba())


@pytest.mark.parametrize("shape", [(7, 8, 8), (7, 1, 8, 8), (7, 3, 5, 8), (1, 2, 2)])
def test_image_grid(shape):
    figure = plotting.image_grid(torch.rand(shape, generator=torch.Generator().manual_seed(0)), title="images")
    assert len(set(rendered(figure))) > 10
    (axes,) = figure.axes
    assert axes.get_title(loc="left") == "images"


def test_image_grid_places_images_in_rows():
    images = torch.zeros(4, 2, 2)
    images[1], images[2] = 1.0, 0.5
    figure = plotting.image_grid(images, columns=2, row_labels=["a", "b"], value_range=(0.0, 1.0))
    picture = figure.axes[0].images[0].get_array()
    assert picture.shape == (5, 5)
    assert picture[0, 0] == 0.0
    assert picture[0, 4] == 1.0
    assert picture[4, 0] == 0.5
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == ["a", "b"]


def test_error_curves():
    curves = {"Euler": ([10, 20, 40], [0.1, 0.05, 0.025]), "Heun": ([10, 20, 40], torch.tensor([1e-2, 0.0, math.nan]))}
    figure = plotting.error_curves(curves, orders=(1, 2), floor=("real data", 1e-3), title="t", y_label="distance")
    rendered(figure)
    (axes,) = figure.axes
    assert axes.get_xscale() == axes.get_yscale() == "log"
    assert [line.get_label() for line in axes.lines[:2]] == ["Euler", "Heun"]
    assert len(axes.lines[1].get_xdata()) == 1  # an error of 0 or nan has no place on a log axis
    assert {text.get_text() for text in axes.texts} == {"order 1", "order 2", "real data"}
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["10", "20", "40"]


def test_error_curves_with_nothing_to_draw():
    rendered(plotting.error_curves({"exact": ([1, 2], [0.0, 0.0])}))


@pytest.mark.parametrize("state", [(), (3,), (2, 2)])
def test_paths(state):
    xs = torch.randn(11, 100, *state, generator=torch.Generator().manual_seed(0))
    figure = plotting.paths(torch.linspace(1.0, 0.0, 11), xs, most=20, title="t")
    rendered(figure)
    axes = figure.axes[0]
    assert len(axes.lines) == 20
    assert axes.get_xlim() == (1.0, 0.0)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: plotting.image_grid(torch.zeros(4)), "images must be"),
        (lambda: plotting.image_grid(torch.zeros(4, 2, 8, 8)), "1 or 3 channels"),
        (lambda: plotting.image_grid(torch.zeros(0, 8, 8)), "n of at least 1"),
        (lambda: plotting.image_grid(torch.zeros(4, 8, 8), columns=0), "columns must be at least 1"),
        (lambda: plotting.image_grid(torch.zeros(4, 8, 8), row_labels=["a"]), "one label for each of 2 rows"),
        (lambda: plotting.error_curves({}), "no curve"),
        (lambda: plotting.error_curves({"a": ([1, 2], [1.0])}), "2 costs and 1 errors"),
        (lambda: plotting.paths(torch.zeros(3), torch.zeros(4, 2)), "paths needs ts"),
        (lambda: plotting.paths(torch.zeros(3), torch.zeros(3, 2, 2), component=2), "component must be in"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_a_missing_matplotlib_names_the_extra(monkeypatch):
    real_import = builtins.__import__

    def no_matplotlib(name, *args, **kwargs):
        if name.split(".")[0] == "matplotlib":
            raise ImportError(name)
        return real_import(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", no_matplotlib)
    with pytest.raises(ImportError, match=r"pip install 'sdesolve\[plot\]'"):
        plotting.image_grid(torch.zeros(1, 2, 2))


WINDOW = (-1.0, 1.0, -2.0, 2.0)


def panel():
    figure, (axes,) = plotting.panels(1)
    return figure, axes


def test_panels():
    figure, axes = plotting.panels(3, 2, titles=["a", "b"], width=2.0, height=1.5)
    assert figure.get_size_inches().tolist() == [6.0, 3.0]
    assert [a.get_title(loc="left") for a in axes] == ["a", "b", "", "", "", ""]
    assert axes[1].get_position().x0 > axes[0].get_position().x0
    assert axes[3].get_position().y0 < axes[0].get_position().y0


def test_heatmap_shows_the_function_where_it_is():
    figure, axes = panel()
    plotting.heatmap(axes, lambda x: x[:, 0] + 10 * x[:, 1], WINDOW, resolution=5, contours=3)
    rendered(figure)
    (image,) = axes.images
    values = image.get_array()
    assert values[0].tolist() == pytest.approx([-21, -20.5, -20, -19.5, -19])  # the bottom, from left to right
    assert values[:, 0].tolist() == pytest.approx([-21, -11, -1, 9, 19])
    assert image.get_extent() == list(WINDOW)
    assert image.origin == "lower"
    assert axes.get_xlim() == WINDOW[:2]
    assert axes.get_ylim() == WINDOW[2:]
    assert len(axes.collections) >= 1  # the contours


def test_heatmap_range():
    _, axes = panel()
    plotting.heatmap(axes, lambda x: x[:, 0], WINDOW, value_range=(-3.0, 5.0))
    assert axes.images[0].get_clim() == (-3.0, 5.0)
    assert not axes.collections


def test_arrows_have_the_direction_and_the_root_of_the_length():
    figure, axes = panel()
    plotting.arrows(axes, lambda x: torch.stack([4.0 + 0 * x[:, 0], 0 * x[:, 1]], dim=1), WINDOW, resolution=3)
    rendered(figure)
    (quiver,) = axes.collections
    assert quiver.U.tolist() == pytest.approx([2.0] * 9)
    assert quiver.V.tolist() == pytest.approx([0.0] * 9)
    assert sorted(set(quiver.X.round(3))) == pytest.approx([-0.667, 0.0, 0.667])


def test_points_and_trails():
    figure, axes = panel()
    x = torch.arange(20.0).reshape(10, 2)
    plotting.points(axes, x, WINDOW, most=4)
    assert axes.collections[0].get_offsets().tolist() == x[:4].tolist()
    xs = torch.arange(24.0).reshape(4, 3, 2)
    plotting.trails(axes, xs, WINDOW)
    rendered(figure)
    assert len(axes.lines) == 3
    assert axes.lines[1].get_xydata().tolist() == xs[:, 1].tolist()
    assert len({line.get_color() for line in axes.lines}) == 3
    assert axes.collections[1].get_offsets().tolist() == xs[-1].tolist()


def test_error_curves_on_a_panel():
    figure, (left, right) = plotting.panels(2)
    assert plotting.error_curves({"a": ([1, 2], [1.0, 0.5])}, axes=right) is figure
    assert not left.lines
    assert [text.get_text() for text in right.get_legend().get_texts()] == ["a"]
    assert not figure.legends


@pytest.mark.parametrize(
    ("draw", "message"),
    [
        (lambda axes: plotting.heatmap(axes, lambda x: x[:, 0], (1.0, -1.0, 0.0, 1.0)), "left < right"),
        (lambda axes: plotting.heatmap(axes, lambda x: x, WINDOW), "must take points"),
        (lambda axes: plotting.heatmap(axes, lambda x: 0.0, WINDOW), "got float"),
        (lambda axes: plotting.heatmap(axes, lambda x: x[:, 0], WINDOW, resolution=1), "resolution must be"),
        (lambda axes: plotting.arrows(axes, lambda x: x[:, 0], WINDOW), "must take points"),
        (lambda axes: plotting.points(axes, torch.zeros(3, 3), WINDOW), r"x must be \(n, 2\)"),
        (lambda axes: plotting.points(axes, torch.zeros(3, 2), (0.0, 1.0, 1.0, 1.0)), "bottom < top"),
        (lambda axes: plotting.trails(axes, torch.zeros(3, 2), WINDOW), r"xs must be \(times, batch, 2\)"),
        (lambda axes: plotting.panels(2, titles=["a", "b", "c"]), "3 titles for 2 panels"),
        (lambda axes: plotting.panels(0), "columns must be"),
    ],
)
def test_bad_input_of_the_plane(draw, message):
    _, axes = panel()
    with pytest.raises(ValueError, match=message):
        draw(axes)
