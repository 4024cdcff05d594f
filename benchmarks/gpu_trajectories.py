"""Generated trajectories on the device: checked against the CPU first, then timed. What fails is not timed.

On the CPU that stands in for a GPU the same calls run on the Numba back end.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

import sdesolve as sds
from benchmarks.gpu_device import Machine
from benchmarks.gpu_measure import quartiles, rounds
from benchmarks.models import MODELS, Model

__all__ = ["trajectories"]

Record = dict[str, Any]
_NORMAL = 1e-5  # by how much a normal may be off, kernels/README.md
_FEW, _MANY = 257, (1 << 16) + 3  # paths: programs of one warp, and of four; the last one is not full
_STEPS = 13

_FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    **{name: getattr(torch, name) for name in (
        "exp", "expm1", "log", "log1p", "sin", "cos", "tan", "sinh", "cosh", "tanh", "asin", "acos", "atan", "erf",
        "sqrt", "rsqrt", "reciprocal", "floor", "ceil", "round", "trunc", "sign", "abs", "sigmoid", "relu",
    )},
    "pow": lambda x: x.abs() ** x,
    "pow of -2": lambda x: (torch.zeros_like(x) - 2.0) ** torch.round(x),
    "atan2": lambda x: torch.atan2(x, x.sin()),
    "softplus": torch.nn.functional.softplus,
    "minimum": lambda x: torch.minimum(torch.log(x), x),
    "maximum": lambda x: torch.maximum(torch.log(x), x),
    "clamp": lambda x: x.clamp(-1.0, 0.5),
    "where": lambda x: torch.where((x > 0) & ~(x > 2), x, -x),
}  # fmt: skip


def _functions(x: Tensor, t: Tensor) -> Tensor:
    return torch.stack([f(a) for f, a in zip(_FUNCTIONS.values(), x.unbind(1), strict=True)], dim=1)


def _special() -> Tensor:
    """``(values, functions)``: ordinary numbers, and some next to which functions change their ways."""
    ends = [0.0, -0.0, 1.0, -1.0, 2.0, -2.0, 2.5, -3.5, 88.0, 89.0, -87.0, -104.0, 1e-7, 1e-20, 1e6, 1e20, -1e6]
    some = torch.cat([torch.tensor(ends), torch.linspace(-8.0, 8.0, 301), torch.linspace(-400.0, 400.0, 101)])
    return some[:, None].repeat(1, len(_FUNCTIONS))


def _check_functions(machine: Machine, dtype: torch.dtype) -> str | None:
    x = _special().to(dtype)
    options: dict[str, Any] = {"solver": sds.EulerMaruyama(), "check_finite": False}
    made = sds.solve(sds.ODE(_functions), x.to(machine.device), 0.0, 1.0, 1, backend="fused", **options).x1.cpu()
    exact = x.double() + _functions(x.double(), x)
    eager = sds.solve(sds.ODE(_functions), x, 0.0, 1.0, 1, backend="eager", **options).x1
    # Four units in the last place of what is added up; where torch in this precision overflows, so do we.
    unit = torch.finfo(dtype).eps * (x.double().abs() + exact.abs()) + torch.finfo(dtype).tiny
    close = (made.double() - exact).abs() <= 4 * unit
    same = (made == eager) | (made.isnan() & eager.isnan())
    wrong = [
        f"{name} of {float(x[int(bad[0]), j])}: {float(made[int(bad[0]), j])}"
        for j, name in enumerate(_FUNCTIONS)
        if len(bad := (~(close | same))[:, j].nonzero())
    ]
    return "; ".join(wrong) or None


def _difference(machine: Machine, model: Model, paths: int, reference: str, options: dict[str, Any]) -> str | None:
    """What is wrong with a short run of a model; ``None`` if it agrees with the CPU."""
    options = {"grid": model.early(_STEPS), **options}
    made = model.solve(paths, None, machine.device, backend="fused", **options)
    exact = model.solve(paths, None, "cpu", backend=reference, **options)
    dtype = made.x1.dtype
    normal = _NORMAL if dtype is torch.float32 else 2e-14
    for name in ("x1", "xs", "mean", "variance"):
        a, b = getattr(made, name), getattr(exact, name)
        if b is None or b.numel() == 0:
            continue
        a, b = a.double().cpu(), b.double()
        size = b.abs().amax(dim=tuple(range(b.ndim - 1)), keepdim=True) + b.abs().mean()
        if not bool(((a - b).abs() <= (_STEPS * normal + 64 * _STEPS * torch.finfo(dtype).eps) * size).all()):
            return f"{name} is off by {float(((a - b).abs() / size).max()):.1e}"
    return None


def _checks(tiny: bool) -> Iterator[tuple[str, str, int, dict[str, Any]]]:
    """Name, model, paths and options."""
    for name in ("geometric", "linear") if tiny else MODELS:
        yield f"{name}, {_FEW} paths", name, _FEW, {}
        if not tiny:
            yield f"{name}, {_MANY} paths", name, _MANY, {}
    if tiny:
        return
    path = sds.BrownianPath(2**63 + 1, first_path=2**33 - 100, first_step=(2**34 - 15) // 3)
    backwards = torch.linspace(1.0, 0.0, _STEPS + 1, dtype=torch.float64) ** 1.5
    for label, options in {
        "float64": {"dtype": torch.float64},
        "saved": {"save_at": "grid"},
        "moments": {"save_at": "grid", "reduce": "moments"},
        "observed": {"save_at": "grid", "observable": lambda x: torch.relu(x - 0.1).sum(1)},
        "two-point": {"increments": "two-point", "grid": torch.linspace(0, 1, 70, dtype=torch.float64)},
        "three-point": {"increments": "three-point"},
        "counters beyond 32 bits": {"noise": path, "seed": None},
        "uneven, backwards": {"grid": backwards},
    }.items():
        yield f"linear, {label}", "linear", _FEW, options


def _attempt(check: Callable[[], str | None]) -> str | None:
    try:
        return check()
    except Exception as error:  # the report says what; the other checks go on
        return f"{type(error).__name__}: {error}"[:500]


def _kernel(machine: Machine, model: Model, paths: int, steps: int) -> Callable[[], object]:
    """What launches a model's kernel alone; on a CPU, the whole call."""
    options: dict[str, Any] = {"grid": model.early(steps), "backend": "fused", "check_finite": False}
    if machine.stand_in:
        return lambda: model.solve(paths, None, machine.device, **options)
    from sdesolve_kernels._triton.arguments import recording

    with recording() as launches:
        model.solve(paths, None, machine.device, **options)
    (item,) = launches
    arguments = tuple(item.arguments.values())
    compiler = {"num_warps": item.num_warps, "enable_fp_fusion": item.fp_fusion}
    return lambda: item.kernel[item.grid](*arguments, **compiler)


