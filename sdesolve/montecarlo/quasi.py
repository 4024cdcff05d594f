"""Quasi-Monte Carlo: expectations from Sobol points, scrambled several times for a standard error."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, final

import torch
from torch import Tensor

from sdesolve._internal.arguments import short, whole_number
from sdesolve._internal.sobol import POINTS
from sdesolve._internal.transforms import runs_as_it_is
from sdesolve.brownian import BrownianPath, drawn_seed
from sdesolve.integrate.solve import Backend, solve
from sdesolve.montecarlo.payoffs import Expectation, Payoff, check_one_time
from sdesolve.sde import AbstractSDE
from sdesolve.solvers.base import AbstractSolver


@final
@dataclasses.dataclass(frozen=True, repr=False)
class QuasiEstimate:
    """What `quasi_monte_carlo` returns; tensors are float64, ``(*values)``, or ``(starts, *values)`` for more than one.

    Attributes:
        estimate: of ``E payoff(X(t1))`` for the scheme's ``X``: the mean over all scramblings.
        standard_error: of it, from how much scramblings differ; that of the scheme's own bias is not in it.
        estimates: of each scrambling, ``(randomisations, ...)``.
        paths: of each.
        gain: how many independent paths one of these is worth: the variance of a payoff over all paths, over the square
            of `standard_error`.
        seed: that scramblings have theirs from.
    """

    estimate: Tensor
    standard_error: Tensor
    estimates: Tensor
    paths: int
    gain: Tensor
    seed: int

    def interval(self, level: float = 0.95) -> tuple[Tensor, Tensor]:
        """A confidence interval by Student's law of ``randomisations - 1`` degrees of freedom.

        Raises:
            ValueError: ``level`` is not within (0, 1).
        """
        if not 0.0 < level < 1.0:
            raise ValueError(f"level must be within (0, 1), got {short(level)}")
        from scipy.special import stdtrit  # not with the package: importing scipy takes longer than the rest

        reach = float(stdtrit(len(self.estimates) - 1, 0.5 + 0.5 * level)) * self.standard_error
        return self.estimate - reach, self.estimate + reach

    def __repr__(self) -> str:
        values = [f"{v:.7g}" for v in self.estimate.flatten()[:4].tolist()]
        more = ", ..." if self.estimate.numel() > 4 else ""
        value = values[0] if self.estimate.numel() == 1 else f"[{', '.join(values)}{more}]"
        error, gain = float(self.standard_error.max()), float(self.gain.min())
        made = f"{len(self.estimates)} scramblings of {self.paths} paths"
        return f"QuasiEstimate({value} +- {error:.2g}, {made}, each worth {gain:.3g} independent ones)"


@runs_as_it_is
def quasi_monte_carlo(
    sde: AbstractSDE,
    x0: Tensor,
    t0: float,
    t1: float,
    payoff: Payoff,
    *,
    steps: int,
    solver: AbstractSolver,
    paths: int = 1024,
    randomisations: int = 16,
    seed: int | None = None,
    carry: Any = None,
    backend: Backend = "auto",
) -> QuasiEstimate:
    """``E payoff(X(t1))`` by randomised quasi-Monte Carlo, for the ``X`` of a scheme on equal steps.

    Each of several independent scramblings of a Sobol sequence drives ``paths`` paths, in the order of a Brownian
    bridge (``BrownianPath(seed, kind="sobol")``). Their means are independent, and right on average, so that their
    spread gives a standard error; for payoffs that vary little beyond the first dimensions it falls nearly as
    ``1 / paths`` and not as its root. L'Ecuyer and Lemieux 2002, "Recent advances in randomized quasi-Monte Carlo
    methods"; Glasserman 2004, "Monte Carlo Methods in Financial Engineering", chapter 5.
    The bias of the scheme stays: compare with twice the steps, or take `multilevel`.

    Args:
        sde: the equation.
        x0: ``(starts, *state)``, float32 or float64: an estimate for each start, all with the same paths.
        t0: start time.
        t1: end time, on either side of ``t0``.
        payoff: of the states at ``t1``, ``(paths, *state)``; its value for each path, ``(paths,)`` or
            ``(paths, *values)``. With ``carry``, ``payoff(x1, carry)`` of what that has become too.
        steps: number of equal steps.
        solver: the scheme.
        paths: of each scrambling, a power of 2.
        randomisations: scramblings, at least 2; a confidence interval takes 8 or more to be narrow.
        seed: that scramblings have theirs from; drawn from torch's default generator if left out.
        carry: a functional that is carried along each path, as for `solve`.
        backend: as for `solve`.

    Raises:
        TypeError, ValueError: bad arguments, as for `solve`; a payoff that is no function of each path alone, or that
            is not finite.
        DivergenceError: a path became nan or inf.

    Example:
        >>> price = sds.quasi_monte_carlo(
        ...     sde, x0, 0.0, 1.0, call, steps=64, solver=sds.EulerMaruyama(), paths=4096, seed=0
        ... )
        >>> price.estimate, price.standard_error, price.gain
    """
    expectation = Expectation(sde, x0, payoff)
    for name, time in (("t0", t0), ("t1", t1)):
        check_one_time(time, name)
    paths, randomisations = whole_number(paths, "paths", 1), whole_number(randomisations, "randomisations", 2)
    if paths & (paths - 1) or paths > POINTS:
        near = min(POINTS, 1 << max(0, round(math.log2(paths))))
        raise ValueError(f"paths must be a power of 2, in which Sobol points are balanced, got {paths}; take {near}")
    path = BrownianPath(drawn_seed() if seed is None else seed)
    means, first, second = [], torch.zeros(()), torch.zeros(())
    with torch.no_grad():
        for r in range(randomisations):
            scrambled, total = path.scrambled(r), torch.zeros(())
            for begin in range(0, paths, expectation.most):
                n = min(expectation.most, paths - begin)
                noise = dataclasses.replace(scrambled, first_path=begin, repeat=n if expectation.starts > 1 else None)
                solution = solve(
                    sde, expectation.rows(n), t0, t1, steps, solver=solver, noise=noise, carry=carry, backend=backend
                )
                P = expectation.of(solution, n, f"paths {begin} to {begin + n - 1} of scrambling {r}")
                total, first, second = total + P.sum(0), first + P.sum(0), second + P.square().sum(0)
            means.append(expectation.shaped(total / paths))
    estimates = torch.stack(means)
    error = estimates.std(0) / math.sqrt(randomisations)
    n = paths * randomisations
    spread = expectation.shaped((second - first * first / n) / (n - 1)).clamp(min=0.0)
    gain = spread / (n * error.square())
    return QuasiEstimate(estimates.mean(0), error, estimates, paths, gain, path.seed)
