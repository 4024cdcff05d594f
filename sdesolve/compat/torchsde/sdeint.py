"""`sdeint` and `sdeint_adjoint`: torchsde's arguments, `solve`'s steps."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sdesolve._internal.arguments import kind_of, short
from sdesolve.adapters.torchsde import METHODS_OF_SDE, FromTorchSDE, TorchSDENoise
from sdesolve.brownian import AbstractNoise, BrownianPath, drawn_seed
from sdesolve.compat.grids import steps_of
from sdesolve.compat.torchsde.base_sde import WithDivergence, control
from sdesolve.compat.torchsde.brownian import BaseBrownian
from sdesolve.compat.torchsde.settings import METHODS, NOISE_TYPES, SDE_TYPES
from sdesolve.conversions import to_stratonovich
from sdesolve.integrate.problem import Gradients
from sdesolve.integrate.solution import Continuation
from sdesolve.integrate.solve import solve
from sdesolve.integrate.structure import is_diagonal
from sdesolve.sde import AbstractSDE, Noise
from sdesolve.solvers.adaptive import Adaptive
from sdesolve.solvers.base import AbstractOneStep
from sdesolve.solvers.derivative_free import SRI2
from sdesolve.solvers.euler_heun import EulerHeun
from sdesolve.solvers.euler_maruyama import EulerMaruyama
from sdesolve.solvers.heun import Heun
from sdesolve.solvers.log_ode import LogODE
from sdesolve.solvers.midpoint import Midpoint
from sdesolve.solvers.milstein import Milstein
from sdesolve.solvers.reversible_heun import ReversibleHeun
from sdesolve.solvers.sra import SRA1
from sdesolve.solvers.sri import SRIW1

Number = float | Tensor
_BUDGET = 1 << 30  # bytes that `sdeint_adjoint` lets torch keep, as `sdeint` does; beyond, steps are taken again
_APART = 10.0  # states of ReversibleHeun, over the way that the solution has gone: beyond, it has blown up
_ANY = frozenset(NOISE_TYPES.all())
_COMMUTING = _ANY - {NOISE_TYPES.general}
# Of each method: calculi, noise types, and which areas it takes, "none" being the least.
_METHODS: dict[str, tuple[tuple[str, ...], frozenset[str], tuple[str, ...]]] = {
    "euler": (("ito",), _ANY, ()),
    "milstein": (("ito", "stratonovich"), _COMMUTING, ()),
    "srk": (("ito",), _COMMUTING, ("space-time", "davie", "foster")),
    "euler_heun": (("stratonovich",), _ANY, ()),
    "heun": (("stratonovich",), _ANY, ()),
    "midpoint": (("stratonovich",), _ANY, ()),
    "log_ode": (("stratonovich",), _ANY, ("davie", "foster")),
    "reversible_heun": (("stratonovich",), _ANY, ()),
}


def sdeint(
    sde: Any,
    y0: Tensor,
    ts: Sequence[float] | Tensor,
    bm: BaseBrownian | Callable[..., Tensor] | None = None,
    method: str | None = None,
    dt: Number = 1e-3,
    adaptive: bool = False,
    rtol: Number = 1e-5,
    atol: Number = 1e-4,
    dt_min: Number = 1e-5,
    options: Mapping[str, Any] | None = None,
    names: Mapping[str, str] | None = None,
    logqp: bool = False,
    extra: bool = False,
    extra_solver_state: Sequence[Tensor] | None = None,
    **unused_kwargs: Any,
) -> Any:
    """Integrates ``dY = f(t, Y) dt + g(t, Y) dW`` from ``y0`` at ``ts[0]`` to each of ``ts``: torchsde's, on `solve`.

    Steps end at each of ``ts``, so that states there are those of the scheme; torchsde goes past them and takes points
    of the chord. Between two of them they are equal, of length ``dt`` where that divides the interval.
    ``docs/coming_from_torchsde.md`` lists what else differs.

    Args:
        sde: with ``noise_type``, ``sde_type`` and ``f`` and ``g``, or ``f_and_g``, ``g_prod``, ``f_and_g_prod``.
        y0: ``(batch, size)``.
        ts: increasing times.
        bm: a `BrownianInterval` or the like, or any function of ``(ta, tb)`` that gives increments; a new motion, of a
            seed from torch's default generator, if left out.
        method: ``euler``, ``milstein``, ``srk``, ``euler_heun``, ``heun``, ``midpoint``, ``log_ode`` or
            ``reversible_heun``; by default ``srk`` (``euler`` for general noise), ``midpoint`` for Stratonovich SDEs.
        dt: length of steps, which may be a tenth longer.
        adaptive: let each path choose its steps by its own error (`Adaptive`).
        rtol, atol: tolerances of these.
        dt_min: the shortest that they may be, up to the next power of 2 times the time in all.
        options: ``{"grad_free": True}`` takes ``milstein`` without derivatives (`SRI2`).
        names: the SDE's own names of its methods: ``{"drift": "foo", "diffusion": "bar"}``.
        logqp: also return the divergence from a prior of drift ``h``.
        extra: also return what the method carries beside the state: ``(f, g, z)`` of ``reversible_heun``, else ``()``.
        extra_solver_state: what such a run goes on with.
        **unused_kwargs: warned of.

    Returns:
        ``ys: (len(ts), batch, size)``; with ``logqp`` also the divergence over each interval of ``ts``,
        ``(len(ts) - 1, batch)``; with ``extra`` also that.

    Raises:
        ValueError: what torchsde refuses, for the same reasons; and ``reversible_heun`` with adaptive steps.
        TypeError: an argument of another kind.
        DivergenceError: a state is no longer finite.
    """
    return _integrated(
        sde, y0, ts, bm, method, dt, adaptive, rtol, atol, dt_min, options, names, logqp, extra, extra_solver_state,
        unused_kwargs, "auto",
    )  # fmt: skip


def sdeint_adjoint(
    sde: Any,
    y0: Tensor,
    ts: Sequence[float] | Tensor,
    bm: BaseBrownian | Callable[..., Tensor] | None = None,
    method: str | None = None,
    adjoint_method: str | None = None,
    dt: Number = 1e-3,
    adaptive: bool = False,
    adjoint_adaptive: bool = False,
    rtol: Number = 1e-5,
    adjoint_rtol: Number = 1e-5,
    atol: Number = 1e-4,
    adjoint_atol: Number = 1e-4,
    dt_min: Number = 1e-5,
    options: Mapping[str, Any] | None = None,
    adjoint_options: Mapping[str, Any] | None = None,
    adjoint_params: Sequence[Tensor] | None = None,
    names: Mapping[str, str] | None = None,
    logqp: bool = False,
    extra: bool = False,
    extra_solver_state: Sequence[Tensor] | None = None,
    **unused_kwargs: Any,
) -> Any:
    """`sdeint` with gradients in memory that does not grow with the number of steps beyond a budget.

    They are the exact gradients of the steps that were taken, those of `sdeint` itself, where torchsde's are those of
    another equation, solved backwards. Where torch would keep more than 1 GiB of all steps, they are taken again from
    states that were kept (``gradients="checkpoint"`` of `solve`). So ``adjoint_method``,
    ``adjoint_adaptive``, ``adjoint_rtol``, ``adjoint_atol`` and ``adjoint_options`` have no effect, but that their
    names are looked at. Adaptive runs keep every step.

    Args:
        sde: as of `sdeint`; a module, unless ``adjoint_params`` are given.
        y0, ts, bm, method, dt, adaptive, rtol, atol, dt_min, options, names, logqp, extra, extra_solver_state: as of
            `sdeint`.
        adjoint_method: one of torchsde's methods.
        adjoint_adaptive, adjoint_rtol, adjoint_atol, adjoint_options: without effect.
        adjoint_params: without effect: gradients go to all that the functions of ``sde`` hold.
        **unused_kwargs: warned of.

    Returns:
        As `sdeint`.

    Raises:
        ValueError: as `sdeint`; an unknown ``adjoint_method``; ``sde`` is no module and ``adjoint_params`` are missing.
    """
    if adjoint_params is None and not isinstance(sde, nn.Module):
        raise ValueError(
            "sde must be a torch module, whose parameters get gradients, or these are named by adjoint_params=; give "
            "adjoint_params=() if there are none"
        )
    if adjoint_method is not None and adjoint_method not in METHODS:
        raise ValueError(f"adjoint_method must be one of {METHODS}, got {short(adjoint_method)}")
    _refuse_gradients(adjoint_rtol=adjoint_rtol, adjoint_atol=adjoint_atol)
    return _integrated(
        sde, y0, ts, bm, method, dt, adaptive, rtol, atol, dt_min, options, names, logqp, extra, extra_solver_state,
        unused_kwargs, "checkpoint",
    )  # fmt: skip


def _integrated(
    sde: Any, y0: Any, ts: Any, bm: Any, method: str | None, dt: Number, adaptive: bool, rtol: Number, atol: Number,
    dt_min: Number, options: Mapping[str, Any] | None, names: Mapping[str, str] | None, logqp: bool, extra: bool,
    extra_solver_state: Sequence[Tensor] | None, unused: dict[str, Any], gradients: Gradients,
) -> Any:  # fmt: skip
    if unused:
        warnings.warn(f"unexpected arguments: {', '.join(unused)}", stacklevel=3)
    _refuse_gradients(ts=ts, dt=dt, rtol=rtol, atol=atol, dt_min=dt_min)
    noise_type, method = _check_kind(sde, method, adaptive)
    times = _times(ts, y0)
    equation, y0 = _equation(sde, y0, times, bm, names, logqp)
    _check_motion(bm, equation, y0, method, noise_type)
    grad_free = bool((options or {}).get("grad_free", False))
    if adaptive:
        form, chosen = _adaptively(equation, method, grad_free, times, rtol, atol, dt_min)
        grid = torch.linspace(float(times[0]), float(times[-1]), chosen.first_steps + 1, dtype=torch.float64)
        noise = _noise(bm, grid)
        if not isinstance(noise, BrownianPath):
            raise ValueError(
                "adaptive steps halve the steps of a path, and this bm has been used with others, or is one that is "
                "asked for its increments: take a new BrownianInterval, without dt, W and H"
            )
        sol = solve(form, y0, times[0], times[-1], solver=chosen, noise=noise, save_at=times)
        return _returned(sol.xs, (), logqp, extra)
    solver = _solver(method, noise_type, grad_free)
    if equation.noise is Noise.DIAGONAL and solver.own_component_diffusion and y0.numel():
        equation.taken_as_diagonal = not is_diagonal(equation, y0, times[0].to(y0))
        if equation.taken_as_diagonal:
            warnings.warn(
                f"some g_i of this diagonal noise depends on another component than its own, and {method} has no terms "
                "for that: it runs, as in torchsde, with strong order 0.5; method='euler' has that too, for less",
                stacklevel=3,
            )
    grid = steps_of(times, float(dt))
    noise = _noise(bm, grid)
    if gradients == "checkpoint" and torch.is_grad_enabled():
        step = solver.evaluations * _kept_by(equation, y0, times[0])
        gradients = "auto" if (len(grid) - 1) * step <= _BUDGET else "checkpoint"
    if extra_solver_state is None or method != METHODS.reversible_heun:
        sol = solve(equation, y0, grid=grid, solver=solver, noise=noise, save_at=times, gradients=gradients)
    else:
        start = Continuation(y0, (extra_solver_state[2] - y0,), grid[:1], noise, solver)
        sol = solve(equation, grid=grid, solver=solver, start=start, save_at=times, gradients=gradients)
    carried: tuple[Tensor, ...] = ()
    if extra and method == METHODS.reversible_heun:
        assert sol.state is not None
        z = sol.x1 + sol.state.memory[0]
        f, g = equation.drift_and_diffusion(z, times[-1].to(z))
        carried = f, g.unsqueeze(-1) if noise_type == NOISE_TYPES.scalar else g, z
    return _returned(sol.xs, carried, logqp, extra)


def _kept_by(equation: AbstractSDE, y0: Tensor, t0: Tensor) -> int:
    """Bytes that torch keeps of one evaluation for its gradient."""
    kept: dict[int, Tensor] = {}

    def pack(v: Tensor) -> Tensor:
        if not isinstance(v, nn.Parameter):
            kept[v.untyped_storage().data_ptr()] = v
        return v

    y, t = y0.detach().requires_grad_(), t0.to(y0)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda v: v):
        if equation.has_diffusion:
            equation.drift_and_diffusion(y, t)
        else:
            equation.drift(y, t)
    return sum(v.untyped_storage().nbytes() for v in kept.values()) + 8 * y.nbytes


def _returned(ys: Tensor, carried: tuple[Tensor, ...], logqp: bool, extra: bool) -> Any:
    parts = (ys[..., :-1], ys[..., -1].diff(dim=0)) if logqp else (ys,)
    out = (*parts, carried) if extra else parts
    return out[0] if len(out) == 1 else out


def _check_kind(sde: Any, method: str | None, adaptive: bool) -> tuple[str, str]:
    """The noise type, and the method."""
    for name, known in (("noise_type", NOISE_TYPES), ("sde_type", SDE_TYPES)):
        if getattr(sde, name, None) not in known:
            raise ValueError(f"sde.{name} must be one of {known}, got {short(getattr(sde, name, None))}")
    noise_type, sde_type = str(sde.noise_type), str(sde.sde_type)
    if method is None:
        ito = METHODS.srk if noise_type in _COMMUTING else METHODS.euler
        method = ito if sde_type == SDE_TYPES.ito else METHODS.midpoint
    if method not in _METHODS:
        raise ValueError(f"method must be one of {', '.join(_METHODS)}, got {short(method)}")
    if adaptive and method == METHODS.euler and noise_type != NOISE_TYPES.additive:
        warnings.warn(
            "adaptive steps of Euler-Maruyama do not converge to the solution where noise is not additive; Milstein is "
            "taken in its place, or for general noise Heun on the Stratonovich form",
            stacklevel=4,
        )
    calculi, noises, _ = _METHODS[method]
    if sde_type not in calculi or noise_type not in noises:
        raise ValueError(
            f"{method} is for {' and '.join(calculi)} SDEs with {', '.join(sorted(noises))} noise; this one is "
            f"{sde_type} with {noise_type} noise"
        )
    return noise_type, method


def _times(ts: Any, y0: Any) -> Tensor:
    if not isinstance(y0, Tensor) or y0.ndim != 2:
        raise ValueError(f"y0 must be a tensor (batch, size), got {kind_of(y0)}")
    if not isinstance(ts, Tensor) and not (
        isinstance(ts, list | tuple) and all(isinstance(t, float | int) for t in ts)
    ):
        raise ValueError("ts must be a tensor of times, or a list or tuple of numbers")
    times = torch.as_tensor(ts).detach().to("cpu", torch.float64)
    if times.ndim != 1 or len(times) < 2 or not bool((times.diff() > 0).all()):
        raise ValueError(f"ts must be two or more increasing times, got {short(ts)}")
    return times


def _equation(
    sde: Any, y0: Tensor, times: Tensor, bm: Any, names: Mapping[str, str] | None, logqp: bool
) -> tuple[FromTorchSDE, Tensor]:
    channels = bm.shape[-1] if isinstance(bm, BaseBrownian) else None
    try:
        if not logqp:
            return FromTorchSDE(sde, names, channels), y0
        named = METHODS_OF_SDE | dict(names or {})
        f, g, h = (getattr(sde, named[role], None) for role in ("drift", "diffusion", "prior_drift"))
        if f is None or g is None or h is None:
            raise TypeError("logqp needs the methods f, g and h of the SDE, or names= of them")
    except TypeError as met:
        raise ValueError(str(met)) from None
    with torch.no_grad():
        t = times[0].to(y0)
        v, own = f(t, y0) - h(t, y0), g(t, y0)
        if sde.noise_type != NOISE_TYPES.diagonal:
            rest = v - (own @ control(v, own, sde.noise_type).unsqueeze(-1)).squeeze(-1)
            if bool((rest.abs() > 1e-3 * v.abs().max()).any()):
                warnings.warn(
                    "drift and prior differ in a direction without noise, so the divergence is infinite; what is "
                    "returned is that of the part which noise reaches",
                    stacklevel=4,
                )
    return FromTorchSDE(WithDivergence(sde, f, g, h)), torch.cat([y0, y0.new_zeros(len(y0), 1)], 1)


def _check_motion(bm: Any, equation: FromTorchSDE, y0: Tensor, method: str, noise_type: str) -> None:
    if not isinstance(bm, BaseBrownian):
        return
    if len(bm.shape) != 2 or bm.shape[0] != len(y0):
        raise ValueError(f"bm must have the shape ({len(y0)}, channels), got {bm.shape}")
    wanted = {NOISE_TYPES.scalar: 1, NOISE_TYPES.diagonal: y0.shape[1]}.get(noise_type)
    if wanted is not None and bm.shape[1] != wanted:
        raise ValueError(f"{noise_type} noise of a state of size {y0.shape[1]} has {wanted} channels, bm {bm.shape[1]}")
    areas = _METHODS[method][2]
    if areas and bm.levy_area_approximation not in areas:
        raise ValueError(
            f"{method} takes a motion with levy_area_approximation {' or '.join(map(repr, areas))}, and bm has "
            f"{bm.levy_area_approximation!r}"
        )


def _noise(bm: Any, grid: Tensor) -> AbstractNoise:
    if bm is None:
        return BrownianPath(drawn_seed())
    return bm.noise(grid) if isinstance(bm, BaseBrownian) else TorchSDENoise(bm)


def _solver(method: str, noise_type: str, grad_free: bool) -> AbstractOneStep:
    additive = noise_type == NOISE_TYPES.additive
    if method == METHODS.milstein:
        return SRI2() if grad_free and not additive else Milstein()
    if method == METHODS.srk:
        return SRA1() if additive else SRIW1()
    if method == METHODS.log_ode_midpoint:
        return LogODE(area="foster") if noise_type == NOISE_TYPES.general else LogODE(area=None)
    if method == METHODS.reversible_heun:
        return ReversibleHeun(_APART)
    plain: dict[str, AbstractOneStep] = {
        "euler": EulerMaruyama(), "euler_heun": EulerHeun(), "heun": Heun(), "midpoint": Midpoint()
    }  # fmt: skip
    return plain[method]


def _adaptively(
    equation: AbstractSDE, method: str, grad_free: bool, times: Tensor, rtol: Number, atol: Number, dt_min: Number
) -> tuple[AbstractSDE, Adaptive]:
    """What is integrated with steps of its own, and by what: `Adaptive` takes schemes that converge so."""
    if method == METHODS.reversible_heun:
        raise ValueError("reversible_heun remembers its last step, and a step that is rejected has none: take 'heun'")
    noise = equation.noise
    solver = _solver(method, str(noise), grad_free)
    if method == METHODS.euler and noise is not Noise.ADDITIVE:
        solver = Heun() if noise is Noise.GENERAL else Milstein()
        equation = to_stratonovich(equation) if noise is Noise.GENERAL else equation
    elif method == METHODS.log_ode_midpoint:
        solver = Midpoint()  # halves of a step have no Levy areas
    length = float(times[-1] - times[0])
    level = math.floor(math.log2(max(length / max(float(dt_min), 1e-300), 2.0)))
    first_steps = 2 ** max(level - 20, 0)
    adaptive = Adaptive(
        solver, float(rtol), float(atol), first_steps=first_steps, max_level=min(level, 20), shared=True
    )
    return equation, adaptive


def _refuse_gradients(**given: Any) -> None:
    for name, value in given.items():
        if isinstance(value, Tensor) and value.requires_grad:
            raise ValueError(f"{name} must not require a gradient")
