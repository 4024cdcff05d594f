"""The page "which solver", from what solvers say of themselves: ``python -m sdesolve.solvers.guide``."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from sdesolve._internal.levy_area import LevyArea
from sdesolve.brownian import Increment, named
from sdesolve.conversions import to_stratonovich
from sdesolve.sde import ODE, SDE, AbstractSDE, Calculus, Noise
from sdesolve.solvers.areas import AbstractWithArea
from sdesolve.solvers.base import AbstractOneStep, Span
from sdesolve.solvers.derivative_free import SRI2
from sdesolve.solvers.euler_heun import EulerHeun
from sdesolve.solvers.euler_maruyama import EulerMaruyama
from sdesolve.solvers.general_shark import GeneralShARK
from sdesolve.solvers.heun import Heun
from sdesolve.solvers.implicit import ImplicitEuler, SplitStepEuler
from sdesolve.solvers.log_ode import LogODE
from sdesolve.solvers.midpoint import Midpoint
from sdesolve.solvers.milstein import Milstein
from sdesolve.solvers.non import NON
from sdesolve.solvers.reversible_heun import ReversibleHeun
from sdesolve.solvers.ri import DRI1, RI6
from sdesolve.solvers.rk4 import RK4
from sdesolve.solvers.sea import SEA
from sdesolve.solvers.shark import ShARK
from sdesolve.solvers.skencarp import SKenCarp
from sdesolve.solvers.sksrock import SKSROCK
from sdesolve.solvers.slow_rk import SlowRK
from sdesolve.solvers.spark import SPaRK
from sdesolve.solvers.sra import SOSRA, SRA1, SRA3
from sdesolve.solvers.sri import SOSRI, SRIW1, SRIW2
from sdesolve.solvers.w2ito1 import W2Ito1

_FURTHEST = 20.0  # step at which stability is looked at

WHEN: dict[AbstractOneStep, str] = {
    EulerMaruyama(): "any Ito SDE; a first look, and functions that are not smooth",
    Milstein(): "diagonal, scalar or commuting noise, where derivatives are cheap",
    Milstein("foster"): "general noise, Ito, paths or their law to order 1",
    SRI2(): "as `Milstein`, for diffusions without derivatives, or where drift matters more",
    SRI2("foster"): "general noise, Ito, without derivatives; the smaller error",
    SEA(): "additive noise and an expensive drift",
    ShARK(): "additive noise: the first choice",
    SRA1(): "additive noise; as `ShARK`, with errors like it",
    SRA3(): "additive noise and a drift that wants order 3",
    SOSRA(): "additive noise and a stiffer drift",
    SRIW1(): "diagonal or scalar noise, Ito: the first choice for paths",
    SRIW2(): "as `SRIW1`, with a drift that wants order 3",
    SOSRI(): "as `SRIW1`, with a stiffer drift or strong noise",
    W2Ito1(): "expectations, Ito, any noise: the first choice",
    RI6(): "expectations, Ito, with the fewest drift evaluations",
    DRI1(): "expectations, Ito, with small error constants",
    Heun(): "Stratonovich, any noise; plain and robust",
    Midpoint(): "Stratonovich; as `Heun`, and exact for more invariants",
    EulerHeun(): "Stratonovich with an expensive drift",
    SPaRK(): "Stratonovich, any noise: the first choice",
    GeneralShARK(): "as `SPaRK`, with one drift evaluation less",
    ReversibleHeun(): "Stratonovich, steps that can be undone; unstable where solutions contract",
    SlowRK(): "Stratonovich noise that commutes, for paths",
    LogODE(): "Stratonovich, general noise, paths or their law to order 1",
    NON(): "expectations, Stratonovich, any noise",
    ImplicitEuler(): "stiff drifts, any Ito noise; derivatives of the drift beside",
    SplitStepEuler(): "stiff drifts that grow faster than the state, any Ito noise; derivatives beside",
    SKSROCK(5): "stiff drifts without derivatives, any Ito noise; `stages` evaluations for `h rho = 1.9 stages^2`",
    SKenCarp(): "stiff drifts and small additive noise; derivatives beside",
    RK4(): "ODEs and probability flows",
}


def guide() -> str:
    """The page, as Markdown."""
    rows = [_row(solver, when) for solver, when in WHEN.items()]
    return "\n".join([*_HEAD.splitlines(), *rows, *_TAIL.splitlines()]) + "\n"


_HEAD = """\
# Which solver

