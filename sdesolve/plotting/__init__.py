"""Pictures: images, error curves, paths, densities and fields of the plane. They need the ``plot`` extra.

Figures are made without pyplot, so they belong to no backend and no global list, and vanish when let go of. Save one
with ``figure.savefig("name.png")``; a notebook shows it as the last value of a cell.
"""

from sdesolve.plotting.charts import error_curves as error_curves
from sdesolve.plotting.charts import image_grid as image_grid
from sdesolve.plotting.charts import paths as paths
from sdesolve.plotting.plane import arrows as arrows
from sdesolve.plotting.plane import heatmap as heatmap
from sdesolve.plotting.plane import points as points
from sdesolve.plotting.plane import trails as trails
from sdesolve.plotting.style import COLOURS as COLOURS
from sdesolve.plotting.style import panels as panels
