"""Test problems with known answers, by every scheme that applies: ``python -m benchmarks.problems``.

Problems are those of Kloeden and Platen 1992 (section 4.4), of torchsde, of Julia's SDEProblemLibrary and of papers on
single models; values are closed forms, exponentials of moment equations, or grids for Kolmogorov's equation. The tool
writes a table for each problem to ``benchmarks/results/problems.md``; ``tests/problems`` runs a share of it.

A run of ``n`` steps and one of ``2 n`` see the same paths, so that the difference ``D`` of their means has little
noise. If the scheme has weak order ``p``, the finer run is off by ``D / (2^p - 1)``, to leading order. It has to be
within four standard errors and twice that of the value. Where the solution is known path by path, the mean of the error
along the path stands in for that of the value, with a far smaller standard error, and strong orders are shown as well.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import sdesolve as sds
from sdesolve.sde import AbstractSDE, Calculus, Noise
from sdesolve.solvers.base import AbstractOneStep
from sdesolve.solvers.guide import WHEN

__all__ = ["PROBLEMS", "Found", "StudyProblem", "equation_for", "measure", "schemes"]

RESULTS = Path(__file__).parent / "results" / "problems.md"
F64 = torch.float64
Function = Callable[[Tensor], Tensor]


class Quantity(NamedTuple):
    """An expectation at the end.

    Attributes:
        name: of it.
        of: ``(paths, *state)`` to ``(paths,)``.
        value: its mean.
        digits: by how much the value may be off.
        by: index of a parameter; the derivative of the mean by it is meant, if there is one, and ``-1`` is the start.
    """

    name: str
    of: Function
    value: float
    digits: float = 1e-9
    by: int | None = None


@dataclasses.dataclass(frozen=True)
class StudyProblem:
    """An equation, from where to where, and what is known of its solution.

    Attributes:
        name: its number in the study, and what it is.
        sde: the equation.
        x0: start of each path.
        t1: end; the start is 0.
        steps: of the coarser run.
        quantities: what is known.
        exact: the solution at the end from ``(x0, W(t1))``, if it is known.
        params: of the equation's functions.
        commutes: whether its general noise does.
        order: at most that of schemes on coefficients that are not smooth.
        only: schemes that alone are near the solution at steps like these; all where left out.
        contracts: whether solutions approach each other, where `ReversibleHeun` is unstable, as it says.
        superlinear: whether coefficients grow faster than the state, which is what `Tamed` and `Truncated` are for.
        until: where paths stop or are reflected; whether they stopped follows the state as one more component.
    """

    name: str
    sde: AbstractSDE
    x0: tuple[Any, ...]
    t1: float
    steps: int
    quantities: tuple[Quantity, ...]
    exact: Callable[[Tensor, Tensor], Tensor] | None = None
    params: tuple[float, ...] = ()
    commutes: bool = True
    order: float = 2.0
    only: tuple[type[AbstractOneStep], ...] = ()
    contracts: bool = False
    superlinear: bool = False
    until: Any = None


class Found(NamedTuple):
    """What a scheme makes of a quantity.

    Attributes:
        quantity: its name.
        error: the finer run's mean less the value.
        standard_error: of it.
        allowed: what the order allows besides.
        strong: fitted strong order, where the solution is known.
    """

    quantity: str
    error: float
    standard_error: float
    allowed: float
    strong: float | None

    @property
    def share(self) -> float:
        """Of what is allowed."""
        return abs(self.error) / (4.0 * self.standard_error + self.allowed)


def schemes() -> list[AbstractOneStep]:
    """Every public scheme of fixed steps for equations with noise: those of the guide, and those for one equation."""
    public = (sds.__dict__[name] for name in sds.__all__)
    special = [
        c() for c in public
        if isinstance(c, type) and issubclass(c, AbstractOneStep) and isinstance(c.equations, tuple)
    ]  # fmt: skip
    noisy = [s for s in WHEN if len(s.supported) > 2]
    area = [sds.Milstein("mrongowius-roessler", 4), sds.SRI2("mrongowius-roessler", 4)]
    wrapped = [sds.Tamed(sds.EulerMaruyama()), sds.Truncated(sds.EulerMaruyama())]
    return [*noisy, *area, *wrapped, *special]


def equation_for(problem: StudyProblem, solver: AbstractOneStep) -> AbstractSDE | None:
    """The problem's equation in a calculus that the scheme takes; ``None`` where the scheme does not apply."""
    sde = problem.sde
    if solver.equations and not isinstance(sde, solver.equations):
        return None
    if sde.noise is Noise.GENERAL and solver.commutative_noise and not problem.commutes:
        return None
    if problem.only and not isinstance(solver, problem.only):
        return None
    if problem.contracts and isinstance(solver, sds.ReversibleHeun):
        return None
    if not problem.superlinear and isinstance(solver, sds.Tamed | sds.Truncated):
        return None
    calculi = [sde.calculus, *(c for c in Calculus if c is not sde.calculus)]
    for calculus in calculi:
        if (calculus, sde.noise) in solver.supported:
            return sds.to_ito(sde) if calculus is Calculus.ITO else sds.to_stratonovich(sde)
    return None


