"""Score-based models as Markov chains of discrete steps: DDPM and SMLD."""

from sdesolve.chains.base import AbstractChain as AbstractChain
from sdesolve.chains.base import ChainScore as ChainScore
from sdesolve.chains.bound import BoundTerms as BoundTerms
from sdesolve.chains.bound import variational_bound as variational_bound
from sdesolve.chains.ddpm import DDPM as DDPM
from sdesolve.chains.smld import SMLD as SMLD
