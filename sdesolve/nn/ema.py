"""Exponential moving average of a module's weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import final

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from sdesolve._internal.arguments import short, whole_number

_SIXTEEN_BITS = (torch.float16, torch.bfloat16)


@final
class EMA:
    """``a <- d a + (1 - d) w`` after every optimiser step, with ``d = min(decay, (1 + n) / (10 + n))`` at update ``n``.

    The warm-up of ``d`` keeps the random initial weights from lingering: without it their share after ``n`` updates is
    ``decay^n``, still 0.37 after a thousand updates at 0.999.

    What is averaged goes by kind. Parameters are, real and complex ones, and the running mean and variance of batch and
    instance normalisation, which are averages of what the weights made of the data. Every other buffer is copied as it
    is: the mean of two unit vectors (as spectral normalisation keeps), of two counts or of two caches is none. A buffer
    that shares its memory with a parameter is that parameter. Averages of 16-bit weights are kept in float32, where a
    thousandth of a weight is not lost; a module keeps its own dtype when they are copied into it.

    Args:
        module: whose weights are averaged. It is not changed except by `copy_to` and `swap`.
        decay: upper limit of ``d``, in [0, 1); 0 follows the weights exactly.

    Raises:
        ValueError: ``decay`` outside [0, 1); a lazy module that has no weights yet.
    """

    def __init__(self, module: nn.Module, decay: float = 0.999) -> None:
        if not 0.0 <= decay < 1.0:
            raise ValueError(f"decay must be in [0, 1), got {short(decay)}; 0 means no averaging")
        self.decay, self.updates = float(decay), 0
        self._module = module
        state = _state(module)
        lazy = [name for name, value in state.items() if nn.parameter.is_lazy(value)]
        if lazy:
            raise ValueError(f"{lazy[0]} of this module has no shape yet: call the module once on a sample, then start")
        self._averaged = _averaged(module, state)
        self._average = {
            name: _wide(value) if name in self._averaged else value.detach().clone() for name, value in state.items()
        }

    @torch.no_grad()
    def update(self) -> None:
        """Takes the module's present weights into the average."""
        d = min(self.decay, (1 + self.updates) / (10 + self.updates))
        self.updates += 1
        average: list[Tensor] = []
        weights: list[Tensor] = []
        state = _state(self._module)
        for name, value in state.items():
            if name in self._averaged:
                kept = self._average[name]
                average.append(kept)
                weights.append(value if value.dtype == kept.dtype else value.to(kept.dtype))
            else:
                self._copy(name, value)
        if len(self._average) > len(state):
            for name in self._average.keys() - state.keys():
                del self._average[name]  # a cache that the module has dropped
        if average:  # one call for all tensors; at d = 0 it copies
            torch._foreach_lerp_(average, weights, 1.0 - d)

    @torch.no_grad()
    def copy_to(self, module: nn.Module | None = None) -> None:
        """Writes the average into ``module`` (by default the one that is averaged)."""
        _write(self._module if module is None else module, self._average)

    @contextmanager
    def swap(self) -> Iterator[None]:
        """Within the ``with`` block the module has the averaged weights; afterwards its own again."""
        own = {name: value.detach().clone() for name, value in _state(self._module).items()}
        self.copy_to()
        try:
            yield
        finally:
            _write(self._module, own)

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

    def _copy(self, name: str, value: Tensor) -> None:
        kept = self._average.get(name)
        if kept is not None and (kept.shape, kept.dtype, kept.device) == (value.shape, value.dtype, value.device):
            kept.copy_(value)
        else:  # a cache that is new, or has grown
            self._average[name] = value.detach().clone()


def _state(module: nn.Module) -> dict[str, Tensor]:
    """Live parameters and buffers by name; what else a module saves (`nn.Module.get_extra_state`) is no tensor."""
    return {name: value for name, value in module.state_dict(keep_vars=True).items() if isinstance(value, Tensor)}


@torch.no_grad()
def _write(module: nn.Module, state: Mapping[str, Tensor]) -> None:
    live = _state(module)
    for name, value in state.items():
        owner, _, leaf = name.rpartition(".")
        if name in live and live[name].shape == value.shape:
            live[name].copy_(value)
        elif leaf in module.get_submodule(owner)._buffers:
            setattr(module.get_submodule(owner), leaf, value.clone())  # a cache of another size
        else:
            raise ValueError(f"{name} of shape {tuple(value.shape)} has no place in this {type(module).__name__}")


def _averaged(module: nn.Module, state: Mapping[str, Tensor]) -> frozenset[str]:
    """The names whose values are averaged; the others are copied."""
    statistics = {
        f"{prefix}.{name}".lstrip(".")
        for prefix, part in module.named_modules(remove_duplicate=False)
        if isinstance(part, _NormBase)
        for name in ("running_mean", "running_var")
    }
    weights = [_extent(p) for p in module.parameters()]

    def is_weight(value: Tensor) -> bool:
        start, end = _extent(value)
        return isinstance(value, nn.Parameter) or any(start < last and first < end for first, last in weights)

    return frozenset(
        name
        for name, value in state.items()
        if (value.is_floating_point() or value.is_complex()) and (name in statistics or is_weight(value))
    )


def _extent(value: Tensor) -> tuple[int, int]:
    """First address of a tensor's memory, and the one behind its last."""
    reach = sum((n - 1) * abs(k) for n, k in zip(value.shape, value.stride(), strict=True)) + 1
    return value.data_ptr(), value.data_ptr() + reach * value.element_size() * (value.numel() > 0)


def _wide(value: Tensor) -> Tensor:
    return value.detach().to(torch.float32 if value.dtype in _SIXTEEN_BITS else value.dtype, copy=True)