def measure(problem: StudyProblem, solver: AbstractOneStep, paths: int, seed: int = 0) -> list[Found]:
    """All quantities of a problem, by one scheme that applies."""
    sde = equation_for(problem, solver)
    assert sde is not None, f"{solver} does not apply to {problem.name}"
    start = torch.tensor(problem.x0, dtype=F64)
    x0 = start.expand(paths, *start.shape).clone()
    params = torch.tensor(problem.params, dtype=F64).expand(paths, -1).clone() if problem.params else None
    differentiated = any(q.by is not None for q in problem.quantities)
    x0.requires_grad_(differentiated)
    if params is not None:
        params.requires_grad_(differentiated)

    def end(substeps: int) -> Tensor:
        noise = sds.BrownianPath(seed, substeps=substeps)
        steps = 2 * problem.steps // substeps
        options: dict[str, Any] = {"solver": solver, "noise": noise, "backend": "eager", "params": params}
        if problem.until is None:
            return sds.solve(sde, x0, 0.0, problem.t1, steps, **options).x1
        sol = sds.solve(sde, x0, 0.0, problem.t1, steps, until=problem.until, **options)
        stopped = torch.zeros(paths) if sol.stopped is None else sol.stopped
        return torch.cat([sol.x1, stopped.to(sol.x1)[:, None]], 1)

    with torch.set_grad_enabled(differentiated):
        runs = [end(2), end(1)]
    truth = None
    if problem.exact is not None:
        truth = problem.exact(x0, _brownian(problem, sde, x0, seed))
    values = [[_values(q, x, x0, params) for x in runs] for q in problem.quantities]
    strong = None
    if truth is not None and (solver.strong_order or (sde.noise is Noise.ADDITIVE and solver.strong_orders[0])):
        coarse, fine = (float((x - truth).square().mean().sqrt()) for x in runs)
        strong = math.log2(coarse / fine) if fine > 1e-13 else None
    order = min(solver.weak_order or 1.0, problem.order)
    found = []
    for q, (coarse_values, fine_values) in zip(problem.quantities, values, strict=True):
        known = q.value if truth is None else q.of(truth)  # along the same paths
        error = fine_values - known
        between = fine_values - coarse_values
        slack = float(between.mean().abs()) + 2.0 * _standard_error(between)
        allowed = 2.0 * slack / (2.0**order - 1.0) + q.digits
        found.append(Found(q.name, float(error.mean()), _standard_error(error), allowed, strong))
    return found


def _standard_error(values: Tensor) -> float:
    return float(values.std()) / math.sqrt(len(values))


def _values(q: Quantity, x: Tensor, x0: Tensor, params: Tensor | None) -> Tensor:
    """For each path: of a derivative by a parameter, which has a row for each path, the path's share."""
    if q.by is None:
        return q.of(x).detach()
    by = x0 if q.by < 0 else params
    assert by is not None
    (gradient,) = torch.autograd.grad(q.of(x).sum(), by, retain_graph=True)
    return gradient.reshape(len(x), -1)[:, max(q.by, 0)]


