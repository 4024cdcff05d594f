"""Checks of what users pass in: each says what was given, what was expected and how to mend it."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from typing import Any

import torch
from sdesolve_kernels.transforms import any_copy, plain
from torch import Tensor

from sdesolve._internal.arguments import kind_of, short
from sdesolve.delays import DelaySDE
from sdesolve.diffusions.base import AbstractDiffusion
from sdesolve.integrate.probing import agree, unnoticed
from sdesolve.jumps import JumpSDE, Reactions
from sdesolve.reverse import ProbabilityFlow, ReverseSDE
from sdesolve.sde import AbstractSDE, AbstractSemilinear, Calculus, Field, Noise
from sdesolve.solvers.adaptive import Adaptive
from sdesolve.solvers.base import AbstractOneStep, AbstractSolver
from sdesolve.solvers.euler_heun import EulerHeun
from sdesolve.solvers.euler_maruyama import EulerMaruyama
from sdesolve.solvers.heun import Heun
from sdesolve.solvers.reactions import AbstractReacting

STATE_DTYPES = (torch.float32, torch.float64)


def check_state(x0: Tensor, name: str = "x0") -> None:
    """Refuses a state that is not a finite float32 or float64 tensor with a batch axis. An empty batch is fine."""
    if not isinstance(x0, Tensor):
        raise TypeError(
            f"{name} must be a tensor of shape (batch, *state), got {kind_of(x0)}; arrays and lists are converted with "
            f"torch.as_tensor({name})"
        )
    if x0.dtype not in STATE_DTYPES:
        raise TypeError(f"{name} must be float32 or float64, got {x0.dtype}: {_dtype_hint(x0, name)}")
    if x0.layout != torch.strided or x0.is_nested:
        kind = "nested" if x0.is_nested else f"of layout {x0.layout}"
        raise TypeError(f"{name} must be a dense tensor, and is {kind}; convert it, for a sparse one with to_dense()")
    if x0.ndim == 0:
        raise ValueError(f"{name} must have a batch axis, shape (batch, *state); got a 0-d tensor, use {name}[None]")
    if x0.is_meta:
        raise ValueError(f"{name} is on the meta device, which holds shapes and no values; make it on a real device")
    try:
        finite = all_finite(x0)
    except Exception as problem:
        raise TypeError(
            f"{name} is a {type(x0).__name__} whose values cannot be read ({type(problem).__name__}); give a plain "
            "tensor, outside of modes that hold shapes alone"
        ) from None
    if not finite:
        raise ValueError(f"{name} must be finite; row {int(bad_rows(x0).nonzero()[0])} holds nan or inf")


def _dtype_hint(x0: Tensor, name: str) -> str:
    if x0.is_complex():
        return (
            f"a complex number is two real ones; give torch.view_as_real({name}), (batch, *state, 2), and let drift "
            "and diffusion take torch.view_as_complex(x)"
        )
    if x0.is_quantized:
        return f"a state is real; convert it with {name}.dequantize()"
    hint = "Brownian increments of small steps vanish in 16 bits" if x0.is_floating_point() else "a state is real"
    return f"{hint}; convert it with {name}.float()"


def all_finite(x: Tensor) -> bool:
    """Whether ``x`` holds neither nan nor inf: one pass that makes no tensor of its size."""
    x = plain(x)
    return x.numel() == 0 or all(math.isfinite(float(bound)) for bound in x.detach().aminmax())


def bad_rows(x: Tensor) -> Tensor:
    """Which rows of ``(batch, *state)`` hold nan or inf, ``(batch,)``."""
    bad = any_copy(~x.detach().isfinite())
    return bad.flatten(1).any(1) if bad.ndim > 1 else bad


def check_pair(solver: AbstractSolver, sde: AbstractSDE) -> None:
    """Refuses a solver that does not converge to the solution of the SDE as declared."""
    if not isinstance(solver, AbstractSolver):
        hint = f"; did you mean {solver.__name__}()?" if isinstance(solver, type) else ""
        raise TypeError(f"solver must be a solver object such as EulerMaruyama(), got {short(solver)}{hint}")
    if not isinstance(sde, AbstractSDE):
        hint = "; wrap drift and diffusion in sds.SDE(drift, diffusion)" if not isinstance(sde, type) else ""
        raise TypeError(f"sde must be an SDE, ODE or process of sdesolve, got {kind_of(sde)}{hint}")
    name = type(solver).__name__
    if isinstance(sde, Reactions) and not isinstance(solver, AbstractReacting):
        raise ValueError(
            f"reactions change counts, and {name} integrates differential equations: take TauLeap() or Gillespie(); or "
            "integrate reactions.langevin(), the chemical Langevin equation, or reactions.mean_field(), an ODE"
        )
    if isinstance(sde, JumpSDE) and solver.controller is not None:
        raise ValueError(
            f"{name} chooses its own steps, and those of an equation that jumps end at its jumps; take a solver of "
            "fixed steps"
        )
    if isinstance(sde, DelaySDE) and not isinstance(solver, EulerMaruyama | EulerHeun | Heun):
        raise ValueError(
            f"delays are known at the ends of steps, and {name} is no scheme of these alone: take EulerMaruyama, or "
            "Heun for an ODE, additive noise or a Stratonovich SDE"
        )
    if not (isinstance(solver, AbstractOneStep | AbstractReacting) or isinstance(sde, AbstractSemilinear)):
        raise ValueError(
            f"{name} integrates the reverse SDE or probability flow of a linear diffusion, process.reverse(score) or "
            f"process.probability_flow(score), got {type(sde).__name__}. For other equations take a solver such as "
            "EulerMaruyama or Heun"
        )
    if solver.equations and not isinstance(sde, solver.equations):
        raise ValueError(
            f"{name} integrates {' or '.join(e.__name__ for e in solver.equations)} alone, got {type(sde).__name__}. "
            "For other equations take a solver such as EulerMaruyama or Heun"
        )
    if (sde.calculus, sde.noise) in solver.supported:
        if not (sde.has_diffusion or solver.by_products):
            raise ValueError(
                f"{name} reads columns or derivatives of the diffusion, and this SDE has its product g v alone. Give "
                "diffusion in place of diffusion_product; or take EulerMaruyama or, for a Stratonovich SDE, Heun or "
                "SPaRK"
            )
        return
    if isinstance(solver, Adaptive) and (sde.calculus, sde.noise) in solver.solver.supported:
        raise ValueError(
            f"{solver} does not converge: with {sde.noise} noise, steps that are chosen by looking at increments need "
            f"a scheme that has the double integrals of each channel, and {type(solver.solver).__name__} does not. "
            "Take SRIW1 or Milstein for Ito noise, SPaRK or SlowRK for Stratonovich noise; sds.to_stratonovich(sde) is "
            "the SDE of that calculus with the same solutions"
        )
    calculi = sorted({str(c) for c, n in solver.supported if n is sde.noise})
    noises = sorted({str(n) for c, n in solver.supported if c is sde.calculus})
    if sde.noise is not Noise.NONE and all(n is Noise.NONE for _, n in solver.supported):
        raise ValueError(
            f"{name} integrates ODEs and this is an SDE with {sde.noise} noise. Use EulerMaruyama or another SDE "
            "solver; to sample with an ODE solver, integrate process.probability_flow(score), or pass stochasticity=0 "
            "to sample"
        )
    if sde.noise is Noise.NONE and (Calculus.ITO, Noise.ADDITIVE) in solver.supported:
        raise ValueError(
            f"{name} adds noise and this is an ODE: integrate process.reverse(score), leave stochasticity=0 out of "
            "sample, or take a deterministic sampler such as DPMSolverPP"
        )
    convertible = any(noise is sde.noise for _, noise in solver.supported)
    other = "to_ito" if sde.calculus is Calculus.STRATONOVICH else "to_stratonovich"
    hint = f"; sds.{other}(sde) is the SDE of that calculus with the same solutions" if convertible else ""
    raise ValueError(
        f"{name} does not converge to the {sde.calculus} solution of an SDE with {sde.noise} noise. With "
        f"{sde.calculus} calculus it takes {_listed(noises)} noise; with {sde.noise} noise it takes "
        f"{_listed(calculi)} calculus{hint}"
    )


def check_process_times(sde: AbstractSDE, times: Tensor) -> None:
    """Refuses times at which the process that ``sde`` reverses is not defined; what float32 rounds is let pass."""
    if not isinstance(sde, ReverseSDE | ProbabilityFlow) or not isinstance(sde.forward, AbstractDiffusion):
        return
    process = sde.forward
    outside = (times < 0.0) | (times > process.t_max * (1.0 + 1e-6))
    if bool(outside.any()):
        raise ValueError(
            f"times of {type(process).__name__} lie within [0, t_max = {process.t_max}], and these include "
            f"{float(times[outside][0]):.6g}; leave such times out, or take a process with a larger t_max"
        )


def unchanged(function: Callable[..., Any], x: Tensor, t: Tensor, what: str, *others: Tensor) -> Any:
    """``function(x, t, *others)``, refused if it writes into the state: solver and user go on with that."""
    before = None if x.is_inference() else x._version
    value = function(x, t, *others)
    if before is not None and x._version != before:
        raise ValueError(f"the {what} changed the state that it was given; let it work on a copy, such as x.clone()")
    return value


def check_drift(f: Tensor, x: Tensor, t: Tensor, what: str = "drift") -> None:
    """Refuses a drift that is not a tensor of the state's shape, dtype and device."""
    if not isinstance(f, Tensor):
        hint = "; write torch.full_like(x, value)" if isinstance(f, float | int) else ""
        raise TypeError(f"{what} must return a tensor of shape {tuple(x.shape)}, got {type(f).__name__}{hint}")
    if f.shape != x.shape:
        hint = "; functions are called with the state first: f(x, t)" if f.shape == t.shape else ""
        raise ValueError(
            f"{what} must return the shape of the state, {tuple(x.shape)}, got {tuple(f.shape)} at t = {_at(t)}{hint}"
        )
    _check_kind(f, x, what)


