"""Random calls of the public API, valid and invalid: ``PYTHONPATH=.:kernels python tools/soak.py --calls 20000``.

Call number ``k`` is a function of ``k`` alone. A call passes if it returns, or raises what is documented with a message
of ours: short, from a frame of this package (or of the user's function), and the same after pickling. What `solve` and
`sample` give under "auto" must be what they give under "eager", errors included.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import inspect
import math
import pickle
import random
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import sdesolve as sds

ALLOWED = (ValueError, TypeError, sds.DivergenceError, RuntimeError, FloatingPointError)
LONGEST = 700  # characters of a message
_OURS = (f"{Path(sds.__file__).parent}/", "/sdesolve_kernels/")


class UsersOwn(Exception):
    """What a function of the user raises; it must come through as it is."""


@dataclasses.dataclass
class Call:
    """One call: a function of a back end, and what it is, for a report."""

    run: Callable[[str], Any]
    about: str
    backends: bool = False


def calls(first: int, count: int) -> Iterator[tuple[int, Call]]:
    """Calls ``first ... first + count - 1``."""
    kinds = (_solve, _solve, _solve, _sample, _sample, _likelihood, _train, _chain, _metric)
    for k in range(first, first + count):
        r = random.Random(k)
        yield k, r.choice(kinds)(r)


def soak(first: int, count: int, *, auto: bool = True) -> tuple[collections.Counter[str], list[str]]:
    """Makes calls; what came of them, by kind, and what must not have. Without ``auto`` no kernel is made."""
    outcomes: collections.Counter[str] = collections.Counter()
    faults: list[str] = []
    for k, call in calls(first, count):
        results = {}
        for backend in ("auto", "eager") if auto and call.backends else ("eager",):
            torch.manual_seed(k)
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    results[backend] = call.run(backend)
            except Exception as error:
                results[backend] = error
                wrong = _wrong_with(error)
                if wrong:
                    faults.append(f"{k} {backend}: {wrong}\n    {call.about}")
        wrong = _difference(*results.values()) if len(results) == 2 else None
        if wrong:
            faults.append(f"{k}: auto and eager differ: {wrong}\n    {call.about}")
        kind = call.about.partition("(")[0]
        outcomes[f"{kind}: {type(r).__name__ if isinstance((r := results['eager']), Exception) else 'returned'}"] += 1
    return outcomes, faults


def _wrong_with(error: Exception) -> str | None:
    if isinstance(error, UsersOwn):
        return None
    text, last = str(error), traceback.extract_tb(error.__traceback__)[-1]
    if last.filename == __file__ or "positional argument" in text:
        return None  # the function of the user raises it
    where = f"{type(error).__name__} at {Path(last.filename).name}:{last.lineno}: {text[:300]!r}"
    if not isinstance(error, ALLOWED):
        return f"undocumented {where}"
    if len(text) > LONGEST:
        return f"{len(text)} characters of {where}"
    raised = any(part in last.filename for part in _OURS) and str(last.line).startswith("raise")
    if not raised:
        return f"not ours: {where}"
    try:
        again = pickle.loads(pickle.dumps(error))
    except Exception:
        again = None
    return None if (type(again), str(again)) == (type(error), text) else f"does not pickle: {where}"


def _difference(auto: Any, eager: Any) -> str | None:
    if isinstance(auto, Exception) or isinstance(eager, Exception):
        if type(auto) is type(eager) and getattr(auto, "path", None) == getattr(eager, "path", None):
            return None
        return f"{type(auto).__name__} {str(auto)[:200]!r} and {type(eager).__name__} {str(eager)[:200]!r}"
    for a, b in zip(auto, eager, strict=True):
        if (a is None) != (b is None) or (a is not None and (a.shape, a.dtype) != (b.shape, b.dtype)):
            return f"{a} and {b}"
        if a is None or not a.numel():
            continue
        coarse = auto[0].dtype == torch.float32
        a, b = a.detach(), b.detach()
        scale = float(b.double().abs().nan_to_num(0.0, 0.0, 0.0).max()) + 1e-3
        off = float((a.double() - b.double()).abs().nan_to_num(0.0, math.inf).max())
        nans = bool((a.isnan() == b.isnan()).all())
        if not nans or off > scale * (2e-3 if coarse else 1e-7):
            return f"by {off:.3g} of {scale:.3g}"
    return None


def _mostly(r: random.Random, good: Any, *bad: Any) -> Any:
    """``good`` nine times of ten."""
    return r.choice(bad) if bad and r.random() < 0.1 else good


def _state(r: random.Random, shape: tuple[int, ...], dtype: torch.dtype) -> Any:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(r.randrange(100)), dtype=torch.float64).to(dtype)
    if r.random() > 0.12:
        return x
    odd = [
        lambda: x.tolist(),
        lambda: x.numpy(),
        lambda: x.long(),
        lambda: x.half(),
        lambda: x.bfloat16(),
        lambda: x.to(torch.complex64),
        lambda: x * math.nan,
        lambda: x[:0],
        lambda: x[:, :0],
        lambda: x.sum(),
        lambda: x.sum(0),
        lambda: x.to("meta"),
        lambda: x.to_sparse(),
        lambda: x.requires_grad_(),
        lambda: x[:1].expand(min(len(x), 1) * 5, -1),
        lambda: torch.nn.Parameter(x),
        lambda: x.T.contiguous().T,
        lambda: x[:, None, :, None],
        lambda: x > 0,
        lambda: None,
        lambda: 1.5,
        lambda: 1e30 * x,
        lambda: 1e-30 * x,
        lambda: x.flip(0)[::2],
        lambda: "x0",
    ]
    return r.choice(odd)()


_RATE = torch.tensor(0.7)
_TABLE = torch.linspace(-1.0, 1.0, 16)


def _raises(*_: object) -> Tensor:
    raise UsersOwn("of the user")


_DRIFTS: list[Any] = [
    lambda x, t: -0.7 * x,
    lambda x, t: -x + torch.sin(3.0 * t),
    lambda x, t: -_RATE.to(x) * x.tanh(),
]
_ODD_DRIFTS: list[Any] = [
    lambda x, t: -x.roll(1, 0),
    lambda x, t: -x * _TABLE.to(x)[int(8 * float(t.flatten()[0])) % 16],
    lambda x, t: x[:, :1],
    lambda x, t: x.double(),
    lambda x, t: 1.0,
    lambda x, t: None,
    lambda x, t: x.mul_(0.5),
    lambda x, t: x / 0.0,
    lambda x, t: 1e20 * x * x.abs(),
    lambda x, t: torch.where(t > 0.4, x * math.nan, x),
    lambda x, t: x.sum(),
    lambda x: x,
    lambda x, t: x @ torch.ones(7, 7),
    lambda x, t: x.numpy(),
    lambda x, t: x.unknown,
    _raises,
    None,
    3,
]
_DIFFUSIONS: list[tuple[Any, str]] = [
    (lambda x, t: 0.3 * x, "diagonal"),
    (lambda x, t: 0.2 * torch.ones_like(x), "additive"),
    (lambda x, t: 0.1 * x.cos(), "diagonal"),
    (lambda x, t: 0.1 * x, "scalar"),
    (lambda x, t: 0.2 * x[..., None].expand(*x.shape, 2), "general"),
]
_ODD_DIFFUSIONS: list[tuple[Any, str]] = [
    (lambda x, t: x, "additive"),
    (lambda x, t: torch.ones(3, 3), "additive"),
    (lambda x, t: x[:, :1], "general"),
    (lambda x, t: 0.1, "diagonal"),
    (lambda x, t: None, "diagonal"),
    (lambda x, t: x * math.inf, "diagonal"),
    (lambda x, t: x.roll(1, 1), "diagonal"),
    (lambda x, t: torch.ones(x.shape[0]), "diagonal"),
    (lambda x, t: 0.1 * x, "matrix"),
    (_raises, "diagonal"),
]
_SOLVERS: list[Any] = [
    sds.EulerMaruyama(),
    sds.EulerMaruyama(),
    sds.Milstein(),
    sds.Heun(),
    sds.RK4(),
    sds.DormandPrince(),
]


def _saved(sol: sds.Solution) -> tuple[Any, ...]:
    return sol.x1, sol.xs, sol.mean, sol.variance


def _solve(r: random.Random) -> Call:
    dtype, batch, d = r.choice((torch.float32, torch.float64)), r.choice((1, 2, 5)), r.choice((1, 2))
    x0 = _state(r, (batch, d), dtype)
    drift = _mostly(r, r.choice(_DRIFTS), *_ODD_DRIFTS)
    diffusion, noise = _mostly(r, r.choice(_DIFFUSIONS), *_ODD_DIFFUSIONS)
    solver = r.choice(_SOLVERS)
    calculus = "stratonovich" if isinstance(solver, sds.Heun) else "ito"
    ode = isinstance(solver, sds.RK4 | sds.DormandPrince) or r.random() < 0.1
    solver = _mostly(r, solver, sds.EulerMaruyama, None, "euler", sds.DPMSolverPP(), sds.Heun(), sds.RK4(), 3)
    adaptive = isinstance(solver, sds.DormandPrince)
    t0, t1 = r.choice(((0.0, 1.0), (1.0, 0.0), (0.25, 0.75), (-1.0, 2.0), (1e6, 1e6 + 1)))
    odd = (
        t0,
        math.nan,
        math.inf,
        "0",
        None,
        torch.zeros(batch),
        torch.linspace(1, 2, batch),
        [0.5] * batch,
        1e300,
        True,
        np.float32(0.3),
        torch.tensor([0.0, 1.0]),
        torch.tensor(0.5, requires_grad=True),
        1j,
    )
    options: dict[str, Any] = {
        "t0": _mostly(r, t0, *odd),
        "t1": _mostly(r, t1, *odd),
        "steps": None
        if adaptive
        else _mostly(r, r.choice((1, 3, 8)), 0, -1, 2.5, True, None, "3", np.int64(4), 2**70, 3.0),
        "solver": solver,
        "seed": _mostly(r, r.randrange(5), None, -1, 1.5, 2**64, True, "1", np.int64(3), torch.tensor(3)),
    }
    if r.random() < 0.25:
        options["save_at"] = r.choice(
            (
                "grid",
                [0.5],
                [t0, t1],
                [],
                [math.nan],
                torch.tensor([0.5, 0.6]),
                {0.5},
                "all",
                0.5,
                (0.3, 0.3),
                [t1 + 1.0],
                [0.26, 0.74],
                np.array([0.5]),
                [None],
                (0.5,),
            )
        )
    if r.random() < 0.1:
        options["reduce"] = r.choice(("moments", "mean", True))
    if r.random() < 0.1:
        options["observable"] = r.choice(
            (
                lambda x: x.square().sum(1),
                lambda x: x[:, 0],
                "x",
                lambda x: x.sum(),
                _raises,
                lambda x: 1.0,
                lambda x: x > 0,
            )
        )
    if r.random() < 0.1:
        options["increments"] = r.choice(("two-point", "three-point", "normal", "four", 2))
    if r.random() < 0.1:
        paths = (
            sds.BrownianPath(1, first_path=7),
            sds.BrownianPath(2, first_step=5),
            sds.BrownianPath(0, substeps=2),
            5,
            sds.BrownianPath(1, first_path=2**64 - 1),
            "path",
        )
        options["noise"], options["seed"] = r.choice(paths), _mostly(r, None, 1)
    if r.random() < 0.1:
        grids = (
            torch.tensor([0.0, 0.1, 1.0]),
            torch.tensor([0.0, 0.5, 0.2]),
            torch.tensor([0.0]),
            [0.0, 1.0],
            "grid",
            torch.rand(3, batch).cumsum(0),
            torch.arange(5000.0).flip(0).roll(1),
            torch.tensor([0.0, math.nan]),
        )
        options |= {"t0": None, "t1": None, "steps": None, "grid": r.choice(grids)}
    if r.random() < 0.1:
        options["params"] = r.choice((torch.ones(()), (torch.ones(2),), {"a": torch.ones(batch, 1)}, 3.0, "p", [], {}))
    if r.random() < 0.1:
        options["check_finite"] = False

    def run(backend: str) -> tuple[Any, ...]:
        f, g = drift, diffusion
        if "params" in options and callable(f) and callable(g):
            f, g = lambda x, t, p: drift(x, t), lambda x, t, p: diffusion(x, t)
        sde = sds.ODE(f) if ode else sds.SDE(f, g, noise=noise, calculus=calculus)  # type: ignore[arg-type]
        return _saved(sds.solve(sde, x0, backend=backend, **options))  # type: ignore[arg-type]

    drawn = options["seed"] is None and options.get("noise") is None
    about = (
        f"solve({_short(x0)}, drift {_index(drift)}, diffusion {_index(diffusion)} {noise}, {ode=}, {_short(options)})"
    )
    return Call(run, about, backends=not drawn and r.random() < 0.3)


_PROCESSES = [sds.VP(), sds.VE(), sds.OU(), sds.EDM(), sds.SubVP()]
_DATA = sds.GaussianMixture(torch.tensor([[-1.0, 0.0], [1.0, 0.5]]), 0.4)
_SAMPLERS: list[Any] = [
    sds.EulerMaruyama(),
    sds.DDIM(),
    sds.DPMSolverPP(),
    sds.SDEDPMSolverPP(),
    sds.UniPC(),
    sds.Ancestral(),
    sds.Heun(),
    sds.RK4(),
    sds.DormandPrince(),
    sds.EDMHeun(),
    sds.SASolver(),
    sds.DEIS(),
    sds.PredictorCorrector(sds.EulerMaruyama(), sds.LangevinCorrector(0.1)),
]


def _score(r: random.Random, process: Any) -> Any:
    odd = [
        lambda x, t: x[:, :1],
        lambda x, t: None,
        lambda x, t: x * math.nan,
        lambda x, t: x.half(),
        _raises,
        None,
        3,
        _DATA,
        sds.VP(),
        lambda x: -x,
        lambda x, t: -x.sum(1),
        lambda x, t: 1e20 * x,
    ]
    return _mostly(r, r.choice((_DATA.score(process), lambda x, t: -x)), *odd, _DATA.score(sds.VE(sigma_max=3.0)))


def _sample(r: random.Random) -> Call:
    process = r.choice(_PROCESSES)
    score, solver = _score(r, process), r.choice(_SAMPLERS)
    given = _mostly(r, process, sds.VP, None, process.reverse(lambda x, t: -x), "vp")
    adaptive = isinstance(solver, sds.DormandPrince)
    options: dict[str, Any] = {
        "shape": _mostly(
            r, (r.choice((1, 3)), 2), (0, 2), (3,), (3, 0), 3, "x", (2.0, 2), (-1, 2), None, [3, 2], (3, 3)
        ),
        "solver": _mostly(r, solver, sds.DDIM, None, sds.Milstein(), 5),
        "steps": None if adaptive else _mostly(r, r.choice((2, 5)), 0, 1, -1, 2.0, None, "5"),
        "seed": _mostly(r, r.randrange(5), -1, 0.5, 2**64, "1"),
    }
    if r.random() < 0.1:
        options["grid"] = r.choice(
            (process.time_grid(4), torch.linspace(1, 0, 5), torch.linspace(0, 1, 5), [1.0, 0.5], 3)
        )
        options["steps"] = _mostly(r, None, 4)
    for name, chance, values in (
        ("stochasticity", 0.15, (0, 0.0, 0.5, 1, 2.0, -1.0, math.nan, "1", True)),
        ("dtype", 0.15, (torch.float64, torch.float16, torch.int64, torch.complex64, "float32", float)),
        ("denoise", 0.1, (False, True, None)),
        ("device", 0.05, ("cpu", "meta", "nowhere", 3)),
        ("from_time", 0.05, (0.5, process.t_max, 2e3, "x", math.nan)),
        ("x0", 0.05, (torch.zeros(3, 2), torch.zeros(3), "x")),
    ):
        if r.random() < chance:
            options[name] = r.choice(values)

    def run(backend: str) -> tuple[Any, ...]:
        return (sds.sample(given, score, backend=backend, **options),)  # type: ignore[arg-type]

    return Call(
        run, f"sample({_short(given)}, {_index(score)}, {_short(options)})", backends=options["seed"] is not None
    )


def _likelihood(r: random.Random) -> Call:
    process = r.choice(_PROCESSES)
    score, x = _score(r, process), _state(r, (3, 2), torch.float32)
    options: dict[str, Any] = _mostly(
        r,
        r.choice(({"solver": sds.RK4(), "steps": 3}, {"steps": 2}, {})),
        {"steps": 0},
        {"solver": sds.EulerMaruyama(), "steps": 3},
        {"t_min": -1.0},
        {"steps": 2.5},
        {"grid": "x"},
        {"solver": sds.RK4()},
        {"steps": 3, "grid": torch.linspace(0.1, 1, 4)},
        {"ending": "none"},
        {"seed": -1},
        {"divergence": "exact"},
        {"prior": 3},
        {"prior": lambda x: x, "steps": 2},
        {"first_sample": -1, "steps": 2},
    )
    if r.random() < 0.3:
        options["divergence"] = r.choice((sds.Hutchinson(), sds.ExactTrace(), sds.HutchPP()))
    function = r.choice((sds.log_likelihood, sds.estimate_likelihood, sds.encode, sds.decode))
    if function in (sds.encode, sds.decode):
        options = {name: value for name, value in options.items() if name in ("solver", "steps", "grid", "t_min")}
    return Call(
        lambda backend: function(process, score, x, **options), f"{function.__name__}({_short(x)}, {_short(options)})"
    )


def _train(r: random.Random) -> Call:
    labelled = r.random() < 0.2
    torch.manual_seed(0)
    net = sds.nn.MLP(2, width=4, depth=1, **({"classes": 3} if labelled else {}))
    score = _mostly(
        r, sds.NetworkScore(net, r.choice(_PROCESSES[:2])), net, lambda x, t: -x, None, _DATA.score(sds.VP())
    )
    data = _mostly(
        r,
        _state(r, (12, 2), torch.float32),
        [torch.randn(4, 2)] * 2,
        [],
        3,
        iter([]),
        [None],
        [(torch.ones(4, 2),)],
        torch.randn(12, 3),
        [torch.ones(4, 2), torch.ones(4, 3)],
        200 * torch.randn(12, 2),
    )
    options: dict[str, Any] = {
        "loss": _mostly(
            r, sds.DenoisingScoreMatching(), sds.DenoisingScoreMatching, None, "dsm", sds.ImplicitScoreMatching()
        ),
        "steps": _mostly(r, r.choice((1, 2)), 0, -1, 1.5, "2", None),
        "progress": False,
        "warmup": _mostly(r, 0, -1, 0.5, 10),
    }
    if labelled:
        options["labels"] = _mostly(
            r, torch.arange(12) % 3, torch.arange(12), torch.ones(12), [0] * 12, torch.zeros(3).long()
        )
    for name, chance, values in (
        ("batch_size", 0.5, (4, 4, 100, 0, -1, 2.5)),
        ("lr", 0.2, (1e-2, 0.0, -1.0, math.nan, "x", 1e30)),
        ("ema", 0.2, (0.9, (0.9, 0.99), 1.0, -0.1, (), "x", (0.9, 0.9))),
        ("clip", 0.1, (None, 1.0, 0.0, -1.0, "x")),
        ("decay", 0.1, ("cosine", "linear", None)),
        ("accumulate", 0.1, (2, 0, 1.5, 100)),
        ("label_dropout", 0.1, (0.1, -1.0, 2.0, "x")),
        ("autocast", 0.1, (torch.bfloat16, torch.float16, "bf16", True)),
        ("seed", 0.1, (3, -1, 0.5, 2**64)),
        ("metrics", 0.05, (lambda s: {"a": 1.0}, lambda s: 3, _raises, "m")),
        ("callback", 0.05, (lambda report: None, _raises, 3)),
        ("weight_decay", 0.1, (0.1, -1.0, math.inf)),
    ):
        if r.random() < chance:
            options[name] = r.choice(values)
    return Call(
        lambda backend: sds.train(score, data, **options), f"train({_index(score)}, {_short(data)}, {_short(options)})"
    )


def _chain(r: random.Random) -> Call:
    kernel = _mostly(
        r, r.choice((sds.mcmc.Langevin(0.1), sds.mcmc.MALA(0.1), sds.mcmc.BAOAB(0.1))), sds.mcmc.MALA, None, 3
    )
    x0 = _state(r, (3, 2), r.choice((torch.float32, torch.float64)))
    options: dict[str, Any] = {
        "steps": _mostly(r, r.choice((1, 4)), 0, -1, 2.5, "x", None),
        "seed": _mostly(r, 1, -1, 0.5, 2**64, "1"),
        "energy": _mostly(
            r,
            lambda x: 0.5 * x.square().sum(1),
            lambda x: x,
            lambda x: 1.0,
            _raises,
            None,
            "e",
            lambda x: x.sum(1) * math.nan,
            lambda x: x.detach().sum(1),
        ),
    }
    if r.random() < 0.5:
        options["score"] = _mostly(r, lambda x: -x, lambda x: x[:, :1], lambda x: None, _raises, 3, lambda x: -1e20 * x)
    if r.random() < 0.1:
        options["velocity"] = r.choice((torch.zeros(3, 2), torch.zeros(2), "v", torch.zeros(3, 2).long()))
    if r.random() < 0.2:
        options["save_every"] = r.choice((1, 2, 0, -1, 1.5, 100))
    return Call(
        lambda backend: sds.run_chain(kernel, x0, **options),
        f"run_chain({_short(kernel)}, {_short(x0)}, {_short(options)})",
    )


def _metric(r: random.Random) -> Call:
    dtype = r.choice((torch.float32, torch.float64))
    a, b = (_state(r, (_mostly(r, 12, 1, 2, 0), 2), dtype) for _ in range(2))
    square = torch.eye(2, dtype=dtype)
    mean = torch.zeros(2, dtype=dtype)
    function, arguments = r.choice(
        (
            (sds.metrics.energy_distance, (a, b)),
            (sds.metrics.squared_mmd, (a, b)),
            (sds.metrics.precision_recall, (a, b)),
            (sds.metrics.sliced_wasserstein, (a, b)),
            (sds.metrics.frechet_distance, (a, b)),
            (sds.metrics.wasserstein_1d, (a, b)),
            (
                sds.metrics.gaussian_kl,
                (mean, square, _mostly(r, mean, mean[:1], a), _mostly(r, 2 * square, -square, a, 0 * square)),
            ),
            (
                sds.metrics.bures_wasserstein,
                (mean, square, mean, _mostly(r, 2 * square, -square, a, "cov", math.nan * square)),
            ),
            (sds.metrics.sample_floor, (sds.metrics.sliced_wasserstein, a)),
        )
    )
    odd = ({"confidence": 2.0}, {"p": 0.0}, {"bandwidth": -1.0}, {"neighbours": 50}, {"seed": -1}, {"rounds": 0}, {})
    options = {name: value for name, value in r.choice(odd).items() if name in inspect.signature(function).parameters}
    about = f"{function.__name__}({_short(arguments)}, {_short(options)})"
    return Call(lambda backend: function(*arguments, **options), about)


def _index(function: Any) -> str:
    for name in ("_DRIFTS", "_ODD_DRIFTS"):
        if function in globals()[name]:
            return f"{name}[{globals()[name].index(function)}]"
    for name in ("_DIFFUSIONS", "_ODD_DIFFUSIONS"):
        for i, (g, _) in enumerate(globals()[name]):
            if g is function:
                return f"{name}[{i}]"
    return type(function).__name__


def _short(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{type(value).__name__} {tuple(value.shape)} {value.dtype}"
    if isinstance(value, dict):
        return ", ".join(f"{name}={_short(entry)}" for name, entry in value.items())
    if isinstance(value, tuple | list) and any(isinstance(entry, Tensor) for entry in value):
        return f"[{', '.join(map(_short, value))}]"
    return repr(value)[:80]


def main() -> int:
    """Makes the calls that were asked for, and reports."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--calls", type=int, default=1000)
    parser.add_argument("--every", type=int, default=500, help="calls between two reports")
    arguments = parser.parse_args()
    total: collections.Counter[str] = collections.Counter()
    found = 0
    for first in range(arguments.first, arguments.first + arguments.calls, arguments.every):
        outcomes, faults = soak(first, min(arguments.every, arguments.first + arguments.calls - first))
        total += outcomes
        found += len(faults)
        print(f"{total.total()} calls, {found} faults", *faults, sep="\n", flush=True)
    for name, count in sorted(total.items()):
        print(f"{count:7d} {name}")
    return found > 0


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(main())
