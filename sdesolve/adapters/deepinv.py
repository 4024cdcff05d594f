"""Operators of deepinv. The package is not imported: what comes from it is known by its calls."""

from __future__ import annotations

from typing import Any, final

import torch
from torch import Tensor

from sdesolve._internal.arguments import whole_number
from sdesolve.inverse.covariance import conjugate_gradients
from sdesolve.inverse.operators import AbstractOperator
from sdesolve.sde import per_sample


@final
class DeepinvOperator(AbstractOperator):
    """A linear physics of deepinv, ``physics.A(x)`` and ``physics.A_adjoint(y)``, as an operator of inverse problems.

    ``(c A A^T + s I)^-1`` is by conjugate gradients, to rounding or as many iterations as are given. Noise models of
    the physics are left out: posteriors here are told ``noise_std``.

    Args:
        physics: an object with ``A`` and ``A_adjoint``, such as ``deepinv.physics.Blur``.
        state_shape: shape of one state, ``(channels, height, width)``.
        iterations: of conjugate gradients.
        dtype: in which the physics works.
        device: where it is.

    Raises:
        TypeError: one of the two is missing.
        ValueError: ``A`` is not linear, or ``A_adjoint`` not its adjoint: looked at once, on random states.
    """

    def __init__(
        self,
        physics: Any,
        state_shape: tuple[int, ...],
        *,
        iterations: int = 100,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> None:
        name = type(physics).__name__
        missing = [method for method in ("A", "A_adjoint") if not callable(getattr(physics, method, None))]
        if missing:
            raise TypeError(
                f"a linear physics of deepinv has methods A and A_adjoint; this {name} lacks {' and '.join(missing)}"
            )
        self._physics, self.iterations = physics, whole_number(iterations, "iterations", 1)
        self.state_shape = tuple(whole_number(n, "each entry of state_shape", 1) for n in state_shape)
        made = torch.Generator().manual_seed(0)
        x, z = (torch.randn(1, *self.state_shape, dtype=dtype, generator=made).to(device) for _ in range(2))
        with torch.no_grad():
            Ax, Az = self.forward(x), self.forward(z)
            self.observation_shape = tuple(Ax.shape[1:])
            y = torch.randn(Ax.shape, dtype=Ax.dtype, generator=made).to(device)
            tolerance = 100 * torch.finfo(Ax.dtype).eps * Ax.numel() ** 0.5
            mixed = self.forward(2.0 * x - z)
            if float((mixed - (2.0 * Ax - Az)).norm()) > tolerance * float(mixed.norm() + Ax.norm() + Az.norm()):
                raise ValueError(f"{name}.A is not linear, and posteriors here are for linear operators")
            back = self.adjoint(y)
            if back.shape != x.shape:
                raise ValueError(
                    f"{name}.A_adjoint makes states {tuple(back.shape[1:])} of observations, and "
                    f"state_shape is {self.state_shape}"
                )
            if abs(float((Ax * y).sum() - (x * back).sum())) > tolerance * float(Ax.norm() * y.norm()):
                raise ValueError(f"{name}.A_adjoint is not the adjoint of its A: <A x, y> != <x, A^T y>")

    def forward(self, x: Tensor) -> Tensor:
        return self._physics.A(x)

    def adjoint(self, y: Tensor) -> Tensor:
        return self._physics.A_adjoint(y)

    def solve_gram(self, r: Tensor, c: Tensor, s: Tensor) -> Tensor:
        def gram(v: Tensor) -> Tensor:
            return per_sample(c, v) * self.forward(self.adjoint(v)) + per_sample(s, v) * v

        return conjugate_gradients(gram, r, self.iterations)
