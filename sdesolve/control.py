"""Controls: data in place of Brownian motion, for ``dX = f dt + F(X) dY`` along a path ``Y`` that is given."""

from __future__ import annotations

from typing import ClassVar, Literal, final, get_args

import torch
from torch import Tensor

from sdesolve._internal.arguments import kind_of, real, short
from sdesolve.brownian import AbstractNoise, Part

Interpolation = Literal["linear", "hermite"]


@final
class ControlPath(AbstractNoise):
    r"""A path through given values, as what drives an equation: ``solve(sde, ..., noise=ControlPath(values, times))``.

    The solution is that of the controlled equation ``dX = f(X, t) dt + g(X, t) dY``, an ordinary one since ``Y`` has
    bounded variation, so that both calculi mean the same: `EulerMaruyama` converges to it with order 1, and schemes of
    Stratonovich calculus with the order that they have for ODEs, as long as grid points fall on the kinks of a linear
    path. Nothing is random. Increments are exact differences of ``Y``, and space-time areas ``H`` its exact integrals,
    so schemes that ask for them get those of the data. A neural controlled equation is one whose ``g`` is a network
    (Kidger et al. 2020).

    Integrations are eager, with gradients to ``values``. Adaptive solvers, and saved times between grid points, need a
    `BrownianPath`; put such times on the grid.

    Args:
        values: ``(times, *channels)`` for all rows, or ``(batch, times, *channels)``; ``channels`` are those of the
            noise of the equation, ``(m,)`` for general noise, the state's shape for diagonal noise, ``(1,)`` for
            scalar noise.
        times: of the values, increasing, ``(times,)``.
        interpolation: ``"linear"``, or ``"hermite"``: cubic, once differentiable, by backward differences, so that
            ``Y`` up to a time depends on no later value (Morrill et al. 2021, section 3).

    Raises:
        TypeError: ``values`` is no floating-point tensor.
        ValueError: times do not increase, are not as many as values, or are fewer than two; values that are not finite.
    """

    timeless: ClassVar[bool] = False

    def __init__(self, values: Tensor, times: Tensor, *, interpolation: Interpolation = "linear") -> None:
        if not isinstance(values, Tensor) or not values.is_floating_point():
            raise TypeError(f"values must be a floating-point tensor, got {kind_of(values)}")
        if interpolation not in get_args(Interpolation):
            raise ValueError(f"interpolation must be 'linear' or 'hermite', got {short(interpolation)}")
        points = real(times, "times")
        if points.ndim != 1 or len(points) < 2 or not bool((points.diff() > 0).all()):
            raise ValueError(f"times must be (times,), at least two, and increase; got {short(times)}")
        axes = [axis for axis in (0, 1) if values.ndim > axis + 1 and values.shape[axis] == len(points)]
        if not axes:
            raise ValueError(
                f"values must be (times, *channels) or (batch, times, *channels) with {len(points)} times, got shape "
                f"{tuple(values.shape)}"
            )
        if not bool(values.isfinite().all()):
            raise ValueError("values must be finite; fill what is missing, or leave its times out")
        self._given, self.times, self.interpolation = values, points, interpolation
        self._axes = axes

    def __repr__(self) -> str:
        return f"ControlPath({short(self._given)}, {len(self.times)} times, {self.interpolation})"

    @property
    def provides(self) -> frozenset[str]:
        return frozenset({"W", "H"})

    def increments(
        self,
        times: Tensor,
        shape: tuple[int, ...],
        *,
        step: int = 0,
        of: Part = "W",
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> Tensor:
        values = self._values(shape)
        if times.ndim == 2 and times.shape[1] != shape[0]:
            raise ValueError(f"times are for {times.shape[1]} rows, and there are {shape[0]}")
        low, high = float(self.times[0]), float(self.times[-1])
        slack = 1e-9 * (high - low)
        if times.numel() and not (low - slack <= float(times.min()) and float(times.max()) <= high + slack):
            raise ValueError(
                f"the control has values from {low:g} to {high:g}, and the grid goes from {float(times.min()):g} to "
                f"{float(times.max()):g}; give values for all of it"
            )
        rows = times if times.ndim == 2 else times[:, None]
        where = torch.searchsorted(self.times, rows.contiguous(), right=True).sub(1).clamp(0, len(self.times) - 2)
        coefficients = [self._at(c, where) for c in self._polynomials(values)]
        s = self._broadcast(rows - self.times[where], values)
        a, b, c, d = coefficients
        y = a + s * (b + s * (c + s * d))
        if of == "W":
            found = y.diff(dim=0)
        else:
            dt = self._broadcast(rows.diff(dim=0), values)
            start = self._at(self._integrals(values), where)
            area = (start + s * (a + s * (b / 2 + s * (c / 3 + s * d / 4)))).diff(dim=0)
            found = torch.where(dt == 0, 0.0, area / torch.where(dt == 0, 1.0, dt) - 0.5 * (y[1:] + y[:-1]))
        return found.expand(len(times) - 1, *shape).to(dtype=dtype, device=device)

    def _values(self, shape: tuple[int, ...]) -> Tensor:
        """``(times, batch or 1, *channels)`` in float64 on the host, where the grid is."""
        given, channels = self._given, tuple(shape[1:])
        for axis in self._axes:
            rest = tuple(given.shape[axis + 1 :])
            if rest == channels or (not channels and rest == (1,)):
                values = given if axis == 1 else given[None]
                if values.shape[0] not in (1, shape[0]):
                    raise ValueError(f"values has {values.shape[0]} rows, and x0 has {shape[0]}")
                return values.reshape(*values.shape[:2], *channels).transpose(0, 1).to("cpu", torch.float64)
        raise ValueError(
            f"the noise of this equation has channels {channels}, and values {tuple(given.shape)} with "
            f"{len(self.times)} times do not; they must be (times, *channels) or (batch, times, *channels)"
        )

    def _broadcast(self, rows: Tensor, values: Tensor) -> Tensor:
        return rows.reshape(*rows.shape, *[1] * (values.ndim - 2))

    def _at(self, per_interval: Tensor, where: Tensor) -> Tensor:
        """The rows of intervals, ``(grid, batch or 1, *channels)``."""
        if where.shape[1] == 1:
            return per_interval[where[:, 0]]
        if per_interval.shape[1] == 1:
            return per_interval[where, 0]
        return per_interval[where, torch.arange(where.shape[1], device="cpu")]

    def _polynomials(self, values: Tensor) -> tuple[Tensor, ...]:
        """Coefficients on each interval: ``a + b s + c s^2 + d s^3`` for a time ``s`` after its beginning."""
        h = self._broadcast(self.times.diff()[:, None], values)
        slope = values.diff(dim=0) / h
        zero = torch.zeros_like(slope)
        if self.interpolation == "linear":
            return values[:-1], slope, zero, zero
        before = torch.cat([slope[:1], slope[:-1]])
        # derivatives `before` and `slope` at the ends, whose chord is `slope`
        return values[:-1], before, 2 * (slope - before) / h, (before - slope) / h.square()

    def _integrals(self, values: Tensor) -> Tensor:
        """The integral of the path up to the beginning of each interval."""
        a, b, c, d = self._polynomials(values)
        h = self._broadcast(self.times.diff()[:, None], values)
        whole = h * (a + h * (b / 2 + h * (c / 3 + h * d / 4)))
        return torch.cat([torch.zeros_like(whole[:1]), whole.cumsum(0)[:-1]])
