"""Whole trajectories in one kernel, generated from a step written in torch."""

from sdesolve_kernels.trajectory.agreement import agree as agree
from sdesolve_kernels.trajectory.agreement import coarsest as coarsest
from sdesolve_kernels.trajectory.agreement import recorded as recorded
from sdesolve_kernels.trajectory.agreement import same_operations as same_operations
from sdesolve_kernels.trajectory.derivatives import derivative as derivative
from sdesolve_kernels.trajectory.expressions import Graph as Graph
from sdesolve_kernels.trajectory.guards import Guards as Guards
from sdesolve_kernels.trajectory.guards import look_into as look_into
from sdesolve_kernels.trajectory.launch import AbstractTrajectory as AbstractTrajectory
from sdesolve_kernels.trajectory.launch import Launch as Launch
from sdesolve_kernels.trajectory.launch import compile_trajectory as compile_trajectory
from sdesolve_kernels.trajectory.leaves import State as State
from sdesolve_kernels.trajectory.operations import OPERATIONS as OPERATIONS
from sdesolve_kernels.trajectory.operations import OpSpec as OpSpec
from sdesolve_kernels.trajectory.operations import Term as Term
from sdesolve_kernels.trajectory.pointwise import HANDLERS as HANDLERS
from sdesolve_kernels.trajectory.pointwise import pointwise as pointwise
from sdesolve_kernels.trajectory.program import Inputs as Inputs
from sdesolve_kernels.trajectory.program import Signature as Signature
from sdesolve_kernels.trajectory.program import check_size as check_size
from sdesolve_kernels.trajectory.program import trace as trace
from sdesolve_kernels.trajectory.reference import Walk as Walk
from sdesolve_kernels.trajectory.tracing import TooCostly as TooCostly
from sdesolve_kernels.trajectory.tracing import Unsupported as Unsupported
from sdesolve_kernels.trajectory.watching import unchanged as unchanged
