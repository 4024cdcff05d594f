"""Distances between laws: closed forms for Gaussians, and estimates from samples, with what chance makes of them."""

from sdesolve.metrics.coverage import PrecisionRecall, precision_recall
from sdesolve.metrics.floors import Floor, sample_floor
from sdesolve.metrics.gaussians import bures_wasserstein, frechet_distance, gaussian_kl
from sdesolve.metrics.kernels import Estimate, energy_distance, squared_mmd
from sdesolve.metrics.transport import sliced_wasserstein, wasserstein_1d

__all__ = [
    "Estimate", "Floor", "PrecisionRecall", "bures_wasserstein", "energy_distance", "frechet_distance",
    "gaussian_kl", "precision_recall", "sample_floor", "sliced_wasserstein", "squared_mmd", "wasserstein_1d",
]  # fmt: skip
