"""Posterior scores of inverse problems ``y = A x + noise``: they go where a score goes, into `sample` or `reverse`."""

from sdesolve.inverse.base import AbstractPosteriorScore
from sdesolve.inverse.covariance import MMPS, PiGDM
from sdesolve.inverse.reconstruction import DPS
from sdesolve.inverse.replacement import Replacement
from sdesolve.inverse.twist import ObservationPotential

__all__ = ["DPS", "MMPS", "AbstractPosteriorScore", "ObservationPotential", "PiGDM", "Replacement"]
