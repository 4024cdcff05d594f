"""Multilevel Monte Carlo: expectations from many coarse paths and few fine ones, coupled by their Brownian motion."""

from __future__ import annotations

import dataclasses
import functools
import math
import warnings
from collections.abc import Callable
from typing import Any, final

import torch
from torch import Tensor

from sdesolve._internal.arguments import flag, number, real, short, whole_number
from sdesolve._internal.transforms import runs_as_it_is
from sdesolve.brownian import BrownianPath, drawn_seed
from sdesolve.integrate.checks import check_pair
from sdesolve.integrate.solution import DivergenceError, Solution
from sdesolve.integrate.solve import Backend, solve
from sdesolve.montecarlo.payoffs import Expectation, Payoff, check_one_time
from sdesolve.sde import AbstractSDE, Calculus, Noise
from sdesolve.solvers.base import AbstractSolver
from sdesolve.solvers.derivative_free import SRI2
from sdesolve.solvers.heun import Heun
from sdesolve.solvers.milstein import Milstein
from sdesolve.solvers.shark import ShARK

_PILOT = 1024  # paths that every level starts with
_OF_BIAS = 0.25  # the share of the mean square error that is left to the bias
_PATHS_OF_A_LEVEL = 1 << 40
_MOST_FIRST, _MOST_STEPS = 1 << 14, 1 << 20  # steps of the coarsest level, and of the finest
_PAYING = 1 << 8  # steps of the coarsest level up to which fewer are tried


@final
@dataclasses.dataclass(frozen=True)
class Level:
    """One level of a `MultilevelEstimate`; tensors have the shape of the estimate.

    Attributes:
        steps: of its fine paths.
        paths: that were taken.
        mean: of the corrections ``P_l - P_(l-1)``; of ``P_0`` on the coarsest level.
        variance: of a correction.
        kurtosis: of the corrections; where it is large, as for discontinuous payoffs, their variance is uncertain.
        cost: steps of one path and what it is coupled with.
        consistency: ``|E P_l - E P_(l-1) - E(P_l - P_(l-1))|`` over three times what its standard deviation may be; is
            above 1 in less than 0.3% of cases, if coarse paths are what fine paths of the level before are.
    """

    steps: int
    paths: int
    mean: Tensor
    variance: Tensor
    kurtosis: Tensor
    cost: int
    consistency: Tensor


@final
@dataclasses.dataclass(frozen=True, repr=False)
class MultilevelEstimate:
    """What `multilevel` returns; tensors are float64, ``(*values)`` for one start and ``(starts, *values)`` for more.

    Attributes:
        estimate: of ``E payoff(X(t1))``.
        standard_error: of the estimate, which is that of chance alone.
        bias: how far its mean is from the expectation, as far as the last three levels tell.
        rmse: what was asked for.
        levels: from the coarsest to the finest.
        weak_rate: ``a`` such that means of corrections fall as ``steps^-a``, which the bias is reckoned with.
        variance_rate: ``b`` such that their variances fall as ``steps^-b``; nan with fewer than two of them.
        converged: whether ``bias^2 + standard_error^2`` is within ``rmse^2``.
        reason: why not, if it is not.
        work: steps taken by all paths.
        solver: the scheme.
        seed: of the noise.
    """

    estimate: Tensor
    standard_error: Tensor
    bias: Tensor
    rmse: Tensor
    levels: tuple[Level, ...]
    weak_rate: Tensor
    variance_rate: Tensor
    converged: bool
    reason: str
    work: int
    solver: AbstractSolver
    seed: int

    @property
    def error(self) -> Tensor:
        """The root mean square error, as estimated: of bias and chance together."""
        return (self.bias.square() + self.standard_error.square()).sqrt()

    def __repr__(self) -> str:
        one = self.estimate.numel() == 1

        def worst(values: Tensor) -> float:
            return float(values.nan_to_num(0.0).abs().max())

        value = f"{float(self.estimate):.7g}" if one else f"{short(self.estimate.flatten()[:4].tolist())}"
        head = f"MultilevelEstimate({value} +- {worst(self.standard_error):.2g}, bias {worst(self.bias):.2g}"
        rates = f"rates: weak {float(self.weak_rate.min()):.2f}, variance {float(self.variance_rate.min()):.2f}"
        lines = [f"{head}, {self.work:.3g} path-steps of {self.solver!r}, {rates})"]
        if not one:
            lines.append(f"shape {tuple(self.estimate.shape)}; below, the largest of each column")
        lines.append(f"{'steps':>8} {'paths':>12} {'mean':>11} {'variance':>11} {'kurtosis':>9} {'check':>6}")
        for level in self.levels:
            mean, variance = (f"{worst(v):>11.3e}" for v in (level.mean, level.variance))
            mean = f"{float(level.mean):>11.3e}" if one else mean
            last = f"{worst(level.kurtosis):>9.1f} {worst(level.consistency):>6.2f}"
            lines.append(f"{level.steps:>8} {level.paths:>12} {mean} {variance} {last}")
        if not self.converged:
            lines.append(f"not converged: {self.reason}")
        return "\n".join(lines)


