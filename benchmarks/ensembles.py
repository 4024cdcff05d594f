"""Many paths of one equation by Euler-Maruyama: the same steps in everybody's hands, and the noise alone as the limit.

Moments of the last states are held against closed forms of the discretised chain, or against a reference run of another
implementation in float64 (`benchmarks.references`), before anything is timed.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

import sdesolve as sds
from benchmarks.models import MODELS, Model, ornstein_uhlenbeck
from benchmarks.registry import BASELINE, Build, Call, Limit, Problem, require
from benchmarks.timing import THREADED
from sdesolve.sde import AbstractSDE, Noise

__all__ = ["REFERENCES", "Reference", "ensemble", "ensembles", "plain_loop", "statistics_of", "tensor_of", "unlike"]

REFERENCES = Path(__file__).parent / "results" / "references.json"
_MOST_CAPTURED = 4096  # steps in a CUDA graph, of some launches each


class Reference(NamedTuple):
    """Expectations of ``x`` and ``x^2`` by component, and the standard deviation of one path's share in each."""

    value: Tensor
    deviation: Tensor
    paths: float  # that it comes from; infinite for a closed form


def tensor_of(result: Any) -> Tensor:
    """A contender's result, from whatever package, in float64 on the host."""
    found = result if isinstance(result, Tensor) else torch.from_numpy(np.array(result))
    return found.detach().double().cpu()


def statistics_of(x: Tensor) -> Tensor:
    """``(paths, width)`` to ``(paths, 2 width)``: what is averaged over paths."""
    return torch.cat([x, x.square()], dim=1)


