"""Schemes for underdamped Langevin dynamics."""

from __future__ import annotations

import abc
import math
from collections.abc import Callable, Sequence
from typing import final

import torch
from torch import Tensor

from sdesolve.brownian import Increment
from sdesolve.models.langevin import UnderdampedLangevin
from sdesolve.sde import AbstractSDE, Noise
from sdesolve.solvers.base import AbstractOneStep, Span, supports

_TERMS = 26  # of series, in float64 for arguments up to 1


class AbstractLangevin(AbstractOneStep):
    r"""A step of `UnderdampedLangevin` from a flow of friction and noise that is known.

    Each docstring writes ``F(x, t) = -grad U(x, t) / mass``, ``rho = sqrt(2 friction temperature / mass)``,
    ``alpha = friction h``, ``e(s) = exp(-s alpha)``, ``a(s) = h (1 - e(s)) / alpha`` and
    ``b(s) = h (e(s) + s alpha - 1) / alpha^2``. Such numbers are made of the grid in float64, by series where ``alpha``
    is small. Backwards in time ``h`` is negative, and all formulas hold.
    """

    supported = supports(ito=(Noise.ADDITIVE,))
    equations = (UnderdampedLangevin,)
    strong_order = None
    ode_order = None
    diffusion_evaluations = 0

    @final
    def numbers(self, sde: AbstractSDE, times: Tensor) -> Tensor:
        assert isinstance(sde, UnderdampedLangevin)
        h = times.diff(dim=0)
        return torch.stack(list(self.coefficients(h, sde.friction * h)), 1)

    @abc.abstractmethod
    def coefficients(self, h: Tensor, alpha: Tensor) -> Sequence[Tensor]:
        """Numbers of steps of length ``h`` with ``alpha = friction h``, all of one shape, float64."""

    @final
    def step(self, sde: AbstractSDE, x: Tensor, span: Span, noise: Increment | None) -> Tensor:
        langevin = sde.equation
        assert isinstance(langevin, UnderdampedLangevin)
        assert noise is not None
        q, v = x.unbind(1)
        numbers = [c[:, 0] if c.ndim else c for c in span.numbers]
        parts = [p[:, 0] for p in (noise.W, noise.H, noise.K) if p is not None]
        scale, h = langevin.noise_scale(q), span.dt[:, 0] if span.dt.ndim else span.dt

        def force(y: Tensor, at: float) -> Tensor:
            time = span.t0 if at == 0.0 else span.t1 if at == 1.0 else span.at(at)
            return sde.drift(langevin.state(y, torch.zeros_like(y)), time)[:, 1]

        return langevin.state(*self.moved(q, v, h, force, [scale * p for p in parts], numbers))

    @abc.abstractmethod
    def moved(
        self,
        x: Tensor,
        v: Tensor,
        h: Tensor,
        force: Callable[[Tensor, float], Tensor],
        noise: Sequence[Tensor],
        numbers: Sequence[Tensor],
    ) -> tuple[Tensor, Tensor]:
        """Positions and velocities after a step.

        Args:
            x: positions, ``(batch, *state)``.
            v: velocities.
            h: length of the step.
            force: ``F`` at positions, and at a fraction of the step.
            noise: ``rho W``, and ``rho H`` and ``rho K`` where the scheme needs them.
            numbers: what `coefficients` made for the step.
        """


@final
class ALIGN(AbstractLangevin):
    """``x' = x + a v + h b F(x, t) + rho (b W + c H)``, the exact flow for a constant force and the path's chord.

    ``v' = e v + (a - b) F(x, t) + b F(x', t') + rho (a W - alpha c H) / h`` with ``c = 6 h ((alpha + 2) e + alpha - 2)
    / alpha^3``. Strong order 2 and weak order 2, two evaluations of the gradient. Foster, Lyons and Oberhauser 2021,
    "The shifted ODE method for underdamped Langevin MCMC", with the noise of a step as in the study of Foster, Reis and
    Strange 2023.
    """

    strong_orders = (2.0, None, None)
    weak_order = 2.0
    evaluations = 2
    needs = ("W", "H")

    def coefficients(self, h: Tensor, alpha: Tensor) -> Sequence[Tensor]:
        return [torch.exp(-alpha), phi1(alpha), phi2(alpha), of_H(alpha), alpha * of_H(alpha)]

    def moved(
        self,
        x: Tensor,
        v: Tensor,
        h: Tensor,
        force: Callable[[Tensor, float], Tensor],
        noise: Sequence[Tensor],
        numbers: Sequence[Tensor],
    ) -> tuple[Tensor, Tensor]:
        (W, H), (e, a, b, c, alpha_c) = noise, numbers  # a, b and c by h
        F = force(x, 0.0)
        y = x + h * (a * v + b * (h * F) + b * W + c * H)
        return y, e * v + h * ((a - b) * F + b * force(y, 1.0)) + a * W - alpha_c * H