@final
class _Sums:
    """Sums over the paths of one level: of fine values, and of powers of corrections about their first mean."""

    def __init__(self, steps: int, cost: int) -> None:
        self.steps, self.cost, self.paths = steps, cost, 0
        self._shift = self._powers = self._fine_shift = self._fine_powers = torch.zeros(())

    def add(self, fine: Tensor, correction: Tensor) -> None:
        if self.paths == 0:
            self._shift, self._fine_shift = correction.mean(0), fine.mean(0)
            self._powers = self._fine_powers = torch.zeros((), dtype=torch.float64, device=fine.device)
        self.paths += len(fine)
        d, f = correction - self._shift, fine - self._fine_shift
        self._powers = self._powers + torch.stack([(d**p).sum(0) for p in (1, 2, 3, 4)])
        self._fine_powers = self._fine_powers + torch.stack([(f**p).sum(0) for p in (1, 2)])

    @property
    def mean(self) -> Tensor:
        return self._shift + self._powers[0] / self.paths

    @property
    def variance(self) -> Tensor:
        return self._variance(self._powers)

    @property
    def fine_mean(self) -> Tensor:
        return self._fine_shift + self._fine_powers[0] / self.paths

    @property
    def fine_variance(self) -> Tensor:
        return self._variance(self._fine_powers)

    def _variance(self, powers: Tensor) -> Tensor:
        return ((powers[1] - powers[0] ** 2 / self.paths) / (self.paths - 1)).clamp(min=0.0)

    @property
    def kurtosis(self) -> Tensor:
        a, b, c, d = self._powers / self.paths
        second = b - a * a
        return (d - 4 * a * c + 6 * a * a * b - 3 * a**4) / (second * second)

    @property
    def heaviness(self) -> Tensor:
        """The standard error of the variance, as a part of it."""
        return ((self.kurtosis.nan_to_num(1.0) - 1.0).clamp(min=0.0) / self.paths).sqrt()


