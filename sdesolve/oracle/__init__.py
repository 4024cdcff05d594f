"""What samplers do, exactly: laws of discretised chains, distances to the truth, orders of convergence."""

from sdesolve.oracle.convergence import Convergence as Convergence
from sdesolve.oracle.convergence import convergence as convergence
from sdesolve.oracle.errors import StepErrors as StepErrors
from sdesolve.oracle.errors import error as error
from sdesolve.oracle.errors import measure as measure
from sdesolve.oracle.errors import step_errors as step_errors
from sdesolve.oracle.inputs import OracleNoise as OracleNoise
from sdesolve.oracle.moments import ChainMoments as ChainMoments
from sdesolve.oracle.moments import affine_moments as affine_moments
from sdesolve.oracle.moments import chain_moments as chain_moments
from sdesolve.oracle.particles import Measured as Measured
from sdesolve.oracle.samplers import Sampler as Sampler
from sdesolve.oracle.samplers import as_sampler as as_sampler
