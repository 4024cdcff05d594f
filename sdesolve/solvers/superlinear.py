"""Steps that stay bounded where coefficients grow faster than the state: taming and truncation."""

from __future__ import annotations

import abc
from typing import final

import torch
from torch import Tensor

from sdesolve._internal.arguments import kind_of, number
from sdesolve.brownian import Increment
from sdesolve.sde import AbstractSDE
from sdesolve.solvers.base import AbstractOneStep, Span
from sdesolve.solvers.wrapping import AbstractWrapping


class AbstractModified(AbstractWrapping):
    """The step of another solver on the equation with other coefficients, which differ less the shorter the step.

    Args:
        solver: a one-step solver of fixed steps.

    Raises:
        TypeError: it is not one.
    """

    def __init__(self, solver: AbstractOneStep) -> None:
        if not isinstance(solver, AbstractOneStep) or solver.controller is not None:
            got = repr(solver) if isinstance(solver, AbstractOneStep) else kind_of(solver)
            raise TypeError(
                f"{type(self).__name__} takes a one-step solver of fixed steps such as EulerMaruyama(), got {got}"
            )
        self.solver = solver

    @abc.abstractmethod
    def modified(self, sde: AbstractSDE, h: Tensor) -> AbstractSDE:
        """The equation that a step of length ``h`` solves instead; ``h`` is positive, and broadcasts to the state."""

    @property
    def strong_order(self) -> float | None:
        return None if self.solver.strong_order is None else min(self.solver.strong_order, 1.0)

    @property
    def weak_order(self) -> float | None:
        return None if self.solver.weak_order is None else min(self.solver.weak_order, 1.0)

    @property
    def ode_order(self) -> int | None:
        return None if self.solver.ode_order is None else min(self.solver.ode_order, 1)

    @final
    def step(self, sde: AbstractSDE, x: Tensor, span: Span, noise: Increment | None) -> Tensor:
        return self.solver.step(self.modified(sde, span.dt.abs()), x, span, noise)


@final
class Tamed(AbstractModified):
    """``solver`` with the drift ``f / (1 + h |f|)``, where ``|f|`` is the norm over the state of one path.

    For drifts that grow faster than linearly, where the moments of `EulerMaruyama` diverge as steps get shorter: here
    the drift moves a state by less than 1 a step. The diffusion must grow linearly at most. Strong and weak orders are
    those of the solver, up to 1. Hutzenthaler, Jentzen and Kloeden 2012, "Strong convergence of an explicit numerical
    method for SDEs with nonglobally Lipschitz continuous coefficients", equation 4; Wang and Gan 2013 for `Milstein`.

    Args:
        solver: a one-step solver of fixed steps.

    Raises:
        TypeError: ``solver`` is not one.

    Example:
        >>> solver = Tamed(EulerMaruyama())
    """

    def modified(self, sde: AbstractSDE, h: Tensor) -> AbstractSDE:
        return _TamedSDE(sde, h)


@final
class Truncated(AbstractModified):
    """``solver`` with ``f(p(x), t)`` and ``g(p(x), t)``: ``p(x) = x min(1, R / |x|)``, ``R = radius h^-exponent``.

    ``|x|`` is the norm over the state of one path. For drifts and diffusions that grow faster than linearly under a
    Khasminskii condition. The radius grows slowly as steps get shorter: for coefficients of size ``|x|^p``, an exponent
    of at most ``1 / (2 p)`` keeps ``h^(1/2) |f|`` bounded. Strong and weak orders are those of the solver, up to 1.
    Mao 2015, "The truncated Euler-Maruyama method for stochastic differential equations", equation 2.10.

    Args:
        solver: a one-step solver of fixed steps.
        radius: of the ball for ``h = 1``, well above the size of most states.
        exponent: how fast the ball grows.

    Raises:
        TypeError: ``solver`` is not one, or another argument is no number.
        ValueError: ``radius`` or ``exponent`` is not positive and finite.
    """

    def __init__(self, solver: AbstractOneStep, radius: float = 4.0, exponent: float = 1.0 / 6.0) -> None:
        super().__init__(solver)
        for name, value in (("radius", radius), ("exponent", exponent)):
            if not 0.0 < number(value, name) < float("inf"):
                raise ValueError(f"{name} must be positive and finite, got {value!r}")
        self.radius, self.exponent = float(radius), float(exponent)

    def modified(self, sde: AbstractSDE, h: Tensor) -> AbstractSDE:
        return _TruncatedSDE(sde, self.radius * h**-self.exponent)


class _ModifiedSDE(AbstractSDE):
    def __init__(self, sde: AbstractSDE, size: Tensor) -> None:
        self.noise, self.calculus, self._sde, self._size = sde.noise, sde.calculus, sde, size
        self.joint, self.has_diffusion = sde.joint, sde.has_diffusion

    @property
    def equation(self) -> AbstractSDE:
        return self._sde.equation

    def channels(self, x: Tensor) -> tuple[int, ...] | None:
        return self._sde.channels(x)


@final
class _TamedSDE(_ModifiedSDE):
    def drift(self, x: Tensor, t: Tensor) -> Tensor:
        return self._tamed(self._sde.drift(x, t))

    def diffusion(self, x: Tensor, t: Tensor) -> Tensor:
        return self._sde.diffusion(x, t)

    def drift_and_diffusion(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        f, g = self._sde.drift_and_diffusion(x, t)
        return self._tamed(f), g

    def diffusion_product(self, x: Tensor, t: Tensor, dW: Tensor) -> Tensor:
        return self._sde.diffusion_product(x, t, dW)

    def _tamed(self, f: Tensor) -> Tensor:
        return f / (1.0 + self._size * _norm(f))


@final
class _TruncatedSDE(_ModifiedSDE):
    def drift(self, x: Tensor, t: Tensor) -> Tensor:
        return self._sde.drift(self._within(x), t)

    def diffusion(self, x: Tensor, t: Tensor) -> Tensor:
        return self._sde.diffusion(self._within(x), t)

    def drift_and_diffusion(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        return self._sde.drift_and_diffusion(self._within(x), t)

    def diffusion_product(self, x: Tensor, t: Tensor, dW: Tensor) -> Tensor:
        return self._sde.diffusion_product(self._within(x), t, dW)

    def _within(self, x: Tensor) -> Tensor:
        return x * (self._size / torch.maximum(_norm(x), self._size))


def _norm(x: Tensor) -> Tensor:
    """``|x_i|`` for each path, ``(batch, 1, ..., 1)``; its derivative at 0 is 0."""
    if x.ndim == 1:
        return x.abs()
    return torch.linalg.vector_norm(x, dim=tuple(range(1, x.ndim)), keepdim=True)
