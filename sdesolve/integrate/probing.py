"""Calls of the user's functions that are no part of an integration."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import Any, final

import torch
from sdesolve_kernels.transforms import plain
from torch import Tensor

from sdesolve._internal.derivatives import beside
from sdesolve.sde import is_matrix

_MOST_WEIGHTS = 1 << 16
# Of the way from start to end: irregular, so that what vanishes at some round time is seen at another.
MOMENTS = (0.0, 0.2928932, 0.7236068, 1.0)


@contextlib.contextmanager
def unnoticed(*functions: object) -> Iterator[None]:
    """Calls inside the ``with`` block leave what the functions hold, and random generators, as they were.

    What cannot be looked into, and a large network, is not put back.
    """
    from sdesolve_kernels.trajectory import Unsupported, look_into  # the compiler is a third of the package's import
    from sdesolve_kernels.trajectory.snapshots import random_states

    with contextlib.ExitStack() as stack:
        try:
            held = look_into(*functions, most_weights=_MOST_WEIGHTS)
            stack.enter_context(contextlib.suppress(Unsupported))  # something did change, and was put back
            stack.enter_context(held.preserved(watched=False))
        except Exception:  # objects of the user may answer anything with an exception
            stack.callback(random_states())
        yield


def agree(a: Tensor, b: Tensor, *sizes: Tensor) -> bool:
    """Whether entries that are finite differ by no more than rounding: they have half of their digits in common."""
    scale = torch.stack([v.abs().expand_as(a) for v in (a, b, *sizes)]).amax(0)
    finite = scale.isfinite()
    scale = torch.where(finite, scale, 0.0)
    within = math.sqrt(torch.finfo(a.dtype).eps) * (scale + scale.sum() / finite.sum().clamp(min=1))
    return bool(plain(((a - b).abs() <= within) | ~finite).all())


@final
class ByRow:
    """A function of ``(x, t)``, perhaps more, that row by row is what it is at that row's time, however it broadcasts.

    At a time per row, ``t: (batch,)``, a row of its value has to be what it is where all rows have that time. It is
    given ``(batch,)``, or ``(batch, 1, ..., 1)`` if that is what it is right for, as ``t * x`` is. Compared at several
    times before it is first used so, and with every power of two of calls again.

    Args:
        function: ``f(x, t)``, of the shape of ``x``, or a diffusion, or a tuple of such.
        what: its name.
        times: that the run goes through, of any shape.

    Raises:
        ValueError: when called, it is right for neither.
    """

    def __init__(self, function: Callable[..., Any], what: str, times: Tensor) -> None:
        self._function, self._what, self._times = function, what, times
        self._wide, self._calls = False, 0

    def __call__(self, x: Tensor, t: Tensor, *others: Tensor) -> Any:
        if t.ndim == 0 or x.ndim < 2 or not len(x):
            return self._function(x, t, *others)
        if self._calls == 0:
            with beside(), torch.no_grad(), unnoticed(self._function):
                self._choose(x.detach(), *others)
        value = self.given(x, t, *others)
        if self._calls & (self._calls - 1) == 0:
            self.check(x, t, *others)
        self._calls += 1
        return value

    def check(self, x: Tensor, t: Tensor, *others: Tensor) -> None:
        """Refuses the function if the rows of the least and the greatest of ``t: (batch,)`` are not right."""
        with beside(), torch.no_grad(), unnoticed(self._function):
            ends = {int(t.argmin()), int(t.argmax())}
            rows = [(t[i], torch.tensor([i], device=x.device)) for i in ends]
            if not self._is_right(x.detach(), t, rows, *others):
                raise ValueError(self._refusal(x))

    def given(self, x: Tensor, t: Tensor, *others: Tensor) -> Any:
        """Its value, with ``t: (batch,)`` shaped as was found to be right."""
        return self._function(x, t.reshape(-1, *(1,) * (x.ndim - 1)) if self._wide and t.ndim == 1 else t, *others)

    def _choose(self, x: Tensor, *others: Tensor) -> None:
        low, high = float(self._times.min()), float(self._times.max())
        moments = (low + (high - low) * torch.tensor(MOMENTS, dtype=torch.float64, device="cpu")).to(x)
        which = (torch.arange(len(x), device=x.device) * 7 + 3) // 5 % len(moments)
        rows = [(t, (which == k).nonzero().squeeze(1)) for k, t in enumerate(moments)]
        failure: Exception | None = None
        for self._wide in (False, True) if len(x) > 1 else (True, False):  # one row is right in either way
            try:
                if self._is_right(x, moments[which], rows, *others):
                    return
            except Exception as met:  # a function may fail in any way on a time of a shape that it does not know
                failure = failure or met
        if failure is not None:
            for t in moments:
                self._function(x, t, *others)  # what fails at one time for all, too, fails with its own error
        raise ValueError(self._refusal(x, failure)) from failure

    def _is_right(self, x: Tensor, t: Tensor, rows: list[tuple[Tensor, Tensor]], *others: Tensor) -> bool:
        """Whether ``rows`` of the value at ``t`` are what they are at one time for all."""
        together = self._called(x, t, *others)
        apart = ((i, self._called(x, time.repeat(len(x)), *others)) for time, i in rows if len(i))
        return all(agree(a[i], b[i]) for i, alone in apart for a, b in zip(together, alone, strict=True))

    def _called(self, x: Tensor, t: Tensor, *others: Tensor) -> list[Tensor]:
        """Its values, of the state's shape, or matrices of as many rows; the next one draws the same random numbers."""
        from sdesolve_kernels.trajectory.snapshots import random_states

        rewind = random_states()
        value = self.given(x.clone(), t, *others)  # one that writes into the state is refused later
        rewind()
        *first, last = value if isinstance(value, tuple) else (value,)
        matrix = self._what.endswith("diffusion") and is_matrix(last, x)
        last = last.expand(*x.shape, last.shape[-1]) if matrix else last.expand_as(x)
        return [*(v.expand_as(x) for v in first), last]

    def _refusal(self, x: Tensor, failure: Exception | None = None) -> str:
        why = str(failure).strip().partition("\n")[0][:200] if failure else "its rows are not those of their own times"
        return (
            f"the {self._what} is not right for a time per row, t of shape ({len(x)},): {why}. Where t meets a state "
            f"of shape {tuple(x.shape)} write t.reshape({', '.join(['-1', *'1' * (x.ndim - 1)])}), right for one too"
        )
