"""A network as a score: the six usual parameterisations and exact conversions between them."""

from __future__ import annotations

import abc
import functools
import math
from collections.abc import Callable
from typing import Literal, NamedTuple, final

import torch
from torch import Tensor, nn

from sdesolve._internal.ahead import numbers_ahead
from sdesolve._internal.arguments import short
from sdesolve._internal.copies import numbers_of
from sdesolve._internal.precision import NARROW, are_networks_in_their_own
from sdesolve.diffusions.base import AbstractDiffusion, AbstractInterpolant
from sdesolve.nn.labels import Given, LabelledNetwork, check_rows
from sdesolve.nn.normalizer import Normalizer
from sdesolve.sde import per_sample

Prediction = Literal["noise", "data", "score", "velocity", "flow", "edm"]


class Coefficients(NamedTuple):
    """``alpha``, ``sigma`` and ``log(sigma / alpha)`` at the times of ``x_t = alpha x_0 + sigma z``.

    ``alpha`` and ``sigma`` broadcast against ``x_t``; ``log_ratio`` has the shape of the time, and is there for
    `PreconditionsEDM` alone; ``turn``, of which there is one with `PredictsFlow` alone, broadcasts too.
    """

    alpha: Tensor
    sigma: Tensor
    log_ratio: Tensor | None
    turn: Turn | None = None


class Turn(NamedTuple):
    """``alpha'``, ``sigma'`` and ``alpha sigma' - alpha' sigma`` on the clock of the network."""

    alpha_rate: Tensor
    sigma_rate: Tensor
    determinant: Tensor


class Target(NamedTuple):
    """What a network's output is to be: ``data x_0 + noise z``. An error ``e`` in it is one of ``gain e`` in the noise.

    Each is a number or broadcasts against the state.
    """

    data: Tensor | float
    noise: Tensor | float
    gain: Tensor | float


class AbstractParameterization(abc.ABC):
    """What the output ``F`` of a network stands for.

    ``data`` and ``noise`` are each written in the form that cancels least, rather than one through the other.
    """

    @abc.abstractmethod
    def inputs(self, x: Tensor, t: Tensor, c: Coefficients) -> tuple[Tensor, Tensor]:
        """What the network is called with: a state and a time."""

    @abc.abstractmethod
    def data(self, F: Tensor, x: Tensor, c: Coefficients) -> Tensor:
        """``E[x_0 | x_t]``."""

    @abc.abstractmethod
    def noise(self, F: Tensor, x: Tensor, c: Coefficients) -> Tensor:
        """``E[z | x_t]``."""

    @abc.abstractmethod
    def target(self, c: Coefficients) -> Target:
        """The ``F`` that is right for one ``(x_0, z)``; its conditional mean is what a perfect network returns."""


class _Unscaled(AbstractParameterization):
    """Parameterisations whose network sees ``x_t`` and ``t`` as they are."""

    @final
    def inputs(self, x: Tensor, t: Tensor, c: Coefficients) -> tuple[Tensor, Tensor]:
        return x, t


@final
class PredictsNoise(_Unscaled):
    """``F = z`` (Ho et al. 2020, eq. 14)."""

    def data(self, F: Tensor, x: Tensor, c: Coefficients) -> Tensor:
        return (x - c.sigma * F) / c.alpha

    def noise(self, F: Tensor, x: Tensor, c: Coefficients) -> Tensor:
        return F

    def target(self, c: Coefficients) -> Target:
        return Target(data=0.0, noise=1.0, gain=1.0)


@final
class PredictsData(_Unscaled):
    """``F = x_0``."""

    def data(self, F: Tensor, x: Tensor, c: Coefficients) -> Tensor:
        return F

    def noise(self, F: Tensor, x: Tensor, c: Coefficients) -> Tensor:
        return (x - c.alpha * F) / c.sigma

    def target(self, c: Coefficients) -> Target:
        return Target(data=1.0, noise=0.0, gain=-c.alpha / c.sigma)


@final
class PredictsScore(_Unscaled):
    """``F = grad log p_t``, in expectation ``-z / sigma`` (Vincent 2011)."""

    def data(self, F: Tensor, x: Tensor, c: Coefficients) -> Tensor:
        return (x + c.sigma * (c.sigma * F)) / c.alpha

    def noise(self, F: Tensor, x: Tensor, c: Coefficients) -> Tensor:
        return -c.sigma * F

    def target(self, c: Coefficients) -> Target:
        return Target(data=0.0, noise=-1.0 / c.sigma, gain=-c.sigma)


