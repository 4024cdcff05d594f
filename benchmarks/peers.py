"""The linear SDE of Utkarsh et al. 2024 in other hands: each peer run the way its documentation says is fastest.

``dX = 1.5 X dt + 0.01 X dW``, ``X_0 = (0.1, 0.1, 0.1)``, on [0, 1], Euler-Maruyama, float32. A contender takes a number
of paths and steps and returns a function without arguments that integrates them and gives the final states as an array;
``None`` if its package is missing.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import sdesolve as sds

__all__ = ["LINEAR"]

Contender = Callable[[int, int], Callable[[], Any] | None]

_RATE, _VOLATILITY, _START = 1.5, 0.01, 0.1


def _has(*packages: str) -> bool:
    return all(importlib.util.find_spec(p) is not None for p in packages)


def _sdesolve(paths: int, steps: int) -> Callable[[], Tensor]:
    sde = sds.SDE(lambda x, t: _RATE * x, lambda x, t: _VOLATILITY * x, noise="diagonal")
    x0 = torch.full((paths, 3), _START)
    return lambda: sds.solve(sde, x0, 0.0, 1.0, steps, solver=sds.EulerMaruyama(), seed=0, backend="fused").x1


def _torch_loop(paths: int, steps: int) -> Callable[[], Tensor]:
    """As one would write it for speed: no autograd, buffers reused, operations in place."""
    x0, noise = torch.full((paths, 3), _START), torch.empty(paths, 3)
    dt = 1.0 / steps
    root = _VOLATILITY * dt**0.5

    @torch.no_grad()
    def loop() -> Tensor:
        x = x0.clone()
        for _ in range(steps):
            noise.normal_()
            noise.mul_(root).add_(1.0 + _RATE * dt)
            x.mul_(noise)
        return x

    return loop


def _torchsde(paths: int, steps: int) -> Callable[[], Tensor] | None:
    if not _has("torchsde"):
        return None
    import torchsde

    class Linear(torch.nn.Module):
        noise_type, sde_type = "diagonal", "ito"

        def f(self, t: Tensor, y: Tensor) -> Tensor:
            return _RATE * y

        def g(self, t: Tensor, y: Tensor) -> Tensor:
            return _VOLATILITY * y

    sde, x0, ts = Linear(), torch.full((paths, 3), _START), torch.tensor([0.0, 1.0])

    @torch.no_grad()
    def run() -> Tensor:
        # A step for each interval asked for, and no cache of intervals to come back to: its quickest settings.
        bm = torchsde.BrownianInterval(0.0, 1.0, size=(paths, 3), cache_size=None)
        last: Tensor = torchsde.sdeint(sde, x0, ts, bm=bm, method="euler", dt=1.0 / steps)[-1]
        return last

    return run


def _jax_scan(paths: int, steps: int) -> Callable[[], Any] | None:
    if not _has("jax"):
        return None
    import jax
    import jax.numpy as jnp

    dt = 1.0 / steps
    x0 = jnp.full((paths, 3), _START, dtype=jnp.float32)

    @jax.jit
    def run(key: Any) -> Any:
        def step(x: Any, key: Any) -> Any:
            z = jax.random.normal(key, x.shape, dtype=x.dtype)
            return x + _RATE * x * dt + _VOLATILITY * x * (dt**0.5 * z), None

        return jax.lax.scan(step, x0, jax.random.split(key, steps))[0]

    key = jax.random.key(0)
    return lambda: run(key).block_until_ready()


def _diffrax(paths: int, steps: int) -> Callable[[], Any] | None:
    if not _has("jax", "diffrax"):
        return None
    import diffrax
    import jax
    import jax.numpy as jnp
    import lineax

    x0 = jnp.full((paths, 3), _START, dtype=jnp.float32)

    @jax.jit
    def run(key: Any) -> Any:
        def one(x: Any, key: Any) -> Any:
            noise = diffrax.UnsafeBrownianPath((3,), key)
            drift = diffrax.ODETerm(lambda t, y, args: _RATE * y)
            diffusion = diffrax.ControlTerm(lambda t, y, args: lineax.DiagonalLinearOperator(_VOLATILITY * y), noise)
            solution = diffrax.diffeqsolve(
                diffrax.MultiTerm(drift, diffusion), diffrax.Euler(), 0.0, 1.0, 1.0 / steps, x,
                saveat=diffrax.SaveAt(t1=True), adjoint=diffrax.DirectAdjoint(), max_steps=steps + 1,
            )  # fmt: skip
            return solution.ys[0]

        return jax.vmap(one)(x0, jax.random.split(key, paths))

    key = jax.random.key(0)
    return lambda: run(key).block_until_ready()


LINEAR: dict[str, Contender] = {
    "sdesolve": _sdesolve,
    "torch loop": _torch_loop,
    "torchsde": _torchsde,
    "jax scan": _jax_scan,
    "diffrax": _diffrax,
}
