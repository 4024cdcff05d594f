"""The same process in the other calculus, and with correlated noise."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, final

import torch
from torch import Tensor

from sdesolve._internal.arguments import kind_of
from sdesolve.jumps import refuse_jumps
from sdesolve.sde import SDE, AbstractSDE, Calculus, Noise, is_matrix


def to_stratonovich(sde: AbstractSDE) -> AbstractSDE:
    """The Stratonovich SDE with the solutions of an Ito SDE: ``f - sum_k (g_k . grad) g_k / 2`` is its drift.

    For solvers of Stratonovich SDEs. The derivatives are taken by automatic differentiation: one for scalar and
    diagonal noise, one for each channel of general noise, none for additive noise. Where `solve` integrates backwards
    in time the sum has the other sign, for the motion that drives runs backwards then. Kloeden and Platen 1992,
    section 4.9.

    Args:
        sde: any SDE; diagonal noise must have each ``g_i`` depend on ``x_i`` alone, which `solve` tests. A Stratonovich
            SDE is returned as it is.

    Returns:
        An SDE of the same noise type; a third argument of its functions (``params`` of `solve`) is passed on.

    Raises:
        TypeError: ``sde`` is none.
    """
    return _converted(sde, Calculus.STRATONOVICH)


def to_ito(sde: AbstractSDE) -> AbstractSDE:
    """The Ito SDE with the solutions of a Stratonovich SDE: ``f + sum_k (g_k . grad) g_k / 2`` is its drift.

    Otherwise as `to_stratonovich`, which it undoes.

    Args:
        sde: in either calculus; one in Ito's comes back as it is.

    Raises:
        TypeError: ``sde`` is none.
    """
    return _converted(sde, Calculus.ITO)


def correlated(sde: AbstractSDE, cholesky: Tensor) -> AbstractSDE:
    """An SDE driven by correlated Brownian motions, ``dX = f dt + g L dB`` with independent ``B``.

    Args:
        sde: with diagonal noise (or additive, elementwise), whose motions ``W`` drive an element of the state each, in
            row-major order; or with general noise, or an additive matrix.
        cholesky: ``L: (channels of sde, new channels)``, a factor of the covariance ``L L^T`` of ``W`` per time: a
            Cholesky factor of a correlation matrix, or any other.

    Returns:
        An SDE of the same calculus with general noise, or additive noise, with a matrix for its diffusion.

    Raises:
        TypeError: ``sde`` is no SDE, ``cholesky`` no tensor of real numbers.
        ValueError: scalar noise or none; an SDE that was converted to its calculus; ``cholesky`` is no matrix of finite
            numbers, or, when called, does not fit.
    """
    _check(sde)
    if sde.noise in (Noise.NONE, Noise.SCALAR):
        raise ValueError(f"noise of several channels can be correlated, and this equation has {sde.noise} noise")
    if not isinstance(cholesky, Tensor) or not cholesky.is_floating_point():
        raise TypeError(f"cholesky must be a tensor of real numbers, got {kind_of(cholesky)}")
    if cholesky.ndim != 2 or not bool(cholesky.isfinite().all()):
        raise ValueError(
            f"cholesky must be a matrix of finite numbers, (channels, new channels), got shape {tuple(cholesky.shape)}"
        )
    if isinstance(sde, SDE) and sde.is_converted:
        raise ValueError("correlated noise has another correction between the calculi: correlate first, then convert")
    own = _own(sde)
    if not own.has_diffusion:
        _check_channels(cholesky, *(own.channels(cholesky) or ()))
    return own.correlated(lambda function, of: _Correlated(function, of, cholesky), cholesky.shape[1])


@final
@dataclasses.dataclass(frozen=True)
class _Correlated:
    """``g L``, from a function ``of`` the diffusion, of drift and diffusion jointly, or of its product."""

    function: Callable[..., Any]
    of: str
    factor: Tensor

    def __call__(self, x: Tensor, t: Tensor, *others: Any) -> Any:
        L = self.factor.to(x)
        if self.of == "product":
            v, *params = others
            return self.function(x, t, v @ L.T, *params)
        made = self.function(x, t, *others)
        return (made[0], _times(made[1], L, x)) if self.of == "joint" else _times(made, L, x)


def _times(g: Any, L: Tensor, x: Tensor) -> Tensor:
    g = torch.as_tensor(g, dtype=x.dtype, device=x.device) if isinstance(g, float | int) else g
    _check_channels(L, g.shape[-1] if is_matrix(g, x) else x[0].numel())
    if is_matrix(g, x):
        return (g[..., :, None] * L).sum(-2)
    return g.expand_as(x)[..., None] * L.reshape(*x.shape[1:], -1)


def _check_channels(L: Tensor, channels: int) -> None:
    if L.shape[0] != channels:
        raise ValueError(f"cholesky has {L.shape[0]} rows, and the noise of the SDE has {channels} channels")


def _converted(sde: AbstractSDE, calculus: Calculus) -> AbstractSDE:
    _check(sde)
    if sde.noise is Noise.NONE or sde.calculus is calculus:
        return sde
    return _own(sde).in_calculus(calculus)


def _own(sde: AbstractSDE) -> SDE:
    if isinstance(sde, SDE):
        return sde
    if sde.joint:
        return SDE(noise=sde.noise, calculus=sde.calculus, drift_and_diffusion=sde.drift_and_diffusion)
    return SDE(sde.drift, sde.diffusion, sde.noise, sde.calculus)


def _check(sde: AbstractSDE) -> None:
    if not isinstance(sde, AbstractSDE):
        raise TypeError(f"sde must be an SDE of sdesolve, got {kind_of(sde)}; wrap functions in sds.SDE")
    refuse_jumps(
        sde, "this is done with drift and diffusion alone",
        "convert the part between jumps, as in JumpSDE(sds.to_ito(sde), rate=..., jump=...)",
    )  # fmt: skip
