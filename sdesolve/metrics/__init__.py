"""Distances between laws: closed forms for Gaussians, and estimates from samples, with what chance makes of them."""

from sdesolve.metrics.coverage import PrecisionRecall, precision_recall
from sdesolve.metrics.floors import Floor, sample_floor
from sdesolve.metrics.forecasts import crps, energy_score, rank_histogram, spread_skill
from sdesolve.metrics.gaussians import bures_wasserstein, frechet_distance, gaussian_kl
from sdesolve.metrics.kernels import Estimate, energy_distance, squared_mmd
from sdesolve.metrics.transport import sliced_wasserstein, wasserstein_1d

__all__ = [
    "Estimate", "Floor", "PrecisionRecall", "bures_wasserstein", "crps", "energy_distance", "energy_score",
    "frechet_distance", "gaussian_kl", "precision_recall", "rank_histogram", "sample_floor", "sliced_wasserstein",
    "spread_skill", "squared_mmd", "wasserstein_1d",
]  # fmt: skip
