"""Random programs in the style of research code: fused gives what eager gives, for each of them.

A program is source text, made from a seed: a closure, a module, a method, a dataclass or a partial, over what such code
holds, with branches and loops over Python values, temporaries changed in place, masks, indices, layers,
time embeddings, normalisations and helper functions.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import linecache
import math
import os
import random
import sys
import types
import typing

import numpy as np
import pytest
import torch

import sdesolve as sds

PROGRAMS, PROGRAMS_A_RUN, PARTS, COMPILED, GRADED, PUSHED = 2040, 5, 12, 3, 6, 2
# All of them take more than a minute: HYPOTHESIS_PROFILE=thorough.
TRIED = range(PARTS) if os.environ.get("HYPOTHESIS_PROFILE") == "thorough" else (1,)

NAMES = {
    "torch": torch, "nn": torch.nn, "F": torch.nn.functional, "np": np, "math": math, "functools": functools,
    "dataclasses": dataclasses, "types": types, "typing": typing, "collections": collections,
}  # fmt: skip

# What programs hold and call.
PRELUDE = """
RATE, SHIFT, ORDER = {rate}, {shift}, {order}
WEIGHT = torch.tensor({weight}, dtype=DTYPE)
SCALES = np.array({scales})
INDEX, MASK = torch.tensor({order}), torch.tensor({mask})
TABLE = {{"a": {rate}, "b": [{shift}, {scales}]}}

@dataclasses.dataclass
class Config:
    rate: float = {rate}
    flag: bool = {flag}
    depth: int = {depth}
    kind: str = {kind!r}
    sizes: tuple = ({scales}[0], {shift})

class Pair(typing.NamedTuple):
    low: float
    high: float

class Block(nn.Module):
    def __init__(self, act):
        super().__init__()
        self.inner, self.norm, self.act = nn.Linear({d}, {d}), nn.LayerNorm({d}), act
        self.register_buffer("mean", torch.linspace(-0.5, 0.5, {d}))
        self.gain = nn.Parameter(torch.tensor({rate}))
        self.calls = None

    def residual(self, x):
        return x + self.gain * self.act(self.inner(x))

    def forward(self, x, scale=1.0):
        y = self.norm(x - self.mean) if {flag} else x - self.mean
        for _ in range({depth}):
            y = self.residual(y)
        return scale * y

torch.manual_seed({seed})
BLOCK = Block({act}).to(DTYPE).eval()
LAYERS = nn.ModuleList([nn.Linear({d}, {d}), nn.Tanh(), nn.Linear({d}, {d}, bias=False)]).to(DTYPE)
CELL = nn.GRUCell({d}, {d}).to(DTYPE)
CONFIG, PAIR = Config(), Pair(-1.5, 1.5)
SPACE = types.SimpleNamespace(rate={rate}, inner=types.SimpleNamespace(shift={shift}))

def embed(t, width):
    half = (width + 1) // 2
    rates = torch.exp(-math.log(100.0) * torch.arange(half, dtype=t.dtype) / half)
    angles = t.reshape(-1, 1) * rates
    return torch.cat([angles.sin(), angles.cos()], 1)[:, :width]

def soften(x, rate=RATE):
    return x / (1.0 + rate * x.abs())

@functools.lru_cache
def table(n):
    return torch.linspace(0.5, 1.5, n, dtype=DTYPE)

def standard(x, eps=1e-3):
    m = x.mean(dim=1, keepdim=True)
    return (x - m) / ((x - m).square().mean(dim=1, keepdim=True) + eps).sqrt()

def through(x, *functions):
    return functools.reduce(lambda y, f: f(y), functions, x)

