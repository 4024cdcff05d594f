"""Models whose kernels are measured, on CPUs and GPUs, and counted ahead of time: equations, starts and step counts.

The bacterial stress response is the chemical Langevin model of Utkarsh et al. 2024 (CMAME 419:116591), with its sweep
over six parameters; the linear SDE is theirs too.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from typing import Any, final

import torch
from torch import Tensor

import sdesolve as sds
from sdesolve.sde import AbstractSDE

__all__ = ["MODELS", "Model", "ornstein_uhlenbeck", "stress_parameters"]


@final
@dataclasses.dataclass(frozen=True)
class Model:
    """An initial value problem.

    Attributes:
        sde: made for a device.
        start: state of so many paths, ``(paths, *state)``, on a device.
        span: first and last time.
        steps: in a full-size run.
        params: of so many paths, on a device; ``None`` if there are none.
        solver: makes the scheme.
    """

    sde: Callable[[torch.device], AbstractSDE]
    start: Callable[[int, torch.device], Tensor]
    span: tuple[float, float]
    steps: int
    params: Callable[[int, torch.device], Tensor] | None = None
    solver: Callable[[], Any] = sds.EulerMaruyama

    def early(self, steps: int) -> Tensor:
        """The first times of a full-size run's grid."""
        first, last = self.span
        return first + (last - first) * torch.arange(steps + 1, dtype=torch.float64) / self.steps

    def until(self, steps: int) -> float:
        """Where the first steps of a full-size run's grid end."""
        first, last = self.span
        return first + (last - first) * steps / self.steps

    def solve(
        self, paths: int, steps: int | None = None, device: torch.device | str = "cpu", **options: Any
    ) -> sds.Solution:
        """One run through the public function."""
        device, dtype = torch.device(device), options.pop("dtype", torch.float32)
        if self.params is not None:
            options["params"] = self.params(paths, device)
        options = {"solver": self.solver(), "seed": 0, **options}
        span = () if "grid" in options else (*self.span, steps or self.steps)
        return sds.solve(self.sde(device), self.start(paths, device).to(dtype), *span, **options)


def _same(*x0: float) -> Callable[[int, torch.device], Tensor]:
    return lambda paths, device: torch.tensor(x0, device=device).repeat(paths, 1)


def _normal(width: int) -> Callable[[int, torch.device], Tensor]:
    def start(paths: int, device: torch.device) -> Tensor:
        return torch.randn(paths, width, generator=torch.Generator().manual_seed(0)).to(device)

    return start


# Bacterial stress response ---------------------------------------------------------------------------------------
_GRIDS = (
    (0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0),  # tau
    (0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2),  # v0
    (2.0, 3.0, 4.0),  # n
    (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1),  # eta
)


def stress_parameters(points: int) -> Tensor:
    """``(1680 points^2, 6)``: S and D on so many points each between 0.1 and 100, with every tau, v0, n and eta."""
    axis = torch.logspace(-1, 2, points)
    return torch.cartesian_prod(axis, axis, *(torch.tensor(values) for values in _GRIDS))


def _stress_params(paths: int, device: torch.device) -> Tensor:
    points = next(n for n in itertools.count(1) if 1680 * n * n >= paths)
    return stress_parameters(points)[:paths].to(device)


def _rates(x: Tensor, p: Tensor) -> tuple[Tensor, ...]:
    """Of the eight reactions; the fourth and fifth are alike, and so are the sixth and seventh."""
    S, D, tau, v0, n, _ = p.unbind(1)
    sigma, A1, A2, A3 = x.unbind(1)
    up, down = (S * sigma) ** n, (D * A3) ** n
    return v0 + up / (up + down + 1), sigma, sigma / tau, A1 / tau, A2 / tau, A3 / tau


def _stress_drift(x: Tensor, t: Tensor, p: Tensor) -> Tensor:
    r1, r2, r3, r4, r6, r8 = _rates(x, p)
    return torch.stack([r1 - r2, r3 - r4, r4 - r6, r6 - r8], dim=1)