def _brownian(problem: StudyProblem, sde: AbstractSDE, x0: Tensor, seed: int) -> Tensor:
    """``W`` at the end, of the paths that runs see."""
    times = sds.grids.uniform(0.0, problem.t1, 2 * problem.steps)
    shape: tuple[int, ...] = tuple(x0.shape)
    if sde.noise is Noise.SCALAR:
        shape = (len(x0), *(1,) * (x0.ndim - 1))
    if sde.noise is Noise.GENERAL:
        shape = (len(x0), sde.diffusion(x0[:1], times[0]).shape[-1])
    return sds.BrownianPath(seed).increments(times, shape, dtype=F64).sum(0)


# Problems


def _component(i: int) -> Function:
    return lambda x: x[:, i]


def _moments(*values: float, i: int = 0, digits: float = 1e-9) -> tuple[Quantity, ...]:
    """Of a component: its mean, and the mean of its square."""
    mean = Quantity(f"E X{i}", _component(i), values[0], digits)
    return mean, *(Quantity(f"E X{i}^2", lambda x: x[:, i] ** 2, v, digits) for v in values[1:])


def _product(i: int, j: int, value: float, digits: float = 1e-9) -> Quantity:
    return Quantity(f"E X{i} X{j}", lambda x: x[:, i] * x[:, j], value, digits)


def _diagonal(drift: Any, diffusion: Any, calculus: Any = "ito") -> sds.SDE:
    return sds.SDE(drift, diffusion, noise="diagonal", calculus=calculus)


def _rotation(angle: Tensor) -> Tensor:
    return torch.stack([torch.cos(angle), torch.sin(angle)], 1)


def _stiff_quadratic(x0: Tensor, alpha: float, beta: float, t: float, W: Tensor) -> Tensor:
    e = torch.exp(-2.0 * alpha * t + 2.0 * beta * W)
    return ((1.0 + x0) * e + x0 - 1.0) / ((1.0 + x0) * e + 1.0 - x0)


def _quadratic(alpha: float, beta: float, steps: int, calculus: str, values: tuple[float, float], label: str) -> Any:
    """With coefficients 0 outside [-1, 1], which solutions do not leave, and beyond which Ito's drift explodes."""
    extra = beta**2 if calculus == "ito" else 0.0

    def inside(x: Tensor) -> Tensor:
        return (1.0 - x * x).clamp(min=0.0)

    def drift(x: Tensor, t: Tensor) -> Tensor:
        return -(alpha + extra * x) * inside(x)

    return StudyProblem(
        f"P8{label} quadratic, {calculus}, alpha = {alpha:g}",
        _diagonal(drift, lambda x, t: beta * inside(x), calculus), (0.5,), 3.0, steps, _moments(*values),
        lambda x0, W: _stiff_quadratic(x0, alpha, beta, 3.0, W), contracts=True, superlinear=True,
    )  # fmt: skip


_B = torch.tensor([[0.4, 0.2, -0.1], [0.1, -0.3, 0.2]], dtype=F64)
_A = torch.tensor([0.5, -0.3], dtype=F64)


def _multiplied(x: Tensor, W: Tensor) -> Tensor:
    return x * torch.exp((_A - 0.5 * _B.square().sum(1)) + W @ _B.T)


_B1 = torch.tensor([[0.3, 0.2], [-0.1, 0.4]], dtype=F64)
_B2 = 0.5 * torch.eye(2, dtype=F64) - 0.6 * _B1
_DRIFT = 0.2 * torch.eye(2, dtype=F64) + 0.3 * _B1
_X10 = torch.tensor([1.0, 0.5], dtype=F64)


def _matrix_exponential(x0: Tensor, W: Tensor) -> Tensor:
    exponent = _DRIFT - 0.5 * (_B1 @ _B1 + _B2 @ _B2)
    exponents = exponent + W[:, :1, None] * _B1 + W[:, 1:, None] * _B2
    return (torch.linalg.matrix_exp(exponents) @ x0[:, :, None])[..., 0]


def _debrabant(x: Tensor, t: Tensor) -> Tensor:
    a, b = x[:, 0], x[:, 1]
    return torch.stack([-273 / 512 * a, -a / 160 + (785 / 512 - 2**0.5 / 8) * b], 1)


