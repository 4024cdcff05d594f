"""Gradients of fused integrations: a run and its reverse as one node of torch's graph.

A run whose state, solver or functions need a gradient goes through `sdesolve_kernels.trajectory.backward.Adjoint`. What
that makes is compared with autograd on the first steps before it is trusted, as kernels are.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Sequence
from typing import Any, final

import torch
from sdesolve_kernels.trajectory import (
    Adjoint,
    Cotangents,
    Launch,
    Moments,
    Saved,
    Unsupported,
    agree,
    distinct,
)
from torch import Tensor

from sdesolve.integrate.executors import Eager
from sdesolve.integrate.lowering import Lowered, together
from sdesolve.integrate.problem import Problem
from sdesolve.integrate.save_at import SavePlan

__all__ = ["Again", "check_without_hooks", "compare_gradients", "differentiated"]

_ROUNDING = 64.0


def check_without_hooks(tensors: Sequence[Tensor]) -> None:
    """Refuses tensors whose gradients are looked at on the way."""
    if any(t.requires_grad and t._backward_hooks for t in tensors):
        raise Unsupported("a tensor whose gradient is wanted has hooks")


@final
class _Run(torch.autograd.Function):
    """A run as a function of the state, the solver's numbers and the tensors that its program reads."""

    @staticmethod
    def forward(
        ctx: Any,
        adjoint: Adjoint,
        launch: Launch,
        again: Again,
        x0: Tensor,
        memory: Tensor | None,
        rows: Tensor | None,
        *captured: Tensor,
    ) -> tuple[Tensor | None, ...]:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x0, memory, rows, *captured)
        ctx.adjoint, ctx.again = adjoint, again
        bare = dataclasses.replace(
            launch,
            x0=x0.detach(),
            memory=None if memory is None else memory.detach(),
            rows=None if rows is None else rows.detach(),
            captured=[c.detach() for c in captured],
        )
        saved, ctx.kept = adjoint.run(bare)
        m = saved.moments
        return saved.x1, saved.memory, saved.states, None if m is None else m.mean, None if m is None else m.variance

    @staticmethod
    def backward(ctx: Any, *given: Tensor | None) -> tuple[Any, ...]:
        tensors = ctx.saved_tensors  # and that none was changed since
        if torch.is_grad_enabled():
            inputs = [t if t is not None and t.requires_grad else None for t in tensors]
            return (None, None, None, *ctx.again.differentiated(ctx.kept.launch.saves, inputs, given))
        made = ctx.adjoint.backward(ctx.kept, Cotangents(*given))
        return (None, None, None, made.x0, made.memory, made.rows, *made.captured)


def differentiated(adjoint: Adjoint, launch: Launch, again: Again) -> Saved:
    """A run that is part of torch's graph."""
    start = launch.x0, launch.memory, launch.rows, *launch.captured
    x1, memory, states, mean, variance = _Run.apply(adjoint, launch, again, *start)
    return Saved(x1, states, None if mean is None else Moments(mean, variance), memory)


@final
@dataclasses.dataclass(frozen=True)
class Again:
    """The same integration in torch, step by step, for derivatives of derivatives.

    Attributes:
        problem: the integration.
        lowered: its steps.
        observe: what was saved of all that is carried; ``None`` for the state itself.
        unchanged: whether the functions are still those that ran.
    """

    problem: Problem
    lowered: Lowered
    observe: Callable[[tuple[Tensor, ...]], Tensor] | None
    unchanged: Callable[[], bool]

    def differentiated(
        self, saves: Sequence[int], inputs: Sequence[Tensor | None], given: Sequence[Tensor | None]
    ) -> list[Tensor | None]:
        """Gradients that can be differentiated."""
        if not self.unchanged():
            raise RuntimeError(
                "what the functions of an integration hold has changed since it ran, and its second derivatives are no "
                "longer known; differentiate before that, or run it with backend='eager'"
            )
        warnings.warn(
            "create_graph=True: this integration ran fused, and is run again step by step in torch so that its "
            "gradient can be differentiated; backend='eager' runs it once",
            stacklevel=2,
        )
        x0 = inputs[0] if inputs[0] is not None else self.problem.x0
        outputs = self._outputs(x0, inputs[1], saves)
        pairs = [(y, g) for y, g in zip(outputs, given, strict=True) if y is not None and g is not None]
        wanted = [t for t in inputs if t is not None]
        found = iter(
            torch.autograd.grad(
                [y for y, _ in pairs], wanted, [g for _, g in pairs], create_graph=True, allow_unused=True
            )
        )
        return [None if t is None else next(found) for t in inputs]

    def _outputs(self, x0: Tensor, memory: Tensor | None, saves: Sequence[int]) -> list[Tensor | None]:
        """What the run left, as `_Run.forward` returns it."""
        problem, save = self.problem, self.problem.save
        lowered = self.lowered
        bare = dataclasses.replace(
            problem, x0=x0, save=SavePlan(problem.times, None), check_finite=False, progress=False
        )
        if memory is not None:
            _, *parts = self.lowered.apart(x0, memory)
            own = self.lowered.memory
            bare = dataclasses.replace(bare, memory=tuple(parts[:own]))
            lowered = dataclasses.replace(lowered, extra=tuple(parts[own:]))
        run, states = Eager().begin(bare, lowered), []
        for k in range(problem.first, problem.steps + 1):
            if k in set(saves):
                states.append(run.states[0] if self.observe is None else self.observe(run.states))
            if k < problem.steps:
                run.advance()
        x1, *rest = run.states
        remembered = together(tuple(rest))
        if not states:
            return [x1, remembered, None, None, None]
        flat = torch.stack([x.reshape(len(x), -1) for x in states])
        if not save.moments:
            return [x1, remembered, flat, None, None]
        return [x1, remembered, None, flat.double().mean(1), flat.double().var(1)]


