"""Equations whose coefficients depend on where the path was some time ago."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, cast, final

import torch
from torch import Tensor

from sdesolve._internal.arguments import kind_of, number, positional, short
from sdesolve.sde import SDE, AbstractSDE, Calculus, CalculusName, Noise, NoiseName

Pasts = tuple[Tensor, ...]
History = float | Tensor | Callable[..., Any] | None


@final
class DelaySDE(AbstractSDE):
    r"""``dX = f(X, t, X_{t - tau_1}, ...) dt + g(X, t, X_{t - tau_1}, ...) dW``: an SDE, or an ODE, with delays.

    Lags are constant, and whole numbers of the equal steps of the grid: then states of the past are states of the grid,
    and the kinks that a delay carries along fall on it. A ring of the last ``max(lags) / dt`` states is carried.

    Solvers are those that evaluate at the ends of a step alone. `EulerMaruyama`: order 1 for an ODE, strong order 1/2
    and weak order 1 in Ito calculus; strong order 1 where the diffusion depends on time alone. `Heun`: order 2 for an
    ODE; in Stratonovich calculus strong order 1/2 where the diffusion depends on the past, whose noise does not commute
    with that of the present, and otherwise the orders that it has without delays. `EulerHeun`: likewise, order 1 for an
    ODE. Delays are of other times than the noise, so that calculi differ by what the diffusion makes of ``X`` alone.
    Mao 2007, chapter 5; Buckwar 2000, Journal of Computational and Applied Mathematics 125.

    Equations go to later times. Gradients flow through the past to ``x0``, to the history and to what the functions
    are made of. Runs go step by step in torch. A run goes on (``start=``) with the bits of the whole, as the ring is
    part of its state; maps of ``at=`` are seen by delays from their time on, and need `EulerMaruyama`.

    Args:
        drift: ``f(x, t, pasts)``, of the shape of ``x: (batch, *state)``. ``pasts`` is a tuple of states ``(batch,
            *state)``, ``x(t - lag)`` for each of ``lags`` in their order. With ``params``, ``f(x, t, pasts, params)``.
        diffusion: ``g(x, t, pasts)``, shaped as for `SDE`, or ``None`` for an ODE.
        noise: as for `SDE`; ``additive`` noise may depend on the past.
        calculus: as for `SDE`.
        lags: how long ago, above 0: a number or several.
        history: states before the start: ``history(t)`` at one time ``t: ()``, float64, or ``history(t, params)``; or a
            constant: what broadcasts to ``x0``. ``None`` is ``x0`` itself. At the start the state is ``x0``, whatever
            the history is there.

    Raises:
        TypeError: something is no function, no lag is a number.
        ValueError: no lags, or lags that are not positive and finite; an unknown noise type or calculus.

    Example:
        >>> mackey_glass = DelaySDE(
        ...     lambda x, t, pasts: 0.2 * pasts[0] / (1 + pasts[0] ** 10) - 0.1 * x,
        ...     lambda x, t, pasts: 0.02 * x, lags=17.0, history=1.2)
        >>> sol = solve(mackey_glass, x0, 0.0, 170.0, steps=1700, solver=EulerMaruyama(), seed=0)
    """

    def __init__(
        self,
        drift: Callable[..., Tensor],
        diffusion: Callable[..., Any] | None = None,
        noise: NoiseName | None = None,
        calculus: CalculusName = "ito",
        *,
        lags: Any,
        history: History = None,
    ) -> None:
        for name, function in (("drift", drift), ("diffusion", diffusion)):
            if not callable(function) and not (name == "diffusion" and function is None):
                raise TypeError(f"{name} must be a function of (x, t, pasts), got {kind_of(function)}")
            if function is not None and positional(function) == 2:
                raise TypeError(
                    f"{name} must take (x, t, pasts), and this one takes two arguments; without pasts it is of an SDE"
                )
        if diffusion is None and noise not in (None, "none"):
            raise TypeError(f"an equation with {noise} noise needs a diffusion; leave noise out for an ODE")
        self.noise, self.calculus = Noise.NONE, Calculus.ITO
        if diffusion is not None:
            checked = SDE(cast(Any, drift), cast(Any, diffusion), noise, calculus)
            self.noise, self.calculus = checked.noise, checked.calculus
        several = lags.tolist() if isinstance(lags, Tensor) else lags
        several = several if isinstance(several, list | tuple) else [several]
        if not several:
            raise ValueError("lags holds none; an equation without delays is an SDE or ODE")
        self.lags = tuple(number(lag, "each of lags") for lag in several)
        if not all(0.0 < lag < float("inf") for lag in self.lags):
            raise ValueError(f"lags must be positive and finite, got {short(lags)}; the present is x itself")
        if not (history is None or callable(history) or isinstance(history, int | float | Tensor)):
            raise TypeError(f"history must be a function of t, a number or a tensor, got {kind_of(history)}")
        self.history, self._drift, self._diffusion = history, drift, diffusion

    def with_params(self, params: Any) -> DelaySDE:
        """This equation with ``params`` as a last argument of its functions."""
        bound, history = copy.copy(self), self.history
        own, noise = self._drift, self._diffusion
        bound._drift = lambda x, t, pasts: own(x, t, pasts, params)
        bound._diffusion = None if noise is None else lambda x, t, pasts: noise(x, t, pasts, params)
        if callable(history) and positional(history) > 1:
            bound.history = lambda t: history(t, params)
        return bound

    def drift_given(self, x: Tensor, t: Tensor, pasts: Pasts) -> Tensor:
        """``f(x, t, pasts)``."""
        return self._drift(x, t, pasts)

    def diffusion_given(self, x: Tensor, t: Tensor, pasts: Pasts) -> Tensor:
        """``g(x, t, pasts)``."""
        g = 0.0 if self._diffusion is None else self._diffusion(x, t, pasts)
        return torch.as_tensor(g, dtype=x.dtype, device=x.device) if isinstance(g, float | int) else g

    def drift(self, x: Tensor, t: Tensor) -> Tensor:
        raise TypeError(_ALONE)

    def diffusion(self, x: Tensor, t: Tensor) -> Tensor:
        raise TypeError(_ALONE)


_ALONE = "coefficients of a DelaySDE depend on its past, which is known within solve alone"