def off(x: Tensor, reference: Reference, steps: int, eps: float) -> str | None:
    """What is wrong with last states: averages further than five standard errors, and rounding, from their values.

    Those of ``x``, of ``x^2``, and of ``(x - mean)^2``, where noise shows that is small beside the mean. The last one's
    standard error comes from the states themselves: it vanishes with the noise, so that none at all is never right.
    """
    if not bool(x.isfinite().all()):
        return "not finite"
    width, share = x.shape[1], (1 / len(x) + 1 / reference.paths) ** 0.5
    mean, square = reference.value[:width], reference.value[width:]
    rounding = 4 * eps * steps**0.5 * (reference.value.abs() + reference.deviation)
    error = (statistics_of(x).mean(0) - reference.value).abs() / (5 * reference.deviation * share + rounding)
    apart, spread = (x - mean).square(), square - mean.square()
    slack = rounding[:width] * (2 * spread.abs().sqrt() + rounding[:width])
    few = 1 + 100 / len(x)  # of few states the standard error itself is uncertain
    beside = (apart.mean(0) - spread).abs() / (5 * few * apart.std(0) * share + slack)
    error = torch.cat([error, beside])
    if float(error.max()) <= 1:
        return None
    worst = int(error.argmax())
    which = ("x{}", "x{}^2", "(x{} - mean)^2")[worst // width].format(worst % width)
    return f"the mean of {which} is {5 * float(error[worst]):.1f} standard errors off"


def unlike(x: Tensor, one: Tensor, other: Tensor) -> str | None:
    """What tells last states from one more draw, path by path, of the laws of which `one` and `other` are draws.

    If the three are alike, each is as often nearer to `one` as the other is: a fair coin for every path, whatever the
    law, so parameters may differ from path to path.
    """
    for i in range(x.shape[1]):
        nearer = (x[:, i] - one[:, i]).abs() < (other[:, i] - one[:, i]).abs()
        score = float(nearer.double().mean() - 0.5) * 2 * len(x) ** 0.5
        if not abs(score) <= 5:
            return f"x{i} is nearer to another run, or further from it, than chance allows: {score:.1f} standard errors"
    return None


def _chain(mean: float, square: float, fourth: float, width: int) -> Reference:
    """Of components alike, from moments of one."""
    value = torch.tensor([mean] * width + [square] * width, dtype=torch.float64)
    spread = [max(square - mean**2, 0.0) ** 0.5, max(fourth - square**2, 0.0) ** 0.5]
    return Reference(value, torch.tensor(spread, dtype=torch.float64).repeat_interleave(width), math.inf)


def _linear_law(steps: int, width: int) -> Reference:
    """``X_n = x (1 + 1.5 h + 0.01 sqrt(h) z)^n``: moments of ``(a + b z)``, to the power of n."""
    a, b = 1 + 1.5 / steps, 0.01 / steps**0.5
    moments = a, a**2 + b**2, a**4 + 6 * a**2 * b**2 + 3 * b**4
    return _chain(*(x * m**steps for x, m in zip((0.1, 0.01, 0.0001), moments, strict=True)), width)


def _ou_law(steps: int, width: int) -> Reference:
    """A Gaussian: mean ``(1 - h)^n``, variance the geometric sum of ``h / 4 (1 - h)^(2 k)``."""
    a = 1 - 1 / steps
    mean, variance = a**steps, 0.25 / steps * (1 - a ** (2 * steps)) / (1 - a * a)
    return _chain(mean, mean**2 + variance, mean**4 + 6 * mean**2 * variance + 3 * variance**2, width)


def _reference(name: str, steps: int, width: int) -> Reference:
    exact = {"linear": _linear_law, "geometric": _linear_law, "ou": _ou_law}
    if name in exact:
        return exact[name](steps, width)
    stored = json.loads(REFERENCES.read_text())[f"{name}, {steps} steps"]
    value, deviation = (torch.tensor(stored[key], dtype=torch.float64) for key in ("value", "deviation"))
    return Reference(value, deviation, stored["paths"])


def plain_loop(model: Model, x0: Tensor, params: Tensor | None, steps: int, wrap: Callable[..., Any]) -> Call:
    """Euler-Maruyama as one writes it in torch for speed: no autograd, noise drawn in place, one expression a step."""
    t0, dt = model.span[0], (model.until(steps) - model.span[0]) / steps
    sde = _bound(model, x0, params)
    root, general = abs(dt) ** 0.5, sde.noise is Noise.GENERAL
    g0 = sde.diffusion(x0, torch.tensor(t0, dtype=x0.dtype, device=x0.device))
    f, g = sde.drift, sde.diffusion

    def step(x: Tensor, t: Tensor, z: Tensor) -> Tensor:
        noise = (g(x, t) @ z.unsqueeze(2)).squeeze(2) if general else g(x, t) * z
        return x + f(x, t) * dt + noise * root

    one = wrap(step)

    @torch.no_grad()
    def loop() -> Tensor:
        x = x0
        z = torch.empty(len(x0), g0.shape[-1] if general else x0.shape[1], dtype=x0.dtype, device=x0.device)
        times = torch.linspace(t0, t0 + dt * (steps - 1), steps, dtype=x0.dtype, device=x0.device)
        for t in times:
            x = one(x, t, z.normal_())
        return x

    return loop


def _bound(model: Model, x0: Tensor, params: Tensor | None) -> AbstractSDE:
    sde = model.sde(x0.device)
    return sde.with_params(params) if isinstance(sde, sds.SDE) and params is not None else sde


def _in_place_linear(x0: Tensor, steps: int) -> Call:
    """The linear equation's own loop: buffers reused, three operations a step, all in place."""
    noise, dt = torch.empty_like(x0), 1.0 / steps

    @torch.no_grad()
    def loop() -> Tensor:
        x = x0.clone()
        for _ in range(steps):
            noise.normal_()
            noise.mul_(0.01 * dt**0.5).add_(1.0 + 1.5 * dt)
            x.mul_(noise)
        return x

    return loop


def _captured(loop: Call) -> Call:
    """A CUDA graph of a loop; torch's generator is advanced at each replay."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        loop()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        x = loop()

    def replay() -> Any:
        graph.replay()
        return x

    return replay


def _torchsde(model: Model, x0: Tensor, params: Tensor | None, steps: int) -> Call:
    require("torchsde")
    import torchsde

    inner = _bound(model, x0, params)
    t0, t1 = model.span[0], model.until(steps)
    drift, diffusion = inner.drift, inner.diffusion
    if t0 != 0 or t1 < t0:  # it goes forwards only: time is counted from the start, which costs others nothing
        sign = 1.0 if t1 > t0 else -1.0
        drift = lambda x, t: sign * inner.drift(x, t0 + sign * t)  # noqa: E731
        diffusion = lambda x, t: inner.diffusion(x, t0 + sign * t)  # noqa: E731
    general = inner.noise is Noise.GENERAL
    g0 = inner.diffusion(x0, torch.tensor(t0, dtype=x0.dtype, device=x0.device))

    class Equation(torch.nn.Module):
        noise_type, sde_type = "general" if general else "diagonal", "ito"

        def f(self, t: Tensor, y: Tensor) -> Tensor:
            return drift(y, t)

        def g(self, t: Tensor, y: Tensor) -> Tensor:
            made = diffusion(y, t)
            return made if general else made.expand_as(y)

    sde, ts = Equation(), torch.tensor([0.0, abs(t1 - t0)], device=x0.device)
    end = float(ts[-1])  # as it is rounded, or the last query lies beyond the interval
    size = (len(x0), g0.shape[-1] if general else x0.shape[1])

    @torch.no_grad()
    def run() -> Tensor:
        # Told the step, and with a cache without bound, as its documentation advises for speed: without the former
        # its tree of intervals grows into a chain, and a run takes 1.3 to 3 times as long.
        bm = torchsde.BrownianInterval(
            0.0, end, size=size, dtype=x0.dtype, device=x0.device, dt=end / steps, cache_size=None
        )
        last: Tensor = torchsde.sdeint(sde, x0, ts, bm=bm, method="euler", dt=end / steps)[-1]
        return last

    return run


def noise_alone(paths: int, steps: int, device: torch.device) -> Call:
    """As many normals as the equation uses, added up in registers: ``dX = dW``."""
    sde = sds.SDE(lambda x, t: torch.zeros_like(x), lambda x, t: torch.ones_like(x), noise="diagonal")
    x0 = torch.zeros(paths, 1, device=device)
    return lambda: sds.solve(sde, x0, 0.0, 1.0, steps, solver=sds.EulerMaruyama(), seed=0, backend="fused").x1


def ensemble(
    name: str, paths: int, steps: int, device: torch.device, *, width: int = 3, quick: tuple[str, ...] = (),
    timing: dict[str, float] | None = None,
) -> Problem:  # fmt: skip
    """So many paths of a model through the first steps of its grid, or through all of it in so many steps.

    Args:
        name: of `MODELS`, or ``ou``.
        paths: how many.
        steps: how many.
        device: where.
        width: dimension of ``ou``.
        quick: contenders of the short version.
        timing: options of `interleave`.
    """
    model = ornstein_uhlenbeck(width) if name == "ou" else MODELS[name]
    if name in ("linear", "geometric", "ou", "mixture"):  # any number of steps goes through the whole interval
        model = Model(model.sde, model.start, model.span, steps, model.params, model.solver)

    @functools.cache
    def start() -> tuple[Tensor, Tensor | None]:
        return model.start(paths, device), None if model.params is None else model.params(paths, device)

    def ours(backend: str) -> Build:
        def build() -> Call:
            (x0, params), sde, (t0, t1) = start(), model.sde(device), (model.span[0], model.until(steps))
            options: dict[str, Any] = {"solver": sds.EulerMaruyama(), "seed": 0, "backend": backend, "params": params}
            return lambda: sds.solve(sde, x0, t0, t1, steps, **options).x1

        return build

    def loop() -> Call:
        x0, _ = start()
        made = _in_place_linear(x0, steps) if name in ("linear", "geometric") else _plain(lambda f: f)
        return _captured(made) if device.type == "cuda" and steps <= _MOST_CAPTURED else made

    def _plain(wrap: Callable[..., Any]) -> Call:
        return plain_loop(model, *start(), steps, wrap)

    def compiled() -> Call:
        torch.compiler.reset()
        made = _plain(lambda f: torch.compile(f, dynamic=False))
        return _captured(made) if device.type == "cuda" else made

    def in_jax(function: str) -> Build:
        def build() -> Call:
            require(*(("jax",) if function == "scan" else ("jax", "diffrax")))
            from benchmarks import jax_peers

            dt = (model.until(steps) - model.span[0]) / steps
            made: Call = getattr(jax_peers, function)(name, *start(), model.span[0], dt, steps, device)
            return made

        return build

    @functools.cache
    def pair() -> tuple[Tensor, Tensor]:
        """Two runs of the plain loop in float64: a sweep's own spread hides the noise from averages."""
        x0, params = (None if v is None else v.cpu().double() for v in start())
        assert x0 is not None
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            one, other = (plain_loop(model, x0, params, steps, lambda f: f)() for _ in range(2))
        return one, other

    def release() -> None:
        start.cache_clear()
        pair.cache_clear()

    def check(contender: str, call: Call) -> str | None:
        del contender
        x = tensor_of(call())
        if x.shape != (paths, start()[0].shape[1]):
            return f"shape {tuple(x.shape)}, expected {(paths, start()[0].shape[1])}"
        wrong = off(x, _reference(name, steps, x.shape[1]), steps, torch.finfo(torch.float32).eps)
        return wrong or (unlike(x, *pair()) if model.params is not None else None)

    components = name in ("linear", "geometric", "ou")
    count = model.start(1, device).shape[1]
    normals = paths * steps * (8 if name == "stress" else count)
    contenders: dict[str, Build] = {
        BASELINE: ours("fused"), "sdesolve eager": ours("eager"), "torch loop": loop, "torch.compile": compiled,
        "torchsde": lambda: _torchsde(model, *start(), steps), "jax scan": in_jax("scan"),
        "diffrax": in_jax("diffrax_sde"),
        "limit: noise": lambda: noise_alone(normals // steps, steps, device),
    }  # fmt: skip
    limits = {"limit: noise": Limit(1.0, normals, "normals")}
    label = f"ou in {width} dimensions" if name == "ou" else name
    return Problem(
        f"{label}, {paths} x {steps}", "ensembles", "component-step" if components else "path-step",
        paths * steps * (count if components else 1), contenders, check, limits, None, quick,
        {**THREADED, "rounds": 5, "seconds": 8.0, **(timing or {})}, release,
    )  # fmt: skip


def ensembles(device: torch.device) -> Iterator[Problem]:
    """The linear equation as published, few and many paths; other models, whose eager loops take tenths of seconds."""
    peers = ("torch loop", "torchsde", "jax scan", "diffrax", "limit: noise")
    yield ensemble("linear", 8192, 256, device, quick=peers)
    yield ensemble("linear", 131_072, 256, device, quick=peers, timing={"seconds": 20.0})
    yield ensemble("linear", 16, 256, device, quick=("torch loop",), timing={"rounds": 15})
    for name, steps in REFERENCED:
        yield ensemble(name, 6720, steps, device, quick=("sdesolve eager", "limit: noise"))
    yield ensemble("ou", 8192, 256, device, width=8, quick=("sdesolve eager", "limit: noise"))


# One parameter set of the stress response for each path; of the others, paths alike. Steps are those of full-size runs.
REFERENCED = (("stress", 200), ("heston", 256), ("lotka-volterra", 500), ("lorenz", 500), ("mixture", 256))
