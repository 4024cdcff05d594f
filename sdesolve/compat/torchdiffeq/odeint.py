"""`odeint`, `odeint_adjoint` and `odeint_event`: torchdiffeq's arguments, `solve`'s steps."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, final

import torch
from torch import Tensor, nn

from sdesolve._internal.arguments import kind_of, number, short
from sdesolve.compat.grids import steps_of
from sdesolve.compat.torchdiffeq.methods import ADAPTIVE, FIXED, check_method
from sdesolve.crossing import Crossing
from sdesolve.integrate.problem import Gradients
from sdesolve.integrate.solve import solve
from sdesolve.sde import ODE
from sdesolve.solvers.base import AbstractSolver

State = Tensor | tuple[Tensor, ...]
_OPTIONS = {
    True: ("jump_t", "step_t", "max_num_steps"),
    False: ("step_size", "grid_constructor", "interp"),
}
_CALLBACKS = ("callback_step", "callback_accept_step", "callback_reject_step")
_MOST = 1 << 20  # attempted steps; torchdiffeq has no limit
_FIRST, _DOUBLINGS = 64, 48  # fixed steps before an event is looked for in twice as long a time; how often


def odeint(
    func: Callable[[Tensor, Any], Any],
    y0: State,
    t: Tensor,
    *,
    rtol: float | Tensor = 1e-7,
    atol: float | Tensor = 1e-9,
    method: str | None = None,
    options: Mapping[str, Any] | None = None,
    event_fn: Callable[[Tensor, Any], Tensor] | None = None,
) -> Any:
    """Solves ``dy/dt = func(t, y)``, ``y(t[0]) = y0``.

    The whole state is one sample to `solve`: it has one step size, by the root mean square of its error. Gradients are
    those of the steps that were taken, to ``y0`` and to all that ``func`` holds; to ``t`` those of the solution,
    ``func`` at that time.

    Args:
        func: of a time ``()`` and a state, gives its derivative.
        y0: a tensor of any shape, real or complex, or a tuple of tensors of one dtype and device.
        t: times ``(n,)``, increasing or decreasing.
        rtol, atol: tolerances of adaptive methods, numbers; ``rtol`` is at least 4 times the rounding error of ``y0``.
        method: ``dopri5`` (the default), ``tsit5``, ``bosh3``, ``fehlberg2`` or ``adaptive_heun``, which choose their
            steps; ``euler``, ``midpoint``, ``heun2``, ``heun3`` or ``rk4``, which take one from each time to the
            next, unless ``options`` say otherwise.
        options: ``step_size``, or ``grid_constructor`` of ``(func, y0, t)``, for fixed steps, and ``interp="linear"``;
            for others ``jump_t`` and ``step_t``, times at which steps end, and ``max_num_steps``.
        event_fn: of ``(t, y)``: integrates from ``t[0]``, towards ``t[1]`` and beyond, until an entry of it changes its
            sign. Both results have gradients of the event.

    Returns:
        States at ``t``, ``(n, *shape)``, or a tuple of them. With ``event_fn`` the time of the event, and the states at
        ``t[0]`` and then, ``(2, *shape)``.

    Raises:
        ValueError: a method or option that is not here; bad times, states or tolerances.
        TypeError: an argument of another kind.
        DivergenceError: a state is no longer finite.
        RuntimeError: tolerances cannot be met; no event before ``2^48`` times as long as from ``t[0]`` to ``t[1]``.
    """
    return _integrated(func, y0, t, rtol, atol, method, options, event_fn, "auto")


def odeint_adjoint(
    func: Callable[[Tensor, Any], Any],
    y0: State,
    t: Tensor,
    *,
    rtol: float | Tensor = 1e-7,
    atol: float | Tensor = 1e-9,
    method: str | None = None,
    options: Mapping[str, Any] | None = None,
    event_fn: Callable[[Tensor, Any], Tensor] | None = None,
    adjoint_rtol: float | Tensor | None = None,
    adjoint_atol: float | Tensor | None = None,
    adjoint_method: str | None = None,
    adjoint_options: Mapping[str, Any] | None = None,
    adjoint_params: Sequence[Tensor] | None = None,
) -> Any:
    """`odeint` whose fixed steps keep some states for the gradient, and are taken again on the way back.

    Gradients are those of `odeint` to the bit, where torchdiffeq's are those of a second equation, solved backwards. So
    ``adjoint_rtol``, ``adjoint_atol``, ``adjoint_method`` and ``adjoint_options`` have no effect. Methods that choose
    their steps keep every step.

    Args:
        func: as of `odeint`; a module, unless ``adjoint_params`` are given.
        y0, t, rtol, atol, method, options, event_fn: as of `odeint`.
        adjoint_rtol, adjoint_atol, adjoint_method, adjoint_options: without effect.
        adjoint_params: without effect: gradients go to all that ``func`` holds.

    Returns:
        As `odeint`.

    Raises:
        ValueError: as `odeint`; ``func`` is no module and ``adjoint_params`` are missing.
        TypeError, DivergenceError, RuntimeError: as `odeint`.
    """
    if adjoint_params is None and not isinstance(func, nn.Module):
        raise ValueError("func must be a torch module; where it has no parameters, give adjoint_params=()")
    return _integrated(func, y0, t, rtol, atol, method, options, event_fn, "checkpoint")


def odeint_event(
    func: Callable[[Tensor, Any], Any],
    y0: State,
    t0: Tensor,
    *,
    event_fn: Callable[[Tensor, Any], Tensor],
    reverse_time: bool = False,
    odeint_interface: Callable[..., Any] = odeint,
    **kwargs: Any,
) -> Any:
    """`odeint` from ``t0`` until ``event_fn`` changes its sign.

    Args:
        func, y0, event_fn: as of `odeint`.
        t0: where it begins, ``()`` or ``(1,)``.
        reverse_time: go towards earlier times.
        odeint_interface: `odeint` or `odeint_adjoint`.
        **kwargs: others of its arguments.

    Returns:
        The time of the event, and the states at ``t0`` and then, ``(2, *shape)``, with gradients.

    Raises:
        ValueError, TypeError, DivergenceError, RuntimeError: as `odeint`.
    """
    if not isinstance(t0, Tensor) or t0.numel() != 1:
        raise ValueError(f"t0 must be a tensor of one time, got {kind_of(t0)}")
    start = t0.reshape(1)
    times = torch.cat([start, start.detach() + (-1.0 if reverse_time else 1.0)])
    return odeint_interface(func, y0, times, event_fn=event_fn, **kwargs)


@final
class _Flow:
    """``func`` on a state that is one row, ``(1, size)``.

    Args:
        func: of a time and the user's state.
        y0: the user's state.
    """

    def __init__(self, func: Callable[[Tensor, Any], Any], y0: Any) -> None:
        if not callable(func):
            raise TypeError(f"func must be a function of (t, y), got {kind_of(func)}")
        parts = y0 if isinstance(y0, tuple) else (y0,)
        if not parts or not all(isinstance(v, Tensor) for v in parts):
            raise TypeError(f"y0 must be a tensor or a tuple of tensors, got {kind_of(y0)}")
        kinds = {(v.dtype, v.device) for v in parts}
        if len(kinds) > 1 or not (parts[0].is_floating_point() or parts[0].is_complex()):
            raise ValueError("y0 must have one real or complex dtype and be on one device")
        self._func, self._several, self._complex = func, isinstance(y0, tuple), parts[0].is_complex()
        self._shapes = [v.shape for v in parts]
        self._sizes = [v.numel() for v in parts]

    def row(self, y: Any) -> Tensor:
        """A state of the user as ``(1, size)``."""
        parts = y if self._several else (y,)
        if len(parts) != len(self._shapes) or any(
            v.shape != shape for v, shape in zip(parts, self._shapes, strict=True)
        ):
            raise ValueError(
                f"func must return the shapes of y0, {short([tuple(s) for s in self._shapes])}, got "
                f"{short([tuple(v.shape) for v in parts])}"
            )
        flat = torch.cat([v.reshape(-1) for v in parts]) if len(parts) > 1 else parts[0].reshape(-1)
        return (torch.view_as_real(flat) if self._complex else flat).reshape(1, -1)

    def state(self, x: Tensor) -> Any:
        """Rows ``(*times, 1, size)`` as states ``(*times, *shape)``."""
        lead = x.shape[:-2]
        flat = x.reshape(*lead, -1)
        if self._complex:
            flat = torch.view_as_complex(flat.reshape(*lead, -1, 2))
        parts = flat.split(self._sizes, -1) if self._several else (flat,)
        made = tuple(v.reshape((*lead, *shape)) for v, shape in zip(parts, self._shapes, strict=True))
        return made if self._several else made[0]

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        return self.row(self._func(t.reshape(()), self.state(x)))


def _integrated(
    func: Any, y0: Any, t: Any, rtol: Any, atol: Any, method: str | None, options: Mapping[str, Any] | None,
    event_fn: Any, gradients: Gradients,
) -> Any:  # fmt: skip
    method = check_method("dopri5" if method is None else method)
    options, flow, times = _options(method, options), _Flow(func, y0), _times(t)
    for name in _CALLBACKS:
        if hasattr(func, name) or hasattr(func, f"{name}_adjoint"):
            warnings.warn(f"{name} is not called", stacklevel=3)
    x0 = flow.row(y0)
    solver: AbstractSolver = FIXED.get(method) or _adaptive(method, rtol, atol, options, x0)
    begin = x0
    if t.requires_grad:
        begin = x0 - flow(x0, times[0].to(x0)) * _only_gradient(t[0], x0)
    if event_fn is not None:
        if len(times) != 2:
            raise ValueError(f"with event_fn t must be two times, where to begin and towards which, got {len(times)}")
        return _until(flow, begin, x0, y0, t, times, solver, options, event_fn, gradients)
    if len(times) == 1:
        return flow.state(x0[None])
    xs = _solved(flow, begin, times, solver, options, gradients, lambda ts: options["grid_constructor"](func, y0, ts))
    rest = xs[1:]
    if t.requires_grad:
        slopes = torch.stack([flow(x, at.to(x)) for x, at in zip(rest, times[1:], strict=True)])
        rest = rest + slopes * _only_gradient(t[1:], x0)[:, None, None]
    return flow.state(torch.cat([x0[None], rest]))


def _solved(
    flow: _Flow, begin: Tensor, times: Tensor, solver: AbstractSolver, options: Mapping[str, Any],
    gradients: Gradients, constructed: Callable[[Tensor], Tensor],
) -> Tensor:  # fmt: skip
    """States at the times, ``(times, 1, size)``."""
    if solver not in FIXED.values():
        changes = _changes(options, times)
        return solve(ODE(flow), begin, times[0], times[-1], solver=solver, save_at=times, at=changes).xs
    if "grid_constructor" in options:
        grid = constructed(times.to(begin.device)).detach().to("cpu", torch.float64)
        sol = solve(ODE(flow), begin, grid=grid, solver=solver, save_at="grid", gradients=gradients)
        return _chords(sol.xs, grid, times)
    grid = _steps(times, options["step_size"]) if "step_size" in options else times
    return solve(ODE(flow), begin, grid=grid, solver=solver, save_at=times, gradients=gradients).xs


def _chords(xs: Tensor, grid: Tensor, times: Tensor) -> Tensor:
    """States at the times, from those of a grid on straight lines between them."""
    sign = (grid[-1] - grid[0]).sign()
    at = torch.searchsorted((sign * grid).contiguous(), (sign * times).contiguous()).clamp(1, len(grid) - 1)
    share = ((times - grid[at - 1]) / (grid[at] - grid[at - 1])).to(xs)[:, None, None]
    at = at.to(xs.device)
    return xs[at - 1].lerp(xs[at], share)


def _until(
    flow: _Flow, begin: Tensor, x0: Tensor, y0: Any, t: Tensor, times: Tensor, solver: AbstractSolver,
    options: Mapping[str, Any], event_fn: Any, gradients: Gradients,
) -> Any:  # fmt: skip
    fixed = solver in FIXED.values()
    if fixed and "step_size" not in options:
        raise ValueError("an event with fixed steps needs options={'step_size': ...}")
    with torch.no_grad():
        signs = event_fn(times[0].to(x0), y0).sign()

    def level(x: Tensor, at: Tensor) -> Tensor:
        return (event_fn(at.reshape(()), flow.state(x)) * signs).min().reshape(1)

    x, start = begin, times[0]
    length = (times[1] - times[0]).sign() * options["step_size"] * _FIRST if fixed else times[1] - times[0]
    for _ in range(_DOUBLINGS):
        ends = torch.stack([start, start + length])
        if fixed:
            grid = _steps(ends, options["step_size"])
            sol = solve(ODE(flow), x, grid=grid, solver=solver, until=Crossing(level), gradients=gradients)
        else:
            changes = _changes(options, ends)
            sol = solve(ODE(flow), x, ends[0], ends[1], solver=solver, until=Crossing(level), at=changes)
        assert sol.stopped is not None
        assert sol.stop_time is not None
        x, start, length = sol.x1, ends[1], 2.0 * length
        if bool(sol.stopped):
            return _linked(flow, x, sol.stop_time.reshape(()).cpu(), level, x0, t)
    raise RuntimeError(f"event_fn kept its sign from {float(times[0]):.6g} to {float(start):.6g}")


def _linked(
    flow: _Flow, x: Tensor, when: Tensor, level: Callable[[Tensor, Tensor], Tensor], x0: Tensor, t: Tensor
) -> Any:
    """Time and states of an event, whose gradients are those of ``level(x(t), t) = 0``."""
    if torch.is_grad_enabled() and (x.requires_grad or level(x, when.to(x)).requires_grad):
        at, state = when.to(x).requires_grad_(), x.detach().requires_grad_()
        value = level(state, at)
        along_x, along_t = torch.autograd.grad(value.sum(), (state, at), allow_unused=True, materialize_grads=True)
        slope = flow(x, when.to(x))
        rate = along_t + (along_x * slope.detach()).sum()
        shift = -_only_gradient(level(x, when.to(x)), x) / rate
        x, found = x + slope * shift, when.to(t) + shift.reshape(()).to(t)
    else:
        found = when.to(t)
    return found, flow.state(torch.stack([x0, x]))


def _only_gradient(v: Tensor, like: Tensor) -> Tensor:
    return (v - v.detach()).to(like)


def _adaptive(method: str, rtol: Any, atol: Any, options: Mapping[str, Any], x0: Tensor) -> AbstractSolver:
    tolerances = {}
    for name, value in (("rtol", rtol), ("atol", atol)):
        if isinstance(value, tuple | list) or (isinstance(value, Tensor) and value.numel() > 1):
            raise ValueError(f"{name} must be one number for the whole state, got {kind_of(value)}")
        if isinstance(value, Tensor) and value.requires_grad:
            raise ValueError(f"{name} must not require a gradient")
        tolerances[name] = number(float(value) if isinstance(value, Tensor) else value, name)
    rtol = max(tolerances["rtol"], 4.0 * torch.finfo(x0.dtype).eps)
    return ADAPTIVE[method](rtol, tolerances["atol"], max_steps=options.get("max_num_steps", _MOST))


def _options(method: str, options: Mapping[str, Any] | None) -> dict[str, Any]:
    made, known = dict(options or {}), _OPTIONS[method in ADAPTIVE]
    unknown = [name for name in made if name not in known]
    if unknown:
        raise ValueError(f"options of {method} are {', '.join(known)}; leave out {short(', '.join(map(str, unknown)))}")
    if "step_size" in made:
        if "grid_constructor" in made:
            raise ValueError("give one of step_size and grid_constructor")
        made["step_size"] = float(made["step_size"])
        if not 0.0 < made["step_size"] < math.inf:
            raise ValueError(f"step_size must be positive, got {made['step_size']:g}")
    if made.get("interp", "linear") != "linear" and "step_size" not in made:
        raise ValueError("interp is 'linear'; with step_size steps end at the times that are asked for")
    return made


def _times(t: Any) -> Tensor:
    if not isinstance(t, Tensor) or not t.is_floating_point():
        raise TypeError(f"t must be a floating-point tensor of times, got {kind_of(t)}")
    times = t.detach().to("cpu", torch.float64)
    steps = times.diff() if times.ndim == 1 else times
    if times.ndim != 1 or not len(times) or not (bool((steps > 0).all()) or bool((steps < 0).all())):
        raise ValueError(f"t must be times (n,) that increase or decrease, got {short(t)}")
    return times


def _steps(times: Tensor, size: float) -> Tensor:
    return steps_of(times, size) if times[-1] > times[0] else -steps_of(-times, size)


def _changes(options: Mapping[str, Any], times: Tensor) -> Any:
    """Times at which steps end: there the state changes to itself."""
    given = [torch.as_tensor(options[name]).detach().reshape(-1).double().cpu() for name in ("jump_t", "step_t")
             if options.get(name) is not None]  # fmt: skip
    if not given:
        return None
    every = torch.cat(given).unique()
    inside = every[(every > times.min()) & (every < times.max())]
    return [(inside, _itself)] if len(inside) else None


def _itself(x: Tensor) -> Tensor:
    return 1.0 * x