def _debrabant_noise(x: Tensor, t: Tensor) -> Tensor:
    a, b = x[:, 0], x[:, 1]
    rows = (a / 4, a / 16), ((1 - 2 * 2**0.5) * a / 4, a / 10 + b / 16)
    return torch.stack([torch.stack(row, 1) for row in rows], 1)


def _area_noise(x: Tensor, t: Tensor) -> Tensor:
    """Of ``dX = (dW1, dW2, (X1 dW2 - X2 dW1) / 2)``."""
    one, nil = torch.ones_like(x[:, 0]), torch.zeros_like(x[:, 0])
    rows = (one, nil), (nil, one), (-0.5 * x[:, 1], 0.5 * x[:, 0])
    return torch.stack([torch.stack(row, 1) for row in rows], 1)


def _sphere(x: Tensor, t: Tensor) -> Tensor:
    """``0.7 x cross e_k``, a column for each ``k``."""
    a, b, c = x.unbind(1)
    o = torch.zeros_like(a)
    rows = (o, -c, b), (c, o, -a), (-b, a, o)
    return 0.7 * torch.stack([torch.stack(row, 1) for row in rows], 1)


def _cube_root(x: Tensor) -> Tensor:
    return x.sign() * x.abs() ** (1 / 3)


def _cir_and_integral(x: Tensor, t: Tensor) -> Tensor:
    return torch.stack([2.0 * (0.04 - x[:, 0]), x[:, 0]], 1)


def _cir_noise(x: Tensor, t: Tensor) -> Tensor:
    root = 0.3 * x[:, 0].clamp(min=0.0).sqrt()
    return torch.stack([root, torch.zeros_like(root)], 1)


def _feedback(x: Tensor, t: Tensor) -> Tensor:
    a, b = x[:, 0], x[:, 1]
    return torch.stack([-0.5 * a, 0.5 * a * a - 0.8 * b], 1)


def _feedback_noise(x: Tensor, t: Tensor) -> Tensor:
    a, o = x[:, 0], torch.zeros_like(x[:, 0])
    return torch.stack([torch.stack([o + 0.6, o], 1), torch.stack([o, 0.5 * a], 1)], 1)


def _call(strike: float, rate: float, t: float) -> Function:
    """The discounted payoff, of log-prices relative to 1."""
    return lambda x: math.exp(-rate * t) * (x[:, 0].exp() - strike).clamp(min=0.0)


def _delta(strike: float, rate: float, t: float) -> Function:
    return lambda x: math.exp(-rate * t) * x[:, 0].exp() * (x[:, 0].exp() > strike)


def _black_scholes(x: Tensor) -> Tensor:
    return math.exp(-0.03) * (x[:, 0] - 110.0).clamp(min=0.0)


