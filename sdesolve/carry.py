"""Functionals of a path that are carried along it: integrals, averages, extremes, times spent, discounted values."""

from __future__ import annotations

import abc
import dataclasses
import itertools
from collections.abc import Callable, Sequence
from typing import Any, final

import torch
from torch import Tensor

from sdesolve._internal.arguments import kind_of, number, short
from sdesolve._internal.derivatives import gradient
from sdesolve.sde import AbstractSDE, Field, Noise, is_matrix, per_sample

Tree = Any  # a tensor ``(batch, ...)``, or a tuple, list or dictionary of such trees
Called = Callable[..., Tree]
_GAUSS = tuple((0.5 + 0.5 * x, w) for x, w in ((-(0.6**0.5), 5 / 18), (0.0, 4 / 9), (0.6**0.5, 5 / 18)))


@final
@dataclasses.dataclass(frozen=True)
class Passage:
    """One step of all paths, as what is carried along them sees it.

    Attributes:
        sde: the equation.
        x: ``(batch, *state)``, before the step.
        x_next: after it; where a path stops in the step, the state at the stop.
        t: the time before the step, ``()``, or ``(batch,)`` where paths have times of their own.
        t_next: the time of ``x_next``, likewise.
        dt: ``t_next - t``, negative when time runs backwards, ``()`` or ``(batch,)``.
        z: standard normals of each path, ``(batch, normals)``; ``None`` if none are asked for.
        at: calls a function of tensors ``(batch, ...)`` and of times, with times of a shape that it is right for.
        curve: the states at fractions of it, ``(batch,)``, float64, on the curve of a solver of ODEs that has one.
    """

    sde: AbstractSDE
    x: Tensor
    x_next: Tensor
    t: Tensor
    t_next: Tensor
    dt: Tensor
    z: Tensor | None
    at: Callable[..., Tree]
    curve: Callable[[Tensor], Tensor] | None = None

    def ends(self, f: Field) -> tuple[Tensor, Tensor]:
        """``f(x, t)`` before and after the step."""
        return self.at(f, (self.x,), (self.t,)), self.at(f, (self.x_next,), (self.t_next,))

    def trapezoid(self, f: Field) -> Tensor:
        """``int f dt`` over the step by the trapezoidal rule; on a known curve by that of Gauss with three points."""
        if self.curve is not None:
            total: Any = 0.0
            for theta, weight in _GAUSS:
                there = self.curve(torch.full(self.x.shape[:1], theta, dtype=torch.float64, device=self.x.device))
                f_there = self.at(f, (there,), (self.t + theta * (self.t_next - self.t),))
                total = total + weight * f_there
            return per_sample(self.dt, total) * total
        a, b = self.ends(f)
        return 0.5 * per_sample(self.dt, a) * (a + b)

    def variance(self, f: Field) -> Tensor:
        """``|g^T grad f|^2 |dt|`` at the start of the step, ``(batch,)``: the variance of ``f`` over it."""
        slope = gradient(lambda y: self.at(f, (y,), (self.t,)), self.x)
        return pushed(self.sde, slope, self.x, self.t)[0] * self.dt.abs()


