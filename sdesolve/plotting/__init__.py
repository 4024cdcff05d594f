"""Pictures: images, error curves, paths, densities and fields of the plane. They need the ``plot`` extra.

Figures are made without pyplot, so they belong to no backend and no global list, and vanish when let go of. Save one
with ``figure.savefig("name.png")``; a notebook shows it as the last value of a cell.
"""

from sdesolve.plotting.charts import band, density, error_curves, fan, image_grid, paths, phase
from sdesolve.plotting.plane import arrows, heatmap, points, trails
from sdesolve.plotting.style import COLOURS, panels

__all__ = [
    "COLOURS", "arrows", "band", "density", "error_curves", "fan", "heatmap", "image_grid", "panels", "paths", "phase",
    "points", "trails",
]  # fmt: skip
