"""In which precision functions are given the time, and whether they keep it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, final

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from sdesolve._internal.copies import remembered

# Of a step: how far the time that a function is given may be from the time of the step; and from where on it is given
# float64 if it takes it.
_SHARE, _GAIN = 2.0**-6, 2.0**-10
_aten = torch.ops.aten


@remembered
def roundings(times: Tensor, dtype: torch.dtype) -> float:
    """The rounding of times to ``dtype`` over the step beside them: of all steps, and of the worst sample.

    Both weighted by the length of the step, as they count in what is integrated: ``sum |t| eps/2 dt / sum dt^2``.
    """
    dt = times.diff(dim=0).abs()
    sizes = torch.maximum(times[1:].abs(), times[:-1].abs())
    share = (sizes * dt).sum(0) / dt.square().sum(0)
    return 0.5 * torch.finfo(dtype).eps * float(share.max()) if share.numel() else 0.0


def time_dtype(times: Tensor, x: Tensor, takes: Callable[[], bool]) -> torch.dtype:
    """That of the state where it holds the times to within 1/1024 of a step, else float64.

    Up to 1/64 of a step functions get that of the state all the same, unless they ``take`` float64.
    """
    if x.dtype == torch.float64 or x.device.type == "mps":
        return x.dtype
    off = roundings(times, x.dtype)
    return torch.float64 if off > _SHARE or (off > _GAIN and takes()) else x.dtype


def needs_float64(times: Tensor, dtype: torch.dtype) -> bool:
    """Whether functions that do not keep a float64 time are refused."""
    return roundings(times, dtype) > _SHARE


def check_clock(times: Tensor, x0: Tensor, *, by_row: bool) -> None:
    """Refuses times that are given to functions in the state's dtype and that it cannot hold.

    Args:
        times: at which functions are evaluated, ``(n,)`` or ``(n, batch)``.
        x0: the states.
        by_row: whether each sample has times of its own: tensors that would turn a result into float64.

    Raises:
        ValueError: ``by_row`` and they are rounded by more than 1/64 of a step, or else by half of one.
    """
    if x0.dtype != torch.float64 and roundings(times, x0.dtype) > (_SHARE if by_row else 0.5):
        raise ValueError(
            f"{x0.dtype} does not tell the times of this grid apart, up to t = {float(times.abs().max()):.6g}; "
            "integrate in float64, x0.double(), or count time from a nearer origin"
        )


def keeping_clock(call: Callable[[], Tensor], x: Tensor, t: Tensor, step: float, what: str) -> Tensor:
    """``call()``, refused if it rounds the float64 time ``t`` to the dtype of the state (`_KeepsClock`).

    Raises:
        ValueError: it does, or it fails on a time in float64.
    """
    try:
        with _KeepsClock(t, step, x.dtype, what):
            return call()
    except RuntimeError as met:
        raise ValueError(
            f"the {what} fails on a time in float64 ({str(met).strip().partition(chr(10))[0]}), which it is given as "
            f"{x.dtype} does not tell steps of {step:.3g} apart at t = {float(t.flatten()[0]):.6g}: integrate in "
            "float64, x0.double(), or count time from a nearer origin"
        ) from met


@final
class _KeepsClock(TorchDispatchMode):
    """Refuses a function that rounds a float64 time to the precision of a state which cannot hold it.

    That happens where a tensor of the state's dtype meets the time before an origin, or anything but multiples of it,
    has been taken off: in ``sin(w * t)`` with a float32 ``w`` of a row per path. What is followed is the time, and what
    follows from it by sums and products of numbers, each with its slope.

    Args:
        t: the time, ``()`` or ``(batch,)``, float64.
        step: length of a step.
        dtype: of the state.
        what: drift or diffusion.
    """

    def __init__(self, t: Tensor, step: float, dtype: torch.dtype, what: str) -> None:
        super().__init__()
        self._t, self._step, self._dtype, self._what = float(t.flatten()[0]), step, dtype, what
        self._slopes = {id(t): (t, 1.0)}  # tensors are kept, so that no other has their id

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        clocks = [a for a in args if isinstance(a, Tensor) and id(a) in self._slopes]
        if not clocks or not isinstance(out, Tensor):
            return out
        if out.dtype == self._dtype:
            for clock in clocks:
                moves = abs(self._slopes[id(clock)][1]) * self._step
                if 0.5 * torch.finfo(self._dtype).eps * float(clock.abs().max()) > _SHARE * moves > 0.0:
                    raise ValueError(
                        f"the {self._what} rounds t = {self._t:.6g} to {self._dtype}, which does not tell its steps of "
                        f"{self._step:.3g} apart: take off an origin before it meets a tensor, such as (t - t0) * w; "
                        "or integrate in float64, x0.double(), with tensors of float64"
                    )
        elif out.dtype == torch.float64:
            slope = self._slope(func.overloadpacket, args)
            if slope is not None:
                self._slopes[id(out)] = (out, slope)
        return out

    def _slope(self, op: Any, args: tuple[Any, ...]) -> float | None:
        """Of what ``op`` makes of the time; ``None`` where that is no sum or product of numbers."""

        def known(a: Any) -> tuple[float, float]:
            slope = self._slopes[id(a)][1] if id(a) in self._slopes else 0.0
            return (float(a.flatten()[0]) if isinstance(a, Tensor) else float(a)), slope

        rule = _SLOPES.get(op)
        if op in _VIEWS:
            return self._slopes[id(args[0])][1] if id(args[0]) in self._slopes else None
        return None if rule is None else rule(*(known(a) for a in args[: 1 if op is _aten.neg else 2]))


Pair = tuple[float, float]


def _quotient(a: Pair, b: Pair) -> float | None:
    return None if b[1] else a[1] / b[0]


_SLOPES: dict[Any, Callable[..., float | None]] = {
    _aten.add: lambda a, b: a[1] + b[1],
    _aten.sub: lambda a, b: a[1] - b[1],
    _aten.rsub: lambda a, b: b[1] - a[1],
    _aten.mul: lambda a, b: a[1] * b[0] + a[0] * b[1],
    _aten.div: _quotient,
    _aten.neg: lambda a: -a[1],
}
_VIEWS = {
    _aten.view,
    _aten._unsafe_view,
    _aten.expand,
    _aten.unsqueeze,
    _aten.clone,
    _aten._to_copy,
    _aten.detach,
    _aten.alias,
}
