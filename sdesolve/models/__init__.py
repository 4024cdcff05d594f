"""SDE objects: equations of the literature, with what is known of their solutions."""

from sdesolve.models.geometric import GeometricBrownianMotion
from sdesolve.models.heston import Heston
from sdesolve.models.langevin import UnderdampedLangevin
from sdesolve.models.mean_reverting import CIR, Jacobi, OrnsteinUhlenbeck
from sdesolve.models.nonlinear import DoubleWell, LotkaVolterra

__all__ = [
    "CIR", "DoubleWell", "GeometricBrownianMotion", "Heston", "Jacobi", "LotkaVolterra", "OrnsteinUhlenbeck",
    "UnderdampedLangevin",
]  # fmt: skip
