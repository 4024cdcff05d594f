"""Distances between laws: closed forms for Gaussians, and estimates from samples, with what chance makes of them."""

from sdesolve.metrics.coverage import PrecisionRecall as PrecisionRecall
from sdesolve.metrics.coverage import precision_recall as precision_recall
from sdesolve.metrics.floors import Floor as Floor
from sdesolve.metrics.floors import sample_floor as sample_floor
from sdesolve.metrics.gaussians import bures_wasserstein as bures_wasserstein
from sdesolve.metrics.gaussians import frechet_distance as frechet_distance
from sdesolve.metrics.gaussians import gaussian_kl as gaussian_kl
from sdesolve.metrics.kernels import Estimate as Estimate
from sdesolve.metrics.kernels import energy_distance as energy_distance
from sdesolve.metrics.kernels import squared_mmd as squared_mmd
from sdesolve.metrics.transport import sliced_wasserstein as sliced_wasserstein
from sdesolve.metrics.transport import wasserstein_1d as wasserstein_1d
