"""Stochastic interpolants between two laws, and the networks that learn their velocity."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, NoReturn, final

import torch
from torch import Tensor, nn

from sdesolve._internal.arguments import kind_of, number, short
from sdesolve._internal.derivatives import jvp
from sdesolve.diffusions.base import as_time
from sdesolve.reverse import evaluated
from sdesolve.sde import per_sample

Function = Callable[[Tensor], Tensor]
_END = 1e-6  # how far coefficients may be from 0 and 1 at the ends


class Coefficients(NamedTuple):
    """``alpha``, ``beta``, ``gamma``, ``alpha'``, ``beta'`` and ``gamma gamma'`` at some times, of their shape."""

    alpha: Tensor
    beta: Tensor
    gamma: Tensor
    alpha_rate: Tensor
    beta_rate: Tensor
    gamma_product: Tensor

    def like(self, x: Tensor) -> Coefficients:
        """In the dtype of ``x``, and broadcast against it."""
        return Coefficients(*(per_sample(c.to(x.dtype), x) for c in self))


@final
class StochasticInterpolant:
    r"""``x_t = alpha(t) x_0 + beta(t) x_1 + gamma(t) z`` from a source at ``t = 0`` to a target at ``t = 1``.

    ``z ~ N(0, I)`` is latent noise, independent of both ends. With ``v = E[alpha' x_0 + beta' x_1 | x_t]`` and ``e =
    E[z | x_t]``, the law of ``x_t`` is that of the flow of velocity ``b = v + gamma' e``, its score is ``s = -e /
    gamma``, and ``dX = (b + eps^2 s / 2) dt + eps dW`` has these marginals for every ``eps(t)`` (`FlowSDE`). Albergo,
    Boffi and Vanden-Eijnden 2023, theorem 6, eqs. 2.10 to 2.14 and corollary 10.

    By default ``alpha = 1 - t``, ``beta = t`` and ``gamma = noise sqrt(t (1 - t))``: Brownian bridges of volatility
    ``noise``, which bridge matching and Schroedinger bridges are made of. ``noise=0`` is conditional flow matching
    along straight lines, a flow without a score.

    Args:
        noise: the volatility above.
        alpha: 1 at ``t = 0`` and 0 at ``t = 1``, elementwise in a tensor of times, differentiable.
        beta: 0 and 1.
        gamma: 0 and 0, positive between, in place of ``noise``.
        t_min: networks are trained, and called, within ``[t_min, 1 - t_min]``.

    Raises:
        TypeError: a coefficient that is no function, or returns something else than a tensor of the times' shape.
        ValueError: one of another value at an end; ``noise`` negative, or given with ``gamma``; a ``gamma`` that is not
            positive between; ``t_min`` outside (0, 1/2).
    """

    def __init__(
        self,
        noise: float | None = None,
        *,
        alpha: Function | None = None,
        beta: Function | None = None,
        gamma: Function | None = None,
        t_min: float = 1e-3,
    ) -> None:
        if noise is not None and gamma is not None:
            raise ValueError("noise is the volatility of gamma = noise sqrt(t (1 - t)); give it or gamma")
        self.noise = None if gamma is not None else number(1.0 if noise is None else noise, "noise")
        if self.noise is not None and not 0.0 <= self.noise < float("inf"):
            raise ValueError(f"noise must be finite and not negative, got {short(noise)}")
        if not 0.0 < number(t_min, "t_min") < 0.5:
            raise ValueError(f"t_min must lie in (0, 1/2), got {short(t_min)}")
        self.t_min = float(t_min)
        self._alpha, self._beta, self._gamma = alpha or _falling, beta or _rising, gamma
        self._check()

    @property
    def has_score(self) -> bool:
        """Whether there is latent noise."""
        return self.noise != 0.0

    @property
    def is_bridge(self) -> bool:
        """Whether it is a mixture of Brownian bridges: ``alpha``, ``beta`` and ``gamma`` are those by default."""
        return self._alpha is _falling and self._beta is _rising and self._gamma is None

    def coefficients(self, t: Tensor | float) -> Coefficients:
        """At times ``()`` or ``(batch,)``, computed in float64 and returned in the dtype of the times."""
        t = as_time(t)
        s = t.double().contiguous()
        one = torch.ones_like(s)
        (alpha, alpha_rate), (beta, beta_rate) = (jvp(f, s, one) for f in (self._alpha, self._beta))
        if self._gamma is None:
            assert self.noise is not None
            gamma = self.noise * (s * (1.0 - s)).clamp_min(0.0).sqrt()
            product = 0.5 * self.noise**2 * (1.0 - 2.0 * s)
        else:
            gamma, rate = jvp(self._gamma, s, one)
            product = gamma * rate
        return Coefficients(*(c.to(t.dtype) for c in (alpha, beta, gamma, alpha_rate, beta_rate, product)))

    def between(self, x0: Tensor, x1: Tensor, z: Tensor, t: Tensor | float) -> Tensor:
        """``x_t``, of the shape of ``x0``, ``x1`` and ``z``, ``(batch, *state)``."""
        c = self.coefficients(t).like(x0)
        return c.alpha * x0 + c.beta * x1 + c.gamma * z

    def identity(self) -> str:
        """The coefficients at three times, which tell interpolants apart."""
        c = self.coefficients(torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64, device="cpu"))
        return "interpolant with " + ", ".join(f"{float(v):.6g}" for part in c[:3] for v in part)

    def __repr__(self) -> str:
        return f"StochasticInterpolant(<{self.identity()}>, t_min={self.t_min:g})"

    def _check(self) -> None:
        t = torch.linspace(0.0, 1.0, 257, dtype=torch.float64, device="cpu")
        for name, function in (("alpha", self._alpha), ("beta", self._beta), ("gamma", self._gamma)):
            if function is None:
                continue
            if not callable(function):
                raise TypeError(f"{name} must be a function of a tensor of times, got {kind_of(function)}")
            values = function(t)
            if not isinstance(values, Tensor) or values.shape != t.shape:
                got = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
                raise TypeError(f"{name}(t) must return a tensor of the shape of t, {tuple(t.shape)}, got {got}")
            first, last = float(values[0]), float(values[-1])
            expected = {"alpha": (1.0, 0.0), "beta": (0.0, 1.0), "gamma": (0.0, 0.0)}[name]
            if not (abs(first - expected[0]) < _END and abs(last - expected[1]) < _END):
                turned = abs(first - expected[1]) < _END and abs(last - expected[0]) < _END
                hint = ": the source is at t = 0 and the target at t = 1, and here they are exchanged" if turned else ""
                raise ValueError(
                    f"{name} must go from {expected[0]:g} at t = 0 to {expected[1]:g} at t = 1, got {first:.6g} and "
                    f"{last:.6g}{hint}"
                )
            good = values.isfinite() if name != "gamma" else values.isfinite() & (values > 0)
            if not bool(good[1:-1].all()):
                k = int((~good[1:-1]).nonzero()[0]) + 1
                rule = "positive and finite between, or noise=0" if name == "gamma" else "finite"
                raise ValueError(f"{name} must be {rule}; at t = {float(t[k]):.6g} it is {float(values[k]):.6g}")


