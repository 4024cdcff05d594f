"""Time grids: float64 tensors of ``steps + 1`` times with exact end points, increasing or decreasing.

Times are computed from integer step indices on the host and never accumulated, so a grid of ``n`` steps has ``n`` steps
whatever the precision of the state (adding up ``dt`` in float32 gives 1001 steps of 1e-3 on [0, 1]).
"""

from __future__ import annotations

import math
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from sdesolve._internal.arguments import whole_number


def uniform(t0: float, t1: float, steps: int) -> Tensor:
    """``t_k = t0 + (t1 - t0) k / steps``: equal steps.

    Args:
        t0: first time.
        t1: last time, on either side of ``t0``.
        steps: number of steps, at least 1.

    Raises:
        ValueError: ``t0 == t1``, a time that is not finite, or ``steps < 1``.
        TypeError: ``steps`` is not an integer.
    """
    u = _unit(t0, t1, steps)
    return _pinned(t0 + (t1 - t0) * u, t0, t1)


def karras(t0: float, t1: float, steps: int, rho: float = 7.0) -> Tensor:
    """``t_k = (t0^(1/rho) + k/steps (t1^(1/rho) - t0^(1/rho)))^rho``, Karras et al. 2022, eq. 5.

    For positive times. On `EDM`, where time is the noise level, ``rho = 7`` spends most steps at low noise.

    Raises:
        ValueError: as `uniform`; a time below zero; ``rho`` not positive.
    """
    u = _unit(t0, t1, steps)
    if min(t0, t1) < 0 or not rho > 0:
        raise ValueError(f"a Karras grid needs times of at least 0 and rho > 0, got t0={t0}, t1={t1}, rho={rho}")
    a, b = t0 ** (1 / rho), t1 ** (1 / rho)
    return _pinned((a + u * (b - a)) ** rho, t0, t1)


def geometric(t0: float, t1: float, steps: int) -> Tensor:
    """``t_k = t0 (t1 / t0)^(k/steps)``: equal ratios, for positive times.

    Raises:
        ValueError: as `uniform`; a time that is not positive.
    """
    u = _unit(t0, t1, steps)
    if min(t0, t1) <= 0:
        raise ValueError(f"a geometric grid needs positive times, got t0={t0}, t1={t1}")
    return _pinned(t0 * (t1 / t0) ** u, t0, t1)


def linear_steps(t0: float, t1: float, steps: int, ratio: float = 0.005) -> Tensor:
    """Step sizes ``gamma_k`` that change linearly, as in score-based models built on `OU`.

    The step nearest the smaller time has size ``gamma``, the one nearest the larger time ``gamma / ratio``, and those
    between are equally spaced: on ``dX = -X dt + sqrt(2) dB`` the linear schedule of DDPM, where
    ``1 - beta_k = exp(-2 gamma_k)`` and ``beta`` grows from 1e-4 to 0.02, a ratio of 0.005 (Ho et al. 2020, section 4;
    De Bortoli et al. 2021, appendix).

    Args:
        t0: first time.
        t1: last time, on either side of ``t0``.
        steps: number of steps, at least 1.
        ratio: smallest step over largest step, in (0, 1].

    Raises:
        ValueError: as `uniform`; ``ratio`` outside (0, 1].
    """
    _unit(t0, t1, steps)
    if not 0 < ratio <= 1:
        raise ValueError(f"ratio is the smallest step over the largest, in (0, 1], got {ratio}")
    gamma = torch.linspace(1.0, ratio, steps, dtype=torch.float64, device="cpu").flip(0)
    u = torch.cat([gamma.new_zeros(1), gamma.cumsum(0) / gamma.sum()])
    low, high = min(t0, t1), max(t0, t1)
    grid = low + (high - low) * u
    return _pinned(grid if t0 < t1 else grid.flip(0), t0, t1)


def exponential_steps(t0: float, t1: float, steps: int) -> Tensor:
    """Constant steps while time is above 1, then steps in proportion to time: ``gamma_k = kappa min(1, t)``.

    The schedule for which reverse diffusion of `OU` has its best known convergence rates (Chen, Lee and Lu 2023;
    Benton et al. 2024, section 3), with ``kappa`` chosen so that ``steps`` steps reach from one end to the other:
    equal steps in ``u(t) = log t`` below 1 and ``t - 1`` above.

    Raises:
        ValueError: as `uniform`; a time that is not positive.
    """
    unit = _unit(t0, t1, steps)
    if min(t0, t1) <= 0:
        raise ValueError(f"exponentially decaying steps need positive times, got t0={t0}, t1={t1}")
    a, b = (math.log(t) if t < 1 else t - 1 for t in (t0, t1))
    u = a + (b - a) * unit
    return _pinned(torch.where(u < 0, u.clamp(max=0).exp(), 1 + u), t0, t1)


