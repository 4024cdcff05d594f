"""Objectives for learning scores. Their randomness is a function of a seed and of each sample's number."""

from __future__ import annotations

import abc
import math
from collections.abc import Callable
from typing import Literal, NamedTuple, TypeVar, final

import torch
from jaxtyping import Float
from sdesolve_kernels import Stream, dsm_loss, perturb, uniform
from torch import Tensor

from sdesolve.brownian import Place
from sdesolve.diffusions.base import AbstractDiffusion
from sdesolve.grids import whole_number
from sdesolve.reverse import Score
from sdesolve.scores.network import NetworkScore

T = TypeVar("T")


class Objective(abc.ABC):
    """A loss per training sample, deterministic given ``seed`` and the sample's number.

    Sample ``i`` of a batch has the number ``first_sample + i``, counted over the whole training run. Calling twice with
    the same numbers gives the same loss whatever ran in between, and a batch gives the mean of what its parts give.
    That is what makes a resumed run equal to one that was never interrupted.
    """

    @abc.abstractmethod
    def per_sample(self, score: Score, x0: Tensor, *, seed: int, first_sample: int = 0) -> Float[Tensor, " batch"]:
        """Losses ``(batch,)`` of the data ``x0: (batch, *state)``."""

    @abc.abstractmethod
    def times(self, score: Score, x0: Tensor, *, seed: int, first_sample: int = 0) -> Float[Tensor, " batch"]:
        """The times ``(batch,)`` that `per_sample` draws for the same arguments."""

    @final
    def __call__(self, score: Score, x0: Tensor, *, seed: int, first_sample: int = 0) -> Float[Tensor, ""]:
        """The mean of `per_sample`."""
        return self.per_sample(score, x0, seed=seed, first_sample=first_sample).mean()

    @abc.abstractmethod
    def __repr__(self) -> str:
        """Names the objective and all its settings; a checkpoint is resumed only under the same text."""


class TimeLaw(abc.ABC):
    """A law of training times on ``[t_min, t_max]``, given by its quantile function."""

    @abc.abstractmethod
    def quantile(self, u: Tensor, process: AbstractDiffusion, t_min: float, t_max: float) -> Tensor:
        """The time below which a share ``u`` of the times lie; increasing, elementwise, float64."""


@final
class UniformTime(TimeLaw):
    """Times uniform on ``[t_min, t_max]``."""

    def quantile(self, u: Tensor, process: AbstractDiffusion, t_min: float, t_max: float) -> Tensor:
        return t_min + (t_max - t_min) * u


@final
class LogNormalNoise(TimeLaw):
    """``log(sigma / alpha) ~ N(mean, std^2)``, cut off at ``t_min`` and ``t_max`` (Karras et al. 2022, table 1).

    The law for `EDM`, whose time is the noise level itself: uniform times up to 80 would hardly ever visit the noise
    levels at which data of unit scale takes shape.

    Raises:
        ValueError: ``std`` is not positive and finite, or ``mean`` is not finite.
    """

    def __init__(self, mean: float = -1.2, std: float = 1.2) -> None:
        if not (math.isfinite(mean) and 0 < std < math.inf):
            raise ValueError(f"a law of log noise levels needs a finite mean and std > 0, got mean={mean}, std={std}")
        self.mean, self.std = float(mean), float(std)

    def quantile(self, u: Tensor, process: AbstractDiffusion, t_min: float, t_max: float) -> Tensor:
        # The inverse of log_snr from a table: between its nodes the law deviates slightly, which biases nothing that a
        # choice of training times could bias.
        log_t = torch.linspace(math.log(t_min), math.log(t_max), 1025, dtype=torch.float64, device=u.device)
        level = torch.special.ndtr((-0.5 * process.log_snr(log_t.exp()) - self.mean) / self.std)
        v = level[0] + (level[-1] - level[0]) * u
        k = torch.searchsorted(level, v).clamp(1, len(level) - 1)
        low, high = level[k - 1], level[k]
        share = ((v - low) / (high - low).clamp_min(1e-300)).clamp(0.0, 1.0)
        return torch.lerp(log_t[k - 1], log_t[k], share).exp()


class _Regression(NamedTuple):
    """A loss per sample ``weight mean (output - p x_0 - q z)^2``; each coefficient a number or ``(batch,)``."""

    output: Tensor
    p: Tensor | float
    q: Tensor | float
    weight: Tensor | float


