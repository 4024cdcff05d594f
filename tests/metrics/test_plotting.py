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
