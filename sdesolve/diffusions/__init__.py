"""Linear-Gaussian forward processes."""

from sdesolve.diffusions.base import (
    AbstractDiffusion,
    AbstractInterpolant,
    Marginal,
    Prior,
    Transition,
    inverse_log_snr,
)
from sdesolve.diffusions.edm import EDM
from sdesolve.diffusions.linear import LinearDiffusion, LinearInterpolant
from sdesolve.diffusions.ou import OU
from sdesolve.diffusions.rectified import Rectified
from sdesolve.diffusions.subvp import SubVP
from sdesolve.diffusions.table import TableBeta
from sdesolve.diffusions.ve import VE
from sdesolve.diffusions.vp import VP, AbstractBetaSchedule, CosineBeta, LinearBeta

__all__ = [
    "EDM",
    "OU",
    "VE",
    "VP",
    "AbstractBetaSchedule",
    "AbstractDiffusion",
    "AbstractInterpolant",
    "CosineBeta",
    "LinearBeta",
    "LinearDiffusion",
    "LinearInterpolant",
    "Marginal",
    "Prior",
    "Rectified",
    "SubVP",
    "TableBeta",
    "Transition",
    "inverse_log_snr",
]  # fmt: skip
