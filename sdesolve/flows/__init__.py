"""Flows and bridges between two laws: interpolants, their networks, their equations, and closed forms."""

from sdesolve.flows.exact import ExactInterpolant, gaussian_bridge
from sdesolve.flows.interpolant import FlowModel, StochasticInterpolant
from sdesolve.flows.sde import FlowSDE

__all__ = ["ExactInterpolant", "FlowModel", "FlowSDE", "StochasticInterpolant", "gaussian_bridge"]
