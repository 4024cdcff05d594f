"""Solvers of semilinear equations, whose steps are linear combinations with coefficients known before the first step.

Reverse SDEs and probability flows of linear diffusions are linear in the state and in the score, with rates that depend
on time alone. So whatever a scheme integrates exactly or expands in a series, each of its stages ends up as

    ``row(x, y_1, ..., y_K) = a x + b_1 y_1 + ... + b_K y_K + c z``

with numbers ``(a, b_1, ..., b_K, c)`` that are computed for the whole grid at once, in float64. A scheme is a table of
such rows and a few lines that say what they are applied to. Those lines run in plain torch, by the ``linear_step``
kernel, and under a tracer.
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from sdesolve.sde import AbstractSemilinear, per_sample
from sdesolve.solvers.base import AbstractSolver


class Row(Protocol):
    """``a x + b_1 terms_1 + ... + b_K terms_K + c z`` for one step; at most four terms."""

    def __call__(self, x: Tensor, /, *terms: Tensor) -> Tensor: ...


class Evaluate(Protocol):
    """The field ``s(x, t)`` at evaluation time ``i`` of a step; ``x`` itself where the step skips that evaluation."""

    def __call__(self, x: Tensor, i: int = 0, /) -> Tensor: ...


@dataclasses.dataclass(frozen=True)
class Table:
    """All numbers of a scheme on a grid, float64 on the host; ``[, batch]`` for grids with times per sample.

    Attributes:
        times: where the field is evaluated, ``(steps, evaluations[, batch])``.
        rows: ``(steps, K + 2[, batch])`` for each `Row` of a step, with columns ``(a, b_1, ..., b_K, c)``.
        noisy: for each `Row`, whether it adds noise; where not, its last column is 0. The ``j``-th noisy row of step
            ``k`` takes the standard normals of step ``k draws + j`` of the driving noise.
        skipped: ``(steps, evaluations)``, true where all coefficients of an evaluation are 0 and none is needed. The
            time there is a safe one all the same.
    """

    times: Tensor
    rows: tuple[Tensor, ...]
    noisy: tuple[bool, ...]
    skipped: Tensor

    @property
    def draws(self) -> int:
        """Independent draws of noise a step."""
        return sum(self.noisy)

    @property
    def steps(self) -> int:
        return len(self.times)


class AbstractTabulated(AbstractSolver):
    """A solver whose steps on a semilinear equation are rows of a `Table`."""

    @property
    def memory(self) -> int:
        """Tensors of the state's shape that are carried from step to step beside the state; zero at the start."""
        return 0

    @abc.abstractmethod
    def table(self, sde: AbstractSemilinear, times: Tensor) -> Table | None:
        """The numbers of the scheme for the steps between consecutive ``times``.

        Args:
            sde: the equation.
            times: ``(steps + 1,)`` or ``(steps + 1, batch)``, float64.

        Returns:
            The table; ``None`` if the rates of ``sde`` depend on more than time.

        Raises:
            ValueError: the scheme is not one for this equation or grid.
        """

    def denoised_table(self, sde: AbstractSemilinear, times: Tensor) -> Table | None:
        """`table` for the denoised state ``D = E[x_0 | x_t]`` in place of the score, which says nothing at pure noise.

        ``None`` for a scheme that is none in ``D``, or that cannot start where ``alpha`` is 0.
        """
        return None

    @abc.abstractmethod
    def advance(
        self, field: Evaluate, rows: Sequence[Row], x: Tensor, memory: tuple[Tensor, ...]
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """State and memory after a step, from those before it: pure, without a look at any value."""


def none_skipped(times: Tensor, evaluations: int) -> Tensor:
    """`Table.skipped` of a scheme that makes every evaluation of every step."""
    return torch.zeros(len(times) - 1, evaluations, dtype=torch.bool, device="cpu")


def torch_row(numbers: Tensor, z: Tensor | None) -> Row:
    """A `Row` in plain torch: its definition, and what a tracer is shown.

    Args:
        numbers: ``(a, b_1, ..., b_K, c)``, ``(K + 2,)`` or ``(K + 2, batch)``.
        z: standard normals like the state; ``None`` for a row without noise.
    """

    def combine(x: Tensor, *terms: Tensor) -> Tensor:
        a, *b, c = (per_sample(number, x) for number in numbers.unbind(0))
        total = a * x
        for b_i, term in zip(b, terms, strict=True):
            total = total + b_i * term
        return total if z is None else total + c * z

    return combine


def row_step(
    solver: AbstractTabulated,
    field: Callable[[Tensor, Tensor], Tensor],
    times: Sequence[Tensor],
    rows: Sequence[Tensor],
    normals: Sequence[Tensor | None],
    x: Tensor,
    memory: tuple[Tensor, ...],
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """State and memory after one step with given numbers, in plain torch.

    Args:
        solver: the scheme.
        field: ``s(x, t)``.
        times: evaluation times, ``()`` or ``(batch,)`` each.
        rows: coefficients of each row, ``(K + 2,)`` or ``(K + 2, batch)``.
        normals: for each row, standard normals like ``x``, or ``None`` for a row without noise.
        x: the state.
        memory: what the solver carries.
    """
    made = [torch_row(*pair) for pair in zip(rows, normals, strict=True)]
    return solver.advance(lambda y, i=0: field(y, times[i]), made, x, memory)
