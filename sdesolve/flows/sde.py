"""SDEs of any stochasticity that share the marginals of a flow."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Protocol, final

import torch
from torch import Tensor

from sdesolve._internal.arguments import kind_of, number, short
from sdesolve.sde import AbstractSDE, Calculus, Noise, per_sample


class Flow(Protocol):
    """What has the velocity of a flow and the score of its marginals."""

    def flow_and_score(self, x: Tensor, t: Tensor, /) -> tuple[Tensor, Tensor]: ...


@final
class FlowSDE(AbstractSDE):
    r"""``dX = [b(X, t) + sign eps(t)^2 s(X, t) / 2] dt + eps(t) dW``, with the marginals of ``dX = b dt``; Ito.

    ``b`` is the velocity of a flow, ``s`` the score of its marginals and ``sign`` the direction of integration: 1
    towards later times, -1 towards earlier ones, which `solve` knows. Albergo, Boffi and Vanden-Eijnden 2023, eqs. 2.21
    and 2.22; Anderson 1982. On `Rectified` with ``eps = c g(t)`` it is ``process.reverse(score, c)``, whose rates have
    no bound at ``t = 1``; those here have, for an ``eps`` that has, and a run may start there.

    Args:
        flow: what has ``flow_and_score(x, t)``: a `NetworkScore` of an interpolant, with the time of its process; a
            `FlowModel` or `ExactInterpolant`, from source to target.
        diffusion: ``eps``, a positive number or a function of ``t``, of its shape. Where the score has no bound, as at
            clean data, it should vanish, or the run end before.

    Raises:
        TypeError: an argument of another type.
        ValueError: a number that is not positive and finite.
    """

    noise = Noise.ADDITIVE
    calculus = Calculus.ITO
    joint = True

    def __init__(self, flow: Flow, diffusion: float | Callable[[Tensor], Tensor]) -> None:
        if not callable(getattr(flow, "flow_and_score", None)):
            raise TypeError(
                "flow must have flow_and_score(x, t), as a NetworkScore on an interpolant, a FlowModel and an "
                f"ExactInterpolant do, got {kind_of(flow)}"
            )
        if not callable(diffusion) and not 0.0 < number(diffusion, "diffusion") < math.inf:
            hint = "; for 0 integrate the flow, an ODE" if diffusion == 0 else ""
            raise ValueError(f"diffusion must be positive and finite, or a function, got {short(diffusion)}{hint}")
        self.flow, self._diffusion = flow, diffusion
        self._sign: float | Tensor | None = None

    def directed(self, sign: float | Tensor) -> FlowSDE:
        made = copy.copy(self)
        made._sign = sign
        return made

    def drift(self, x: Tensor, t: Tensor) -> Tensor:
        """``b + sign eps^2 s / 2``, of the shape of ``x: (batch, *state)``; towards later times unless `directed`."""
        return self.drift_and_diffusion(x, t)[0]

    def diffusion(self, x: Tensor, t: Tensor) -> Tensor:
        """``eps(t)``, ``()`` or ``(batch, 1, ..., 1)``."""
        eps = self._diffusion(t) if callable(self._diffusion) else torch.full_like(t, self._diffusion)
        return per_sample(eps.to(x.dtype), x)

    def drift_and_diffusion(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        b, s = self.flow.flow_and_score(x, t)
        eps = self.diffusion(x, t)
        sign = 1.0 if self._sign is None else self._sign
        sign = per_sample(sign.to(x.dtype), x) if isinstance(sign, Tensor) else sign
        return b + 0.5 * sign * eps.square() * s, eps