@final
class PredictsVelocity(_Unscaled):
    """``F = alpha z - sigma x_0`` (Salimans and Ho 2022, appendix D).

    With ``x_t = alpha x_0 + sigma z`` this is a rotation times ``sqrt(alpha^2 + sigma^2)``, so the inverse divides by
    ``alpha^2 + sigma^2``: 1 for VP, where the paper drops it, and not 1 elsewhere.
    """

    def data(self, F: Tensor, x: Tensor, c: Coefficients) -> Tensor:
        return (c.alpha * x - c.sigma * F) / (c.alpha**2 + c.sigma**2)

    def noise(self, F: Tensor, x: Tensor, c: Coefficients) -> Tensor:
        return (c.sigma * x + c.alpha * F) / (c.alpha**2 + c.sigma**2)

    def target(self, c: Coefficients) -> Target:
        return Target(data=-c.sigma, noise=c.alpha, gain=c.alpha / (c.alpha**2 + c.sigma**2))


@final
class PredictsFlow(_Unscaled):
    """``F = alpha' x_0 + sigma' z``, the velocity of ``x = alpha x_0 + sigma z`` (Lipman et al. 2023, eq. 10).

    On `Rectified` ``z - x_0``. Rates are those on the clock of the network: with ``data_at=1`` those of ``s = 1 - t``.
    """

    def data(self, F: Tensor, x: Tensor, c: Coefficients) -> Tensor:
        assert c.turn is not None
        return (c.turn.sigma_rate * x - c.sigma * F) / c.turn.determinant

    def noise(self, F: Tensor, x: Tensor, c: Coefficients) -> Tensor:
        assert c.turn is not None
        return (c.alpha * F - c.turn.alpha_rate * x) / c.turn.determinant

    def target(self, c: Coefficients) -> Target:
        assert c.turn is not None
        return Target(c.turn.alpha_rate, c.turn.sigma_rate, gain=c.alpha / c.turn.determinant)


@final
class PreconditionsEDM(AbstractParameterization):
    """Karras et al. 2022, eq. 7 and table 1, on ``x_t / alpha`` at noise level ``r = sigma / alpha``.

    ``x_0 = c_skip x_t / alpha + c_out F(c_in x_t / alpha, log(r) / 4)`` with, for data of standard deviation ``s``,
    ``c_skip = s^2 / (r^2 + s^2)``, ``c_out = r s / sqrt(r^2 + s^2)`` and ``c_in = 1 / sqrt(r^2 + s^2)``. Multiplied out
    with ``S^2 = sigma^2 + s^2 alpha^2``, the variance of ``x_t``, nothing is left to divide by ``alpha`` or ``sigma``:
    the network sees ``x_t / S`` and predicts ``(sigma x_0 - s^2 alpha z) / (s S)``, both of unit variance.
    """

    def __init__(self, sigma_data: float) -> None:
        self.s = sigma_data

    def inputs(self, x: Tensor, t: Tensor, c: Coefficients) -> tuple[Tensor, Tensor]:
        assert c.log_ratio is not None
        return x / self._S(c), 0.25 * c.log_ratio

    def data(self, F: Tensor, x: Tensor, c: Coefficients) -> Tensor:
        S = self._S(c)
        return (self.s**2 * c.alpha * (x / S) + self.s * c.sigma * F) / S

    def noise(self, F: Tensor, x: Tensor, c: Coefficients) -> Tensor:
        S = self._S(c)
        return (c.sigma * (x / S) - self.s * c.alpha * F) / S

    def target(self, c: Coefficients) -> Target:
        S = self._S(c)
        return Target(data=c.sigma / (self.s * S), noise=-self.s * c.alpha / S, gain=-self.s * c.alpha / S)

    def _S(self, c: Coefficients) -> Tensor:
        return (c.sigma**2 + (self.s * c.alpha) ** 2).sqrt()


_PARAMETERIZATIONS: dict[str, Callable[[float], AbstractParameterization]] = {
    "noise": lambda sigma_data: PredictsNoise(),
    "data": lambda sigma_data: PredictsData(),
    "score": lambda sigma_data: PredictsScore(),
    "velocity": lambda sigma_data: PredictsVelocity(),
    "flow": lambda sigma_data: PredictsFlow(),
    "edm": PreconditionsEDM,
}


