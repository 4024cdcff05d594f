"""Models that multiply matrices, or go over pairs, by Euler-Maruyama: beside peers, and the processor's multiply-adds.

The limit is a loop that does nothing but the multiply-adds of the model's matrices, on all threads, from registers.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import torch
from torch import Tensor

import sdesolve as sds
from benchmarks.ensembles import tensor_of
from benchmarks.registry import BASELINE, Build, Call, Limit, Problem, require

__all__ = ["product_problems"]

_NOISE = 0.1


class _Model(NamedTuple):
    """A drift by batches in torch, by paths in JAX, and its multiply-adds a step; 0 for what is no product."""

    width: int
    drift: Callable[[Tensor], Tensor]
    jax: Callable[[], Callable[..., Any]]
    multiply_adds: int
    noise: float = _NOISE


def _linear(noise: float = _NOISE) -> _Model:
    A = torch.randn(64, 64, generator=torch.Generator().manual_seed(0)) / 8 - torch.eye(64)

    def peer() -> Callable[..., Any]:
        import jax.numpy as jnp

        matrix = jnp.asarray(A.numpy())
        return lambda x, t, p: x @ matrix

    return _Model(64, lambda x: x @ A, peer, 64 * 64, noise)


def _network(width: int, hidden: int) -> _Model:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = torch.nn.Sequential(torch.nn.Linear(width, hidden), torch.nn.Tanh(), torch.nn.Linear(hidden, width))
    net.requires_grad_(False)

    def peer() -> Callable[..., Any]:
        import jax.numpy as jnp

        W, b, V, c = (jnp.asarray(p.numpy()) for p in net.parameters())
        return lambda x, t, p: V @ jnp.tanh(W @ x + b) + c

    return _Model(width, net, peer, 2 * width * hidden)


def _pairs(particles: int) -> _Model:
    """``sum_j d / (1 + |d|^2)`` with ``d = x_i - x_j`` in a plane, and a trap; first all first coordinates."""

    def drift(x: Tensor) -> Tensor:
        dx, dy = (a.unsqueeze(2) - a.unsqueeze(1) for a in x.chunk(2, 1))
        w = 1 / (1 + dx * dx + dy * dy)
        return torch.cat([(w * dx).sum(2), (w * dy).sum(2)], 1) - x

    def peer() -> Callable[..., Any]:
        import jax.numpy as jnp

        def one(x: Any, t: Any, p: Any) -> Any:
            dx, dy = (a[:, None] - a[None] for a in jnp.split(x, 2))
            w = 1 / (1 + dx * dx + dy * dy)
            return jnp.concatenate([(w * dx).sum(1), (w * dy).sum(1)]) - x

        return one

    return _Model(2 * particles, drift, peer, 0)


def _multiply_adds(count: int) -> Call:
    """So many of them in float32, in vectors as wide as the processor's, with sums enough to hide what one takes."""
    import llvmlite.binding as llvm

    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    features = llvm.get_host_cpu_features().flatten()
    lanes, sums = 16 if "+avx512f" in features else 8, 12
    v = f"<{lanes} x float>"
    phis = "\n".join(f"%a{i} = phi {v} [ zeroinitializer, %entry ], [ %b{i}, %loop ]" for i in range(sums))
    fmas = "\n".join(f"%b{i} = call {v} @llvm.fma.v{lanes}f32({v} %a{i}, {v} %x, {v} %x)" for i in range(sums))
    added = "\n".join(f"%c{i} = fadd {v} {f'%c{i - 1}' if i > 1 else '%b0'}, %b{i}" for i in range(1, sums))
    module = llvm.parse_assembly(f"""
        declare {v} @llvm.fma.v{lanes}f32({v}, {v}, {v})
        define void @run(i64 %n, ptr %p) {{
        entry:
          %x = load {v}, ptr %p, align 4
          br label %loop
        loop:
          %i = phi i64 [ 0, %entry ], [ %next, %loop ]
          {phis}
          {fmas}
          %next = add i64 %i, 1
          %more = icmp ult i64 %next, %n
          br i1 %more, label %loop, label %done
        done:
          {added}
          store {v} %c{sums - 1}, ptr %p, align 4
          ret void
        }}""")
    machine = llvm.Target.from_default_triple().create_target_machine(
        cpu=llvm.get_host_cpu_name(), features=features, opt=3
    )
    engine = llvm.create_mcjit_compiler(module, machine)
    engine.finalize_object()
    run = ctypes.CFUNCTYPE(None, ctypes.c_int64, ctypes.c_void_p)(engine.get_function_address("run"))
    threads = torch.get_num_threads()
    turns = max(1, round(count / threads / lanes / sums))

    def work(_: int, engine: Any = engine) -> None:
        memory = (ctypes.c_float * lanes)()
        run(turns, ctypes.addressof(memory))

    pool = ThreadPoolExecutor(threads)
    return lambda: list(pool.map(work, range(threads)))


