"""What DDPM and SMLD have in common: a Markov chain of Gaussian steps from data to noise, and its reversal."""

from __future__ import annotations

import abc
import math
from collections.abc import Callable
from typing import Literal, NamedTuple, Protocol, final

import torch
from sdesolve_kernels import Stream, normal, perturb
from sdesolve_kernels.threads import survives_forks
from torch import Tensor, nn

from sdesolve._internal.arguments import short, whole_number
from sdesolve._internal.modes import in_evaluation
from sdesolve.diffusions.base import AbstractDiffusion, Marginal, Prior
from sdesolve.reverse import Score, evaluated
from sdesolve.scores.base import AbstractData, check_state, flat
from sdesolve.sde import per_sample

Interpolation = Callable[[Tensor, Tensor], Tensor]
Variance = Literal["small", "large"] | Interpolation
_FIXED = {"small": 0.0, "large": 1.0}
_ALL_NOISE = -8.0  # log-SNR at which a process has forgotten its data for all that samplers can tell


class StepScore(Protocol):
    """``score(x, k) = grad log q(x_k)`` for ``x: (batch, *state)`` and steps ``k: (batch,)``, int64, from 1 on."""

    def __call__(self, x: Tensor, k: Tensor, /) -> Tensor: ...


class Posterior(NamedTuple):
    """``x_{k-1} | x_k, x_0 ~ N(mean, variance I)``; ``variance`` broadcasts against ``mean``."""

    mean: Tensor
    variance: Tensor