def pushed(sde: AbstractSDE, slope: Tensor, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """``|g^T v|^2``, ``(batch,)``, and ``g g^T v``, ``(batch, *state)``, for a vector ``v = slope`` at each state."""
    if sde.noise is Noise.NONE:
        return x.new_zeros(()).expand(len(x)), torch.zeros_like(x)
    if not sde.has_diffusion:  # products are linear, and their gradient is the transposed product
        product, nothing = sde.product_at(x, t), x.new_zeros(len(x), *(sde.channels(x) or ()))
        by_channel = gradient(lambda v: (product(v) * slope).reshape(len(x), -1).sum(1), nothing)
        return by_channel.square().reshape(len(x), -1).sum(1), product(by_channel)
    g = sde.diffusion(x, t)
    if is_matrix(g, x):
        by_channel = (g * slope[..., None]).reshape(len(x), -1, g.shape[-1]).sum(1)
        squares = by_channel.square().sum(1)
        return squares, (g * by_channel.reshape(len(x), *(1,) * (x.ndim - 1), -1)).sum(-1)
    v = g * slope
    if sde.noise is Noise.SCALAR:
        total = v.reshape(len(x), -1).sum(1)
        return total.square(), g * per_sample(total, x)
    return v.square().reshape(len(x), -1).sum(1), g * v


class AbstractCarry(abc.ABC):
    """What is carried along each path beside its state. A subclass says where it starts and how a step changes it."""

    @property
    def normals(self) -> int:
        """Standard normals that each step takes for each path, independent of those that drive it."""
        return 0

    @property
    @abc.abstractmethod
    def functions(self) -> tuple[Called, ...]:
        """The functions given by the user that it calls."""

    @abc.abstractmethod
    def begin(self, x0: Tensor, at: Callable[[Field], Tensor]) -> Tree:
        """What is carried before the first step; ``at`` evaluates a function of ``(x, t)`` there."""

    @abc.abstractmethod
    def advance(self, c: Tree, step: Passage) -> Tree:
        """What is carried after a step, from what was before it."""

    def result(self, c: Tree) -> Tree:
        """What the user sees of it, in ``sol.carry`` and as the third argument of an observable."""
        return c


@final
class Carry(AbstractCarry):
    """A functional of each path given by a start and an update, ``c <- update(c, x, x_next, t, t_next)`` in each step.

    It costs what its operations cost: on kernels it is fused into the trajectory, and gradients flow through it.

    Args:
        start: what is carried before the first step: a tensor of a row per path, ``(batch, ...)``, a number for all
            paths, a tuple or dictionary of these, or a function of ``x0`` that makes them.
        update: what it is after a step from ``x`` at ``t`` to ``x_next`` at ``t_next``: the same shapes and dtypes, a
            row made of that path's own alone. Where a path stops within a step (``until=``), ``x_next`` and ``t_next``
            are those of the stop, and times are ``(batch,)``, or ``(batch, 1, ..., 1)`` if it is right for these alone.
        normals: how many standard normals it takes in a step for each path; ``update`` gets them as a sixth argument,
            ``(batch, normals)``. They are functions of seed, path and step, and independent of what drives the path.
        result: what ``sol.carry`` and an observable get, made of what is carried; all of it by default.

    Example:
        >>> length = sds.Carry(0.0, lambda c, x, x_next, t, t_next: c + (x_next - x).norm(dim=1))
    """

    def __init__(
        self, start: Any, update: Called, *, normals: int = 0, result: Callable[[Tree], Tree] | None = None
    ) -> None:
        if not callable(update):
            raise TypeError(f"update must be a function (c, x, x_next, t, t_next), got {kind_of(update)}")
        if type(normals) is not int or normals < 0:
            raise ValueError(f"normals must be a whole number from 0 on, got {short(normals)}")
        self._start, self._update, self._normals, self._result = start, update, normals, result

    @property
    def normals(self) -> int:
        return self._normals

    @property
    def functions(self) -> tuple[Called, ...]:
        return (self._update,)

    def begin(self, x0: Tensor, at: Callable[[Field], Tensor]) -> Tree:
        start = self._start(x0) if callable(self._start) else self._start
        return _rows(start, x0)

    def advance(self, c: Tree, step: Passage) -> Tree:
        more = () if step.z is None else (step.z,)
        return step.at(self._update, (c, step.x, step.x_next), (step.t, step.t_next), more)

    def result(self, c: Tree) -> Tree:
        return c if self._result is None else self._result(c)


def _rows(start: Any, x0: Tensor) -> Tree:
    """A tree of tensors with a row for each path."""
    if isinstance(start, dict):
        return {name: _rows(part, x0) for name, part in start.items()}
    if isinstance(start, tuple | list):
        return type(start)(_rows(part, x0) for part in start)
    if not isinstance(start, Tensor):
        return x0.new_full((len(x0),), number(start, "the start of a carry"))
    if start.ndim == 0 or len(start) != len(x0):
        raise ValueError(
            f"a carry starts from a tensor of a row per path, ({len(x0)}, ...), got shape {tuple(start.shape)}; for "
            "all paths alike give a number"
        )
    return start.to(x0.device)


class AbstractOfFunction(AbstractCarry):
    """A functional of one function of the path, ``f(x, t)``."""

    def __init__(self, f: Field) -> None:
        if not callable(f):
            raise TypeError(f"{type(self).__name__} takes a function of (x, t), got {kind_of(f)}")
        self._f = f

    @property
    def functions(self) -> tuple[Called, ...]:
        return (self._f,)


@final
class Integral(AbstractOfFunction):
    """``int f(X, t) dt`` from the start on, by the trapezoidal rule; ``f`` returns ``(batch, ...)``.

    Of weak order 1 on a grid of steps: the rule's own error is of second order in the mean.

    Args:
        f: the integrand, of ``(x, t)``.
    """

    def begin(self, x0: Tensor, at: Callable[[Field], Tensor]) -> Tree:
        return torch.zeros_like(at(self._f))

    def advance(self, c: Tree, step: Passage) -> Tree:
        return c + step.trapezoid(self._f)


@final
class TimeAverage(AbstractOfFunction):
    """``1/(t - t0) int f(X, t) dt`` by the trapezoidal rule, ``f`` at the start itself.

    Args:
        f: what is averaged, of ``(x, t)``, returns ``(batch, ...)``.
    """

    def begin(self, x0: Tensor, at: Callable[[Field], Tensor]) -> Tree:
        return at(self._f), x0.new_zeros(len(x0))

    def advance(self, c: Tree, step: Passage) -> Tree:
        mean, passed = c
        total = passed + step.dt.abs()
        a, b = step.ends(self._f)
        share = per_sample(step.dt.abs() / torch.where(total > 0, total, 1.0), a)
        return mean + share * (0.5 * (a + b) - mean), total

    def result(self, c: Tree) -> Tree:
        return c[0]


class AbstractExtreme(AbstractOfFunction):
    """The greatest value of a function along the path, or the least (`RunningMaximum`)."""

    _sign: float

    def __init__(self, f: Field, *, bridge: bool = True) -> None:
        super().__init__(f)
        self._bridge = bridge

    @property
    def normals(self) -> int:
        return 2 if self._bridge else 0

    def begin(self, x0: Tensor, at: Callable[[Field], Tensor]) -> Tree:
        y = at(self._f)
        if y.shape != (len(x0),):
            raise ValueError(
                f"{type(self).__name__} takes a function that returns a number for each path, ({len(x0)},), got shape "
                f"{tuple(y.shape)}; write x[:, 0] for a component"
            )
        return y

    def advance(self, c: Tree, step: Passage) -> Tree:
        a, b = step.ends(self._f)
        s = self._sign
        a, b, c = s * a, s * b, s * c
        top = torch.maximum(a, b) if step.z is None else summit(a, b, step.variance(self._f), exponential(step.z))
        return s * torch.maximum(c, top)


@final
class RunningMaximum(AbstractExtreme):
    """The greatest value of ``f(x, t)`` along the path.

    Between the ends of a step ``f`` is taken for a Brownian motion with the variance ``|g^T grad f|^2`` of its start,
    tied to its values there, and its extreme over the step is drawn from the exact law of that bridge,
    ``(a + b + sqrt((b - a)^2 + 2 v E)) / 2`` with the variance ``v`` over the step and a unit exponential ``E``. So
    extremes have weak order 1, where those of grid points alone have order 1/2, and are exact in law for a Brownian
    motion with drift. Asmussen, Glynn and Pitman 1995, Annals of Applied Probability 5, section 2; Glasserman 2003,
    section 6.4.

    Args:
        f: of ``(x, t)``, returns ``(batch,)``.
        bridge: look at grid points alone if ``False``.
    """

    _sign = 1.0


@final
class RunningMinimum(AbstractExtreme):
    """The least value of ``f(x, t)`` along the path; as `RunningMaximum`.

    Args:
        f: of ``(x, t)``, returns ``(batch,)``.
        bridge: look at grid points alone if ``False``.
    """

    _sign = -1.0


def exponential(z: Tensor) -> Tensor:
    """A unit exponential from two standard normals, ``(batch, 2)``."""
    return 0.5 * (z[:, 0].square() + z[:, 1].square())


def summit(a: Tensor, b: Tensor, variance: Tensor, e: Tensor) -> Tensor:
    """The maximum of a Brownian bridge from ``a`` to ``b`` of this variance over the step, for a unit exponential."""
    square = (b - a).square() + 2.0 * variance * e
    flat = square <= 0  # where a root has no derivative
    root = torch.where(flat, 0.0, torch.where(flat, 1.0, square).sqrt())
    return 0.5 * (a + b + root)


@final
class Occupation(AbstractOfFunction):
    """The time for which ``f(x, t) > 0``: in a step that crosses 0, the share of the chord that lies above.

    Args:
        f: the level, of ``(x, t)``, returns ``(batch,)``.
    """

    def begin(self, x0: Tensor, at: Callable[[Field], Tensor]) -> Tree:
        return torch.zeros_like(at(self._f))

    def advance(self, c: Tree, step: Passage) -> Tree:
        a, b = step.ends(self._f)
        above, size = a.clamp_min(0.0) + b.clamp_min(0.0), a.abs() + b.abs()
        share = torch.where(size > 0, above / torch.where(size > 0, size, 1.0), 0.0)
        return c + per_sample(step.dt.abs(), a) * share


@final
class Histogram(AbstractOfFunction):
    """The time that ``f(x, t)`` spends below, between and above some edges, ``(batch, edges + 1)``: a quantile sketch.

    Times add up over paths and over runs. Each step counts for where it ends.

    Args:
        f: of ``(x, t)``, returns ``(batch,)``.
        edges: increasing numbers.

    Raises:
        ValueError: no edges, or not in order.
    """

    def __init__(self, f: Field, edges: Sequence[float] | Tensor) -> None:
        super().__init__(f)
        self._edges = tuple(float(e) for e in edges)
        if not self._edges or not all(a < b for a, b in itertools.pairwise(self._edges)):
            raise ValueError(f"edges must be increasing numbers, at least one, got {short(self._edges)}")

    def begin(self, x0: Tensor, at: Callable[[Field], Tensor]) -> Tree:
        y = at(self._f)
        return torch.stack([torch.zeros_like(y)] * (len(self._edges) + 1), 1)

    def advance(self, c: Tree, step: Passage) -> Tree:
        y = step.at(self._f, (step.x_next,), (step.t_next,))
        above = [(y >= e).to(c.dtype) for e in self._edges]
        inside = [1.0 - above[0], *(a - b for a, b in itertools.pairwise(above)), above[-1]]
        return c + torch.stack([share * step.dt.abs() for share in inside], 1)

    def quantiles(self, times: Tensor, levels: Sequence[float] | Tensor) -> Tensor:
        """Quantiles at these levels in [0, 1], read off the chord within a bin.

        Args:
            times: ``(..., edges + 1)``, as carried, or added up over paths.
            levels: ``(levels,)``.

        Returns:
            ``(..., levels)``; the first or last edge for what lies beyond.
        """
        edges = torch.tensor(self._edges, dtype=torch.float64, device=times.device)
        below = times.double().cumsum(-1)
        wanted = torch.as_tensor(levels, dtype=torch.float64, device=times.device) * below[..., -1:]
        k = torch.searchsorted(below.contiguous(), wanted.contiguous()).clamp(1, max(len(self._edges) - 1, 1))
        if len(self._edges) == 1:
            return edges.expand(wanted.shape)
        low, high = below.gather(-1, k - 1), below.gather(-1, k)
        share = ((wanted - low) / (high - low).clamp_min(torch.finfo(torch.float64).tiny)).clamp(0.0, 1.0)
        return edges[k - 1] + share * (edges[k] - edges[k - 1])


@final
class Discount(AbstractOfFunction):
    """``exp(-int r(X, t) dt)`` by the trapezoidal rule: what one unit at the path's end is worth at its start.

    Args:
        f: the rate ``r(x, t)``, returns ``(batch,)``.
    """

    def begin(self, x0: Tensor, at: Callable[[Field], Tensor]) -> Tree:
        return torch.zeros_like(at(self._f))

    def advance(self, c: Tree, step: Passage) -> Tree:
        return c + step.trapezoid(self._f)

    def result(self, c: Tree) -> Tree:
        return (-c).exp()


@final
class Discounted(AbstractCarry):
    """``int exp(-int r dt) f(X, t) dt``: the value at the start of what flows along the path, by the trapezoidal rule.

    Args:
        f: the flow, of ``(x, t)``, returns ``(batch,)``.
        rate: ``r(x, t)``, returns ``(batch,)``.
    """

    def __init__(self, f: Field, rate: Field) -> None:
        self._flow, self._discount = Integral(f), Discount(rate)
        self._f = f

    @property
    def functions(self) -> tuple[Called, ...]:
        return (*self._flow.functions, *self._discount.functions)

    def begin(self, x0: Tensor, at: Callable[[Field], Tensor]) -> Tree:
        return self._flow.begin(x0, at), self._discount.begin(x0, at)

    def advance(self, c: Tree, step: Passage) -> Tree:
        value, before = c
        after = self._discount.advance(before, step)
        a, b = step.ends(self._f)
        flow = 0.5 * (self._discount.result(before) * a + self._discount.result(after) * b)
        return value + per_sample(step.dt, a) * flow, after

    def result(self, c: Tree) -> Tree:
        return c[0]


@final
class Several(AbstractCarry):
    """Functionals side by side.

    Args:
        parts: by name, or in order.
    """

    def __init__(self, parts: dict[Any, AbstractCarry]) -> None:
        self._parts = parts

    @property
    def normals(self) -> int:
        return sum(part.normals for part in self._parts.values())

    @property
    def functions(self) -> tuple[Called, ...]:
        return tuple(f for part in self._parts.values() for f in part.functions)

    def begin(self, x0: Tensor, at: Callable[[Field], Tensor]) -> Tree:
        return {name: part.begin(x0, at) for name, part in self._parts.items()}

    def advance(self, c: Tree, step: Passage) -> Tree:
        made, at = {}, 0
        for name, part in self._parts.items():
            n = part.normals
            z = None if not n or step.z is None else step.z[:, at : at + n]
            made[name], at = part.advance(c[name], dataclasses.replace(step, z=z)), at + n
        return made

    def result(self, c: Tree) -> Tree:
        made = {name: part.result(c[name]) for name, part in self._parts.items()}
        return made if any(isinstance(name, str) for name in made) else tuple(made.values())


def as_carry(given: Any) -> AbstractCarry | None:
    """What ``carry=`` of `solve` means: one functional, or a dictionary, tuple or list of them."""
    if given is None or isinstance(given, AbstractCarry):
        return given
    parts = given if isinstance(given, dict) else dict(enumerate(given)) if isinstance(given, tuple | list) else {}
    if not parts or not all(isinstance(part, AbstractCarry) for part in parts.values()):
        raise TypeError(
            f"carry must be a functional such as sds.Carry(start, update) or sds.Integral(f), or a dictionary or tuple "
            f"of them, got {short(given)}"
        )
    return Several(parts)