def quadratic(t0: float, t1: float, steps: int) -> Tensor:
    """``t_k = (sqrt(t0) + k/steps (sqrt(t1) - sqrt(t0)))^2``: steps in proportion to ``sqrt(t)``.

    For times of at least 0. Song, Meng and Ermon 2021 (appendix D.2) take it for few steps on VP.

    Raises:
        ValueError: as `uniform`; a time below zero.
    """
    if min(t0, t1) < 0:
        raise ValueError(f"a quadratic grid needs times of at least 0, got t0={t0}, t1={t1}")
    return karras(t0, t1, steps, rho=2.0)


@runtime_checkable
class NoiseLevels(Protocol):
    """What a grid by noise level needs of a process; every linear diffusion has it."""

    t_min: float
    t_max: float

    def log_snr(self, t: Tensor | float, /) -> Tensor:
        """``log(alpha^2 / sigma^2)``, decreasing."""

    def time_at_log_snr(self, log_snr: Tensor | float, /) -> Tensor:
        """Its inverse."""


def uniform_log_snr(process: NoiseLevels, steps: int, *, t0: float | None = None, t1: float | None = None) -> Tensor:
    """Equal steps in the log-SNR ``log(alpha^2 / sigma^2)`` of ``process``, the time of exponential integrators.

    On a process with ``alpha = 1`` this is `geometric` in the noise level. Lu et al. 2022, section 3.3.

    Args:
        process: a linear diffusion.
        steps: number of steps, at least 1.
        t0: first time, ``process.t_max`` by default.
        t1: last time, ``process.t_min`` by default; on either side of ``t0``.

    Raises:
        ValueError: as `uniform`; a time outside ``(0, t_max]``, or between two times of the grid the log-SNR does not
            change.
        TypeError: ``process`` has no log-SNR that can be inverted.
    """
    t0, t1 = _ends(process, t0, t1)
    u, (a, b) = _unit(t0, t1, steps), (float(process.log_snr(t)) for t in (t0, t1))
    if not (math.isfinite(a) and math.isfinite(b)):
        raise ValueError(
            f"a grid in log-SNR needs times above 0, where it is finite, got t0={t0}, t1={t1}; end earlier, and add "
            "the end with grids.with_zero"
        )
    return _at_log_snr(process, a + (b - a) * u, t0, t1)


def uniform_sigma(process: NoiseLevels, steps: int, *, t0: float | None = None, t1: float | None = None) -> Tensor:
    """Equal steps in the noise level ``sigma / alpha`` of ``process``: `karras_sigma` with ``rho = 1``.

    Args:
        process: a linear diffusion.
        steps: number of steps, at least 1.
        t0: first time, ``process.t_max`` by default.
        t1: last time, ``process.t_min`` by default, 0 allowed; on either side of ``t0``.

    Raises:
        ValueError: as `karras_sigma`.
        TypeError: likewise.
    """
    return karras_sigma(process, steps, t0=t0, t1=t1, rho=1.0)


def karras_sigma(
    process: NoiseLevels, steps: int, *, t0: float | None = None, t1: float | None = None, rho: float = 7.0
) -> Tensor:
    """`karras` in the noise level ``sigma / alpha`` of any process, mapped to its times.

    ``sigma / alpha`` is the noise level relative to the data, which is ``sigma`` where ``alpha = 1`` and what Karras
    et al. 2022 (table 1, eq. 5) call sigma elsewhere.

    Args:
        process: a linear diffusion.
        steps: number of steps, at least 1.
        t0: first time, ``process.t_max`` by default.
        t1: last time, ``process.t_min`` by default, 0 allowed; on either side of ``t0``.
        rho: equal steps are taken in ``(sigma / alpha)^(1 / rho)``.

    Raises:
        ValueError: as `uniform`; a time outside ``[0, t_max]``; ``rho`` not positive; or between two times of the grid
            the noise level does not change.
        TypeError: ``process`` has no log-SNR that can be inverted.
    """
    t0, t1 = _ends(process, t0, t1)
    _unit(t0, t1, steps)
    if not 0 < rho < math.inf:
        raise ValueError(f"rho must be a positive number, got {rho}")
    a, b = (math.exp(-0.5 * float(process.log_snr(t))) if t else 0.0 for t in (t0, t1))
    if a == b:
        raise ValueError(
            f"the noise level of {type(process).__name__} is the same at t0={t0} and t1={t1}, {a}: no steps lie between"
        )
    return _at_log_snr(process, -2.0 * karras(a, b, steps, rho).log(), t0, t1)