class AbstractChain(abc.ABC):
    r"""``x_k = a_k x_{k-1} + b_k z_k`` for ``k = 1 ... N``, from data ``x_0`` to noise ``x_N``.

    Then ``x_k | x_0 ~ N(alpha_k x_0, sigma_k^2 I)`` with ``alpha_k = a_1 ... a_k`` and
    ``sigma_k^2 = a_k^2 sigma_{k-1}^2 + b_k^2``. All coefficients are float64 and are kept as tables on the host; steps
    ``k`` are an integer or int64 tensors of shape ``()`` or ``(batch,)``.

    Subclasses give the tables. Entry 0 is the data: ``alpha_0 = 1``, ``sigma_0 = 0``.

    Attributes:
        steps: ``N``.
        scale: ``a_k``, ``(N + 1,)``; entry 0 is 1.
        noise: ``b_k``, ``(N + 1,)``; entry 0 is 0.
        alpha: ``alpha_k``, ``(N + 1,)``.
        sigma: ``sigma_k``, ``(N + 1,)``.
    """

    steps: int
    scale: Tensor
    noise: Tensor
    alpha: Tensor
    sigma: Tensor

    @property
    @abc.abstractmethod
    def prior(self) -> Prior:
        """The law that `sample` starts from, in place of that of ``x_N``."""

    @final
    def marginal(self, x0: Tensor, k: Tensor | int) -> Marginal:
        """The law of ``x_k`` given ``x_0``: mean ``alpha_k x_0`` and standard deviation ``sigma_k``.

        Raises:
            ValueError: a step outside ``0 ... N``, if it is known on the host.
        """
        self._check_step(k, 0)
        return Marginal(self.at(self.alpha, k, x0) * x0, self.at(self.sigma, k, x0))

    @final
    def posterior(self, x0: Tensor, x: Tensor, k: Tensor | int) -> Posterior:
        """The law of ``x_{k-1}`` given ``x_k = x`` and ``x_0`` (Ho et al. 2020, eq. 6 and 7, for any ``a``, ``b``).

        ``mean = (alpha_{k-1} b_k^2 x_0 + a_k sigma_{k-1}^2 x_k) / sigma_k^2``,
        ``variance = b_k^2 sigma_{k-1}^2 / sigma_k^2``; at ``k = 1`` that is ``x_0``, without variance.

        Raises:
            ValueError: a step outside ``1 ... N``, if it is known on the host.
        """
        self._check_step(k, 1)
        a, b, before = self.scale[1:], self.noise[1:], self.sigma[:-1]
        total = self.sigma[1:].square()
        k = torch.as_tensor(k) - 1
        of_data, of_state = self.alpha[:-1] * b.square() / total, a * before.square() / total
        mean = self.at(of_data, k, x) * x0 + self.at(of_state, k, x) * x
        return Posterior(mean, self.at((b * before).square() / total, k, x))

    @final
    def mean_before(self, s: Tensor, x: Tensor, k: Tensor | int) -> Tensor:
        """The mean of ``x_{k-1}`` given ``x_k = x`` with score ``s`` there: ``(x + b_k^2 s) / a_k``.

        It is the posterior's mean at ``x_0 = (x + sigma_k^2 s) / alpha_k``, the denoised state.
        """
        return (x + self.at(self.noise.square(), k, x) * s) / self.at(self.scale, k, x)

    @final
    def log_variance(self, x: Tensor, k: Tensor | int, variance: Variance) -> Tensor:
        """Log variance of the reverse step ``x_k -> x_{k-1}``: ``v log b_k^2 + (1 - v) log(posterior variance)``.

        ``"large"`` is ``v = 1``, right for data of unit variance on `DDPM`; ``"small"`` is ``v = 0``, right for data
        that is one point; a function ``v(x, k)`` with values in [0, 1] of the state's shape, or ``(batch, 1, ...)``, is
        a learned variance (Nichol and Dhariwal 2021, eq. 15). At ``k = 1``, where the posterior has no variance, that
        of ``k = 2`` takes its place.

        Raises:
            ValueError: an unknown name.
        """
        b2 = self.noise[1:].square()
        posterior = b2 * (self.sigma[:-1] / self.sigma[1:]).square()
        posterior[0] = posterior[1] if self.steps > 1 else b2[0]
        k = torch.as_tensor(k)
        v = variance(x, k) if callable(variance) else _fixed(variance)
        return v * self.at(b2.log(), k - 1, x) + (1.0 - v) * self.at(posterior.log(), k - 1, x)

    @final
    def perturb(self, x0: Tensor, k: Tensor | int, *, seed: int, first_sample: int = 0, draw: int = 0) -> Tensor:
        """Draws ``x_k`` given ``x_0`` at once; row ``i`` is a function of seed, ``draw`` and ``first_sample + i``.

        Raises:
            ValueError: a step outside ``0 ... N``, if it is known on the host.
        """
        self._check_step(k, 0)
        check_state(x0, tuple(x0.shape[1:]))
        alpha, sigma = (self.at(table, k, x0).reshape(-1).expand(len(x0)) for table in (self.alpha, self.sigma))
        return perturb(x0, alpha, sigma, seed=seed, stream=Stream.PERTURBATION, first_path=first_sample, step=draw)

    @final
    def simulate(self, x0: Tensor, *, seed: int, first_path: int = 0) -> Tensor:
        """The forward chain step by step, ``(N + 1, batch, *state)``, from ``x_0`` on."""
        check_state(x0, tuple(x0.shape[1:]))
        states = [x0]
        for k in range(1, self.steps + 1):
            z = self._noise(x0, k - 1, seed, first_path)
            states.append(self.at(self.scale, k, x0) * states[-1] + self.at(self.noise, k, x0) * z)
        return torch.stack(states)

    @final
    @in_evaluation
    @survives_forks
    def sample(
        self,
        score: StepScore,
        shape: tuple[int, ...],
        *,
        variance: Variance = "small",
        seed: int,
        first_path: int = 0,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> Tensor:
        """Ancestral sampling: from the prior back to ``x_0``, the last step without noise (Ho et al. 2020, alg. 2).

        Args:
            score: `ChainScore`, `score_of` or `score_from`, or another ``score(x, k)``.
            shape: ``(batch, *state)`` of the result.
            variance: of the reverse steps (`log_variance`).
            seed: row ``i`` is a function of ``(seed, first_path + i)`` alone.
            first_path: number of row 0.
            dtype: float32 or float64.
            device: where to sample.

        Raises:
            ValueError: an unknown variance, or a score of another shape.
        """
        with torch.no_grad():
            x = self.prior.sample(shape, seed=seed, first_path=first_path, dtype=dtype, device=device)
            for k in range(self.steps, 0, -1):
                each = torch.full((len(x),), k, dtype=torch.int64, device=x.device)
                mean = self.mean_before(evaluated(score, x, each), x, each)
                if k == 1:
                    return mean
                std = (0.5 * self.log_variance(x, each, variance)).exp()
                x = mean + std * self._noise(x, self.steps - k, seed, first_path)
        raise AssertionError("a chain has at least one step")

    @final
    def score_of(self, data: AbstractData) -> StepScore:
        """The exact score of this data at every step, in closed form."""

        def score(x: Tensor, k: Tensor) -> Tensor:
            check_state(x, data.state_shape)
            alpha, sigma = (self.at(table, k, flat(x)) for table in (self.alpha, self.sigma))
            return data.noised_score(flat(x), alpha, sigma).reshape(x.shape)

        return score

    @final
    def score_from(self, process: AbstractDiffusion, score: Score) -> StepScore:
        """The score of a continuous-time model at this chain's steps.

        Step ``k`` has the law of ``x_t`` scaled by ``sigma_k / sigma(t)`` at the time ``t`` of the same log-SNR, so
        that its score is ``c score(c x, t)`` with ``c = sigma(t) / sigma_k``: exact for any chain and any process.
        Steps with more noise than the process has at ``t_max`` use ``t_max``: a chain ends a little beyond the process
        that it tends to.

        Raises:
            ValueError: the process still has a good part of the data in it at ``t_max``, and the chain has not.
        """
        log_snr = 2.0 * (self.alpha[1:] / self.sigma[1:]).log()
        end = float(process.log_snr(process.t_max))
        if end > max(_ALL_NOISE, float(log_snr[-1]) + 0.2):
            raise ValueError(
                f"the chain ends at log-SNR {float(log_snr[-1]):.6g} and the process at {end:.6g}, where its score is "
                "not known any further: give the process a later end, or the chain less noise"
            )
        times = process.time_at_log_snr(log_snr.clamp(min=end)).clamp(max=process.t_max)
        c = process.sigma(times) / self.sigma[1:]

        def at_step(x: Tensor, k: Tensor) -> Tensor:
            scale = self.at(c, k - 1, x)
            t = times.to(x.device)[k - 1].to(x.dtype)
            return scale * score(scale * x, t)

        return at_step

    @final
    def at(self, table: Tensor, k: Tensor | int, x: Tensor) -> Tensor:
        """Entries ``k`` of a table, in the dtype of ``x`` and so that they broadcast against it."""
        k = torch.as_tensor(k, device=x.device)
        return per_sample(table.to(x.device)[k].to(x.dtype), x)

    def _check_step(self, k: Tensor | int, least: int) -> None:
        """Tables would take -1 for their end. A step on a device is not looked at, which would mean to wait for it."""
        if isinstance(k, Tensor) and (k.device.type != "cpu" or not k.numel()):
            return
        first, last = (int(v) for v in torch.as_tensor(k).aminmax())
        if not least <= first <= last <= self.steps:
            raise ValueError(
                f"steps of this chain run from {least} to {self.steps}, got {first if first < least else last}"
            )

    def _noise(self, x: Tensor, step: int, seed: int, first_path: int) -> Tensor:
        d = x.shape[1:].numel()
        return normal(
            len(x), d, seed=seed, stream=Stream.DRIVING, first_path=first_path, offset=step * d, dtype=x.dtype,
            device=x.device,
        ).reshape(x.shape)  # fmt: skip

    def __repr__(self) -> str:
        # Three levels tell schedules apart: a checkpoint is resumed only under the same text.
        levels = [f"{float(self.sigma[k]):.6g}" for k in (1, (1 + self.steps) // 2, self.steps)]
        return f"{type(self).__name__}(steps={self.steps}, sigma={' ... '.join(levels)})"


@final
class ChainScore(nn.Module):
    """The score of a chain from a network that predicts noise: ``score(x, k) = -net(x, k) / sigma_k``.

    Args:
        net: ``(x, k) -> z`` in ``x_k = alpha_k x_0 + sigma_k z``; ``k: (batch,)`` is given in the dtype of ``x``.
        chain: the chain.

    Raises:
        TypeError: ``net`` cannot be called, or ``chain`` is no chain.
    """

    def __init__(self, net: Callable[[Tensor, Tensor], Tensor], chain: AbstractChain) -> None:
        super().__init__()
        if not callable(net):
            raise TypeError(f"net must be a function or module of (x, k), got {type(net).__name__}")
        if not isinstance(chain, AbstractChain):
            raise TypeError(f"chain must be a DDPM or SMLD, got {short(chain)}")
        self.net, self.chain = net, chain

    def forward(self, x: Tensor, k: Tensor) -> Tensor:
        """``grad log q(x_k)`` at ``x: (batch, *state)``, ``k: (batch,)``.

        Raises:
            TypeError: ``k`` is not whole.
        """
        if k.is_floating_point():
            raise TypeError(
                f"a ChainScore takes steps of its chain, whole numbers from 1 to {self.chain.steps}, got a tensor of "
                f"{k.dtype}; a score at times is a NetworkScore"
            )
        return -evaluated(self.net, x, k.to(x.dtype)) / self.chain.at(self.chain.sigma, k, x)


def check_steps(steps: int) -> int:
    """A number of steps, at least 1."""
    return whole_number(steps, "steps", 1)


def cumulative(scale: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """``alpha_k`` and ``sigma_k`` from tables of ``a_k`` and ``b_k`` that start at ``k = 0``."""
    alpha, variance = [1.0], [0.0]
    for a, b in zip(scale[1:].tolist(), noise[1:].tolist(), strict=True):
        alpha.append(a * alpha[-1])
        variance.append(a * a * variance[-1] + b * b)
    return torch.tensor(alpha, dtype=torch.float64), torch.tensor(variance, dtype=torch.float64).sqrt()


def _fixed(name: str) -> float:
    if name not in _FIXED:
        raise ValueError(f"variance={short(name)} is unknown; choose 'small', 'large' or a function v(x, k) in [0, 1]")
    return _FIXED[name]


def finite_positive(values: Tensor) -> bool:
    """Whether a one-dimensional table of at least one number holds positive finite ones."""
    return values.ndim == 1 and len(values) > 0 and bool(((values > 0) & (values < math.inf)).all())