@final
class QUICSORT(AbstractLangevin):
    """Two evaluations of the gradient at the nodes of Gauss, ``l, r = 1/2 -+ sqrt(3)/6``; strong order 3.

    With ``u = v + rho (H + 6 K)`` and ``w = rho (W - 12 K)``::

        y = x + a(l) u + b(l) w,                  F1 = h F(y, t + l h)
        z = x + a(r) u + b(r) w + a(1/3) F1,      F2 = h F(z, t + r h)
        x' = x + a(1) u + b(1) w + (a(r) F1 + a(l) F2) / 2
        v' = e(1) u + (e(r) F1 + e(l) F2) / 2 + a(1) w / h - rho (H - 6 K)

    Weak order 3. Foster, Lyons and Oberhauser 2021; Scott, O'Kane, Jelincic and Foster 2025, "Underdamped Langevin MCMC
    with third order convergence".
    """

    strong_orders = (3.0, None, None)
    weak_order = 3.0
    evaluations = 2
    needs = ("W", "H", "K")

    def coefficients(self, h: Tensor, alpha: Tensor) -> Sequence[Tensor]:
        nodes = (*_GAUSS, 1.0)
        a = [s * phi1(s * alpha) for s in (*nodes, 1.0 / 3.0)]
        return [*a, *(s * s * phi2(s * alpha) for s in nodes), *(torch.exp(-s * alpha) for s in nodes)]

    def moved(
        self,
        x: Tensor,
        v: Tensor,
        h: Tensor,
        force: Callable[[Tensor, float], Tensor],
        noise: Sequence[Tensor],
        numbers: Sequence[Tensor],
    ) -> tuple[Tensor, Tensor]:
        (W, H, K), (a_l, a_r, a, third, b_l, b_r, b, e_l, e_r, e) = noise, numbers  # a and b by h
        l, r = _GAUSS  # noqa: E741
        u, w = v + (H + 6.0 * K), W - 12.0 * K
        F1 = h * force(x + h * (a_l * u + b_l * w), l)
        F2 = h * force(x + h * (a_r * u + b_r * w + third * F1), r)
        x = x + h * (a * u + b * w + 0.5 * (a_r * F1 + a_l * F2))
        return x, e * u + 0.5 * (e_r * F1 + e_l * F2) + a * w - (H - 6.0 * K)


@final
class UBU(AbstractLangevin):
    """Half a flow of friction and noise, a kick ``v + h F(x, t + h/2)``, and the other half; strong order 2.

    The flow over a length ``s h`` is ``v -> e(s) v + n_v``, ``x -> x + a(s) v + n_x``, whose normals have the exact
    joint law for any friction: they are the nearest to the path's own that ``W``, ``H`` and ``K`` of the step can make.
    Weak order 2, one evaluation of the gradient. Sanz-Serna and Zygalakis 2021, "Wasserstein distance estimates for the
    distributions of numerical approximations to ergodic stochastic differential equations", section 7.

    Raises:
        ValueError: in `solve`, for steps backwards in time of more than ``8 / friction``, where the noise of positions
            and that of velocities are one number to float64.
    """

    strong_orders = (2.0, None, None)
    weak_order = 2.0
    evaluations = 1
    needs = ("W", "H", "K")

    def coefficients(self, h: Tensor, alpha: Tensor) -> Sequence[Tensor]:
        if bool((alpha < -8.0).any()):
            worst = -float(alpha.min())
            raise ValueError(f"UBU goes back in time by at most 8 / friction a step, got friction |dt| = {worst:.4g}")
        noise = flow_noise(alpha).flatten(-2).movedim(-1, 0)
        halves = [0.5 * phi1(0.5 * alpha), torch.exp(-0.5 * alpha)]
        return [torch.exp(-alpha), phi1(alpha), *halves, *noise]

    def moved(
        self,
        x: Tensor,
        v: Tensor,
        h: Tensor,
        force: Callable[[Tensor, float], Tensor],
        noise: Sequence[Tensor],
        numbers: Sequence[Tensor],
    ) -> tuple[Tensor, Tensor]:
        e, a, a_half, e_half, *weights = numbers  # a and a_half by h
        of_v, of_x, of_middle = (
            sum((c * n for c, n in zip(weights[i : i + 3], noise, strict=True)), torch.zeros_like(v)) for i in (0, 3, 6)
        )
        kick = h * force(x + h * (a_half * v + of_middle), 0.5)
        return x + h * (a * v + a_half * kick + of_x), e * v + e_half * kick + of_v


