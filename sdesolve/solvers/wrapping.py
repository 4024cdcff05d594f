"""Solvers that take the steps of another."""

from __future__ import annotations

import abc

from torch import Tensor

from sdesolve.brownian import Part
from sdesolve.sde import AbstractSDE
from sdesolve.solvers.base import AbstractOneStep, Supported


class AbstractWrapping(AbstractOneStep, abc.ABC):
    """A solver that is made of another, with whose capabilities it begins."""

    solver: AbstractOneStep

    @property
    def supported(self) -> Supported:
        return self.solver.supported

    @property
    def equations(self) -> tuple[type[AbstractSDE], ...]:
        return self.solver.equations

    @property
    def strong_order(self) -> float | None:
        return self.solver.strong_order

    @property
    def weak_order(self) -> float | None:
        return self.solver.weak_order

    @property
    def ode_order(self) -> int | None:
        return self.solver.ode_order

    @property
    def evaluations(self) -> int:
        return self.solver.evaluations

    @property
    def diffusion_evaluations(self) -> int:
        return self.solver.diffusion_evaluations

    @property
    def own_component_diffusion(self) -> bool:
        return self.solver.own_component_diffusion

    @property
    def commutative_noise(self) -> bool:
        return self.solver.commutative_noise

    @property
    def by_products(self) -> bool:
        return self.solver.by_products

    @property
    def failure(self) -> str | None:
        return self.solver.failure

    @property
    def needs(self) -> tuple[Part, ...]:
        return self.solver.needs

    def numbers(self, sde: AbstractSDE, times: Tensor) -> Tensor | None:
        return self.solver.numbers(sde, times)
