"""Linear-Gaussian forward processes."""

from sdesolve.diffusions.base import AbstractDiffusion as AbstractDiffusion
from sdesolve.diffusions.base import Marginal as Marginal
from sdesolve.diffusions.base import Prior as Prior
from sdesolve.diffusions.base import Transition as Transition
from sdesolve.diffusions.base import inverse_log_snr as inverse_log_snr
from sdesolve.diffusions.edm import EDM as EDM
from sdesolve.diffusions.linear import LinearDiffusion as LinearDiffusion
from sdesolve.diffusions.ou import OU as OU
from sdesolve.diffusions.subvp import SubVP as SubVP
from sdesolve.diffusions.ve import VE as VE
from sdesolve.diffusions.vp import VP as VP
from sdesolve.diffusions.vp import BetaSchedule as BetaSchedule
from sdesolve.diffusions.vp import CosineBeta as CosineBeta
from sdesolve.diffusions.vp import LinearBeta as LinearBeta
