"""Single-row samplers of the first order: reverse diffusion, ancestral sampling and DDIM."""

from __future__ import annotations

from typing import Literal, final

import torch
from torch import Tensor

from sdesolve.sde import AbstractSemilinear, Noise
from sdesolve.solvers.base import supports
from sdesolve.solvers.schedule import Schedule
from sdesolve.solvers.tabulated import AbstractSingleRow, Table, single_row


@final
class ReverseDiffusion(AbstractSingleRow):
    """``x' = (2 - f) x + (1 + q^2)/2 G^2 s + q G z`` where ``f x + G z`` is the forward transition over the same step.

    The predictor of Song et al. 2021 (eq. 46), which mirrors a discretised forward process, here with the process's
    exact transition ``f = alpha / alpha'`` and ``G^2 = sigma^2 - f^2 sigma'^2``. For the reverse SDE of any
    stochasticity ``q``, and with ``q = 0`` the flow. On a process with ``alpha = 1`` it is Euler-Maruyama in
    ``sigma^2``. Weak order 1.
    """

    supported = supports(ito=(Noise.NONE, Noise.ADDITIVE))
    strong_order = None
    weak_order = 1.0
    ode_order = 1
    evaluations = 1

    def table(self, sde: AbstractSemilinear, times: Tensor) -> Table:
        p = Schedule.of(self, sde, times)
        q2 = p.stochasticity**2
        f, G2 = p.alpha[:-1] / p.alpha[1:], _transition_variance(p)
        return _clean_end(p, 2.0 - f, 0.5 * (1.0 + q2) * G2, (q2 * G2).sqrt(), sde)


@final
class Ancestral(AbstractSingleRow):
    """Draws ``x'`` from the posterior given ``x`` and the denoised state ``D``: DDPM and SMLD sampling.

    ``x' = alpha'/alpha (x + sigma^2 (1 - r^2) s) + c z`` with ``r = (sigma'/alpha') / (sigma/alpha)``; the mean is that
    of ``x' | x, x_0 = D``. The posterior's own deviation is ``c = sigma' sqrt(1 - r^2)``: right for data at one point,
    and the choice for which this is the exponential integrator of order 1 (`SDEDPMSolverPP` and SEEDS of order 1). The
    deviation of the forward transition, ``sigma sqrt(1 - r^2)``, is right for data of unit variance under VP.

    For the reverse SDE of stochasticity 1. Weak order 1. Ho et al. 2020, eq. 7 and section 3.2; Song et al. 2021,
    appendix F.

    Args:
        variance: ``"posterior"`` or ``"forward"``.
    """

    supported = supports(ito=(Noise.ADDITIVE,))
    stochasticity = 1.0
    strong_order = None
    weak_order = 1.0
    ode_order = None
    evaluations = 1

    def __init__(self, variance: Literal["posterior", "forward"] = "posterior") -> None:
        if variance not in ("posterior", "forward"):
            raise ValueError(f"variance must be 'posterior' or 'forward', got {variance!r}")
        self.variance = variance

    def table(self, sde: AbstractSemilinear, times: Tensor) -> Table:
        p = Schedule.of(self, sde, times)
        a, G2 = p.alpha[1:] / p.alpha[:-1], _transition_variance(p)
        c = G2.sqrt() if self.variance == "forward" else p.sigma[1:] / p.sigma[:-1] * G2.sqrt()
        return _clean_end(p, a, a * G2, c, sde)


@final
class DDIM(AbstractSingleRow):
    """``x' = alpha' D + sqrt(sigma'^2 - c^2) e + c z``, where ``D`` and ``e = -sigma s`` are data and noise predicted.

    ``c = eta sigma' sqrt(1 - r^2)`` with ``r`` as in `Ancestral`: ``eta`` scales the standard deviation, not the
    variance. 0 is the flow, solved exactly for constant ``e``: order 1; 1 is `Ancestral`; between, and for small steps,
    the reverse SDE of stochasticity ``eta``, of weak order 1. Song, Meng and Ermon 2021, eq. 12 and 16.

    Args:
        eta: in [0, 1].
    """

    strong_order = None
    evaluations = 1

    def __init__(self, eta: float = 0.0) -> None:
        if not 0.0 <= eta <= 1.0:
            raise ValueError(f"eta scales the standard deviation of the noise and lies in [0, 1], got {eta}")
        self.eta = self.stochasticity = float(eta)
        self.supported = supports(ito=(Noise.ADDITIVE if eta else Noise.NONE,))
        self.weak_order, self.ode_order = (1.0, None) if eta else (None, 1)

    def table(self, sde: AbstractSemilinear, times: Tensor) -> Table:
        p = Schedule.of(self, sde, times)
        alpha, sigma = p.alpha[1:], p.sigma[1:]
        noise = self.eta**2 * (1.0 - (p.rho[1:] / p.rho[:-1]).square())
        b = p.sigma[:-1] * (alpha * p.rho[:-1] - sigma * (1.0 - noise).sqrt())
        return single_row(times, alpha / p.alpha[:-1], b, sigma * noise.sqrt(), noisy=self.eta > 0)


def _transition_variance(p: Schedule) -> Tensor:
    """``sigma^2 - (alpha sigma' / alpha')^2``, of the forward transition over each step."""
    return p.alpha[:-1].square() * (p.rho[:-1] - p.rho[1:]) * (p.rho[:-1] + p.rho[1:])


def _clean_end(p: Schedule, a: Tensor, b: Tensor, c: Tensor, sde: AbstractSemilinear) -> Table:
    """The table of rows ``(a, b, c)``, with Tweedie's formula for a step to zero noise."""
    clean = p.sigma[1:] == 0
    scale = p.alpha[1:] / p.alpha[:-1]
    a, b = torch.where(clean, scale, a), torch.where(clean, scale * p.sigma[:-1].square(), b)
    return single_row(p.times, a, b, torch.where(clean, 0.0, c), noisy=sde.noise is not Noise.NONE)
