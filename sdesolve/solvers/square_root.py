"""Steps of square-root processes that stay positive."""

from __future__ import annotations

import math
from typing import final

import torch
from torch import Tensor

from sdesolve.brownian import Increment
from sdesolve.models.heston import Heston
from sdesolve.models.mean_reverting import CIR
from sdesolve.sde import AbstractSDE, Noise
from sdesolve.solvers.base import AbstractOneStep, Span, supports

_SWITCH = 1.5  # of psi; any value between 1 and 2 would do (Andersen 2008, section 3.2.3)


def _forward_steps(solver: AbstractOneStep, times: Tensor) -> Tensor:
    h = times.diff(dim=0)
    if bool((h < 0.0).any()):
        raise ValueError(
            f"{type(solver).__name__} goes forwards in time, and this grid goes from {float(times[0].max()):.6g} to "
            f"{float(times[-1].min()):.6g}: backwards a square-root process leaves the positive numbers"
        )
    return h


@final
class ImplicitSquareRoot(AbstractOneStep):
    """Backward Euler for ``Y = sqrt(X)`` of a `CIR` process, whose equation has additive noise.

    ``Y' = (b + sqrt(b^2 + (2 + kappa h) h (kappa theta - xi^2 / 4))) / (2 + kappa h)`` with ``b = Y + xi W / 2`` and
    ``X' = Y'^2``, for ``4 kappa theta > xi^2``; positive for steps of any length. Strong order 1 in ``L^p`` for
    ``p < 4 kappa theta / (3 xi^2)``, weak order 1. Alfonsi 2005; Dereich, Neuenkirch and Szpruch 2012, "An Euler-type
    method for the strong approximation of the Cox-Ingersoll-Ross process", equation 4.

    Raises:
        ValueError: in `solve`, where ``4 kappa theta <= xi^2``, and for time that runs backwards.
    """

    supported = supports(ito=(Noise.DIAGONAL,))
    equations = (CIR,)
    strong_order = 1.0
    weak_order = 1.0
    ode_order = None
    evaluations = 0
    diffusion_evaluations = 0

    def numbers(self, sde: AbstractSDE, times: Tensor) -> Tensor:
        assert isinstance(sde, CIR)
        h, excess = _forward_steps(self, times), sde.rate * sde.level - 0.25 * sde.volatility**2
        if excess <= 0.0:
            raise ValueError(
                "ImplicitSquareRoot needs 4 rate level > volatility^2, got "
                f"{4.0 * sde.rate * sde.level:.6g} and {sde.volatility**2:.6g}; take QE, which needs nothing"
            )
        p = 2.0 + sde.rate * h
        return torch.stack([1.0 / p, p * h * excess], 1)

    def step(self, sde: AbstractSDE, x: Tensor, span: Span, noise: Increment | None) -> Tensor:
        cir, (scale, excess) = sde.equation, span.numbers
        assert isinstance(cir, CIR)
        assert noise is not None
        b = x.clamp(min=0.0).sqrt() + 0.5 * cir.volatility * noise.W
        return (scale * (b + (b * b + excess).sqrt())).square()


@final
class QE(AbstractOneStep):
    """Quadratic-exponential: the next value of a `CIR` process, or the variance of `Heston`, from a law like its own.

    With the exact mean ``m`` and variance ``s^2`` of the next value and ``psi = s^2 / m^2``: a squared normal,
    ``a (b + Z)^2``, for ``psi <= 1.5``, and else an exponential law with a point mass at 0, both of that mean and
    variance; ``Z = W / sqrt(h)``. Positive for parameters and steps of any size. For Heston's log-price::

        X' = X + r h + K0 + K1 V + K2 V' + sqrt(K3 (V + V')) W2 / sqrt(h)

    with ``K0 = -rho kappa theta h / xi``, ``K1, K2 = h (kappa rho / xi - 1/2) / 2 -+ rho / xi`` and
    ``K3 = h (1 - rho^2) / 2``. Weak order 1; the first two moments of CIR are exact. Andersen 2008, "Simple and
    efficient simulation of the Heston stochastic volatility model", equations 23 to 33.

    Raises:
        ValueError: in `solve`, for time that runs backwards.
    """

    supported = supports(ito=(Noise.DIAGONAL, Noise.GENERAL))
    equations = (CIR, Heston)
    strong_order = None
    weak_order = 1.0
    ode_order = None
    evaluations = 0
    diffusion_evaluations = 0

    def numbers(self, sde: AbstractSDE, times: Tensor) -> Tensor:
        h, (kappa, theta, xi) = _forward_steps(self, times), _square_root(sde)
        e, gone = torch.exp(-kappa * h), -torch.expm1(-kappa * h)
        columns = [h.rsqrt(), e, theta * gone, xi**2 * e * gone / kappa, 0.5 * theta * xi**2 * gone**2 / kappa]
        if isinstance(sde, Heston):
            rho, slope = sde.correlation, kappa * sde.correlation / xi - 0.5
            columns += [sde.rate * h - rho * kappa * theta * h / xi, 0.5 * h * slope, 0.5 * h * (1.0 - rho**2)]
        return torch.stack(columns, 1)

    def step(self, sde: AbstractSDE, x: Tensor, span: Span, noise: Increment | None) -> Tensor:
        equation = sde.equation
        assert noise is not None
        if not isinstance(equation, Heston):
            return _next(x, noise.W * span.numbers[0], span.numbers)
        numbers = [c.squeeze(-1) if c.ndim else c for c in span.numbers]
        unit, (drift, slope, spread) = numbers[0], numbers[5:]
        Z1, Z2 = (noise.W * unit.unsqueeze(-1) if unit.ndim else noise.W * unit).unbind(1)
        price, v = x.unbind(1)
        v_next, leverage = _next(v, Z1, numbers), equation.correlation / equation.volatility
        known = drift + (slope - leverage) * v + (slope + leverage) * v_next
        return torch.stack([price + known + (spread * (v.clamp(min=0.0) + v_next)).sqrt() * Z2, v_next], 1)


def _square_root(sde: AbstractSDE) -> tuple[float, float, float]:
    if isinstance(sde, Heston):
        return sde.reversion, sde.level, sde.volatility
    assert isinstance(sde, CIR)
    return sde.rate, sde.level, sde.volatility


def _next(v: Tensor, Z: Tensor, numbers: tuple[Tensor, ...] | list[Tensor]) -> Tensor:
    _, e, pull, of_v, of_level = numbers[:5]
    v = v.clamp(min=0.0)
    m = pull + e * v
    psi = (of_v * v + of_level) / (m * m)
    quadratic = psi <= _SWITCH
    # Each branch is computed at a psi that it is for, so that neither has a derivative that is none.
    i = 2.0 / torch.where(quadratic, psi, 1.0)
    square = i - 1.0 + (i * (i - 1.0)).sqrt()
    p = torch.where(quadratic, 0.5, (psi - 1.0) / (psi + 1.0))
    above = 0.5 * torch.erfc(Z * math.sqrt(0.5))  # the chance of a larger number than Z
    tail = (m / (1.0 - p)) * torch.log((1.0 - p) / above).clamp(min=0.0)
    return torch.where(quadratic, m / (1.0 + square) * (square.sqrt() + Z).square(), tail)