HALVED = functools.partial(soften, rate=0.5)
"""

# `{a}` and `{b}` stand for values so far, `{n}` for a new one, `{i}` for a component, `{c}` for a number.
STATEMENTS = """
{n} = torch.tanh({a}) * RATE
{n} = {a}.sin() + {c} * {b}
{n} = F.softplus({a}) - F.silu({b})
{n} = torch.exp(-{a}.square()) * {b}
{n} = F.gelu({a}) if CONFIG.flag else F.relu({a} + SHIFT)
{n} = {a} * {b} / (1.0 + {b}.pow(2))
{n} = torch.where({a} > {b}, {a}, {c} * {b})
{n} = torch.where(MASK, {a}, -{b})
{n} = {a}.masked_fill({a} < -0.5, {c})
{n} = {a} * ({b} > 0) + {b} * ({b} <= 0).to({b}.dtype)
{n} = {a}.clamp(PAIR.low, PAIR.high) + torch.maximum({a}, {b})
{n} = {a} @ WEIGHT + SPACE.inner.shift
{n} = F.linear({a}, WEIGHT, WEIGHT[0]) - {b}
{n} = torch.einsum("bi,ij->bj", {a}, WEIGHT)
{n} = torch.einsum("bi,bi->b", {a}, {b})[:, None] * {a} / D
{n} = torch.tanh(BLOCK({a}))
{n} = BLOCK.residual({a}) * CONFIG.rate
{n} = CELL({a}, {b})
{n} = through({a}, *LAYERS)
{n} = standard({a}) + {c}
{n} = {a} / ({a}.norm(dim=-1, keepdim=True) + 1.0)
{n} = F.layer_norm({a}, (D,)) * table(D)
{n} = torch.softmax({a}, dim=1) - {b}.sum(1, keepdim=True) / D
{n} = torch.cat([{a}[:, 1:], {b}[:, :1]], dim=1)
{n} = torch.stack([{a}[:, {i}] * {c} + {b}[:, j] for j in range(D)], dim=1)
{n} = {a}[:, INDEX] + {a}[:, ORDER]
{n} = {a}.flip(1) - {b}.roll(1, 1)
{n} = soften({a}) + HALVED({b})
{n} = ({a}.double() * 2).to({a}.dtype) - SPACE.rate
{n} = {a} * float(SCALES[{i}]) + torch.as_tensor(SCALES).to({a}) * {c}
{n} = {a} + torch.sin(2 * math.pi * t) * {b}
{n} = {a} * t + embed(t, D)
{n} = torch.addmm({b}, {a}, WEIGHT.T, alpha={c})
{n} = {a}.unsqueeze(2).expand(-1, -1, 3).mean(2) + {b}.unsqueeze(1).squeeze(1)
{n} = ({a}[:, :, None] * {b}[:, None, :]).sum(-1) / D
{n} = torch.bmm({a}[:, None, :], WEIGHT.expand(len(x), D, D))[:, 0]
{n} = {a}.reshape(x.shape[0], -1) * torch.ones(x.size(0), 1, dtype=x.dtype)
{n} = {a}.cumsum(1) / D
{n} = torch.zeros_like({a}); {n}[:, {i}] = {b}[:, 0]; {n} += {c} * {a}
{n} = {a}.clone(); {n}[:, {i}:] *= {c}; {n}[:, 0].sub_({b}[:, {i}])
{n} = {a} * 1.0; {n}.mul_({c}).add_({b}).clamp_(-2, 2)
{n} = {a}.amax(1, keepdim=True) - {a} + {b}.min(dim=1)[0][:, None]
{n} = torch.lerp({a}, {b}, 0.3) + TABLE["b"][0]
{n} = torch.stack([{a}, {b}]).mean(0) + torch.stack([{a}, {b}]).prod(0)
{n} = torch.nn.functional.pad({a}, (1, 0))[:, :-1] + {b}
{n} = {a}.T.contiguous().T - {b}.transpose(0, 1).mul(0.5).T
{n} = torch.atan2({a}, 1 + {b}.abs()) + torch.log1p({b} ** 2)
""".strip().splitlines()

BLOCKS = """
for k in range(CONFIG.depth): {n} = ({a} if k == 0 else {n}) + {c} * torch.tanh({b})
{n} = {a} if CONFIG.kind == "plain" else standard({a}) if CONFIG.kind == "normal" else {a}.neg()
{n} = sum((w * {a}.sin() for w in SCALES.tolist()), {b})
{n} = (lambda y, k={c}: y * k + RATE)({a})
{n} = {{"plain": torch.tanh, "normal": torch.sin}}.get(CONFIG.kind, torch.cos)({a}) + {b}
{n} = [{a}, {b}, x][CONFIG.depth % 3] * max(RATE, SHIFT)
{n} = {a} if t.ndim == 0 else {b}
with torch.no_grad(): {n} = {a}.detach() * {c}
{n}, _ = ({a} + {b}).chunk(2, 1) if D % 2 == 0 else (({a} - {b}), None); {n} = {a} - {n}.sum(1, keepdim=True)
""".strip().splitlines()

# What the function is.
SHAPES = {
    "function": "def drift(x, t):\n{body}\n    return {out}",
    "closure": "def make(k):\n    held = [k, {{'w': WEIGHT}}]\n    def drift(x, t):\n{deeper}\n"
    "        return held[0] * ({out}) + held[1]['w'][0]\n    return drift\ndrift = make(0.5)",
    "module": "class Net(nn.Module):\n    def __init__(self):\n        super().__init__()\n"
    "        self.block, self.head = BLOCK, nn.Linear(D, D).to(DTYPE)\n    def forward(self, x, t):\n{deeper}\n"
    "        return self.head({out})\ndrift = Net()",
    "method": "class System:\n    rate = 0.7\n    def __init__(self):\n        self.config = CONFIG\n    @property\n"
    "    def gain(self):\n        return self.rate * self.config.rate\n    def drift(self, x, t):\n{deeper}\n"
    "        return self.gain * ({out})\ndrift = System().drift",
    "dataclass": "@dataclasses.dataclass\nclass Drift:\n    rate: float = 0.5\n    net: typing.Any = None\n"
    "    def __call__(self, x, t):\n{deeper}\n        return self.rate * ({out})\ndrift = Drift(net=BLOCK)",
    "partial": "def with_rate(rate, x, t):\n{body}\n    return rate * ({out})\n"
    "drift = functools.partial(with_rate, 0.3)",
    "wrapped": "def scaled(f):\n    @functools.wraps(f)\n    def g(*args):\n        return 0.5 * f(*args)\n"
    "    return g\n@scaled\ndef drift(x, t):\n{body}\n    return {out}",
}  # fmt: skip


def source(seed, d):
    """A program's text, for states of ``d`` components."""
    r = random.Random(seed)

    def numbers(*shape):
        return [numbers(*shape[1:]) for _ in range(shape[0])] if shape else round(r.uniform(-1.0, 1.0), 3)

    prelude = PRELUDE.format(
        d=d, seed=seed, rate=round(r.uniform(0.1, 1.0), 3), shift=numbers(), scales=numbers(d), weight=numbers(d, d),
        order=r.sample(range(d), d), mask=[r.random() < 0.5 for _ in range(d)], flag=r.random() < 0.5,
        depth=r.randrange(1, 4), kind=r.choice(("plain", "normal", "other")),
        act=r.choice(("torch.tanh", "F.silu", "nn.GELU()", "nn.Softplus()", "torch.sin")),
    )  # fmt: skip
    values, lines = ["x"], []
    for k in range(r.randrange(2, 7)):
        text = r.choice(BLOCKS if r.random() < 0.2 else STATEMENTS)
        a, b = r.choice(values), r.choice(values)
        lines.append(text.format(n=f"v{k}", a=a, b=b, i=r.randrange(d), c=numbers()))
        values.append(f"v{k}")
    out = r.choice((f"torch.tanh({values[-1]})", f"{values[-1]}.clamp(-3, 3) - x", f"soften({values[-1]}) - 0.1 * x"))
    body, deeper = ("\n".join(" " * n + line for line in lines) for n in (4, 8))
    drift = r.choice([*SHAPES.values()]).format(body=body, deeper=deeper, out=out)
    return f"D = {d}\n{prelude}\n{drift}\n"


