"""Laws of training times, and how times are spread over the samples of a batch."""

from __future__ import annotations

import abc
import math
from collections.abc import Callable, Sequence
from typing import Annotated, Literal, TypeVar, final

import torch
from sdesolve_kernels import Stream, uniform
from torch import Tensor

from sdesolve._internal.arguments import short, whole_number
from sdesolve.diffusions.base import AbstractDiffusion
from sdesolve.reverse import Score
from sdesolve.scores.network import NetworkScore

T = TypeVar("T")
Spread = Literal["uniform", "antithetic", "stratified"]


class AbstractTimeLaw(abc.ABC):
    """A law of training times on ``[t_min, t_max]``, given by its quantile function."""

    @abc.abstractmethod
    def quantile(self, u: Tensor, process: AbstractDiffusion, t_min: float, t_max: float) -> Tensor:
        """The time below which a share ``u`` of the times lie; increasing, elementwise, float64."""

    @abc.abstractmethod
    def density(self, t: Tensor, process: AbstractDiffusion, t_min: float, t_max: float) -> Tensor:
        """Density of the law at times ``t``; elementwise.

        Raises:
            ValueError: the law has none.
        """

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{k}={v}' for k, v in vars(self).items())})"


@final
class UniformTime(AbstractTimeLaw):
    """Times uniform on ``[t_min, t_max]``."""

    def quantile(self, u: Tensor, process: AbstractDiffusion, t_min: float, t_max: float) -> Tensor:
        return t_min + (t_max - t_min) * u

    def density(self, t: Tensor, process: AbstractDiffusion, t_min: float, t_max: float) -> Tensor:
        return torch.full_like(t, 1.0 / (t_max - t_min))