def _problems() -> Iterator[StudyProblem]:
    for calculus, values in (("ito", (1.372800508, 4.017282339)), ("stratonovich", (2.004315928, 8.563471345))):
        number = 1 if calculus == "ito" else 2
        gbm = sds.GeometricBrownianMotion(1.01, 0.87, calculus)  # type: ignore[arg-type]
        exact = functools.partial(lambda x0, W, gbm: gbm.exact(x0, W, 1.0), gbm=gbm)
        yield StudyProblem(
            f"P{number} geometric Brownian motion, {calculus}", gbm, (0.5,), 1.0, 32, _moments(*values), exact
        )
    a = 0.5
    yield StudyProblem(
        "P3 hyperbolic tangent",
        _diagonal(lambda x, t: -a * a * x * (1 - x * x), lambda x, t: a * (1 - x * x)), (a,), 1.0, 16,
        _moments(0.4280416657, 0.3096308), lambda x0, W: torch.tanh(a * W + torch.atanh(x0)),
    )  # fmt: skip
    for size, values in ((0.1, (0.9986679407,)), (0.8, (0.9075610999, 0.9281305162))):
        yield StudyProblem(
            f"P4 arc tangent, a = {size:g}",
            _diagonal(
                lambda x, t, a=size: -a * a * torch.sin(x) * torch.cos(x) ** 3,
                lambda x, t, a=size: a * torch.cos(x) ** 2,
            ), (1.0,), 1.0, 16, _moments(*values), lambda x0, W, a=size: torch.atan(a * W + torch.tan(x0)),
        )  # fmt: skip
    yield StudyProblem(
        "P5 additive, decaying",
        sds.SDE(
            lambda x, t: 0.05 / (1 + t).sqrt() - x / (2 * (1 + t)), lambda x, t: 0.005 / (1 + t).sqrt(),
            noise="additive",
        ), (1.0,), 1.0, 8,
        (*_moments(0.7424621202), Quantity("Var X0", lambda x: (x[:, 0] - 0.7424621202) ** 2, 1.25e-5)),
        lambda x0, W: x0 / 2**0.5 + 0.05 * (1 + 0.1 * W) / 2**0.5,
    )  # fmt: skip
    drift = torch.tensor([[-1.0, 2.0], [0.0, -3.0]], dtype=F64)
    matrix = torch.tensor([[0.5, 0.2], [0.0, 0.4]], dtype=F64)
    mean, cov = (0.049787068, -0.049787068), {(0, 0): 0.172521182, (0, 1): 0.032300495, (1, 1): 0.026600567}
    yield StudyProblem(
        "P6 Ornstein-Uhlenbeck, two components",
        sds.SDE(lambda x, t: x @ drift.T, lambda x, t: matrix.expand(len(x), 2, 2), noise="additive"), (1.0, -1.0),
        1.0, 32,
        (
            *_moments(mean[0]), *_moments(mean[1], i=1),
            *(_product(i, j, v + mean[i] * mean[j]) for (i, j), v in cov.items()),
        ),
    )  # fmt: skip
    yield StudyProblem(
        "P7 cube",
        _diagonal(lambda x, t: _cube_root(x) / 3 + 6 * _cube_root(x) ** 2, lambda x, t: _cube_root(x) ** 2), (1.0,),
        1.0, 64, _moments(28.0, 869.0205761), lambda x0, W: (3.0 + W / 3.0) ** 3,
    )  # fmt: skip
    yield _quadratic(1.0, 1.0, 96, "stratonovich", (-0.7913860912, 0.8154104855), "a")
    yield _quadratic(1.0, 1.0, 96, "ito", (-0.7913860912, 0.8154104855), "b")
    yield _quadratic(20.0, 1.0, 160, "ito", (-1.0, 1.0), "c")
    expected = torch.tensor([1.0, 0.8], dtype=F64) * _A.exp()
    cross = float(expected[0] * expected[1] * torch.exp((_B[0] * _B[1]).sum()))
    yield StudyProblem(
        "P9 geometric Brownian motions, three channels",
        sds.SDE(lambda x, t: _A * x, lambda x, t: x[:, :, None] * _B, noise="general"), (1.0, 0.8), 1.0, 16,
        (*_moments(float(expected[0])), *_moments(float(expected[1]), i=1), _product(0, 1, cross)), _multiplied,
    )  # fmt: skip
    expected = torch.linalg.matrix_exp(_DRIFT) @ _X10
    yield StudyProblem(
        "P10 matrices that commute",
        sds.SDE(
            lambda x, t: x @ _DRIFT.T, lambda x, t: torch.stack([x @ _B1.T, x @ _B2.T], 2), noise="general"
        ), (1.0, 0.5), 1.0, 16, (*_moments(float(expected[0])), *_moments(float(expected[1]), i=1)),
        _matrix_exponential,
    )  # fmt: skip
    yield StudyProblem(
        "P11 Debrabant and Roessler", sds.SDE(_debrabant, _debrabant_noise, noise="general"), (1.0, 1.0), 1.0, 16,
        (
            *_moments(0.5867226107, math.exp(-1)), *_moments(3.871394637, 16.00088111, i=1),
            _product(0, 1, 2.166731045, 1e-8),
        ), commutes=False,
    )  # fmt: skip
    yield StudyProblem(
        "P12 Levy area",
        sds.SDE(lambda x, t: torch.zeros_like(x), _area_noise, noise="general"), (0.0, 0.0, 0.0), 1.0, 16,
        (
            Quantity("E A^2", lambda x: x[:, 2] ** 2, 0.25), Quantity("E A^4", lambda x: x[:, 2] ** 4, 5 / 16),
            Quantity("E cos 2A", lambda x: torch.cos(2 * x[:, 2]), 1 / math.cosh(1.0)),
        ), commutes=False,
    )  # fmt: skip
    gbm = sds.GeometricBrownianMotion(1.01, 0.87)
    yield StudyProblem(
        "P13 states that are matrices", gbm, ((0.5, 0.25),) * 4, 1.0, 32,
        (
            Quantity("E X00", lambda x: x[:, 0, 0], 1.372800508),
            Quantity("E X31", lambda x: x[:, 3, 1], 0.5 * 1.372800508),
            Quantity("E X01^2", lambda x: x[:, 0, 1] ** 2, 0.25 * 4.017282339),
        ), lambda x0, W: gbm.exact(x0, W, 1.0),
    )  # fmt: skip
    turned = torch.tensor([[0.0, 1.0], [-1.0, 0.0]], dtype=F64)
    yield StudyProblem(
        "P14 Kubo oscillator",
        sds.SDE(lambda x, t: 2.0 * x @ turned, lambda x, t: 0.5 * x @ turned, noise="scalar", calculus="stratonovich"),
        (1.0, 0.0), 1.0, 32,
        (
            *_moments(-0.3672482943), *_moments(0.8024521627, i=1),
            Quantity("E |X|^2", lambda x: x.square().sum(1), 1.0),
        ), lambda x0, W: _rotation(2.0 + 0.5 * W[:, 0]),
    )  # fmt: skip
    yield StudyProblem(
        "P15 Brownian motion on a sphere",
        sds.SDE(lambda x, t: torch.zeros_like(x), _sphere, noise="general", calculus="stratonovich"), (0.0, 0.0, 1.0),
        1.0, 16, _moments(0.6126263942, 0.4866169901, i=2), commutes=False,
    )  # fmt: skip
    square_root = (
        *_moments(0.04676676416, 0.003333940355),
        Quantity("E sqrt X0", lambda x: x[:, 0].clamp(min=0).sqrt(), 0.202455568),
    )  # fmt: skip
    yield StudyProblem(
        "P16 square root, and its integral", _diagonal(_cir_and_integral, _cir_noise), (0.09, 0.0), 1.0, 64,
        (*square_root, Quantity("E exp(-int X)", lambda x: torch.exp(-x[:, 1]), 0.9405187689)), order=1.0,
        contracts=True,
    )  # fmt: skip
    below = Quantity("P(X < 0.02)", lambda x: (x[:, 0] < 0.02).double(), 0.2239048669)
    yield StudyProblem(
        "P16 square root", sds.CIR(2.0, 0.04, 0.3), (0.09,), 1.0, 32, (*square_root, below), order=1.0, contracts=True
    )
    yield StudyProblem(
        "P17 Heston", sds.Heston(2.0, 0.04, 0.3, -0.7, 0.02), (0.0, 0.04), 1.0, 32,
        (
            Quantity("call", _call(1.0, 0.02, 1.0), 0.08686015399),
            Quantity("delta", _delta(1.0, 0.02, 1.0), 0.6365100317),
        ), commutes=False, order=1.0, contracts=True,
    )  # fmt: skip
    yield StudyProblem(
        "P17b Heston, Andersen's case", sds.Heston(0.5, 0.04, 1.0, -0.9), (0.0, 0.04), 10.0, 80,
        (
            Quantity("call", _call(1.0, 0.0, 10.0), 0.1308467014),
            Quantity("delta", _delta(1.0, 0.0, 10.0), 0.7859359926),
        ), commutes=False, order=1.0, only=(sds.QE,),
    )  # fmt: skip
    pairs = {(0, 0): 0.161661792, (0, 1): 0.135335283, (1, 1): 0.432332358}
    yield StudyProblem(
        "P18 Langevin, harmonic", sds.UnderdampedLangevin(lambda x, t: 2.0 * x, 2.0, 2.0, 1.0), ((0.0,), (0.0,)), 1.0,
        16,
        tuple(
            Quantity(f"E X{i} X{j}", lambda x, i=i, j=j: x[:, i, 0] * x[:, j, 0], v) for (i, j), v in pairs.items()
        ),
    )  # fmt: skip
    yield StudyProblem(
        "P18b Langevin, double well, in equilibrium",
        sds.UnderdampedLangevin(lambda x, t: 4.0 * x * (x * x - 1.0), 1.0, 2.0, 1.0), ((1.0,), (0.0,)), 12.0, 192,
        (
            Quantity("E x^2", lambda x: x[:, 0, 0] ** 2, 0.8327454871, 1e-4),
            Quantity("E x^4", lambda x: x[:, 0, 0] ** 4, 1.082745487, 1e-4),
        ), contracts=True, superlinear=True,
    )  # fmt: skip
    yield StudyProblem(
        "P19 cubic drift", _diagonal(lambda x, t: x - x**3, lambda x, t: 0.5 * x), (1.0,), 1.0, 32,
        _moments(0.93373463, 0.9282337, digits=6e-8), contracts=True, superlinear=True,
    )  # fmt: skip
    yield StudyProblem(
        "P19b double well",
        sds.DoubleWell(0.7),
        (0.5,),
        1.0,
        32,
        _moments(0.586954, 0.717432, digits=6e-7),
        contracts=True,
        superlinear=True,
    )
    yield StudyProblem(
        "P20 first passage",
        sds.SDE(lambda x, t: torch.full_like(x, 0.5), lambda x, t: torch.ones_like(x), noise="additive"), (0.0,), 1.0,
        8, (Quantity("P(stopped)", _component(1), 0.4901383399),), order=1.0,
        until=sds.Crossing(lambda x, t: x[:, 0] - 1.0),
    )  # fmt: skip
    yield StudyProblem(
        "P20b down-and-out call", sds.GeometricBrownianMotion(0.05, 0.2), (100.0,), 1.0, 32,
        (
            Quantity(
                "price", lambda x: math.exp(-0.05) * (x[:, 0] - 100.0).clamp(min=0.0) * (1.0 - x[:, 1]), 8.665471658
            ),
        ), order=1.0, until=sds.Crossing(lambda x, t: x[:, 0] - 90.0),
    )  # fmt: skip
    yield StudyProblem(
        "P20c reflected Brownian motion",
        sds.SDE(lambda x, t: torch.zeros_like(x), lambda x, t: torch.ones_like(x), noise="additive"), (0.0,), 1.0, 8,
        (Quantity("E X0", _component(0), math.sqrt(2.0 / math.pi)),), order=1.0,
        until=sds.Reflection(lambda x, t: x[:, 0]),
    )  # fmt: skip
    yield StudyProblem(
        "P22 relative entropy of paths",
        sds.SDE(
            lambda x, t: torch.stack([-x[:, 0], 0.5 * (0.7 * x[:, 0] / 0.6) ** 2], 1),
            lambda x, t: torch.tensor([0.6, 0.0], dtype=F64), noise="additive",
        ), (1.0, 0.0), 2.0, 32, (Quantity("E int |u|^2 / 2", _component(1), 0.5189172058),),
    )  # fmt: skip
    yield StudyProblem(
        "P23 Black and Scholes",
        _diagonal(lambda x, t, p: p[:, :1] * x, lambda x, t, p: p[:, 1:] * x), (100.0,), 1.0, 16,
        (
            Quantity("price", _black_scholes, 5.293398058), Quantity("delta", _black_scholes, 0.4103864882, by=-1),
            Quantity("vega", _black_scholes, 38.88346118, by=1),
        ), params=(0.03, 0.2), order=1.0,
    )  # fmt: skip
    square: Function = lambda x: x[:, 0] ** 2  # noqa: E731
    yield StudyProblem(
        "P23c derivatives of an Ornstein-Uhlenbeck process",
        sds.SDE(lambda x, t, p: -p[:, :1] * x, lambda x, t, p: p[:, 1:].expand_as(x), noise="additive"), (2.0,), 1.5,
        32,
        (
            Quantity("d E X^2 / d theta", square, -1.223685549, by=0), Quantity("by sigma", square, 0.5683012792, by=1),
            Quantity("by x0", square, 0.3628718132, by=-1),
        ), params=(0.8, 0.5),
    )  # fmt: skip
    yield StudyProblem("P24 Jacobi", sds.Jacobi(1.0, 0.4, 0.8), (0.7,), 1.0, 64, _moments(0.5103638324), order=1.0)
    yield StudyProblem(
        "P25 polynomial, noise that does not commute", sds.SDE(_feedback, _feedback_noise, noise="general"), (1.0, 0.0),
        1.0, 16, (*_moments(0.2542202198, 0.1815061934, i=1), _product(0, 1, 0.2155689084)), commutes=False,
    )  # fmt: skip


