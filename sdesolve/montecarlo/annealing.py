"""Annealed importance sampling: weighted samples of an unnormalised density, and its normaliser."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from sdesolve._internal.arguments import kind_of, whole_number
from sdesolve._internal.modes import in_evaluation
from sdesolve._internal.transforms import refuse_transforms, runs_as_it_is
from sdesolve.brownian import BrownianPath, drawn_seed
from sdesolve.integrate.checks import all_finite, bad_rows
from sdesolve.integrate.solution import DivergenceError
from sdesolve.mcmc.base import squared_norm
from sdesolve.mcmc.overdamped import MALA, Langevin, acceptance_uniforms, langevin_update
from sdesolve.montecarlo.sequential import Particles, RunWeights, check_particles
from sdesolve.scores.base import AbstractData
from sdesolve.sde import per_sample


@runs_as_it_is
@torch.inference_mode(False)
@torch.no_grad()
@in_evaluation
def annealed_importance_sampling(
    kernel: MALA | Langevin,
    log_density: Callable[[Tensor], Tensor],
    prior: AbstractData,
    runs: int,
    *,
    particles: int = 256,
    steps: int | None = None,
    betas: Tensor | None = None,
    ess_threshold: float = 0.0,
    seed: int | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> Particles:
    r"""Weighted samples of ``exp(log_density(x)) / Z``, by particles moved from a prior ``p_0``, and ``log Z``.

    The levels are ``g_k = p_0^(1 - beta_k) exp(log_density)^beta_k`` from ``beta_0 = 0`` to ``beta_n = 1``. In step
    ``k`` a particle moves by the kernel with the score of ``g_k`` and its weight is multiplied by

        ``g_k(x_{k-1}) / g_{k-1}(x_{k-1})`` (`mcmc.MALA`),
        ``g_k(x_k) q_k(x_{k-1} | x_k) / (g_{k-1}(x_{k-1}) q_k(x_k | x_{k-1}))`` (`mcmc.Langevin`),

    ``q_k(y | x) = N(y; x + delta grad log g_k(x), 2 delta I)``. The first is annealed importance sampling (Neal 2001,
    Statistics and Computing 11, section 2); the second is the discrete-time work of Crooks 1998 and Jarzynski 1997.
    Either way the estimate of ``Z`` has no bias, at any step size and number of steps, which only decide on its
    variance. Langevin steps may cross a region without mass: levels between cancel, and are ``p_0`` there. With
    ``ess_threshold`` above 0, runs are resampled as in `sequential_monte_carlo`: the sampler of Del Moral, Doucet and
    Jasra 2006.

    One evaluation of ``log_density`` and its gradient a step. Row ``r particles + i`` of all particles is driven by
    path of that number: the first runs of many are the runs of few.

    Args:
        kernel: `mcmc.MALA` or `mcmc.Langevin`.
        log_density: ``(batch,)`` for ``(batch, *state)``, differentiable; minus infinity where there is no mass.
        prior: a law with samples and a density, such as `Gaussian`; wide enough to cover the target.
        runs: independent of one another.
        particles: in each run.
        steps: levels after the prior, ``beta_k = k / steps``; 100 if ``betas`` is not given either.
        betas: explicit levels instead, ``(steps + 1,)``, increasing from 0 to 1.
        ess_threshold: fraction of the particles, in [0, 1]; 0 never resamples, 1 whenever weights differ.
        seed: of all numbers; drawn from torch's default generator if not given.
        dtype: float32 or float64. Weights are in float64.
        device: where to sample.

    Raises:
        ValueError: both ``steps`` and ``betas``, levels that do not increase from 0 to 1, a prior without a density, a
            log density of another shape, or that is nan or plus infinity.
        TypeError: another kernel, a prior that is no law, a log density that is no function or has no gradient.
        DivergenceError: all weights of a run vanish, at a level that is named; a state stopped being finite.

    Example:
        >>> prior = Gaussian(torch.zeros(2), 2.0)
        >>> found = annealed_importance_sampling(MALA(0.1), lambda x: -x.square().sum(1), prior, 4, steps=50, seed=0)
        >>> log_z, std_error = found.log_normaliser()
    """
    refuse_transforms("annealed_importance_sampling", "differentiate an expectation under the target instead")
    if not isinstance(kernel, (MALA, Langevin)):
        raise TypeError(f"kernel must be mcmc.MALA or mcmc.Langevin, got {kind_of(kernel)}")
    if not callable(log_density):
        raise TypeError(f"log_density must be a function of x, got {kind_of(log_density)}")
    if not isinstance(prior, AbstractData):
        raise TypeError(f"prior must be a law such as Gaussian(mean, std), got {kind_of(prior)}")
    if not prior.has_density:
        raise ValueError("prior must have a density; give it standard deviations above 0")
    runs, count = whole_number(runs, "runs", 1), whole_number(particles, "particles", 1)
    levels = _levels(steps, betas)
    threshold = check_particles(ess_threshold, dtype)
    path = BrownianPath(drawn_seed() if seed is None else seed)
    x = prior.sample(runs * count, seed=path.seed, dtype=dtype, device=device)
    noise, delta = path.correctors(1), kernel.convention.step(kernel.step_size)
    weights = RunWeights(runs, count, threshold, path.seed, x.device, "beta", "log_density is minus infinity")
    at = _evaluated(prior, log_density, x)
    weights.multiply(torch.zeros(len(x), dtype=torch.float64, device=x.device), levels[0], 0)
    for k in range(len(levels) - 1):
        rows = weights.resample(k)
        if rows is not None:
            at = _State(*(a.index_select(0, rows) for a in at))
        before, beta = float(levels[k]), float(levels[k + 1])
        score = at.score(beta)
        y = langevin_update(at.x, score, delta, noise, k)
        if not all_finite(y):
            row = int(bad_rows(y).nonzero()[0])
            raise DivergenceError(
                f"a particle stopped being finite at beta = {beta:.6g}, row {row} of {len(y)}; "
                "take a smaller step size",
                step=k,
                time=beta,
                path=row,
            )
        new = _evaluated(prior, log_density, y)
        back = squared_norm(y - at.x - delta * score) - squared_norm(at.x - y - delta * new.score(beta))
        log_q, here = back.double() / (4.0 * delta), at.log(beta)
        if isinstance(kernel, MALA):
            weights.multiply(_change(here, at.log(before)), levels[k + 1], k + 1)
            accept = acceptance_uniforms(noise, k, y).log() < new.log(beta) - here + log_q
            at = _State(*(torch.where(per_sample(accept, a), a, b) for a, b in zip(new, at, strict=True)))
        else:
            weights.multiply(new.positive(beta) - at.positive(before) + log_q, levels[k + 1], k + 1)
            at = new
    return weights.result(at.x.unflatten(0, (runs, count)))


class _State(NamedTuple):
    """Particles, and both log densities and their gradients there."""

    x: Tensor
    log_prior: Tensor
    log_target: Tensor
    prior_score: Tensor
    target_score: Tensor

    def log(self, beta: float) -> Tensor:
        """``log g`` at this level, float64."""
        if beta in (0.0, 1.0):  # where the other one may be minus infinity
            return self.log_prior if beta == 0.0 else self.log_target
        return (1.0 - beta) * self.log_prior + beta * self.log_target

    def positive(self, beta: float) -> Tensor:
        """``log g`` at this level, of the prior where the target has no mass and ``beta < 1``."""
        level = self.log(beta)
        return level if beta == 1.0 else torch.where(level == -math.inf, self.log_prior, level)

    def score(self, beta: float) -> Tensor:
        return (1.0 - beta) * self.prior_score + beta * self.target_score


def _change(after: Tensor, before: Tensor) -> Tensor:
    """Of log densities; what had no mass keeps none."""
    return torch.where(before == -math.inf, -math.inf, after - before)


def _evaluated(prior: AbstractData, log_density: Callable[[Tensor], Tensor], x: Tensor) -> _State:
    found = []
    for name, function in (("prior", prior.log_prob), ("log_density", log_density)):
        with torch.enable_grad():
            leaf = x.detach().requires_grad_()
            value = function(leaf)
            if not isinstance(value, Tensor) or value.shape != x.shape[:1] or not value.is_floating_point():
                got = f"{value.dtype} {tuple(value.shape)}" if isinstance(value, Tensor) else kind_of(value)
                raise ValueError(f"{name} must return a real number for each state, ({len(x)},), got {got}")
            if not value.requires_grad:
                raise TypeError(f"{name} does not depend on x by differentiable operations")
            (gradient,) = torch.autograd.grad(value.sum(), leaf, allow_unused=True)
        if gradient is None:
            raise TypeError(f"{name} does not depend on x by differentiable operations")
        known = value.detach().double()
        bad = known.isnan() | (known == math.inf)
        if bool(bad.any()):
            row = int(bad.nonzero()[0])
            raise ValueError(
                f"{name} is {float(known[row])} for row {row} of {len(x)}; it must be finite, or minus infinity where "
                "there is no mass"
            )
        found.append((known, torch.where(per_sample(known == -math.inf, gradient), 0.0, gradient)))
    (log_prior, prior_score), (log_target, target_score) = found
    return _State(x, log_prior, log_target, prior_score, target_score)


def _levels(steps: int | None, betas: Tensor | None) -> Tensor:
    if betas is None:
        return torch.linspace(0.0, 1.0, whole_number(100 if steps is None else steps, "steps", 1) + 1).double()
    if steps is not None:
        raise ValueError("give steps or betas, not both")
    if not isinstance(betas, Tensor) or not betas.is_floating_point():
        raise TypeError(f"betas must be a tensor of real numbers, got {kind_of(betas)}")
    levels = betas.detach().cpu().double()
    if levels.ndim != 1 or len(levels) < 2 or levels[0] != 0 or levels[-1] != 1 or not bool((levels.diff() > 0).all()):
        raise ValueError("betas must increase from 0 to 1, (steps + 1,), such as torch.linspace(0, 1, 101)")
    return levels