def _stress_diffusion(x: Tensor, t: Tensor, p: Tensor) -> Tensor:
    a1, a2, a3, a4, a6, a8 = (p[:, 5] * torch.sqrt(torch.clamp(r, min=0)) for r in _rates(x, p))
    o = torch.zeros_like(a1)
    rows = [
        [a1, -a2, o, o, o, o, o, o],
        [o, o, a3, -a4, o, o, o, o],
        [o, o, o, o, a4, -a6, o, o],
        [o, o, o, o, o, o, a6, -a8],
    ]
    return torch.stack([torch.stack(row, dim=1) for row in rows], dim=1)


def _stress_start(paths: int, device: torch.device) -> Tensor:
    return _stress_params(paths, device)[:, 3:4].repeat(1, 4)


# Others ----------------------------------------------------------------------------------------------------------
def _heston_drift(x: Tensor, t: Tensor) -> Tensor:
    price, v = x.unbind(1)
    return torch.stack([0.05 * price, 2.0 * (0.04 - v.clamp(min=0))], dim=1)


def _heston_diffusion(x: Tensor, t: Tensor) -> Tensor:
    price, v = x.unbind(1)
    root, rho = v.clamp(min=0).sqrt(), -0.7
    first = torch.stack([price * root, torch.zeros_like(root)], dim=1)
    second = torch.stack([0.3 * rho * root, 0.3 * (1 - rho**2) ** 0.5 * root], dim=1)
    return torch.stack([first, second], dim=1)


def _volterra_drift(x: Tensor, t: Tensor) -> Tensor:
    prey, predators = x.unbind(1)
    return torch.stack([prey * (1.5 - predators), predators * (prey - 3.0)], dim=1)


def _lorenz_drift(x: Tensor, t: Tensor) -> Tensor:
    a, b, c = x.unbind(1)
    return torch.stack([10.0 * (b - a), a * (28.0 - c) - b, a * b - 8.0 / 3.0 * c], dim=1)


def _mixture_reverse(device: torch.device) -> AbstractSDE:
    angle = torch.arange(8) * (torch.pi / 4)
    means = 4.0 * torch.stack([angle.cos(), angle.sin()], dim=1)
    data = sds.GaussianMixture(means.to(device), torch.full((8,), 0.3, device=device))
    process = sds.VP()
    return process.reverse(data.score(process))


def _linear(rate: float, volatility: float) -> Callable[[torch.device], AbstractSDE]:
    return lambda device: sds.SDE(lambda x, t: rate * x, lambda x, t: volatility * x, noise="diagonal")


def ornstein_uhlenbeck(width: int) -> Model:
    """``dX = -X dt + dW / 2`` in any dimension, from 1, on [0, 1]."""
    sde = sds.SDE(lambda x, t: -x, lambda x, t: torch.full_like(x, 0.5), noise="diagonal")
    return Model(lambda device: sde, _same(*(1.0,) * width), (0.0, 1.0), 256)


MODELS = {
    "geometric": Model(_linear(1.5, 0.01), _same(0.1), (0.0, 1.0), 256),
    "linear": Model(_linear(1.5, 0.01), _same(0.1, 0.1, 0.1), (0.0, 1.0), 256),
    "stress": Model(
        lambda device: sds.SDE(_stress_drift, _stress_diffusion, noise="general"),
        _stress_start, (0.0, 1000.0), 10_000, _stress_params,
    ),
    "heston": Model(
        lambda device: sds.SDE(_heston_drift, _heston_diffusion, noise="general"), _same(1.0, 0.04), (0.0, 1.0), 256
    ),
    "lotka-volterra": Model(
        lambda device: sds.SDE(_volterra_drift, lambda x, t: 0.1 * x, noise="diagonal"), _same(1.0, 1.0), (0.0, 10.0),
        2000,
    ),
    "lorenz": Model(
        lambda device: sds.SDE(_lorenz_drift, lambda x, t: 0.1 * x, noise="diagonal"), _same(1.0, 1.0, 1.0),
        (0.0, 10.0), 2000,
    ),
    "mixture": Model(
        _mixture_reverse, _normal(2), (1.0, 1e-3), 256
    ),
}  # fmt: skip
