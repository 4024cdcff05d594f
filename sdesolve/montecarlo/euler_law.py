"""The normal law of one Euler step: conditional expectations over the last step, and likelihoods of observed paths."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable
from typing import Any, final

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from sdesolve import grids
from sdesolve._internal.arguments import kind_of, whole_number
from sdesolve.conversions import to_ito
from sdesolve.integrate.checks import bad_rows, check_state
from sdesolve.integrate.problem import Watched
from sdesolve.sde import ODE, SDE, AbstractSDE, Noise, is_matrix


@final
@dataclasses.dataclass(frozen=True)
class EulerLaw:
    """The normal law of each entry of a state after one Euler step (`euler_law`).

    Expectations of functions that jump or bend are smooth in the state before the step and in parameters: averaged over
    paths in place of the function itself they have the same mean, less variance, and derivatives. Glasserman 2003,
    section 7.2.3.

    Attributes:
        mean: ``x + f dt``, ``(batch, *state)``.
        std: ``|g| sqrt|dt|``, likewise; for general noise, of each entry by itself.
    """

    mean: Tensor
    std: Tensor

    def above(self, level: float | Tensor) -> Tensor:
        """``P(X > level)``."""
        return self._normal(level, lambda d, excess: torch.special.ndtr(d), lambda excess: (excess > 0).to(excess))

    def excess(self, level: float | Tensor) -> Tensor:
        """``E max(X - level, 0)``; ``E max(level - X, 0)`` is ``excess(level) - mean + level``."""

        def smooth(d: Tensor, excess: Tensor) -> Tensor:
            return excess * torch.special.ndtr(d) + self.std * torch.exp(-0.5 * d.square()) / math.sqrt(2.0 * math.pi)

        return self._normal(level, smooth, lambda excess: excess.clamp(min=0.0))

    def expectation(self, function: Callable[[Tensor], Tensor], nodes: int = 32) -> Tensor:
        """``E function(X)`` by a Gauss rule, exact for polynomials of degree ``2 nodes - 1``.

        Args:
            function: elementwise; smooth, for the rule to be accurate.
            nodes: of the rule.
        """
        z, w = np.polynomial.hermite_e.hermegauss(whole_number(nodes, "nodes", 1))
        terms = (float(b) * function(self.mean + float(a) * self.std) for a, b in zip(z, w, strict=True))
        return torch.stack(list(terms)).sum(0) / math.sqrt(2.0 * math.pi)

    def _normal(
        self, level: float | Tensor, smooth: Callable[[Tensor, Tensor], Tensor], still: Callable[[Tensor], Tensor]
    ) -> Tensor:
        excess, none = self.mean - level, self.std == 0
        return torch.where(none, still(excess), smooth(excess / torch.where(none, 1.0, self.std), excess))


def euler_law(sde: AbstractSDE, x: Tensor, t0: float | Tensor, t1: float | Tensor, *, params: Any = None) -> EulerLaw:
    """The law of ``x + f(x, t0) dt + g(x, t0) dW``, in either direction of time.

    Args:
        sde: an SDE; a Stratonovich one is taken in Ito's form.
        x: states at ``t0``, ``(batch, *state)``.
        t0: where the step begins.
        t1: where it ends.
        params: as for `solve`.

    Raises:
        TypeError, ValueError: bad arguments, as for `solve`.

    Example:
        >>> price = sds.GeometricBrownianMotion(0.03, 0.2)
        >>> before = sds.solve(price, x0, 0.0, 0.99, 99, solver=sds.EulerMaruyama(), seed=0).x1
        >>> digital = euler_law(price, before, 0.99, 1.0).above(110.0).mean()
    """
    check_state(x, "x")
    times = torch.stack([grids.read_times(t, "t0 and t1").values for t in (t0, t1)])
    own = _prepared(sde, times, params)
    f, g = own.drift_and_diffusion(x, times[0].to(x))
    dt = (times[1] - times[0]).to(x)
    std = g.square().sum(-1).sqrt() if is_matrix(g, x) else g.abs()
    return EulerLaw(x + f * dt, (std * dt.abs().sqrt()).expand_as(x))


def pseudo_log_likelihood(
    sde: AbstractSDE, times: Iterable[float] | Tensor, paths: Tensor, *, params: Any = None
) -> Tensor:
    """The log-likelihood of observed paths with the normal transitions of Euler's scheme, ``(batch,)``.

    ``sum_k log N(x_(k+1); x_k + f dt, g g^T |dt|)``: what `EulerMaruyama` itself has on these times, and an
    approximation of the SDE's own where observations lie close. Gradients flow to all that the functions hold. The
    functions are called once, with a row for each transition, at a time for each row; ``params`` with a row per path
    are repeated. Florens-Zmirou 1989; Kessler 1997.

    Args:
        sde: an SDE; a Stratonovich one is taken in Ito's form.
        times: of the observations, ``(times,)``, or ``(times, batch)`` where paths were observed at times of their own;
            one that is observed less often repeats its last time and state.
        paths: ``(times, batch, *state)``.
        params: as for `solve`.

    Raises:
        TypeError: bad types.
        ValueError: shapes that do not fit, states that are not finite, or transitions without a density, as where the
            diffusion is zero or has fewer motions than the state has entries.

    Example:
        >>> total = lambda p: pseudo_log_likelihood(sde, times, paths, params=p).sum()
        >>> errors = torch.linalg.inv(-torch.autograd.functional.hessian(total, fitted)).diagonal().sqrt()
    """
    check_state(paths, "paths")
    given = grids.read_times(times, "times").values
    if paths.ndim < 2 or given.ndim not in (1, 2) or given.shape[:1] != paths.shape[:1] or len(given) < 2:
        raise ValueError(
            "times must be (times,) or (times, batch), and paths (times, batch, *state), of at least two times; got "
            f"{tuple(given.shape)} and {tuple(paths.shape)}"
        )
    if given.ndim == 2 and given.shape[1] != paths.shape[1]:
        raise ValueError(f"times are of {given.shape[1]} paths, and paths holds {paths.shape[1]}")
    grid = grids.check_grid(given, padded=True)
    steps, batch = len(grid) - 1, paths.shape[1]
    params = tree_map(lambda p: _by_transition(p, batch, steps), params)
    own = _prepared(sde, grid, params)
    t, dt = (v.reshape(steps, -1).expand(steps, batch).reshape(-1) for v in (grid[:-1], grid.diff(dim=0)))
    x, y = (v.reshape(steps * batch, *paths.shape[2:]) for v in (paths[:-1], paths[1:]))
    h = dt.to(x)
    f, g = own.drift_and_diffusion(x, t.to(x))
    still = h == 0
    h = torch.where(still, 1.0, h).reshape(-1, *(1,) * (x.ndim - 1))
    logs = _log_density(own, x, y - x - f * h, g, h)
    logs = torch.where(still, 0.0, logs)
    if not bool(logs.isfinite().all()):
        at = int(bad_rows(logs).nonzero()[0])
        raise ValueError(
            f"the transition of path {at % batch} from t = {float(t[at]):.6g} has no density: the diffusion is zero or "
            "singular there, or drift or diffusion are not finite"
        )
    return logs.reshape(steps, batch).sum(0)


def _prepared(sde: AbstractSDE, times: Tensor, params: Any) -> Watched:
    """The equation in Ito's form, checked when it is called."""
    if not isinstance(sde, AbstractSDE):
        raise TypeError(f"sde must be an SDE of sdesolve, got {kind_of(sde)}; wrap functions in sds.SDE")
    if params is not None:
        if not isinstance(sde, SDE | ODE):
            raise TypeError(f"params go to the functions of an SDE, and {type(sde).__name__} holds its own")
        sde = sde.with_params(params)
    if sde.noise is Noise.NONE or not sde.has_diffusion:
        raise ValueError("an Euler step has a law where there is a diffusion: give an SDE with drift and diffusion")
    sign = float((times[-1] - times[0]).sum().sign())
    return Watched(to_ito(sde).directed(sign), times)