def _problem(name: str, make: Callable[[], _Model], paths: int, steps: int) -> Problem:
    made = functools.cache(make)
    x0 = functools.cache(lambda: torch.full((paths, made().width), 0.1) + 0.01 * torch.arange(made().width))
    dt = 1.0 / steps

    def sde() -> sds.SDE:
        drift, noise = made().drift, made().noise
        if not noise:
            return sds.ODE(lambda x, t: drift(x))
        return sds.SDE(lambda x, t: drift(x), lambda x, t: torch.full_like(x, noise))

    def sdesolve() -> Call:
        equation, x = sde(), x0()
        options = {"solver": sds.EulerMaruyama(), "seed": 0, "backend": "fused"}
        return lambda: sds.solve(equation, x, 0.0, 1.0, steps, **options).x1

    def loop() -> Call:
        model, start = made(), x0()

        @torch.no_grad()
        def call() -> Tensor:
            x, z = start, torch.empty_like(start)
            for _ in range(steps):
                x = torch.add(x, model.drift(x), alpha=dt)
                if model.noise:
                    x.add_(z.normal_(), alpha=model.noise * dt**0.5)
            return x

        return call

    def scan() -> Call:
        require("jax", "diffrax")
        import jax.numpy as jnp

        from benchmarks.jax_peers import Equation
        from benchmarks.jax_peers import scan as scanned

        noise = made().noise
        equation = Equation(made().jax(), lambda x, t, p: jnp.full_like(x, noise))
        return scanned(equation, x0(), None, 0.0, dt, steps, torch.device("cpu"))

    @functools.cache
    def reference() -> tuple[Tensor, Tensor]:
        """Mean and deviation of each number, by steps in torch."""
        x = loop()().double()
        return x.mean(0), x.std(0)

    def check(name: str, call: Call) -> str | None:
        found = tensor_of(call())
        mean, deviation = reference()
        error = (found.mean(0) - mean).abs() / (5 * deviation * (2 / paths) ** 0.5 + 1e-4 * (1 + mean.abs()))
        return None if float(error.max()) <= 1 else f"a mean is {5 * float(error.max()):.1f} standard errors off"

    contenders: dict[str, Build] = {BASELINE: sdesolve, "torch loop": loop}
    if name != _PRODUCT:
        contenders["jax scan"] = scan
    limits = {}
    total = paths * steps * made().multiply_adds
    if total:
        contenders["limit: multiply-adds"] = lambda: _multiply_adds(total)
        limits = {"limit: multiply-adds": Limit(1.0, total, "multiply-adds")}
    return Problem(
        name, "products", "path-step", paths * steps, contenders, check, limits, None,
        ("jax scan",) if name != _PRODUCT else ("limit: multiply-adds",), {"rounds": 9, "seconds": 3.0},
        reference.cache_clear,
    )  # fmt: skip


def _one_path(steps: int) -> Problem:
    """A damped oscillator: ours has the bits that the path has among others, a peer's lies within 5 deviations."""

    def start(paths: int) -> Tensor:
        return torch.full((paths, 2), 0.1)

    oscillator = sds.SDE(
        lambda x, t: torch.stack([x[:, 1], -x[:, 0] - 0.1 * x[:, 1]], 1), lambda x, t: torch.full_like(x, _NOISE)
    )

    def run(paths: int) -> Tensor:
        options = {"solver": sds.EulerMaruyama(), "seed": 0, "backend": "fused"}
        return sds.solve(oscillator, start(paths), 0.0, 1.0, steps, **options).x1

    def scan() -> Call:
        require("jax", "diffrax")
        import jax.numpy as jnp

        from benchmarks.jax_peers import Equation
        from benchmarks.jax_peers import scan as scanned

        equation = Equation(
            lambda x, t, p: jnp.stack([x[1], -x[0] - 0.1 * x[1]]), lambda x, t, p: jnp.full_like(x, _NOISE)
        )
        return scanned(equation, start(1), None, 0.0, 1.0 / steps, steps, torch.device("cpu"))

    def check(name: str, call: Call) -> str | None:
        found, many = tensor_of(call()), run(256).double()
        if name == BASELINE:
            return None if torch.equal(found, many[:1]) else "not the path that it is among others"
        off = float(((found - many.mean(0)).abs() / many.std(0)).max())
        return None if off <= 5 else f"{off:.1f} deviations from the mean"

    contenders: dict[str, Build] = {BASELINE: lambda: lambda: run(1), "jax scan": scan}
    return Problem(_ONE, "products", "step", steps, contenders, check, {}, 1, ("jax scan",), {"rounds": 9})


_ONE = "one path, 2 dimensions, 16384 steps"
_PRODUCT = "x A alone, 64 dimensions, 4096 x 64"


def product_problems(device: torch.device) -> Iterator[Problem]:
    """On a CPU: GPUs have their own limits, in `benchmarks.gpu`."""
    if device.type != "cpu":
        return
    yield _problem(_PRODUCT, lambda: _linear(0.0), 4096, 64)
    yield _problem("x A, 64 dimensions, 4096 x 64", _linear, 4096, 64)
    yield _problem("network 4-64-4, 4096 x 128", lambda: _network(4, 64), 4096, 128)
    yield _problem("network 16-128-16, 4096 x 64", lambda: _network(16, 128), 4096, 64)
    yield _problem("24 particles with pair forces, 1024 x 32", lambda: _pairs(24), 1024, 32)
    yield _one_path(16384)
