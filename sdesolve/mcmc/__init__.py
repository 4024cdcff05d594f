"""Markov chains that sample from a fixed law, given its score or its energy."""

from sdesolve.mcmc.annealed import AnnealedLangevin as AnnealedLangevin
from sdesolve.mcmc.base import AbstractKernel as AbstractKernel
from sdesolve.mcmc.base import Convention as Convention
from sdesolve.mcmc.base import Target as Target
from sdesolve.mcmc.base import Walker as Walker
from sdesolve.mcmc.overdamped import MALA as MALA
from sdesolve.mcmc.overdamped import Langevin as Langevin
from sdesolve.mcmc.run import Chain as Chain
from sdesolve.mcmc.run import run_chain as run_chain
from sdesolve.mcmc.underdamped import BAOAB as BAOAB
