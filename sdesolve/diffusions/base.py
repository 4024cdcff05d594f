"""Linear-Gaussian forward processes: everything that follows from ``alpha(t)`` and ``sigma(t)``."""

from __future__ import annotations

import abc
import math
from typing import NamedTuple, final

import torch
from sdesolve_kernels import Stream, normal
from sdesolve_kernels.library import has_tangent
from sdesolve_kernels.threads import survives_forks
from sdesolve_kernels.transforms import is_transformed
from torch import Tensor

from sdesolve._internal.arguments import number, short
from sdesolve._internal.tables import html_table
from sdesolve.reverse import ProbabilityFlow, ReverseSDE, Score
from sdesolve.sde import AbstractLinearSDE, per_sample


class Marginal(NamedTuple):
    """``x_t | x_0 ~ N(mean, std^2 I)``.

    Attributes:
        mean: shaped as ``x_0``.
        std: broadcasts against ``mean``.
    """

    mean: Tensor
    std: Tensor


class Transition(NamedTuple):
    """``x_t | x_s ~ N(scale x_s, std^2 I)``.

    Attributes:
        scale, std: of the broadcast shape of ``s`` and ``t``.
    """

    scale: Tensor
    std: Tensor


class Prior(NamedTuple):
    """``N(0, std^2 I)``: what the process is taken to have become at ``t_max``.

    Attributes:
        std: of each component.
    """

    std: float

    def sample(
        self,
        shape: tuple[int, ...],
        *,
        seed: int,
        first_path: int = 0,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> Tensor:
        """Draws ``(batch, *state)``; row ``i`` is a function of ``(seed, first_path + i)`` alone."""
        batch, *state = shape
        z = normal(
            batch, math.prod(state), seed=seed, stream=Stream.INITIAL, first_path=first_path, dtype=dtype, device=device
        )
        return self.std * z.reshape(shape)

    def log_prob(self, x: Tensor) -> Tensor:
        """Log density in nats of ``x: (batch, *state)``, shape ``(batch,)``."""
        d = math.prod(x.shape[1:])
        z = x.reshape(x.shape[0], d) / self.std
        return -0.5 * z.square().sum(1) - d * math.log(self.std * math.sqrt(2 * math.pi))


class AbstractDiffusion(AbstractLinearSDE):
    """``dX = f(t) X dt + g(t) dW`` with ``x_t | x_0 ~ N(alpha(t) x_0, sigma(t)^2 I)``, Ito, additive noise.

    Time runs from data (``t = 0``) to noise (``t = t_max``); ``[t_min, t_max]`` is where samplers work by default.
    Subclasses give the log of ``alpha``, ``sigma``, ``f = d log alpha / dt`` and
    ``g^2 = d sigma^2 / dt - 2 f sigma^2``, each written so that nothing cancels as ``t -> 0``.
    Times are tensors of shape ``()`` or ``(batch,)``, or numbers; results have the shape and dtype of the time (float64
    for a number).
    """

    t_min: float
    t_max: float
    data_at: int = 0
    """The time of data on the clock of networks, which `AbstractInterpolant` may have running the other way."""

    @abc.abstractmethod
    def log_alpha(self, t: Tensor | float) -> Tensor:
        """``log alpha(t)``."""

    @abc.abstractmethod
    def sigma(self, t: Tensor | float) -> Tensor:
        """``sigma(t)``, the standard deviation of the noise in ``x_t``; 0 at ``t = 0``."""

    def log_alpha_and_sigma(self, t: Tensor | float) -> tuple[Tensor, Tensor]:
        """Both, for less than two calls where they are made of one number."""
        return self.log_alpha(t), self.sigma(t)

    @abc.abstractmethod
    def time_at_log_snr(self, log_snr: Tensor | float) -> Tensor:
        """The inverse of `log_snr`: the time in ``[0, t_max]`` at which it has this value; 0 for ``inf``.

        Of the shape and dtype of ``log_snr``. Meaningless below ``log_snr(t_max)``. Where there is no closed form,
        `inverse_log_snr` finds it by bisection.
        """

    @property
    @abc.abstractmethod
    def prior(self) -> Prior:
        """The law that sampling starts from at ``t_max``."""

    def prior_at(self, t: float) -> Prior:
        """The law that sampling starts from at a time ``t``; at ``t_max`` `prior`.

        Before it ``N(0, (alpha(t)^2 v + sigma(t)^2) I)``, with the variance ``v`` of the data for which `prior` is the
        law at ``t_max``: 0 on `EDM` and `VE`, where it is ``N(0, sigma(t)^2 I)``.
        """
        if t >= self.t_max:
            return self.prior
        (alpha, sigma), (alpha_end, sigma_end) = ((float(self.alpha(s)), float(self.sigma(s))) for s in (t, self.t_max))
        excess = (self.prior.std / sigma_end) ** 2 - 1.0
        v = max(excess, 0.0) * (sigma_end / alpha_end) ** 2 if abs(excess) > 1e-9 else 0.0
        return Prior(math.sqrt(alpha**2 * v + sigma**2))

    @abc.abstractmethod
    def time_grid(self, steps: int) -> Tensor:
        """The grid that `sample` uses when given only a number of steps: from ``t_max`` down to ``t_min``, float64."""

    @final
    def __repr__(self) -> str:
        settings = ", ".join(f"{k}={v!r}" for k, v in vars(self).items() if not k.startswith("_"))
        return f"{type(self).__name__}({settings})"

    def _repr_html_(self) -> str:
        ends = [(t, float(self.alpha(t)), float(self.sigma(t))) for t in (self.t_min, self.t_max)]
        at = {f"at t = {t:.4g}": f"alpha {alpha:.4g}, sigma {sigma:.4g}" for t, alpha, sigma in ends}
        return html_table(repr(self), {"law": "x_t = alpha(t) x_0 + sigma(t) z", **at})

    @final
    def identity(self) -> str:
        """The class, with alpha and sigma at three times: tells processes apart, also those made of two lambdas."""
        times = (self.t_min, 0.5 * (self.t_min + self.t_max), self.t_max)
        values = [f"{float(c(t)):.6g}" for t in times for c in (self.alpha, self.sigma)]
        clock = ", data at 1" if self.data_at else ""
        return f"{type(self).__name__} with alpha and sigma {', '.join(values)}{clock}"

    @final
    def alpha(self, t: Tensor | float) -> Tensor:
        """``alpha(t)``, the scale of the data in ``x_t``; 1 at ``t = 0``."""
        return self.log_alpha(t).exp()

    @final
    def log_snr(self, t: Tensor | float) -> Tensor:
        """``log(alpha^2 / sigma^2)``; decreases with time, ``inf`` at ``t = 0``."""
        return 2.0 * (self.log_alpha(t) - self.sigma(t).log())

    @final
    def marginal(self, x0: Tensor, t: Tensor | float) -> Marginal:
        """The law of ``x_t`` given ``x_0``: mean ``alpha(t) x_0`` and standard deviation ``sigma(t)``."""
        t = as_time(t)
        alpha, sigma = self.alpha(t).to(x0.dtype), self.sigma(t).to(x0.dtype)
        return Marginal(per_sample(alpha, x0) * x0, per_sample(sigma, x0))

    @final
    def transition(self, s: Tensor | float, t: Tensor | float) -> Transition:
        """The law of ``x_t`` given ``x_s`` for ``s <= t``.

        ``scale = alpha_t / alpha_s`` and ``std^2 = sigma_t^2 - scale^2 sigma_s^2``, in float64 whatever the dtype of
        the times: as ``s -> t`` the difference cancels (by way of log-SNRs too), and in float32 that would cost 4e-5 of
        ``std`` over a thousandth of the time range already. The result has the dtype of the times.

        Raises:
            ValueError: ``s > t`` anywhere (checked where the times are on the host).
        """
        s, t = as_time(s), as_time(t)
        if s.device.type == t.device.type == "cpu" and bool((s > t).any()):
            raise ValueError(f"a transition goes forwards, from s to t >= s; got s={s.tolist()}, t={t.tolist()}")
        dtype = torch.result_type(s, t)
        s, t = s.double(), t.double()
        scale = (self.log_alpha(t) - self.log_alpha(s)).exp()
        sigma_t, scaled = self.sigma(t), scale * self.sigma(s)
        variance = ((sigma_t - scaled) * (sigma_t + scaled)).clamp_min(0.0)
        return Transition(scale.to(dtype), variance.sqrt().to(dtype))

    @final
    def reverse(self, score: Score, stochasticity: float = 1.0) -> ReverseSDE:
        """The reverse-time SDE driven by ``score``; ``stochasticity`` scales its noise (`ReverseSDE`)."""
        return ReverseSDE(self, score, stochasticity)

    @final
    def probability_flow(self, score: Score) -> ProbabilityFlow:
        """The ODE with the same marginals (`ProbabilityFlow`)."""
        return ProbabilityFlow(self, score)

    @final
    @survives_forks
    def sample_prior(
        self,
        shape: tuple[int, ...],
        *,
        seed: int,
        first_path: int = 0,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> Tensor:
        """Draws start states ``(batch, *state)`` from `prior` (`Prior.sample`)."""
        return self.prior.sample(shape, seed=seed, first_path=first_path, dtype=dtype, device=device)


class AbstractInterpolant(AbstractDiffusion):
    """A process whose states ``x = alpha x_0 + sigma z`` move along curves from data to noise, within ``[0, 1]``.

    A network of flow matching predicts the velocity of these curves, ``predicts="flow"``. It may count time from noise
    to data, ``data_at=1``: then it is called at ``s = 1 - t``, and its velocity is ``dx/ds``. Everything else here,
    solvers, grids, exact scores and ``t_min`` and ``t_max``, counts ``t`` from data to noise.
    """

    @abc.abstractmethod
    def velocity_rates(self, t: Tensor | float) -> tuple[Tensor, Tensor]:
        """``d alpha / dt`` and ``d sigma / dt``, finite on all of ``[0, t_max]``."""


def check_data_at(data_at: int) -> int:
    """Refuses what is not 0 or 1."""
    if isinstance(data_at, bool) or data_at not in (0, 1):
        raise ValueError(f"data_at must be 0 or 1, the time of data on the clock of the network, got {short(data_at)}")
    return int(data_at)


def inverse_log_snr(process: AbstractDiffusion, log_snr: Tensor | float) -> Tensor:
    """The time in ``[0, t_max]`` at which the log-SNR of ``process`` has this value, by bisection in float64.

    Exact to the last bit that ``process.log_snr`` resolves; 0 where the value is above all others, ``t_max`` where it
    is below them. Waits for the device, if ``log_snr`` is not on the host.

    Args:
        process: one whose `AbstractDiffusion.log_snr` falls with time.
        log_snr: any shape, which the result has too.
    """
    given = as_time(log_snr)
    with torch.no_grad():
        log_snr = given.detach()
        low, high = torch.zeros_like(log_snr, dtype=torch.float64), torch.full_like(log_snr, process.t_max).double()
        while True:
            middle = 0.5 * (low + high)
            if not bool(((middle > low) & (middle < high)).any()):
                break
            noisier = (process.log_snr(middle) < log_snr).detach()
            low, high = low.where(noisier, middle), high.where(~noisier, middle)
        t = high.where(log_snr < math.inf, 0.0)
    return implicit_time(process, t.detach(), 0.5 * given.double()).to(given.dtype)


def implicit_time(process: AbstractDiffusion, t: Tensor, half: Tensor) -> Tensor:
    """``t``, at which half the log-SNR of ``process`` is ``half``, with the derivatives that this equation gives it.

    What a search finds depends on its values by comparisons, which have no derivative. Two steps of Newton's method
    from there change no value and have the first three derivatives of the solution, with respect to ``half`` and to
    what the process is made of: ``d lambda / dt = -g^2 / (2 sigma^2)``. None at zero noise and outside of the process.

    Args:
        process: any.
        t: as found, without derivatives; they are not looked at.
        half: half the log-SNR, of the shape of ``t``.
    """
    now = _half_log_snr(process, t)
    if not (is_transformed() or now.requires_grad or half.requires_grad or has_tangent(now, half)):
        return t
    with torch.no_grad():
        inside = (process.sigma(t) > 0) & (process.squared_diffusion(t) > 0)
        inside &= (_half_log_snr(process, t) - half).abs() < 1e-3
        inside, elsewhere = inside.detach(), torch.full_like(t, 0.5 * process.t_max)
        level = _half_log_snr(process, elsewhere).detach()
    # Times without a derivative are solved for elsewhere: what is infinite there would make it nan.
    solution, half = torch.where(inside, t, elsewhere), torch.where(inside, half, level)
    for _ in range(2):
        slope = -0.5 * process.squared_diffusion(solution) / process.sigma(solution).square()
        solution = solution - (_half_log_snr(process, solution) - half) / slope
    return t + torch.where(inside, solution - solution.detach(), 0.0)


def _half_log_snr(process: AbstractDiffusion, t: Tensor) -> Tensor:
    return process.log_alpha(t) - process.sigma(t).log()


def as_time(t: Tensor | float) -> Tensor:
    """``t`` as a tensor; numbers become float64, which in a 0-d tensor leaves the dtype of a state it multiplies."""
    return t if isinstance(t, Tensor) else torch.tensor(t, dtype=torch.float64, device="cpu")


def check_times(t_min: float, t_max: float) -> None:
    """Refuses a working interval that is not ``0 < t_min < t_max < inf``."""
    if not (0.0 < number(t_min, "t_min") < number(t_max, "t_max") < math.inf):
        raise ValueError(f"the working interval needs 0 < t_min < t_max < inf, got t_min={t_min}, t_max={t_max}")


def check_positive(**parameters: float) -> None:
    """Refuses schedule parameters that are not positive and finite."""
    for name, value in parameters.items():
        if not (0.0 < number(value, name) < math.inf):
            raise ValueError(f"{name} must be positive and finite, got {short(value)}")
