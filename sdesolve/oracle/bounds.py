"""What shows that a value of the oracle is right: coarser meshes, masses, and samples."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from sdesolve.oracle.particles import Measured

SAMPLE = 1 << 14  # states that a law is compared with
_COARSER = 1.5  # a mesh on which a value is found again
_RELATIVE, _ABSOLUTE = 2e-3, 1e-6  # by how much the two may differ
_LOST = 1e-6  # mass that a law may lack
_DEVIATIONS = 6.0  # of a sample's distribution function
_TAIL = 30  # states of a sample that lie beyond the quantiles which are compared


class UnresolvedError(ValueError):
    """A value that does not agree with itself."""


def is_resolved(value: float, coarse: float) -> bool:
    """Whether two values of one number are the same to the accuracy that the oracle promises."""
    return abs(value - coarse) <= _RELATIVE * abs(value) + _ABSOLUTE


def unresolved(value: float, coarse: float) -> str:
    """Why a value is refused."""
    return (
        f"no mesh within reach resolves this: two of them give {value:.4g} and {coarse:.4g}. End the grid at more "
        "noise, or take more steps"
    )


def twice(value: Callable[[float], float]) -> Measured:
    """``value(1.0)``, whose argument makes meshes coarser, with the difference to that on coarser meshes.

    Raises:
        UnresolvedError: they are not the same to the accuracy that the oracle promises.
    """
    coarse, fine = value(_COARSER), value(1.0)
    if not is_resolved(fine, coarse):
        raise UnresolvedError(unresolved(fine, coarse))
    return Measured(fine, bound=abs(fine - coarse))


def check_mass(mass: Tensor, lost: float = _LOST) -> None:
    """Refuses a law whose total mass is not 1, but for what may be ``lost``.

    Raises:
        UnresolvedError: it is not.
    """
    total = float(mass.sum())
    if not abs(total - 1.0) <= lost:
        raise UnresolvedError(
            f"the law of this sampler is not resolved: its mass is {total:.6g}. End the grid at more noise, or take "
            "more steps"
        )


def check_sample(x: Tensor, u: Tensor, y: Tensor) -> None:
    """Refuses a law on the line, of which ``x`` are the quantiles ``u``, that the sample ``y`` does not come from.

    Raises:
        UnresolvedError: at some quantile, the sample's distribution function is six of its standard deviations off.
    """
    n = len(y)
    compared = (u * n > _TAIL) & ((1.0 - u) * n > _TAIL)
    x, u = x[compared].contiguous(), u[compared]
    # States that are equal to rounding belong to either side.
    reach = 1e-9 * (x.abs() + y.std())
    low, high = (torch.searchsorted(y.sort().values, x + side * reach).double() / n for side in (-1.0, 1.0))
    allowed = _DEVIATIONS * (u * (1.0 - u) / n).sqrt() + 1.0 / n
    if bool(((low - u > allowed) | (u - high > allowed)).any()):
        raise UnresolvedError(
            f"the law that was followed is not that of {n} samples of this sampler: no exact error is known. End the "
            "grid at more noise, or take more steps"
        )