def program(seed, d, dtype):
    """The program as a function of ``x`` and ``t``."""
    text, name = source(seed, d), f"<program {seed}>"
    linecache.cache[name] = (len(text), None, text.splitlines(True), name)
    module = types.ModuleType("random_program")
    vars(module).update(NAMES, DTYPE=dtype)
    sys.modules["random_program"] = module  # where a dataclass looks its module up
    exec(compile(text, name, "exec"), vars(module))
    return module.drift


def compared(seed, drift_alone=False):
    """Five programs in drift, diffusion and observable: the error under ``auto``, in roundings, and the stats."""
    r = random.Random(seed)
    d, dtype = r.choice((2, 2, 3, 4)), r.choice((torch.float64, torch.float64, torch.float32))
    f, g, h, k, observable = (program(PROGRAMS_A_RUN * seed + k, d, dtype) for k in range(PROGRAMS_A_RUN))
    batch, normals = r.choice((1, 2, 3, 6, 17)), torch.Generator().manual_seed(seed)
    x0 = torch.randn(batch, d, dtype=torch.float64, generator=normals).to(dtype)
    solver, calculus = r.choice(((sds.EulerMaruyama(), "ito"), (sds.Heun(), "stratonovich")))
    sde = sds.SDE(lambda x, t: f(x, t) + g(x, t), lambda x, t: 0.1 * (h(x, t) - k(x, t)), calculus=calculus)
    options = {"solver": solver, "seed": seed, "check_finite": False, "save_at": "grid"}
    options["observable"] = lambda x: observable(x, torch.zeros((), dtype=x.dtype))
    if drift_alone:
        sde, options["observable"] = sds.SDE(f, lambda x, t: 0.1 * torch.ones_like(x), calculus=calculus), None
    auto, eager = (sds.solve(sde, x0, 0.0, 0.5, 2, backend=b, **options) for b in ("auto", "eager"))
    error = 0.0
    for a, b in ((auto.x1, eager.x1), (auto.xs, eager.xs)):
        assert torch.equal(a.isnan(), b.isnan())
        error = max(error, ((a - b).abs() / (1 + b.abs())).nan_to_num(0.0).max().item())
    return error / torch.finfo(dtype).eps, auto.stats


