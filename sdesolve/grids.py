"""Time grids: float64 tensors of ``steps + 1`` times with exact end points, increasing or decreasing.

Times are computed from integer step indices on the host and never accumulated, so a grid of ``n`` steps has ``n`` steps
whatever the precision of the state (adding up ``dt`` in float32 gives 1001 steps of 1e-3 on [0, 1]).
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Iterable, Set
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch
from sdesolve_kernels.threads import survives_forks
from torch import Tensor

from sdesolve._internal.arguments import kind_of, number, short, whole_number

_EXACT = 2.0**-53  # unit roundoff of float64
_MOST_STEPS = 1 << 32
_RESOLVED = 64  # roundings of a time that make a step which still is what it was meant to be, to a few per cent


class Times(NamedTuple):
    """Times as somebody gave them.

    Attributes:
        values: float64 on the host.
        roundoff: unit roundoff of the coarsest number among them: 2^-24 for a float32 tensor.
    """

    values: Tensor
    roundoff: float

    @property
    def rounding(self) -> float:
        """How far a time may be from the one that was meant, also where ``linspace`` or ``arange`` computed it."""
        return 3.0 * self.roundoff * float(self.values.abs().max()) if self.values.numel() else 0.0


def read_times(given: Any, name: str) -> Times:
    """Times from a number, a tensor, an array, or a collection of any of these, in the precision that they came in.

    Raises:
        TypeError: something that holds no real numbers, a set where order matters, or times that want a gradient.
    """
    if isinstance(given, Tensor):
        if given.dtype == torch.bool or given.is_complex():
            raise TypeError(f"{name} must be real numbers, got a tensor of {given.dtype}")
        if given.requires_grad:
            raise TypeError(f"{name} wants a gradient, and there are none to times; give {name}.detach()")
        values = given.detach().to(device="cpu", dtype=torch.float64)
        return Times(values, max(torch.finfo(given.dtype).eps / 2, _EXACT) if given.is_floating_point() else _EXACT)
    if isinstance(given, np.ndarray | np.generic):
        if given.dtype.kind not in "iuf":
            raise TypeError(f"{name} must be real numbers, got an array of {given.dtype}")
        roundoff = max(float(np.finfo(given.dtype).eps) / 2, _EXACT) if given.dtype.kind == "f" else _EXACT
        return Times(torch.from_numpy(np.array(given, dtype=np.float64)), roundoff)
    if isinstance(given, numbers.Real) and not isinstance(given, bool):
        return Times(torch.tensor(float(given), dtype=torch.float64, device="cpu"), _EXACT)
    if isinstance(given, Set):
        raise TypeError(f"{name} must be in order, and a {type(given).__name__} has none; give sorted({name})")
    if isinstance(given, str | bytes | dict) or not isinstance(given, Iterable):
        raise TypeError(f"{name} must be a number or a tensor (batch,) of times, got {_short(given)}")
    entries = list(given)
    if all(type(entry) in (int, float) for entry in entries):
        values = torch.tensor([float(entry) for entry in entries], dtype=torch.float64, device="cpu")
        return Times(values, 2.0**-24 if _from_float32(values) else _EXACT)
    read = [read_times(entry, name) for entry in entries]
    shapes = {tuple(entry.values.shape) for entry in read}
    if len(shapes) > 1:
        raise ValueError(f"{name} holds times of different shapes, {' and '.join(map(str, sorted(shapes)[:2]))}")
    coarsest = max((entry.roundoff for entry in read), default=_EXACT)
    return Times(torch.stack([entry.values for entry in read]), coarsest)


def _from_float32(values: Tensor) -> bool:
    """Whether numbers were in float32 before: it holds all of them, and not because they have few digits."""
    mantissas = torch.frexp(values).mantissa * 2.0**16
    return torch.equal(values, values.float().double()) and bool((mantissas != mantissas.round()).any())


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"a {kind_of(value)}"


@survives_forks
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
    return check_resolved(_pinned(t0 + (t1 - t0) * u, t0, t1))


@survives_forks
def timesteps(total: int, steps: int, spacing: str = "leading", *, offset: int = 0, to_zero: bool = True) -> Tensor:
    """``steps`` of the ``total`` steps of a chain, as times ``t = k + 1`` of its `TableBeta`, and where the last ends.

    ==============  ============================================================================================
    ``spacing``     steps ``k``, counted from 0 (Lin et al. 2024, table 2)
    ==============  ============================================================================================
    ``"leading"``   ``offset + j floor(total / steps)``: from below the chain's end, and from ``offset`` on
    ``"trailing"``  ``round(total - j total / steps) - 1``: the chain's end is among them
    ``"linspace"``  ``round(j (total - 1) / (steps - 1))``: both ends are
    ==============  ============================================================================================

    Args:
        total: steps of the chain.
        steps: how many to take; each is one evaluation.
        spacing: as above.
        offset: first step of ``"leading"``.
        to_zero: end at clean data, ``t = 0``; else at the chain's first step, ``t = 1``.

    Returns:
        Decreasing times, float64: ``(steps + 1,)``, or ``(steps,)`` where the last step is the chain's first already.

    Raises:
        ValueError: more steps than the chain has, an unknown spacing, or an offset that leads beyond the chain.
        TypeError: a number of steps that is not an integer.
    """
    total, steps, offset = (
        whole_number(n, m, i) for n, m, i in ((total, "total", 1), (steps, "steps", 1), (offset, "offset", 0))
    )
    if steps > total:
        raise ValueError(f"a chain of {total} steps has no {steps} of them")
    k: Any
    if spacing == "leading":
        k = np.arange(steps) * (total // steps) + offset
    elif spacing == "trailing":
        k = (np.round(np.arange(total, 0, -total / steps)) - 1)[:steps][::-1]
    elif spacing == "linspace":
        k = np.linspace(0, total - 1, steps).round()
    else:
        raise ValueError(f"spacing={spacing!r} is unknown; choose one of 'leading', 'trailing', 'linspace'")
    if k[-1] >= total:
        raise ValueError(f"offset={offset} leads to step {int(k[-1])}, and the chain has 0 ... {total - 1}")
    times = torch.from_numpy(k[::-1].astype(np.float64) + 1.0)
    end = 0.0 if to_zero else 1.0
    return times if float(times[-1]) == end else torch.cat([times, times.new_full((1,), end)])


@survives_forks
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


@survives_forks
def geometric(t0: float, t1: float, steps: int) -> Tensor:
    """``t_k = t0 (t1 / t0)^(k/steps)``: equal ratios, for positive times.

    Raises:
        ValueError: as `uniform`; a time that is not positive.
    """
    u = _unit(t0, t1, steps)
    if min(t0, t1) <= 0:
        raise ValueError(f"a geometric grid needs positive times, got t0={t0}, t1={t1}")
    return _pinned(t0 * (t1 / t0) ** u, t0, t1)


@survives_forks
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
        raise ValueError(f"ratio is the smallest step over the largest, in (0, 1], got {short(ratio)}")
    gamma = torch.linspace(1.0, ratio, steps, dtype=torch.float64, device="cpu").flip(0)
    u = torch.cat([gamma.new_zeros(1), gamma.cumsum(0) / gamma.sum()])
    low, high = min(t0, t1), max(t0, t1)
    grid = low + (high - low) * u
    return _pinned(grid if t0 < t1 else grid.flip(0), t0, t1)


@survives_forks
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


@survives_forks
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


@survives_forks
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
        raise ValueError(f"rho must be a positive number, got {short(rho)}")
    a, b = (math.exp(-0.5 * float(process.log_snr(t))) if t else 0.0 for t in (t0, t1))
    if a == b:
        raise ValueError(
            f"the noise level of {type(process).__name__} is the same at t0={t0} and t1={t1}, {a}: no steps lie between"
        )
    return _at_log_snr(process, -2.0 * karras(a, b, steps, rho).log(), t0, t1)


@survives_forks
def with_zero(grid: Tensor) -> Tensor:
    """``grid``, one of decreasing positive times, with 0 as one more time at its end.

    Raises:
        ValueError: ``grid`` is no grid of decreasing positive times.
    """
    grid = check_grid(grid)
    if not bool((grid[-1] > 0).all() & (grid[0] > grid[-1]).all()):
        raise ValueError(f"0 can end a grid of decreasing positive times, not one from {grid[0]} to {grid[-1]}")
    return torch.cat([grid, torch.zeros_like(grid[:1])])


def check_grid(grid: Any, *, padded: bool = False) -> Tensor:
    """``grid`` as float64 on the host, ``(steps + 1,)`` or ``(steps + 1, batch)``.

    Args:
        grid: times; a tensor, an array, or a list of either.
        padded: whether the last time may be repeated at the end, where the grids of some rows are shorter.

    Raises:
        ValueError: it is not strictly monotone, holds fewer than two times or one that is not finite.
        TypeError: it holds no real numbers.
    """
    grid = read_times(grid, "grid").values
    if grid.ndim not in (1, 2) or grid.shape[0] < 2:
        raise ValueError(
            f"a grid holds at least two times, as (steps + 1,) or (steps + 1, batch); got shape {tuple(grid.shape)}"
        )
    if not bool(grid.isfinite().all()):
        raise ValueError("a grid must hold finite times, this one has nan or inf")
    dt = grid.diff(dim=0)
    wrong = (dt == 0) | (dt.sign() != dt[:1].sign())
    if padded:
        ended = dt.flip(0).abs().cumsum(0).flip(0) == 0  # nothing but repeats from here on
        wrong &= ~ended
        wrong[0] |= dt[0] == 0
    if bool(wrong.any()):
        k, *row = (int(i) for i in wrong.nonzero()[0])
        start, end = (float(grid[(at, *row)]) for at in (k, k + 1))
        where = f" in row {row[0]}" if row else ""
        rest = "; only the last time may be repeated, at the end, as padding" if padded and start == end else ""
        raise ValueError(
            f"a grid must be strictly increasing or strictly decreasing; step {k} goes from {start} to {end}{where}. "
            f"Sort it and drop repeated times{rest}"
        )
    return grid


def check_resolved(grid: Tensor) -> Tensor:
    """A grid of equal steps, refused where rounding makes them unequal by more than a few per cent.

    Raises:
        ValueError: they are too short for the times that they lie at.
    """
    largest, dt = torch.maximum(grid[0].abs(), grid[-1].abs()), (grid[-1] - grid[0]).abs() / (len(grid) - 1)
    short = dt < _RESOLVED * _EXACT * largest
    if bool(short.any()):
        at, step = float(largest[short][0]), float(dt[short][0])
        raise ValueError(
            f"steps of {step:.3g} are too short at t = {at:.6g}, where neighbouring float64 numbers are "
            f"{2 * _EXACT * at:.1g} apart: count time from a nearer origin, or take fewer steps"
        )
    return grid


def count_of_steps(steps: int) -> int:
    """``steps`` as a number of steps that a grid can have.

    Raises:
        ValueError: less than one, or more than 2^32.
        TypeError: no integer.
    """
    steps = whole_number(steps, "steps", 1)
    if steps > _MOST_STEPS:
        raise ValueError(
            f"steps must be at most 2^32, got {short(steps)}: take a run in parts, each from where one ended"
        )
    return steps


def _unit(t0: float, t1: float, steps: int) -> Tensor:
    steps = count_of_steps(steps)
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
        raise TypeError(f"process must be a linear diffusion such as VP(), got {short(process)}")
    t0, t1 = process.t_max if t0 is None else number(t0, "t0"), process.t_min if t1 is None else number(t1, "t1")
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