def check_diffusion(g: Tensor, x: Tensor, noise: Noise) -> None:
    """Refuses a diffusion whose shape does not fit the noise type, or of another dtype or device than the state."""
    if not isinstance(g, Tensor):
        raise TypeError(f"diffusion must return a tensor, got {type(g).__name__}")
    shape = tuple(x.shape)
    matrix = g.ndim == x.ndim + 1 and _broadcasts(g.shape[:-1], shape)
    by_entry = g.ndim <= x.ndim and _broadcasts(g.shape, shape)
    fits = matrix if noise is Noise.GENERAL else by_entry or (matrix and noise is Noise.ADDITIVE)
    if not fits:
        general = f"{(*shape, 'channels')}".replace("'", "")
        expected = {
            Noise.GENERAL: f"{general}, or (1, *state, channels) for all rows",
            Noise.ADDITIVE: f"what broadcasts to {shape}, or a matrix {general} or (1, *state, channels)",
        }.get(noise, f"what broadcasts to {shape}")
        raise ValueError(
            f"diffusion returned shape {tuple(g.shape)} for a state of shape {shape}, which does not fit noise="
            f"'{noise}': expected {expected}.{_hint(g, x, noise, matrix)}"
        )
    _check_kind(g, x, "diffusion")


def check_product(function: Callable[..., Tensor], product: Tensor, x: Tensor, t: Tensor, v: Tensor) -> None:
    """Refuses a product ``g v`` that is not of the state's shape, dtype and device, or not linear in ``v``."""
    check_drift(product, x, t, "diffusion_product")
    if type(x) not in (Tensor, torch.nn.Parameter) or type(v) is not Tensor:  # a symbol of a trace
        return
    with torch.no_grad(), unnoticed(function):
        other = function(x, t, -0.5 * v)
    if not agree(-2.0 * other, product):
        raise ValueError(
            "diffusion_product(x, t, v) must be linear in v, g(x, t) v, and this one is not: -v / 2 does not give -1/2 "
            "of what v gives. Take what does not depend on v into the drift"
        )