def with_zero(grid: Tensor) -> Tensor:
    """``grid``, one of decreasing positive times, with 0 as one more time at its end.

    Raises:
        ValueError: ``grid`` is no grid of decreasing positive times.
    """
    grid = check_grid(grid)
    if not bool((grid[-1] > 0).all() & (grid[0] > grid[-1]).all()):
        raise ValueError(f"0 can end a grid of decreasing positive times, not one from {grid[0]} to {grid[-1]}")
    return torch.cat([grid, torch.zeros_like(grid[:1])])


def check_grid(grid: Tensor) -> Tensor:
    """``grid`` as float64 on the host, ``(steps + 1,)`` or ``(steps + 1, batch)``; refused unless strictly monotone."""
    grid = torch.as_tensor(grid, dtype=torch.float64, device="cpu")
    if grid.ndim not in (1, 2) or grid.shape[0] < 2:
        raise ValueError(
            f"a grid holds at least two times, as (steps + 1,) or (steps + 1, batch); got shape {tuple(grid.shape)}"
        )
    if not bool(grid.isfinite().all()):
        raise ValueError("a grid must hold finite times, this one has nan or inf")
    dt = grid.diff(dim=0)
    if not bool(((dt > 0).all(0) | (dt < 0).all(0)).all()):
        wrong = (dt == 0) | (dt.sign() != dt[:1].sign())
        bad = int((wrong.any(1) if wrong.ndim == 2 else wrong).nonzero()[0])
        raise ValueError(
            f"a grid must be strictly increasing or strictly decreasing; step {bad} goes from {grid[bad].tolist()} to "
            f"{grid[bad + 1].tolist()}. Sort it and drop repeated times"
        )
    return grid


def _unit(t0: float, t1: float, steps: int) -> Tensor:
    steps = whole_number(steps, "steps", 1)
    if not (math.isfinite(t0) and math.isfinite(t1)):
        raise ValueError(f"times must be finite, got t0={t0}, t1={t1}")
    if t0 == t1:
        raise ValueError(f"t0 and t1 must differ, both are {t0}: there is nothing to integrate")
    return torch.arange(steps + 1, dtype=torch.float64, device="cpu") / steps


def _pinned(grid: Tensor, t0: float, t1: float) -> Tensor:
    """The grid with end points that rounding has not touched."""
    grid[0], grid[-1] = t0, t1
    return grid


def _ends(process: NoiseLevels, t0: float | None, t1: float | None) -> tuple[float, float]:
    if not isinstance(process, NoiseLevels):
        raise TypeError(f"process must be a linear diffusion such as VP(), got {process!r}")
    t0, t1 = process.t_max if t0 is None else float(t0), process.t_min if t1 is None else float(t1)
    if not (min(t0, t1) >= 0.0 and max(t0, t1) <= process.t_max):
        raise ValueError(
            f"times of {type(process).__name__} lie within [0, t_max = {process.t_max}], got t0={t0}, t1={t1}"
        )
    return t0, t1


def _at_log_snr(process: NoiseLevels, log_snr: Tensor, t0: float, t1: float) -> Tensor:
    grid = _pinned(process.time_at_log_snr(log_snr).clone(), t0, t1)
    dt = grid.diff() * math.copysign(1.0, t1 - t0)
    if not bool((dt > 0).all()):  # also where nan
        k = int((~(dt > 0)).nonzero()[0])
        raise ValueError(
            f"this grid does not match the process: between log-SNRs {float(log_snr[k]):.6g} and "
            f"{float(log_snr[k + 1]):.6g} {type(process).__name__} goes from t = {float(grid[k]):.6g} to "
            f"{float(grid[k + 1]):.6g}. Where its log-SNR hardly changes, take fewer steps or a grid in time"
        )
    return grid
