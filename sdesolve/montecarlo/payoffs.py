"""What an expectation is taken of, looked at before and while it is used."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sdesolve._internal.arguments import kind_of, short
from sdesolve.carry import Tree
from sdesolve.integrate.checks import bad_rows, check_state
from sdesolve.integrate.solution import Solution
from sdesolve.jumps import AbstractJumping
from sdesolve.sde import AbstractSDE, Noise

Payoff = Callable[..., Tensor]
_MOST_ROWS, _MOST_NUMBERS = 1 << 16, 1 << 22


class Expectation:
    """``E payoff(X(t1))``, or of what is carried along too, for each start: checked arguments, and values of paths.

    Args:
        sde: the equation.
        x0: ``(starts, *state)``.
        payoff: of states ``(paths, *state)``, and of what is carried along paths if anything is; ``(paths, *values)``.

    Attributes:
        most: paths of each start that are taken at once: memory does not grow with how many there are in all.

    Raises:
        TypeError, ValueError: bad arguments.
    """

    def __init__(self, sde: AbstractSDE, x0: Tensor, payoff: Payoff) -> None:
        check_state(x0)
        if len(x0) == 0:
            raise ValueError("x0 must have a row for each start, shape (starts, *state), and has none")
        if isinstance(sde, AbstractSDE) and sde.noise is Noise.NONE and not isinstance(sde, AbstractJumping):
            raise ValueError("an ODE has one path and no expectation to estimate: take payoff(solve(...).x1)")
        if x0.requires_grad:
            raise ValueError(
                "x0 requires a gradient, and none flows through an estimate; give x0.detach(). Gradients of "
                "expectations come from payoff(solve(...).x1).mean().backward()"
            )
        if not callable(payoff):
            raise TypeError(f"payoff must be a function of the states at t1, got {kind_of(payoff)}")
        self.x0, self._payoff, self._checked = x0, payoff, False
        rows = min(_MOST_ROWS, _MOST_NUMBERS // max(1, x0[0].numel()))
        self.most = max(64, 1 << (max(rows // len(x0), 1).bit_length() - 1))
        self.values: tuple[int, ...] = ()

    @property
    def starts(self) -> int:
        return len(self.x0)

    def rows(self, paths: int) -> Tensor:
        """Where ``paths`` paths of each start begin: row ``i`` takes path ``i mod paths``."""
        return self.x0.repeat_interleave(paths, 0)

    def of(self, solution: Solution, paths: int, where: str) -> Tensor:
        """Values of paths, ``(paths, starts * values)``, float64.

        Args:
            solution: of ``starts * paths`` paths.
            paths: of each start.
            where: for messages, which paths these are.

        Raises:
            TypeError: no tensor of real numbers.
            ValueError: not a value for each path, values that depend on other paths, or that are not finite.
        """
        ends = _ends(solution)
        return self._of(ends, paths, where)

    def _of(self, ends: Sequence[Tree], paths: int, where: str) -> Tensor:
        P, x1 = self._payoff(*ends), ends[0]
        if not isinstance(P, Tensor) or P.is_complex():
            given = P.dtype if isinstance(P, Tensor) else kind_of(P)
            raise TypeError(f"payoff must return a tensor of real numbers, got {given}")
        if P.ndim == 0 or len(P) != len(x1) or P.numel() == 0:
            raise ValueError(
                f"payoff of states {tuple(x1.shape)} must have a row for each, ({len(x1)},) or ({len(x1)}, *values), "
                f"got {tuple(P.shape)}; leave the mean over paths to the estimate"
            )
        P = P.detach().double()
        if not bool(P.isfinite().all()):
            row = int(bad_rows(P).nonzero()[0])
            state = short(x1[row].flatten()[:6].tolist())
            raise ValueError(f"payoff is nan or inf for row {row} of {where}, at the state {state}")
        if not self._checked:
            self._check_rows(ends, P)
            self._checked, self.values = True, tuple(P.shape[1:])
        return P.reshape(self.starts, paths, -1).transpose(0, 1).reshape(paths, -1)

    def _check_rows(self, ends: Sequence[Tree], P: Tensor) -> None:
        """Refuses a payoff that is another one for half of the batch: of several paths at once, or at random."""
        half = max(1, len(P) // 2)
        alone = self._payoff(*(_mapped(lambda c: c[:half].clone(), end) for end in ends)).detach().double()
        scale = float(P.abs().mean())
        if alone.shape != P[:half].shape or not torch.allclose(alone, P[:half], rtol=1e-4, atol=1e-4 * scale):
            raise ValueError(
                "payoff gives a path another value if fewer are given with it, or if it is asked again; it must be a "
                "function of each state alone, with no mean over paths and nothing random"
            )

    def resolution(self, solution: Solution, paths: int) -> Tensor:
        """By how much rounding the states alone changes values, on average: ``(starts * values,)``."""
        ends, eps = _ends(solution), torch.finfo(self.x0.dtype).eps
        rounded = [_mapped(lambda c: c * (1.0 + eps) if c.is_floating_point() else c, end) for end in ends]
        exact, moved = (self._of(values, paths, "the first paths") for values in (ends, rounded))
        return torch.maximum((moved - exact).abs().mean(0), eps * exact.abs().mean(0))

    def shaped(self, values: Tensor) -> Tensor:
        """``(*values)`` for one start, ``(starts, *values)`` for more."""
        values = values.to("cpu")
        return values.reshape(self.values if self.starts == 1 else (self.starts, *self.values))


def _ends(solution: Solution) -> tuple[Tree, ...]:
    """What a payoff is given."""
    return (solution.x1,) if solution.carry is None else (solution.x1, solution.carry)


def _mapped(function: Callable[[Tensor], Tensor], tree: Tree) -> Tree:
    """A function of each tensor."""
    if isinstance(tree, dict):
        return {name: _mapped(function, part) for name, part in tree.items()}
    return type(tree)(_mapped(function, part) for part in tree) if isinstance(tree, tuple | list) else function(tree)


def check_one_time(value: Any, name: str) -> None:
    """Refuses times of each path: rows are paths of the estimate, and not the caller's.

    Raises:
        ValueError: there are several.
    """
    if np.ndim(value) != 0:
        raise ValueError(f"{name} must be one time for all paths, got {short(value)}")
