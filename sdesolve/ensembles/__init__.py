"""Ensembles: runs of many paths by blocks, on any engine, kept on disk, any path of which can be made again."""

from sdesolve.ensembles.reductions import (
    AbstractReduction,
    FeatureMoments,
    MergedMoments,
    Moments,
    QuantileSketch,
    ValueHistogram,
)
from sdesolve.ensembles.run import Ensemble, Estimate, ensemble
from sdesolve.ensembles.stores import BlockArray, Blocks
from sdesolve.ensembles.tasks import AbstractTask, Chains, Draws, Likelihoods

__all__ = [
    "AbstractReduction",
    "AbstractTask",
    "BlockArray",
    "Blocks",
    "Chains",
    "Draws",
    "Ensemble",
    "Estimate",
    "FeatureMoments",
    "Likelihoods",
    "MergedMoments",
    "Moments",
    "QuantileSketch",
    "ValueHistogram",
    "ensemble",
]