def _by_transition(p: Any, batch: int, steps: int) -> Any:
    if isinstance(p, Tensor) and p.ndim and len(p) == batch > 1:
        return p.repeat(steps, *(1,) * (p.ndim - 1))
    return p


def _log_density(sde: Watched, x: Tensor, v: Tensor, g: Tensor, h: Tensor) -> Tensor:
    """``log N(v; 0, g g^T |h|)`` of each row."""
    d = math.prod(x.shape[1:])
    if is_matrix(g, x):
        G = g.expand(*x.shape, -1).reshape(len(x), d, -1)
        if G.shape[-1] >= d:
            covariance = G @ G.mT
            L, failed = torch.linalg.cholesky_ex(covariance)
            z = torch.linalg.solve_triangular(L, v.reshape(len(x), d, 1), upper=False).reshape(len(x), d)
            left, whole = L.diagonal(dim1=1, dim2=2), covariance.diagonal(dim1=1, dim2=2)
            singular = (left.square() <= 16 * d * torch.finfo(x.dtype).eps * whole).any(1) | (failed > 0)
            log_det = torch.where(singular, torch.nan, left.abs().log().sum(1))
            size = h.reshape(-1).abs()
            return -0.5 * z.square().sum(1) / size - log_det - 0.5 * d * torch.log(2.0 * math.pi * size)
    elif d == 1 or (sde.noise is not Noise.SCALAR and sde.channels(x) is None):
        variance = (g.square() * h.abs()).expand_as(x)
        return -0.5 * (v.square() / variance + torch.log(2.0 * math.pi * variance)).reshape(len(x), d).sum(1)
    raise ValueError(
        f"a transition has no density: fewer Brownian motions than the {d} entries of the state drive it. Observe as "
        "many entries as there are motions, or add noise of the observation"
    )
