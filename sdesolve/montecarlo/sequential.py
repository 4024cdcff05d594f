"""Sequential Monte Carlo over the steps of a sampler: steering with exact weights."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import final

import torch
from sdesolve_kernels import Stream, uniform
from torch import Tensor

from sdesolve._internal.arguments import device_of, kind_of, number, positional, short, whole_number
from sdesolve._internal.modes import in_evaluation
from sdesolve._internal.transforms import refuse_transforms, runs_as_it_is
from sdesolve.brownian import BrownianPath, drawn_seed, unit_normals
from sdesolve.diffusions.base import AbstractDiffusion
from sdesolve.integrate.checks import all_finite, bad_rows
from sdesolve.integrate.solution import DivergenceError
from sdesolve.integrate.transitions import StepLaws, check_gaussian_solver
from sdesolve.reverse import Score, evaluated
from sdesolve.sampling import check_model, sampling_times, state_shape
from sdesolve.sde import per_sample
from sdesolve.solvers.base import AbstractSolver
from sdesolve.solvers.euler_maruyama import EulerMaruyama

LogPotential = Callable[..., Tensor]

_FINITE_POTENTIAL = ", or a potential that is finite for estimates at t > 0"


@final
@dataclasses.dataclass(frozen=True, repr=False)
class Particles:
    """Weighted samples of a law known up to its normaliser ``Z``, run by run.

    Of `sequential_monte_carlo` and `annealed_importance_sampling`.

    Attributes:
        x: denoised states, ``(runs, particles, *state)``.
        log_weights: of each, normalised within its run, float64, ``(runs, particles)``.
        log_evidence: the estimate of ``log Z`` of each run, float64, ``(runs,)``; that of ``Z`` has no bias.
        ess: effective sample sizes ``1 / sum w^2`` at each grid time, before resampling, ``(steps + 1, runs)``.
        resampled: whether particles were resampled there, ``(steps + 1, runs)``.
        seed: that all numbers have theirs from.
    """

    x: Tensor
    log_weights: Tensor
    log_evidence: Tensor
    ess: Tensor
    resampled: Tensor
    seed: int

    def draw(self, n: int | None = None) -> Tensor:
        """``n`` particles of each run with equal weights, by systematic resampling, ``(runs, n, *state)``.

        Args:
            n: how many; as many as there are particles by default.
        """
        runs, count = self.log_weights.shape
        n = count if n is None else whole_number(n, "n", 1)
        chosen = systematic(self.log_weights.exp(), n, _uniforms(runs, len(self.ess), self.seed, self.x.device))
        return self.x.flatten(0, 1)[_flat(chosen, count)].unflatten(0, (runs, n))

    def log_normaliser(self) -> tuple[float, float]:
        """``log Z`` from all runs together, the log of their mean, and its standard error by the delta method.

        The error is that of the spread between runs; of one run that was never resampled, between its particles.

        Raises:
            ValueError: a single run, of one particle or resampled.
        """
        terms = self.log_evidence
        if len(terms) == 1:
            terms = self.log_weights[0]
            if bool(self.resampled.any()) or len(terms) == 1:
                raise ValueError("the error of log Z needs at least 2 runs, or 2 particles that were not resampled")
        top = terms.max()
        ratios = (terms - top).exp()
        mean = ratios.mean()
        log_z = self.log_evidence.logsumexp(0) - math.log(len(self.log_evidence))
        return float(log_z), float(ratios.std() / mean / math.sqrt(len(ratios)))

    def __repr__(self) -> str:
        runs, count = self.log_weights.shape
        return (
            f"Particles(runs={runs}, particles={count}, log_evidence={short(self.log_evidence.mean().item())}, "
            f"ess={float(self.ess[-1].mean()):.1f}, seed={self.seed})"
        )


@runs_as_it_is
@torch.inference_mode(False)
@torch.no_grad()
@in_evaluation
def sequential_monte_carlo(
    process: AbstractDiffusion,
    score: Score,
    log_potential: LogPotential,
    shape: tuple[int, ...],
    *,
    particles: int = 256,
    solver: AbstractSolver | None = None,
    steps: int | None = None,
    grid: Tensor | None = None,
    seed: int | None = None,
    stochasticity: float | None = None,
    guidance: float = 1.0,
    ess_threshold: float = 0.5,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> Particles:
    r"""Weighted samples of ``p(x_0) exp(log_potential(x_0)) / Z``, by particles along a sampler's steps, and ``log Z``.

    ``p`` is the law that `sample` draws from with this solver and grid, denoised at the end. A step of the sampler has
    the law ``p(x_k | x_{k-1}) = N(m, s^2 I)`` (`transitions`). Particles take it with another mean, ``q = N(m +
    guidance s^2 grad log psi(x_{k-1}), s^2 I)`` with ``psi(x) = exp(log_potential(x_hat, t))`` at the denoised estimate
    ``x_hat = E[x_0 | x_t = x]``, and are weighted by

        ``w_0 = psi(x_0)``, ``w_k = p(x_k | x_{k-1}) psi(x_k) / (q(x_k | x_{k-1}) psi(x_{k-1}))``,

    ``x_k`` after ``k`` steps. At the last estimate the potential is taken at ``t = 0``. So weights are exact whatever
    ``psi`` and ``guidance`` are, which only decide on their variance: the estimate of ``Z`` has no bias, and
    expectations have errors of ``O(particles^-1/2)`` (Del Moral 2004, Feynman-Kac Formulae, chapters 7 and 9). This is
    the twisted diffusion sampler (Wu et al. 2023, algorithm 1). Where the effective sample size of a run falls below
    ``ess_threshold particles``, its particles are resampled, systematically (Kitagawa 1996).

    A sharp likelihood of ``x_0`` is a poor ``psi`` at large noise, where estimates are far from what they become:
    particles then die out early. Let ``log_potential(x_0, t)`` be flatter there, as `inverse.ObservationPotential` is.

    One evaluation of the score a step, and a backward pass through it. Row ``r particles + i`` of all particles is
    driven by path of that number, and resampling in run ``r`` after step ``k`` by one uniform that is a function of
    ``(seed, r, k)``: the first runs of many are the runs of few.

    Args:
        process: the forward diffusion.
        score: ``grad_x log p_t(x)`` of the prior; with guidance gradients must flow through it.
        log_potential: ``log_potential(x_0)`` or ``log_potential(x_0, t)``, ``(batch,)`` for ``(batch, *state)``: a
            reward, a log-likelihood, or `inverse.ObservationPotential`. At ``t = 0`` it defines the target; at other
            times it is given estimates, and minus infinity there rules out all that a particle may become.
        shape: ``(runs, *state)``; runs are independent of one another.
        particles: in each run.
        solver: a sampler whose steps are Gaussian, as for `transitions`; ``EulerMaruyama()`` by default.
        steps: on the process's own grid.
        grid: explicit decreasing times instead.
        seed: of all numbers; drawn from torch's default generator if not given.
        stochasticity: as for `sample`, above 0.
        guidance: factor of the gradient of the potential; 0 leaves steps as they are (a bootstrap filter), and needs no
            gradients.
        ess_threshold: fraction of the particles, in [0, 1]; 0 never resamples, 1 whenever weights differ.
        dtype: float32 or float64. Weights are in float64.
        device: where to sample.

    Raises:
        ValueError: as `transitions` and `sample`; a potential of another shape, or that is nan or plus infinity.
        TypeError: likewise; a potential that is no function; no gradient flows through the score.
        DivergenceError: all weights of a run vanish, at a time that is named; a state stopped being finite.

    Example:
        >>> found = sequential_monte_carlo(VP(), score, lambda x0: -x0.square().sum(1), (4, 2), steps=100, seed=0)
        >>> x = found.draw(1)  # a sample from each of four runs
    """
    refuse_transforms("sequential_monte_carlo", "resample by hand around transitions, which has gradients")
    check_model(process, score)
    if not callable(log_potential):
        raise TypeError(f"log_potential must be a function of x_0, got {kind_of(log_potential)}")
    runs, *state = state_shape(shape)
    count = whole_number(particles, "particles", 1)
    solver = EulerMaruyama() if solver is None else solver
    check_gaussian_solver(process, solver, stochasticity)
    times = sampling_times(process, solver, steps, grid, None)
    guidance = number(guidance, "guidance")
    if not math.isfinite(guidance):
        raise ValueError(f"guidance must be finite, got {short(guidance)}")
    threshold = check_particles(ess_threshold, dtype)
    path = BrownianPath(drawn_seed() if seed is None else seed)
    where = device_of(device)
    x = process.prior_at(float(times[0])).sample((runs * count, *state), seed=path.seed, dtype=dtype, device=where)
    seen = _Seen(process, score, log_potential, guidance)
    laws = StepLaws(process, seen, x, times, solver, stochasticity)
    filtered = RunWeights(
        runs, count, threshold, path.seed, where, "t", "log_potential is minus infinity", _FINITE_POTENTIAL
    )
    n = len(times) - 1
    seen.look(x, times[0], last=False)
    filtered.multiply(seen.log_psi, times[0], 0)
    for k in range(n):
        rows = filtered.resample(k)
        if rows is not None:
            x = seen.select(rows)
            laws.select(rows)
        z, before = unit_normals(path, k, x), seen.log_psi
        pull = guidance * seen.gradient
        x, _, std = laws.step(k, x, functools.partial(_moved, z, pull))
        shift = (std * pull).double()
        log_ratio = -(shift * (z.double() + 0.5 * shift)).reshape(len(x), math.prod(state)).sum(1)
        if not all_finite(x):
            row = int(bad_rows(x).nonzero()[0])
            raise DivergenceError(
                f"a particle stopped being finite in the step from t = {float(times[k]):.6g}, row {row} of "
                f"{len(x)}; take more steps, or less guidance",
                step=k,
                time=float(times[k]),
                path=row,
            )
        seen.look(x, times[k + 1], last=k + 1 == n)
        change = seen.log_psi - before
        filtered.multiply(torch.where(before == -math.inf, -math.inf, change) + log_ratio, times[k + 1], k + 1)
    return filtered.result(seen.x0.unflatten(0, (runs, count)))


def _moved(z: Tensor, pull: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    return mean + std * (z + std * pull)


class _Seen:
    """The score, evaluated once at each state that is looked at, and the potential there.

    Attributes:
        gradient: of the potential with respect to the state, ``(batch, *state)``; 0 without guidance.
        x0: the denoised estimate, ``(batch, *state)``.
        log_psi: the potential there, float64, ``(batch,)``.
    """

    def __init__(self, process: AbstractDiffusion, score: Score, log_potential: LogPotential, guidance: float) -> None:
        self._process, self._score, self._guided = process, score, guidance != 0
        self._log_potential = log_potential
        self._timed = positional(log_potential) > 1
        self._x = self._s = self.gradient = self.x0 = self.log_psi = torch.empty(0)
        self._t = math.nan

    def look(self, x: Tensor, t: Tensor, *, last: bool) -> None:
        """Evaluates everything at states of one time; at the last one, of the clean state alone."""
        self._x, self._t = x, float(t)
        self._s, self.x0, self.log_psi, self.gradient = self._evaluated(x, t, last=last)

    def select(self, rows: Tensor) -> Tensor:
        """Goes on with these rows, and gives their states."""
        self._x, self._s, self.x0, self.log_psi, self.gradient = (
            a.index_select(0, rows) for a in (self._x, self._s, self.x0, self.log_psi, self.gradient)
        )
        return self._x

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        """The score; that which is known, at the states that are looked at."""
        near = torch.finfo(x.dtype).eps * abs(self._t)
        known = x is self._x and t.ndim == 0 and abs(float(t) - self._t) <= near
        return self._s if known else evaluated(self._score, x, t)

    def _evaluated(self, x: Tensor, t: Tensor, *, last: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        alpha, sigma = self._process.alpha(t).to(x), self._process.sigma(t).to(x)
        guided = self._guided and not last
        with torch.set_grad_enabled(guided):
            leaf = x.detach().requires_grad_(guided)
            clean = bool(sigma == 0)
            s = torch.zeros_like(leaf) if clean else evaluated(self._score, leaf, t.to(x))
            if guided and not s.requires_grad:
                raise TypeError(
                    "no gradient flows from this score to the state, so that steps cannot be guided; leave "
                    "torch.no_grad and .detach() out of the score, or take guidance=0"
                )
            x0 = leaf if clean else (leaf + per_sample(sigma.square(), leaf) * s) / per_sample(alpha, leaf)
            value = self._potential(x0, t.new_zeros(()) if last else t)
            gradient = torch.zeros_like(x)
            if guided and value.requires_grad:
                (gradient,) = torch.autograd.grad(value.sum(), leaf)
        log_psi = value.detach().double()
        gradient = torch.where((log_psi == -math.inf).reshape(-1, *(1,) * (x.ndim - 1)), 0.0, gradient)
        return s.detach(), x0.detach(), log_psi, gradient

    def _potential(self, x0: Tensor, t: Tensor) -> Tensor:
        value = self._log_potential(x0, t.to(x0)) if self._timed else self._log_potential(x0)
        if not isinstance(value, Tensor) or value.shape != x0.shape[:1] or not value.is_floating_point():
            got = f"{value.dtype} {tuple(value.shape)}" if isinstance(value, Tensor) else kind_of(value)
            raise ValueError(f"log_potential must return a real number for each state, ({len(x0)},), got {got}")
        known = value.detach()
        bad = known.isnan() | (known == math.inf)
        if bool(bad.any()):
            row = int(bad.nonzero()[0])
            raise ValueError(
                f"log_potential is {float(known[row])} at t = {float(t):.6g} for row {row} of {len(x0)}; it must be "
                "finite, or minus infinity where the target has no mass"
            )
        return value


class RunWeights:
    """Log weights of the particles of each run since they were last resampled, and what went into ``log Z``."""

    def __init__(
        self,
        runs: int,
        count: int,
        threshold: float,
        seed: int,
        device: torch.device,
        clock: str,
        cause: str,
        remedy: str = "",
    ) -> None:
        self._clock, self._cause, self._remedy = clock, cause, remedy
        self._count, self._threshold, self._seed = count, threshold, seed
        self._log = torch.zeros(runs, count, dtype=torch.float64, device=device)
        self._log_evidence = torch.zeros(runs, dtype=torch.float64, device=device)
        self._ess: list[Tensor] = []
        self._resampled: list[Tensor] = []

    def multiply(self, log_factor: Tensor, t: Tensor, k: int) -> None:
        """Weights times a factor of each particle, at grid time ``k``."""
        self._log = self._log + log_factor.reshape(self._log.shape)
        total = self._log.logsumexp(1)
        gone = ~total.isfinite()
        if bool(gone.any()):
            run, time = int(gone.nonzero()[0]), float(t)
            raise DivergenceError(
                f"all {self._count} weights of run {run} vanish at {self._clock} = {time:.6g}: {self._cause} for "
                f"every particle. Take more particles{self._remedy}",
                step=max(k - 1, 0),
                time=time,
                path=run * self._count,
            )
        self._ess.append((2.0 * total - (2.0 * self._log).logsumexp(1)).exp())
        self._resampled.append(torch.zeros_like(gone))

    def resample(self, k: int) -> Tensor | None:
        """Rows to go on with; ``None`` for all as they are."""
        chosen = self._ess[-1] < self._threshold * self._count
        if not bool(chosen.any()):
            return None
        self._resampled[-1] = chosen
        total = self._log.logsumexp(1)
        weights = (self._log - total[:, None]).exp()
        index = systematic(weights, self._count, _uniforms(len(weights), k, self._seed, weights.device))
        index = torch.where(chosen[:, None], index, torch.arange(self._count, device=index.device))
        self._log_evidence = self._log_evidence + torch.where(chosen, total - math.log(self._count), 0.0)
        self._log = torch.where(chosen[:, None], 0.0, self._log)
        return _flat(index, self._count)

    def result(self, x: Tensor) -> Particles:
        """Particles with what they weigh at the end."""
        total = self._log.logsumexp(1)
        return Particles(
            x,
            self._log - total[:, None],
            self._log_evidence + total - math.log(self._count),
            torch.stack(self._ess),
            torch.stack(self._resampled),
            self._seed,
        )


def check_particles(ess_threshold: float, dtype: torch.dtype) -> float:
    """The fraction of the particles below which they are resampled, and a refusal of other dtypes."""
    threshold = number(ess_threshold, "ess_threshold")
    if not 0.0 <= threshold <= 1.0:
        raise ValueError(f"ess_threshold is a fraction of the particles, in [0, 1], got {short(ess_threshold)}")
    if dtype not in (torch.float32, torch.float64):
        raise TypeError(f"dtype must be torch.float32 or torch.float64, got {short(dtype)}")
    return threshold


def systematic(weights: Tensor, n: int, u: Tensor) -> Tensor:
    """Systematic resampling: indices ``(runs, n)``, each ``i`` of them ``floor`` or ``ceil`` of ``n w_i`` times.

    Kitagawa 1996, Journal of Computational and Graphical Statistics 5, appendix.

    Args:
        weights: ``(runs, particles)``, float64; normalised here.
        n: how many of each run.
        u: a uniform number in (0, 1) for each run, ``(runs,)``.
    """
    cumulated = weights.cumsum(1)
    cumulated = cumulated / cumulated[:, -1:]
    at = (torch.arange(n, dtype=torch.float64, device=weights.device) + u[:, None]) / n
    return torch.searchsorted(cumulated, at.clamp(max=1.0 - 2.0**-53), right=True)


def _uniforms(runs: int, k: int, seed: int, device: torch.device) -> Tensor:
    made = uniform(runs, 1, seed=seed, stream=Stream.RESAMPLING, offset=k, dtype=torch.float64, device="cpu")
    return made[:, 0].to(device)


def _flat(index: Tensor, count: int) -> Tensor:
    return (index + count * torch.arange(len(index), device=index.device)[:, None]).flatten()
