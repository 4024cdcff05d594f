"""What an SDE is: drift, diffusion, noise type and calculus. Solvers see nothing else."""

from __future__ import annotations

import abc
import copy
import enum
from collections.abc import Callable
from typing import Annotated, Any, ClassVar, Literal, NamedTuple, cast, final

import torch
from sdesolve_kernels import matrix_product
from torch import Tensor

from sdesolve._internal.arguments import short, whole_number
from sdesolve._internal.derivatives import linearised, slopes
from sdesolve._internal.tables import html_table

State = Annotated[Tensor, "batch *state"]
Time = Annotated[Tensor, ""] | Annotated[Tensor, "batch"]
Field = Callable[[Tensor, Tensor], Tensor]
Product = Callable[[Tensor], Tensor]
"""``v -> g v`` for a diffusion ``g`` at some state and time."""


class Noise(enum.StrEnum):
    """How the diffusion ``g`` meets the Brownian increment ``dW`` (see `AbstractSDE.diffusion`)."""

    NONE = "none"
    ADDITIVE = "additive"
    SCALAR = "scalar"
    DIAGONAL = "diagonal"
    GENERAL = "general"


class Calculus(enum.StrEnum):
    """Which stochastic integral ``g(X, t) dW`` denotes."""

    ITO = "ito"
    STRATONOVICH = "stratonovich"


NoiseName = Literal["none", "additive", "scalar", "diagonal", "general"] | Noise
CalculusName = Literal["ito", "stratonovich"] | Calculus


def per_sample(c: Tensor, x: Tensor) -> Tensor:
    """``c`` of shape ``()`` or ``(batch,)``, shaped so that it broadcasts against ``x: (batch, *state)``."""
    return c.reshape(c.shape[0], *(1,) * (x.ndim - 1)) if c.ndim == 1 and x.ndim > 1 else c


