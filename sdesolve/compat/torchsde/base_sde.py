"""Base classes of equations, and the divergence from a prior beside the state."""

from __future__ import annotations

import abc
from typing import Any, final

import torch
from torch import Tensor, nn

from sdesolve._internal.arguments import short
from sdesolve.compat.torchsde.settings import NOISE_TYPES, SDE_TYPES


class BaseSDE(abc.ABC, nn.Module):
    """An SDE ``dY = f(t, Y) dt + g(t, Y) dW`` as torchsde wants it: a module with methods ``f`` and ``g``.

    Args:
        noise_type: ``diagonal``, ``scalar``, ``additive`` or ``general``.
        sde_type: ``ito`` or ``stratonovich``.

    Raises:
        ValueError: an unknown type.
    """

    def __init__(self, noise_type: str, sde_type: str) -> None:
        super().__init__()
        for name, value, known in (("noise_type", noise_type, NOISE_TYPES), ("sde_type", sde_type, SDE_TYPES)):
            if value not in known:
                raise ValueError(f"{name} must be one of {known}, got {short(value)}")
        self.noise_type, self.sde_type = noise_type, sde_type


class SDEIto(BaseSDE):
    """An Ito SDE.

    Args:
        noise_type: as of `BaseSDE`.
    """

    def __init__(self, noise_type: str) -> None:
        super().__init__(noise_type, SDE_TYPES.ito)


class SDEStratonovich(BaseSDE):
    """A Stratonovich SDE.

    Args:
        noise_type: as of `BaseSDE`.
    """

    def __init__(self, noise_type: str) -> None:
        super().__init__(noise_type, SDE_TYPES.stratonovich)


@final
class WithDivergence:
    """An SDE with ``1/2 int |u|^2 dt`` as one more entry of its state: ``g u = f - h``, ``h`` the drift of a prior.

    ``u`` is the shortest of the best fits, where noise does not reach every direction.
    """

    def __init__(self, sde: Any, f: Any, g: Any, h: Any) -> None:
        self.noise_type, self.sde_type = sde.noise_type, sde.sde_type
        self._f, self._g, self._h = f, g, h

    def f(self, t: Tensor, y: Tensor) -> Tensor:
        return self.f_and_g(t, y)[0]

    def g(self, t: Tensor, y: Tensor) -> Tensor:
        g = self._g(t, y[:, :-1])
        return torch.cat([g, torch.zeros_like(g[:, :1])], 1)

    def f_and_g(self, t: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        y = y[:, :-1]
        f, g = self._f(t, y), self._g(t, y)
        u = control(f - self._h(t, y), g, self.noise_type)
        energy = 0.5 * (u * u).sum(1, keepdim=True)
        return torch.cat([f, energy], 1), torch.cat([g, torch.zeros_like(g[:, :1])], 1)


def control(v: Tensor, g: Tensor, noise_type: str) -> Tensor:
    """The ``u`` that fits ``g u = v`` best; infinite where an entry of diagonal noise is 0 and its ``v`` is not."""
    if noise_type != NOISE_TYPES.diagonal:
        return (torch.linalg.pinv(g) @ v.unsqueeze(-1)).squeeze(-1)
    return v / torch.where((g == 0) & (v == 0), 1.0, g)