@final
class BAOAB(AbstractLangevin):
    """Kick ``v + h/2 F``, drift ``x + h/2 v``, the exact law of friction and noise, drift and kick again.

    The middle is ``v -> e v + sqrt(temperature (1 - e^2) / mass) W / sqrt|h|``. Strong order 1 and weak order 2, two
    evaluations of the gradient. The stationary law of positions is off by O(h^2), exact on a Gaussian.
    `mcmc.BAOAB` is the same step as a Markov chain with a target. Leimkuhler and Matthews 2013, section 3.2.
    """

    weak_order = 2.0
    evaluations = 2

    def coefficients(self, h: Tensor, alpha: Tensor) -> Sequence[Tensor]:
        return [torch.exp(-alpha), phi1(2.0 * alpha).sqrt()]

    def moved(
        self,
        x: Tensor,
        v: Tensor,
        h: Tensor,
        force: Callable[[Tensor, float], Tensor],
        noise: Sequence[Tensor],
        numbers: Sequence[Tensor],
    ) -> tuple[Tensor, Tensor]:
        (W,), (e, c) = noise, numbers
        v = v + 0.5 * h * force(x, 0.0)
        x = x + 0.5 * h * v
        v = e * v + c * W
        x = x + 0.5 * h * v
        return x, v + 0.5 * h * force(x, 1.0)


@final
class OBABO(AbstractLangevin):
    """The exact law of friction and noise over ``h/2``, a step of velocity Verlet, and the other half of the noise.

    Each half is ``v -> e(1/2) v + sqrt(temperature (1 - e(1)) / mass) z`` with ``z = (W +- sqrt(12) H) / sqrt(2 |h|)``.
    Strong order 1 and weak order 2, two evaluations of the gradient. Bussi and Parrinello 2007, "Accurate sampling
    using Langevin dynamics".
    """

    weak_order = 2.0
    evaluations = 2
    needs = ("W", "H")

    def coefficients(self, h: Tensor, alpha: Tensor) -> Sequence[Tensor]:
        return [torch.exp(-0.5 * alpha), 0.5 * phi1(alpha).sqrt()]

    def moved(
        self,
        x: Tensor,
        v: Tensor,
        h: Tensor,
        force: Callable[[Tensor, float], Tensor],
        noise: Sequence[Tensor],
        numbers: Sequence[Tensor],
    ) -> tuple[Tensor, Tensor]:
        (W, H), (e, c) = noise, numbers
        first, second = c * (W + math.sqrt(12.0) * H), c * (W - math.sqrt(12.0) * H)
        v = e * v + first + 0.5 * h * force(x, 0.0)
        x = x + h * v
        return x, e * (v + 0.5 * h * force(x, 1.0)) + second


_GAUSS = (0.5 - math.sqrt(3.0) / 6.0, 0.5 + math.sqrt(3.0) / 6.0)


def _stable(alpha: Tensor, closed: Callable[[Tensor], Tensor], coefficient: Callable[[int], float]) -> Tensor:
    """``closed(alpha)``; where that would cancel, up to 1, the series ``sum_n coefficient(n) alpha^n``."""
    small = alpha.abs() < 1.0
    z, series = torch.where(small, alpha, 0.0), torch.zeros_like(alpha)
    for n in reversed(range(_TERMS)):
        series = series * z + coefficient(n)
    return torch.where(small, series, closed(torch.where(small, 1.0, alpha)))


def _power(n: int) -> float:
    """The coefficient of ``alpha^n`` in ``exp(-alpha)``."""
    return (-1.0) ** n / math.factorial(n)