PROBLEMS = {problem.name: problem for problem in _problems()}


def label(solver: AbstractOneStep) -> str:
    """A scheme as one writes it, without settings that are the usual ones."""
    inner = label(solver.solver) if isinstance(solver, sds.Tamed | sds.Truncated) else ""
    area = getattr(solver, "area", None)
    if area and not isinstance(solver, sds.LogODE):
        inner = f'"{area}"' if area == "foster" else f'"{area}", {solver.settings()["terms"]}'
    return f"{type(solver).__name__}({inner})"


def tables(found: dict[tuple[str, str], list[Found]], paths: int) -> str:
    """Results as Markdown: a row for each scheme, a column for each problem."""
    columns = list(dict.fromkeys(problem for problem, _ in found))
    rows = list(dict.fromkeys(scheme for _, scheme in found))

    def table(columns: list[str], cell: Callable[[list[Found]], str]) -> list[str]:
        lines = ["| | " + " | ".join(name.split()[0] for name in columns) + " |", "|---" * (len(columns) + 1) + "|"]
        for row in rows:
            cells = [cell(found[c, row]) if (c, row) in found else "" for c in columns]
            lines += [f"| `{row}` | " + " | ".join(cells) + " |"] if any(cells) else []
        return lines

    def strong(of: list[Found]) -> str:
        return "" if of[0].strong is None else f"{of[0].strong:.2f}"

    known = [c for c in columns if any(f[0].strong is not None for (p, _), f in found.items() if p == c)]
    names = "\n".join(f"- {name}" for name in columns)
    return "\n".join([
        "# Problems with known answers, by every scheme that applies", "",
        f"Made by `python -m benchmarks.problems --paths {paths}`, which says what is allowed. Entries are the largest "
        "error of a problem's expectations over what four standard errors and the scheme's order allow: all are below "
        "1. An empty one is a scheme that does not apply.", "", names, "",
        *table(columns, lambda f: f"{_worst(f):.2f}"),
        "", "## Strong orders", "",
        "From two root mean square errors, at the steps of each problem, where the solution is known path by path. "
        "Where noise is additive or small, drift decides what is seen at such steps.", "", *table(known, strong), "",
    ])  # fmt: skip


def _worst(found: list[Found]) -> float:
    return max(f.share for f in found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--paths", type=int, default=20_000)
    parser.add_argument("--only", default="", help="problems and schemes whose names hold this; writes nothing")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    found: dict[tuple[str, str], list[Found]] = {}
    for problem in PROBLEMS.values():
        for solver in schemes():
            if arguments.only not in f"{problem.name} {label(solver)}" or equation_for(problem, solver) is None:
                continue
            start, made = time.process_time(), measure(problem, solver, arguments.paths)
            found[problem.name, label(solver)] = made
            cells = "; ".join(f"{f.quantity} {f.error:+.1e} ({f.standard_error:.0e}, {f.allowed:.0e})" for f in made)
            strong = "" if made[0].strong is None else f" strong {made[0].strong:.2f}"
            took, flag = time.process_time() - start, "" if _worst(made) <= 1 else "  <--"
            print(
                f"{problem.name}, {label(solver)}: {_worst(made):.2f}{flag}{strong}; {cells}; {took:.1f} s", flush=True
            )
    if not arguments.only:
        RESULTS.write_text(tables(found, arguments.paths))


if __name__ == "__main__":
    main()
