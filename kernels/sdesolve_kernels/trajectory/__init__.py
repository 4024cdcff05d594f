"""Whole trajectories in one kernel, generated from a step written in torch."""

from sdesolve_kernels.trajectory.contents import Contents as Contents
from sdesolve_kernels.trajectory.contents import contents as contents
from sdesolve_kernels.trajectory.kept import settled as settled
from sdesolve_kernels.trajectory.launch import AbstractTrajectory as AbstractTrajectory
from sdesolve_kernels.trajectory.launch import Launch as Launch
from sdesolve_kernels.trajectory.launch import compile_trajectory as compile_trajectory
from sdesolve_kernels.trajectory.operations import OPERATIONS as OPERATIONS
from sdesolve_kernels.trajectory.operations import OpSpec as OpSpec
from sdesolve_kernels.trajectory.operations import Term as Term
from sdesolve_kernels.trajectory.pointwise import pointwise as pointwise
from sdesolve_kernels.trajectory.program import Inputs as Inputs
from sdesolve_kernels.trajectory.program import Signature as Signature
from sdesolve_kernels.trajectory.program import batch_kind as batch_kind
from sdesolve_kernels.trajectory.program import check_batch as check_batch
from sdesolve_kernels.trajectory.program import trace as trace
from sdesolve_kernels.trajectory.program import traced_shape as traced_shape
from sdesolve_kernels.trajectory.tracing import Unsupported as Unsupported