def _check_meaning(predicts: str, process: AbstractDiffusion) -> None:
    """Refuses v-prediction along the curves of flow matching, and the velocity of those elsewhere."""
    if predicts not in ("velocity", "flow"):
        return
    interpolant = isinstance(process, AbstractInterpolant) or _is_straight(process)
    if predicts == "flow" and not interpolant:
        raise ValueError(
            f"predicts='flow' is z - x_0, the velocity of x_t = (1 - t) x_0 + t z: give the process Rectified(), on "
            f"which such a network was trained, or for other curves LinearInterpolant(alpha, sigma). On "
            f"{type(process).__name__} a network of alpha z - sigma x_0 has predicts='velocity'"
        )
    if predicts == "velocity" and interpolant:
        line = "x_t = (1 - t) x_0 + t z" if _is_straight(process) else "an interpolant"
        what = "z - x_0" if _is_straight(process) else "alpha' x_0 + sigma' z"
        raise ValueError(
            f"on {line} a velocity is that of flow matching, {what}: say predicts='flow'. A network "
            "F = alpha z - sigma x_0 goes in by its noise, lambda x, t: (sigma x + alpha F) / (alpha^2 + sigma^2), "
            "with predicts='noise'"
        )


def _is_straight(process: AbstractDiffusion) -> bool:
    times = (process.t_min, 0.5 * (process.t_min + process.t_max), process.t_max)
    return all(abs(float(process.alpha(t)) + float(process.sigma(t)) - 1.0) < 1e-6 for t in times)


_DROPOUT = {"label": "label_dropout=0.1 as well"}
_DROPOUT_OF = "condition_dropout=0.1 and its null value as well"


class _TrainingRecord:
    """What training did to a network, shared by all scores that share the network."""

    always_given: frozenset[str] | None = None


