"""Where paths stop, and where they are turned back: boundaries given by level functions."""

from __future__ import annotations

from typing import Any, final

from sdesolve._internal.arguments import flag, kind_of, short
from sdesolve.sde import Field


class AbstractBoundary:
    """The set where ``level(x, t) = 0``.

    Attributes:
        level: of ``(x, t)``, returns ``(batch,)``.
        bridge: whether paths may meet it between the grid points too.
    """

    def __init__(self, level: Field, bridge: bool) -> None:
        if not callable(level):
            raise TypeError(f"level must be a function of (x, t), got {kind_of(level)}")
        self.level, self.bridge = level, flag(bridge, "bridge")

    def __repr__(self) -> str:
        return f"{type(self).__name__}({short(self.level)}, bridge={self.bridge})"


@final
class Crossing(AbstractBoundary):
    r"""Stops each path where ``level(x, t)`` first passes through 0 (``until=`` of `solve`).

    Between the ends of a step, at levels ``a`` and ``b``, the level is taken for a Brownian motion with the variance
    ``v = |g^T grad level|^2 dt`` of its start, tied to both. It has passed through 0 in between with probability
    ``exp(-2 a b / v)``; when it did is drawn from the law of the bridge's first passage, an inverse Gaussian one; and
    where, from the chord there, moved along ``g g^T grad level`` onto the boundary. So stopping has weak order 1, where
    a look at grid points alone has order 1/2, and a Brownian motion with drift is stopped exactly in law. Gobet 2000,
    Stochastic Processes and their Applications 87, section 2; Michael, Schucany and Haas 1976 for the time. Without
    noise in the level (an ODE, a position in Langevin dynamics) it is interpolated, with an error of second order.

    Which step a path stops in, and where within it, counts as a constant in gradients.

    Args:
        level: of ``(x, t)``, returns ``(batch,)``, smooth in ``x``. It decides on which side of the boundary a path is;
            every path has to start away from 0, on the side that it can leave.
        direction: -1 stops paths where the level falls through 0, 1 where it rises, 0 in either direction.
        bridge: look at grid points alone if ``False``: a path then stops at the first one that lies beyond.

    Raises:
        TypeError: ``level`` is no function.
        ValueError: another direction.
    """

    def __init__(self, level: Field, direction: int = 0, *, bridge: bool = True) -> None:
        super().__init__(level, bridge)
        if isinstance(direction, bool) or direction not in (-1, 0, 1):
            raise ValueError(f"direction must be -1, 0 or 1, got {short(direction)}")
        self.direction = int(direction)


@final
class Reflection(AbstractBoundary):
    """Keeps each path where ``level(x, t) >= 0``: pushes it back along the level's gradient as far as it would leave.

    The state after a step is moved by ``n max(-m, 0) / |n|^2``, ``n = grad level``, with the least level ``m`` of the
    free step: drawn from the Brownian bridge between its ends, or that of its ends alone. A Brownian motion with drift
    is reflected exactly in law (Skorokhod's map); in general of weak order 1, without the bridge 1/2. Gobet 2001, ESAIM
    Probability and Statistics 5.

    Args:
        level: of ``(x, t)``, returns ``(batch,)``, smooth in ``x``; no path may start where it is negative.
        bridge: look at grid points alone if ``False``.
    """

    def __init__(self, level: Field, *, bridge: bool = True) -> None:
        super().__init__(level, bridge)


def as_boundaries(given: Any) -> tuple[AbstractBoundary, ...]:
    """What ``until=`` of `solve` means: one boundary, or several."""
    several = () if given is None else tuple(given) if isinstance(given, tuple | list) else (given,)
    for one in several:
        if not isinstance(one, AbstractBoundary):
            raise TypeError(
                f"until must be sds.Crossing(level), sds.Reflection(level), or a list of them, got {short(one)}"
            )
    return several