| you want | and the noise is | take |
|---|---|---|
| paths, or anything of them | additive | `ShARK()` |
| | diagonal or scalar, Ito | `SRIW1()` |
| | diagonal, scalar or commuting, Stratonovich | `SlowRK()` |
| | general, Stratonovich; Ito | `LogODE()`; `SRI2("foster")` |
| expectations | any, Ito; Stratonovich | `W2Ito1()`; `NON()`, with `increments="three-point"` |
| a first look | any, Ito; Stratonovich | `EulerMaruyama()`; `SPaRK()` |
| steps longer than a stiff drift allows | additive; any, Ito | `SKenCarp()`; `ImplicitEuler()`, `SKSROCK(stages)` |
| an ODE | none | `RK4()`, `DormandPrince()`, `Tsit5()` |
| a stiff ODE | none | `Rodas4()` |
| steps that each path chooses by its own error | any that the scheme converges for | `Adaptive(solver, rtol, atol)` |

`sds.to_stratonovich(sde)` and `sds.to_ito(sde)` are SDEs of the other calculus with the same solutions, so that every
solver serves both. A solver that does not converge to what was asked for is refused: calculus and noise type are
compared before the first step, and own components, noise that commutes and additive noise are tested in several states
and at several times. `Adaptive(solver)` refuses schemes that would not converge in such steps, `EulerMaruyama` with
multiplicative noise among them. `Tamed(solver)` and `Truncated(solver)` are for coefficients that grow faster than
linearly; `QUICSORT`, `UBU`, `ALIGN` for `UnderdampedLangevin`, `QE` and `ImplicitSquareRoot` for `CIR` and `Heston`.

| solver | Ito | Stratonovich | strong | weak | ODE | f | g | random numbers | stable | when |
|---|---|---|---|---|---|---|---|---|---|---|"""

_TAIL = """\

- Noise: a additive, s scalar, d diagonal (each `g_i` of `x_i` alone where the solver needs it), g general.
- Strong: the order for additive noise, noise that commutes, and general noise. Scalar noise commutes, as does diagonal
  noise by own components.
- f, g: evaluations a step. `1 + c m`: once as a whole, and each of `m` columns `c` times by itself, for general noise.
- Random numbers: for each channel and step. W are normals, or three-point numbers where the solver is for expectations;
  areas A take two more by `foster`, and one a pair of channels; S are two-point numbers, a bit each.
- Stable: `h` up to which a step contracts `dX = -X dt`, and in mean square `dX = -X dt + X dW` (Ito, or the
  Stratonovich SDE with the same solutions); no further than 20 is looked.