@final
class LogNormalNoise(AbstractTimeLaw):
    """``log(sigma / alpha) ~ N(mean, std^2)``, cut off at ``t_min`` and ``t_max`` (Karras et al. 2022, table 1).

    The law for `EDM`, whose time is the noise level itself: uniform times up to 80 would hardly ever visit the noise
    levels at which data of unit scale takes shape.

    Args:
        mean, std: of the logarithm of the noise level.

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

    def density(self, t: Tensor, process: AbstractDiffusion, t_min: float, t_max: float) -> Tensor:
        ends = torch.tensor([t_min, t_max], dtype=torch.float64, device="cpu")
        share = torch.special.ndtr((-0.5 * process.log_snr(ends) - self.mean) / self.std).diff()
        z = (-0.5 * process.log_snr(t) - self.mean) / self.std
        return (
            (-0.5 * z.square()).exp()
            * 0.5
            * log_snr_slope(process, t)
            / (self.std * math.sqrt(2.0 * math.pi) * float(share))
        )


@final
class UniformLogSNR(AbstractTimeLaw):
    """Log-SNRs uniform between those of ``t_min`` and ``t_max``: a density in proportion to ``g^2 / sigma^2``.

    The law of importance sampling for the likelihood weighting, under which its weights are constant times those of
    ``"sigma2"`` (Song, Durkan et al. 2021, section 4.1; Kingma et al. 2021, section 5.1).
    """

    def quantile(self, u: Tensor, process: AbstractDiffusion, t_min: float, t_max: float) -> Tensor:
        high, low = (float(process.log_snr(t)) for t in (t_min, t_max))
        return process.time_at_log_snr(high + (low - high) * u).clamp(t_min, t_max)

    def density(self, t: Tensor, process: AbstractDiffusion, t_min: float, t_max: float) -> Tensor:
        return log_snr_slope(process, t) / float(process.log_snr(t_min) - process.log_snr(t_max))


@final
class NoiseLadder(AbstractTimeLaw):
    """A finite ladder of times, each as likely as the others: one noise level, or several.

    On `EDM`, where time is the noise level, ``NoiseLadder([0.1, 0.3, 1.0])`` is the ladder of sigmas of Song and Ermon
    2019 (eq. 6), and one entry alone Vincent's denoising at one sigma. ``t_min`` and ``t_max`` do not restrict it.

    Args:
        levels: positive times.

    Raises:
        ValueError: no times, or one that is not positive and finite.
    """

    def __init__(self, levels: Sequence[float]) -> None:
        self.levels = tuple(float(level) for level in levels)
        if not self.levels or not all(0.0 < level < math.inf for level in self.levels):
            raise ValueError(f"a ladder needs positive finite times, got {list(levels)}")

    def quantile(self, u: Tensor, process: AbstractDiffusion, t_min: float, t_max: float) -> Tensor:
        if max(self.levels) > process.t_max:
            raise ValueError(
                f"the ladder goes up to t = {max(self.levels)} and {type(process).__name__} ends at {process.t_max}"
            )
        levels = torch.tensor(sorted(self.levels), dtype=torch.float64, device=u.device)
        return levels[(u * len(levels)).long().clamp(max=len(levels) - 1)]

    def density(self, t: Tensor, process: AbstractDiffusion, t_min: float, t_max: float) -> Tensor:
        raise ValueError("a ladder of times has no density, so it cannot stand for times that are uniform")


def log_snr_slope(process: AbstractDiffusion, t: Tensor) -> Tensor:
    """``-d log_snr / dt = g^2 / sigma^2``."""
    return process.squared_diffusion(t) / process.sigma(t).square()


@final
class TrainingTimes:
    """Which times and which process the samples of an objective are noised by.

    Args:
        process: the forward process, where the score is not a `NetworkScore` and so does not know it.
        spread: how times are spread over a batch, ``"uniform"``, ``"antithetic"`` or ``"stratified"``
            (`DenoisingScoreMatching`).
        t_min: smallest training time; by default the process's own.
        t_max: largest training time, likewise.
        law: law of the times; `UniformTime` by default.

    Raises:
        ValueError: an unknown spread; a time that is not positive and finite.
        TypeError: ``process`` or ``law`` of another type.
    """

    def __init__(
        self,
        process: AbstractDiffusion | None = None,
        spread: Spread = "uniform",
        t_min: float | None = None,
        t_max: float | None = None,
        law: AbstractTimeLaw | None = None,
    ) -> None:
        self._spread = choice(SPREADS, spread, "times")
        for name, value in (("t_min", t_min), ("t_max", t_max)):
            if value is not None and not 0 < value < math.inf:
                raise ValueError(
                    f"{name} must be positive and finite, got {short(value)}: at t = 0 there is no noise to match"
                )
        if law is not None and not isinstance(law, AbstractTimeLaw):
            raise TypeError(f"law must be a AbstractTimeLaw such as UniformTime(), got {short(law)}")
        if process is not None and not isinstance(process, AbstractDiffusion):
            raise TypeError(f"process must be a diffusion such as VP(), got {short(process)}")
        self.process, self.spread, self.t_min, self.t_max = process, spread, t_min, t_max
        self.law = UniformTime() if law is None else law

    def draw(self, score: Score, x0: Tensor, *, seed: int, first_sample: int = 0) -> Annotated[Tensor, "batch"]:
        """Times ``(batch,)`` in the dtype of ``x0``.

        Raises:
            ValueError: the training interval is empty.
        """
        process = self.process_of(score)
        t_min, t_max = self.interval(process)
        u = self._spread(len(x0), seed, whole_number(first_sample, "first_sample", 0), x0.device)
        return self.law.quantile(u, process, t_min, t_max).to(x0.dtype)

    def ratio(self, process: AbstractDiffusion, t: Tensor) -> Tensor:
        """The density of uniform times over that of the law: the weights that make up for the law."""
        t_min, t_max = self.interval(process)
        return 1.0 / ((t_max - t_min) * self.law.density(t, process, t_min, t_max))

    def interval(self, process: AbstractDiffusion) -> tuple[float, float]:
        """``t_min`` and ``t_max``."""
        t_min = process.t_min if self.t_min is None else self.t_min
        t_max = process.t_max if self.t_max is None else self.t_max
        if not t_min < t_max:
            raise ValueError(f"the training interval is empty: t_min={t_min}, t_max={t_max}")
        return t_min, t_max

    def process_of(self, score: Score) -> AbstractDiffusion:
        """The process of the score, or the one given."""
        if isinstance(score, NetworkScore):
            ours, theirs = self.process, score.process
            if not (ours is None or ours is theirs or ours.identity() == theirs.identity()):
                raise ValueError("this loss was made for another process than the score's; leave its process= out")
            return theirs
        if self.process is None:
            raise TypeError(
                f"a score of type {type(score).__name__} does not say which process it belongs to; give it to "
                "DenoisingScoreMatching(process=...), or wrap the network in a NetworkScore"
            )
        return self.process

    def __repr__(self) -> str:
        process = "" if self.process is None else f", process=<{self.process.identity()}>"
        return f"times={self.spread!r}, t_min={self.t_min}, t_max={self.t_max}, law={self.law!r}{process}"


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


SPREADS: dict[str, Callable[[int, int, int, torch.device], Tensor]] = {
    "uniform": _independent,
    "antithetic": _antithetic,
    "stratified": _stratified,
}


def choice(table: dict[str, T], name: str, what: str) -> T:
    """The entry of a table of choices, or an error that lists them."""
    if name not in table:
        raise ValueError(f"{what}={short(name)} is unknown; choose one of {', '.join(map(repr, table))}")
    return table[name]
