"""Energy models: laws known up to their normaliser, whose score is a gradient."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import final

import torch
from torch import Tensor, nn

from sdesolve._internal.arguments import short
from sdesolve.sde import SDE


@final
class EnergyScore(nn.Module):
    """``score(x, t) = -grad_x E(x, t)``, the score of ``p_t(x) = exp(-E(x, t)) / Z(t)``; ``Z`` is never needed.

    It goes wherever a score does, and as the network of a `NetworkScore`. In `sample` and under `torch.no_grad` the
    gradient is taken and nothing else recorded; where gradients are on, as in training, it is itself differentiable, in
    the parameters of the energy and in ``x``. Unlike a network's output, it is always a gradient field. LeCun et al.
    2006; Salimans and Ho 2021 (Should EBMs model the energy or the score?).

    Args:
        energy: a function or module ``(x, t) -> E`` with ``E`` of shape ``(batch,)``; row ``i`` must depend on row
            ``i`` of ``x`` alone (no batch normalisation). For an energy without time: ``lambda x, t: E(x)``.

    Raises:
        TypeError: ``energy`` cannot be called. When called: it returns no tensor, or one that does not depend on ``x``.
        ValueError: when called: not one number per sample.

    Example:
        >>> well = EnergyScore(lambda x, t: (x.square().sum(1) - 1.0).square())
        >>> with torch.no_grad():
        ...     chain = solve(well.langevin(), x0, 0.0, 100.0, 10_000, solver=EulerMaruyama(), seed=0)
    """

    def __init__(self, energy: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        if not callable(energy):
            raise TypeError(f"energy must be a function or module of (x, t), got {type(energy).__name__}")
        self._energy = energy

    def energy(self, x: Tensor, t: Tensor) -> Tensor:
        """``E(x, t)``, ``(batch,)``, checked."""
        E = self._energy(x, t)
        if not isinstance(E, Tensor):
            raise TypeError(f"the energy must return a tensor of shape ({len(x)},), got {type(E).__name__}")
        if E.shape != x.shape[:1]:
            hint = "; drop the last axis with .squeeze(-1)" if E.shape == (*x.shape[:1], 1) else ""
            raise ValueError(f"the energy must return one number per sample, ({len(x)},), got {tuple(E.shape)}{hint}")
        return E

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """``-grad_x E(x, t)``: ``x: (batch, *state)``, ``t`` of shape ``()`` or ``(batch,)``."""
        training = torch.is_grad_enabled()
        with torch.inference_mode(False), torch.enable_grad():
            x = x.clone() if x.is_inference() else x
            leaf = x if x.requires_grad else x.detach().requires_grad_()
            E = self.energy(leaf, t)
            if not E.requires_grad:
                raise TypeError("the energy does not depend on x by differentiable operations")
            (gradient,) = torch.autograd.grad(E.sum(), leaf, create_graph=training, allow_unused=True)
        if gradient is None:
            raise TypeError("the energy does not depend on x by differentiable operations")
        return -gradient

    def langevin(self, temperature: float = 1.0) -> SDE:
        """Overdamped Langevin dynamics, ``dX = -grad E(X, t) dt + sqrt(2 temperature) dW``.

        At a fixed ``t`` its law tends to ``exp(-E / temperature) / Z``; the ``t`` that the energy sees is that of the
        solver, so bind it, ``EnergyScore(lambda x, _: E(x, t))``, if the energy depends on it. Discretised, the
        stationary law is off by the order of the step; `sdesolve.mcmc` has chains that correct for that.

        Raises:
            ValueError: ``temperature`` is not positive and finite.
        """
        if not 0.0 < temperature < math.inf:
            raise ValueError(f"temperature must be positive and finite, got {short(temperature)}")
        g = math.sqrt(2.0 * temperature)

        def diffusion(x: Tensor, t: Tensor) -> Tensor:
            return torch.full((), g, dtype=x.dtype, device=x.device)

        return SDE(self, diffusion, noise="additive", calculus="ito")