@final
class NetworkScore(nn.Module):
    """``score(x, t) = grad log p_t(x)`` from a network ``net(x, t)``, whatever the network predicts.

    ================  =================================================  ==========================================
    ``predicts``      the network is called with                         and returns an estimate of
    ================  =================================================  ==========================================
    ``"noise"``       ``(x_t, t)``                                       ``z`` in ``x_t = alpha x_0 + sigma z``
    ``"data"``        ``(x_t, t)``                                       ``x_0``
    ``"score"``       ``(x_t, t)``                                       ``grad log p_t``
    ``"velocity"``    ``(x_t, t)``                                       ``alpha z - sigma x_0``
    ``"flow"``        ``(x_t, t)``, or ``(x_t, 1 - t)`` with             ``z - x_0`` on `Rectified`, ``alpha' x_0 +
                      ``data_at=1``, where ``'`` is ``d/ds``             sigma' z`` on `LinearInterpolant`
    ``"edm"``         scaled ``x_t`` and ``log(sigma / alpha) / 4``      a mix of both (`PreconditionsEDM`)
    ================  =================================================  ==========================================

    The conversions are exact for every process, by Tweedie's formula ``E[x_0 | x_t] = (x_t + sigma^2 score) / alpha``
    (Efron 2011). Two things are called velocity: that of v-prediction (Salimans and Ho 2022), ``"velocity"`` here, and
    that of flow matching, along the curves of an interpolant, ``"flow"`` here. Each is refused on the process of the
    other. On an interpolant with ``data_at=1`` networks of every kind are called at ``s = 1 - t``. The score itself is
    ``-noise / sigma`` and grows without bound as ``t -> 0``; `noise` and `data` do not.

    Args:
        net: a function or module ``(x, t) -> F``, with ``x`` and ``F`` of shape ``(batch, *state)`` and ``t`` always of
            shape ``(batch,)``, in the dtype of ``x``.
        process: the forward process.
        predicts: what ``F`` is.
        sigma_data: standard deviation of the data, read by ``"edm"`` only.
        normalizer: the map from data to the states of this score. `train` applies it to what it is given; its weights
            are saved with the score, and ``score.normalizer.inverse(sample(...))`` are samples in units of the data.

    Raises:
        TypeError: ``net`` cannot be called, ``process`` is not a diffusion with alpha and sigma, or ``normalizer`` is
            no `Normalizer`.
        ValueError: ``predicts`` is unknown, or has another meaning on this process; ``sigma_data`` is not positive and
            finite.
    """

    def __init__(
        self,
        net: Callable[[Tensor, Tensor], Tensor],
        process: AbstractDiffusion,
        predicts: Prediction = "noise",
        sigma_data: float = 1.0,
        *,
        normalizer: Normalizer | None = None,
    ) -> None:
        super().__init__()
        if not callable(net):
            raise TypeError(f"net must be a function or module of (x, t), got {type(net).__name__}")
        if not isinstance(process, AbstractDiffusion):
            raise TypeError(f"process must be a diffusion such as VP() or EDM(), got {short(process)}")
        if predicts not in _PARAMETERIZATIONS:
            raise ValueError(
                f"predicts={short(predicts)} is unknown; choose one of {', '.join(map(repr, _PARAMETERIZATIONS))}"
            )
        if not 0 < sigma_data < math.inf:
            raise ValueError(f"sigma_data must be positive and finite, got {short(sigma_data)}")
        _check_meaning(predicts, process)
        if normalizer is not None and not isinstance(normalizer, Normalizer):
            raise TypeError(f"normalizer must be a Normalizer, got {type(normalizer).__name__}")
        self.net, self.process, self.normalizer = net, process, normalizer
        self.predicts, self.sigma_data = predicts, float(sigma_data)
        self._parameterization = _PARAMETERIZATIONS[predicts](self.sigma_data)
        self._training_record = _TrainingRecord()

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """``grad log p_t(x)``: ``x: (batch, *state)``, ``t`` of shape ``()`` or ``(batch,)``."""
        c = self._coefficients(x, t)
        return self._parameterization.noise(self._call(x, t, c), x, c) / -c.sigma

    def noise(self, x: Tensor, t: Tensor) -> Tensor:
        """``E[z | x_t = x]``, shape of ``x``."""
        c = self._coefficients(x, t)
        return self._parameterization.noise(self._call(x, t, c), x, c)

    def data(self, x: Tensor, t: Tensor) -> Tensor:
        """``E[x_0 | x_t = x]``, shape of ``x``: the denoised state."""
        c = self._coefficients(x, t)
        return self._parameterization.data(self._call(x, t, c), x, c)

    def velocity(self, x: Tensor, t: Tensor) -> Tensor:
        """``E[alpha z - sigma x_0 | x_t = x]``, shape of ``x``."""
        c = self._coefficients(x, t)
        F = self._call(x, t, c)
        return c.alpha * self._parameterization.noise(F, x, c) - c.sigma * self._parameterization.data(F, x, c)

    def flow_and_score(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """The velocity ``dx/dt`` of the probability flow of an interpolant, and the score, by one call of the network.

        ``alpha'(t) E[x_0 | x_t] + sigma'(t) E[z | x_t]``, finite at both ends, in the time of the process: towards the
        noise, whatever the clock of the network.

        Raises:
            TypeError: the process is no interpolant.
        """
        if not isinstance(self.process, AbstractInterpolant):
            raise TypeError(
                f"{type(self.process).__name__} is no interpolant such as Rectified(); the flow of a diffusion is "
                "process.probability_flow(score)"
            )
        c = self._coefficients(x, t)
        F = self._call(x, t, c)
        noise = self._parameterization.noise(F, x, c)
        alpha_rate, sigma_rate = (per_sample(r.to(x.dtype), x) for r in self.process.velocity_rates(t.to(x.device)))
        return alpha_rate * self._parameterization.data(F, x, c) + sigma_rate * noise, noise / -c.sigma

    def output(self, x: Tensor, t: Tensor) -> Tensor:
        """``F``: what the network returns, checked."""
        return self._call(x, t, self._coefficients(x, t))

    def target(self, x0: Tensor, z: Tensor, t: Tensor) -> Tensor:
        """The `output` that is right for one ``x_t = alpha x0 + sigma z``, shape of ``x0``; regress on it to train."""
        p, q, _ = self._parameterization.target(self._coefficients(x0, t))
        return p * x0 + q * z

    def target_coefficients(self, x: Tensor, t: Tensor) -> Target:
        """The `Target` for states like ``x`` at times ``t: (batch,)``, each entry a number or ``(batch,)``."""
        target = self._parameterization.target(self._coefficients(x, t))
        return Target(*(c.reshape(-1) if isinstance(c, Tensor) else c for c in target))

    def given(self, label: Tensor | int | None = None, **conditions: Tensor | float | None) -> NetworkScore:
        """The score under a class or other conditions, from a network ``net(x, t, **conditions)`` (`Given`).

        The result shares the network with this score. ``label`` is an integer or ``(batch,)`` of them; the number of
        classes stands for the null class, as does a score that was given nothing. Other conditions go by the names of
        the network's inputs: tensors ``(batch, ...)`` with a row for each sample, ``(1, ...)`` or numbers for all.

        Raises:
            TypeError: the network takes no such input; labels that are not integers, for a `LabelledNetwork`.
            ValueError: the network has no classes; a label outside them.
        """
        score = NetworkScore(
            Given(self.net, label, **conditions), self.process, self.predicts, self.sigma_data,
            normalizer=self.normalizer,
        )  # fmt: skip
        score.training, score._training_record = self.training, self._training_record
        return score

    @property
    def always_given(self) -> frozenset[str] | None:
        """Names of the conditions that every sample had in all that `train` did to this network; None before that.

        Without them the network was never trained. It is saved with the weights, and shared with what `given` returns.
        """
        return self._training_record.always_given

    def record_training(self, always_given: frozenset[str]) -> None:
        """Notes a training in which every sample had these conditions."""
        before = self._training_record.always_given
        self.set_training(always_given if before is None else before & always_given)

    def set_training(self, always_given: frozenset[str] | None) -> None:
        """Sets `always_given`, as for weights that come from a file."""
        self._training_record.always_given = always_given

    def check_conditions(self, samples: int | None = None) -> None:
        """Refuses to leave a condition open that the network was never trained without.

        Args:
            samples: how many there will be; conditions must have a row for each, or one for all.

        Raises:
            ValueError: naming it, or both numbers of rows.
        """
        given = self.net.conditions if isinstance(self.net, Given) else {}
        if samples is not None:
            for name, value in given.items():
                check_rows(name, value, samples)
        net = self.net.net if isinstance(self.net, Given) else self.net
        null = net.classes if isinstance(net, LabelledNetwork) else None
        for name in sorted(self.always_given or ()):
            open_here = name not in given or (
                name == "label" and null is not None and bool((given[name] == null).any())
            )
            if open_here:
                raise ValueError(
                    f"this network was trained with a {name} for every sample, so what it says without one was never "
                    f"trained: give one, score.given({name}=...), or train with {_DROPOUT.get(name, _DROPOUT_OF)}"
                )

    def extra_repr(self) -> str:
        return f"process={type(self.process).__name__}, predicts={self.predicts!r}, sigma_data={self.sigma_data:g}"

    def _coefficients(self, x: Tensor, t: Tensor) -> Coefficients:
        if not x.is_floating_point():
            raise TypeError(f"a score needs a floating-point state, got {x.dtype}; convert it with .float()")
        if not isinstance(t, Tensor) or not t.is_floating_point():
            given = f"a tensor of {t.dtype}" if isinstance(t, Tensor) else repr(t)
            raise TypeError(
                f"a NetworkScore needs times as a floating-point tensor, such as torch.tensor(0.5), got {given}. Steps "
                "of a chain are for a ChainScore; chain.score_from(process, score) makes a score of them from this one"
            )
        if x.ndim == 0 or (t.ndim != 0 and t.shape != x.shape[:1]):
            raise ValueError(
                f"expected x of shape (batch, *state) and t of shape () or (batch,), got x {tuple(x.shape)} and t "
                f"{tuple(t.shape)}"
            )
        key = self.predicts, x.dtype, x.device
        c = numbers_ahead(t, self.process, key, functools.partial(self._at_each, x)) or self._at(x, t)
        alpha, sigma, log_ratio, turn = c
        if log_ratio is not None:
            log_ratio = log_ratio.expand(len(x))
        if t.ndim == 0:
            return Coefficients(alpha, sigma, log_ratio, turn)
        turn = None if turn is None else Turn(*(per_sample(r, x) for r in turn))
        return Coefficients(per_sample(alpha, x), per_sample(sigma, x), log_ratio, turn)

    def _at(self, x: Tensor, t: Tensor) -> Coefficients:
        """The coefficients at any times, of their shape and in the precision of ``x``."""
        t = t if t.ndim == 0 else t.to(x.device)
        # alpha and sigma in the precision of the time, which a solver gives in float64, and only then in that of x.
        log_alpha, sigma = self.process.log_alpha_and_sigma(t)
        log_ratio = None
        if isinstance(self._parameterization, PreconditionsEDM):
            log_ratio = (sigma.log() - log_alpha).to(x)
        alpha, turn = log_alpha.exp(), None
        if isinstance(self._parameterization, PredictsFlow):
            turn = Turn(*(r.to(x.dtype) for r in self._turn(t, alpha, sigma)))
        return Coefficients(alpha.to(x.dtype), sigma.to(x.dtype), log_ratio, turn)

    def _at_each(self, x: Tensor, times: Tensor) -> list[Coefficients]:
        """`_at` each of ``times``, ``(n,)``, in one evaluation; nothing for a process that is not of this library."""
        if numbers_of(self.process) is None:
            return []
        alpha, sigma, log_ratio, turn = self._at(x, times)
        n = len(times)
        ratios = [None] * n if log_ratio is None else log_ratio.expand(n).unbind(0)
        turns = [None] * n if turn is None else map(Turn, *(r.expand(n).unbind(0) for r in turn))
        return list(map(Coefficients, alpha.expand(n).unbind(0), sigma.expand(n).unbind(0), ratios, turns))

    def _turn(self, t: Tensor, alpha: Tensor, sigma: Tensor) -> Turn:
        if isinstance(self.process, AbstractInterpolant):
            alpha_rate, sigma_rate = self.process.velocity_rates(t)
        else:
            sigma_rate = torch.ones_like(t)
            alpha_rate = -sigma_rate
        if self.process.data_at:
            alpha_rate, sigma_rate = -alpha_rate, -sigma_rate
        return Turn(alpha_rate, sigma_rate, alpha * sigma_rate - alpha_rate * sigma)

    def _check_weights(self, x: Tensor, problem: RuntimeError) -> None:
        """Tells a network on another device or in another precision than its state from one that is wrong."""
        weight = next(self.net.parameters(), None) if isinstance(self.net, nn.Module) else None
        if weight is None:
            return
        if weight.device != x.device:
            raise ValueError(
                f"the network's weights are on {weight.device}, the state is on {x.device}; move one of them, or give "
                f"sample device={str(weight.device)!r}"
            ) from problem
        if weight.dtype != x.dtype:
            wide = weight.dtype in (torch.float32, torch.float64)
            other = (
                f"give sample dtype={weight.dtype}" if wide else f"compute in it by torch.autocast(..., {weight.dtype})"
            )
            raise TypeError(
                f"the network's weights are {weight.dtype}, the state is {x.dtype}; convert the network with "
                f".to({x.dtype}){', and' if not wide else ', or'} {other}"
            ) from problem

    def _narrow(self) -> torch.dtype | None:
        """The 16-bit type of the network's weights, if that is what they have."""
        weight = next(self.net.parameters(), None) if isinstance(self.net, nn.Module) else None
        return None if weight is None or weight.dtype not in NARROW else weight.dtype

    def _call(self, x: Tensor, t: Tensor, c: Coefficients) -> Tensor:
        clock = 1.0 - t if self.process.data_at else t
        state, time = self._parameterization.inputs(x, clock.to(x).expand(len(x)), c)
        narrow = self._narrow() if are_networks_in_their_own() else None
        if narrow is not None:
            state, time = state.to(narrow), time if getattr(self.net, "wide_time", False) else time.to(narrow)
        try:
            F = self.net(state, time)
        except RuntimeError as problem:
            self._check_weights(x, problem)
            raise
        if not isinstance(F, Tensor):
            raise TypeError(f"the network must return a tensor, got {type(F).__name__}")
        if F.shape != x.shape:
            hint = "the last layer and any final reshape are the places to look"
            if x.ndim > 1 and F.shape == (len(x), 2 * x.shape[1], *x.shape[2:]):
                hint = "where the second half of its channels is a variance, give lambda x, t: net(x, t).chunk(2, 1)[0]"
            raise ValueError(
                f"the network must return the shape of its state, {tuple(x.shape)}, got {tuple(F.shape)}; {hint}"
            )
        if narrow is not None:
            F = F.to(x.dtype)
        if F.dtype != x.dtype:
            if not torch.is_autocast_enabled(x.device.type):
                raise TypeError(
                    f"the network was given {x.dtype} and returned {F.dtype}; convert the network with "
                    f".to({x.dtype}), or the state to the dtype of the network"
                )
            F = F.to(x.dtype)
        return F
