"""The variational bound of a chain: its terms, in nats and in bits per dimension."""

from __future__ import annotations

import dataclasses
import math
from typing import Annotated, final

import torch
from torch import Tensor

from sdesolve._internal.modes import in_evaluation
from sdesolve.chains.base import AbstractChain, StepScore, Variance
from sdesolve.likelihood.quantisation import Quantisation, discretised_gaussian_log_prob
from sdesolve.reverse import evaluated
from sdesolve.scores.base import check_state


@final
@dataclasses.dataclass(frozen=True)
class BoundTerms:
    """The negative variational bound ``-log p(x_0) <= L_T + sum_k L_k + L_0``, in nats for each sample.

    Attributes:
        prior: ``L_T = KL(q(x_N | x_0) || p(x_N))``, ``(batch,)``.
        steps: ``L_{k-1} = KL(q(x_{k-1} | x_k, x_0) || p(x_{k-1} | x_k))`` for ``k = 2 ... N``, ``(N - 1, batch)``.
        decoder: ``L_0 = -log p(x_0 | x_1)``, ``(batch,)``.
        dimension: of the state.
    """

    prior: Annotated[Tensor, "batch"]
    steps: Annotated[Tensor, "between batch"]
    decoder: Annotated[Tensor, "batch"]
    dimension: int

    @property
    def total(self) -> Tensor:
        """The bound on ``-log p(x_0)`` in nats, ``(batch,)``."""
        return self.prior + self.steps.sum(0) + self.decoder

    @property
    def bits_per_dimension(self) -> Tensor:
        """`total` in bits per dimension; of the integers where the decoder is discretised."""
        return self.total / (self.dimension * math.log(2.0))


@in_evaluation
def variational_bound(
    chain: AbstractChain,
    score: StepScore,
    x0: Tensor,
    *,
    variance: Variance = "small",
    bits: int | Quantisation | None = None,
    seed: int = 0,
    first_sample: int = 0,
) -> BoundTerms:
    """All terms of the bound (Ho et al. 2020, eq. 5), one draw of ``x_k`` given ``x_0`` for each; ``N`` evaluations.

    Args:
        chain: the chain.
        score: ``score(x, k)``.
        x0: data ``(batch, *state)``.
        variance: of the reverse steps (`AbstractChain.log_variance`).
        bits: for data on the ``2^bits`` levels of [-1, 1], ends included: ``L_0`` is then by the discretised Gaussian
            (`discretised_gaussian_log_prob`), and the bound one of probabilities. For other levels, a `Quantisation`
            whose values the data are, such as ``Quantisation.inclusive(17)``. Without it, the bound is of densities.
        seed: of the draws, independent between steps.
        first_sample: number of the first row: rows are functions of seed and number alone.

    Raises:
        ValueError: data that is not on the levels; an unknown variance.
        TypeError: data that is not float32 or float64.
    """
    check_state(x0, tuple(x0.shape[1:]))
    terms = []
    with torch.no_grad():
        for k in range(1, chain.steps + 1):
            each = torch.full((len(x0),), k, dtype=torch.int64, device=x0.device)
            x = chain.perturb(x0, each, seed=seed, first_sample=first_sample, draw=k - 1)
            terms.append(step_term(chain, score, x0, x, each, variance=variance, bits=bits))
    return BoundTerms(prior_term(chain, x0), torch.stack(terms)[1:], terms[0], x0.shape[1:].numel())


def prior_term(chain: AbstractChain, x0: Tensor) -> Tensor:
    """``L_T`` for each sample: ``KL(N(alpha_N x_0, sigma_N^2) || prior)`` in nats."""
    ratio = float(chain.sigma[-1]) / chain.prior.std
    shift = (float(chain.alpha[-1]) / chain.prior.std) * x0.reshape(len(x0), -1)
    d = shift.shape[1]
    return 0.5 * shift.square().sum(1) + d * (0.5 * (ratio - 1.0) * (ratio + 1.0) - math.log(ratio))


def step_term(
    chain: AbstractChain,
    score: StepScore,
    x0: Tensor,
    x: Tensor,
    k: Tensor,
    *,
    variance: Variance,
    bits: int | Quantisation | None,
) -> Tensor:
    """``L_{k-1}`` for each sample at ``x_k = x`` (``L_0`` where ``k = 1``), in nats; differentiable."""
    mean = chain.mean_before(evaluated(score, x, k), x, k)
    log_p = chain.log_variance(x, k, variance).expand(x.shape)
    q = chain.posterior(x0, x, k)
    first = (k == 1).reshape(-1, *([1] * (x.ndim - 1)))
    # Where k = 1 the posterior has no variance and its divergence is infinite: 1 keeps gradients of what is not used
    # from being nan.
    log_ratio = q.variance.where(~first, 1.0).log() - log_p
    kl = 0.5 * ((mean - q.mean).square() * (-log_p).exp() + log_ratio.expm1() - log_ratio)
    term = torch.where(first, -_decoder(x0, mean, log_p, bits), kl)
    return term.reshape(len(x0), -1).sum(1)


def _decoder(x0: Tensor, mean: Tensor, log_variance: Tensor, bits: int | Quantisation | None) -> Tensor:
    if isinstance(bits, Quantisation):
        return bits.gaussian_log_prob(x0, mean, (0.5 * log_variance).exp())
    if bits is not None:
        return discretised_gaussian_log_prob(x0, mean, (0.5 * log_variance).exp(), bits=bits)
    return -0.5 * ((x0 - mean).square() * (-log_variance).exp() + log_variance + math.log(2.0 * math.pi))
