"""Flow matching: regression of the velocity of interpolants, with ends that are paired at random or by transport."""

from __future__ import annotations

from typing import Literal, final

import torch
from sdesolve_kernels import Stream, normal, uniform, words
from torch import Tensor

from sdesolve._internal.arguments import kind_of, short, whole_number
from sdesolve.flows.interpolant import FlowModel
from sdesolve.flows.pairing import entropic, optimal
from sdesolve.reverse import Score
from sdesolve.scores.base import AbstractData
from sdesolve.scores.network import NetworkScore
from sdesolve.training.losses import DenoisingScoreMatching, Objective, check_data
from sdesolve.training.times import SPREADS, Spread, choice

Pairing = Literal["independent", "optimal", "entropic", "given"]
_SEED_AT = 1 << 20  # in the sequence of path 0, beyond what its pairs take
_PAIRINGS: dict[str, None] = dict.fromkeys(("independent", "optimal", "entropic", "given"))


@final
class FlowMatching(Objective):
    r"""``|v(x_t, t) - (alpha' x_0 + beta' x_1)|^2 + |e(x_t, t) - z|^2`` along a `StochasticInterpolant`, per element.

    For a `FlowModel`; the second term is there with latent noise. The minimum are the conditional expectations that its
    velocity and score are made of (Albergo, Boffi and Vanden-Eijnden 2023, eqs. 2.13 and 2.16). What is trained on are
    samples ``x_1`` of the target; those of the source are drawn here and paired with them:

    =================  ===============================================================================================
    ``pairing``        source row for each target row
    =================  ===============================================================================================
    ``"independent"``  drawn for itself: flow matching between two samples
    ``"optimal"``      of as many as there are targets in the call, assigned by least squared distance: straighter
                       flows (Tong et al. 2024, OT-CFM)
    ``"entropic"``     of as many, from the entropic plan at the volatility of the Brownian bridges: the Schroedinger
                       bridge, in the limit of large batches (Tong et al. 2024, [SF]2M)
    ``"given"``        data hold pairs already, ``(batch, 2, *state)``: source, then target
    =================  ===============================================================================================

    For a `NetworkScore` with ``predicts="flow"``, whose source is normal noise, it is
    ``DenoisingScoreMatching("simple")`` with independent pairs (Lipman et al. 2023, eq. 14), since other pairs would
    leave the network without a score.

    Draws are functions of ``seed`` and each sample's number. Plans pair within one call, so that a batch in parts is
    another run than a whole one.

    Args:
        source: samples ``(n, *state)``, which are drawn from with replacement, or a `Gaussian` or `GaussianMixture`;
            left out for a `NetworkScore` and for ``"given"``.
        pairing: as above.
        times: how times, uniform within those of the interpolant, are spread over the samples
            (`DenoisingScoreMatching`).

    Raises:
        TypeError: ``source`` of another type; a model that predicts no velocity.
        ValueError: an unknown ``pairing`` or ``times``; a source that is missing, empty or of another state; pairs by
            entropic transport along other interpolants than Brownian bridges.
    """

    def __init__(
        self,
        source: Tensor | AbstractData | None = None,
        pairing: Pairing = "independent",
        times: Spread = "uniform",
    ) -> None:
        choice(_PAIRINGS, pairing, "pairing")
        if isinstance(source, Tensor):
            check_data(source)
            if len(source) == 0:
                raise ValueError("source has no samples")
            if not bool(source.isfinite().all()):
                raise ValueError("source holds nan or inf; leave these samples out")
        elif source is not None and not isinstance(source, AbstractData):
            raise TypeError(
                f"source must be a tensor of samples, a Gaussian or a GaussianMixture, got {kind_of(source)}"
            )
        if source is not None and pairing == "given":
            raise ValueError("pairing='given' has sources in the data, (batch, 2, *state); leave out source")
        self._source, self._pairing, self._spread = source, pairing, times
        self._draw = choice(SPREADS, times, "times")

    def per_sample(self, score: Score, x0: Tensor, *, seed: int, first_sample: int = 0) -> Tensor:
        """Losses ``(batch,)`` of the targets ``x0``, or of the pairs, each the mean over the elements of one sample."""
        if isinstance(score, NetworkScore):
            return self._of_noise(score).per_sample(score, x0, seed=seed, first_sample=first_sample)
        model = _model(score)
        check_data(x0)
        start, end = self._ends(model, x0, seed, whole_number(first_sample, "first_sample", 0))
        t = self.times(model, end, seed=seed, first_sample=first_sample)
        d = end[0].numel() if len(end) else 1
        z = normal(
            len(end), d, seed=seed, stream=Stream.PERTURBATION, first_path=first_sample, dtype=end.dtype,
            device=end.device,
        ).reshape(end.shape)  # fmt: skip
        c = model.interpolant.coefficients(t).like(end)
        v, e = model.outputs(c.alpha * start + c.beta * end + c.gamma * z, t)
        loss = (v - (c.alpha_rate * start + c.beta_rate * end)).square().flatten(1).mean(1)
        return loss if e is None else loss + (e - z).square().flatten(1).mean(1)

    def times(self, score: Score, x0: Tensor, *, seed: int, first_sample: int = 0) -> Tensor:
        if isinstance(score, NetworkScore):
            return self._of_noise(score).times(score, x0, seed=seed, first_sample=first_sample)
        t_min = _model(score).interpolant.t_min
        u = self._draw(len(x0), seed, whole_number(first_sample, "first_sample", 0), x0.device)
        return (t_min + (1.0 - 2.0 * t_min) * u).to(x0.dtype)

    def __repr__(self) -> str:
        source = f"{tuple(self._source.shape)}" if isinstance(self._source, Tensor) else type(self._source).__name__
        return f"FlowMatching(source={source}, pairing={self._pairing!r}, times={self._spread!r})"

    def _of_noise(self, score: NetworkScore) -> DenoisingScoreMatching:
        if score.predicts != "flow":
            raise TypeError(
                f"flow matching is for a velocity, and this network has predicts={score.predicts!r}: take "
                "DenoisingScoreMatching(), or declare predicts='flow'"
            )
        if self._source is not None or self._pairing != "independent":
            raise ValueError(
                "a NetworkScore has normal noise for its source, paired independently, or it would not know its score; "
                "leave out source and pairing, or train a FlowModel along StochasticInterpolant(noise=0)"
            )
        return DenoisingScoreMatching("simple", self._spread)

    def _ends(self, model: FlowModel, x1: Tensor, seed: int, first: int) -> tuple[Tensor, Tensor]:
        if self._pairing == "given":
            if x1.ndim < 2 or x1.shape[1] != 2:
                raise ValueError(f"pairing='given' takes pairs (batch, 2, *state), got shape {tuple(x1.shape)}")
            return x1[:, 0], x1[:, 1]
        start = self._drawn(x1, seed, first)
        if self._pairing == "optimal":
            return start[optimal(start, x1)], x1
        if self._pairing == "entropic":
            noise = model.interpolant.noise
            if not noise or not model.interpolant.is_bridge:
                raise ValueError(
                    "entropic pairs are for Brownian bridges, StochasticInterpolant(noise) with noise above 0 and the "
                    "alpha and beta that it has by default"
                )
            return start[entropic(start, x1, noise, seed=seed, first=first)], x1
        return start, x1

    def _drawn(self, x1: Tensor, seed: int, first: int) -> Tensor:
        if self._source is None:
            raise ValueError("flow matching of a FlowModel needs the source, samples or a law: FlowMatching(source)")
        state = tuple(self._source.shape[1:]) if isinstance(self._source, Tensor) else self._source.state_shape
        if state != tuple(x1.shape[1:]):
            raise ValueError(
                f"source and target must have states of one shape, got {short(state)} and {short(tuple(x1.shape[1:]))}"
            )
        if isinstance(self._source, Tensor):
            u = uniform(len(x1), 1, seed=seed, stream=Stream.PAIRING, first_path=first, dtype=torch.float64)[:, 0]
            rows = (u * len(self._source)).long().clamp(max=len(self._source) - 1)
            return self._source[rows.to(self._source.device)].to(x1)
        # A seed of its own: the targets may be draws of an analytic law too, of this very seed.
        own = int(words(1, 1, seed=seed, stream=Stream.PAIRING, offset=_SEED_AT, device="cpu")[0, 0])
        return self._source.sample(len(x1), seed=own, first_path=first, dtype=x1.dtype, device=x1.device)


def _model(score: object) -> FlowModel:
    if not isinstance(score, FlowModel):
        raise TypeError(
            f"flow matching trains a FlowModel, or a NetworkScore with predicts='flow', got {kind_of(score)}"
        )
    return score
