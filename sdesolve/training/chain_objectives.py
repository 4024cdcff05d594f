"""Objectives of chains: the simplified one of DDPM, and the variational bound."""

from __future__ import annotations

from typing import Annotated, final

from sdesolve_kernels import Stream, dsm_loss
from torch import Tensor

from sdesolve._internal.arguments import name_of, short, whole_number
from sdesolve.chains.base import AbstractChain, StepScore, Variance
from sdesolve.chains.bound import prior_term, step_term
from sdesolve.likelihood.quantisation import Quantisation
from sdesolve.reverse import evaluated
from sdesolve.training.losses import AbstractObjective, Objective, check_data
from sdesolve.training.times import SPREADS, Spread, choice


class _Steps:
    """Steps ``1 ... N``, all as likely, spread over the samples of a batch as training times are."""

    def __init__(self, chain: AbstractChain, spread: Spread) -> None:
        if not isinstance(chain, AbstractChain):
            raise TypeError(f"chain must be a DDPM or SMLD, got {short(chain)}")
        self.chain, self.name, self._spread = chain, spread, choice(SPREADS, spread, "times")

    def draw(self, x0: Tensor, seed: int, first_sample: int) -> Tensor:
        u = self._spread(len(x0), seed, whole_number(first_sample, "first_sample", 0), x0.device)
        return (1 + (u * self.chain.steps).long()).clamp(max=self.chain.steps)


@final
class SimpleChainLoss(AbstractObjective):
    """DDPM's ``L_simple``: ``|z - net(x_k, k)|^2 / d`` at a random step ``k`` (Ho et al. 2020, eq. 14).

    For a score, ``|z + sigma_k score(x_k, k)|^2 / d``, which for a `ChainScore` is the same.

    Args:
        chain: the chain.
        times: how steps are spread over a batch (`DenoisingScoreMatching`).

    Raises:
        TypeError: ``chain`` is no chain.
        ValueError: an unknown spread.
    """

    def __init__(self, chain: AbstractChain, times: Spread = "uniform") -> None:
        self._steps = _Steps(chain, times)

    def per_sample(
        self, score: StepScore, x0: Tensor, *, seed: int, first_sample: int = 0
    ) -> Annotated[Tensor, "batch"]:
        return self._loss(score, x0, seed, first_sample, "none")

    def __call__(self, score: StepScore, x0: Tensor, *, seed: int, first_sample: int = 0) -> Annotated[Tensor, ""]:
        return self._loss(score, x0, seed, first_sample, "mean")

    def times(self, score: StepScore, x0: Tensor, *, seed: int, first_sample: int = 0) -> Annotated[Tensor, "batch"]:
        """The steps ``k``, in the dtype of ``x0``."""
        return self._steps.draw(x0, seed, first_sample).to(x0.dtype)

    def __repr__(self) -> str:
        return f"SimpleChainLoss({self._steps.chain!r}, times={self._steps.name!r})"

    def _loss(self, score: StepScore, x0: Tensor, seed: int, first_sample: int, reduction: str) -> Tensor:
        check_data(x0)
        chain, k = self._steps.chain, self._steps.draw(x0, seed, first_sample)
        s = evaluated(score, chain.perturb(x0, k, seed=seed, first_sample=first_sample), k)
        sigma = chain.sigma.to(x0.device)[k].to(x0.dtype)
        return dsm_loss(
            s, None, 0.0, -1.0 / sigma, sigma.square(), reduction=reduction, seed=seed, stream=Stream.PERTURBATION,
            first_path=first_sample,
        )  # fmt: skip


@final
class ChainBound(Objective):
    """The full variational bound, by one of its terms a sample: ``(N L_{k-1} + L_T) / d``, nats a dimension.

    With ``k`` uniform on ``1 ... N`` its expectation is the bound that `variational_bound` sums up (Ho et al. 2020,
    eq. 5); ``k = 1`` is the decoder's term.

    Args:
        chain: the chain.
        variance: of the reverse steps, ``"small"``, ``"large"`` or a module ``v(x, k)``. A learned one is trained along
            if its parameters are among those of the score that is trained.
        bits: for data on the ``2^bits`` levels of [-1, 1] or the values of a `Quantisation`: the discretised decoder
            (`variational_bound`).
        times: how steps are spread over a batch (`DenoisingScoreMatching`).

    Raises:
        TypeError: ``chain`` is no chain.
        ValueError: an unknown spread.
    """

    def __init__(
        self,
        chain: AbstractChain,
        variance: Variance = "small",
        bits: int | Quantisation | None = None,
        times: Spread = "stratified",
    ) -> None:
        self._steps, self._variance, self._bits = _Steps(chain, times), variance, bits

    def per_sample(
        self, score: StepScore, x0: Tensor, *, seed: int, first_sample: int = 0
    ) -> Annotated[Tensor, "batch"]:
        check_data(x0)
        chain, k = self._steps.chain, self._steps.draw(x0, seed, first_sample)
        x = chain.perturb(x0, k, seed=seed, first_sample=first_sample)
        term = step_term(chain, score, x0, x, k, variance=self._variance, bits=self._bits)
        return (chain.steps * term + prior_term(chain, x0)) / max(x0.shape[1:].numel(), 1)

    def times(self, score: StepScore, x0: Tensor, *, seed: int, first_sample: int = 0) -> Annotated[Tensor, "batch"]:
        """The steps ``k``, in the dtype of ``x0``."""
        return self._steps.draw(x0, seed, first_sample).to(x0.dtype)

    def __repr__(self) -> str:
        variance = name_of(self._variance) if callable(self._variance) else repr(self._variance)
        return f"ChainBound({self._steps.chain!r}, variance={variance}, bits={self._bits}, times={self._steps.name!r})"
