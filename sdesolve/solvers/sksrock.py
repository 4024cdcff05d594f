"""A stabilised explicit scheme for stiff equations with any noise."""

from __future__ import annotations

import functools
import math
from typing import final

import torch
from torch import Tensor

from sdesolve._internal.arguments import number, whole_number
from sdesolve.brownian import Increment
from sdesolve.sde import AbstractSDE, Noise
from sdesolve.solvers.base import AbstractOneStep, Span, noise_term, supports

_DAMPING = 0.05
_MOST = 500  # stages


@final
class SKSROCK(AbstractOneStep):
    """The second-kind Chebyshev scheme of ``s`` stages; explicit, for drifts whose Jacobian has a real spectrum.

    With ``Q = g(x, t) W``, ``w0 = 1 + 0.05 / s^2``, ``w1 = T_s(w0) / T_s'(w0)`` and Chebyshev's ``T_i = T_i(w0)``::

        K_1 = x + w1 / w0 h f(x + s w1 Q / 2, t) + s w1 / w0 Q
        K_i = m_i h f(K_{i-1}, t + c_{i-1} h) + n_i K_{i-1} + (1 - n_i) K_{i-2},      x' = K_s

    where ``m_i = 2 w1 T_{i-1} / T_i``, ``n_i = 2 w0 T_{i-1} / T_i``, ``K_0 = x``, and ``c_i`` follow from the drift 1.
    Strong order 1/2 (1 for additive noise), weak order 1, first order on an ODE. Ito. Stable in mean square for
    ``h rho <= 1.9 s^2``, where ``rho`` is the spectral radius of the drift's Jacobian: at ``h rho = 100`` it takes 9
    evaluations, and `EulerMaruyama` 50 steps. Abdulle, Almuslimani and Vilmart 2018, "Optimal explicit stabilized
    integrator of weak order 1 for stiff and ergodic stochastic differential equations", equation 14.

    Args:
        stages: evaluations of the drift a step.
        spectral_radius: or a bound of ``rho``, from which stages are chosen for the longest step of the grid.

    Raises:
        TypeError: an argument is no number.
        ValueError: an argument is out of range, or not exactly one is given; in `solve`, a grid whose steps would need
            more than 500 stages.
    """

    supported = supports(ito=tuple(Noise), stratonovich=(Noise.NONE, Noise.ADDITIVE))
    strong_order = 0.5
    weak_order = 1.0
    ode_order = 1
    by_products = True

    def __init__(self, stages: int | None = None, *, spectral_radius: float | None = None) -> None:
        if (stages is None) == (spectral_radius is None):
            raise ValueError("give either stages= or spectral_radius=, from which they are chosen")
        if stages is not None and whole_number(stages, "stages", 1) > _MOST:
            raise ValueError(f"stages must be at most {_MOST}, got {stages}; take shorter steps")
        if spectral_radius is not None and not 0.0 < number(spectral_radius, "spectral_radius") < math.inf:
            raise ValueError(f"spectral_radius must be positive and finite, got {spectral_radius!r}")
        self.stages, self.spectral_radius = stages, spectral_radius

    @property
    def evaluations(self) -> int:
        """``stages``; 1 where they are chosen by the grid, which ``stats.nfe`` counts."""
        return self.stages or 1

    def numbers(self, sde: AbstractSDE, times: Tensor) -> Tensor:
        """``m_i`` of each stage: as many as there are."""
        s = self.stages
        if s is None:
            assert self.spectral_radius is not None
            stiffness = float(times.diff(dim=0).abs().max()) * self.spectral_radius
            # Abdulle, Almuslimani and Vilmart, equation 21.
            s = max(1, math.ceil(math.sqrt((stiffness + 1.5) / (2.0 - 4.0 / 3.0 * _DAMPING)) + 1.0))
            if s > _MOST:
                need = f"a step of h with h rho = {stiffness:.4g} needs {s} stages, more than {_MOST}"
                raise ValueError(f"{need}; take shorter steps, or ImplicitEuler")
        m = torch.tensor([stage[0] for stage in _stages(s)], dtype=torch.float64)
        return m.reshape(1, s, *(1,) * (times.ndim - 1)).expand(len(times) - 1, s, *times.shape[1:])

    def step(self, sde: AbstractSDE, x: Tensor, span: Span, noise: Increment | None) -> Tensor:
        h, Q, s = span.dt, noise_term(sde, x, span.t0, noise), len(span.numbers)
        before, K, time = x, x, span.t0
        for i, (m, (_, n, c)) in enumerate(zip(span.numbers, _stages(s), strict=True)):
            if i == 0:
                K = x + m * h * sde.drift(x + n * Q, span.t0) + 2.0 * n / _start(s) * Q
            else:
                before, K = K, m * h * sde.drift(K, time) + n * K + (1.0 - n) * before
            time = span.at(c)
        return K


def _start(s: int) -> float:
    return 1.0 + _DAMPING / s**2


@functools.lru_cache(64)
def _stages(s: int) -> list[tuple[float, float, float]]:
    """``(m_i, n_i, c_i)`` for ``i = 1 ... s``; ``n_1`` is ``s w1 / 2``."""
    w0, T, dT = _start(s), [1.0, _start(s)], [0.0, 1.0]
    for _ in range(s - 1):
        dT.append(2.0 * T[-1] + 2.0 * w0 * dT[-1] - dT[-2])
        T.append(2.0 * w0 * T[-1] - T[-2])
    w1 = T[s] / dT[s]
    stages, c = [(w1 / w0, 0.5 * s * w1, w1 / w0)], [0.0, w1 / w0]
    for i in range(2, s + 1):
        m, n = 2.0 * w1 * T[i - 1] / T[i], 2.0 * w0 * T[i - 1] / T[i]
        c.append(m + n * c[-1] + (1.0 - n) * c[-2])
        stages.append((m, n, c[-1]))
    return stages