def phi1(z: Tensor) -> Tensor:
    """``(1 - exp(-z)) / z``."""
    return _stable(z, lambda z: -torch.expm1(-z) / z, lambda n: -_power(n + 1))


def phi2(z: Tensor) -> Tensor:
    """``(exp(-z) + z - 1) / z^2``."""
    return _stable(z, lambda z: (torch.expm1(-z) + z) / z**2, lambda n: _power(n + 2))


def of_H(z: Tensor) -> Tensor:
    """``6 (exp(-z) (z + 2) + z - 2) / z^3``: what ``H`` moves positions by, in units of ``h``."""
    return _stable(
        z, lambda z: 6.0 * (torch.exp(-z) * (z + 2.0) + z - 2.0) / z**3, lambda n: -6.0 * (n + 1) * _power(n + 3)
    )


def of_K(z: Tensor) -> Tensor:
    """``60 (exp(-z) (z (z + 6) + 12) - z (z - 6) - 12) / z^4``: likewise, of ``K``."""
    return _stable(
        z,
        lambda z: 60.0 * (torch.exp(-z) * (z * (z + 6.0) + 12.0) - z * (z - 6.0) - 12.0) / z**4,
        lambda n: 60.0 * (n + 1) * n * _power(n + 4),
    )


def _variance(z: Tensor) -> Tensor:
    """``(2 z - 3 + 4 exp(-z) - exp(-2 z)) / (2 z^3)``: of positions after a flow of unit length."""
    return _stable(
        z,
        lambda z: (2.0 * z + 4.0 * torch.expm1(-z) - torch.expm1(-2.0 * z)) / (2.0 * z**3),
        lambda n: 0.5 * (4.0 - 2.0 ** (n + 3)) * _power(n + 3),
    )


def flow_noise(alpha: Tensor) -> Tensor:
    """Weights of ``W``, ``H`` and ``K`` in the noise of velocities, of positions, and of positions half-way.

    The projection of each on the three numbers, times the matrix that turns the covariance of projections into that of
    the noise itself. Steps of unit length: ``(..., 3, 3)``, float64.
    """
    projected = torch.stack([
        torch.stack([phi1(alpha), -alpha * of_H(alpha), -alpha * of_K(alpha)], -1),
        torch.stack([phi2(alpha), of_H(alpha), of_K(alpha)], -1),
        torch.stack(_half_way(alpha), -1),
    ], -2)  # fmt: skip
    half, e = 0.5 * alpha, torch.exp(-0.5 * alpha)
    vv, vx, xx = phi1(2.0 * alpha), 0.5 * phi1(alpha) ** 2, _variance(alpha)
    middle, middle_vx = _variance(half) / 8.0, 0.5 * phi1(half) ** 2 / 4.0
    vm, xm = e * middle_vx, middle + 0.5 * phi1(half) * middle_vx
    rows = [torch.stack(row, -1) for row in ((vv, vx, vm), (vx, xx, xm), (vm, xm, middle))]
    units = projected / torch.tensor([1.0, 12.0, 720.0], dtype=alpha.dtype, device=alpha.device).sqrt()
    exact, found = (torch.linalg.cholesky(c) for c in (torch.stack(rows, -2), units @ units.mT))
    return exact @ torch.linalg.solve_triangular(found, projected, upper=False)


def _half_way(alpha: Tensor) -> list[Tensor]:
    """Projections of ``1/alpha int_0^(1/2) (1 - exp(-alpha (1/2 - s))) dW(s)`` on ``W``, ``H`` and ``K``."""
    c = 0.5 * alpha
    # int_0^1 r^j (1 - exp(-c r)) / alpha dr
    moments = [
        _stable(
            c,
            lambda c, j=j: 0.5 / c * (1.0 / (j + 1) - _exponential_moment(c, j)),  # type: ignore[misc]
            lambda n, j=j: -0.5 * _power(n + 1) / (n + 2 + j),  # type: ignore[misc]
        )
        for j in range(3)
    ]
    return [0.5 * moments[0], 3.0 * moments[1], 45.0 * moments[2] - 15.0 * moments[0]]


def _exponential_moment(c: Tensor, j: int) -> Tensor:
    """``int_0^1 r^j exp(-c r) dr``."""
    return -torch.expm1(-c) / c if j == 0 else (j * _exponential_moment(c, j - 1) - torch.exp(-c)) / c
