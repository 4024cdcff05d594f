"""JAX and diffrax, as their documentation says is fastest: jitted, a scan over steps, noise not stored.

Equations are written once more in ``jax.numpy``, on one path: ``drift(x, t, p)`` and ``diffusion(x, t, p)``.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, NamedTuple

# Before its first import, or it takes three quarters of a GPU's memory, which torch needs too.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import diffrax
import jax
import jax.numpy as jnp
import lineax
import numpy as np
import torch
from torch import Tensor

from benchmarks.registry import Call, Missing

__all__ = [
    "EQUATIONS",
    "Equation",
    "diffrax_adaptive_well",
    "diffrax_flow",
    "diffrax_lorenz",
    "diffrax_paths",
    "diffrax_scheme",
    "diffrax_sde",
    "normals",
    "scan",
]


class Equation(NamedTuple):
    """Diffusion is a vector where noise is diagonal, a matrix where it is general."""

    drift: Callable[..., Any]
    diffusion: Callable[..., Any]


def _stress(x: Any, t: Any, p: Any) -> tuple[Any, ...]:
    S, D, tau, v0, n, _ = p
    sigma, A1, A2, A3 = x
    up, down = (S * sigma) ** n, (D * A3) ** n
    return v0 + up / (up + down + 1), sigma, sigma / tau, A1 / tau, A2 / tau, A3 / tau


def _stress_drift(x: Any, t: Any, p: Any) -> Any:
    r1, r2, r3, r4, r6, r8 = _stress(x, t, p)
    return jnp.stack([r1 - r2, r3 - r4, r4 - r6, r6 - r8])


def _stress_diffusion(x: Any, t: Any, p: Any) -> Any:
    a1, a2, a3, a4, a6, a8 = (p[5] * jnp.sqrt(jnp.maximum(r, 0)) for r in _stress(x, t, p))
    rows = ((a1, -a2), (a3, -a4), (a4, -a6), (a6, -a8))
    o = jnp.zeros_like(a1)
    return jnp.stack([jnp.stack([o] * (2 * i) + list(r) + [o] * (6 - 2 * i)) for i, r in enumerate(rows)])


def _heston_diffusion(x: Any, t: Any, p: Any) -> Any:
    root, rho = jnp.sqrt(jnp.maximum(x[1], 0)), -0.7
    return jnp.stack([
        jnp.stack([x[0] * root, jnp.zeros_like(root)]), 0.3 * root * jnp.array([rho, (1 - rho**2) ** 0.5]),
    ])  # fmt: skip


_ANGLES = np.arange(8) * (np.pi / 4)
_MEANS = 4.0 * np.stack([np.cos(_ANGLES), np.sin(_ANGLES)], axis=1).astype(np.float32)


def _mixture_score(x: Any, t: Any) -> tuple[Any, Any]:
    beta = 0.1 + 19.9 * t
    alpha2 = jnp.exp(-t * (0.1 + 9.95 * t))
    variance = alpha2 * 0.09 + 1 - alpha2
    apart = jnp.sqrt(alpha2) * _MEANS - x
    weight = jax.nn.softmax(-0.5 * (apart**2).sum(1) / variance)
    return weight @ apart / variance, beta


def _mixture_reverse(x: Any, t: Any, p: Any) -> Any:
    score, beta = _mixture_score(x, t)
    return -0.5 * beta * x - beta * score


def _mixture_flow(x: Any, t: Any, p: Any) -> Any:
    score, beta = _mixture_score(x, t)
    return -0.5 * beta * (x + score)


EQUATIONS = {
    "linear": Equation(lambda x, t, p: 1.5 * x, lambda x, t, p: 0.01 * x),
    "ou": Equation(lambda x, t, p: -x, lambda x, t, p: jnp.full_like(x, 0.5)),
    "stress": Equation(_stress_drift, _stress_diffusion),
    "heston": Equation(
        lambda x, t, p: jnp.stack([0.05 * x[0], 2.0 * (0.04 - jnp.maximum(x[1], 0))]), _heston_diffusion
    ),
    "lotka-volterra": Equation(
        lambda x, t, p: jnp.stack([x[0] * (1.5 - x[1]), x[1] * (x[0] - 3.0)]), lambda x, t, p: 0.1 * x
    ),
    "lorenz": Equation(
        lambda x, t, p: jnp.stack([
            10.0 * (x[1] - x[0]), x[0] * (28.0 - x[2]) - x[1], x[0] * x[1] - 8.0 / 3.0 * x[2],
        ]),
        lambda x, t, p: 0.1 * x,
    ),
    "mixture": Equation(_mixture_reverse, lambda x, t, p: jnp.sqrt(0.1 + 19.9 * t) * jnp.ones_like(x)),
}  # fmt: skip


def _on(device: torch.device) -> Any:
    """JAX's device of the same kind."""
    kind = "gpu" if device.type == "cuda" else "cpu"
    try:
        return jax.devices(kind)[0]
    except RuntimeError as error:
        raise Missing(f"jax has no {kind} backend here") from error


