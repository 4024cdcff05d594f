"""Markov chains that sample from a fixed law, given its score or its energy."""

from sdesolve.mcmc.annealed import AnnealedLangevin
from sdesolve.mcmc.base import AbstractKernel, Convention, Target, Walker
from sdesolve.mcmc.overdamped import MALA, Langevin
from sdesolve.mcmc.run import Chain, run_chain
from sdesolve.mcmc.underdamped import BAOAB

__all__ = [
    "BAOAB", "MALA", "AbstractKernel", "AnnealedLangevin", "Chain", "Convention", "Langevin", "Target", "Walker",
    "run_chain",
]  # fmt: skip
