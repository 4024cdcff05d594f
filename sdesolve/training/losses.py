"""Objectives for learning scores. Their randomness is a function of a seed and of each sample's number."""

from __future__ import annotations

import abc
import math
from collections.abc import Callable
from typing import Annotated, Literal, NamedTuple, final

import torch
from sdesolve_kernels import Stream, dsm_loss, perturb
from torch import Tensor

from sdesolve._internal.arguments import name_of, short
from sdesolve.brownian import Place
from sdesolve.diffusions.base import AbstractDiffusion
from sdesolve.integrate.checks import check_drift
from sdesolve.reverse import Score
from sdesolve.scores.network import NetworkScore
from sdesolve.training.times import AbstractTimeLaw, Spread, TrainingTimes, choice, log_snr_slope
from sdesolve.training.times import LogNormalNoise as LogNormalNoise
from sdesolve.training.times import NoiseLadder as NoiseLadder
from sdesolve.training.times import UniformLogSNR as UniformLogSNR
from sdesolve.training.times import UniformTime as UniformTime


class AbstractObjective(abc.ABC):
    """A loss of training samples, deterministic given ``seed`` and the samples' numbers.

    Sample ``i`` of a batch has the number ``first_sample + i``, counted over the whole training run. Calling twice with
    the same numbers gives the same loss whatever ran in between, and a batch gives the mean of what its parts give.
    That is what makes a resumed run equal to one that was never interrupted.
    """

    @abc.abstractmethod
    def per_sample(self, score: Score, x0: Tensor, *, seed: int, first_sample: int = 0) -> Annotated[Tensor, "batch"]:
        """Losses ``(batch,)`` of the data ``x0: (batch, *state)``."""

    @abc.abstractmethod
    def times(self, score: Score, x0: Tensor, *, seed: int, first_sample: int = 0) -> Annotated[Tensor, "batch"]:
        """The times ``(batch,)`` that `per_sample` draws for the same arguments."""

    @abc.abstractmethod
    def __call__(self, score: Score, x0: Tensor, *, seed: int, first_sample: int = 0) -> Annotated[Tensor, ""]:
        """The mean of `per_sample`."""

    @abc.abstractmethod
    def __repr__(self) -> str:
        """Names the objective and all its settings; a checkpoint is resumed only under the same text."""


class Objective(AbstractObjective):
    """An objective that is given by its losses per sample."""

    @final
    def __call__(self, score: Score, x0: Tensor, *, seed: int, first_sample: int = 0) -> Annotated[Tensor, ""]:
        """The mean of `per_sample`."""
        return self.per_sample(score, x0, seed=seed, first_sample=first_sample).mean()


class _Regression(NamedTuple):
    """A loss per sample ``weight mean (output - p x_0 - q z)^2``; each coefficient a number or ``(batch,)``."""

    output: Tensor
    p: Tensor | float
    q: Tensor | float
    weight: Tensor | float


Weighting = Literal["sigma2", "likelihood", "simple", "edm"] | Callable[[Tensor], Tensor]