def _array(x: Tensor, device: torch.device) -> Any:
    return jax.device_put(jnp.asarray(x.cpu().numpy()), _on(device))


def _call(run: Callable[..., Any], *args: Any) -> Call:
    key = jax.random.key(0)
    return lambda: run(key, *args).block_until_ready()


def normals(shape: tuple[int, ...], device: torch.device) -> Call:
    """Normals from the default generator, threefry."""
    key = jax.device_put(jax.random.key(0), _on(device))
    run = jax.jit(lambda key: jax.random.normal(key, shape, dtype=jnp.float32))
    return lambda: run(key).block_until_ready()


def scan(
    equation: str | Equation, x0: Tensor, params: Tensor | None, t0: float, dt: float, steps: int, device: torch.device
) -> Call:
    """Euler-Maruyama as a jitted ``lax.scan`` over steps, vectorised over paths."""
    f, g = EQUATIONS[equation] if isinstance(equation, str) else equation
    x, p = _array(x0, device), None if params is None else _array(params, device)
    rows = None if p is None else 0
    channels = jax.eval_shape(g, x[0], jnp.float32(t0), None if p is None else p[0]).shape

    def step(x: Any, t: Any, z: Any, p: Any) -> Any:
        G = g(x, t, p)
        noise = G * z if len(channels) == 1 else G @ z
        return x + f(x, t, p) * dt + noise * abs(dt) ** 0.5

    steps_of_all = jax.vmap(step, in_axes=(0, None, 0, rows))

    @jax.jit
    def run(key: Any, x: Any, p: Any) -> Any:
        def body(x: Any, at: Any) -> Any:
            k, key = at
            z = jax.random.normal(key, (len(x), channels[-1]), dtype=x.dtype)
            return steps_of_all(x, t0 + k * dt, z, p), None

        # The carry is updated in place; to donate the start would take a copy of it before each call.
        return jax.lax.scan(body, x, (jnp.arange(steps), jax.random.split(key, steps)))[0]

    return _call(run, x, p)


def diffrax_sde(
    name: str, x0: Tensor, params: Tensor | None, t0: float, dt: float, steps: int, device: torch.device
) -> Call:
    """``diffeqsolve`` under ``vmap`` and ``jit``, with ``UnsafeBrownianPath`` and the adjoint that this asks for."""
    f, g = EQUATIONS[name]
    x, p = _array(x0, device), None if params is None else _array(params, device)
    shape = jax.eval_shape(g, x[0], jnp.float32(t0), None if p is None else p[0]).shape

    def matrix(t: Any, y: Any, p: Any) -> Any:
        G = g(y, t, p)
        return lineax.DiagonalLinearOperator(G) if G.ndim == 1 else lineax.MatrixLinearOperator(G)

    def one(x: Any, p: Any, key: Any) -> Any:
        path = diffrax.UnsafeBrownianPath((shape[-1],), key)
        terms = diffrax.MultiTerm(diffrax.ODETerm(lambda t, y, p: f(y, t, p)), diffrax.ControlTerm(matrix, path))
        solution = diffrax.diffeqsolve(
            terms, diffrax.Euler(), t0, t0 + steps * dt, dt, x, args=p, saveat=diffrax.SaveAt(t1=True),
            adjoint=diffrax.DirectAdjoint(), max_steps=steps + 1,
        )  # fmt: skip
        return solution.ys[0]

    @jax.jit
    def run(key: Any, x: Any, p: Any) -> Any:
        rows = None if p is None else 0
        return jax.vmap(one, in_axes=(0, rows, 0))(x, p, jax.random.split(key, len(x)))

    return _call(run, x, p)


_WELL = Equation(lambda x, t, p: x - x**3, lambda x, t, p: jnp.full_like(x, 0.7))
_QUADRATIC = Equation(lambda x, t, p: -0.5 * (1 - x * x), lambda x, t, p: 0.5 * (1 - x * x))


def _terms(model: str, path: Any) -> Any:
    f, g = {"double well": _WELL, "quadratic": _QUADRATIC}[model]

    def diagonal(t: Any, y: Any, p: Any) -> Any:
        return lineax.DiagonalLinearOperator(g(y, t, p))

    return diffrax.MultiTerm(diffrax.ODETerm(lambda t, y, p: f(y, t, p)), diffrax.ControlTerm(diagonal, path))


def _solved(model: str, scheme: str, path: Any, x: Any, t1: float, steps: int) -> Any:
    return diffrax.diffeqsolve(
        _terms(model, path), getattr(diffrax, scheme)(), 0.0, t1, t1 / steps, x, saveat=diffrax.SaveAt(t1=True),
        adjoint=diffrax.DirectAdjoint(), max_steps=steps + 1,
    ).ys[0]  # fmt: skip


