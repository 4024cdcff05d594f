"""Derivatives of expectations, with standard errors: along paths, or of their likelihood."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal, final

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from sdesolve._internal.arguments import short, whole_number
from sdesolve.brownian import BrownianPath, drawn_seed
from sdesolve.integrate.checks import check_state
from sdesolve.integrate.solution import Solution
from sdesolve.integrate.solve import solve
from sdesolve.jumps import refuse_jumps
from sdesolve.sde import ODE, SDE, AbstractSDE, Noise
from sdesolve.solvers.base import AbstractSolver

Method = Literal["pathwise", "likelihood-ratio"]


@final
@dataclasses.dataclass(frozen=True)
class Sensitivity:
    """What `sensitivity` returns.

    Attributes:
        value: the mean payoff.
        value_error: its standard error.
        gradient: of the mean in ``wrt``, of that structure.
        gradient_error: standard errors of all its entries, likewise.
        execution: what ran (`Stats.execution`).
    """

    value: Tensor
    value_error: Tensor
    gradient: Any
    gradient_error: Any
    execution: str


def sensitivity(
    sde: AbstractSDE,
    x0: Tensor,
    t0: float,
    t1: float,
    steps: int,
    *,
    payoff: Callable[[Tensor], Tensor],
    wrt: Any,
    solver: AbstractSolver,
    method: Method = "pathwise",
    seed: int | None = None,
    params: Any = None,
    groups: int = 16,
    **options: Any,
) -> Sensitivity:
    """``E payoff(X(t1))``, its derivatives, and standard errors of both.

    - ``pathwise``: the derivative of the mean over paths, for payoffs without jumps. One that jumps has a conditional
      expectation without (`euler_law`).
    - ``likelihood-ratio``: ``E payoff(X) d log p(X)`` with the density of the law of the paths, for any payoff, and for
      parameters of the drift alone: laws of two diffusions have no density in each other, and the variance of what
      Euler steps have in its place grows with their number. It is the gradient of `Solution.log_weight` from a prior
      at these very parameters; what a payoff is off the mean of the others is taken. Glasserman 2003, section 7.3.

    Both run in one generated kernel and its reverse where `solve` fuses.

    Args:
        sde, t0, t1, steps, solver, seed, params: as for `solve`.
        x0: ``(batch, *state)``; may be made of ``wrt``, for derivatives in the start.
        payoff: of the final state, or of what ``observable=`` keeps of it, ``(batch, ...) -> (batch,)``.
        wrt: tensors that need gradients, which ``x0``, ``params``, the functions or the payoff are made of: one, or a
            tuple, list or dictionary.
        method: see above.
        groups: of rows, each integrated by itself: standard errors of gradients are those of the spread over groups.
            What functions hold with a row per path has to come by ``params``.
        options: of `solve`.

    Raises:
        TypeError: bad types.
        ValueError: no derivative, as of a payoff that jumps, or in parameters of the diffusion by the likelihood ratio;
            fewer than two rows a group; otherwise as `solve`.

    Example:
        >>> rate = torch.tensor(0.8, requires_grad=True)
        >>> sde = sds.SDE(lambda x, t: -rate * x, lambda x, t: 0.5 * torch.ones_like(x))
        >>> found = sensitivity(sde, torch.ones(4096, 1), 0.0, 1.0, 64, payoff=lambda x: x[:, 0] ** 2, wrt=rate,
        ...                     solver=sds.EulerMaruyama(), seed=0)
    """
    check_state(x0)
    if method not in ("pathwise", "likelihood-ratio"):
        raise ValueError(f"method must be 'pathwise' or 'likelihood-ratio', got {short(method)}")
    tensors, structure = tree_flatten(wrt)
    if not tensors or not all(isinstance(t, Tensor) and t.requires_grad for t in tensors):
        raise TypeError("wrt holds the tensors to differentiate in: each needs requires_grad=True")
    if len(x0) < 2 * whole_number(groups, "groups", 2):
        raise ValueError(f"x0 has {len(x0)} rows, too few for {groups} groups of at least 2: give more rows")
    path = options.pop("noise", None) or BrownianPath(drawn_seed() if seed is None else seed)
    ratio = method == "likelihood-ratio"
    values: list[Tensor] = []
    found: list[list[Tensor]] = []
    ends = torch.arange(len(x0)).tensor_split(groups)
    for rows in ends:
        part = slice(int(rows[0]), int(rows[-1]) + 1)
        own = tree_map(functools.partial(_rows, part=part, batch=len(x0)), params)
        x, noise = x0[part], path.rows(part.start)
        if ratio:
            sol, scores = _weighted(sde, x, own, tensors, (t0, t1, steps), solver=solver, noise=noise, **options)
        else:
            sol, scores = solve(sde, x, t0, t1, steps, solver=solver, noise=noise, params=own, **options), None
        paid = _paid(payoff, sol)
        if scores is None and not paid.requires_grad:
            raise ValueError(
                "the payoff has no derivative in wrt: where it jumps, take sds.euler_law over the last step or "
                "method='likelihood-ratio'; otherwise see that x0, params or the functions are made of wrt"
            )
        loss = paid.mean()
        if scores is not None:
            loss = loss + ((paid - paid.mean()).detach() * scores).sum() / (len(paid) - 1)
        grads = torch.autograd.grad(loss, tensors, allow_unused=True, retain_graph=True)
        values.append(paid.detach().double())
        found.append([torch.zeros_like(t) if g is None else g.double() for g, t in zip(grads, tensors, strict=True)])
    share = torch.tensor([len(v) for v in values], dtype=torch.float64) / len(x0)
    every = torch.cat(values)
    stacked = [torch.stack(gs) for gs in zip(*found, strict=True)]
    weights = [share.to(s.device).reshape(-1, *(1,) * (s.ndim - 1)) for s in stacked]
    means = [(w * s).sum(0) for w, s in zip(weights, stacked, strict=True)]
    errors = [s.std(0) / groups**0.5 for s in stacked]
    return Sensitivity(
        every.mean(),
        every.std() / len(every) ** 0.5,
        tree_unflatten(means, structure),
        tree_unflatten(errors, structure),
        sol.stats.execution,
    )


def _rows(p: Any, part: slice, batch: int) -> Any:
    return p[part] if isinstance(p, Tensor) and p.ndim and len(p) == batch else p


@final
@dataclasses.dataclass(frozen=True)
class _Detached:
    """A drift whose gradients are not wanted."""

    drift: Callable[[Tensor, Tensor], Tensor]

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        return self.drift(x, t).detach()


def _weighted(
    sde: AbstractSDE, x0: Tensor, params: Any, tensors: list[Tensor], times: tuple[float, float, int], **options: Any
) -> tuple[Solution, Tensor]:
    """A run, and the log-weight of each path from its own law: 0, with the score as its gradient."""
    refuse_jumps(sde, "a likelihood ratio is of Euler's steps", "take method='pathwise'")
    if isinstance(sde, SDE | ODE) and params is not None:
        sde = sde.with_params(params)
    if sde.noise is Noise.NONE:
        raise ValueError("the paths of an ODE have no density: take method='pathwise'")
    g = sde.diffusion(x0, torch.tensor(float(times[0]), dtype=x0.dtype, device=x0.device))
    for what, v in (("x0", x0), ("the diffusion", g)):
        if v.requires_grad and any(d is not None for d in torch.autograd.grad(
                v.sum(), tensors, allow_unused=True, retain_graph=True)):  # fmt: skip
            raise ValueError(
                f"{what} depends on wrt, and a likelihood ratio is of the drift alone: take method='pathwise', with "
                "sds.euler_law over the last step where the payoff jumps"
            )
    bare = SDE(_Detached(sde.drift), sde.diffusion, sde.noise, sde.calculus)
    sol = solve(bare, x0.detach(), *times, kl_to=sde.drift, **options)
    assert sol.log_weight is not None
    return sol, sol.log_weight


def _paid(payoff: Callable[[Tensor], Tensor], sol: Solution) -> Tensor:
    x = sol.xs[-1]
    paid = payoff(x)
    if not isinstance(paid, Tensor) or paid.shape != (len(x),):
        got = f"shape {tuple(paid.shape)}" if isinstance(paid, Tensor) else type(paid).__name__
        raise ValueError(f"payoff must return a number for each path, ({len(x)},), got {got}")
    return paid
