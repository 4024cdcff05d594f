"""Posterior scores of inverse problems ``y = A x + noise``: they go where a score goes, into `sample` or `reverse`."""

from sdesolve.inverse.base import AbstractPosteriorScore as AbstractPosteriorScore
from sdesolve.inverse.covariance import MMPS as MMPS
from sdesolve.inverse.covariance import PiGDM as PiGDM
from sdesolve.inverse.reconstruction import DPS as DPS
from sdesolve.inverse.replacement import Replacement as Replacement