def compare_gradients(
    adjoint: Adjoint,
    launch: Callable[[Tensor], Launch],
    eager: Callable[[Tensor], tuple[Tensor, Tensor | None, Tensor | None]],
    wanted: Sequence[Tensor],
    where: Sequence[int],
    x0: Tensor,
    eps: float,
) -> None:
    """Compares a reverse kernel with autograd, on all rows of a batch and on states near `x0`.

    Args:
        adjoint: the kernels.
        launch: a run of a few steps from a state, which saves the end if there is something to observe.
        eager: the same in torch: the state at the end, what is carried beside it where that is looked at, and what is
            observed.
        wanted: tensors that the functions hold whose gradients are wanted.
        where: their places among what the program captured.
        x0: ``(batch, *state)``.
        eps: the rounding error of what they compute in.

    Raises:
        Unsupported: they differ.
    """
    generator = torch.Generator().manual_seed(0x5DE)
    with torch.no_grad():
        carried = eager(x0)[1] is not None

    def cotangent(y: Tensor) -> Tensor:
        generator.manual_seed(0x5DE)
        return torch.randn(y.shape, generator=generator, dtype=torch.float64).to(y)

    def by_autograd(x: Tensor) -> list[Tensor]:
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            outputs = [y for y in eager(x) if y is not None and y.requires_grad]
            given = [cotangent(y) for y in outputs]
            inputs = [x, *wanted]
            found: Sequence[Tensor | None] = [None] * len(inputs)
            if outputs:  # what tensors were made of before belongs to the user, and is kept
                found = torch.autograd.grad(outputs, inputs, given, retain_graph=True, allow_unused=True)
        return [torch.zeros_like(t) if f is None else f.detach() for f, t in zip(found, inputs, strict=True)]

    def by_kernel(x: Tensor) -> list[Tensor]:
        saved, kept = adjoint.run(launch(x))
        states = None if saved.states is None else cotangent(saved.states[0])[None]
        memory = None if saved.memory is None or not carried else cotangent(saved.memory)
        made = adjoint.backward(kept, Cotangents(cotangent(saved.x1), memory, states))
        direct = [c for c in (made.captured[i] for i in where) if c is not None]
        if not direct:
            return [made.x0]
        # A tensor may have been made of others that are wanted too.
        found = torch.autograd.grad(wanted, wanted, direct, retain_graph=True)
        return [made.x0, *found]

    def of_state(x: Tensor) -> Tensor:
        ours, theirs = by_kernel(x)[0], by_autograd(x)[0]
        return torch.where(theirs.isnan() & ours.isfinite(), ours, theirs)

    agree(of_state, lambda x: by_kernel(x)[0], x0, eps)
    if all(_apart(by_kernel, by_autograd, distinct(x0, i), eps) for i in (0, 1)):
        raise Unsupported("the gradient of its kernel and that of its steps in torch differ by more than rounding")


def _apart(
    ours: Callable[[Tensor], list[Tensor]], theirs: Callable[[Tensor], list[Tensor]], x: Tensor, eps: float
) -> bool:
    """Whether gradients of what all paths share differ, by more than roundings and what those of the state make."""
    sign = torch.ones_like(x)
    sign.reshape(-1)[::2] = -1
    made, expected, moved = ours(x)[1:], theirs(x)[1:], theirs(x * (1 + 4 * eps * sign))[1:]
    for a, b, c in zip(made, expected, moved, strict=True):
        known = b.isfinite()
        a, b, c = a[known].double(), b[known].double(), c[known].double()
        size = b.abs().max() if b.numel() else 0.0
        allowed = _ROUNDING * (eps * len(x) ** 0.5 * size + (c - b).abs().nan_to_num(0.0).max() if b.numel() else 0.0)
        if bool(((a - b).abs() > allowed).any()) or not bool(a.isfinite().all()):
            return True
    return False