@runs_as_it_is
def multilevel(
    sde: AbstractSDE,
    x0: Tensor,
    t0: float,
    t1: float,
    payoff: Payoff,
    *,
    rmse: float | Tensor,
    solver: AbstractSolver | None = None,
    antithetic: bool | None = None,
    steps: int | None = None,
    seed: int | None = None,
    carry: Any = None,
    max_work: float = 2.0**35,
    backend: Backend = "auto",
) -> MultilevelEstimate:
    r"""``E payoff(X(t1))`` to a root mean square error, by multilevel Monte Carlo.

    ``E P_L = E P_0 + sum_l E(P_l - P_(l-1))``, where ``P_l`` is the payoff by a scheme of ``steps 2^l`` steps. Both
    terms of a correction are driven by one Brownian path: the coarse increments are the exact sums of the fine ones
    (``substeps=2``), with their space-time and Levy areas where a solver reads those. So corrections have small
    variances, and each level gets the paths that make the whole work the least, ``N_l ~ sqrt(V_l / C_l)``; levels are
    added until the bias that the last three show is below half of ``rmse``. Where variances of corrections fall faster
    than the cost of a path grows, the work is proportional to ``rmse^-2``, that of exact simulation. Giles 2008,
    Operations Research 56; Giles 2015, Acta Numerica 24, section 3.

    With noise that does not commute, a scheme without Levy areas has corrections of variance ``O(h)`` only. The
    antithetic estimator takes the mean of two fine paths, the second with every pair of increments in the opposite
    order (`BrownianPath.with_swapped_pairs`), which cancels the areas: variance ``O(h^2)`` for smooth payoffs,
    ``O(h^(3/2))`` for payoffs with a kink. Giles and Szpruch 2014, Annals of Applied Probability 24.

    Runs are fused where `solve` fuses them, and go in blocks of paths, so that memory does not grow with their number.
    The number of paths depends on results, not on how long they took: the same call gives the same estimate.

    Args:
        sde: the equation, of any noise and calculus.
        x0: ``(starts, *state)``, float32 or float64: an estimate for each start, all with the same paths.
        t0: start time.
        t1: end time, on either side of ``t0``.
        payoff: of the states at ``t1``, ``(paths, *state)``; its value for each path, ``(paths,)`` or
            ``(paths, *values)``. With ``carry``, ``payoff(x1, carry)`` of what that has become too.
        rmse: the root mean square error that is wanted, a number, or one for each value.
        solver: the scheme; by default `ShARK` for additive noise, `Milstein` for diagonal and scalar noise,
            ``Milstein(area="zero")`` for general Ito noise, `Heun` for general Stratonovich noise. Where Milstein's
            scheme breaks off, as at a root whose derivative is infinite, `SRI2` takes its place, which needs none.
        antithetic: whether to take twins; by default where the noise is general, the scheme reads increments alone, and
            has a higher strong order where noise commutes. They are of no use to others.
        steps: of the coarsest level; by default 1, and then twice as many while a coarser level does not pay.
        seed: of the noise; drawn from torch's default generator if left out.
        carry: a functional that is carried along each path, as for `solve`: `TimeAverage`, `Integral`, or one's own.
            Those that draw within steps, as `RunningMaximum` does, draw again on each level, which leaves corrections
            of variance ``O(h)``.
        max_work: steps of all paths together beyond which no more are taken.
        backend: as for `solve`.

    Returns:
        A `MultilevelEstimate`. If it did not reach ``rmse``, a warning says why: it would take more than ``max_work``,
        or levels do not decay.

    Raises:
        TypeError, ValueError: bad arguments, as for `solve`; a payoff that is no function of each path alone, or that
            is not finite; an ``rmse`` that the dtype of ``x0`` does not resolve.
        DivergenceError: a path became nan or inf.

    Example:
        >>> price = sds.multilevel(sde, x0, 0.0, 1.0, lambda x: (x[:, 0] - 1).clamp(min=0), rmse=1e-3, seed=0)
        >>> price.estimate, price.standard_error, price.levels
    """
    expectation = Expectation(sde, x0, payoff)
    for name, time in (("t0", t0), ("t1", t1)):
        check_one_time(time, name)
    target = real(rmse, "rmse")
    if not bool((target > 0).all()):
        raise ValueError(f"rmse must be positive, got {short(rmse)}")
    if not (most := number(max_work, "max_work")) > 0:
        raise ValueError(f"max_work must be positive, got {short(max_work)}")
    solvers = _solvers_for(sde) if solver is None else (solver,)
    check_pair(solvers[0], sde)
    if solvers[0].weak_order is None or solvers[0].controller is not None:
        raise ValueError(f"multilevel takes a scheme of fixed steps for SDEs, and {type(solver).__name__} is none")
    twins = _lacks_areas(solvers[0], sde) if antithetic is None else flag(antithetic, "antithetic")
    first = None if steps is None else whole_number(steps, "steps", 1)
    path = BrownianPath(drawn_seed() if seed is None else seed)
    run = functools.partial(solve, sde, t0=t0, t1=t1, carry=carry, backend=backend)
    with torch.no_grad():
        for chosen in solvers:
            levels = _Levels(expectation, run, chosen, path, twins)
            try:
                levels.begin(first, most)
                estimate = levels.refined(target, most)
                break
            except DivergenceError:
                if chosen is solvers[-1]:
                    raise
    if not estimate.converged:
        warnings.warn(f"multilevel has not reached rmse: {estimate.reason}", RuntimeWarning, stacklevel=3)
    return estimate


