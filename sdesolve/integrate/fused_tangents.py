"""Forward derivatives of fused integrations: which tensors have tangents, and what a kernel is compared with.

A run that takes tensors with tangents goes through `sdesolve_kernels.trajectory.tangents.Pushforward`. All that is
made for it (the trace, the comparison of its values) sees plain tensors in their place, outside of all transforms.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import final

import torch
from sdesolve_kernels.library import has_tangent
from sdesolve_kernels.trajectory import Guards, agree
from sdesolve_kernels.transforms import Directions, directions, is_transformed, outside_transforms, values_alone
from torch import Tensor

from sdesolve.integrate.executors import CannotExecute
from sdesolve.integrate.lowering import Lowered
from sdesolve.integrate.problem import Problem

__all__ = ["Tangents", "compare_tangents"]

_AT_ONCE = 8  # directions that one kernel is for, at most; further ones take further launches of it


@final
class Tangents:
    """Tensors of one integration that have tangents or belong to a transform, and plain ones in place of them.

    Args:
        here: which derivatives are being taken.
        guards: what the functions hold.

    Attributes:
        guards: what they hold, as it is.
    """

    def __init__(self, here: Directions, guards: Guards) -> None:
        self.here, self.guards = here, guards
        self._values: dict[int, Tensor] = {}
        self._given: list[Tensor] = []  # kept alive, so that no other tensor gets their identity
        self._moving: set[int] = set()  # plain ones, of tensors with tangents
        self._within: Callable[[], contextlib.AbstractContextManager[None]] = contextlib.nullcontext

    @classmethod
    def of(cls, problem: Problem, lowered: Lowered, guards: Guards) -> Tangents | None:
        """Those of an integration; `None` if it has none.

        Raises:
            CannotExecute: a kernel has no derivatives of this kind.
        """
        here, own = directions(), (problem.x0, *problem.memory, *lowered.extra)
        table = () if lowered.table is None else (lowered.table,)
        if here is None or not (is_transformed() or has_tangent(*own, *table, *guards.tensors)):
            return None
        if lowered.rule is not None:
            raise CannotExecute("tangents are wanted of steps that each path chooses, which kernels have none of")
        return cls(here, guards)

    def value(self, x: Tensor) -> Tensor:
        """A plain tensor of the same values; itself, where it is plain.

        Raises:
            CannotExecute: it is mapped or differentiated in another way as well.
        """
        known = self._values.get(id(x))
        if known is not None:
            return known
        try:
            value, tangent = self.here.split(x)
        except ValueError as met:
            raise CannotExecute(str(met)) from None
        if value is x or (tangent is None and not is_transformed()):
            value = x
        else:
            with outside_transforms():
                self._values[id(x)] = value.detach()
            self._given.append(x)
        if torch.is_grad_enabled() and (value.requires_grad or x.requires_grad):
            raise CannotExecute(
                "a tensor needs a gradient where tangents are wanted, and a kernel has one of the two; torch.no_grad() "
                "leaves tangents alone"
            )
        if tangent is not None:
            self._moving.add(id(self._values[id(x)]))
        return self._values.get(id(x), x)

    def moves(self, value: Tensor) -> bool:
        """Whether the tensor that has this plain one has a tangent."""
        return id(value) in self._moving

    def valued(self, guards: Guards) -> Guards:
        """What the functions hold, with plain tensors."""
        self.guards = guards
        with self._within():
            return guards.holding(tuple(map(self.value, guards.tensors)))

    def plain(self, problem: Problem, lowered: Lowered) -> tuple[Problem, Lowered]:
        """An integration of plain tensors."""
        x0, *memory = map(self.value, (problem.x0, *problem.memory))
        table = None if lowered.table is None else self.value(lowered.table)
        rows = None if lowered.rows is None else self.value(lowered.rows)
        times = self.value(problem.times)
        return (
            dataclasses.replace(problem, x0=x0, memory=tuple(memory), times=times),
            dataclasses.replace(lowered, table=table, rows=rows, extra=tuple(map(self.value, lowered.extra))),
        )

    def key(self, guards: Guards, lowered: Lowered) -> tuple[object, ...]:
        """What a kernel depends on."""
        which = tuple([i for i, t in enumerate(guards.tensors) if self.moves(t)])
        return min(self.here.count, _AT_ONCE), which, lowered.table is not None and self.moves(lowered.table)

    @contextlib.contextmanager
    def values_alone(self) -> Iterator[None]:
        """Functions read plain tensors alone inside the ``with`` block."""
        with values_alone(self._values) as within:
            self._within = within
            try:
                yield
            finally:
                self._within = contextlib.nullcontext

    def differentiated(self, function: Callable[[Tensor], Sequence[Tensor | None]], x: Tensor, v: Tensor) -> Tensor:
        """Tangents of what a function makes of a state, ``(batch, numbers)``, where it reads tensors as they are.

        Args:
            function: of a state, ``(batch, *state)``.
            x: the state.
            v: its tangents, ``(count, batch, *state)``.
        """
        found: list[Tensor] = []
        with self._within():
            outputs = [(y, *self.here.split(y)) for y in function(self.here.join(x, v)) if y is not None]
        for _, value, tangent in outputs:
            zero = value.new_zeros(self.here.count, *value.shape)
            found.append((zero if tangent is None else tangent).movedim(0, 1).reshape(len(x), -1))
        return torch.cat(found, 1).detach()


def compare_tangents(
    tangents: Tangents,
    kernel: Callable[[Tensor], Sequence[Tensor | None]],
    eager: Callable[[Tensor], Sequence[Tensor | None]],
    x0: Tensor,
    eps: float,
) -> None:
    """Compares tangents of a kernel with torch's, on all rows of a batch and on states near `x0`.

    Args:
        tangents: of which derivatives.
        kernel: what a run of a few steps leaves, from a state.
        eager: the same in torch.
        x0: ``(batch, *state)``, plain.
        eps: the rounding error of what they compute in.

    Raises:
        Unsupported: they differ.
    """
    generator = torch.Generator().manual_seed(0x5DE)
    shape = (tangents.here.count, *x0.shape)
    v = torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu").to(x0)
    agree(lambda x: tangents.differentiated(eager, x, v), lambda x: tangents.differentiated(kernel, x, v), x0, eps)