def diffrax_scheme(model: str, scheme: str, x0: Tensor, t1: float, steps: int, device: torch.device) -> Call:
    """``diffeqsolve`` by a scheme that takes space-time Levy area, with ``UnsafeBrownianPath``."""
    x = _array(x0, device)

    def one(x: Any, key: Any) -> Any:
        path = diffrax.UnsafeBrownianPath(x.shape, key, levy_area=diffrax.SpaceTimeLevyArea)
        return _solved(model, scheme, path, x, t1, steps)

    run = jax.jit(lambda key, x: jax.vmap(one)(x, jax.random.split(key, len(x))))
    return _call(run, x)


def diffrax_paths(model: str, scheme: str, x0: Tensor, t1: float, steps: list[int]) -> list[tuple[Tensor, Tensor]]:
    """In float64, for each number of steps: last states, and the values there of the paths, which are the same."""

    def one(n: int) -> Any:
        def run(x: Any, key: Any) -> Any:
            path = diffrax.VirtualBrownianTree(
                0.0, t1, tol=t1 / 8192, shape=x.shape, key=key, levy_area=diffrax.SpaceTimeLevyArea
            )
            return _solved(model, scheme, path, x, t1, n), path.evaluate(0.0, t1)

        return jax.jit(jax.vmap(run))

    with jax.enable_x64(True):
        x, keys = jnp.asarray(x0.numpy()), jax.random.split(jax.random.key(7), len(x0))
        runs = [one(n)(x, keys) for n in steps]
        return [(torch.tensor(np.array(y)), torch.tensor(np.array(W))) for y, W in runs]


def diffrax_flow(x0: Tensor, t0: float, t1: float, steps: int | None, tolerance: float, device: torch.device) -> Call:
    """The mixture's probability flow: Heun in so many steps, or Dormand-Prince to a tolerance.

    With the adjoint that it takes by default and advises for anything but forward-mode derivatives; only
    `UnsafeBrownianPath` asks for another. None of them is quicker here.
    """
    x = _array(x0, device)
    term = diffrax.ODETerm(lambda t, y, p: _mixture_flow(y, t, p))
    if steps is not None:
        options: dict[str, Any] = {"solver": diffrax.Heun(), "dt0": (t1 - t0) / steps, "max_steps": steps + 1}
    else:
        control = diffrax.PIDController(rtol=tolerance, atol=tolerance)
        options = {"solver": diffrax.Dopri5(), "dt0": None, "stepsize_controller": control}

    def one(x: Any) -> Any:
        return diffrax.diffeqsolve(term, t0=t0, t1=t1, y0=x, saveat=diffrax.SaveAt(t1=True), **options).ys[0]

    run = jax.jit(lambda key, x: jax.vmap(one)(x))
    return _call(run, x)


def diffrax_adaptive_well(x0: Tensor, rtol: float) -> Call:
    """SPaRK on the double well from a virtual Brownian tree, nested steps by rejected end points that are stored."""
    x = _array(x0, torch.device("cpu"))

    def one(x: Any, key: Any) -> Any:
        area = diffrax.SpaceTimeLevyArea
        tree = diffrax.VirtualBrownianTree(0.0, 1.0, 2.0**-16, (1,), key, levy_area=area)
        control = diffrax.PIDController(rtol=rtol, atol=rtol, pcoeff=0.1, icoeff=0.3, dtmin=2.0**-15, error_order=2.0)
        control = diffrax.ClipStepSizeController(control, store_rejected_steps=64)
        return diffrax.diffeqsolve(
            _terms("double well", tree), diffrax.SPaRK(), 0.0, 1.0, 0.01, x, stepsize_controller=control,
            saveat=diffrax.SaveAt(t1=True), max_steps=8192,
        ).ys[0]  # fmt: skip

    return _call(jax.jit(lambda key, x: jax.vmap(one)(x, jax.random.split(key, len(x)))), x)


def diffrax_lorenz(x0: Tensor, rho: Tensor, end: float, tolerance: float) -> Call:
    """Dormand-Prince on Lorenz' equations, steps of each parameter's own."""
    with jax.enable_x64(True):
        x, p = (jnp.asarray(v.numpy()) for v in (x0, rho))

    def drift(t: Any, y: Any, r: Any) -> Any:
        a, b, c = y
        return jnp.stack([10 * (b - a), a * (r[0] - c) - b, a * b - 8 / 3 * c])

    def one(x: Any, p: Any) -> Any:
        control = diffrax.PIDController(rtol=tolerance, atol=tolerance)
        return diffrax.diffeqsolve(
            diffrax.ODETerm(drift), diffrax.Dopri5(), 0.0, end, None, x, args=p, stepsize_controller=control,
            saveat=diffrax.SaveAt(t1=True),
        ).ys[0]  # fmt: skip

    run = jax.jit(jax.vmap(one))

    def call() -> Any:
        with jax.enable_x64(True):
            return run(x, p).block_until_ready()

    return call