def _hint(g: Tensor, x: Tensor, noise: Noise, matrix: bool) -> str:
    if matrix:
        return " For a matrix of several Brownian motions declare noise='general'."
    if g.ndim == x.ndim and g.shape[:-1] == x.shape[1:] and noise in (Noise.ADDITIVE, Noise.GENERAL):
        return " If it is one matrix for all rows, return g[None]."
    if g.ndim < x.ndim and g.shape[:1] == x.shape[:1]:
        ones = ", 1" * (x.ndim - g.ndim)
        return f" If it is a number for each row, return g.reshape({', '.join(map(str, g.shape))}{ones})."
    return ""


def check_reading(function: Field, g: Tensor, x: Tensor, t: Tensor, noise: Noise) -> None:
    """Refuses a diffusion that fits the state only because batch and state happen to be of one size.

    What is aligned from the right has a number for each column. So one whose size follows the number of rows, as
    ``x.norm(dim=1)`` does, is of rows that would be read as columns; and additive noise whose size does not follow it
    may be one matrix for all rows that would be read as a number for each entry. Another call, with one row more,
    tells.
    """
    short = 0 < g.ndim < x.ndim and len(x) in g.shape
    square = noise is Noise.ADDITIVE and g.ndim == x.ndim > 1 and g.shape[:-1] == x.shape[1:] and len(x) == len(g) > 1
    if not (short or square):
        return
    other = None
    with torch.no_grad(), unnoticed(function), contextlib.suppress(Exception):  # where it holds something for each row
        other = function(torch.cat([x, x[:1]]), torch.cat([t, t[:1]]) if t.ndim else t).shape
    returned = f"diffusion returned shape {tuple(g.shape)} for a state of shape {tuple(x.shape)}"
    if short and other != g.shape:
        by_row = f"({len(x)}, {', '.join('1' * (x.ndim - 1))})"
        raise ValueError(
            f"{returned}, and its size follows the batch. Numbers for each row have the shape {by_row}, by keepdim=True"
            " or reshape; numbers for each column are as many whatever the batch"
        )
    if square and other == g.shape:
        raise ValueError(
            f"{returned}, which can be read in two ways: for one matrix for all rows return g[None], for a number for "
            "each entry of the state g.expand_as(x)"
        )


def _check_kind(value: Tensor, x: Tensor, what: str) -> None:
    if value.device != x.device:
        raise ValueError(f"{what} returned a tensor on {value.device}, the state is on {x.device}; move one of them")
    if value.dtype != x.dtype and (value.ndim > 0 or not value.is_floating_point()):
        autocast = value.dtype == torch.get_autocast_dtype(x.device.type) and torch.is_autocast_enabled(x.device.type)
        cause = (
            "torch.autocast is on: end its block before, or"
            if autocast
            else "build its constants with dtype=x.dtype, or"
        )
        raise TypeError(
            f"{what} returned {value.dtype}, the state is {x.dtype}; {cause} convert the result with .to(x.dtype)"
        )


def _broadcasts(shape: tuple[int, ...], to: tuple[int, ...]) -> bool:
    return all(a in (1, b) for a, b in zip(shape[::-1], to[::-1], strict=False))


def _listed(names: list[str]) -> str:
    return " or ".join(names) if names else "no"


def _at(t: Tensor) -> str:
    return f"{float(t.flatten()[0]):.6g}" if t.numel() else "(no samples)"