@pytest.mark.slow
@pytest.mark.parametrize("part", TRIED)
def test_random_programs(part, interpreted):
    runs = PROGRAMS // PROGRAMS_A_RUN // PARTS
    fused = 0
    with torch.no_grad():
        for seed in range(part * runs, (part + 1) * runs):
            error, stats = compared(seed)
            assert error < 200, (seed, error)
            fused += stats.backend == "fused"
    assert fused >= 0.9 * runs  # the others are refused with a reason, and right


@pytest.mark.parametrize("seed", range(COMPILED))
def test_random_programs_compiled(seed):
    with torch.no_grad():
        error, _ = compared(seed, drift_alone=True)
    assert error < 200


@pytest.mark.parametrize("seed", range(GRADED))
def test_gradients_of_random_programs(seed, interpreted):
    """Against autograd of the eager scheme, for states, weights of the module and matrix of each program."""
    r = random.Random(seed)
    d = r.choice((2, 3, 4))
    f, g, observable = (program(PROGRAMS_A_RUN * seed + k, d, torch.float64) for k in range(3))
    normals = torch.Generator().manual_seed(seed)
    wanted = [torch.randn(r.choice((1, 3, 17)), d, dtype=torch.float64, generator=normals).requires_grad_()]
    for function in (f, g, observable):
        names = names_of(function)
        wanted += [names["WEIGHT"].requires_grad_(), *names["BLOCK"].parameters()]
    sde = sds.SDE(f, lambda x, t: 0.1 * g(x, t))
    options = {"solver": sds.EulerMaruyama(), "seed": seed, "check_finite": False, "save_at": "grid"}
    options["observable"] = lambda x: observable(x, torch.zeros((), dtype=x.dtype))
    found = []
    for backend in ("auto", "eager"):
        xs = sds.solve(sde, wanted[0], 0.0, 0.5, 2, backend=backend, **options).xs
        loss = (xs * torch.linspace(1, 2, xs.numel(), dtype=torch.float64).reshape(xs.shape)).sum()
        found.append(torch.autograd.grad(loss, wanted, allow_unused=True, materialize_grads=True))
    for ours, theirs in zip(*found, strict=True):
        known = theirs.isfinite()
        assert ((ours - theirs)[known].abs() <= 1e-10 * theirs[known].abs().max().clamp(min=1e-3)).all()


@pytest.mark.parametrize("seed", range(PUSHED))
def test_tangents_of_random_programs(seed, interpreted):
    """Against forward mode of the eager scheme: of states and the matrix of each program, in one direction or three."""
    r = random.Random(seed)
    d, normals = r.choice((2, 3, 4)), torch.Generator().manual_seed(seed)
    functions = [program(PROGRAMS_A_RUN * seed + k, d, torch.float64) for k in range(3)]
    f, g, observable = functions
    x0 = torch.randn(r.choice((1, 3, 17)), d, dtype=torch.float64, generator=normals)
    start = [x0, *(names_of(function)["WEIGHT"] for function in functions)]
    ways = [torch.randn(3, *t.shape, dtype=torch.float64, generator=normals) for t in start]
    sde = sds.SDE(f, lambda x, t: 0.1 * g(x, t))
    options = {"solver": sds.EulerMaruyama(), "seed": seed, "check_finite": False, "save_at": "grid"}
    options["observable"] = lambda x: observable(x, torch.zeros((), dtype=x.dtype))
    executions = set()

    def along(u, backend):
        x, *weights = (t + torch.tensordot(u, v, 1) for t, v in zip(start, ways, strict=True))
        for function, weight in zip(functions, weights, strict=True):
            names_of(function)["WEIGHT"] = weight
        sol = sds.solve(sde, x, 0.0, 0.5, 2, backend=backend, **options)
        executions.add((backend, sol.stats.execution))
        return sol.xs

    def differentiated(backend):
        if seed % 2:
            return torch.func.jacfwd(lambda u: along(u, backend))(u)
        return torch.func.jvp(lambda u: along(u, backend), (u,), (torch.ones_like(u),))[1]

    u = torch.zeros(3, dtype=torch.float64)
    with torch.no_grad():
        ours, theirs = map(differentiated, ("auto", "eager"))
    known = theirs.isfinite()
    assert ((ours - theirs)[known].abs() <= 1e-10 * theirs[known].abs().max().clamp(min=1e-3)).all()
    assert executions == {("auto", "fused"), ("eager", "eager")}


def names_of(function):
    """The globals of a program."""
    function = getattr(function, "func", function)
    if isinstance(function, torch.nn.Module):
        return type(function).forward.__globals__
    return getattr(function, "__globals__", None) or type(function).__call__.__globals__
