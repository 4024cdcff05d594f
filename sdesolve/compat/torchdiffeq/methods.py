"""torchdiffeq's methods, by its names."""

from __future__ import annotations

from typing import final

from torch import Tensor

from sdesolve._internal.arguments import short
from sdesolve.brownian import Increment
from sdesolve.sde import AbstractSDE, Noise, per_sample
from sdesolve.solvers.base import AbstractOneStep, Span, supports
from sdesolve.solvers.dormand_prince import DormandPrince
from sdesolve.solvers.embedded import AbstractEmbedded, AbstractExplicitPair, Attempt, combination
from sdesolve.solvers.euler_maruyama import EulerMaruyama
from sdesolve.solvers.heun import Heun
from sdesolve.solvers.midpoint import Midpoint
from sdesolve.solvers.tsitouras import Tsit5


class _Explicit(AbstractOneStep):
    """An explicit Runge-Kutta scheme: nodes and weights of the stages after the first, and of the state."""

    supported = supports(ito=(Noise.NONE,))
    strong_order = None
    weak_order = None
    nodes: tuple[float, ...]
    stages: tuple[tuple[float, ...], ...]
    weights: tuple[float, ...]

    @final
    def step(self, sde: AbstractSDE, x: Tensor, span: Span, noise: Increment | None) -> Tensor:
        k = [sde.drift(x, span.t0)]
        for node, weights in zip(self.nodes, self.stages, strict=True):
            k.append(sde.drift(x + span.dt * combination(weights, k), span.at(node) if node < 1.0 else span.t1))
        return x + span.dt * combination(self.weights, k)


@final
class ThreeEighths(_Explicit):
    """Kutta's 3/8 rule, order 4: what torchdiffeq calls ``rk4``. Kutta 1901."""

    ode_order = 4
    evaluations = 4
    nodes = (1 / 3, 2 / 3, 1.0)
    stages = ((1 / 3,), (-1 / 3, 1.0), (1.0, -1.0, 1.0))
    weights = (1 / 8, 3 / 8, 3 / 8, 1 / 8)


@final
class Heun3(_Explicit):
    """Heun's third-order scheme. Heun 1900."""

    ode_order = 3
    evaluations = 3
    nodes = (1 / 3, 2 / 3)
    stages = ((1 / 3,), (0.0, 2 / 3))
    weights = (1 / 4, 0.0, 3 / 4)


class _Hermite(AbstractExplicitPair):
    """A pair whose states between steps are those of the cubic through both ends and their slopes."""

    supported = supports(ito=(Noise.NONE,))
    strong_order = None
    weak_order = None

    @final
    def between(self, x: Tensor, attempt: Attempt, dt: Tensor, theta: Tensor) -> Tensor:
        h, u = per_sample(dt.to(x.dtype), x), per_sample(theta.to(x.dtype), x)
        rise = attempt.x - x
        left, right = h * attempt.slopes[0] - rise, rise - h * attempt.slopes[-1]
        return x + u * (rise + (1 - u) * (left + u * (right - left)))


@final
class BogackiShampine(_Hermite):
    """The 3(2) pair of Bogacki and Shampine 1989, Applied Mathematics Letters 2."""

    ode_order = 3
    evaluations = 3
    error_order = 3
    nodes = (1 / 2, 3 / 4, 1.0)
    stages = ((1 / 2,), (0.0, 3 / 4), (2 / 9, 1 / 3, 4 / 9))
    error = (2 / 9 - 7 / 24, 1 / 3 - 1 / 4, 4 / 9 - 1 / 3, -1 / 8)


@final
class HeunEuler(_Hermite):
    """Heun's second-order scheme with Euler's within."""

    ode_order = 2
    evaluations = 2
    error_order = 2
    nodes = (1.0, 1.0)
    stages = ((1.0,), (1 / 2, 1 / 2))
    error = (-1 / 2, 1 / 2, 0.0)


@final
class Fehlberg2(_Hermite):
    """The 1(2) pair of Fehlberg 1969, NASA TR R-315, that goes on with its second-order state."""

    ode_order = 2
    evaluations = 3
    error_order = 2
    nodes = (1 / 2, 1.0, 1.0)
    stages = ((1 / 2,), (1 / 256, 255 / 256), (1 / 512, 255 / 256, 1 / 512))
    error = (-1 / 512, 0.0, 1 / 512, 0.0)


ADAPTIVE: dict[str, type[AbstractEmbedded]] = {
    "dopri5": DormandPrince,
    "tsit5": Tsit5,
    "bosh3": BogackiShampine,
    "fehlberg2": Fehlberg2,
    "adaptive_heun": HeunEuler,
}
FIXED: dict[str, AbstractOneStep] = {
    "euler": EulerMaruyama(),
    "midpoint": Midpoint(),
    "heun2": Heun(),
    "heun3": Heun3(),
    "rk4": ThreeEighths(),
}
_STIFF = "sdesolve.solve with Rodas4() or ImplicitEuler()"
_IMPLICIT = (
    "implicit_euler",
    "implicit_midpoint",
    "trapezoid",
    "radauIIA3",
    "gl4",
    "radauIIA5",
    "gl6",
    "sdirk2",
    "trbdf2",
)
_IN_PLACE = {
    "dopri8": "'dopri5' or 'tsit5'",
    **dict.fromkeys(("explicit_adams", "implicit_adams", "fixed_adams"), "'rk4', or 'dopri5' for steps of its own"),
    **dict.fromkeys(_IMPLICIT, _STIFF),
    "scipy_solver": f"'dopri5', or for stiff equations {_STIFF}",
}


def check_method(method: object) -> str:
    """The name of a method that is there.

    Raises:
        ValueError: it is not; what to take in its place.
    """
    if isinstance(method, str) and (method in ADAPTIVE or method in FIXED):
        return method
    if isinstance(method, str) and method in _IN_PLACE:
        raise ValueError(f"method={method!r} is not here; take {_IN_PLACE[method]}")
    raise ValueError(f"method must be one of {', '.join((*ADAPTIVE, *FIXED))}, got {short(method)}")