class AbstractSDE(abc.ABC):
    """``dX = f(X, t) dt + g(X, t) dW``, from any start time to any end time, forwards or backwards.

    Subclasses give `drift` and `diffusion`, and say by `noise` what shape the diffusion has for ``x: (batch, *state)``:

    ============  ==================================================================  =================
    noise         ``g``                                                               ``dW``
    ============  ==================================================================  =================
    ``none``      not called: an ordinary differential equation                       none
    ``additive``  independent of ``x``; what broadcasts to ``x``,                     as ``x``;
                  or to a matrix ``(batch, *state, channels)`` of as many axes        ``(batch, channels)``
    ``scalar``    what broadcasts to ``x``                                            ``(batch, 1, ..., 1)``
    ``diagonal``  what broadcasts to ``x``                                            as ``x``
    ``general``   what broadcasts to ``(batch, *state, channels)``, of as many axes   ``(batch, channels)``
    ============  ==================================================================  =================

    Shapes are aligned from the right, as torch does it: ``(d,)`` has a number for each column of ``x: (batch, d)``,
    ``(batch, 1)`` one for each row, and ``G[None]`` is one matrix ``G: (d, channels)`` for all rows. What only fits
    because batch and state happen to be of one size is refused.

    A function is asked for all rows at once, at one time ``t: ()`` or at a time for each, ``(batch,)``. Where it
    broadcasts ``t`` against ``x`` in a way that would mix rows up, it gets ``t: (batch, 1, ..., 1)``.
    """

    noise: Noise
    calculus: Calculus
    own_component: bool = False
    """Whether diagonal noise has been taken to have each ``g_i`` depend on ``x_i`` alone, which `solve` then checks."""
    taken_as_diagonal: bool = False
    """Whether such a dependence on other components is known, and left out of schemes that have no terms for it."""
    joint: bool = False
    """Whether `drift_and_diffusion` shares work between the two: solvers then call it where they need both."""
    has_diffusion: bool = True
    """Whether `diffusion` gives ``g`` itself. Else only `diffusion_product` is known, and `channels`."""

    def __repr__(self) -> str:
        return f"{type(self).__name__}(noise={self.noise.value!r}, calculus={self.calculus.value!r})"

    def _repr_html_(self) -> str:
        noisy = {
            Noise.NONE: "", Noise.ADDITIVE: " + g(t) dW", Noise.SCALAR: " + g(X, t) dW, one W for all components",
            Noise.DIAGONAL: " + g(X, t) dW, a W for each component", Noise.GENERAL: " + g(X, t) dW, g a matrix",
        }  # fmt: skip
        rows = {"equation": f"dX = f(X, t) dt{noisy[self.noise]}"}
        if self.noise is not Noise.NONE:
            rows |= {"noise": self.noise.value, "calculus": self.calculus.value}
        return html_table(type(self).__name__, rows)

    def directed(self, sign: float | Tensor) -> AbstractSDE:
        """The equation as it is integrated to later times (1) or earlier ones (-1), or ``(batch,)`` of them."""
        return self

    @abc.abstractmethod
    def drift(self, x: Tensor, t: Tensor) -> Tensor:
        """``f(x, t)``, of the shape of ``x: (batch, *state)``; ``t`` is ``()`` or ``(batch,)``."""

    @abc.abstractmethod
    def diffusion(self, x: Tensor, t: Tensor) -> Tensor:
        """``g(x, t)``, of the shape that `noise` calls for."""

    @property
    def equation(self) -> AbstractSDE:
        """The equation as it was given, where this one only watches another."""
        return self

    def channels(self, x: Tensor) -> tuple[int, ...] | None:
        """Shape of ``dW`` without its batch axis, which must broadcast; ``None`` for what the table above says."""
        return None

    def drift_and_diffusion(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """``f(x, t)`` and ``g(x, t)``; an equation that overrides it sets `joint`."""
        return self.drift(x, t), self.diffusion(x, t)

    def diffusion_product(self, x: Tensor, t: Tensor, dW: Tensor) -> Tensor:
        """``g(x, t) dW``, broadcastable to ``x``."""
        return apply_diffusion(self.diffusion(x, t), x, dW)

    @final
    def product_at(self, x: Tensor, t: Tensor) -> Product:
        """``v -> g(x, t) v``; a diffusion that can be had is evaluated once, now."""
        if not self.has_diffusion:
            return lambda v: self.diffusion_product(x, t, v)
        g = self.diffusion(x, t)
        return lambda v: apply_diffusion(g, x, v)

    @final
    def drift_and_product_at(self, x: Tensor, t: Tensor) -> tuple[Tensor, Product]:
        """``f(x, t)`` and ``v -> g(x, t) v``, evaluated together where the equation does so."""
        if not self.has_diffusion:
            return self.drift(x, t), self.product_at(x, t)
        f, g = self.drift_and_diffusion(x, t)
        return f, lambda v: apply_diffusion(g, x, v)


def is_matrix(g: Tensor, x: Tensor) -> bool:
    """Whether ``g`` is a diffusion ``(batch, *state, channels)``, or ``(1, *state, channels)``, for the state ``x``."""
    return g.ndim == x.ndim + 1


def apply_diffusion(g: Tensor, x: Tensor, dW: Tensor) -> Tensor:
    """``g dW`` for a diffusion of any allowed shape."""
    if is_matrix(g, x):
        return matrix_product(g, dW)
    return g * dW


def noise_shape(noise: Noise, x: Tensor, g: Tensor | None = None) -> tuple[int, ...]:
    """Shape of ``dW`` without its batch axis; ``g`` is looked at for additive and general noise only."""
    if noise is Noise.SCALAR:
        return (1,) * (x.ndim - 1)
    if g is not None and is_matrix(g, x):
        return (g.shape[-1],)
    return tuple(x.shape[1:])


class AbstractLinearSDE(AbstractSDE):
    """``dX = f(t) X dt + g(t) dW``: Ito, additive noise, rates that depend on time alone.

    Rates take times of shape ``()`` or ``(batch,)``, or numbers, and have the shape and dtype of the time.
    """

    noise: ClassVar[Noise] = Noise.ADDITIVE  # type: ignore[misc]  # fixed for the whole class
    calculus: ClassVar[Calculus] = Calculus.ITO  # type: ignore[misc]

    @abc.abstractmethod
    def drift_rate(self, t: Tensor | float) -> Tensor:
        """``f(t)``, one over time."""

    @abc.abstractmethod
    def squared_diffusion(self, t: Tensor | float) -> Tensor:
        """``g(t)^2``, variance per time."""

    @final
    def drift(self, x: Tensor, t: Tensor) -> Tensor:
        """``f(t) x``."""
        return per_sample(self.drift_rate(t).to(x.dtype), x) * x

    @final
    def diffusion(self, x: Tensor, t: Tensor) -> Tensor:
        """``g(t)``, ``()`` or ``(batch, 1, ..., 1)``."""
        return per_sample(self.squared_diffusion(t).sqrt().to(x.dtype), x)


class Rates(NamedTuple):
    """Rates of a semilinear equation ``dX = [linear(t) X + field(t) s(X, t)] dt + noise(t) dW`` at some times.

    Attributes:
        linear, field, noise: shaped as the times.
    """

    linear: Tensor
    field: Tensor
    noise: Tensor


class AbstractSemilinear(AbstractSDE):
    """An equation whose drift is linear in ``x`` and in one vector field, with rates that may depend on time alone.

    Reverse SDEs and probability flows of linear diffusions are of this form with the score as the field. A solver step
    on such an equation is ``x <- a x + b s + c z`` with coefficients that can be computed once, in float64.
    """

    @abc.abstractmethod
    def field(self, x: Tensor, t: Tensor) -> Tensor:
        """The vector field ``s(x, t)``, of the shape of ``x``."""

    @abc.abstractmethod
    def rates(self, t: Tensor) -> Rates | None:
        """The rates at float64 times of any shape; ``None`` where they are not functions of time alone."""


@final
class SDE(AbstractSDE):
    """An SDE from functions of ``(x, t)``: drift and diffusion, or both at once, or a product for the diffusion.

    Args:
        drift: ``f(x, t)``, returns the shape of ``x``.
        diffusion: ``g(x, t)``; a tensor of the shape that ``noise`` calls for (`AbstractSDE`), or a Python number.
        noise: ``additive``, ``scalar``, ``diagonal`` or ``general``; ``diagonal`` by default, and ``general`` with
            ``diffusion_product``.
        calculus: ``ito`` or ``stratonovich``.
        drift_and_diffusion: ``(x, t) -> (f, g)``, in place of both. Solvers call it once where they need both at one
            point, so that what they share, such as the body of a network, is evaluated once.
        diffusion_product: ``(x, t, v) -> g(x, t) v`` for ``v: (batch, channels)``, in place of ``diffusion``: noise
            whose matrix is never formed. It is linear in ``v`` and returns the shape of ``x``. Solvers that need ``g``
            itself, its columns or its derivatives, refuse it.
        channels: columns of that matrix: how many Brownian motions there are.

    Raises:
        TypeError: a function is missing, cannot be called, or is given in two ways; ``channels`` is no whole number.
        ValueError: an unknown noise type or calculus; a product with noise that is neither general nor additive.

    Example:
        >>> geometric = SDE(lambda x, t: 1.5 * x, lambda x, t: 0.1 * x, noise="diagonal", calculus="ito")
        >>> circulant = SDE(lambda x, t: -x, diffusion_product=lambda x, t, v: v + 0.5 * v.roll(1, -1), channels=100)
    """

    def __init__(
        self,
        drift: Field | None = None,
        diffusion: Field | None = None,
        noise: NoiseName | None = None,
        calculus: CalculusName = "ito",
        *,
        drift_and_diffusion: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None = None,
        diffusion_product: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None,
        channels: int | None = None,
    ) -> None:
        given = {
            "drift": drift,
            "diffusion": diffusion,
            "drift_and_diffusion": drift_and_diffusion,
            "diffusion_product": diffusion_product,
        }
        names = {name for name, function in given.items() if function is not None}
        for name in sorted(names):
            if not callable(given[name]):
                raise TypeError(f"{name} must be a function of (x, t), got {type(given[name]).__name__}")
        if names not in _WAYS:
            raise TypeError(
                "an SDE is made of drift and diffusion, of drift_and_diffusion, or of drift and diffusion_product; got "
                f"{' and '.join(name for name in given if name in names) or 'none of them'}"
            )
        by_product = diffusion_product is not None
        default = Noise.GENERAL if by_product else Noise.DIAGONAL
        self.noise = _member(Noise, default if noise is None else noise, "noise")
        self.calculus = _member(Calculus, calculus, "calculus")
        if self.noise is Noise.NONE:
            raise ValueError("an SDE has noise; for an equation without any, use sdesolve.ODE(drift)")
        if by_product != (channels is not None):
            raise TypeError(
                "diffusion_product needs channels=, the number of its Brownian motions"
                if by_product
                else "channels= goes with diffusion_product; a diffusion's shape says how many there are"
            )
        if by_product and self.noise not in (Noise.GENERAL, Noise.ADDITIVE):
            raise ValueError(
                f"diffusion_product is for general or additive noise, got noise='{self.noise}', whose product is "
                "elementwise: give diffusion"
            )
        # Types of what `with_params` binds, too.
        self._drift: Callable[..., Tensor] | None = drift
        self._diffusion: Callable[..., Tensor] | None = diffusion
        self._joint: Callable[..., tuple[Tensor, Tensor]] | None = drift_and_diffusion
        self._product: Callable[..., Tensor] | None = diffusion_product
        self._channels = None if channels is None else whole_number(channels, "channels", 1)
        self.joint, self.has_diffusion = drift_and_diffusion is not None, not by_product
        self._correction, self._sign = 0.0, cast(float | Tensor, 1.0)

    def with_params(self, params: Any) -> SDE:
        """This SDE with ``params`` as a last argument of its functions: ``f(x, t, params)``, ``g(x, t, params)``."""
        bound = copy.copy(self)
        for name in ("_drift", "_diffusion", "_joint", "_product"):
            function = getattr(self, name)
            setattr(bound, name, None if function is None else _bound(function, params))
        return bound

    def with_drift(self, drift: Callable[..., Tensor]) -> SDE:
        """An SDE of another drift and the same diffusion, noise, calculus and conversion to it."""
        made = copy.copy(self)
        made._drift, made.joint = drift, False
        return made

    def in_calculus(self, calculus: Calculus) -> SDE:
        """The SDE of the other calculus with the same solutions (`to_ito`, `to_stratonovich`).

        Raises:
            ValueError: its diffusion is known by products alone, and the correction needs its derivatives.
        """
        made = copy.copy(self)
        made.calculus, made.own_component = calculus, self.noise is Noise.DIAGONAL
        if self.noise is not Noise.ADDITIVE:
            if not self.has_diffusion:
                raise ValueError(
                    "the correction between the calculi needs the diffusion itself, and this SDE has its product "
                    "alone: give diffusion in place of diffusion_product, or write the drift of the other calculus"
                )
            made._correction = self._correction + (0.5 if calculus is Calculus.ITO else -0.5)
        return made

    def correlated(self, times: Callable[[Callable[..., Any], str], Callable[..., Any]], channels: int) -> SDE:
        """This SDE with each function that knows the diffusion, by name, replaced by what ``times`` makes of it."""
        made = copy.copy(self)
        made.noise = Noise.ADDITIVE if self.noise is Noise.ADDITIVE else Noise.GENERAL
        made._channels = None if self.has_diffusion else channels
        for name in ("diffusion", "joint", "product"):
            function = getattr(self, f"_{name}")
            setattr(made, f"_{name}", None if function is None else times(function, name))
        return made

    def directed(self, sign: float | Tensor) -> SDE:
        if not self._correction:
            return self
        made = copy.copy(self)
        made._sign = sign
        return made

    @property
    def is_converted(self) -> bool:
        """Whether its drift is that of another calculus with a correction."""
        return self._correction != 0.0

    def channels(self, x: Tensor) -> tuple[int, ...] | None:
        return None if self._channels is None else (self._channels,)

    def drift(self, x: Tensor, t: Tensor) -> Tensor:
        return self._corrected(self._drift(x, t) if self._drift is not None else self._both(x, t)[0], x, t)

    def diffusion(self, x: Tensor, t: Tensor) -> Tensor:
        if self._diffusion is None and self._joint is None:
            raise TypeError(
                "this SDE has its diffusion by products alone; give diffusion in place of diffusion_product"
            )
        return self._both(x, t)[1] if self._diffusion is None else _tensor(self._diffusion(x, t), x)

    def drift_and_diffusion(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        if self._joint is None:
            return self.drift(x, t), self.diffusion(x, t)
        f, g = self._both(x, t)
        return self._corrected(f, x, t), g

    def diffusion_product(self, x: Tensor, t: Tensor, dW: Tensor) -> Tensor:
        return super().diffusion_product(x, t, dW) if self._product is None else self._product(x, t, dW)

    def _both(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        assert self._joint is not None
        both = self._joint(x, t)
        if not isinstance(both, tuple) or len(both) != 2:
            got = f"{len(both)} values" if isinstance(both, tuple) else type(both).__name__
            raise TypeError(f"drift_and_diffusion must return a tuple (f, g), got {got}")
        return both[0], _tensor(both[1], x)

    def _corrected(self, f: Tensor, x: Tensor, t: Tensor) -> Tensor:
        if not self._correction:
            return f
        sign = per_sample(self._sign, x) if isinstance(self._sign, Tensor) else self._sign
        return f + self._correction * sign * self._own_derivative(x, t)

    def _own_derivative(self, x: Tensor, t: Tensor) -> Tensor:
        """``sum_k (g_k . grad) g_k``."""

        def g_of(y: Tensor) -> Tensor:
            g = self.diffusion(y, t)
            return g.expand(*y.shape, -1) if self.noise is Noise.GENERAL else g.expand_as(y)

        if self.noise is Noise.DIAGONAL:
            g, slope = slopes(g_of, x)
            return g * slope
        g, push = linearised(g_of, x)
        if self.noise is Noise.SCALAR:
            return push(g)
        return torch.stack([push(g[..., k])[..., k] for k in range(g.shape[-1])]).sum(0)


_WAYS = ({"drift", "diffusion"}, {"drift_and_diffusion"}, {"drift", "diffusion_product"})


def _tensor(g: Any, x: Tensor) -> Any:
    return torch.as_tensor(g, dtype=x.dtype, device=x.device) if isinstance(g, float | int) else g


class AbstractODE(AbstractSDE):
    """``dX = f(X, t) dt``: an SDE whose noise type is ``none``."""

    noise: ClassVar[Noise] = Noise.NONE  # type: ignore[misc]  # fixed for the whole class
    calculus: ClassVar[Calculus] = Calculus.ITO  # type: ignore[misc]

    @final
    def diffusion(self, x: Tensor, t: Tensor) -> Tensor:
        """Zero; solvers never call it."""
        return torch.zeros((), dtype=x.dtype, device=x.device)


@final
class ODE(AbstractODE):
    """An ordinary differential equation ``dX = f(X, t) dt`` from a function of ``(x, t)``.

    Args:
        drift: ``f(x, t)``, shaped as ``x``, ``(batch, *state)``; or ``f(x, t, params)`` where `solve` gets ``params``.

    Raises:
        TypeError: ``drift`` is no function.
    """

    def __init__(self, drift: Field) -> None:
        if not callable(drift):
            raise TypeError(f"drift must be a function of (x, t), got {type(drift).__name__}")
        self._drift = drift

    def with_params(self, params: Any) -> ODE:
        """This ODE with ``params`` as a third argument of its function: ``f(x, t, params)``."""
        return ODE(_bound(self._drift, params))

    def drift(self, x: Tensor, t: Tensor) -> Tensor:
        return self._drift(x, t)


def _bound(function: Callable[..., Any], params: Any) -> Callable[..., Any]:
    def of_state_and_time(x: Tensor, t: Tensor, *v: Tensor) -> Any:
        return function(x, t, *v, params)

    return of_state_and_time


def _member(kind: type[enum.StrEnum], value: str, name: str):  # type: ignore[no-untyped-def]  # kind(value)
    try:
        return kind(value)
    except ValueError:
        raise ValueError(
            f"{name}={short(value)} is unknown; choose one of {', '.join(repr(str(k)) for k in kind)}"
        ) from None