Weighting = Literal["sigma2", "likelihood", "simple"]
Spread = Literal["uniform", "antithetic", "stratified"]


@final
class DenoisingScoreMatching(Objective):
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
    ================  ==================================  =========================================================

    The minimum over scores is the exact score, and it is not zero: the variance of ``z`` given ``x_t`` remains.

    Times follow ``law``, spread over the samples in one of three ways. All three give each sample the same law:

    - ``"uniform"``: independently.
    - ``"antithetic"``: samples ``2 k`` and ``2 k + 1`` get the quantiles ``u`` and ``1 - u``.
    - ``"stratified"``: sample ``i`` gets the base-2 van der Corput point of ``i``, all rotated by one uniform number
      per seed. Any ``2^k`` successive samples that start at a multiple of ``2^k`` then have equally spaced quantiles
      (Kingma et al. 2021, appendix I.1, for one batch; here it holds for batches of every size at once).

    Args:
        weighting: as above; ``"simple"`` needs a `NetworkScore`.
        times: how the times are spread.
        t_min: smallest training time; by default the process's own.
        t_max: largest training time, likewise.
        law: law of the times; `UniformTime` by default.
        process: the forward process, where the score is not a `NetworkScore` and so does not know it.

    Raises:
        ValueError: unknown ``weighting`` or ``times``; a time that is not positive and finite.
    """

    def __init__(
        self,
        weighting: Weighting = "sigma2",
        times: Spread = "uniform",
        t_min: float | None = None,
        t_max: float | None = None,
        *,
        law: TimeLaw | None = None,
        process: AbstractDiffusion | None = None,
    ) -> None:
        self._weight = _choice(_WEIGHTINGS, weighting, "weighting")
        self._spread = _choice(_SPREADS, times, "times")
        for name, value in (("t_min", t_min), ("t_max", t_max)):
            if value is not None and not 0 < value < math.inf:
                raise ValueError(
                    f"{name} must be positive and finite, got {value}: at t = 0 there is no noise to match"
                )
        if law is not None and not isinstance(law, TimeLaw):
            raise TypeError(f"law must be a TimeLaw such as UniformTime(), got {law!r}")
        if process is not None and not isinstance(process, AbstractDiffusion):
            raise TypeError(f"process must be a diffusion such as VP(), got {process!r}")
        self._names = (weighting, times)
        self.t_min, self.t_max = t_min, t_max
        self.law = UniformTime() if law is None else law
        self.process = process

    def per_sample(self, score: Score, x0: Tensor, *, seed: int, first_sample: int = 0) -> Float[Tensor, " batch"]:
        """Losses ``(batch,)``, each the mean over the elements of one sample.

        Raises:
            TypeError: ``x0`` is not float32 or float64; the process is not known; ``"simple"`` without a
                `NetworkScore`.
            ValueError: ``x0`` has no batch axis, or the training interval is empty.
        """
        process = self._process_of(score)
        _check_data(x0)
        t = self.times(score, x0, seed=seed, first_sample=first_sample)
        # The noise is made inside both kernels, and again for the gradient: no tensor of it exists.
        place: Place = {"seed": seed, "stream": Stream.PERTURBATION, "first_path": first_sample, "step": 0}
        x_t = perturb(x0, process.alpha(t), process.sigma(t), **place)
        output, p, q, weight = self._weight(score, process, x_t, t)
        clean = None if isinstance(p, float) and p == 0.0 else x0
        return dsm_loss(output, clean, p, q, weight, reduction="none", **place)

    def times(self, score: Score, x0: Tensor, *, seed: int, first_sample: int = 0) -> Float[Tensor, " batch"]:
        """Times ``(batch,)`` in the dtype of ``x0``.

        Raises:
            ValueError: the training interval is empty.
        """
        process = self._process_of(score)
        t_min = process.t_min if self.t_min is None else self.t_min
        t_max = process.t_max if self.t_max is None else self.t_max
        if not t_min < t_max:
            raise ValueError(f"the training interval is empty: t_min={t_min}, t_max={t_max}")
        whole_number(first_sample, "first_sample", 0)
        u = self._spread(len(x0), seed, first_sample, x0.device)
        return self.law.quantile(u, process, t_min, t_max).to(x0.dtype)

    def __repr__(self) -> str:
        weighting, times = self._names
        law = f"{type(self.law).__name__}({', '.join(f'{k}={v}' for k, v in vars(self.law).items())})"
        return (
            f"DenoisingScoreMatching(weighting={weighting!r}, times={times!r}, t_min={self.t_min}, t_max={self.t_max}, "
            f"law={law})"
        )

    def _process_of(self, score: Score) -> AbstractDiffusion:
        if isinstance(score, NetworkScore):
            if self.process is not None and self.process is not score.process:
                raise ValueError("this loss was made for another process than the score's; leave its process= out")
            return score.process
        if self.process is None:
            raise TypeError(
                f"a score of type {type(score).__name__} does not say which process it belongs to; give it to "
                "DenoisingScoreMatching(process=...), or wrap the network in a NetworkScore"
            )
        return self.process


def _sigma2(score: Score, process: AbstractDiffusion, x_t: Tensor, t: Tensor) -> _Regression:
    """``(sigma s + z)^2``: the squared error of the noise, through whatever the network predicts."""
    if isinstance(score, NetworkScore):
        p, q, gain = score.target_coefficients(x_t, t)
        return _Regression(score.output(x_t, t), p, q, gain**2)
    sigma = process.sigma(t)
    return _Regression(score(x_t, t), 0.0, -1.0 / sigma, sigma.square())


def _likelihood(score: Score, process: AbstractDiffusion, x_t: Tensor, t: Tensor) -> _Regression:
    noise = _sigma2(score, process, x_t, t)
    return noise._replace(weight=noise.weight * process.squared_diffusion(t) / process.sigma(t).square())


def _simple(score: Score, process: AbstractDiffusion, x_t: Tensor, t: Tensor) -> _Regression:
    if not isinstance(score, NetworkScore):
        raise TypeError(
            f"weighting='simple' compares network outputs, and a {type(score).__name__} has none; wrap the network in "
            "a NetworkScore, or choose weighting='sigma2'"
        )
    p, q, _ = score.target_coefficients(x_t, t)
    return _Regression(score.output(x_t, t), p, q, 1.0)


def _independent(batch: int, seed: int, first: int, device: torch.device) -> Tensor:
    return _uniforms(batch, seed, first, device)


def _antithetic(batch: int, seed: int, first: int, device: torch.device) -> Tensor:
    # Pairs are told by the sample's own number, so splitting a batch within a pair changes nothing.
    pairs = (first + batch + 1) // 2 - first // 2
    u = _uniforms(pairs, seed, first // 2, device)
    return torch.stack([u, 1.0 - u], dim=1).flatten()[first % 2 : first % 2 + batch]


def _stratified(batch: int, seed: int, first: int, device: torch.device) -> Tensor:
    i = first + torch.arange(batch, dtype=torch.int64, device=device)
    bits = i & 0xFFFFFFFF
    for shift, mask in ((1, 0x55555555), (2, 0x33333333), (4, 0x0F0F0F0F), (8, 0x00FF00FF), (16, 0x0000FFFF)):
        bits = ((bits >> shift) & mask) | ((bits & mask) << shift)
    rotation = _uniforms(1, seed, 0, device)
    return (bits.double() * 2.0**-32 + rotation) % 1.0


def _uniforms(count: int, seed: int, first: int, device: torch.device) -> Tensor:
    return uniform(
        count, 1, seed=seed, stream=Stream.TIMES, first_path=first, dtype=torch.float64, device=device
    ).squeeze(1)


_WEIGHTINGS: dict[str, Callable[[Score, AbstractDiffusion, Tensor, Tensor], _Regression]] = {
    "sigma2": _sigma2,
    "likelihood": _likelihood,
    "simple": _simple,
}
_SPREADS: dict[str, Callable[[int, int, int, torch.device], Tensor]] = {
    "uniform": _independent,
    "antithetic": _antithetic,
    "stratified": _stratified,
}


def _choice(table: dict[str, T], name: str, what: str) -> T:
    if name not in table:
        raise ValueError(f"{what}={name!r} is unknown; choose one of {', '.join(map(repr, table))}")
    return table[name]


def _check_data(x0: Tensor) -> None:
    if x0.dtype not in (torch.float32, torch.float64):
        raise TypeError(
            f"training data must be float32 or float64, got {x0.dtype}; convert it with .float(), and use "
            "torch.autocast where the network should compute in 16 bits"
        )
    if x0.ndim == 0:
        raise ValueError("training data needs a batch axis, (batch, *state); this is a single number")