@final
class DenoisingScoreMatching(AbstractObjective):
    r"""Denoising score matching (Vincent 2011, eq. 9; over all times, Song et al. 2021, eq. 7).

    ``x_t = alpha x_0 + sigma z``; with ``s = score(x_t, t)`` the loss of a sample is the mean over its elements of

    ================  ==================================  =========================================================
    ``weighting``     loss                                 use
    ================  ==================================  =========================================================
    ``"sigma2"``      ``(sigma s + z)^2``                  every noise level weighs about the same
    ``"likelihood"``  ``g(t)^2 (s + z / sigma)^2``         its time integral bounds the log-likelihood
                                                           (Song, Durkan et al. 2021, theorem 1)
    ``"simple"``      ``(F - target)^2``                   unweighted in the network's own output space
                                                           (Ho et al. 2020, eq. 14; for ``edm`` the weight of Karras et
                                                           al. 2022, table 1)
    ``"edm"``         ``(1 + (r / sigma_data)^2)``         the same for any score, ``r = sigma / alpha``
                      ``(sigma s + z)^2``
    ``lambda(t)``     ``lambda(t) (s + z / sigma)^2``      a function of your own, ``(batch,)`` to ``(batch,)``
    ================  ==================================  =========================================================

    The minimum over scores is the exact score, and it is not zero: the variance of ``z`` given ``x_t`` remains.

    Times follow ``law``, spread over the samples in one of three ways. All three give each sample the same law:

    - ``"uniform"``: independently.
    - ``"antithetic"``: samples ``2 k`` and ``2 k + 1`` get the quantiles ``u`` and ``1 - u``.
    - ``"stratified"``: sample ``i`` gets the base-2 van der Corput point of ``i``, all rotated by one uniform number
      per seed. Any ``2^k`` successive samples that start at a multiple of ``2^k`` then have equally spaced quantiles
      (Kingma et al. 2021, appendix I.1, for one batch; here it holds for batches of every size at once).

    With ``antithetic=True`` every sample is noised twice, by ``z`` and by ``-z``, for two calls of the network. With
    little noise the gradient of one draw is almost all chance, of order 1 where what is to be learned has order
    ``sigma``; between the two that chance cancels. At equal cost, pairs halved the relative Fisher error at ``sigma =
    0.01`` on a mixture in the plane (``benchmarks/learned_scores.py`` has the setting).

    One sigma, or a ladder of them, is ``law=NoiseLadder([...])``, on `EDM` if times are to be the sigmas. With
    ``importance=True`` and another law than uniform times, the losses are weighted so that their mean still estimates
    that over uniform times: ``law=UniformLogSNR(), importance=True`` is the likelihood weighting with its variance from
    the times removed.

    Args:
        weighting: as above; ``"simple"`` needs a `NetworkScore`.
        times: how the times are spread.
        t_min: smallest training time; by default the process's own.
        t_max: largest training time, likewise.
        law: law of the times; `UniformTime` by default.
        process: the forward process, where the score is not a `NetworkScore` and so does not know it.
        importance: divide by the density of ``law``.
        antithetic: noise every sample by both signs of its noise.
        sigma_data: for ``"edm"``; a `NetworkScore` has its own.

    Raises:
        ValueError: unknown ``weighting`` or ``times``; a time or ``sigma_data`` that is not positive and finite.
    """

    def __init__(
        self,
        weighting: Weighting = "sigma2",
        times: Spread = "uniform",
        t_min: float | None = None,
        t_max: float | None = None,
        *,
        law: AbstractTimeLaw | None = None,
        process: AbstractDiffusion | None = None,
        importance: bool = False,
        antithetic: bool = False,
        sigma_data: float = 1.0,
    ) -> None:
        if callable(weighting):
            self._weight: _Weight = _Given(weighting)
        else:
            self._weight = choice(_WEIGHTINGS | {"edm": _Edm(sigma_data)}, weighting, "weighting")
        self._times = TrainingTimes(process, times, t_min, t_max, law)
        self._weighting, self._importance, self._antithetic = weighting, bool(importance), bool(antithetic)

    @property
    def process(self) -> AbstractDiffusion | None:
        """The forward process that was given."""
        return self._times.process

    def per_sample(self, score: Score, x0: Tensor, *, seed: int, first_sample: int = 0) -> Annotated[Tensor, "batch"]:
        """Losses ``(batch,)``, each the mean over the elements of one sample.

        Raises:
            TypeError: ``x0`` is not float32 or float64; the process is not known; ``"simple"`` without a
                `NetworkScore`.
            ValueError: ``x0`` has no batch axis, or the training interval is empty.
        """
        return self._loss(score, x0, seed, first_sample, "none")

    def __call__(self, score: Score, x0: Tensor, *, seed: int, first_sample: int = 0) -> Annotated[Tensor, ""]:
        """The mean of `per_sample`, whose kernel makes the gradient in the same pass; raises what that does."""
        return self._loss(score, x0, seed, first_sample, "mean")

    def times(self, score: Score, x0: Tensor, *, seed: int, first_sample: int = 0) -> Annotated[Tensor, "batch"]:
        """Times ``(batch,)`` in the dtype of ``x0``.

        Raises:
            ValueError: the training interval is empty.
        """
        return self._times.draw(score, x0, seed=seed, first_sample=first_sample)

    def __repr__(self) -> str:
        weighting = repr(self._weighting) if isinstance(self._weighting, str) else name_of(self._weighting)
        more = f", sigma_data={self._weight.sigma_data}" if isinstance(self._weight, _Edm) else ""
        more += ", importance=True" if self._importance else ""
        more += ", antithetic=True" if self._antithetic else ""
        return f"DenoisingScoreMatching(weighting={weighting}, {self._times!r}{more})"

    def _loss(self, score: Score, x0: Tensor, seed: int, first_sample: int, reduction: str) -> Tensor:
        process = self._times.process_of(score)
        check_data(x0)
        t = self.times(score, x0, seed=seed, first_sample=first_sample)
        # The noise is made inside both kernels, and again for the gradient: no tensor of it exists.
        place: Place = {"seed": seed, "stream": Stream.PERTURBATION, "first_path": first_sample, "step": 0}
        alpha, sigma = process.alpha(t), process.sigma(t)
        losses = []
        for sign in (1.0, -1.0) if self._antithetic else (1.0,):
            x_t = perturb(x0, alpha, sign * sigma, **place)
            output, p, q, weight = self._weight(score, process, x_t, t)
            if self._importance:
                weight = weight * self._times.ratio(process, t)
            clean = None if isinstance(p, float) and p == 0.0 else x0
            losses.append(dsm_loss(output, clean, p, sign * q, weight, reduction=reduction, **place))
        return losses[0] if len(losses) == 1 else 0.5 * (losses[0] + losses[1])