@final
class FlowModel(nn.Module):
    """Networks for the velocity, and with latent noise the score, of a `StochasticInterpolant`.

    ``velocity(x, t)`` estimates ``v = E[alpha' x_0 + beta' x_1 | x_t]`` and ``noise(x, t)`` the latent ``e =
    E[z | x_t]``, both of which stay bounded where ``gamma' `` and ``1 / gamma`` do not; `FlowMatching` trains them. It
    is no score: to draw, integrate ``ODE(model.velocity)`` or ``FlowSDE(model, eps)`` from one end to the other.
    Between the ends and ``t_min`` from there the networks are called at that time.

    Args:
        net: of ``v``: a function or module ``(x, t) -> (batch, *state)``, with ``t`` of shape ``(batch,)``.
        interpolant: what it is learned along.
        noise: of ``e``, likewise; left out if and only if there is no latent noise.

    Raises:
        TypeError: an argument of another type.
        ValueError: ``noise`` missing, or given without latent noise.
    """

    def __init__(
        self,
        net: Callable[[Tensor, Tensor], Tensor],
        interpolant: StochasticInterpolant,
        noise: Callable[[Tensor, Tensor], Tensor] | None = None,
    ) -> None:
        super().__init__()
        for name, value in (("net", net), ("noise", noise)):
            if not (callable(value) or (name == "noise" and value is None)):
                raise TypeError(f"{name} must be a function or module of (x, t), got {kind_of(value)}")
        if not isinstance(interpolant, StochasticInterpolant):
            raise TypeError(
                f"interpolant must be a StochasticInterpolant, got {kind_of(interpolant)}; a velocity from data to "
                "normal noise is for NetworkScore(net, process, 'flow')"
            )
        if (noise is not None) != interpolant.has_score:
            rule = "needs a network of it, noise=" if interpolant.has_score else "has none: leave out noise="
            raise ValueError(f"an interpolant {'with' if interpolant.has_score else 'without'} latent noise {rule}")
        self.net, self.interpolant, self.noise = net, interpolant, noise

    def forward(self, x: Tensor, t: Tensor) -> NoReturn:
        raise TypeError(
            "a FlowModel is no score: give model.velocity to ODE, or the model to FlowSDE; model.score has the score"
        )

    def outputs(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor | None]:
        """What the networks return at times ``(batch,)``."""
        t = t.to(x).expand(len(x))
        return evaluated(self.net, x, t), None if self.noise is None else evaluated(self.noise, x, t)

    def velocity(self, x: Tensor, t: Tensor) -> Tensor:
        """``b(x, t)``, of the shape of ``x: (batch, *state)``; ``t`` is ``()`` or ``(batch,)``."""
        return self._parts(x, t)[0]

    def score(self, x: Tensor, t: Tensor) -> Tensor:
        """``grad log p_t(x)``, of the shape of ``x``.

        Raises:
            ValueError: there is no latent noise.
        """
        return self.flow_and_score(x, t)[1]

    def flow_and_score(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Both, by one call of each network; raises what `score` does."""
        b, s = self._parts(x, t)
        if s is None:
            raise ValueError(
                "an interpolant without latent noise has a flow and no score: integrate ODE(model.velocity), or train "
                "along StochasticInterpolant(noise=...)"
            )
        return b, s

    def _parts(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor | None]:
        t_min = self.interpolant.t_min
        t = as_time(t).clamp(t_min, 1.0 - t_min)
        v, e = self.outputs(x, t)
        if e is None:
            return v, None
        c = self.interpolant.coefficients(t if t.ndim == 0 else t.to(x.device)).like(x)
        return v + (c.gamma_product / c.gamma) * e, -e / c.gamma


def _falling(t: Tensor) -> Tensor:
    return 1.0 - t


def _rising(t: Tensor) -> Tensor:
    return 1.0 * t
