"""An iteration of training a latent SDE, the example of torchsde: 512 paths, 200 steps, networks of width 200.

The posterior drift is a network of state and time, the prior is an Ornstein-Uhlenbeck process, and the divergence of
the one from the other is integrated beside the state. An iteration is a loss on saved states and its gradient in all
weights. Each contender draws noise of its own; loss and the gradient of the last bias are held against ours of other
seeds.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn

import sdesolve as sds
from benchmarks.registry import BASELINE, Build, Call, Problem, require

__all__ = ["latent"]

_PATHS, _STEPS, _END = 512, 200, 2.0
_RATE, _SIGMA = 1.0, 0.5
_SEEDS = 12


class _Posterior(nn.Module):
    """The equation for torchsde too, which calls `f` and `g`."""

    noise_type, sde_type = "diagonal", "ito"

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            layers = (nn.Linear(3, 200), nn.Tanh(), nn.Linear(200, 200), nn.Tanh(), nn.Linear(200, 1))
            self.net = nn.Sequential(*layers)

    def f(self, t: Tensor, x: Tensor) -> Tensor:
        y = x[:, :1]
        time = t * torch.ones_like(y)
        drift = self.net(torch.cat([time.sin(), time.cos(), y], 1))
        u = (drift + _RATE * y) / _SIGMA
        return torch.cat([drift, 0.5 * u.square()], 1)

    def g(self, t: Tensor, x: Tensor) -> Tensor:
        y = x[:, :1]
        return torch.cat([_SIGMA * torch.ones_like(y), torch.zeros_like(y)], 1)


def _start() -> Tensor:
    y = torch.randn(_PATHS, 1, generator=torch.Generator().manual_seed(1))
    return torch.cat([y, torch.zeros_like(y)], 1)


def _iteration(model: _Posterior, xs: Tensor) -> Tensor:
    """Value of the loss and the gradient of the last bias, of that in all weights."""
    loss = xs[..., 0].square().mean() + 0.1 * xs[-1, :, 1].mean()
    made = torch.autograd.grad(loss, list(model.parameters()))
    return torch.stack([loss.detach(), made[-1][0]])


def _ours(*, seed: int = 0, **options: Any) -> Call:
    model, x0 = _Posterior(), _start()
    sde = sds.SDE(lambda x, t: model.f(t, x), lambda x, t: model.g(t, x))
    saves = [0.5, 1.0, 1.5, 2.0]

    def call() -> Tensor:
        solver = sds.EulerMaruyama()
        sol = sds.solve(sde, x0, 0.0, _END, _STEPS, solver=solver, seed=seed, save_at=saves, **options)
        return _iteration(model, sol.xs)

    return call


def _loop() -> Call:
    model, x0, dt = _Posterior(), _start(), _END / _STEPS

    def call() -> Tensor:
        x, xs = x0, []
        for k in range(_STEPS):
            t = torch.tensor(k * dt)
            x = x + model.f(t, x) * dt + model.g(t, x) * torch.randn_like(x) * dt**0.5
            if (k + 1) % 50 == 0:
                xs.append(x)
        return _iteration(model, torch.stack(xs))

    return call


def _torchsde() -> Call:
    require("torchsde")
    import torchsde

    model, x0, ts = _Posterior(), _start(), torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0])

    def call() -> Tensor:
        bm = torchsde.BrownianInterval(0.0, _END, size=(_PATHS, 2), dt=_END / _STEPS, cache_size=None)
        return _iteration(model, torchsde.sdeint(model, x0, ts, bm=bm, method="euler", dt=_END / _STEPS)[1:])

    return call


def latent(device: torch.device) -> list[Problem]:
    """On the CPU."""
    if device.type != "cpu":
        return []

    @functools.cache
    def reference() -> Tensor:
        return torch.stack([_ours(seed=seed)() for seed in range(1, _SEEDS + 1)])

    def check(contender: str, call: Call) -> str | None:
        made, known = call(), reference()
        # Six deviations, themselves known from twelve seeds to a fifth.
        error = ((made - known.mean(0)).abs() / (known.std(0) * (1 + 1 / _SEEDS) ** 0.5)).max()
        return None if float(error) < 7 else f"loss or gradient is {float(error):.1f} standard errors off"

    contenders: dict[str, Build] = {
        BASELINE: _ours,
        "sdesolve checkpoint": lambda: _ours(gradients="checkpoint"),
        "torch loop": _loop,
        "torchsde": _torchsde,
    }
    name = f"latent SDE, {_PATHS} x {_STEPS}"
    work = _PATHS * _STEPS
    return [
        Problem(
            name, "gradients", "path-step", work, contenders, check, quick=("torchsde",), release=reference.cache_clear
        )
    ]  # fmt: skip