def _solvers_for(sde: AbstractSDE) -> tuple[AbstractSolver, ...]:
    """Schemes to try, one after another where the one before meets a state without a derivative."""
    if not isinstance(sde, AbstractSDE) or sde.noise is Noise.ADDITIVE:  # the first is refused by name
        return (ShARK(),)
    if sde.noise is not Noise.GENERAL:
        return Milstein(), SRI2()
    return (Milstein("zero"), SRI2("zero")) if sde.calculus is Calculus.ITO else (Heun(),)


def _lacks_areas(solver: AbstractSolver, sde: AbstractSDE) -> bool:
    """Whether Levy areas alone keep the scheme from a higher strong order, and it reads nothing else that has a sign.

    Space-time areas tell a part of the Levy area, which changes its sign where increments change places.
    """
    _, commuting, general = solver.strong_orders
    lower = commuting is not None and general is not None and general < commuting
    return sde.noise is Noise.GENERAL and lower and tuple(solver.needs) == ("W",)


@final
class _Levels:
    """The levels of an estimate, from the coarsest on.

    Args:
        expectation: what is estimated.
        run: `solve` of the equation.
        solver: the scheme.
        path: the noise; level ``l`` takes its paths from ``2^40 l`` on.
        twins: whether the estimator is antithetic.
    """

    def __init__(
        self,
        expectation: Expectation,
        run: Callable[..., Solution],
        solver: AbstractSolver,
        path: BrownianPath,
        twins: bool,
    ) -> None:
        assert solver.weak_order is not None
        self._expectation, self._run, self._path, self._twins = expectation, run, path, twins
        self._solver, self._order, self._levels, self.work = solver, solver.weak_order, list[_Sums](), 0

    def begin(self, steps: int | None, most: float) -> None:
        """Takes the first paths of three levels, the coarsest of so many steps, or of as many as pay."""
        first = steps or 1
        while True:
            self._levels.clear()
            try:
                for _ in range(3):
                    self._add_level(first)
            except DivergenceError as diverged:
                if steps is not None or 2 * first > _MOST_FIRST or self.work > most:
                    diverged.add_note(f"The coarsest level has {first} steps; multilevel(..., steps=) takes more.")
                    raise
            else:
                if steps is not None or 2 * first > _PAYING or self.work > most or self._coarsest_pays():
                    return
            first *= 2

    def _coarsest_pays(self) -> bool:
        """Whether two levels take less work for a given variance than the finer of them alone."""
        a, b = self._levels[:2]
        both = (a.variance * a.cost).sqrt() + (b.variance * b.cost).sqrt()
        return not float((both / (b.fine_variance * b.steps).sqrt()).nanmean()) >= 1.0

    def refined(self, rmse: Tensor, most: float) -> MultilevelEstimate:
        """Takes paths and adds levels until the estimate is as good as wanted, or cannot be."""
        shape = self._expectation.shaped(self._levels[0].mean).shape
        try:
            target = rmse.expand(shape).to(self._levels[0].mean.device).reshape(-1)
        except RuntimeError:
            raise ValueError(
                f"rmse must be a number or one for each value, {tuple(shape)}, got shape {tuple(rmse.shape)}"
            ) from None
        self._check_resolved(target)
        reason = ""
        while not reason:
            reason = self._does_not_decay()
            wanted = self._paths_for(target)
            counts = zip(wanted, (level.paths for level in self._levels), strict=True)
            more = [n - paths if n > 1.01 * paths and not reason else 0 for n, paths in counts]
            cost = sum(n * level.cost for n, level in zip(more, self._levels, strict=True)) * self._expectation.starts
            if self.work + cost > most:
                reason = f"it would take {self.work + cost:.2g} path-steps, and max_work={most:.2g} are allowed"
                share = max(0.0, most - self.work) / cost
                more = [int(n * share) // self._least * self._least for n in more]
            for level, n in enumerate(more):
                self._take(level, n)
            if cost or reason:
                continue
            if bool((self._bias() <= _OF_BIAS**0.5 * target).all()):
                break
            reason = self._cannot_go_on(most)
            if not reason:
                self._add_level(self._levels[0].steps)
        return self._estimate(target, shape, reason)

    @property
    def _least(self) -> int:
        return min(_PILOT, self._expectation.most)

    def _add_level(self, first: int) -> None:
        l = len(self._levels)  # noqa: E741
        fine = first << l
        self._levels.append(_Sums(fine, fine * (1 + self._twins) + fine // 2 if l else fine))
        self._take(l, self._least)

    def _take(self, level: int, paths: int) -> None:
        """At least so many paths more. Blocks have few sizes: a kernel is compared with torch for each."""
        expectation, sums = self._expectation, self._levels[level]
        while paths > 0:
            n = min(expectation.most, max(self._least, 1 << (paths.bit_length() - 1)))
            first = self._path.first_path + _PATHS_OF_A_LEVEL * level + sums.paths
            path = dataclasses.replace(self._path, first_path=first, repeat=n if expectation.starts > 1 else None)
            sums.add(*self._values(level, path, n))
            self.work += n * expectation.starts * sums.cost
            paths -= n

    def _values(self, level: int, path: BrownianPath, n: int) -> tuple[Tensor, Tensor]:
        """Fine payoffs of ``n`` paths, and their corrections."""
        expectation, steps = self._expectation, self._levels[level].steps
        x0 = expectation.rows(n)

        def payoff(noise: BrownianPath, steps: int) -> Tensor:
            solution = self._run(solver=self._solver, x0=x0, steps=steps, noise=noise)
            return expectation.of(
                solution, n, f"a block of {n} paths from number {path.first_path} on, with {steps} steps"
            )

        fine = payoff(path, steps)
        if level == 0:
            return fine, fine
        if self._twins:
            fine = 0.5 * (fine + payoff(path.with_swapped_pairs(), steps))
        return fine, fine - payoff(dataclasses.replace(path, substeps=2), steps // 2)

    def _check_resolved(self, target: Tensor) -> None:
        """Refuses an error below what the dtype of the state rounds away."""
        expectation, n = self._expectation, min(64, self._least)
        first = self._run(solver=self._solver, x0=expectation.rows(n), steps=self._levels[0].steps, noise=self._path)
        limit = expectation.resolution(first, n)
        if bool((target < limit).any()):
            worst = int((limit / target).argmax())
            dtype = str(expectation.x0.dtype).removeprefix("torch.")
            wider = "; give x0 in float64" if expectation.x0.dtype == torch.float32 else ""
            raise ValueError(
                f"rmse={float(target[worst]):.2g} is below {float(limit[worst]):.2g}, by which rounding of {dtype} "
                f"states alone changes the payoff{wider}"
            )

    def _variances(self) -> list[Tensor]:
        """Of corrections; from the level before or from all of the payoff, where few paths hit what makes them."""
        made = [torch.where(v.variance > 0, v.variance, v.fine_variance / v.paths) for v in self._levels]
        fall = 2.0 ** self._rates()[1].nan_to_num(0.5).clamp(min=0.5)
        for l in range(2, len(made)):  # noqa: E741
            made[l] = torch.maximum(made[l], 0.5 * made[l - 1] / fall)
        return made

    def _paths_for(self, target: Tensor) -> list[int]:
        """The number of paths of each level that leaves the least work. Giles 2008, equation 12.

        Variances are taken a standard error larger than they look, which is much where tails are heavy.
        """
        variances = [v * (1.0 + level.heaviness) for v, level in zip(self._variances(), self._levels, strict=True)]
        costs = [level.cost for level in self._levels]
        work = torch.stack([(v * c).sqrt() for v, c in zip(variances, costs, strict=True)]).sum(0)
        scale = work / ((1.0 - _OF_BIAS) * target * target)
        return [math.ceil(float(((v / c).sqrt() * scale).max())) for v, c in zip(variances, costs, strict=True)]

    def _rates(self) -> tuple[Tensor, Tensor]:
        """Rates at which means and variances of corrections fall with the steps, from least squares."""
        later = self._levels[1:]
        means, variances = (torch.stack([getattr(level, of) for level in later]) for of in ("mean", "variance"))
        errors = (variances / torch.tensor([[level.paths] for level in later]).to(variances)).sqrt()
        weak = _slope(means.abs(), means.abs() > 2.0 * errors)  # others are chance
        weak = weak.nan_to_num(min(1.0, self._order)).clamp(0.5, self._order)
        return weak, _slope(variances, variances > 0)

    def _bias(self) -> Tensor:
        """``|E P - E P_L|`` from corrections that fall geometrically: Giles 2015, section 3.2."""
        a, last = self._rates()[0], self._levels[1:][-3:]
        means = [level.mean.abs() * 2.0 ** (-a * i) for i, level in enumerate(reversed(last))]
        return torch.stack(means).amax(0) / (2.0**a - 1.0)

    def _does_not_decay(self) -> str:
        """Whether variances of corrections are no smaller than three levels before, by two standard errors."""
        if len(self._levels) < 5:
            return ""
        before, last = self._levels[-4], self._levels[-1]
        if bool((last.variance * (1.0 - 2.0 * last.heaviness) > 0.7 * before.variance).any()):
            return (
                f"corrections do not fall from {before.steps} to {last.steps} steps: the scheme does not converge "
                "strongly, or coefficients vary within a step"
            )
        return ""

    def _cannot_go_on(self, most: float) -> str:
        """Why there can be no further level."""
        last = self._levels[-1]
        if last.steps >= _MOST_STEPS:
            return f"the bias is still too large with {last.steps} steps"
        if self.work + 3 * last.cost * self._least * self._expectation.starts > most:
            return f"the bias needs more steps than {last.steps}, and max_work={most:.2g} is spent"
        return ""

    def _estimate(self, target: Tensor, shape: tuple[int, ...], reason: str) -> MultilevelEstimate:
        levels, shaped = self._levels, self._expectation.shaped
        error = torch.stack([v / l.paths for v, l in zip(self._variances(), levels, strict=True)]).sum(0).sqrt()  # noqa: E741
        weak, variance = self._rates()
        return MultilevelEstimate(
            estimate=shaped(torch.stack([level.mean for level in levels]).sum(0)),
            standard_error=shaped(error),
            bias=shaped(self._bias()),
            rmse=target.reshape(shape).cpu(),
            levels=tuple(self._told(i) for i in range(len(levels))),
            weak_rate=shaped(weak),
            variance_rate=shaped(variance),
            converged=not reason,
            reason=reason,
            work=self.work,
            solver=self._solver,
            seed=self._path.seed,
        )

    def _told(self, i: int) -> Level:
        level, shaped = self._levels[i], self._expectation.shaped
        off, spread = torch.zeros_like(level.mean), torch.ones_like(level.mean)
        if i:
            before = self._levels[i - 1]
            off = (level.fine_mean - before.fine_mean - level.mean).abs()
            both = level.variance + level.fine_variance
            spread = 3.0 * torch.stack([both / level.paths, before.fine_variance / before.paths]).sqrt().sum(0)
        return Level(
            steps=level.steps,
            paths=level.paths,
            mean=shaped(level.mean),
            variance=shaped(level.variance),
            kurtosis=shaped(level.kurtosis),
            cost=level.cost,
            consistency=shaped(torch.where(off > 0, off / spread, 0.0)),
        )


def _slope(values: Tensor, used: Tensor) -> Tensor:
    """``b`` of ``values ~ 2^(-b l)`` for levels ``l`` along the first axis; nan where fewer than two are used."""
    l = torch.arange(len(values), dtype=values.dtype, device=values.device)[:, None]  # noqa: E741
    w, y = used.to(values), torch.where(used, values, 1.0).log2()
    n, sl, sy = w.sum(0), (w * l).sum(0), (w * y).sum(0)
    return (sl * sy - n * (w * l * y).sum(0)) / (n * (w * l * l).sum(0) - sl * sl)
