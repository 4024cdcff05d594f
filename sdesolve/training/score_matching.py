"""Score matching that needs no noise: explicit against a kernel density, implicit, and sliced."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Annotated, NamedTuple, final

import torch
from sdesolve_kernels import Stream, perturb
from torch import Tensor, nn

from sdesolve._internal.arguments import name_of, short
from sdesolve.integrate.checks import check_drift
from sdesolve.likelihood.trace_estimators import AbstractDivergence, ExactTrace, Hutchinson, ProbeLaw
from sdesolve.reverse import Score
from sdesolve.scores.base import flat
from sdesolve.training.losses import Objective, check_data
from sdesolve.training.times import TrainingTimes

Weight = Callable[[Tensor], Tensor]


@final
class PlainScore(nn.Module):
    """A score ``net(x)`` of one law, without a noise level, as ``score(x, t)``; the time is not looked at.

    Args:
        net: a function or module of ``x``, ``(batch, *state)``, that returns the same shape.

    Raises:
        TypeError: ``net`` is none.
    """

    def __init__(self, net: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        if not callable(net):
            raise TypeError(f"net must be a function or module of x, got {type(net).__name__}")
        self.net = net

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """``net(x)``."""
        return self.net(x)


class Parzen(NamedTuple):
    """A kernel density estimate at some points."""

    log_prob: Annotated[Tensor, "batch"]
    score: Annotated[Tensor, "batch d"]


def parzen(x: Tensor, data: Tensor, scale: Tensor | float, bandwidth: Tensor | float) -> Parzen:
    """Log density and score at ``x: (batch, d)`` of ``1/n sum_i N(scale data_i, bandwidth^2 I)`` (Parzen 1962).

    Args:
        x: points.
        data: centres ``(n, d)``.
        scale: ``()`` or ``(batch,)``, or a number.
        bandwidth: likewise, positive.
    """
    d = x.shape[1]
    scale, h = (torch.as_tensor(v, dtype=x.dtype, device=x.device).reshape(-1, 1) for v in (scale, bandwidth))
    # |x - scale y|^2 = |x|^2 - 2 scale x y + scale^2 |y|^2 cancels where centres are near; differences do not.
    y = x.unsqueeze(1) - scale.unsqueeze(2) * data
    logits = -0.5 * (y / h.unsqueeze(2)).square().sum(2)
    log_prob = logits.logsumexp(1) - math.log(len(data)) - d * (h.squeeze(1).log() + 0.5 * math.log(2 * math.pi))
    return Parzen(log_prob, -(logits.softmax(1).unsqueeze(2) * y).sum(1) / h.square())


class _At(NamedTuple):
    """Where a score is asked for: state, time, and the weight of each sample."""

    x: Tensor
    t: Tensor
    weight: Tensor


class _Noising:
    """Clean data, or data noised at training times, with weights ``lambda(t)`` of squared scores."""

    def __init__(self, noise: TrainingTimes | None, weight: Weight | None) -> None:
        if noise is not None and not isinstance(noise, TrainingTimes):
            raise TypeError(f"noise must be TrainingTimes(...), or None for clean data; got {short(noise)}")
        if weight is not None and noise is None:
            raise ValueError("a weight is a function of training times; give noise=TrainingTimes(...) as well")
        self.noise, self.weight = noise, weight

    def times(self, score: Score, x0: Tensor, seed: int, first_sample: int) -> Tensor:
        if self.noise is None:
            return x0.new_zeros(len(x0))
        return self.noise.draw(score, x0, seed=seed, first_sample=first_sample)

    def __call__(self, score: Score, x0: Tensor, seed: int, first_sample: int) -> _At:
        check_data(x0)
        t = self.times(score, x0, seed, first_sample)
        if self.noise is None:
            return _At(x0, t, torch.ones_like(t))
        process = self.noise.process_of(score)
        alpha, sigma = process.alpha(t), process.sigma(t)
        x = perturb(x0, alpha, sigma, seed=seed, stream=Stream.PERTURBATION, first_path=first_sample, step=0)
        return _At(x, t, sigma.square() if self.weight is None else self.weight(t))

    def __repr__(self) -> str:
        weight = None if self.weight is None else name_of(self.weight)
        return f"noise={None if self.noise is None else f'TrainingTimes({self.noise!r})'}, weight={weight}"


@final
class ImplicitScoreMatching(Objective):
    r"""``weight (|s|^2 + 2 div s) / d``: the squared error of a score up to a constant (Hyvarinen 2005, theorem 1).

    ``E|s - s*|^2 = E[|s|^2 + 2 div s] + E|s*|^2`` for the law of the points, by parts: neither noise nor the true score
    is needed. By default the points are the data; with ``noise`` they are ``x_t`` at training times, for a
    noise-conditional score, and the objective then equals `DenoisingScoreMatching` up to a constant for each ``t``.

    The scale is that of `DenoisingScoreMatching`, twice the paper's and a mean over dimensions.

    Args:
        divergence: `ExactTrace` by default; `Hutchinson` or `HutchPP` for more than a few dimensions.
        noise: training times and process; None for clean data, where the score is called at ``t = 0``.
        weight: ``lambda(t)``, ``(batch,)`` to ``(batch,)``; ``sigma(t)^2`` by default.

    Raises:
        TypeError: an argument of another type.
        ValueError: a weight without noise.
    """

    def __init__(
        self,
        divergence: AbstractDivergence | None = None,
        *,
        noise: TrainingTimes | None = None,
        weight: Weight | None = None,
    ) -> None:
        self._divergence = ExactTrace() if divergence is None else divergence
        if not isinstance(self._divergence, AbstractDivergence):
            raise TypeError(f"divergence must be ExactTrace(), Hutchinson() or HutchPP(), got {short(divergence)}")
        self._noising = _Noising(noise, weight)

    def per_sample(self, score: Score, x0: Tensor, *, seed: int, first_sample: int = 0) -> Annotated[Tensor, "batch"]:
        x, t, weight = self._noising(score, x0, seed, first_sample)
        s, x, trained = _field(score, x, t)
        probes = self._divergence.probes(x, seed=seed, first_path=first_sample)
        divergence = self._divergence(s, x, probes, create_graph=trained).mean(1)
        s = flat(s)
        return weight * (s.square().sum(1) + 2.0 * divergence) / s.shape[1]

    def times(self, score: Score, x0: Tensor, *, seed: int, first_sample: int = 0) -> Annotated[Tensor, "batch"]:
        return self._noising.times(score, x0, seed, first_sample)

    def __repr__(self) -> str:
        return f"ImplicitScoreMatching(divergence={self._divergence!r}, {self._noising!r})"


@final
class SlicedScoreMatching(Objective):
    r"""``weight ((v^T s)^2 + 2 v^T (ds/dx) v) / d``, averaged over probes (Song, Garg et al. 2019, eq. 7).

    The error of the score is compared along random directions ``v`` of unit covariance. With ``variance_reduced``,
    ``(v^T s)^2`` gives way to its expectation ``|s|^2`` (eq. 8), which is `ImplicitScoreMatching` with `Hutchinson`.
    Scale, noise and weight are as there.

    Args:
        probes: directions for each sample.
        law: of their entries, ``"rademacher"`` or ``"gaussian"``.
        variance_reduced: use ``|s|^2``.
        noise: training times and process; None for clean data.
        weight: ``lambda(t)``; ``sigma(t)^2`` by default.

    Raises:
        ValueError: fewer than one probe, an unknown law, or a weight without noise.
        TypeError: ``probes`` is not an integer; ``noise`` of another type.
    """

    def __init__(
        self,
        probes: int = 1,
        law: ProbeLaw = "rademacher",
        *,
        variance_reduced: bool = True,
        noise: TrainingTimes | None = None,
        weight: Weight | None = None,
    ) -> None:
        self._divergence, self._reduced = Hutchinson(probes, law), bool(variance_reduced)
        self._noising = _Noising(noise, weight)

    def per_sample(self, score: Score, x0: Tensor, *, seed: int, first_sample: int = 0) -> Annotated[Tensor, "batch"]:
        x, t, weight = self._noising(score, x0, seed, first_sample)
        s, x, trained = _field(score, x, t)
        v = self._divergence.probes(x, seed=seed, first_path=first_sample)
        divergence = self._divergence(s, x, v, create_graph=trained).mean(1)
        s = flat(s)
        square = s.square().sum(1) if self._reduced else (v * s).sum(2).square().mean(0)
        return weight * (square + 2.0 * divergence) / s.shape[1]

    def times(self, score: Score, x0: Tensor, *, seed: int, first_sample: int = 0) -> Annotated[Tensor, "batch"]:
        return self._noising.times(score, x0, seed, first_sample)

    def __repr__(self) -> str:
        return (
            f"SlicedScoreMatching(probes={self._divergence.count}, law={self._divergence.law!r}, "
            f"variance_reduced={self._reduced}, {self._noising!r})"
        )


@final
class ExplicitScoreMatching(Objective):
    r"""``weight |s - grad log q_t|^2 / d`` against the kernel density of the data (Vincent 2011, eq. 7).

    ``q_t = 1/n sum_i N(alpha(t) x_i, sigma(t)^2 I)`` over all training data, and the points are draws of ``x_t``: on
    `EDM` the bandwidth is the time, and ``NoiseLadder([h])`` one bandwidth ``h``. `DenoisingScoreMatching` has the
    same gradient in expectation (Vincent's identity) without the sum over the data, which costs ``n batch d`` here.

    Args:
        data: the training data ``(n, *state)``, of which batches are taken, in the units of the score: if it has a
            `Normalizer`, ``normalizer(data)``.
        noise: training times and process.
        weight: ``lambda(t)``; ``sigma(t)^2`` by default.

    Raises:
        TypeError: data that is not float32 or float64, or ``noise`` of another type.
        ValueError: no data.
    """

    def __init__(self, data: Tensor, noise: TrainingTimes, *, weight: Weight | None = None) -> None:
        check_data(data)
        if len(data) == 0:
            raise ValueError("a kernel density needs at least one sample of data")
        if not isinstance(noise, TrainingTimes):
            raise TypeError(
                f"noise must be TrainingTimes(...), which says how wide the kernels are; got {short(noise)}"
            )
        self._data, self._noise, self._noising = data, noise, _Noising(noise, weight)

    def per_sample(self, score: Score, x0: Tensor, *, seed: int, first_sample: int = 0) -> Annotated[Tensor, "batch"]:
        x, t, weight = self._noising(score, x0, seed, first_sample)
        if x0.shape[1:] != self._data.shape[1:]:
            raise ValueError(
                f"samples of shape {tuple(x0.shape[1:])} are not from data of shape {tuple(self._data.shape[1:])}"
            )
        s = score(x, t)
        check_drift(s, x, t, "score")
        process = self._noise.process_of(score)
        with torch.no_grad():
            target = parzen(flat(x), flat(self._data).to(x), process.alpha(t), process.sigma(t)).score
        return weight * (flat(s) - target).square().mean(1)

    def times(self, score: Score, x0: Tensor, *, seed: int, first_sample: int = 0) -> Annotated[Tensor, "batch"]:
        return self._noising.times(score, x0, seed, first_sample)

    def __repr__(self) -> str:
        return f"ExplicitScoreMatching(data={tuple(self._data.shape)}, {self._noising!r})"


def _field(score: Score, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor, bool]:
    """The score under autograd, the leaf it is a function of, and whether gradients of it are wanted."""
    trained = torch.is_grad_enabled()
    with torch.inference_mode(False), torch.enable_grad():  # in inference mode nothing would have a divergence
        x, t = (v.clone() if v.is_inference() else v for v in (x, t))
        x = x.detach().requires_grad_()
        s = score(x, t)
        check_drift(s, x, t, "score")
    return s, x, trained
