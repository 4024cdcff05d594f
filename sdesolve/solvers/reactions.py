"""Solvers of networks of reactions: exact, and in leaps."""

from __future__ import annotations

import math
from typing import final

from sdesolve._internal.arguments import flag, number, whole_number
from sdesolve.jumps import Reactions
from sdesolve.sde import Noise
from sdesolve.solvers.base import AbstractSolver, supports


class AbstractReacting(AbstractSolver):
    """A solver of `Reactions`. Its step goes over one interval of the grid, at whose ends states are known."""

    supported = supports(ito=(Noise.GENERAL,))
    equations = (Reactions,)
    ode_order = None
    max_steps: int


@final
class Gillespie(AbstractReacting):
    """Exact simulation of `Reactions`, one after another: the direct method of Gillespie 1977.

    The grid only says where states are kept: paths are the same on any other (to the rounding of reaction times), as
    event ``n`` of a path is a function of ``(seed, path, n)``. Propensities that depend on time themselves are held
    constant from one reaction, or grid point, to the next. On a CPU all reactions are one generated kernel, unless
    ``carry=``, ``until=`` or ``at=`` is given.

    Args:
        max_steps: reactions that a path may have in a step of the grid before `solve` gives up.
    """

    strong_order = None
    weak_order = None
    evaluations = 1

    def __init__(self, max_steps: int = 1_000_000) -> None:
        self.max_steps = whole_number(max_steps, "max_steps", 1)


@final
class TauLeap(AbstractReacting):
    r"""Tau leaping, ``x' = x + nu P(a(x) tau)`` with Poisson counts ``P`` of each reaction: weak order 1.

    Leaps are steps of the grid, or with ``epsilon`` parts of them: no longer than

        min_i min( m_i / |mu_i|, m_i^2 / sigma_i^2 ),   m_i = max(epsilon x_i / 2, 1),

    with mean and variance per time ``mu = nu a`` and ``sigma^2 = nu^2 a``, so that propensities of reactions up to
    second order change by about ``epsilon``. Cao, Gillespie and Petzold 2006, Journal of Chemical Physics 124, with
    ``g_i = 2``.

    **No count becomes negative.** A leap in which one could is halved, given its counts (Poisson bridges: each event
    falls into either half, so the counts of a half are binomial; Anderson 2008, Journal of Chemical Physics 128), until
    the first reaction is found that would leave fewer than none of a species. The leap ends there, without that
    reaction, and propensities are evaluated anew. Its time is one that the path has reached without a look beyond, so
    that nothing that was drawn is thrown away with prejudice: means stay those of the leaps.

    Counts are quantiles of 64-bit numbers, functions of ``(seed, path, step of the grid, reaction)`` and monotone in
    them: runs of one seed have common random numbers.

    Args:
        epsilon: how much of a propensity a leap may change, in (0, 1); ``None`` for leaps of whole steps.
        midpoint: rates at ``x + nu a(x) tau / 2`` in place of ``x``: the error is of second order for large counts.
            Gillespie 2001, Journal of Chemical Physics 115.
        max_steps: leaps that a path may take in a step of the grid before `solve` gives up.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: ``epsilon`` out of (0, 1).
    """

    strong_order = None
    weak_order = 1.0

    def __init__(self, epsilon: float | None = None, *, midpoint: bool = False, max_steps: int = 100_000) -> None:
        self.epsilon = None if epsilon is None else number(epsilon, "epsilon")
        if self.epsilon is not None and not (0.0 < self.epsilon < 1.0 and math.isfinite(self.epsilon)):
            raise ValueError(f"epsilon must be between 0 and 1, such as 0.03, got {epsilon}")
        self.midpoint, self.max_steps = flag(midpoint, "midpoint"), whole_number(max_steps, "max_steps", 1)

    @property
    def evaluations(self) -> int:
        return 2 if self.midpoint else 1
