"""Exponential moving average of a module's weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import final

import torch
from torch import Tensor, nn

from sdesolve._internal.arguments import whole_number


@final
class EMA:
    """``a <- d a + (1 - d) w`` after every optimiser step, with ``d = min(decay, (1 + n) / (10 + n))`` at update ``n``.

    The warm-up of ``d`` keeps the random initial weights from lingering: without it their share after ``n`` updates is
    ``decay^n``, still 0.37 after a thousand updates at 0.999. Parameters and floating-point buffers are averaged, other
    buffers are copied.

    Args:
        module: whose weights are averaged. It is not changed except by `copy_to` and `swap`.
        decay: upper limit of ``d``, in [0, 1); 0 follows the weights exactly.

    Raises:
        ValueError: ``decay`` outside [0, 1).
    """

    def __init__(self, module: nn.Module, decay: float = 0.999) -> None:
        if not 0.0 <= decay < 1.0:
            raise ValueError(f"decay must be in [0, 1), got {decay}; 0 means no averaging")
        self.decay, self.updates = float(decay), 0
        self._module = module
        self._average = {name: value.detach().clone() for name, value in module.state_dict().items()}

    @torch.no_grad()
    def update(self) -> None:
        """Takes the module's present weights into the average."""
        d = min(self.decay, (1 + self.updates) / (10 + self.updates))
        self.updates += 1
        average: list[Tensor] = []
        weights: list[Tensor] = []
        for name, value in self._module.state_dict().items():
            if value.is_floating_point():
                average.append(self._average[name])
                weights.append(value.detach())
            else:
                self._average[name].copy_(value)
        if average:  # one call for all tensors; at d = 0 it copies
            torch._foreach_lerp_(average, weights, 1.0 - d)

    @torch.no_grad()
    def copy_to(self, module: nn.Module | None = None) -> None:
        """Writes the average into ``module`` (by default the one that is averaged)."""
        (self._module if module is None else module).load_state_dict(self._average)

    @contextmanager
    def swap(self) -> Iterator[None]:
        """Within the ``with`` block the module has the averaged weights; afterwards its own again."""
        own = {name: value.detach().clone() for name, value in self._module.state_dict().items()}
        self.copy_to()
        try:
            yield
        finally:
            self._module.load_state_dict(own)

    def state_dict(self) -> dict[str, Tensor]:
        """The averaged weights by name; `updates` is apart. The tensors are the live ones, not copies."""
        return dict(self._average)

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor], updates: int) -> None:
        """Takes up an average where `state_dict` and `updates` left it.

        Raises:
            ValueError: the names or shapes are not those of the module.
        """
        whole_number(updates, "updates", 0)
        given = {name: tuple(value.shape) for name, value in state.items()}
        wanted = {name: tuple(value.shape) for name, value in self._average.items()}
        if given != wanted:
            odd = sorted(set(given.items()) ^ set(wanted.items()))
            raise ValueError(f"this average belongs to another module; differing (name, shape): {odd[:6]}")
        for name, value in state.items():
            self._average[name].copy_(value)
        self.updates = updates
