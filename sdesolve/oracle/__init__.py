"""What samplers do, exactly: laws of discretised chains, distances to the truth, orders of convergence."""

from sdesolve.oracle.convergence import Convergence, convergence
from sdesolve.oracle.errors import StepErrors, error, measure, step_errors
from sdesolve.oracle.inputs import OracleNoise
from sdesolve.oracle.moments import ChainMoments, affine_moments, chain_moments
from sdesolve.oracle.particles import Measured
from sdesolve.oracle.samplers import Sampler, as_sampler

__all__ = [
    "ChainMoments", "Convergence", "Measured", "OracleNoise", "Sampler", "StepErrors", "affine_moments",
    "as_sampler", "chain_moments", "convergence", "error", "measure", "step_errors",
]  # fmt: skip
