"""Time reversal of an SDE with additive noise: reverse-time SDEs, the probability-flow ODE, and all between them."""

from __future__ import annotations

import math
from typing import Protocol, final

from torch import Tensor

from sdesolve._internal.arguments import kind_of, number, short
from sdesolve.sde import (
    AbstractLinearSDE,
    AbstractODE,
    AbstractSDE,
    AbstractSemilinear,
    Calculus,
    Noise,
    Rates,
    apply_diffusion,
    is_matrix,
)


class Score(Protocol):
    """``score(x, t) = grad_x log p_t(x)`` for ``x: (batch, *state)`` and ``t`` of shape ``()`` or ``(batch,)``."""

    def __call__(self, x: Tensor, t: Tensor, /) -> Tensor: ...


def evaluated(score: Score, x: Tensor, t: Tensor) -> Tensor:
    """``score(x, t)``, refused if it is not like ``x``: broadcasting would make something else of it in silence.

    Raises:
        TypeError: no tensor, or one of another dtype.
        ValueError: another shape.
    """
    s = score(x, t)
    if not isinstance(s, Tensor) or s.shape != x.shape or s.dtype != x.dtype:
        got = f"{s.dtype} {tuple(s.shape)}" if isinstance(s, Tensor) else type(s).__name__
        error = ValueError if isinstance(s, Tensor) and s.dtype == x.dtype else TypeError
        raise error(f"score and network must return what is like the state, {x.dtype} {tuple(x.shape)}, got {got}")
    return s


@final
class ReverseSDE(AbstractSemilinear):
    r"""The reverse-time SDE with the marginals of ``forward``, integrated from large ``t`` to small (``dt < 0``).

    For ``dX = f(X, t) dt + g(t) dW`` with marginal densities ``p_t`` and any ``c >= 0``,

        ``dX = [f(X, t) - (1 + c^2)/2 g(t)^2 score(X, t)] dt + c g(t) dW``

    run backwards has the same ``p_t``. ``c = 1`` is Anderson's reversal (Anderson 1982; Song et al. 2021, eq. 6),
    ``c = 0`` the probability-flow ODE (Song et al. 2021, eq. 13; use `ProbabilityFlow`, which ODE solvers accept), and
    other values interpolate or add noise (Zhang and Chen 2023, eq. 5, with lambda = c).

    Args:
        forward: an SDE with additive noise; ``g`` may be a number, a diagonal or a matrix per time.
        score: ``grad_x log p_t(x)``.
        stochasticity: ``c`` above.

    Raises:
        ValueError: the noise of ``forward`` is not additive, or ``stochasticity`` is not positive and finite.
    """

    noise = Noise.ADDITIVE
    calculus = Calculus.ITO

    def __init__(self, forward: AbstractSDE, score: Score, stochasticity: float = 1.0) -> None:
        _check_reversible(forward, score)
        if not (0.0 < number(stochasticity, "stochasticity") < math.inf):
            hint = "; for 0 use probability_flow(score)" if stochasticity == 0 else ""
            raise ValueError(f"stochasticity must be a positive number, got {short(stochasticity)}{hint}")
        self.forward, self.score, self.stochasticity = forward, score, float(stochasticity)
        self.joint = forward.joint

    def drift(self, x: Tensor, t: Tensor) -> Tensor:
        return _reversed_drift(self, x, t, self.stochasticity)[0]

    def diffusion(self, x: Tensor, t: Tensor) -> Tensor:
        return self._scaled(self.forward.diffusion(x, t))

    def drift_and_diffusion(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        f, g = _reversed_drift(self, x, t, self.stochasticity)
        return f, self._scaled(g)

    def _scaled(self, g: Tensor) -> Tensor:
        return g if self.stochasticity == 1.0 else self.stochasticity * g

    def field(self, x: Tensor, t: Tensor) -> Tensor:
        return self.score(x, t)

    def rates(self, t: Tensor) -> Rates | None:
        return _rates(self.forward, t, self.stochasticity)


@final
class ProbabilityFlow(AbstractODE, AbstractSemilinear):
    """The ODE with the marginals of ``forward``: ``dX = [f(X, t) - g(t)^2 score(X, t) / 2] dt``.

    It may be integrated in either direction: from large ``t`` to small it draws samples, from small to large it encodes
    them (Song et al. 2021, eq. 13).

    Args:
        forward: an SDE ``dX = f(X, t) dt + g(t) dW`` with additive noise.
        score: ``score(x, t)``, the gradient of the log-density of ``X(t)``, shaped as ``x``.

    Raises:
        ValueError: the noise of ``forward`` is not additive.
    """

    def __init__(self, forward: AbstractSDE, score: Score) -> None:
        _check_reversible(forward, score)
        self.forward, self.score = forward, score

    def drift(self, x: Tensor, t: Tensor) -> Tensor:
        return _reversed_drift(self, x, t, 0.0)[0]

    def field(self, x: Tensor, t: Tensor) -> Tensor:
        return self.score(x, t)

    def rates(self, t: Tensor) -> Rates | None:
        return _rates(self.forward, t, 0.0)


def _rates(forward: AbstractSDE, t: Tensor, stochasticity: float) -> Rates | None:
    if not isinstance(forward, AbstractLinearSDE):
        return None
    g2 = forward.squared_diffusion(t)
    return Rates(forward.drift_rate(t), -0.5 * (1.0 + stochasticity**2) * g2, stochasticity * g2.sqrt())


def _reversed_drift(sde: ReverseSDE | ProbabilityFlow, x: Tensor, t: Tensor, c: float) -> tuple[Tensor, Tensor]:
    """``f - (1 + c^2)/2 g g^T score``, and ``g``."""
    s = evaluated(sde.score, x, t)
    f, g = sde.forward.drift_and_diffusion(x, t)
    return f - 0.5 * (1.0 + c**2) * _squared_diffusion_product(g, x, s), g


def _squared_diffusion_product(g: Tensor, x: Tensor, s: Tensor) -> Tensor:
    """``g g^T s``."""
    if is_matrix(g, x):
        gT_s = (g * s.unsqueeze(-1)).reshape(len(x), math.prod(x.shape[1:]), g.shape[-1]).sum(1)
        return apply_diffusion(g, x, gT_s)
    return g * g * s


def _check_reversible(forward: AbstractSDE, score: Score) -> None:
    if not callable(score):
        raise TypeError(f"score must be a function of (x, t), got {kind_of(score)}")
    if forward.noise is not Noise.ADDITIVE:
        raise ValueError(
            f"only SDEs with additive noise can be reversed here, this one has {forward.noise} noise: its reversal "
            "needs the divergence of g g^T as well. If g does not depend on x, declare noise='additive'; otherwise "
            "write the reverse drift yourself as an SDE"
        )
    if not forward.has_diffusion:
        raise ValueError(
            "a reversal needs g g^T, and this SDE has its diffusion by products g v alone: give diffusion in place of "
            "diffusion_product, or write the reverse drift yourself as an SDE"
        )