This page is made by `python -m sdesolve.solvers.guide` from what solvers say of themselves; a test holds it to them."""


def _row(solver: AbstractOneStep, when: str) -> str:
    area = solver.area if isinstance(solver, AbstractWithArea) else None
    given = f'"{area}"' if area and not isinstance(solver, LogODE) else ""
    given = str(solver.stages) if isinstance(solver, SKSROCK) else given
    cells = [f"`{type(solver).__name__}({given})`", *(_noises(solver, calculus) for calculus in Calculus)]
    noisy, g = len(solver.supported) > 2, str(solver.diffusion_evaluations)
    if solver.column_evaluations and (area or not isinstance(solver, AbstractWithArea)):
        g += f", 1 + {solver.column_evaluations} m"
    cells += [", ".join(map(_order, solver.strong_orders)), _order(solver.weak_order)] if noisy else ["", ""]
    cells += [str(solver.ode_order), str(solver.evaluations), g if noisy else "", _numbers(solver) if noisy else ""]
    cells += [", ".join(_limit(h) for h in stability(solver) if h is not None), when]
    return f"| {' | '.join(cells)} |"


def _limit(h: float) -> str:
    return "> 20" if h > _FURTHEST - 0.01 else f"{h:.2f}"


def _noises(solver: AbstractOneStep, calculus: Calculus) -> str:
    letters = {Noise.ADDITIVE: "a", Noise.SCALAR: "s", Noise.DIAGONAL: "d", Noise.GENERAL: "g"}
    return " ".join(letter for noise, letter in letters.items() if (calculus, noise) in solver.supported)


def _order(p: float | None) -> str:
    return "-" if p is None else {0.5: "1/2", 1.5: "3/2"}.get(p, f"{p:g}")


def _numbers(solver: AbstractOneStep) -> str:
    return ", ".join("H, K, A" if isinstance(part, LevyArea) else part for part in solver.needs)


def stability(solver: AbstractOneStep) -> tuple[float, float | None]:
    """Steps up to which ``dX = -X dt`` contracts, and in mean square ``dX = -X dt + X dW``, if it takes that."""
    ode = ODE(lambda x, t: -x)
    drift_limit = _largest(lambda h: float(_step(solver, ode, h, None).abs().max()))
    scalar = SDE(lambda x, t: -x, lambda x, t: x, "scalar")
    sde = scalar if (Calculus.ITO, Noise.SCALAR) in solver.supported else to_stratonovich(scalar)
    if (sde.calculus, Noise.SCALAR) not in solver.supported:
        return drift_limit, None
    units, chance = _outcomes(solver)

    def second_moment(h: float) -> float:
        parts = {name: (z if name == "S" else z * math.sqrt(h)) for name, z in units.items()}
        return float(chance @ _step(solver, sde, h, Increment(**parts)).square()[:, 0])

    return drift_limit, _largest(second_moment)


def _step(solver: AbstractOneStep, sde: AbstractSDE, h: float, noise: Increment | None) -> Tensor:
    x = torch.ones(1 if noise is None else len(noise.W), 1, dtype=torch.float64, device="cpu")
    t0, t1 = torch.tensor([0.0, h], dtype=torch.float64, device="cpu")
    numbers = solver.numbers(sde, torch.stack([t0, t1]))
    return solver.step(sde, x, Span(t0, t1, t1 - t0, () if numbers is None else tuple(numbers[0])), noise)


def _outcomes(solver: AbstractOneStep) -> tuple[dict[str, Tensor], Tensor]:
    """Unit numbers of a step with their chances: three-point and two-point, or nodes of a Gauss-Hermite rule."""
    names = [named(part) for part in solver.needs if not isinstance(part, LevyArea)]
    three = [(0.0, 2 / 3), (math.sqrt(3.0), 1 / 6), (-math.sqrt(3.0), 1 / 6)]
    sides: list[Sequence[tuple[float, float]]] = []
    if "S" in names:
        sides = [three, [(1.0, 0.5), (-1.0, 0.5)], [(1.0, 0.5), (-1.0, 0.5)]]
    else:
        sides = [_hermite(1.0), *([_hermite(1.0 / 12.0)] if "H" in names else [])]
    every = list(itertools.product(*sides))
    z = torch.tensor([[value for value, _ in row] for row in every], dtype=torch.float64, device="cpu")
    chance = torch.tensor([math.prod(p for _, p in row) for row in every], dtype=torch.float64, device="cpu")
    parts = {"W": z[:, :1], ("S" if "S" in names else "H"): z[:, 1:]} if z.shape[1] > 1 else {"W": z}
    return parts, chance


def _hermite(variance: float, count: int = 9) -> list[tuple[float, float]]:
    """Gauss-Hermite nodes and weights for a normal, from the eigenvectors of the Jacobi matrix (Golub and Welsch)."""
    off = torch.arange(1.0, count, dtype=torch.float64, device="cpu").sqrt()
    nodes, vectors = torch.linalg.eigh(torch.diag(off, 1) + torch.diag(off, -1))
    return [(math.sqrt(variance) * float(x), float(v) ** 2) for x, v in zip(nodes, vectors[0], strict=True)]


def _largest(size) -> float:  # type: ignore[no-untyped-def]  # float -> float
    """The end of the interval from 0 in which ``size(h) < 1``, to 0.001, looked for up to 20."""
    h = next((0.05 * i for i in range(1, 400) if not size(0.05 * i) < 1.0), _FURTHEST)
    low, high = h - 0.05, h
    while high - low > 1e-3:
        middle = 0.5 * (low + high)
        low, high = (middle, high) if size(middle) < 1.0 else (low, middle)
    return low


if __name__ == "__main__":
    print(guide(), end="")