def _timed(
    machine: Machine, name: str, case: str, paths: int, steps: int, count: int, wanted: float, whole: bool
) -> Record:
    """Microseconds of a kernel, and of the public call if that is wanted too; the ratio to a target."""
    model = MODELS[name]
    calls = {"kernel": _kernel(machine, model, paths, steps)}
    times = {label: [t * 1e6 for t in found] for label, found in rounds(machine, calls, count).items()}
    ratios = {f"{wanted:g} us / kernel": quartiles([wanted / t for t in times["kernel"]])} if wanted else {}
    if whole:
        x0, sde = model.start(paths, machine.device), model.sde(machine.device)
        options: dict[str, Any] = {"solver": model.solver(), "seed": 0, "backend": "fused"}
        options["grid"] = model.early(steps)
        times["solve"] = [machine.per_call(lambda: sds.solve(sde, x0, **options), 3)[1] * 1e6 for _ in range(count)]
        ratios["kernel / solve"] = quartiles([a / b for a, b in zip(times["kernel"], times["solve"], strict=True)])
    numbers = math.prod(model.start(1, torch.device("cpu")).shape) * paths * steps
    return {
        "section": "trajectories", "case": case, "dtype": "float32", "size": f"{paths} x {steps}",
        "rounds": count, "us": {label: quartiles(found) for label, found in times.items()}, "ratios": ratios,
        "component_steps_per_s": numbers / quartiles(times["kernel"])["median"] * 1e6,
        "stand_in": machine.stand_in or None,
    }  # fmt: skip


def trajectories(machine: Machine, quick: bool, tiny: bool, refused: list[Record]) -> Iterator[Record]:
    """Checks of every model and mode, then times: many paths, few, and through the public call."""
    failed: dict[str, str] = {}
    for dtype in () if tiny else (torch.float32, torch.float64):
        problem = _attempt(lambda dtype=dtype: _check_functions(machine, dtype))  # type: ignore[misc]
        label = f"functions, {str(dtype).removeprefix('torch.')}"
        yield {"section": "trajectories", "check": label, "ok": problem is None, "problem": problem}
    for label, name, paths, options in _checks(tiny):
        # On many paths the Numba kernel, which is checked against eager steps elsewhere, saves half a minute.
        reference = "fused" if paths == _MANY else "eager"
        problem = _attempt(
            lambda n=name, p=paths, r=reference, o=options: _difference(machine, MODELS[n], p, r, o)  # type: ignore[misc]
        )
        if problem is not None:
            failed.setdefault(name, f"{label}: {problem}")
        yield {"section": "trajectories", "check": label, "ok": problem is None, "problem": problem}

    count = 2 if quick else 7
    many, sweep, steps = (64, 40, 8) if quick else (1 << 23, 1680 * 32**2, None)
    few = (8,) if tiny else (8, 64, 1024)
    work: list[tuple[str, str, int, int | None, float, bool]] = [
        ("linear", "linear", many, steps, 6500.0, False),
        *(("linear", "linear, few", n, steps, 25.0, False) for n in few),
        ("linear", "linear, solve", many // 8, steps, 0.0, True),
        ("geometric", "geometric", many, steps, 0.0, False),
    ]
    if not tiny:
        work += [("stress", "stress", n, steps, wanted, False) for n, wanted in ((sweep, 250_000.0), (sweep // 4, 0.0))]
        others = [name for name in MODELS if name not in ("linear", "geometric", "stress")]
        work += [(name, name, many // 8, steps, 0.0, False) for name in others]
    for name, case, paths, n, wanted, whole in work:
        if name in failed:
            why = f"checks failed: {failed[name]}"
            refused.append({"case": case, "dtype": "float32", "size": str(paths), "why": why})
            continue
        yield _timed(machine, name, case, paths, n or MODELS[name].steps, count, wanted, whole)
        machine.release()
