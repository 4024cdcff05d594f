"""Two laws on the paths of one run: the KL divergence of an SDE from a prior of the same diffusion, and weights."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple, final

import torch
from sdesolve_kernels.transforms import is_transformed
from torch import Tensor

from sdesolve._internal.arguments import kind_of
from sdesolve.brownian import AbstractPath
from sdesolve.delays import DelaySDE
from sdesolve.integrate.checks import all_finite, bad_rows, check_drift, unchanged
from sdesolve.integrate.probing import ByRow, agree, unnoticed
from sdesolve.integrate.problem import Problem
from sdesolve.integrate.solution import DivergenceError
from sdesolve.jumps import refuse_jumps
from sdesolve.sde import SDE, AbstractSDE, AbstractSemilinear, Noise, is_matrix
from sdesolve.solvers.base import AbstractSolver, Span
from sdesolve.solvers.predictor_corrector import PredictorCorrector
from sdesolve.solvers.square_root import QE
from sdesolve.solvers.tabulated import AbstractTabulated

_UNROLLED = 6  # entries of a state up to which a linear system is solved row by row, as a kernel can
_MOMENTS = (0.2928932, 0.7236068)  # of the way from start to end, where two diffusions are compared

Prior = AbstractSDE | Callable[..., Tensor]
States = tuple[Tensor, ...]


def prior_of(kl_to: Prior, sde: AbstractSDE, params: Any, solver: AbstractSolver) -> AbstractSDE:
    """The prior of an SDE as an SDE of the same noise and calculus.

    Args:
        kl_to: a drift ``h(x, t)``, or an SDE.
        sde: what is integrated, before ``params`` are bound.
        params: of `solve`.
        solver: the scheme.

    Raises:
        TypeError: ``kl_to`` is neither.
        ValueError: the laws cannot be compared, or this solver has no increments to compare them by.
    """
    if not isinstance(kl_to, AbstractSDE) and not callable(kl_to):
        raise TypeError(f"kl_to must be the drift of a prior, a function of (x, t), or an SDE, got {kind_of(kl_to)}")
    if sde.noise is Noise.NONE:
        raise ValueError("kl_to compares laws of paths, and an ODE has no noise: give an SDE, or leave kl_to out")
    for equation in (sde, kl_to):
        refuse_jumps(equation, "kl_to= compares diffusions", "leave it out")
        if isinstance(equation, DelaySDE):
            raise ValueError("kl_to= compares drifts of one state and time, and a DelaySDE has a past: leave it out")
    if solver.controller is not None or isinstance(solver, PredictorCorrector | QE):
        raise ValueError(
            f"kl_to needs the Brownian increments of given steps, which {type(solver).__name__} has not: take a solver "
            "such as EulerMaruyama or Heun, with steps= or grid="
        )
    if isinstance(sde, AbstractSemilinear) and isinstance(solver, AbstractTabulated):
        raise ValueError(
            f"kl_to needs the drift as a function, and {type(solver).__name__} steps {type(sde).__name__} by tabulated "
            "numbers: integrate sds.SDE(sde.drift, sde.diffusion, 'additive') instead"
        )
    if not sde.has_diffusion or (isinstance(kl_to, AbstractSDE) and not kl_to.has_diffusion):
        raise ValueError("kl_to divides by the diffusion, of which products alone are known: give diffusion itself")
    if not isinstance(kl_to, AbstractSDE):
        if not isinstance(sde, SDE):
            return SDE(kl_to, sde.diffusion, sde.noise, sde.calculus)
        prior = sde.with_drift(kl_to)
        return prior if params is None else prior.with_params(params)
    if (kl_to.noise, kl_to.calculus) != (sde.noise, sde.calculus):
        raise ValueError(
            f"kl_to has {kl_to.noise} noise and is a {kl_to.calculus} SDE, and sde has {sde.noise} noise and is a "
            f"{sde.calculus} SDE: both need one diffusion in one calculus (sds.to_ito, sds.to_stratonovich)"
        )
    return kl_to.with_params(params) if isinstance(kl_to, SDE) and params is not None else kl_to


class Rates(NamedTuple):
    """Of a state and a time.

    Attributes:
        control: ``u`` with ``g u = f - h``, the least, shaped as ``dW``.
        energy: ``|u|^2 / 2``, ``(batch,)``; infinite where there is no ``u``.
    """

    control: Tensor
    energy: Tensor


@final
class PathMeasure:
    """What an SDE of drift ``f`` and its prior of drift ``h`` are to each other.

    Args:
        problem: the integration, with a prior.
    """

    def __init__(self, problem: Problem) -> None:
        assert problem.prior is not None
        self._problem, self._prior = problem, problem.prior
        self._drift = ByRow(problem.prior.drift, "kl_to", problem.times)

    def rates(self, x: Tensor, t: Tensor) -> Rates:
        """``u`` and ``|u|^2 / 2`` at ``x: (batch, *state)``."""
        sde = self._problem.watched
        (f, g), h = sde.drift_and_diffusion(x, t), unchanged(self._drift, x, t, "kl_to")
        if sde.checking:
            check_drift(h, x, t, "kl_to")
        size = f.abs() + h.abs()
        if is_matrix(g, x):
            u, excess = _solved(
                g.expand(*x.shape, -1).reshape(len(x), math.prod(x.shape[1:]), g.shape[-1]), _flat(f - h), _flat(size)
            )
        else:
            u, excess = _divided(g.expand_as(x), f - h, size, self._problem.increment.shape)
        return Rates(u, 0.5 * _flat(u).square().sum(1) + _flat(excess).sum(1))

    def change(self, rates: Rates, span: Span, W: Tensor) -> Tensor:
        """``d log w`` over a step for an increment ``W``."""
        dt = lengths(span)
        return -torch.sign(dt) * _flat(rates.control * W).sum(1) - rates.energy * dt.abs()

    def bridge(self, k: int, x: Tensor, span: Span, theta: float) -> Tensor:
        """What the bridge at the fraction ``theta`` of step ``k`` takes from the log-weight."""
        noise = self._problem.noise
        assert isinstance(noise, AbstractPath)  # or the plan would have been refused
        b = noise.bridge(k, theta, self._problem.increment.shape, dtype=x.dtype, device=x.device)
        dt, u = lengths(span), self.rates(x, span.t0).control
        return torch.sign(dt) * dt.abs().sqrt() * _flat(u * b).sum(1)


def lengths(span: Span) -> Tensor:
    """``dt`` as ``()`` or ``(batch,)``."""
    return span.dt.reshape(-1) if span.dt.ndim else span.dt


def between(problem: Problem, k: int, states: States, after: States, span: Span, theta: float) -> States:
    """What is carried at the fraction ``theta`` of step ``k``: the state, and what is kept beside it."""
    made, kept = [problem.between(k, theta, states[0], after[0], span), *after[1:]], problem.save.beside
    if kept is not None and not problem.save.moments:
        kl, log_weight = (a + theta * (b - a) for a, b in zip(states[kept], after[kept], strict=True))
        made[kept] = kl, log_weight - PathMeasure(problem).bridge(k, states[0], span, theta)
    return tuple(made)


def check_at_start(problem: Problem) -> None:
    """Refuses a prior of another diffusion, and one from which the divergence is infinite from the start.

    Raises:
        ValueError: it is such a prior.
    """
    sde, prior, x = problem.equation, problem.prior, problem.x0.detach()
    assert prior is not None
    if not len(x) or is_transformed():
        return
    moments = [problem.times[problem.first] + u * (problem.times[-1] - problem.times[problem.first]) for u in _MOMENTS]
    with torch.no_grad(), unnoticed(sde, prior):
        before = problem.watched.evaluations
        start = problem.clock(problem.times[problem.first])
        if problem.other_diffusion:
            for t in (start, *map(problem.clock, moments)):
                if not _alike(sde.diffusion(x, t), prior.diffusion(x, t)):
                    raise ValueError(
                        "kl_to has another diffusion than the SDE, so one law has no density in the other and the "
                        "divergence is infinite: give a prior of the same diffusion, or its drift alone"
                    )
        energy = PathMeasure(problem).rates(x, start).energy
        problem.watched.evaluations = before
    if not all_finite(energy):
        raise ValueError(
            f"the divergence from kl_to is infinite: for row {int(bad_rows(energy).nonzero()[0])} of x0 the two drifts "
            "differ in a direction without noise. Take a diffusion that is not zero there, or a prior whose drift is "
            "that of the SDE in such directions"
        )


def check_at_end(problem: Problem, kl: Tensor, place: int, again: Callable[[], Any]) -> None:
    """Refuses divergences that are not finite.

    Args:
        problem: the integration.
        kl: of each path.
        place: where it stands among what is carried.
        again: begins it once more, step by step (`Stepwise`).

    Raises:
        DivergenceError: one is not; says at which step and path.
    """
    if all_finite(kl):
        return
    with torch.no_grad():
        run = again()
        while run.k < problem.steps and all_finite(run.states[place]):
            run.advance()
    found = kl if all_finite(run.states[place]) else run.states[place]
    k, row = run.k - 1, int(bad_rows(found).nonzero()[0])
    time, path = float(problem.times[k].flatten()[row if problem.times.ndim == 2 else 0]), row + problem.first_path
    raise DivergenceError(
        f"the divergence from kl_to became infinite for path {path} in step {k} of {problem.steps}, which starts at "
        f"t = {time:.6g}: the drifts differ there in a direction in which the diffusion is zero, or too small",
        step=k,
        time=time,
        path=path,
    )


def _flat(v: Tensor) -> Tensor:
    return v.reshape(len(v), math.prod(v.shape[1:]))


def _alike(g: Tensor, h: Tensor) -> bool:
    return g.ndim == h.ndim and agree(*torch.broadcast_tensors(g, h))


def _divided(g: Tensor, v: Tensor, size: Tensor, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """``u`` of ``g u = v`` for a diffusion with an entry for each of the state, and what is infinite without one.

    Args:
        g, v: ``(batch, *state)``.
        size: of what ``v`` is a difference of.
        shape: of ``u``; an axis of length 1 is one motion that drives all entries along it.
    """
    shared = [d for d in range(1, v.ndim) if shape[d] == 1 and v.shape[d] > 1]
    if not shared:
        none = g == 0
        u = torch.where(none, 0.0, v / torch.where(none, 1.0, g))
        return u, torch.where(none, torch.where(v.abs() > _half(v) * size, torch.inf, 0.0), 0.0)
    squares = (g * g).sum(shared, keepdim=True)
    none = squares == 0
    u = torch.where(none, 0.0, (g * v).sum(shared, keepdim=True) / torch.where(none, 1.0, squares))
    driven = g * u
    return u, torch.where((v - driven).abs() > _half(v) * (size + driven.abs()), torch.inf, 0.0)


def _solved(g: Tensor, v: Tensor, size: Tensor) -> tuple[Tensor, Tensor]:
    """The least ``u`` of ``g u = v``, and what is infinite where there is none.

    Rows of ``g`` are made orthonormal one after another, ``g = L Q``, and ``u = Q^T L^-1 v``. A row that depends on
    those before it has to ask of ``u`` what they do.

    Args:
        g: ``(batch, d, channels)``.
        v: ``(batch, d)``.
        size: of what ``v`` is a difference of.
    """
    d, channels = g.shape[1:]
    if d > _UNROLLED:
        u = (torch.linalg.pinv(g) @ v.unsqueeze(-1)).squeeze(-1)
        driven = g * u.unsqueeze(1)
        return u, torch.where((v - driven.sum(-1)).abs() > _half(v) * (size + driven.abs().sum(-1)), torch.inf, 0.0)
    eps = 16 * max(d, channels) * torch.finfo(v.dtype).eps
    basis: list[tuple[Tensor, Tensor]] = []
    excess: list[Tensor] = []
    for i in range(d):
        row, rest, scale = g[:, i], v[:, i : i + 1], size[:, i : i + 1]
        whole = (row * row).sum(1, keepdim=True)
        for q, y in basis:
            along = (q * row).sum(1, keepdim=True)
            row, rest, scale = row - along * q, rest - along * y, scale + (along * y).abs()
        squares = (row * row).sum(1, keepdim=True)
        dependent = squares <= eps * eps * whole
        length = torch.where(dependent, 1.0, squares).sqrt()
        basis.append((torch.where(dependent, 0.0, row / length), torch.where(dependent, 0.0, rest / length)))
        excess.append(torch.where(dependent, torch.where(rest.abs() > _half(v) * scale, torch.inf, 0.0), 0.0))
    return functools.reduce(torch.add, [y * q for q, y in basis]), torch.cat(excess, 1)


def _half(v: Tensor) -> float:
    """Half of the digits."""
    return torch.finfo(v.dtype).eps ** 0.5
