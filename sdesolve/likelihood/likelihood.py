"""Log-likelihoods by the probability flow, with standard errors; latents and back."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Annotated, Literal, final

import torch
from sdesolve_kernels import Stream, normal
from torch import Tensor

from sdesolve import grids
from sdesolve._internal.arguments import kind_of, short
from sdesolve._internal.modes import in_evaluation
from sdesolve._internal.transforms import refuse_transforms, runs_as_it_is
from sdesolve.diffusions.base import AbstractDiffusion
from sdesolve.integrate.checks import check_drift, check_state
from sdesolve.integrate.solution import Solution
from sdesolve.integrate.solve import integrate
from sdesolve.likelihood.quantisation import Quantisation
from sdesolve.likelihood.trace_estimators import AbstractDivergence, ExactTrace, Hutchinson
from sdesolve.reverse import Score
from sdesolve.sampling import check_same_process
from sdesolve.sde import AbstractODE, per_sample
from sdesolve.solvers.base import AbstractSolver
from sdesolve.solvers.dormand_prince import DormandPrince
from sdesolve.solvers.rk4 import RK4

Ending = Literal["decoder", "density"] | Quantisation
_ENDINGS = ("decoder", "density")
_EXACT_UP_TO = 64


@final
@dataclasses.dataclass(frozen=True)
class Likelihood:
    """Log-likelihoods of a batch, and how they were found.

    Attributes:
        log_prob: in nats, ``(batch,)``: the mean over the estimates of the divergence.
        standard_error: of ``log_prob``, from the spread of the estimates; 0 for an exact trace, nan for a single one.
        latent: ``(batch, *state)``: where the flow takes the data at ``t_max``.
        estimates: independent estimates of the divergence for each sample.
        exact: whether the divergence was exact.
        nfe: evaluations of the score on a batch, not counting backward passes through it.
        discrete: whether ``log_prob`` is of a probability of quantised data, not of a density.
    """

    log_prob: Annotated[Tensor, "batch"]
    standard_error: Annotated[Tensor, "batch"]
    latent: Tensor
    estimates: int
    exact: bool
    nfe: int
    discrete: bool = False

    def bits_per_dimension(self, data: Quantisation | None = None) -> Tensor:
        """Bits per dimension of the integers that the data stand for, ``(batch,)``.

        Args:
            data: how ``x`` was dequantised; left out where the ending was a `Quantisation`, which needs no offset.

        Raises:
            ValueError: it is missing, or given all the same.
        """
        if self.discrete is (data is not None):
            raise ValueError(
                "this log_prob is one of integers already; leave the quantisation out" if self.discrete else
                "this log_prob is a density: say how the integers were dequantised, bits_per_dimension(Quantisation())"
            )  # fmt: skip
        d = self.latent[0].numel()
        return -self.log_prob / (d * math.log(2.0)) if data is None else data.bits_per_dimension(self.log_prob, d)

    def interval(self, level: float = 0.95) -> tuple[Tensor, Tensor]:
        """A confidence interval for the log-likelihood, by Student's law of ``estimates - 1`` degrees of freedom.

        It accounts for the random probes alone: for neither the discretisation nor the draw of ``x_epsilon``.

        Raises:
            ValueError: ``level`` is not within (0, 1), or there is but one estimate.
        """
        if not 0.0 < level < 1.0:
            raise ValueError(f"level must be within (0, 1), got {short(level)}")
        if self.exact:
            return self.log_prob, self.log_prob
        if self.estimates < 2:
            raise ValueError("one estimate tells nothing of its error; ask for two or more probes")
        from scipy.special import stdtrit  # not with the package: importing scipy takes longer than the rest

        reach = float(stdtrit(self.estimates - 1, 0.5 + 0.5 * level)) * self.standard_error
        return self.log_prob - reach, self.log_prob + reach


@runs_as_it_is
def log_likelihood(
    process: AbstractDiffusion,
    score: Score,
    x: Tensor,
    *,
    divergence: AbstractDivergence | None = None,
    solver: AbstractSolver | None = None,
    steps: int | None = None,
    grid: Tensor | None = None,
    t_min: float | None = None,
    ending: Ending = "decoder",
    prior: Callable[[Tensor], Tensor] | None = None,
    seed: int = 0,
    first_sample: int = 0,
) -> Annotated[Tensor, "batch"]:
    """Log-likelihood in nats of the data ``x``, ``(batch,)``: `estimate_likelihood` without standard errors.

    Arguments and errors as for `estimate_likelihood`.
    """
    return estimate_likelihood(
        process, score, x, divergence=divergence, solver=solver, steps=steps, grid=grid, t_min=t_min, ending=ending,
        prior=prior, seed=seed, first_sample=first_sample,
    ).log_prob  # fmt: skip


@runs_as_it_is
@in_evaluation
def estimate_likelihood(
    process: AbstractDiffusion,
    score: Score,
    x: Tensor,
    *,
    divergence: AbstractDivergence | None = None,
    solver: AbstractSolver | None = None,
    steps: int | None = None,
    grid: Tensor | None = None,
    t_min: float | None = None,
    ending: Ending = "decoder",
    prior: Callable[[Tensor], Tensor] | None = None,
    seed: int = 0,
    first_sample: int = 0,
) -> Likelihood:
    r"""Log-likelihoods by the probability flow ``dx/dt = f x - g^2 score / 2`` (Song et al. 2021, eq. 39).

    From ``epsilon = t_min`` to ``T = t_max``, with the part of the divergence that ``f`` makes integrated in closed
    form,

        ``log p_eps(x_eps) = log prior(x_T) + d log(alpha_T / alpha_eps) - 1/2 int g(t)^2 div score(x_t, t) dt``,

    where state and integral are solved together as one equation. Probes are drawn once for each sample and kept along
    its path. No gradients flow to the data.

    This is the density of the model, which starts at its `AbstractDiffusion.prior`. The law of ``x_T`` differs from
    that by about ``alpha_T mean / sigma_T`` and ``(alpha_T / sigma_T)^2 cov`` in each dimension: on the default `VP`
    0.007 nats a dimension where the data has mean 1, and 2e-5 where it is centred. With ``prior`` it is the density of
    a model that starts elsewhere; with the exact law of ``x_T``, known for an exact score, it is that of the data:
    ``prior=lambda x: score.log_prob(x, process.t_max)``.

    The flow has to stop at ``epsilon > 0``, where there still is noise, and the data has none. ``ending`` says what
    is done about it:

    - ``"decoder"`` draws ``x_eps = alpha x + sigma z`` and adds ``log p(x | x_eps) - log q(x_eps | x)``, with
      ``p(x | x_eps)`` Gaussian of mean ``E[x_0 | x_eps]`` and standard deviation ``sigma / alpha``. Together this is
      ``d log alpha + (|z|^2 - |z + sigma score|^2) / 2``, and the expectation of the result over ``z`` is a lower
      bound of ``log p_0(x)`` (Song, Durkan et al. 2021, appendix B; Kim et al. 2022, appendix A), with a gap of order
      ``sigma^2``. Rows that repeat a sample draw several ``z``.
    - ``"density"`` gives ``log p_eps(x)``, the density of noisy data at the points ``x``. Data without noise is no
      typical draw from it: on data near a manifold thinner than ``sigma`` it is too large by up to half a nat for each
      dimension across.
    - a `Quantisation` is for models of quantised data that were trained without dequantisation, on ``x =
      quantisation.value(k)``. As ``"decoder"``, but ``p(k | x_eps)`` is the mass of that Gaussian in the bin of ``k``
      (`Quantisation.gaussian_log_prob`; Ho et al. 2020, eq. 13), so that the result bounds ``log P(k)``, a probability.
      What is lost is small where ``sigma / alpha`` is well below the width of a bin and the model knows the levels.

    Args:
        process: the forward diffusion.
        score: ``grad log p_t``, exact or learned.
        x: ``(batch, *state)``, clean data, float32 or float64.
        divergence: `ExactTrace` for up to 64 dimensions by default, above that `Hutchinson`; or `HutchPP`.
        solver: of ODEs: `DormandPrince` by default, or `RK4` where ``steps`` or ``grid`` is given.
        steps: for a solver of fixed steps, their number on the process's own grid.
        grid: explicit times from ``epsilon`` to ``t_max``, in either order, such as `grids.karras_sigma` gives.
        t_min: ``epsilon``; the process's own by default.
        ending: as above.
        prior: ``log p(x_T)`` of ``(batch, *state)``, ``(batch,)``; that of the process's own prior by default.
        seed: of probes and ``z``.
        first_sample: number of the first row: rows are functions of seed and number alone.

    Raises:
        ValueError: times that do not go from ``epsilon > 0`` to ``t_max``, data that is not finite or not on the values
            of the `Quantisation`, an unknown ending, a solver that is not for ODEs, steps for an adaptive solver or
            none for another, a ``prior`` of another shape.
        TypeError: as `solve`.
        DivergenceError: as `solve`.
    """
    refuse_transforms("a likelihood", "encode and decode, and solve, have derivatives")
    _check(process, score, x)
    if not isinstance(ending, Quantisation) and not (isinstance(ending, str) and ending in _ENDINGS):
        raise ValueError(
            f"ending={short(ending)} is unknown; choose one of {', '.join(map(repr, _ENDINGS))}, or the Quantisation "
            "of the data"
        )
    d = x.shape[1:].numel()
    if divergence is None:
        divergence = ExactTrace() if d <= _EXACT_UP_TO else Hutchinson()
    elif not isinstance(divergence, AbstractDivergence):
        raise TypeError(f"divergence must be ExactTrace(), Hutchinson() or HutchPP(), got {short(divergence)}")
    times, solver = _way(process, solver, steps, grid, t_min)
    if prior is not None and not callable(prior):
        raise TypeError(f"prior must be a function of x_T, such as Gaussian(...).log_prob, got {kind_of(prior)}")
    with torch.no_grad():
        eps = times[0].to(dtype=x.dtype, device=x.device)
        x_eps, added = x, x.new_zeros(len(x))
        if ending != "density":
            alpha, sigma = process.alpha(times[0]).to(x), process.sigma(times[0]).to(x)
            z = normal(
                len(x), d, seed=seed, stream=Stream.PERTURBATION, first_path=first_sample, dtype=x.dtype,
                device=x.device,
            ).reshape(x.shape)  # fmt: skip
            x_eps = alpha * x + sigma * z
            s = score(x_eps, eps)
            check_drift(s, x_eps, eps, "score")
            if isinstance(ending, Quantisation):
                log_p = ending.gaussian_log_prob(x, (x_eps + sigma.square() * s) / alpha, sigma / alpha)
                added = (log_p + 0.5 * z.square() + (sigma * math.sqrt(2.0 * math.pi)).log()).reshape(len(x), d).sum(1)
            else:
                # log N(x; E[x_0 | x_eps], (sigma / alpha)^2) - log N(x_eps; alpha x, sigma^2), multiplied out
                added = d * alpha.log() - (sigma * s * (z + 0.5 * sigma * s)).reshape(len(x), d).sum(1)
        probes = divergence.probes(x, seed=seed, first_path=first_sample)
        flow = _FlowWithDivergence(process, score, divergence, probes, tuple(x.shape))
        start = torch.cat([x_eps.reshape(len(x), d), x.new_zeros(len(x), divergence.estimates(d))], dim=1)
        # Nothing to fuse: autograd runs inside. Asked for "auto", `solve` would try, at two evaluations of the score.
        solution = _integrate(flow, start, times, solver, "eager")
        y = solution.x1
        latent = y[:, :d].reshape(x.shape)
        stretch = d * float(process.log_alpha(times[-1]) - process.log_alpha(times[0]))
        log_p = process.prior.log_prob(latent) if prior is None else _log_prob(prior, latent)
        each = y[:, d:] + (log_p + stretch + added).unsqueeze(1)
        exact = isinstance(divergence, ExactTrace)
        count = each.shape[1]
        error = torch.zeros_like(each[:, 0]) if exact else _standard_error(each)
    nfe = solution.stats.nfe + (ending != "density")
    return Likelihood(each.mean(1), error, latent, count, exact, nfe, isinstance(ending, Quantisation))


@runs_as_it_is
@in_evaluation
def encode(
    process: AbstractDiffusion,
    score: Score,
    x: Tensor,
    *,
    solver: AbstractSolver | None = None,
    steps: int | None = None,
    grid: Tensor | None = None,
    t_min: float | None = None,
) -> Tensor:
    """Latents ``(batch, *state)``: the probability flow from ``x`` at ``t_min`` to ``t_max``.

    Arguments and errors as for `estimate_likelihood`; `decode` with the same ones leads back, up to the solver's error.
    Gradients flow to ``x`` and to the score.
    """
    _check(process, score, x)
    times, solver = _way(process, solver, steps, grid, t_min, "encode")
    return _integrate(process.probability_flow(score), x, times, solver).x1


@runs_as_it_is
@in_evaluation
def decode(
    process: AbstractDiffusion,
    score: Score,
    latent: Tensor,
    *,
    solver: AbstractSolver | None = None,
    steps: int | None = None,
    grid: Tensor | None = None,
    t_min: float | None = None,
) -> Tensor:
    """Data ``(batch, *state)`` from latents: the probability flow from ``t_max`` to ``t_min``, `encode` backwards.

    Arguments and errors as for `estimate_likelihood`, with latents in place of ``x``.
    """
    _check(process, score, latent, "latent")
    times, solver = _way(process, solver, steps, grid, t_min, "decode")
    return _integrate(process.probability_flow(score), latent, times.flip(0), solver).x1


@final
class _FlowWithDivergence(AbstractODE):
    """The probability flow on ``(batch, d + estimates)``: the state, then the integrals of ``-g^2 div score / 2``."""

    def __init__(
        self,
        process: AbstractDiffusion,
        score: Score,
        divergence: AbstractDivergence,
        probes: Tensor,
        shape: tuple[int, ...],
    ) -> None:
        self._process, self._score, self._divergence = process, score, divergence
        self._probes, self._shape = probes, shape

    def drift(self, x: Tensor, t: Tensor) -> Tensor:
        d = math.prod(self._shape[1:])
        with torch.inference_mode(False), torch.enable_grad():  # in inference mode nothing would have a divergence
            x, t, probes = (v.clone() if v.is_inference() else v for v in (x, t, self._probes))
            flat = x[:, :d].detach()
            state = flat.reshape(self._shape).requires_grad_()
            s = self._score(state, t.reshape(-1, *(1,) * (state.ndim - 1)) if t.ndim > 1 else t)
            check_drift(s, state, t, "score")
            trace = self._divergence(s, state, probes).detach()
        f, g2 = (per_sample(c.to(x), flat) for c in (self._process.drift_rate(t), self._process.squared_diffusion(t)))
        return torch.cat([f * flat - 0.5 * g2 * s.detach().reshape(flat.shape), -0.5 * g2 * trace], dim=1)


def _integrate(
    ode: AbstractODE, x: Tensor, times: Tensor, solver: AbstractSolver, backend: Literal["auto", "eager"] = "auto"
) -> Solution:
    return integrate(ode, x, times, solver=solver, backend=backend)


def _log_prob(prior: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    log_p = prior(x)
    if not isinstance(log_p, Tensor) or log_p.shape != x.shape[:1]:
        got = tuple(log_p.shape) if isinstance(log_p, Tensor) else type(log_p).__name__
        raise ValueError(
            f"prior must return a log density for each sample, ({len(x)},), got {got}; is it summed over the state?"
        )
    return log_p.to(x)


def _standard_error(each: Tensor) -> Tensor:
    count = each.shape[1]
    return each.std(1) / math.sqrt(count) if count > 1 and len(each) else torch.full_like(each[:, 0], math.nan)


def _check(process: AbstractDiffusion, score: Score, x: Tensor, name: str = "x") -> None:
    if not isinstance(process, AbstractDiffusion):
        raise TypeError(f"process must be a linear diffusion such as VP(), got {kind_of(process)}")
    if not callable(score):
        raise TypeError(f"score must be a function of (x, t), got {kind_of(score)}")
    check_state(x, name)
    check_same_process(process, score, len(x))


def _way(
    process: AbstractDiffusion,
    solver: AbstractSolver | None,
    steps: int | None,
    grid: Tensor | None,
    t_min: float | None,
    call: str = "a likelihood",
) -> tuple[Tensor, AbstractSolver]:
    """Times from ``epsilon`` to ``t_max`` (the two ends for an adaptive solver), and the solver."""
    if steps is not None and grid is not None:
        raise ValueError("give steps, a number of them, or grid, explicit times, not both")
    fixed = steps is not None or grid is not None
    if solver is None:
        solver = RK4() if fixed else DormandPrince()
    if not isinstance(solver, AbstractSolver):
        raise TypeError(f"solver must be a solver object such as DormandPrince(), got {kind_of(solver)}")
    if fixed == (solver.controller is not None):
        need = "chooses its own steps: leave steps and grid out" if fixed else "needs steps= or grid="
        raise ValueError(f"{type(solver).__name__} {need}")
    if steps is not None:
        if t_min is not None:
            raise ValueError(
                "steps are those of the process's own grid, which ends at its own t_min; for another end give grid= "
                "explicit times, such as grids.uniform(process.t_max, t_min, steps)"
            )
        return process.time_grid(steps).flip(0), solver
    if grid is None:
        first = process.t_min if t_min is None else float(t_min)
        if not 0.0 < first < process.t_max:
            raise ValueError(f"t_min must lie in (0, t_max = {process.t_max}), got {first}")
        return torch.tensor([first, process.t_max], dtype=torch.float64, device="cpu"), solver
    if t_min is not None:
        raise ValueError("a grid says where it stops; give t_min or grid, not both")
    times = grids.check_grid(grid)
    times = times if float(times.flatten()[0]) < float(times.flatten()[-1]) else times.flip(0)
    if times.ndim != 1 or not (float(times[0]) > 0.0 and abs(float(times[-1]) / process.t_max - 1.0) <= 1e-12):
        raise ValueError(
            f"the grid of {call} is (steps + 1,) times between some epsilon > 0 and t_max = {process.t_max}, got "
            f"shape {tuple(times.shape)} from {float(times.min())} to {float(times.max())}"
        )
    return times, solver
