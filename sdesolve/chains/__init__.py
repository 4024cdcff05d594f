"""Score-based models as Markov chains of discrete steps: DDPM and SMLD."""

from sdesolve.chains.base import AbstractChain, ChainScore
from sdesolve.chains.bound import BoundTerms, variational_bound
from sdesolve.chains.ddpm import DDPM
from sdesolve.chains.smld import SMLD

__all__ = ["DDPM", "SMLD", "AbstractChain", "BoundTerms", "ChainScore", "variational_bound"]
