"""Whether a diffusion is what the solver, or its own SDE, takes it for, looked at in many states and at many times."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from sdesolve._internal.derivatives import jvp
from sdesolve.integrate.probing import MOMENTS, agree, unnoticed
from sdesolve.integrate.problem import Problem
from sdesolve.reverse import ProbabilityFlow, ReverseSDE
from sdesolve.sde import AbstractLinearSDE, AbstractSDE, Noise, is_matrix

if TYPE_CHECKING:
    from sdesolve.integrate.lowering import Lowered

_SECONDS, _MOST_WEIGHTS = 5.0, 1 << 12  # of a trace


def has_structure(problem: Problem) -> bool:
    """Whether the solver or the noise type needs anything of the diffusion that it might not have."""
    solver, sde = problem.solver, problem.equation
    if not problem.x0.numel():
        return False
    if sde.noise is Noise.DIAGONAL:
        return not sde.taken_as_diagonal and (solver.own_component_diffusion or sde.own_component)
    if sde.noise is Noise.GENERAL:
        return solver.commutative_noise
    forward = sde.forward if isinstance(sde, ReverseSDE | ProbabilityFlow) else sde
    return sde.noise is Noise.ADDITIVE and not isinstance(forward, AbstractLinearSDE)


def check_noise(problem: Problem, x: Tensor, t: Tensor) -> None:
    """Refuses a diffusion that is not, at ``(x, t)``, what the solver or its own noise type needs.

    A value that is not finite there tells nothing.

    Raises:
        ValueError: additive noise that depends on the state; diagonal noise in which some ``g_i`` depends on another
            component than ``x_i``, or general noise that does not commute, for a solver that needs it.
    """
    with torch.no_grad(), unnoticed(problem.equation):
        fits = _CHECKS[problem.equation.noise](problem.watched, x.detach(), t)
    if not fits:
        raise ValueError(_MESSAGES[problem.equation.noise].format(type(problem.solver).__name__))


def check_noise_ahead(problem: Problem) -> None:
    """`check_noise` at the start, in states around it, and at times up to the end of the grid.

    Raises:
        ValueError: as `check_noise`.
    """
    if not has_structure(problem):
        return
    x, start, end = problem.x0.detach(), problem.times[problem.first], problem.times[-1]
    check_noise(problem, x, problem.clock(start))
    check = _CHECKS[problem.equation.noise]
    with torch.no_grad(), unnoticed(problem.equation):
        for moment in MOMENTS:
            t = problem.clock(start + moment * (end - start))
            for y in (x, *_around(x, moment)):
                try:
                    fits = check(problem.watched, y, t)
                except Exception:  # a state that is none, or a time outside a table; the run says so if it gets there
                    continue
                if not fits:
                    raise ValueError(_MESSAGES[problem.equation.noise].format(type(problem.solver).__name__))


def is_diagonal(sde: AbstractSDE, x: Tensor, t: Tensor) -> bool:
    """Whether, at ``(x, t)``, each ``g_i`` of diagonal noise depends on its own ``x_i`` alone."""
    with torch.no_grad():
        return _is_own_component(sde, x.detach(), t)


def is_proved(problem: Problem) -> bool:
    """Whether a trace of the diffusion shows that `check_noise` would find nothing in any state and at any time.

    Raises:
        Unsupported: it cannot be traced.
    """
    from sdesolve_kernels.trajectory import Inputs, Signature, State, trace  # as in `probing`
    from sdesolve_kernels.trajectory.expressions import topological

    sde, x0 = problem.watched, problem.x0

    def step(inputs: Inputs) -> list[Tensor]:
        (x,) = inputs.states
        if not sde.has_diffusion:
            (channels,) = sde.channels(x) or (1,)
            return [sde.diffusion_product(x, inputs.t0, _numbered(x, channels).expand(len(x), -1))]
        g = sde.diffusion(x, inputs.t0)
        if is_matrix(g, x):
            g = (g * _numbered(x, g.shape[-1])).sum(-1)
        return [g.expand_as(x)]

    if sde.noise not in (Noise.ADDITIVE, Noise.DIAGONAL):
        return False
    program = trace(step, Signature(x0.dtype, x0.device, (tuple(x0.shape[1:]),), (), 0, len(x0)), seconds=_SECONDS)
    reads: dict[int, int] = {}  # which components of the state an expression depends on, a bit for each
    for e in topological(program.states):
        reads[e.id] = 1 << e.data.i if isinstance(e.data, State) else 0
        if not (e.op == "mul" and any(a.op == "const" and a.data == 0 for a in e.args)):
            for a in e.args:
                reads[e.id] |= reads[a.id]
    allowed = sde.noise is Noise.DIAGONAL
    return all(reads[e.id] & ~(allowed << i) == 0 for i, e in enumerate(program.states))


def treats_rows_alike(problem: Problem) -> bool:
    """Whether a trace of the drift, at a time per row, shows that it gives every row the same function of that row.

    A trace has few rows. What a drift does with many and with one less is compared besides.
    """
    from sdesolve_kernels.trajectory import Inputs, Signature, look_into, trace  # as in `probing`

    x0, drift = problem.x0, problem.watched.drift_at

    def step(inputs: Inputs) -> list[Tensor]:
        x, t = inputs.states
        return [drift(x, t), t]

    try:
        held = look_into(problem.equation, most_weights=_MOST_WEIGHTS)
        with torch.no_grad(), _disable_current_modes(), held.preserved():  # what watches the run is not to see a trace
            signature = Signature(x0.dtype, x0.device, (tuple(x0.shape[1:]), ()), (), 0, len(x0))
            alike = not any(trace(step, signature, seconds=_SECONDS).by_path)
            t = problem.times[0].expand(len(x0)).to(x0).contiguous()
            return alike and agree(drift(x0, t)[1:], drift(x0[1:], t[1:]))
    except Exception:  # whatever a drift raises on a symbol, or on a batch of another size
        return False


def step_treats_rows_alike(problem: Problem, lowered: Lowered) -> bool:
    """Whether a trace of a whole step, with all that follows paths, gives every row the same function of that row."""
    from sdesolve_kernels.trajectory import Inputs, Signature, look_into, trace

    from sdesolve.integrate.fused import TracedContext

    x0 = problem.x0
    if problem.times.ndim == 2:
        return False
    try:
        held = look_into(problem.equation, *problem.roots, most_weights=_MOST_WEIGHTS)
        noises = tuple(source.numbers() for source in lowered.sources)
        shapes = tuple(lowered.shapes(x0))
        signature = Signature(x0.dtype, x0.device, shapes, noises, lowered.columns, len(x0), problem.time_dtype)

        def step(inputs: Inputs) -> Sequence[Tensor]:
            return lowered.step(TracedContext(lowered, inputs), inputs.states)

        with torch.no_grad(), _disable_current_modes(), held.preserved():
            return not any(trace(step, signature, seconds=_SECONDS).by_path)
    except Exception:  # as above
        return False


def _around(x: Tensor, phase: float) -> tuple[Tensor, Tensor]:
    """States of the same signs, and states moved by about the size of the state."""
    wave = _irregular(x, phase)
    return x * (1.0 + 0.4 * wave), x + (0.5 * x.abs().mean() + 0.3) * wave


def _irregular(x: Tensor, phase: float) -> Tensor:
    return torch.sin(phase + torch.arange(x.numel(), dtype=torch.float64, device="cpu") * 2.3).to(x).reshape(x.shape)


def _numbered(x: Tensor, channels: int) -> Tensor:
    return torch.arange(1.0, channels + 1.0, dtype=x.dtype, device=x.device)


def _is_additive(sde: AbstractSDE, x: Tensor, t: Tensor) -> bool:
    def seen(y: Tensor) -> Tensor:
        if sde.has_diffusion:
            return sde.diffusion(y, t)
        return sde.diffusion_product(y, t, _irregular(y.new_empty(len(y), *(sde.channels(y) or ())), 1.0))

    g = seen(x)
    others = [seen(y) for y in _around(x, 2.0)]
    return all(g.shape == h.shape and agree(g, h) for h in others)


def _is_own_component(sde: AbstractSDE, x: Tensor, t: Tensor) -> bool:
    """For a diagonal Jacobian ``J`` and any ``v``, ``J v = v (J 1)``; a fixed irregular ``v`` tells others apart."""

    def g_of(y: Tensor) -> Tensor:
        return sde.diffusion(y, t).expand_as(y)

    v = _irregular(x, 1.0)
    along_ones, along_v = (jvp(g_of, x, u)[1] for u in (torch.ones_like(x), v))
    return agree(along_v, v * along_ones, along_ones)


def _commutes(sde: AbstractSDE, x: Tensor, t: Tensor) -> bool:
    """``J_{g b} g a = J_{g a} g b`` for any two combinations of channels, here irregular ones that differ by row."""

    def g_of(y: Tensor) -> Tensor:
        return sde.diffusion(y, t).expand(*y.shape, -1)

    g = g_of(x)
    a, b = (_irregular(x.new_empty(len(x), *(1,) * (x.ndim - 1), g.shape[-1]), phase) for phase in (1.0, 2.5))
    one, other = ((jvp(g_of, x, (g * u).sum(-1))[1] * w).sum(-1) for u, w in ((a, b), (b, a)))
    return agree(one, other)


_CHECKS: dict[Noise, Callable[[AbstractSDE, Tensor, Tensor], bool]] = {
    Noise.ADDITIVE: _is_additive,
    Noise.DIAGONAL: _is_own_component,
    Noise.GENERAL: _commutes,
}
_MESSAGES = {
    Noise.ADDITIVE: (
        "the SDE was declared with noise='additive', and its diffusion depends on the state: declare noise='diagonal' "
        "('general' if it returns a matrix), with the calculus that is meant"
    ),
    Noise.DIAGONAL: (
        "{} with diagonal noise needs every diffusion component g_i to depend on x_i alone, and this one depends on "
        "other components (or couples the samples of the batch). Use EulerMaruyama or, for a Stratonovich SDE, Heun; "
        "or declare noise='scalar' if one Brownian motion drives all components"
    ),
    Noise.GENERAL: (
        "{} needs general noise that commutes, (g_j . grad) g_k = (g_k . grad) g_j for all channels j and k, and this "
        "one does not. Give it Levy areas, area='foster', if it takes them (Milstein, SRI2, LogODE), or use "
        "EulerMaruyama or, for a Stratonovich SDE, Heun"
    ),
}