def _sigma2(score: Score, process: AbstractDiffusion, x_t: Tensor, t: Tensor) -> _Regression:
    """``(sigma s + z)^2``: the squared error of the noise, through whatever the network predicts."""
    if isinstance(score, NetworkScore):
        p, q, gain = score.target_coefficients(x_t, t)
        return _Regression(score.output(x_t, t), p, q, gain**2)
    sigma, s = process.sigma(t), score(x_t, t)
    check_drift(s, x_t, t, "score")
    return _Regression(s, 0.0, -1.0 / sigma, sigma.square())


def _likelihood(score: Score, process: AbstractDiffusion, x_t: Tensor, t: Tensor) -> _Regression:
    noise = _sigma2(score, process, x_t, t)
    return noise._replace(weight=noise.weight * log_snr_slope(process, t))


def _simple(score: Score, process: AbstractDiffusion, x_t: Tensor, t: Tensor) -> _Regression:
    if not isinstance(score, NetworkScore):
        raise TypeError(
            f"weighting='simple' compares network outputs, and a {type(score).__name__} has none; wrap the network in "
            "a NetworkScore, or choose weighting='sigma2'"
        )
    p, q, _ = score.target_coefficients(x_t, t)
    return _Regression(score.output(x_t, t), p, q, 1.0)


@final
class _Edm:
    """``(1 + (r / sigma_data)^2) (sigma s + z)^2``: Karras' weight of an error in the data, as one of the noise."""

    def __init__(self, sigma_data: float) -> None:
        if not 0 < sigma_data < math.inf:
            raise ValueError(f"sigma_data must be positive and finite, got {short(sigma_data)}")
        self.sigma_data = float(sigma_data)

    def __call__(self, score: Score, process: AbstractDiffusion, x_t: Tensor, t: Tensor) -> _Regression:
        noise = _sigma2(score, process, x_t, t)
        scale = score.sigma_data if isinstance(score, NetworkScore) else self.sigma_data
        ratio = process.sigma(t) / (process.alpha(t) * scale)
        return noise._replace(weight=noise.weight * (1.0 + ratio.square()))


@final
class _Given:
    """``weight(t) (s + z / sigma)^2`` with a function of the user's."""

    def __init__(self, weight: Callable[[Tensor], Tensor]) -> None:
        self._weight = weight

    def __call__(self, score: Score, process: AbstractDiffusion, x_t: Tensor, t: Tensor) -> _Regression:
        weight = self._weight(t)
        if not isinstance(weight, Tensor) or weight.shape != t.shape:
            got = tuple(weight.shape) if isinstance(weight, Tensor) else type(weight).__name__
            raise ValueError(f"a weighting must give one weight for each time, {tuple(t.shape)}, got {got}")
        noise = _sigma2(score, process, x_t, t)
        return noise._replace(weight=noise.weight * weight / process.sigma(t).square())


_Weight = Callable[[Score, AbstractDiffusion, Tensor, Tensor], _Regression]
_WEIGHTINGS: dict[str, _Weight] = {
    "sigma2": _sigma2,
    "likelihood": _likelihood,
    "simple": _simple,
}


def check_data(x0: Tensor) -> None:
    """Refuses data that is not float32 or float64, or has no batch axis."""
    if x0.dtype not in (torch.float32, torch.float64):
        raise TypeError(
            f"training data must be float32 or float64, got {x0.dtype}; convert it with .float(), and use "
            "torch.autocast where the network should compute in 16 bits"
        )
    if x0.ndim == 0:
        raise ValueError("training data needs a batch axis, (batch, *state); this is a single number")
