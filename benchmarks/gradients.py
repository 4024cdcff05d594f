"""Value and gradient of a loss over many paths: stochastic Lotka-Volterra and Heston, whose parameters are fitted.

Backwards, and forwards: along the parameters themselves (`jvp`), and along each of them (`jacfwd`).

The gradient of the mean of ``x_T^2`` in the parameters, which all paths share. Each contender draws noise of its own;
its gradient is held against that of many more paths in float64, with the standard error of as many as it has.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, final

import torch
from torch import Tensor
from torch.func import jacfwd, jvp

import sdesolve as sds
from benchmarks.registry import BASELINE, Build, Call, Problem, require

__all__ = ["HESTON", "LOTKA_VOLTERRA", "Fitted", "equation", "gradients"]

_GROUPS = 16  # as many times the paths of a contender make the reference


@final
class Fitted(NamedTuple):
    """An equation with diagonal noise, written for torch and JAX alike.

    Attributes:
        drift, diffusion: of the components and the parameters; ``m`` is the module that computes.
        start: of every path.
        values: the parameters.
        end: the last time.
    """

    drift: Callable[[Any, Any, Any, Any], tuple[Any, Any]]
    diffusion: Callable[[Any, Any, Any, Any], tuple[Any, Any]]
    start: tuple[float, float]
    values: tuple[float, ...]
    end: float


LOTKA_VOLTERRA = Fitted(
    lambda m, u, v, p: (p[0] * u - p[1] * u * v, p[2] * u * v - p[3] * v),
    lambda m, u, v, p: (p[4] * u, p[5] * v),
    (10.0, 5.0), (1.1, 0.4, 0.1, 0.4, 0.1, 0.12), 5.0,
)  # fmt: skip
HESTON = Fitted(  # independent noises, the variance cut at a small number below which it is taken as that
    lambda m, s, v, p: (0.03 * s, p[0] * (p[1] - v)),
    lambda m, s, v, p: (s * m.sqrt(m.maximum(v, 1e-6 + 0 * v)), (p[2] + p[3] * v) * m.sqrt(m.maximum(v, 1e-6 + 0 * v))),
    (1.0, 0.04), (2.0, 0.04, 0.3, 0.1), 1.0,
)  # fmt: skip


def equation(model: Fitted, p: Tensor) -> sds.SDE:
    """With these parameters."""

    def both(function: Callable[..., Any]) -> Callable[[Tensor, Tensor], Tensor]:
        return lambda x, t: torch.stack(function(torch, x[:, 0], x[:, 1], p), 1)

    return sds.SDE(both(model.drift), both(model.diffusion))


def _ours(model: Fitted, paths: int, steps: int, backend: str, *, at_once: bool = False) -> Call:
    """The loss is made of the final states; `at_once`, it is the mean that the run gives with its gradient."""
    p = torch.tensor(model.values, requires_grad=True)
    sde, x0 = equation(model, p), torch.tensor(model.start).expand(paths, 2).clone()
    options: dict[str, Any] = {"solver": sds.EulerMaruyama(), "seed": 0, "backend": backend}
    if at_once:
        options |= {"observable": lambda x: x.square().mean(1), "reduce": "moments"}

    def call() -> Tensor:
        sol = sds.solve(sde, x0, 0.0, model.end, steps, **options)
        loss = sol.x1.square().mean() if sol.mean is None else sol.mean.sum()
        return torch.autograd.grad(loss, p)[0]

    return call


def _value_alone(model: Fitted, paths: int, steps: int) -> Call:
    """Our forward run, without a gradient: no peer, and what its price is counted in."""
    sde, x0 = equation(model, torch.tensor(model.values)), torch.tensor(model.start).expand(paths, 2).clone()
    options: dict[str, Any] = {"solver": sds.EulerMaruyama(), "seed": 0, "backend": "fused"}
    return lambda: sds.solve(sde, x0, 0.0, model.end, steps, **options).x1.square().mean()


def _forwards(model: Fitted, paths: int, steps: int, backend: str, *, every: bool) -> Call:
    """Along each parameter, or along them all at once."""
    p, x0 = torch.tensor(model.values), torch.tensor(model.start).expand(paths, 2).clone()

    def loss(p: Tensor) -> Tensor:
        sol = sds.solve(
            equation(model, p), x0, 0.0, model.end, steps, solver=sds.EulerMaruyama(), seed=0, backend=backend
        )
        return sol.x1.square().mean()

    return (lambda: jacfwd(loss)(p)) if every else lambda: jvp(loss, (p,), (p,))[1].reshape(1)


def _loop(model: Fitted, paths: int, steps: int) -> Call:
    p, x0, dt = torch.tensor(model.values, requires_grad=True), torch.tensor(model.start), model.end / steps

    def call() -> Tensor:
        u, v = x0.expand(paths, 2).unbind(1)
        for _ in range(steps):
            z = torch.randn(2, paths) * dt**0.5
            (f, g), (a, b) = model.drift(torch, u, v, p), model.diffusion(torch, u, v, p)
            u, v = u + f * dt + a * z[0], v + g * dt + b * z[1]
        return torch.autograd.grad((u.square().mean() + v.square().mean()) / 2, p)[0]

    return call


def _jax(model: Fitted, paths: int, steps: int, mode: str = "value_and_grad") -> Call:
    """A jitted ``value_and_grad``, ``jvp`` or ``jacfwd`` of a scan, noise drawn in its body."""
    require("jax")
    import jax
    import jax.numpy as jnp

    dt = model.end / steps

    def loss(p: Any, key: Any) -> Any:
        def body(x: Any, key: Any) -> Any:
            z = jax.random.normal(key, (2, paths)) * dt**0.5
            (f, g), (a, b) = model.drift(jnp, *x, p), model.diffusion(jnp, *x, p)
            return (x[0] + f * dt + a * z[0], x[1] + g * dt + b * z[1]), None

        start = tuple(jnp.full((paths,), s) for s in model.start)
        (u, v), _ = jax.lax.scan(body, start, jax.random.split(key, steps))
        return ((u**2).mean() + (v**2).mean()) / 2

    key, p = jax.random.key(0), jnp.array(model.values)
    if mode == "jvp":
        along = jax.jit(lambda p, key: jax.jvp(lambda q: loss(q, key), (p,), (p,))[1].reshape(1))
        return lambda: along(p, key).block_until_ready()
    if mode == "jacfwd":
        forwards = jax.jit(jax.jacfwd(loss))
        return lambda: forwards(p, key).block_until_ready()
    run = jax.jit(jax.value_and_grad(loss))
    return lambda: run(p, key)[1].block_until_ready()


def _torchsde(model: Fitted, paths: int, steps: int, *, reversible: bool = False) -> Call:
    require("torchsde")
    import torchsde

    dt, x0 = model.end / steps, torch.tensor(model.start).expand(paths, 2).clone()

    class Equation(torch.nn.Module):
        noise_type, sde_type = "diagonal", "stratonovich" if reversible else "ito"

        def __init__(self) -> None:
            super().__init__()
            self.p = torch.nn.Parameter(torch.tensor(model.values))

        def f(self, t: Tensor, x: Tensor) -> Tensor:
            return torch.stack(model.drift(torch, x[:, 0], x[:, 1], self.p), 1)

        def g(self, t: Tensor, x: Tensor) -> Tensor:
            return torch.stack(model.diffusion(torch, x[:, 0], x[:, 1], self.p), 1)

    equation, ts = Equation(), torch.tensor([0.0, model.end])

    def call() -> Tensor:
        bm = torchsde.BrownianInterval(0.0, model.end, size=(paths, 2), dt=dt, cache_size=None)
        if reversible:
            x = torchsde.sdeint_adjoint(
                equation, x0, ts, bm=bm, method="reversible_heun", adjoint_method="adjoint_reversible_heun", dt=dt
            )[-1]
        else:
            x = torchsde.sdeint(equation, x0, ts, bm=bm, method="euler", dt=dt)[-1]
        found: Tensor = torch.autograd.grad(x.square().mean(), equation.p)[0]
        return found

    return call


def _checked(model: Fitted, paths: int, steps: int) -> tuple[Callable[[str, Call], str | None], Callable[[], None]]:
    """What is wrong with a gradient, or with its part along the parameters where that is given; and a way to forget."""

    @functools.cache
    def reference() -> Tensor:
        """Gradients, each from as many paths as a contender has."""
        p = torch.tensor(model.values, dtype=torch.float64, requires_grad=True)
        sde, x0 = equation(model, p), torch.tensor(model.start, dtype=torch.float64).expand(paths, 2).clone()
        found = []
        for seed in range(1, _GROUPS + 1):
            x1 = sds.solve(sde, x0, 0.0, model.end, steps, solver=sds.EulerMaruyama(), seed=seed).x1
            found.append(torch.autograd.grad(x1.square().mean(), p)[0])
        return torch.stack(found)

    def check(contender: str, call: Call) -> str | None:
        made = call()
        if contender in _OTHERS:
            return None if bool(torch.isfinite(torch.as_tensor(made)).all()) else "not finite"
        given, known = torch.tensor(made.tolist(), dtype=torch.float64), reference()
        if len(given) == 1:
            known = known @ torch.tensor(model.values, dtype=torch.float64)[:, None]
        # Six deviations, themselves known from 16 groups to a fifth.
        error = (given - known.mean(0)).abs() / (known.std(0) * (1 + 1 / _GROUPS) ** 0.5)
        return None if float(error.max()) < 7 else f"a gradient is {float(error.max()):.1f} standard errors off"

    return check, reference.cache_clear


def _problem(name: str, model: Fitted, paths: int, steps: int) -> Problem:
    check, forget = _checked(model, paths, steps)
    contenders: dict[str, Build] = {
        BASELINE: lambda: _ours(model, paths, steps, "fused", at_once=True),
        "sdesolve, two launches": lambda: _ours(model, paths, steps, "fused"),
        "value alone": lambda: _value_alone(model, paths, steps),
        "sdesolve eager": lambda: _ours(model, paths, steps, "eager"),
        "torch loop": lambda: _loop(model, paths, steps),
        "jax scan": lambda: _jax(model, paths, steps),
        "torchsde": lambda: _torchsde(model, paths, steps),
        "torchsde reversible": lambda: _torchsde(model, paths, steps, reversible=True),
    }
    return Problem(
        f"{name} gradient, {paths} x {steps}", "gradients", "path-step", paths * steps, contenders, check,
        quick=("jax scan",) if name == "heston" else ("jax scan", *_PEERS),
        release=forget,
    )  # fmt: skip


def _forward_mode(name: str, model: Fitted, paths: int, steps: int) -> Problem:
    check, forget = _checked(model, paths, steps)
    contenders: dict[str, Build] = {
        BASELINE: lambda: _forwards(model, paths, steps, "fused", every=True),
        "sdesolve jvp": lambda: _forwards(model, paths, steps, "fused", every=False),
        "value alone": lambda: _value_alone(model, paths, steps),
        "sdesolve eager": lambda: _forwards(model, paths, steps, "eager", every=True),
        "jax jacfwd": lambda: _jax(model, paths, steps, "jacfwd"),
        "jax jvp": lambda: _jax(model, paths, steps, "jvp"),
    }
    return Problem(
        f"{name} jacfwd, {paths} x {steps}", "gradients", "path-step", paths * steps, contenders, check,
        quick=("sdesolve jvp", "value alone", "jax jacfwd", "jax jvp"), release=forget,
    )  # fmt: skip


_PEERS = ("value alone", "sdesolve, two launches", "torch loop", "torchsde", "torchsde reversible")
# What computes another number: a value, or the gradient of the equation read as a Stratonovich one.
_OTHERS = ("value alone", "torchsde reversible")


def gradients(device: torch.device) -> list[Problem]:
    """On the CPU: kernels of gradients are for Numba so far."""
    if device.type != "cpu":
        return []
    return [
        _problem("lotka-volterra", LOTKA_VOLTERRA, 4096, 500),
        _problem("heston", HESTON, 4096, 100),
        _forward_mode("lotka-volterra", LOTKA_VOLTERRA, 4096, 500),
    ]
